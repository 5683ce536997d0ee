"""Every recipe tried on a model: the right ones found right, the wrong ones wrong."""

from __future__ import annotations

import torch
from support.heads import embedded_weights

from minqwen.heads.layout import RECIPES
from minqwen.lab.faults import HEAD_FAULTS
from minqwen.lab.recipes import right_recipes, try_recipes


def test_every_recipe_is_found_to_be_what_it_is():
    config, weights = embedded_weights()
    trials = list(try_recipes(config, weights, torch.arange(40, 60)[None]))
    assert [t.name for t in trials] == [*right_recipes(config), *HEAD_FAULTS]
    for trial in trials:
        assert trial.as_expected, trial.name
        assert trial.is_right == (trial.name not in HEAD_FAULTS)
    by_name = {trial.name: trial for trial in trials}
    assert by_name["ghost 32/4"].reports[2].verdict == "bitwise"
    assert by_name["ghost 32/4"].first_wrong is None
    assert "has shape [512, 448]" in (by_name["article"].error or "")
    assert by_name["append-zero"].first_wrong == "0 attention"
    assert by_name["derive-head-dim"].problems == [
        "head_dim 14 instead of 16: rows of every head are dropped"
    ]


def test_the_right_recipes_are_all_that_there_are():
    config, _ = embedded_weights()
    names = list(right_recipes(config))
    assert names[: len(RECIPES)] == [f"{recipe} 32/4" for recipe in RECIPES]
    assert names[len(RECIPES) :] == ["ghost 32/8", "split 56/4", "full MHA 28/28"]
