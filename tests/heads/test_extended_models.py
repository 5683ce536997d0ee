"""An extended model computes what its source does, on eight ranks too; and what training does."""

from __future__ import annotations

import pytest
import torch
from support.forked import forked
from support.heads import IDS, build, extended, random_model
from support.paths import ROOT
from support.tool import run_tool_here

from minqwen import ModelConfig
from minqwen.heads.convert import extend
from minqwen.heads.layout import RECIPES, Layout, layout

SHAPES = [(28, 4), (14, 2), (12, 2), (16, 2), (40, 8), (64, 8)]  # the official ones
SHAPES += [(6, 3), (5, 1), (9, 9)]  # and odd ones
P = "model.layers.0.self_attn."


@pytest.mark.parametrize("H, K", SHAPES)
def test_right_recipes_change_nothing_in_float64_and_no_bit_in_exact_arithmetic(H, K):
    config, weights = random_model(H, K)
    truth = build(config, weights, dtype=torch.float64)(IDS)
    exact = build(config, weights, arithmetic="exact")(IDS)
    G = H // K
    twice = (K * (G + 1), 2 * K) if (G + 1) % 2 == 0 else (2 * K * G, 2 * K)
    for counts in [(K * (G + 1), K), twice, (H, H), (K * (G + 3), K)]:
        for recipe in RECIPES:
            to = layout(config, *counts, recipe=recipe, alpha=0.3, seed=1)
            target, wide = extended(config, weights, to)
            out = build(target, wide, dtype=torch.float64)(IDS)
            error = float((out - truth).abs().max() / truth.abs().max())
            # A weighted share of float32 weights is rounded to float32, but the shares still add
            # up to the original.
            assert error < 1e-13, (counts, recipe, error)
            if recipe in ("ghost", "zero", "random"):
                same = build(target, wide, arithmetic="exact")(IDS)
                assert torch.equal(same, exact), (counts, recipe)


def test_padding_the_mlp_changes_nothing():
    config, weights = random_model(6, 3)
    to = layout(config, intermediate_size=56, intermediate_block=2)
    target, wide = extended(config, weights, to)
    exact = build(config, weights, arithmetic="exact")(IDS)
    assert torch.equal(build(target, wide, arithmetic="exact")(IDS), exact)


def gradients(to: Layout) -> dict[str, torch.Tensor]:
    config, weights = random_model(6, 3)
    model = build(*extended(config, weights, to)).requires_grad_(True)
    model(IDS).log_softmax(-1)[0, :-1].gather(-1, IDS[0, 1:, None]).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_ghosts_wake_up_in_training():
    """Their o columns receive gradient at once; their q rows once the o columns have moved."""
    config, _ = random_model(6, 3)
    found = gradients(layout(config, 9, 3))
    assert found[P + "o_proj.weight"].unflatten(1, (9, 8))[:, 2].abs().max() > 1e-6
    assert found[P + "q_proj.weight"].unflatten(0, (9, 8))[2].abs().max() == 0


def test_split_twins_receive_equal_gradients():
    config, _ = random_model(6, 3)
    found = gradients(layout(config, 9, 3, recipe="split"))
    q = found[P + "q_proj.weight"].unflatten(0, (9, 8))
    o = found[P + "o_proj.weight"].unflatten(1, (9, 8))
    torch.testing.assert_close(q[0], q[2], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(o[:, 0], o[:, 2], rtol=1e-5, atol=1e-8)


def test_dead_groups_receive_no_gradient():
    config, _ = random_model(6, 3)
    found = gradients(layout(config, 8, 4, recipe="zero"))
    assert found[P + "k_proj.weight"][24:].abs().max() == 0
    assert found[P + "v_proj.weight"][24:].abs().max() == 0


def test_eight_ranks_say_what_one_says(embedded, tmp_path):
    extend(embedded, tmp_path / "wide", layout(ModelConfig.from_json(embedded), 32))
    flags = ["--prompt", "In the beginning", "--max-tokens", "8", "--temperature", "0"]
    flags += ["--dtype", "float32", "--no-stream"]
    eight = forked(8, ROOT / "tools" / "generate.py", ["--model", tmp_path / "wide", *flags])
    assert eight.returncode == 0, eight.stderr
    alone = run_tool_here("generate.py", *flags)
    assert eight.stdout == alone.out and alone.out.strip()
