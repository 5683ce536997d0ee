"""tools/doctor.py: one line for each check, a verdict, and an exit code that can be relied on."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from support.checkpoints import write
from support.tool import run_tool_here

from minqwen.model import Exact
from minqwen.model.emulation import EMULATE
from minqwen.model.rope import rotate_half

UNBOUNDED = 1e6  # seconds: no test depends on the clock


def test_a_right_machine_gets_exit_code_0(tmp_path):
    done = run_tool_here(
        "doctor.py", "--quick", "--seconds", UNBOUNDED, "--json", tmp_path / "report.json"
    )
    assert done.code == 0, done.out
    assert "DIFF" not in done.out
    assert "checks hold: exact arithmetic gives its one answer here" in done.out.splitlines()[-1]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["holds"] and report["machine"]["torch"] == torch.__version__
    assert list(report["fingerprints"]) == ["float32", "bfloat16", "float16"]
    against = {what for check in report["checks"] for what in check["against"]}
    assert against >= {"the truth", "scalar code", "the frozen one", "2 ranks", "in pieces"}
    assert "transformers on cpu" in against


@pytest.fixture
def no_ranks(monkeypatch):
    """Processes take seconds to start, and the tests that take this are not about them."""
    monkeypatch.setattr("minqwen.lab.device_model.on_ranks", lambda *args, **options: iter(()))


def contracted(self, x, cos, sin):
    """RoPE by one fused multiply-add: the first product is not rounded."""
    return (x.double() * cos.double() + (rotate_half(x) * sin).double()).to(x.dtype)


def test_a_machine_with_a_fault_gets_exit_code_1_and_the_first_difference(tmp_path, no_ranks):
    write(tmp_path / "model")
    options = [
        "--quick",
        "--seconds",
        UNBOUNDED,
        "--model",
        tmp_path / "model",
        "--json",
        tmp_path / "report.json",
    ]
    with mock.patch.object(Exact, "rotate", contracted):
        done = run_tool_here("doctor.py", *options)
    assert done.code == 1
    wrong = [line for line in done.out.splitlines() if "DIFF" in line]
    assert any("float32: rotate" in line for line in wrong)
    assert any("models: 28 heads in float32" in line for line in wrong)
    assert not any("functions: exp" in line or "conversions" in line for line in wrong)
    assert f"{len(wrong)} of " in done.out.splitlines()[-1]
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["holds"]
    assert sum(bool(check["differences"]) for check in report["checks"]) == len(wrong)


def test_a_section_that_raises_is_told_and_the_others_run(tmp_path, no_ranks):
    write(tmp_path / "model")
    with mock.patch.object(Exact, "silu_mul", None):
        done = run_tool_here(
            *("doctor.py", "--quick", "--seconds", UNBOUNDED, "--model", tmp_path / "model")
        )
    assert done.code == 1
    assert "the CPU: raises TypeError" in done.out
    assert "DIFF section: the rest of it" in done.out
    assert "ok   model: native float32 beside transformers" in done.out


def test_without_time_nothing_is_checked_and_the_exit_code_says_so(tmp_path):
    done = run_tool_here("doctor.py", "--seconds", 0, "--json", tmp_path / "report.json")
    assert done.code == 1 and "DIFF" not in done.out
    assert "skipped: the 0 s of --seconds are over" in done.out
    assert done.out.splitlines()[-1].startswith("not all checks ran in time: this CPU, ")
    assert not json.loads((tmp_path / "report.json").read_text())["holds"]


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--device", "gpu"], "invalid choice: 'gpu'"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--json", "/nowhere/report.json"], "/nowhere"),
        (["--quik"], "did you mean '--quick'"),
    ],
)
def test_mistakes_are_one_line_before_any_check(args, expected):
    done = run_tool_here("doctor.py", *args)
    assert done.code == 2 and expected in done.err
    assert done.err.count("\n") == 1 and not done.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_a_mistake_too():
    done = run_tool_here("doctor.py", "--device", "cuda")
    assert done.code == 2 and "0 GPUs" in done.err and done.err.count("\n") == 1


def test_an_emulation_of_float64_on_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv(EMULATE, "1")
    with (
        mock.patch.object(torch.cuda, "device_count", lambda: 1),
        mock.patch.object(torch.cuda, "get_device_name", lambda: "a GPU"),
    ):
        done = run_tool_here("doctor.py", "--device", "cuda")
    assert done.code == 2 and f"{EMULATE} is '1'" in done.err
    assert EMULATE in done.out  # among the settings
