"""tools/generate.py as a user runs it: on one process, under torchrun, and with mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.naive import greedy
from support.paths import ROOT
from support.torchrun import torchrun

from minqwen import LLM, SamplingParams
from minqwen.lab.tasks import heldout_questions

TOOL = ROOT / "tools" / "generate.py"
FLAGS = ["--dtype", "float32", "--temperature", "0", "--max-tokens", "12"]


def generate(*args: str, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(TOOL), *args],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )


@pytest.fixture(scope="module")
def one_process() -> list[dict]:
    result = generate(
        "--prompt",
        "In the beginning",
        "--prompt",
        "And it came to pass",
        "--json",
        "--logprobs",
        "2",
        *FLAGS,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_json_has_everything_and_the_naive_loops_tokens(
    one_process, embedded_model, embedded_tokenizer
):
    for prompt, out in zip(("In the beginning", "And it came to pass"), one_process, strict=True):
        ids = embedded_tokenizer.encode(prompt)
        want = greedy(embedded_model, ids, 12)
        assert out["prompt"] == prompt and out["prompt_token_ids"] == ids
        assert out["token_ids"] == want[: len(out["token_ids"])] and out["finish_reason"] in (
            "length",
            "stop",
        )
        assert out["text"] == embedded_tokenizer.decode(out["token_ids"], skip_special_tokens=True)
        assert len(out["logprobs"]) == len(out["token_ids"])
        assert all(
            entries[0]["id"] == token for entries, token in zip(out["logprobs"], out["token_ids"])
        )
        assert out["time_to_first_token_s"] > 0


def test_four_ranks_say_the_same_and_rank_0_speaks(one_process):
    result = torchrun(
        4,
        TOOL,
        ["--prompt", "In the beginning", "--prompt", "And it came to pass", "--json", *FLAGS],
    )
    assert result.returncode == 0, result.stderr
    outputs = [json.loads(line) for line in result.stdout.splitlines()]
    assert [o["token_ids"] for o in outputs] == [o["token_ids"] for o in one_process]


def test_text_streams_to_stdout_and_nothing_else_does(one_process, tmp_path):
    streamed = generate("--prompt", "In the beginning", *FLAGS)
    assert streamed.stdout == one_process[0]["text"] + "\n" and "tokens/s" in streamed.stderr
    piped = generate("-", "--no-stream", *FLAGS, stdin="In the beginning")
    assert piped.stdout == streamed.stdout
    file = tmp_path / "prompts.jsonl"
    file.write_text('"In the beginning"\n{"prompt": "And it came to pass"}\n')
    both = generate("--prompt-file", str(file), *FLAGS)
    assert both.stdout == "".join(o["text"] + "\n" for o in one_process)


@pytest.mark.parametrize(
    "args, says",
    [
        (["--prompt", "x", "--model", "/nowhere"], "/nowhere"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--max-model-len", "99999999"], "max_model_len"),
        (["--prompt", "x", "--block-size", "0"], "block_size"),
        (["--prompt-file", "/nowhere.txt"], "/nowhere.txt"),
        (["--prompt", ""], "no tokens"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(args, says):
    result = generate(*args)
    assert result.returncode == 2 and result.stdout == ""
    assert (
        result.stderr.startswith("error: ")
        and result.stderr.count("\n") == 1
        and says in result.stderr
    )


def test_chat_answers_held_out_sums(embedded_tokenizer):
    """The embedded model's checkable skill: at least 95 % of sums it was never shown, in bfloat16 as shipped."""
    llm = LLM(ROOT / "weights" / "embedded", dtype="float32", max_model_len=128, max_num_seqs=64)
    questions = heldout_questions()[::4]
    conversations = [[{"role": "user", "content": question.prompt}] for question in questions]
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=48), use_tqdm=False)
    right = sum(
        o.outputs[0].text.split()[-1:] == q.answer.split()[-1:] for q, o in zip(questions, outputs)
    )
    assert right >= 0.95 * len(questions), f"{right} of {len(questions)}"
    assert len(questions) > 180 and all(o.outputs[0].finish_reason == "stop" for o in outputs)
