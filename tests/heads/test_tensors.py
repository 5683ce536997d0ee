"""One tensor at a time: extended, shrunk back byte for byte, and drift seen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.heads import extended, random_model

from minqwen.heads.layout import RECIPES, layout
from minqwen.heads.tensors import extend_tensor, shrink_tensor

P = "model.layers.0.self_attn."


def test_a_new_head_is_a_copy_of_its_groups_and_adds_nothing():
    config, weights = random_model(6, 3, d=4)
    to = layout(config, 9)
    q = extend_tensor(P + "q_proj.weight", weights[P + "q_proj.weight"], to).unflatten(0, (9, 4))
    o = extend_tensor(P + "o_proj.weight", weights[P + "o_proj.weight"], to).unflatten(1, (9, 4))
    assert torch.equal(q[2], q[0]) and torch.equal(q[5], q[3])
    assert not o[:, [2, 5, 8]].any() and o[:, [0, 1, 3, 4, 6, 7]].any()
    norm = weights["model.norm.weight"]
    assert extend_tensor("model.norm.weight", norm, to) is norm


def test_random_heads_depend_on_the_seed_and_the_name_only():
    config, weights = random_model(6, 3)
    name = P + "q_proj.weight"

    def noise(seed: int, name: str) -> torch.Tensor:
        to = layout(config, 9, recipe="random", seed=seed)
        return extend_tensor(name, weights[P + "q_proj.weight"], to).unflatten(0, (9, 8))[2]

    assert torch.equal(noise(1, name), noise(1, name))
    assert not torch.equal(noise(1, name), noise(2, name))
    assert not torch.equal(noise(1, name), noise(1, name.replace("0", "1")))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(0, 6),
    st.sampled_from(list(RECIPES)),
    st.integers(0, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 9),
)
def test_extending_and_shrinking_gives_every_byte_back(
    K, G, copies, more, recipe, dead, dtype, pad
):
    config, weights = random_model(K * G, K, d=2, dtype=dtype, seed=G)
    kv_slots = K * copies + (dead if dead < K else 0)
    slots = kv_slots * (-(-G // (kv_slots // K)) + more)
    to = layout(
        config, slots, kv_slots, recipe=recipe, alpha=0.7, seed=3, intermediate_size=48 + pad
    )
    target, wide = extended(config, weights, to)
    assert {name: tuple(w.shape) for name, w in wide.items()} == target.parameter_shapes()
    for name, tensor in wide.items():
        source, residuals = shrink_tensor(name, tensor, to)
        assert torch.equal(source, weights[name]) and source.dtype == dtype, name
        assert not residuals, name


@pytest.mark.parametrize(
    "name, slot",
    [("q_proj.weight", 7), ("q_proj.bias", 15), ("o_proj.weight", 7), ("o_proj.weight", 31)],
)
def test_one_unit_in_the_last_place_of_drift_is_seen(name, slot):
    config, weights = random_model(28, 4, d=2)
    to = layout(config, 32, recipe="split" if slot == 7 else "ghost")
    tensor = extend_tensor(P + name, weights[P + name], to)
    if name == "o_proj.weight":
        place = tensor[:1, slot * 2 : slot * 2 + 1]
    else:
        place = tensor[slot * 2 : slot * 2 + 1]
    place.copy_(torch.nextafter(place, torch.tensor(9.0)))
    _, residuals = shrink_tensor(P + name, tensor, to)
    assert residuals and all(r < 1e-6 for r in residuals.values())
