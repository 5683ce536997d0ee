"""The doctor's notes on speed and memory: figures of known runs, reasons for what is skipped."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
from support.checkpoints import tiny, write

from minqwen.config import ModelConfig
from minqwen.lab import device_speed
from minqwen.lab.bench import roofs as bench_roofs
from minqwen.lab.bench.contestants import read_contestant
from minqwen.lab.bench.jobs import Job
from minqwen.lab.bench.roofs import Roofs, least_seconds
from minqwen.lab.bench.timing import Mark, Run
from minqwen.lab.device_speed import compared_memory, described, on_gpus, setup_for, speeds

ROOFS = Roofs(reads={"copy": 1e9}, products={"float32": 1e11, "bfloat16": 1e11, "float64": 1e10})
JOBS = [Job("prefill", 1, 16, 1), Job("decode", 2, 8, 4)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("speed") / "model"
    write(path, tiny())
    return str(path)


def test_a_note_for_each_contestant_and_job(model_dir):
    setup = setup_for(model_dir, None, "cpu", JOBS)
    found = list(speeds(setup, ["native", "exact"], JOBS, ROOFS))
    assert [outcome.name for outcome in found] == [
        "native bfloat16, prefill 16",
        "native bfloat16, decode B2 at 8",
        "exact bfloat16, prefill 16",
        "exact bfloat16, decode B2 at 8",
    ]
    for outcome in found:
        assert not outcome.against and outcome.holds and "of the roof" in outcome.note
        assert outcome.figures["tokens_per_second"] > 0


def test_a_note_says_the_median_the_rate_and_the_share_of_the_roof():
    contestant, config, job = (
        read_contestant("native", "bfloat16"),
        tiny(),
        Job("prefill", 1, 64, 1),
    )
    runs = [Run([Mark(wall, wall, 1, 1)]) for wall in (0.5, 0.25, 2.0)]
    outcome = described(contestant, config, job, runs, ROOFS)
    share = least_seconds(ROOFS, contestant, config, job) / 0.5
    expected = {"seconds": 0.5, "tokens_per_second": 128.0, "share_of_roof": share}
    assert outcome.figures == expected
    assert outcome.note == f"500.0 ms, 128.0 tokens/s, {share:.0%} of the roof"
    assert "roof" not in described(contestant, config, job, runs, Roofs()).note


def test_what_cannot_run_is_skipped_with_its_reason(model_dir):
    setup = setup_for(model_dir, None, "cpu", JOBS)
    with mock.patch.object(device_speed, "load", side_effect=RuntimeError("no such kernel\nat x")):
        (outcome,) = speeds(setup, ["native"], JOBS, ROOFS)
    assert outcome.note == "skipped: RuntimeError: no such kernel" and outcome.holds
    with mock.patch.object(ModelConfig, "weight_bytes", lambda config: 10**15):
        (outcome,) = speeds(replace(setup, size="7B"), ["native"], JOBS, ROOFS)
    assert outcome.note.startswith("skipped: the weights take 1000000.0 GB of")
    (outcome,) = on_gpus(setup, JOBS, ROOFS)
    assert outcome.note.startswith("skipped: there are ")


def test_memory_is_told_beside_the_estimate():
    outcome = compared_memory("memory", 4 * 10**9, 3 * 10**9)
    assert outcome.note == "4.00 GB predicted, 3.00 GB measured (75%)"
    assert outcome.figures == {"predicted_bytes": 4e9, "measured_bytes": 3e9}


def test_roofs_are_noted_and_kept_for_later(monkeypatch):
    monkeypatch.setitem(bench_roofs.READ_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(bench_roofs.SIDE, "cpu", 64)
    kept = Roofs()
    read, product = device_speed.roofs_of("cpu", 0.1, kept)
    assert read.figures == kept.reads and product.figures == kept.products
    assert f"{kept.bandwidth / 1e9:,.1f} GB/s" in read.note
