"""Exact arithmetic is closer to float64 than native; what it cannot compute it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from support.exact import build, random_model, same

from minqwen.errors import ConfigError, MinqwenError
from minqwen.lab.golden import prompts
from minqwen.model import Exact, Native, Qwen2


def errors(weights, ids, arithmetics=("native", "exact"), dtype=torch.float32):
    truth = build(weights, "native", torch.float64)(ids)
    return {
        a: ((build(weights, a, dtype)(ids) - truth).norm() / truth.norm()).item()
        for a in arithmetics
    }


def test_closer_to_float64_than_native_on_the_embedded_model(embedded_weights):
    ids = torch.cat(prompts(2048), 1)
    error = errors(embedded_weights, ids)
    assert error["exact"] < 0.8 * error["native"] < 1e-6
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


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16 weights", "float32 weights"])
def test_closer_to_float64_than_native_when_channels_are_rescaled(bf16):
    """A channel is large in the norms' weights and small in the columns that read it.

    Native does not notice: powers of two change none of its roundings.
    """
    config, plain = random_model(3, 1.0, bf16, hidden_size=256, intermediate_size=512)
    weights = {name: x.clone() for name, x in plain.items()}
    for name, x in weights.items():
        if "norm" in name:
            x[::16] *= 4096
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            x[:, ::16] /= 4096
        elif name.endswith(("gate_proj.weight", "up_proj.weight", "lm_head.weight")):
            x[:, ::16] /= 4096
    ids = torch.randint(0, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    error, before = errors((config, weights), ids), errors((config, plain), ids)
    assert error["native"] == before["native"]
    assert error["exact"] < 0.9 * error["native"]


@pytest.mark.parametrize("sharpness", [0.01, 1.0])
def test_closer_to_float64_than_native_over_many_keys(sharpness):
    """A pattern that is spread over 20,000 keys has entries of 2^-14."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 7, 64, generator=g) * sharpness
    k, v = (torch.randn(20_000, 1, 64, generator=g) for _ in range(2))

    def attend(ops, dtype):
        keys, values = (x.transpose(0, 1)[None] for x in ops.cached(k.to(dtype), v.to(dtype)))
        return ops.attend(q.to(dtype), keys, values, None, 0.125, lambda name, x: x)

    truth = attend(Native(), torch.float64)
    exact, native = (attend(ops, torch.float32) - truth for ops in (Exact(), Native()))
    assert exact.norm() < 0.5 * native.norm()


def test_what_is_not_finite_spoils_only_its_channel_of_what_sees_it():
    """One value of the fourth token is infinite, another is not a number."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 1, 8, generator=g) for _ in range(3))
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)

    def attend(v, n):
        """The last n tokens as one chunk."""
        keys, values = (x.transpose(0, 1)[None] for x in Exact().cached(k, v))
        rows = q.transpose(0, 1)[None, :, -n:]
        future = hidden[-n:] if n > 1 else None
        return Exact().attend(rows, keys, values, future, 1.0, lambda name, x: x)[0, 0]

    spoilt = v.clone()
    spoilt[3, 0, 2], spoilt[3, 0, 5] = float("inf"), float("nan")
    z, clean = attend(spoilt, 6), attend(v, 6)
    assert torch.equal(z[:3], clean[:3])
    assert z[3:, [2, 5]].isnan().all()
    others = [0, 1, 3, 4, 6, 7]
    assert ((z - clean)[3:, others].abs() < 1e-6).all()
    for n in (1, 2, 3):
        assert torch.equal(attend(spoilt, n).nan_to_num(9.0), z[-n:].nan_to_num(9.0))


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
    with pytest.raises(MinqwenError, match="prepare"):
        copy.deepcopy(model)(ids)
    model.prepare()
    assert not same(model(ids), before)
