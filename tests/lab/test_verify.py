"""Is B the same model as A, with other heads? Judged by its weights and by its outputs."""

from __future__ import annotations

import json

import pytest
import torch
from support.heads import IDS as SMALL_IDS
from support.heads import build, embedded_weights, extended, random_model

from minqwen.heads.layout import RECIPES, layout
from minqwen.lab.faults import HEAD_FAULTS
from minqwen.lab.verify import (
    Report,
    as_json,
    compare_models,
    inspect_layer,
    inspect_layers,
    nearest,
    problems,
)
from minqwen.lab.verify_configs import differing_sizes
from minqwen.lab.verify_page import as_html

IDS = torch.arange(40, 72)[None]
P = "model.layers.1.self_attn."


def inspect(config, weights, target, wide, layer=1):
    return inspect_layer(config, target, weights.__getitem__, wide.__getitem__, layer)


@pytest.fixture(scope="module")
def split():
    """A random model and its extension by recipe split: (config, weights, target, its weights)."""
    config, weights = random_model(28, 4)
    return config, weights, *extended(config, weights, layout(config, 32, recipe="split"))


def test_an_extension_shows_whose_head_each_slot_holds(split):
    found = inspect(*split)
    assert found.right
    assert found.heads[:8] == [0, 1, 2, 3, 4, 5, 6, 0]
    assert found.shares[:8] == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.5])
    assert found.kv == [0, 1, 2, 3]
    assert found.contributing()[:2] == [(0, 0), (1, 1)]


def test_a_dropped_bias_is_named(split):
    config, weights, target, wide = split
    k_bias = {**wide, P + "k_proj.bias": torch.zeros_like(wide[P + "k_proj.bias"])}
    assert inspect(config, weights, target, k_bias).wrong_kv_bias == [0, 1, 2, 3]
    q_bias = {**wide, P + "q_proj.bias": torch.zeros_like(wide[P + "q_proj.bias"])}
    assert inspect(config, weights, target, q_bias).wrong_bias == list(range(32))


def test_two_slots_that_changed_places_read_each_others_keys(split):
    config, weights, target, wide = split
    index = torch.arange(32)
    index[3], index[12] = 12, 3

    def swapped(name: str, dim: int) -> torch.Tensor:
        blocks = wide[P + name].unflatten(dim, (32, 8))
        return blocks.index_select(dim, index).flatten(dim, dim + 1)

    places = {"q_proj.weight": 0, "q_proj.bias": 0, "o_proj.weight": 1}
    wrong = {**wide, **{P + name: swapped(name, dim) for name, dim in places.items()}}
    found = inspect(config, weights, target, wrong)
    assert found.wrong_kv == [3, 11] and not found.wrong_sum  # slot 12 holds head 11
    assert inspect(config, weights, target, wrong, layer=0).right


def test_columns_that_do_not_add_up_are_named_with_their_error(split):
    config, weights, target, wide = split
    columns = wide[P + "o_proj.weight"].clone()
    columns[:, 0:8] *= 2  # slot 0, half of head 0
    found = inspect(config, weights, target, {**wide, P + "o_proj.weight": columns})
    assert found.wrong_sum == {0: pytest.approx(0.5)}
    assert "query heads [0] do not add up" in problems([found])[0]


def test_a_slot_with_a_head_that_nobody_knows_is_stray(split):
    config, weights, target, wide = split
    q = wide[P + "q_proj.weight"].clone()
    q[5 * 8 : 6 * 8] = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    found = inspect(config, weights, target, {**wide, P + "q_proj.weight": q})
    assert found.heads[5] is None and found.stray == [5] and list(found.wrong_sum) == [5]
    assert any("slots [5] hold none of the original's heads" in said for said in problems([found]))


def test_of_two_equal_heads_the_preferred_one_is_meant():
    heads = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    rows = torch.tensor([[1.0, 0.001], [0.5, 0.5]], dtype=torch.float64)
    assert nearest(rows, heads) == [0, None]
    assert nearest(rows, heads, [[1, 2], []]) == [1, None]


def test_a_dead_group_is_no_problem():
    config, weights = random_model(6, 3)
    target, wide = extended(config, weights, layout(config, 8, 4, recipe="zero"))
    found = inspect(config, weights, target, wide)
    assert found.right and found.kv == [0, 1, 2, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_right_recipe_is_within_rounding_in_every_dtype(recipe, dtype):
    config, weights = embedded_weights()
    target, wide = extended(config, weights, layout(config, 32, 4, recipe=recipe, alpha=0.3))
    maps = inspect_layers(config, target, weights.__getitem__, wide.__getitem__)
    assert all(m.right for m in maps) and not problems(maps)
    report = compare_models(
        build(config, weights, dtype=dtype),
        build(target, wide, dtype=dtype),
        build(config, weights, dtype=torch.float64),
        IDS,
        maps,
        greedy_tokens=2,
    )
    assert report.same and report.units < 1.5 and report.first_stage is None, report.units


def report_of(recipe_or_fault: str, arithmetic: str = "native") -> Report:
    config, weights = embedded_weights()
    if recipe_or_fault in RECIPES:
        variant = extended(config, weights, layout(config, 32, recipe=recipe_or_fault))
    else:
        variant = HEAD_FAULTS[recipe_or_fault].apply(config, weights)
    target, wide = variant
    maps = []
    if target.head_dim == config.head_dim:
        maps = inspect_layers(config, target, weights.__getitem__, wide.__getitem__)
    return compare_models(
        build(config, weights, arithmetic=arithmetic),
        build(target, wide, arithmetic=arithmetic),
        build(config, weights, dtype=torch.float64),
        IDS,
        maps,
        greedy_tokens=2,
    )


def test_ghosts_change_no_bit_under_exact_arithmetic_and_a_split_only_rounds():
    ghost = report_of("ghost", "exact")
    assert ghost.verdict == "bitwise" and ghost.units == 1 and ghost.max_abs == 0
    assert ghost.greedy_match and ghost.kl == 0 and ghost.top1 == 1
    assert report_of("split", "exact").verdict == "equal to rounding"


def test_a_head_that_counts_twice_shows_at_its_place():
    report = report_of("no-split")
    assert (report.first_layer, report.first_stage) == (0, "o")
    first = report.head_errors[0]
    assert max(first) < 3  # each head's own output is right in the first layer
    assert max(report.head_errors[1]) > 1000  # after it, nothing is
    assert report.parameters > 0 and report.layers[0].wrong_sum.keys() == {0, 7, 14, 21}


def test_the_first_difference_is_beyond_rounding_or_under_exact_arithmetic_the_first_bit():
    config, weights = random_model(6, 3)
    first, second = (f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1))
    wrong = {**weights, first: weights[first] * (1 + 2**-22), second: weights[second] * 2}
    maps = inspect_layers(config, config, weights.__getitem__, wrong.__getitem__)
    for arithmetic, expected in (("native", (1, "o")), ("exact", (0, "o"))):
        report = compare_models(
            build(config, weights, arithmetic=arithmetic),
            build(config, wrong, arithmetic=arithmetic),
            build(config, weights, dtype=torch.float64),
            SMALL_IDS,
            maps,
            greedy_tokens=2,
        )
        assert (report.first_layer, report.first_stage) == expected, arithmetic


def test_sizes_that_no_extension_changes_are_told():
    config, _ = random_model(6, 3)
    other = config.replace(hidden_size=48, vocab_size=98, num_attention_heads=12)
    assert differing_sizes(config, other) == ["vocab_size 97 and 98", "hidden_size 40 and 48"]
    assert differing_sizes(config, config.replace(num_attention_heads=12)) == []


def test_the_report_as_json_says_all_of_it():
    report = report_of("append-halved")
    facts = json.loads(as_json(report))
    assert facts["verdict"] == "different" and facts["first_stage"] == "attention"
    assert facts["layers"][0]["wrong_kv"] == [0, 1, 2, 3, 7, 14, 15, 21, 22, 23]
    assert len(facts["head_errors"]) == 4 and len(facts["head_errors"][0]) == 28
    assert facts["attention_macs"].keys() == {"1024", "8192", "32768", "131072"}


def test_the_page_shows_the_verdict_the_rules_and_the_slots():
    page = as_html(report_of("append-halved"), "a <b>")
    assert "a &lt;b&gt;: <strong>different</strong>" in page and "<script" not in page
    assert "read another head&#x27;s keys and values" in page
    assert '<tr><th>KV 0 = head 0</th><td class="live">0<small>&times;0.5</small></td>' in page
    assert '<td class="bad">7</td></tr>' in page  # head 7 in slot 7 reads KV head 0
    assert 'title="layer 0, head 27: ' in page
    right = as_html(report_of("ghost"), "right")
    assert "every rule is kept" in right and '<td class="new">0</td></tr>' in right
    assert 'class="bad"' not in right


def test_a_report_without_maps_has_a_page_too():
    page = as_html(report_of("derive-head-dim"), "derived")
    assert "derived: <strong>different</strong>" in page and "Slot map" not in page
