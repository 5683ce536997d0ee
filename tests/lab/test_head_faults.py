"""Wrong ways to add heads: each is what its sentence says, and is found where predicted."""

from __future__ import annotations

import pytest
import torch
from support.heads import build, embedded_weights

from minqwen.errors import CheckpointError
from minqwen.lab.faults import HEAD_FAULTS
from minqwen.lab.faults import build as build_checked
from minqwen.lab.verify import compare_models, inspect_layers, problems

LATE = [7, 14, 15, 21, 22, 23]  # those of heads 0..27 for which j // 8 is not j // 7
PREDICTED = {  # name -> (heads with other heads' keys, where the first difference is)
    "append-zero": (LATE, "attention"),
    "append-copy": ([0, 1, 2, 3, *LATE], "attention"),
    "append-halved": ([0, 1, 2, 3, *LATE], "attention"),
    "no-split": ([], "o"),
    "forget-bias": ([], "q"),
}
IDS = torch.arange(40, 72)[None]


STAGES = {"scores": "attention", "out": "o", "q": "q"}  # what heads.py verify calls the points


def test_the_catalogue_says_where_each_fault_is_found():
    assert set(PREDICTED) | {"article", "derive-head-dim"} == set(HEAD_FAULTS)
    for name, (_, stage) in PREDICTED.items():
        layer, point = HEAD_FAULTS[name].first.split(".attn.")
        assert (layer, STAGES[point]) == ("layers.0", stage)


@pytest.mark.parametrize("name", PREDICTED)
def test_a_fault_is_caught_with_the_predicted_heads_at_the_predicted_place(name):
    wrong_kv, stage = PREDICTED[name]
    config, weights = embedded_weights()
    target, wrong = HEAD_FAULTS[name].apply(config, weights)
    maps = inspect_layers(config, target, weights.__getitem__, wrong.__getitem__)
    assert all(m.wrong_kv == wrong_kv for m in maps)
    if name == "no-split":
        assert all(set(m.wrong_sum) == {0, 7, 14, 21} for m in maps)
        assert all(e == pytest.approx(1.0) for m in maps for e in m.wrong_sum.values())
    assert problems(maps)
    for dtype in (torch.float32, torch.float64):
        report = compare_models(
            build(config, weights, dtype=dtype),
            build(target, wrong, dtype=dtype),
            build(config, weights, dtype=torch.float64),
            IDS,
            maps,
            greedy_tokens=2,
        )
        assert report.verdict == "different" and report.units > 1000
        assert (report.first_layer, report.first_stage) == (0, stage)


def test_the_articles_recipe_cannot_be_built():
    config, weights = embedded_weights()
    target, wrong = HEAD_FAULTS["article"].apply(config, weights)
    with pytest.raises(CheckpointError, match=r"q_proj.weight has shape \[512, 448\], its config"):
        build_checked(target, wrong, torch.float32)


def test_a_derived_head_dim_gives_a_model_that_loads_and_is_wrong():
    config, weights = embedded_weights()
    target, wrong = HEAD_FAULTS["derive-head-dim"].apply(config, weights)
    assert target.head_dim == 14
    assert {n: tuple(t.shape) for n, t in wrong.items()} == target.parameter_shapes()
    difference = build(target, wrong)(IDS) - build(config, weights)(IDS)
    assert float(difference.abs().max()) > 0.1
