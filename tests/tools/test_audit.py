"""tools/audit.py: one answer, an exit code for it, and files that hold it."""

from __future__ import annotations

import json

import pytest
import torch
from support.audited import records_of, texts, written, yarn_model
from support.tool import run_tool_here

from minqwen.lab.faults import FAULTS, build
from minqwen.model import Native


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return written(tmp_path_factory.mktemp("audit-tool") / "model", *yarn_model())


def jsonl(path, name=None, dtype=torch.bfloat16):
    """What an engine, with a mistake or without, says of some texts."""
    config, weights = yarn_model()
    engine = build(config, weights, dtype, Native())
    if name is not None:
        engine = FAULTS[name].model(config, weights, dtype=dtype)
    lines = []
    for record in records_of(engine, texts(97)):
        logprobs = [entry.logprob for entry in record.entries]
        ids = list(record.ids)
        line = {"prompt_token_ids": ids[:1], "token_ids": ids[1:], "logprobs": logprobs}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_right_engine_exits_with_0_and_a_wrong_one_with_1(model, tmp_path):
    done = run_tool_here("audit.py", "--jsonl", jsonl(tmp_path / "a.jsonl"), "--model", model)
    assert done.code == 0 and done.out.startswith("agrees: "), done.err
    wrong = jsonl(tmp_path / "b.jsonl", "yarn-off")
    files = ("--json", tmp_path / "b.json", "--html", tmp_path / "b.html")
    done = run_tool_here("audit.py", "--jsonl", wrong, "--model", model, *files)
    assert done.code == 1 and "most like yarn-off" in done.out.splitlines()[0]
    told = json.loads((tmp_path / "b.json").read_text())
    assert told["verdict"] == "diverge" and told["explained_by"]["name"] == "yarn-off"
    assert told["units"] > told["low"] > 1.5 and len(told["tokens"]) == 300
    page = (tmp_path / "b.html").read_text()
    assert "<strong>diverge</strong>" in page and FAULTS["yarn-off"].symptom in page
    assert "http" not in page and "<script" not in page  # nothing from outside


def test_of_a_pair_the_side_that_is_wrong_is_named(model, tmp_path):
    right, wrong = jsonl(tmp_path / "a.jsonl"), jsonl(tmp_path / "b.jsonl", "v-bias-missing")
    page = tmp_path / "pair.html"
    done = run_tool_here("audit.py", "--pairs", right, wrong, "--model", model, "--html", page)
    assert done.code == 1 and "the trainer is nearer the truth" in done.out
    assert "the rollout is most like v-bias-missing" in done.out
    assert "Rollout" in page.read_text()


def test_few_tokens_are_refused_with_2(model, tmp_path):
    line = {"prompt_token_ids": [1], "token_ids": [2, 3], "logprobs": [-1, -1]}
    path = tmp_path / "short.jsonl"
    path.write_text(json.dumps(line))
    done = run_tool_here("audit.py", "--jsonl", path, "--model", model)
    assert done.code == 2 and done.out.startswith("refused: 2 log probabilities")


MISTAKES = {
    (): "what is to be audited",
    ("http://h", "--jsonl", "x"): "what is to be audited",
    ("http://h", "--key-variable", "sk-123456"): "not the key itself",
    ("ftp://h",): "is no address of an endpoint",
    ("http://h", "--timeout", "-1"): "--timeout is -1.0",
    ("http://h", "--max-requests", "0"): "--max-requests is 0",
    ("--jsonl", "/nowhere.jsonl"): "/nowhere.jsonl",
    ("--jsonl", "x", "--model", "/nowhere"): "no such directory",
    ("--jsonl", "x", "--json", "/nowhere/x.json"): "no directory to lie in",
    ("--jsonl", "x", "--claimed-dtype", "int8"): "invalid choice",
}


@pytest.mark.parametrize("args", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_and_exit_code_2(args):
    done = run_tool_here("audit.py", *args)
    assert done.code == 2 and MISTAKES[args] in done.err
    assert len(done.err.strip().splitlines()) == 1 and "sk-123456" not in done.err
