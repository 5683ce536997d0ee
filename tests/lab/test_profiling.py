"""Where a step's time goes: every operation in one category, labels that leave no trace."""

from __future__ import annotations

import json

import pytest
import torch
from support.checkpoints import tiny
from support.tool import run_tool_here

from minqwen import LLM
from minqwen.lab.bench.jobs import Job
from minqwen.lab.profiling import (
    ATTENTION,
    COPIES,
    ELEMENTWISE,
    FORWARD,
    GEMMS,
    NORMS,
    ROTARY,
    SAMPLING,
    SCHEDULING,
    SOFTMAX,
    STEP,
    category,
    labels,
    profile_job,
)
from minqwen.lab.shapes import random_model


@pytest.fixture(scope="module")
def llm():
    model = random_model(tiny(), dtype=torch.float32)
    return LLM(model, max_model_len=64, num_blocks=32, max_num_batched_tokens=16, max_num_seqs=4)


@pytest.mark.parametrize("job, steps", [(Job("prefill", 1, 24, 1), 2), (Job("decode", 3, 8, 6), 4)])
def test_the_categories_add_up_to_the_steps(llm, job, steps, tmp_path):
    found = profile_job(llm, job, str(tmp_path / "trace.json"))
    # A prefill of 24 tokens takes two steps of 16. Of three requests the last starts a
    # step later and ends a step later: in four steps all take part.
    assert (found.kind, found.steps, found.fused) == (job.kind, steps, False)
    seen = {GEMMS, ATTENTION, SOFTMAX, NORMS, ROTARY, ELEMENTWISE, SAMPLING, SCHEDULING}
    assert seen <= set(found.seconds)
    assert 0 < found.total <= found.whole and found.unwatched > 0
    assert any("softmax" in line for line in found.lines())
    names = {
        event.get("name")
        for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    }
    assert {STEP, GEMMS, ATTENTION, "aten::_softmax"} <= names


def test_labels_are_gone_afterwards(llm):
    owners = (llm.model.model.norm.ops, llm.model.mesh, llm.core.runner, llm.core.scheduler)
    before = [dict(vars(owner)) for owner in owners]
    with labels(llm):
        assert any(vars(owner) != old for owner, old in zip(owners, before))
    assert [dict(vars(owner)) for owner in owners] == before


@pytest.mark.parametrize(
    "around, expected",
    [
        (["aten::mm", "aten::linear", GEMMS, FORWARD, STEP], GEMMS),
        (["aten::_softmax", "aten::softmax", ATTENTION, FORWARD, STEP], SOFTMAX),
        (["aten::copy_", "aten::_softmax", ATTENTION, FORWARD, STEP], SOFTMAX),
        (["aten::bmm", ATTENTION, FORWARD, STEP], ATTENTION),
        (["aten::mm", GEMMS, ATTENTION, FORWARD, STEP], GEMMS),
        (["aten::copy_", FORWARD, STEP], COPIES),
        (["aten::topk", STEP], SAMPLING),
        (["aten::embedding", FORWARD, STEP], ELEMENTWISE),
        ([FORWARD, STEP], ELEMENTWISE),
        ([STEP], SCHEDULING),
    ],
)
def test_an_operation_belongs_to_the_nearest_label(around, expected):
    assert category(around[0], around) == expected


@pytest.mark.parametrize(
    "args, said",
    [
        (["--batch", "0"], "--batch 0: expected at least 1"),
        (["--model", "a", "--size", "7B"], "not both"),
        (["--trace", "/nowhere/x.json"], "/nowhere"),
        (["--arithmetic", "fats"], "fats"),
    ],
)
def test_mistakes_are_one_line(args, said):
    done = run_tool_here("profiler.py", "--device", "cpu", *args)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1
