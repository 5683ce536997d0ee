"""tools/bench.py: processes that take turns, a table, and mistakes in one line."""

from __future__ import annotations

import json

import pytest
from support.checkpoints import tiny, write
from support.tool import run_tool_here


def test_contestants_take_turns_and_a_peer_that_is_missing_is_told(tmp_path):
    write(tmp_path / "model", tiny())
    file, empty = tmp_path / "bench.json", tmp_path / "python"
    empty.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    empty.chmod(0o755)
    done = run_tool_here(
        *("bench.py", "--model", tmp_path / "model", "--no-roofs", "--device", "cpu"),
        *("--threads", 1, "--rounds", 2, "--batch", 2, "--new", 3, "--context", 8, "--prompt", 16),
        *("--requests", 3, "--arithmetic", "native/float32", "--against", "vllm"),
        *("--python", f"vllm={empty}", "--json", file),
    )
    assert done.code == 0, done.err
    assert "vllm bfloat16: left out: its process ended with code 3: no such module" in done.out
    told = json.loads(file.read_text())
    assert [row["job"] for row in told["rows"]] == [
        "prefill 16",
        "decode B2 at 8",
        "3 ragged requests",
    ]
    for row in told["rows"]:
        assert row["wall"]["median"] > 0 and row["ratio"] == 1 and row["peak_bytes"] > 0
        assert row["same"][0] == row["same"][1] > 0
    assert told["contestants"][1]["error"] and told["about"]["threads"] == "1"


@pytest.mark.parametrize(
    "args, said",
    [
        (["--model", "a", "--size", "7B"], "not both"),
        (["--layers", "2"], "--size"),
        (["--size", "0.5B", "--layers", "25"], "expected 1 to 24"),
        (["--arithmetic", "fats"], "did you mean 'fast'"),
        (["--arithmetic", "vllm"], "peers go to --against"),
        (["--against", "fast"], "go to --arithmetic"),
        (["--jobs", "prefil"], "--jobs prefil: expected"),
        (["--batch", "1,x"], "--batch 1,x: expected positive numbers"),
        (["--tp", "x4"], "--tp x4: expected"),
        (["--python", "vllm"], "--python vllm: expected"),
        (["--rounds", "0"], "rounds"),
        (["--json", "/nowhere/x.json"], "/nowhere"),
        (["--modle", "a"], "did you mean '--model'"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(args, said):
    done = run_tool_here("bench.py", "--device", "cpu", *args)
    assert done.code == 2 and said in done.err
    assert done.err.count("\n") == 1
