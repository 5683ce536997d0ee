"""Mistakes are what their names say: what undoes them in another place gives the right model."""

from __future__ import annotations

import pytest
import torch
from support.heads import IDS, build, random_model

from minqwen.lab.faults import FAULTS
from minqwen.lab.faults.rotary import QueriesOneAhead
from minqwen.model import Native

H, K, d = 14, 2, 8


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def rows_reordered(weights, projections, order):
    """Blocks of rows of q_proj and so on, in another order within each layer."""
    changed = dict(weights)
    for name, w in weights.items():
        if any(f".{projection}." in name for projection in projections):
            changed[name] = w.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)
    return changed


def agrees(name, config, undone, weights):
    """Whether the mistake on the changed weights is the right model on the right ones."""
    wrong = FAULTS[name].model(config, undone, dtype=torch.float64)
    right = build(config, weights, dtype=torch.float64)
    torch.testing.assert_close(wrong(IDS), right(IDS))


def test_interleaved_pairs_are_right_for_weights_in_metas_order():
    config, weights = random_model(H, K)
    order = torch.arange(d).view(2, -1).T.flatten()  # 0, 4, 1, 5, ...
    agrees(
        "rope-interleaved", config, rows_reordered(weights, ("q_proj", "k_proj"), order), weights
    )


def test_tiled_heads_are_right_for_weights_whose_heads_are_dealt_out():
    config, weights = random_model(H, K)
    heads = torch.arange(H).view(K, -1).T.flatten()  # 0, 7, 1, 8, ...
    order = (heads[:, None] * d + torch.arange(d)).flatten()
    dealt = rows_reordered(weights, ("q_proj",), order)
    for name, w in weights.items():
        if "o_proj" in name:
            dealt[name] = w[:, order]
    agrees("heads-tiled", config, dealt, weights)


@pytest.mark.parametrize("name", ["k-v-exchanged", "gate-up-exchanged", "shard-exchanged"])
def test_what_is_exchanged_twice_is_right(name):
    config, weights = random_model(H, K)
    once = FAULTS[name].apply(config, weights)
    twice = FAULTS[name].apply(*once)
    assert all(torch.equal(w, weights[n]) for n, w in twice[1].items())
    assert any(not torch.equal(w, weights[n]) for n, w in once[1].items())


def test_a_query_one_ahead_is_turned_as_at_the_next_position():
    config, _ = random_model(H, K)
    ops = QueriesOneAhead(config)
    cos, sin = (t[:, None] for t in ops.rotary_table(config, 9, torch.float64))
    for heads, ahead in ((H, 1), (K, 0)):
        x = torch.randn(8, heads, d, dtype=torch.float64)
        right = Native().rotate(x, cos[ahead : 8 + ahead], sin[ahead : 8 + ahead])
        torch.testing.assert_close(ops.rotate(x, cos[:8], sin[:8]), right)


@pytest.mark.parametrize(
    "name, sees", [("mask-sees-next", [2, 3, 4, 4]), ("mask-missing", [4, 4, 4, 4])]
)
def test_how_many_keys_each_token_sees(name, sees):
    config, weights = random_model(H, K)
    _, seen = FAULTS[name].model(config, weights).run_with_cache(IDS[:, :4], "*.pattern")
    for pattern in seen.values():
        assert (pattern > 0).sum(-1).tolist() == [[sees] * H]


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_in_few_bits_have_few_values_and_are_off_by_half_a_step(bits):
    config, weights = random_model(H, K)
    _, wrong = FAULTS[f"weights-int{bits}-per-tensor"].apply(config, weights)
    name = "model.layers.0.mlp.up_proj.weight"
    step = weights[name].abs().max() / (2 ** (bits - 1) - 1)
    assert (wrong[name] - weights[name]).abs().max() <= step * 0.5001
    assert 2 ** (bits - 2) < len((wrong[name] / step).round().unique()) < 2**bits
    assert torch.equal(wrong["lm_head.weight"], weights["lm_head.weight"])


def test_one_is_added_to_the_weight_of_a_norm_in_float32_whatever_the_checkpoint_has():
    config, weights = random_model(H, K, d)
    narrow = {name: w.bfloat16() for name, w in weights.items()}
    name = next(name for name in narrow if "norm" in name)
    narrow[name][0] = 2.0**-9  # lost beside 1 in bfloat16
    _, wrong = FAULTS["norm-one-plus-weight"].apply(config, narrow)
    assert wrong[name][0].item() == 1 + 2.0**-9
    assert {n for n in narrow if wrong[n].dtype != torch.bfloat16} == {
        n for n in narrow if "norm" in n
    }
