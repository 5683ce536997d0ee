"""tools/explain.py as a user runs it: text, page, JSON, mistakes, and two ranks."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support.paths import EMBEDDED
from support.tool import run_tool_here

from minqwen import Checkpoint
from minqwen.lab.explain.explain import explain
from minqwen.lab.faults import FAULTS

TEXT = "In the beginning God created"


@pytest.fixture(scope="module")
def told(embedded_model, embedded_tokenizer):
    """What is to be said of TEXT."""
    ids = embedded_tokenizer.encode(TEXT)
    return explain(
        embedded_model, ids, lambda id: embedded_tokenizer.decode([id]), "the embedded model"
    )


def as_json(value):
    return json.loads(json.dumps(dataclasses.asdict(value)))


def test_text_page_and_json_say_the_same(told, embedded_model, embedded_tokenizer, tmp_path):
    page, data = tmp_path / "page.html", tmp_path / "data.json"
    flags = ["--dtype", "float32", "--layer", 1, "--html", page, "--json", data]
    result = run_tool_here("explain.py", TEXT, *flags)
    assert result.code == 0 and result.err == ""
    assert json.loads(data.read_text()) == as_json(told)
    ids = torch.tensor([embedded_tokenizer.encode(TEXT)])
    with torch.no_grad():
        best = embedded_tokenizer.decode([int(embedded_model(ids)[0, -1].argmax())])
    assert told.predictions[0].text == best
    assert f"it predicts {best!r}" in " ".join(result.out.split())
    assert "layers.1.attn.q " in result.out and "layers.0.attn.q " not in result.out
    assert max(map(len, result.out.splitlines())) <= 100
    assert f"<h1>{TEXT} &rarr; " in page.read_text()


def test_a_mistake_is_shown_beside_what_is_right(told, tmp_path):
    page, data = tmp_path / "page.html", tmp_path / "data.json"
    flags = ["--dtype", "float32", "--html", page, "--json", data, "--fault", "heads-tiled"]
    result = run_tool_here("explain.py", TEXT, *flags)
    assert result.code == 0 and result.err == ""
    assert " ".join(result.out.split()).startswith(f"heads-tiled: {FAULTS['heads-tiled'].symptom}")
    found = json.loads(data.read_text())
    assert found["first"]["point"] == FAULTS["heads-tiled"].first
    assert found["first"]["right"][1:] == ["-inf"] * 3  # token 0 sees itself only
    right = [p["id"] for p in found["right"]["predictions"]]
    assert right == [p.id for p in told.predictions]
    assert found["right"]["predictions"] != found["wrong"]["predictions"]
    assert "<h1>heads-tiled</h1>" in page.read_text()


def test_a_mistake_in_a_chats_tokens(embedded_tokenizer, tmp_path):
    data = tmp_path / "data.json"
    flags = ["--chat", "--json", data, "--fault", "bos-twice"]
    result = run_tool_here("explain.py", TEXT, *flags)
    assert result.code == 0, result.err
    ids = embedded_tokenizer.encode_chat([{"role": "user", "content": TEXT}])
    found = json.loads(data.read_text())
    assert [token["id"] for token in found["right"]["tokens"]] == ids
    assert [token["id"] for token in found["wrong"]["tokens"]] == [ids[0], *ids]


def test_one_token_and_a_model_without_a_tokenizer(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(EMBEDDED / name)
    result = run_tool_here("explain.py", "--ids", "5", "--model", tmp_path, "--block-size", 1)
    assert result.code == 0 and result.err == "", result.err
    assert (
        "  block 0   0 '#5'" in result.out
        and "1 tokens" not in result.out
        and "After 1 token it" in result.out
    )


@pytest.mark.parametrize(
    "args, says",
    [
        ([], "--ids 5,300,17"),
        ([""], "no tokens"),
        ([TEXT, "--ids", "5"], "give one of them"),
        (["--ids", "99999"], "99999"),
        ([TEXT, "--layer", "4"], "--layer is 4, expected 0 to 3"),
        ([TEXT, "--layer", "-1"], "--layer is -1"),
        ([TEXT, "--block-size", "0"], "--block-size is 0"),
        ([TEXT, "--html", "/nowhere/x"], "--html /nowhere/x"),
        ([TEXT, "--json", "/"], "--json /: is a directory"),
        ([TEXT, "--model", "/nowhere"], "/nowhere"),
        ([TEXT, "--fault", "rope-interleavd"], "did you mean 'rope-interleaved'"),
        ([TEXT, "--fault", "append-zero"], "tools/heads.py demo"),
        ([TEXT, "--fault", "yarn-off"], "needs a model with YaRN"),
        ([TEXT, "--fault", "bos-twice"], "add --chat"),
        ([TEXT, "--fault", "gelu", "--arithmetic", "exact"], "leave out arithmetic"),
        ([TEXT, "--fualt", "gelu"], "did you mean '--fault'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_mistakes_are_one_line_and_exit_2_before_a_weight_is_read(monkeypatch, args, says):
    monkeypatch.setattr(Checkpoint, "read", None)
    result = run_tool_here("explain.py", *args)
    assert result.code == 2 and result.out == "" and says in result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
