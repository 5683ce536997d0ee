"""The seams of the arithmetic: whoever overrides an operation computes the whole model with it."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from support.exact import build, random_model
from support.paged import random_chunks, run_paged
from support.qwen2 import error, oracle, ours, tokens, yarn

from minqwen import LLM, SamplingParams
from minqwen.errors import CheckpointError, ConfigError
from minqwen.model import Exact, Native
from minqwen.model.qwen2 import make_arithmetic

LAYERS = 2


class Fused(Native):
    """Multiplies one packed weight, and attends token by token over what it gathers by itself."""

    name = "fused"

    def __init__(self):
        self.calls = Counter()

    def project(self, x, *linears):
        self.calls[f"project {len(linears)}"] += 1
        weight = torch.cat([linear.weight for linear in linears])
        y = F.linear(x, weight)
        parts = y.split([len(linear.weight) for linear in linears], -1)
        return tuple(
            part if linear.bias is None else part + linear.bias
            for part, linear in zip(parts, linears)
        )

    def attend_paged(self, q, k, v, batch, scale, tap, cache, layer):
        self.calls["attend_paged"] += 1
        cache.write(layer, batch.slots, k, v)
        keys, values = cache.pool[layer].flatten(1, 2)  # [P * S, K, d] each
        groups = q.shape[1] // k.shape[1]
        starts = batch.query_starts.tolist()
        out = torch.empty_like(q)
        for i, (start, end) in enumerate(zip(starts, starts[1:])):
            places = torch.arange(int(batch.context_lengths[i]))
            blocks = batch.block_tables[i, places // cache.block_size]
            slots = blocks * cache.block_size + places % cache.block_size
            own_k = keys[slots].repeat_interleave(groups, 1)  # [L, H, d]
            own_v = values[slots].repeat_interleave(groups, 1)
            for t in range(start, end):
                seen = int(batch.positions[t]) + 1
                scores = torch.einsum("hd,lhd->hl", q[t], own_k[:seen]) * scale
                out[t] = torch.einsum("hl,lhd->hd", scores.softmax(-1), own_v[:seen])
        return out


@pytest.fixture(scope="module")
def pair():
    """The same model in float64, by Native and by Fused."""
    with torch.no_grad():
        hf = oracle(num_attention_heads=8, rope_parameters=yarn(4.0, original=64))
        return ours(hf, torch.float64), ours(hf, torch.float64, arithmetic=Fused())


def test_a_model_computes_with_the_arithmetic_that_it_is_given(pair):
    native, fused = pair
    ids = tokens(native, 2, 9)
    fused.ops.calls.clear()
    assert error(fused(ids), native(ids)) < 1e-12
    assert fused.ops.calls == {"project 3": LAYERS, "project 2": LAYERS}


@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_attention_over_blocks_is_the_arithmetics(pair, block_size):
    native, fused = pair
    sequences = [tokens(native, T, seed=T) for T in (1, 5, 17, 40)]
    fused.ops.calls.clear()
    runs = [
        run_paged(model, sequences, block_size, random_chunks(3, 9), seed=3, shuffled=True)
        for model in pair
    ]
    for got, want, ids in zip(runs[1], runs[0], sequences):
        assert error(got, want) < 1e-12
        assert error(got, native(ids[None])[0]) < 1e-12
    steps = fused.ops.calls["attend_paged"] // LAYERS
    assert steps > 3
    assert fused.ops.calls == {name: steps * LAYERS for name in fused.ops.calls}
    assert set(fused.ops.calls) == {"project 3", "project 2", "attend_paged"}


def test_the_engine_runs_on_it(pair):
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    prompts = [[5, 6, 7], [8] * 11]
    outputs = []
    for model in pair:
        llm = LLM(model, num_blocks=30, block_size=4, max_model_len=32, max_num_seqs=2)
        completions = llm.generate(prompts, params, use_tqdm=False)
        outputs.append([output.outputs[0].token_ids for output in completions])
    assert outputs[0] == outputs[1]


# ---- properties ---------------------------------------------------------------------------------


def test_native_stores_and_computes_in_one_dtype_and_keeps_the_weights():
    ops = Native()
    assert ops.can_save and not ops.order_free
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert ops.wide_dtype(dtype) == dtype


@pytest.mark.parametrize("ops", [Native(), Exact()], ids=["native", "exact"])
def test_scores_are_divided_by_the_root_of_the_heads_width(ops):
    assert [ops.attention_scale(d) for d in (1, 16, 64, 256)] == [1, 0.25, 0.125, 0.0625]
    assert ops.attention_scale(80) == pytest.approx(0.11180339887498948, rel=1e-15)


@pytest.mark.parametrize("ops", [Native(), Exact()], ids=["native", "exact"])
def test_a_head_is_turned_by_the_angle_of_each_pair(ops):
    """Pairs are (0, 2) and (1, 3): the first by a quarter, the second by 3/5 and 4/5."""
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [5.0, 0.0, -1.0, 10.0]]])  # [1, 2, 4]
    cos, sin = torch.tensor([[[0.0, 0.6] * 2]]), torch.tensor([[[1.0, 0.8] * 2]])
    found = ops.rotate(x, cos, sin)
    want = torch.tensor([[[-3.0, -2.0, 1.0, 4.0], [1.0, -8.0, 5.0, 6.0]]])
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_exact_sums_in_any_order_in_float64_and_changes_the_weights():
    ops = Exact()
    assert ops.order_free and not ops.can_save
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert ops.wide_dtype(dtype) == torch.float64


def test_weights_that_an_arithmetic_has_changed_are_not_saved(embedded_weights, tmp_path):
    with pytest.raises(CheckpointError, match="exact arithmetic"):
        build(embedded_weights, "exact").save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("arithmetic", ["native", "exact", "fast"])
def test_a_weight_that_is_taken_away_is_kept_by_nobody(arithmetic):
    """Neither as what was prepared, nor in a packed form."""
    model = build(random_model(), arithmetic)
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        linear = model.get_submodule(name.removesuffix(".weight"))
        weight = weakref.ref(linear.weight)
        model.set_parameter(name, None)
        assert weight() is None and linear.weight.is_meta and not linear.is_here


def test_an_arithmetic_is_named_or_given():
    ops = Fused()
    assert make_arithmetic(ops) is ops
    assert type(make_arithmetic("native")) is Native and type(make_arithmetic("exact")) is Exact
    with pytest.raises(ConfigError, match="'exakt', expected .*'native'.*did you mean 'exact'"):
        make_arithmetic("exakt")
