"""Exact arithmetic is closer to float64 than native; what it cannot compute it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from support.exact import build, random_model, same

from minqwen.errors import ConfigError, MinqwenError
from minqwen.lab.golden import prompts
from minqwen.model import Exact, Qwen2


def errors(weights, ids, arithmetics=("native", "exact"), dtype=torch.float32):
    truth = build(weights, "native", torch.float64)(ids)
    return {
        a: ((build(weights, a, dtype)(ids) - truth).norm() / truth.norm()).item()
        for a in arithmetics
    }


def test_closer_to_float64_than_native_on_the_embedded_model(embedded_weights):
    ids = torch.cat(prompts(2048), 1)
    error = errors(embedded_weights, ids)
    assert error["exact"] < 0.6 * error["native"] < 1e-6
    error = errors(embedded_weights, ids, dtype=torch.bfloat16)
    assert error["exact"] < 1.1 * error["native"]


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16 weights", "float32 weights"])
@pytest.mark.parametrize("outlier", [1.0, 100.0, 1e4])
def test_closer_to_float64_than_native_with_outliers(outlier, bf16):
    """In the median of random models; docs/exact-arithmetic.md has the worst of them."""
    ids = torch.randint(0, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    ratios, tops = [], []
    for seed in range(5):
        weights = random_model(seed, outlier, bf16, hidden_size=256, intermediate_size=1024)
        _, seen = build(weights, "native").run_with_cache(ids, "*.mlp.act")
        tops += [x.abs().max().item() for x in seen.values()]
        error = errors(weights, ids)
        ratios.append(error["exact"] / error["native"])
    assert max(tops) > outlier
    assert sorted(ratios)[2] < 0.8 and max(ratios) < 2, ratios


def test_what_cannot_be_exact_is_refused():
    config, tensors = random_model()
    with pytest.raises(ConfigError, match="float64"):
        build((config, tensors), dtype=torch.float64)
    with pytest.raises(ConfigError, match="32776.*32768"):
        Qwen2(config.replace(intermediate_size=32776), arithmetic="exact", device="meta")
    with pytest.raises(ConfigError, match="131073"):
        Exact().rotary_table(config, 131073, torch.float32)
    with pytest.raises(ConfigError, match="context"):
        x = torch.zeros(1, 1, 131073, 2)
        Exact().attend(x[:, :, :1], x, x, None, 1.0, lambda name, x: x)
    model = Qwen2(config, arithmetic="exact")
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(MinqwenError, match="prepare"):
        model(ids)
    model.load_state_dict(tensors, strict=False)
    model.prepare()
    before = model(ids)
    assert same(copy.deepcopy(model)(ids), before)
    model.model.layers[1].mlp.down_proj.weight[3, 4] += 0.1
    with pytest.raises(MinqwenError, match="prepare"):
        model(ids)
    model.prepare()
    assert not same(model(ids), before)
