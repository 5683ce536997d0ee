"""The catalogue against a second implementation: transformers with the same mistakes in it.

The logits of both must agree to rounding. So a mistake is what its name says, and no slip of the
code that makes it: two people would have to slip alike.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from support.broken_transformers import PLANTED, WINDOW, broken
from support.dumps import MemoryPack, MemoryPrompt
from support.qwen2 import cast, oracle, tokens, yarn

from minqwen.config import ModelConfig
from minqwen.lab.compare import ROUNDING, rms
from minqwen.lab.diff.diagnosis import examine
from minqwen.lab.diff.dumps import Dump
from minqwen.lab.dump import dump
from minqwen.lab.faults import FAULTS, build

T = 40  # two blocks of 16, and no multiple of it


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class Right:
    """A random model with YaRN, and a head of its own."""

    def __init__(self):
        self.hf = oracle(num_attention_heads=6, rope_parameters=yarn(4.0, 16))
        self.ids = tokens(self.hf, 1, T)
        self.weights = dict(self.hf.state_dict())
        config = ModelConfig.from_dict(self.hf.config.to_dict())
        raw = {**config.raw, "sliding_window": WINDOW}
        self.config = dataclasses.replace(config, raw=raw)
        self.truth = self.logits(None, torch.float64)
        self.unit = rms(self.logits(None, torch.float32) - self.truth)

    def logits(self, name, dtype):
        if name is None:
            model = build(self.config, self.weights, dtype)
        else:
            model = FAULTS[name].model(self.config, self.weights, dtype=dtype)
        return model(self.ids)[0].double()


@pytest.fixture(scope="module")
def right():
    with torch.no_grad():
        return Right()


def test_there_are_enough_mistakes_and_all_are_in_the_catalogue():
    names = [planted.name for planted in PLANTED]
    assert len(set(names)) == len(names) and set(names) <= set(FAULTS)
    assert sum(not planted.faint for planted in PLANTED) >= 40


def test_transformers_without_a_mistake_is_right(right):
    logits = right.hf(right.ids).logits[0].double()
    assert rms(logits - right.truth) <= ROUNDING * right.unit


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_transformers_with_the_mistake_gives_the_catalogues_logits(right, planted):
    with broken(planted, right.hf, torch.float32) as hf:
        candidate = hf(right.ids).logits[0].double()
    truth = right.logits(planted.name, torch.float64)
    unit = rms(right.logits(planted.name, torch.float32) - truth)
    error = rms(candidate - truth)
    assert error <= ROUNDING * unit, f"{error / unit:.3g} units"
    moved = rms(candidate - right.truth) > 10 * right.unit
    assert moved is not bool(FAULTS[planted.name].silent)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_a_dump_of_it_is_wrong_first_where_the_table_says(right, planted, tmp_path):
    with broken(planted, right.hf, torch.float32) as hf, dump(hf, tmp_path):
        hf(right.ids)
    wrong = Dump.open(tmp_path, right.config)
    _, seen = build(right.config, right.weights, torch.float32).run_with_cache(right.ids)
    names = wrong.names(0)
    assert not {"layers.0.attn.q", "layers.1.mlp.act", "logits"} - set(names)
    first = next(name for name in names if not torch.equal(wrong.read(0, name), seen[name][0]))
    assert first == planted.first


# ---- what diff says of them: benchmarks/planted.py has all, this is a small share ----------------


def examined(right, directory):
    stored = SimpleNamespace(
        names=list(right.weights), read=right.weights.__getitem__, check=lambda: None
    )
    pack = MemoryPack(right.config, [MemoryPrompt(right.ids[0].tolist())])
    return examine(pack, Dump.open(directory, right.config), stored)


@pytest.mark.parametrize(
    ("name", "dtype"), [("heads-tiled", torch.bfloat16), ("chunk-tail-lost", torch.float32)]
)
def test_diff_names_layer_operation_and_mistake(right, tmp_path, name, dtype):
    planted = next(planted for planted in PLANTED if planted.name == name)
    with broken(planted, right.hf, dtype) as hf, dump(hf, tmp_path):
        hf(right.ids)
    report = examined(right, tmp_path)
    assert report.verdict == "diverge" and report.dtype == str(dtype).removeprefix("torch.")
    assert (report.first.layer, report.first.point) == (0, planted.first)
    assert report.explained_by.name == name and report.explained_by.units < ROUNDING


def test_diff_agrees_with_a_clean_dump_of_another_attention(right, tmp_path):
    hf = cast(right.hf, torch.bfloat16)
    hf.set_attn_implementation("sdpa")
    with dump(hf, tmp_path):
        hf(right.ids)
    assert examined(right, tmp_path).verdict == "agree"
