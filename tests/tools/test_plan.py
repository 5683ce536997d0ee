"""tools/plan.py: it says what the planner says."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from typing import Any

import pytest
from support.checkpoints import tiny, write
from support.paths import DATA
from support.tool import run_tool, run_tool_here

from minqwen.lab.choices import Comparison, choices
from minqwen.lab.planner import CARDS, Planner
from minqwen.lab.shapes import official_config

SEVEN = official_config("7B")


def answers(*args: object) -> Any:
    done = run_tool_here("plan.py", *args, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_a_table_for_each_number_of_gpus_and_the_reason_where_one_cannot_work():
    done = run_tool_here("plan.py", "--size", "7B")
    lines = done.out.splitlines()
    assert done.code == 0 and lines[0].startswith("7B: 28 query and 4 KV heads of 128, ")
    (memory,) = (i for i, line in enumerate(lines) if line.startswith("GPUs  weights"))
    assert [line.split()[0] for line in lines[memory + 1 : memory + 5]] == ["1", "2", "4", "8"]
    assert "28 query heads do not divide by 8" in lines[memory + 4]


def test_json_says_what_the_library_says(tmp_path):
    SEVEN.save(tmp_path)
    load = ("--tp", 4, "--context", 5000, "--batch", 3, "--gpu-memory", 24)
    (answer,) = answers(tmp_path, *load)
    planner = Planner(SEVEN, 4)
    expected = planner.estimate(5000, 3)
    assert {k: answer[k] for k in dataclasses.asdict(expected)} == dataclasses.asdict(expected)
    assert answer["total"] == expected.total
    fit = planner.fit(expected, int(21.6e9))  # 0.9 of 24 GB
    assert answer["cards_gb"] == {"24": dataclasses.asdict(fit)}
    assert set(answer["floors"]) == {"RTX 3090", "RTX 4090"}
    assert answer["floors"]["RTX 3090"] == {
        "decode_seconds": expected.decode_seconds(CARDS["RTX 3090"]),
        "prefill_seconds": expected.prefill_seconds(CARDS["RTX 3090"]),
    }


def test_every_degree_and_the_one_that_cannot_work():
    found = answers("--size", "7B")
    assert [a["size"] for a in found] == [1, 2, 4, 8]
    assert "--num-attention-heads 32" in found[3]["error"]
    assert list(found[0]["cards_gb"]) == ["24", "40", "48", "80", "141"]
    assert set(found[0]["floors"]) == set(CARDS)


def test_with_32_heads_eight_gpus_can_share_the_model():
    found = answers("--size", "7B", "--num-attention-heads", 32)
    assert [a["heads"] for a in found] == [32] * 4
    wider = answers("--size", "7B", "--num-attention-heads", 32, "--num-key-value-heads", 8)
    assert wider[0]["kv_cache"] == 2 * found[0]["kv_cache"]


def test_no_context_beyond_the_models_own_without_its_yarn():
    own = run_tool_here("plan.py", "--size", "7B", "--tp", 4).out
    assert "32,768 / 35 " in own and "rope_scaling" not in own
    assert "Contexts end at 32,768 tokens here" in own
    more = run_tool_here("plan.py", "--size", "7B", "--tp", 4, "--context", 40_000).out
    (line,) = (line for line in more.splitlines() if "rope_scaling" in line)
    block = json.loads(re.search(r"{.*}", line)[0])
    assert block == {"type": "yarn", "factor": 1.23, "original_max_position_embeddings": 32768}
    assert "40,000 / 28 " in more and "up to factor 4" in more
    (answer,) = answers("--size", "7B", "--tp", 4, "--context", 40_000)
    assert answer["yarn"] == block
    assert {fit["largest_context"] for fit in answer["cards_gb"].values()} == {40_000}


def test_the_ways_to_use_eight_gpus_side_by_side():
    command = ("--size", "7B", "--gpus", 8, "--context", 5000, "--batch", 40)
    done = run_tool_here("plan.py", *command, "--gpu-memory", 80)
    assert done.code == 0 and "8 GPUs of 80 GB, filled to 0.9; 40 sequences of 5,000" in done.out
    rows = [line.split() for line in done.out.splitlines() if re.match(r"\d+ x \d+ ", line)]
    degrees = ["1 x 8", "2 x 4", "4 x 2", "8 x 1", "8 x 1"]
    assert [" ".join(row[:3]) for row in rows] == 3 * degrees  # memory, and two cards' speeds
    assert run_tool_here("plan.py", *command).out == done.out  # 80 GB if nothing is said


def test_json_of_the_comparison_says_what_the_library_says():
    command = ("--size", "7B", "--gpus", 8, "--gpu-memory", 24, "--dtype", "float16")
    found = answers(*command, "--gpu-memory-utilization", 0.8)
    cards = {name: CARDS[name] for name in ("RTX 3090", "RTX 4090")}
    expected = Comparison.of(
        choices(SEVEN, 8, dtype="float16"),
        context=32_768,
        batch=8,  # one for each GPU if nothing is said
        limit=int(19.2e9),
        cards=cards,
    )
    assert found == json.loads(json.dumps(expected.as_json()))
    assert [each["name"] for each in found["choices"]] == [each.name for each in expected.found]
    assert found["dtype"] == "float16" and found["limit"] == 19_200_000_000


def test_a_card_of_unknown_memory_has_no_speeds_and_a_longer_context_its_yarn():
    done = run_tool_here(
        "plan.py", "--size", "7B", "--gpus", 2, "--gpu-memory", 32, "--context", 40_000
    )
    assert done.code == 0 and "no speeds are told" in done.out and '"factor": 1.23' in done.out


def test_plot_and_what_to_do_without_matplotlib(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    done = run_tool_here("plan.py", "--size", "0.5B", "--tp", 1, "--plot", tmp_path / "a.svg")
    assert done.code == 0 and "<svg" in (tmp_path / "a.svg").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run_tool_here("plan.py", "--size", "0.5B", "--plot", tmp_path / "b.svg")
    assert done.code == 2 and 'pip install "minqwen[plot]"' in done.err
    assert done.err.count("\n") == 1 and not done.out


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--size", "7B", "--tp", "8"], "degrees that work: 1, 2, 4"),
        (["/nowhere"], "/nowhere: no such directory"),
        (["Qwen/Qwen2.5-7B-Instruct"], "hf download Qwen/Qwen2.5-7B-Instruct --local-dir DIR"),
        (["--size", "7B", "--batch", "0"], "batch is 0"),
        (["--size", "7B", "--gpu-memory", "-1"], "--gpu-memory is -1"),
        (["--size", "7B", "--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization is 1.5"),
        (["--size", "7B", "--num-attention-heads", "30"], "these work: 28, 32, 36, 40"),
        (["--size", "7B", "--num-key-value-heads", "3"], "with 4 key/value heads these work: 28"),
        (["--size", "7B", "--head-recipe", "zero"], "no number of heads was given"),
        (["--size", "9B"], "invalid choice: '9B'"),
        (["--size", "7B", "--gpus", "8", "--tp", "4"], "leave one of them out"),
        (["--size", "7B", "--gpus", "8", "--plot", "a.svg"], "leave one of them out"),
        (["--size", "7B", "--gpus", "0"], "--gpus is 0"),
        (["--size", "7B", "--gpus", "8", "--batch", "0"], "batch is 0"),
        (["--size", "7B", "--gpus", "8", "--batch", "9999"], "batch is 9999, expected 1 to 2048"),
        (["--size", "7B", "--gpus", "8", "--context", "0"], "context is 0"),
        (["--size", "7B", "--gpu", "8"], "did you mean '--gpus'"),
        ([], "expected a model's directory, or --size"),
        (["/nowhere", "--size", "7B"], "not both"),
        (["--size", "7B", "--contxt", "9"], "did you mean '--context'"),
        # Before the model is looked at:
        (["/nowhere", "--plot", "/nowhere/a.svg"], "--plot /nowhere/a.svg: has no directory"),
        (["/nowhere", "--plot", "/"], "--plot /: is a directory"),
    ],
)
def test_mistakes_are_one_line(args, expected):
    done = run_tool_here("plan.py", *args)
    assert done.code == 2 and expected in done.err
    assert done.err.count("\n") == 1 and not done.out


def test_a_plot_that_matplotlib_cannot_write_is_one_line(tmp_path):
    pytest.importorskip("matplotlib")
    done = run_tool_here("plan.py", "--size", "0.5B", "--tp", 1, "--plot", tmp_path / "a.xyz")
    assert done.code == 2 and "a.xyz: the plot cannot be written" in done.err
    assert done.err.count("\n") == 1 and not done.out


def test_the_script_runs_as_a_program():
    done = run_tool("plan.py", "--size", "7B", "--tp", 4)
    assert done.code == 0 and "GB per GPU" in done.out and not done.err


# ---- quantised ----------------------------------------------------------------------------------


def test_the_quantised_72b_has_the_width_of_its_checkpoints():
    official = json.loads((DATA / "configs.json").read_text())
    changes = official["relatives"]["Qwen/Qwen2.5-72B-Instruct-AWQ"]["changes"]
    config = official_config("72B", quantised=True)
    assert config.intermediate_size == changes["intermediate_size"]
    for kind, width in (("awq", 29696), ("gptq-int8", 29696), ("int8", 29568), ("none", 29568)):
        found = answers("--size", "72B", "--tp", 8, "--quantization", kind)[0]
        expected = Planner(
            official_config("72B").replace(intermediate_size=width), 8, quantization=kind
        )
        assert found["weights"] == expected.weights


def test_groups_that_gpus_cannot_share_are_told_with_the_width_that_they_can():
    seven = ("--size", "7B", "--num-attention-heads", 32, "--quantization", "awq", "--tp")
    done = run_tool_here("plan.py", *seven, 8)
    assert "8 GPUs cannot share the MLP's 18,944 in whole groups of 128" in done.out
    assert "--intermediate-size 19456" in done.out and 19456 % (8 * 128) == 0
    assert "dequantised" in done.out
    assert "cannot share" not in run_tool_here("plan.py", *seven, 4).out
    assert "note" not in run_tool_here("plan.py", *seven[:4], "--tp", 8).out


def test_7b_in_int4_fits_a_24_gb_card_with_32k_of_context():
    found = answers("--size", "7B", "--quantization", "awq", "--dtype", "float16", "--tp", 1,
                    "--context", 32768, "--gpu-memory", 24)[0]  # fmt: skip
    assert found["cards_gb"]["24"]["fits"] and found["cards_gb"]["24"]["largest_batch"] >= 2


def test_a_config_without_a_dtype_has_that_of_its_files(tmp_path):
    write(tmp_path / "a", tiny(dtype="bfloat16"))
    for directory in ("a", "b"):
        raw = tiny().to_dict()
        del raw["torch_dtype"]
        (tmp_path / directory).mkdir(exist_ok=True)
        (tmp_path / directory / "config.json").write_text(json.dumps(raw))
    assert answers(tmp_path / "a", "--tp", 1)[0]["dtype"] == "bfloat16"
    assert "no dtype" not in run_tool_here("plan.py", tmp_path / "a", "--tp", 1).out
    alone = run_tool_here("plan.py", tmp_path / "b", "--tp", 1).out
    assert "config.json names no dtype: float32 is assumed" in alone
