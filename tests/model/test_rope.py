"""Rotary tables and YaRN: transformers' in every bit, and numpy's in float64."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from support import numpy_qwen2
from support.paths import DATA
from support.qwen2 import PLAIN, TINY, oracle, ours, tokens, yarn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from minqwen.config import ModelConfig, RopeScaling
from minqwen.model import Exact, Native, rope

GOLDEN = json.loads((DATA / "yarn_golden.json").read_text())["cases"]


def rope_config(head_dim, rope_parameters, **more):
    hf = Qwen2Config(**(TINY | dict(head_dim=head_dim, rope_parameters=rope_parameters) | more))
    return hf, ModelConfig.from_dict(hf.to_dict())


@pytest.mark.parametrize(
    "case", GOLDEN, ids=lambda c: f"d{c['head_dim']}-{c.get('factor', 'plain')}"
)
def test_frequencies_are_the_golden_ones(case):
    d, theta = case["head_dim"], case["rope_theta"]
    scaling = None
    if "factor" in case:
        scaling = RopeScaling(case["factor"], case["original_max_position_embeddings"])
    _, config = rope_config(d, PLAIN)
    config = dataclasses.replace(config, rope_theta=theta, rope_scaling=scaling)
    frequencies, factor = rope.inverse_frequencies(config)
    assert frequencies.dtype == torch.float32 and frequencies.tolist() == case["inv_freq"]
    assert factor == case.get("attention_factor", 1.0)
    if scaling:
        assert rope.yarn_range(d, theta, scaling) == (case["low"], case["high"])
        unrounded = dataclasses.replace(scaling, truncate=False)
        assert rope.yarn_range(d, theta, unrounded) == pytest.approx(
            (case["low_raw"], case["high_raw"]), rel=1e-14
        )


@pytest.mark.parametrize(
    "head_dim, parameters, dtype",
    [
        (128, yarn(4.0), torch.float32),
        (128, yarn(4.0), torch.bfloat16),
        (64, yarn(2.0), torch.float32),
        (64, PLAIN, torch.bfloat16),
    ],
    ids=["d128-yarn4-float32", "d128-yarn4-bfloat16", "d64-yarn2", "d64-plain"],
)
def test_tables_are_transformers_up_to_131072_positions(head_dim, parameters, dtype):
    hf, config = rope_config(head_dim, parameters)
    theirs = Qwen2RotaryEmbedding(hf)(torch.empty(0, dtype=dtype), torch.arange(131072)[None])
    for mine, expected in zip(rope.rotary_table(config, 131072, dtype), theirs):
        assert mine.dtype == dtype and torch.equal(mine, expected[0])


def test_float64_tables_are_numpys_up_to_131072_positions():
    """A rounded frequency, times a position of 2^17, leaves an error of about 2^-36 in an angle."""
    hf, config = rope_config(64, yarn(4.0))
    some = np.array([*range(0, 131072, 97), 131071])
    frequencies, factor = numpy_qwen2.frequencies(hf.to_dict())
    angles = some[:, None] * np.concatenate([frequencies, frequencies])
    cos, sin = rope.rotary_table(config, 131072, torch.float64)
    assert abs(cos.numpy()[some] - factor * np.cos(angles)).max() < 2**-34
    assert abs(sin.numpy()[some] - factor * np.sin(angles)).max() < 2**-34


def test_every_yarn_option_is_transformers():
    draw = random.Random(0)
    for _ in range(200):
        options = dict(
            beta_fast=draw.choice([32.0, 16, 4]),
            beta_slow=draw.choice([1.0, 2, 4]),
            truncate=draw.random() < 0.5,
            attention_factor=draw.choice([None, None, 0.9]),
            mscale=draw.choice([None, 0, 0.707, 1.0]),
            mscale_all_dim=draw.choice([None, 0, 0.5, 1.0]),
        )
        options = {k: v for k, v in options.items() if v is not None}
        parameters = yarn(
            draw.choice([1.0, 1.5, 2.0, 4.0, 40.0]),
            draw.choice([8, 64, 4096, 32768]),
            draw.choice([1e4, 1e6]),
            **options,
        )
        hf, config = rope_config(draw.choice([2, 8, 10, 64, 128]), parameters)
        theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](hf, "cpu")
        mine = rope.inverse_frequencies(config)
        assert torch.equal(mine[0], theirs) and mine[1] == factor, parameters


class CosineDevices(TorchDispatchMode):
    """Notes on which devices a cosine is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "cos":
            self.seen.add(args[0].device.type)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ops, where", [(Native(), {"meta"}), (Exact(), set())])
def test_a_table_of_native_arithmetic_is_computed_on_the_device_that_uses_it(ops, where):
    """As transformers does: a GPU's cosine has other last bits. Exact uses no library's cosine."""
    _, config = rope_config(64, yarn(4.0))
    with CosineDevices() as devices:
        cos, sin = ops.rotary_table(config, 40, torch.float32, "meta")
    assert cos.device.type == sin.device.type == "meta" and devices.seen == where


def test_the_rotary_table_follows_the_model_to_its_device():
    model = ours(oracle())
    model(tokens(model, 1, 5))
    model.to("meta")
    assert model(torch.zeros(1, 5, dtype=torch.long, device="meta")).shape == (1, 5, 61)
