"""The functions that a GPU compiles: the model's own weights, and attention over blocks."""

from __future__ import annotations

import os

import pytest
import torch
from support import compiled
from support.compiled import model_as_on_a_gpu

from minqwen import Qwen2
from minqwen.model import steps
from minqwen.model.steps import Blocks, weights_of


def blocks_of(lengths: list[int], size: int, pool: int) -> Blocks:
    """Blocks of a pool for sequences of these lengths, in a random order."""
    order = torch.randperm(pool, generator=torch.Generator().manual_seed(1)).int()
    tables = torch.zeros(len(lengths), pool, dtype=torch.int32)
    counts, last, filled = [], [], []
    start = 0
    for i, length in enumerate(lengths):
        count = -(-length // size)
        tables[i, :count] = order[start : start + count]
        counts.append(count)
        last.append(int(tables[i, count - 1]))
        filled.append(length - (count - 1) * size)
        start += count
    numbers = (torch.tensor(x, dtype=torch.int32) for x in (counts, last, filled))
    return Blocks(tables, *numbers, size)


@pytest.mark.skipif("CI" in os.environ, reason="a compiler takes twenty seconds")
def test_compiled_attention_over_blocks_is_attention_over_each_sequences_own_tokens(monkeypatch):
    # The compiler imports setuptools, which does not like a distutils that another test has loaded.
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")
    blocks, K, G, d = blocks_of([5, 33, 48], 16, pool=8), 2, 7, 32
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, K, G, d, generator=g)
    keys, values = torch.randn(2, 8 * 16, K, d, generator=g).unbind()
    compiled_function = torch.compile(steps.attend_blocks, dynamic=False, fullgraph=True)
    with torch.inference_mode():
        z = compiled_function(q, keys, values, blocks, d**-0.5, {})
    for i in range(3):
        places = compiled.places_of(blocks, i)
        places = places[: len(places) - 16 + int(blocks.filled[i])]
        k, v = (x[places].double().transpose(0, 1) for x in (keys, values))
        pattern = torch.softmax(q[i].double() @ k.transpose(1, 2) * d**-0.5, -1)
        assert (z[i] - pattern @ v).abs().max() < 1e-6


def test_the_weights_are_the_models_own_and_the_joined_ones_in_their_order():
    model = model_as_on_a_gpu()
    weights = weights_of(model)
    assert weights is not None and len(weights.layers) == 3
    layer, own = weights.layers[1], model.model.layers[1]
    attention = own.self_attn
    assert layer.down.matrix is own.mlp.down_proj.weight
    assert layer.norm2 is own.post_attention_layernorm.weight
    q, k, v = (p.matrix() for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    assert torch.equal(layer.qkv.matrix, torch.cat((q, k, v)))
    gate, up = own.mlp.gate_proj.matrix(), own.mlp.up_proj.matrix()
    assert torch.equal(layer.gate_up.matrix, torch.cat((gate, up)))


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_a_model_with_a_hook_on_a_linear_layer_is_left_to_the_modules(name):
    model = model_as_on_a_gpu()
    linear = getattr(model.model.layers[2].self_attn, name)
    handle = linear.register_forward_hook(lambda *_: None)
    assert weights_of(model) is None
    handle.remove()
    assert weights_of(model) is not None


def test_other_arithmetics_are_left_to_the_modules():
    model = model_as_on_a_gpu()
    native = Qwen2.from_tensors(model.config, lambda name, _: model.get_parameter(name))
    assert weights_of(native) is None


def test_packed_attention_asks_torch_for_causal_attention_with_fewer_key_heads(monkeypatch):
    from torch.nn.attention import varlen

    asked = {}

    def varlen_attn(q, k, v, starts, key_starts, most, longest, **options):
        asked.update(options, most=most, longest=longest)
        return q

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    x = torch.zeros(3, 2, 4)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    steps.attend_packed(x, x, x, starts, starts, (3, 9), 0.5)
    assert asked == {"most": 3, "longest": 9, "scale": 0.5, "window_size": (-1, 0)}
