"""tools/heads.py as a user runs it: plan, extend, verify, shrink, and mistakes."""

from __future__ import annotations

import json

import pytest
from support.heads import random_model
from support.tool import Result, run_tool, run_tool_here

from minqwen.checkpoint import write_checkpoint


def heads(*args: object) -> Result:
    return run_tool_here("heads.py", *args)


@pytest.fixture(scope="module")
def wide(embedded, tmp_path_factory):
    """The embedded model with 32 heads, as the tool writes it. Do not write to it."""
    path = tmp_path_factory.mktemp("heads") / "wide"
    result = run_tool("heads.py", "extend", embedded, path, "--num-attention-heads", 32)
    assert result.code == 0, result.err
    assert "KV  3 = head 3" in result.out and "vLLM" in result.err
    return path


def test_an_extension_is_verified_bit_for_bit(embedded, wide, tmp_path):
    page, facts = tmp_path / "page.html", tmp_path / "report.json"
    outputs = ["--html", page, "--json", facts]
    result = heads("verify", embedded, wide, "--arithmetic", "exact", *outputs)
    assert result.code == 0 and result.out.startswith("bitwise: error 1 times")
    assert "slot map of layer 0: q 0 1 2 3 4 5 6 0 7 8" in result.out
    assert json.loads(facts.read_text())["verdict"] == "bitwise"
    assert "bitwise" in page.read_text()


def test_plan_proposes_the_command_that_extends(embedded):
    result = heads("plan", embedded, "--tp", 8)
    assert result.code == 0
    assert f"tools/heads.py extend {embedded} DST --num-attention-heads 32\n" in result.out
    proposals = json.loads(heads("plan", embedded, "--tp", 8, "--json").out)
    assert proposals[0]["config"]["num_attention_heads"] == 32
    assert proposals[0]["cost"]["parameters"] == 229_632
    assert "MLP 640 (as it is)" in heads("plan", embedded, "--tp", 4).out


def test_explain_prints_the_slot_map_of_both(embedded, wide):
    assert "-> 32 and 4; slot j reads KV slot j // 8; recipe ghost" in heads("explain", wide).out
    assert "not extended by this tool; its heads are:" in heads("explain", embedded).out


def test_shrink_gives_the_source_back(embedded, wide, tmp_path):
    result = heads("shrink", wide, tmp_path / "back")
    assert result.code == 0 and result.out == f"wrote {tmp_path / 'back'}\n"
    assert heads("verify", embedded, tmp_path / "back").out.startswith("bitwise")


def test_models_of_other_sizes_are_different_at_once(embedded, tmp_path):
    config, weights = random_model(6, 3)
    write_checkpoint(tmp_path / "other", config, weights.items())
    result = heads("verify", embedded, tmp_path / "other")
    assert result.code == 1 and result.out.startswith("different: vocab_size ")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--text", "/nope"], "--text /nope: cannot be read"),
        (["--json", "/nope/x"], "--json /nope/x: "),
        (["--html", "/nope/x"], "--html /nope/x: "),
        (["--html", "/"], "--html /: is a directory"),
        (["--max-tokens", "0"], "--max-tokens is 0, expected an integer of at least 1"),
    ],
)
def test_mistakes_are_told_before_a_model_is_opened(tmp_path, flags, said):
    # Neither model exists: a line about the flag shows that the models were not looked at.
    result = heads("verify", tmp_path / "a", tmp_path / "b", *flags)
    assert result.code == 2 and result.err.startswith(f"error: {said}")
    assert len(result.err.splitlines()) == 1 and not result.out


def test_a_text_without_a_token_is_refused(embedded, wide, tmp_path):
    (tmp_path / "empty").write_text("")
    result = heads("verify", embedded, wide, "--text", tmp_path / "empty")
    assert result.code == 2 and "empty: is empty (0 bytes)" in result.err


def test_exact_arithmetic_in_float64_is_refused(embedded, wide):
    result = heads("verify", embedded, wide, "--arithmetic", "exact", "--dtype", "float64")
    assert result.code == 2 and "float64" in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    "args, said",
    [
        (["extend", "EMBEDDED", "NO", "--num-attention-heads", 30], "the nearest that are: 28 and"),
        (["extend", "EMBEDDED", "NO", "--intermediate-size", 650, "--intermediate-block", 0], "at"),
        (["shrink", "EMBEDDED", "NO"], "has no minqwen_heads.json"),
        (["extend-adapter", "/nope", "NO", "--base", "EMBEDDED"], "has no minqwen_heads.json"),
        (["plan", "EMBEDDED", "--tp", 0], "expected at least 1"),
        (["plan", "EMBEDDED", "--quant-group", 0], "expected at least 1"),
        (["verify", "EMBEDDED", "NO"], "no such directory"),
        (["explain", "/nope"], "/nope"),
        (["extend", "EMBEDDED", "NO", "--num-attention-head", 32], "--num-attention-heads"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(embedded, tmp_path, args, said):
    places = {"EMBEDDED": embedded, "NO": tmp_path / "no"}
    result = heads(*(places.get(arg, arg) for arg in args))
    assert result.code == 2 and result.err.startswith("error: ") and said in result.err
    assert len(result.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_damaged_manifest_is_one_line(embedded, wide, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in wide.iterdir():
        (broken / file.name).symlink_to(file)
    (broken / "minqwen_heads.json").unlink()
    (broken / "minqwen_heads.json").write_text('{"layout": {"heads": [0')
    for args in (["explain", broken], ["shrink", broken, tmp_path / "back"]):
        result = heads(*args)
        assert result.code == 2 and "minqwen_heads.json: is not valid JSON" in result.err
        assert len(result.err.splitlines()) == 1


def test_demo_prints_every_recipe():
    result = heads("demo")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[1].split()[:4] == ["recipe", "float32", "bfloat16", "exact"]
    assert lines[2].startswith("ghost 32/4") and "0 bits" in lines[2]
    assert [line.split()[0] for line in lines[-7:]] == [
        "article",
        "append-zero",
        "append-copy",
        "append-halved",
        "no-split",
        "forget-bias",
        "derive-head-dim",
    ]
    assert "cannot run" in lines[-7]
