"""Where heads are placed, and the three rules that a placement must keep."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.heads import QWEN_7B, random_model

from minqwen.errors import HeadsError, MinqwenError
from minqwen.heads.layout import Layout, extended_config, layout, slot_map


def test_new_heads_go_at_the_end_of_each_group():
    config, _ = random_model(6, 3)  # two heads in a group
    to = layout(config, 9)  # one more for each
    assert to.heads == (0, 1, 0, 2, 3, 2, 4, 5, 4)
    assert to.shares == (1.0, 1.0, 0.0) * 3
    assert to.kv == (0, 1, 2)
    assert [to.reads(slot) for slot in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_7b_with_twice_the_kv_heads_spreads_each_group_over_two_copies():
    to = layout(QWEN_7B, 32, 8)
    assert to.kv == (0, 0, 1, 1, 2, 2, 3, 3)
    assert to.heads[:8] == (0, 1, 2, 3, 4, 5, 6, 0)


def test_a_head_count_that_no_copy_can_have_leaves_dead_groups():
    config, _ = random_model(6, 3)
    to = layout(config, 8, 4, recipe="zero")
    assert to.kv == (0, 1, 2, None)
    assert to.heads[6:] == (None, None)


def test_split_halves_a_head_as_often_as_it_is_copied():
    config, _ = random_model(2, 2)
    to = layout(config, 6, recipe="split")
    assert to.heads == (0, 0, 0, 1, 1, 1)
    assert to.shares == (0.25, 0.5, 0.25) * 2


def test_more_new_slots_than_heads_begin_again_with_the_groups_first_head():
    config, _ = random_model(6, 3)  # two heads in a group
    assert layout(config, 12).heads == (0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5)
    assert layout(config, 15).heads[:5] == (0, 1, 0, 1, 0)


def test_weighted_gives_alpha_to_a_heads_own_slot_and_the_rest_to_the_new_one():
    config, _ = random_model(2, 2)
    to = layout(config, 4, recipe="weighted", alpha=0.75)
    assert to.heads == (0, 0, 1, 1) and to.shares == (0.75, 0.25) * 2


@pytest.mark.parametrize("counts", [(30, None), (28, 3), (28, 8), (None, 2), (0, None), (-4, 4)])
def test_counts_that_cannot_work_are_refused(counts):
    with pytest.raises(HeadsError):
        layout(QWEN_7B, *counts)


def test_the_refusal_says_what_would_work():
    with pytest.raises(HeadsError, match="nearest that are: 28 and 32"):
        layout(QWEN_7B, 30)
    with pytest.raises(HeadsError, match="copied, not merged"):
        layout(QWEN_7B, 28, 3)
    with pytest.raises(HeadsError, match="at least 32 query heads are needed"):
        layout(QWEN_7B, 24, 8)


def test_a_recipe_or_a_share_that_does_not_exist_is_refused():
    with pytest.raises(HeadsError, match="recipe is 'goast', expected one of ghost"):
        layout(QWEN_7B, 32, recipe="goast")
    with pytest.raises(HeadsError, match="alpha is 1.0, expected a number between 0 and 1"):
        layout(QWEN_7B, 32, recipe="weighted", alpha=1.0)


def test_check_names_the_heads_of_each_broken_rule():
    to = layout(QWEN_7B, 32)
    to.check()
    with pytest.raises(HeadsError, match=r"query heads \[7, 14, 15, 21, 22, 23\] would read"):
        appended = replace(
            to,
            heads=(*range(28), 0, 1, 2, 3),
            shares=(1.0,) * 28 + (0.0,) * 4,
        )
        appended.check()
    with pytest.raises(HeadsError, match="shares of query head 0 add up to 2, expected 1"):
        replace(to, shares=(1.0,) * 32).check()
    with pytest.raises(HeadsError, match=r"slots \[7\] hold no head but have a share"):
        replace(
            to, heads=to.heads[:7] + (None,) + to.heads[8:], shares=(1.0,) * 8 + to.shares[8:]
        ).check()


def test_the_mlp_is_padded_between_its_first_channels():
    config, _ = random_model(6, 3)
    to = layout(config, intermediate_size=56, intermediate_block=2)
    assert to.intermediate[:6] == (0, 1, None, 2, 3, None) and to.intermediate[-1] == 47
    with pytest.raises(HeadsError, match="intermediate_size 73 must be from 48 to 72"):
        layout(config, intermediate_size=73, intermediate_block=2)


def test_the_targets_config_says_its_head_dim():
    target = extended_config(QWEN_7B, layout(QWEN_7B, 32), arch="llama")
    assert (target.num_attention_heads, target.head_dim) == (32, 128)
    assert target.to_dict()["head_dim"] == 128 and target.model_type == "llama"
    with pytest.raises(HeadsError, match="arch is 'gpt', expected qwen2 or llama"):
        extended_config(QWEN_7B, layout(QWEN_7B, 32), arch="gpt")


def test_the_slot_map_shows_what_every_slot_holds():
    config, _ = random_model(6, 3)
    assert slot_map(layout(config, 9)).splitlines() == [
        "6 query and 3 KV heads of 8 -> 9 and 3; slot j reads KV slot j // 3; recipe ghost",
        "  KV  0 = head 0   q     0     1   [0]",
        "  KV  1 = head 1   q     2     3   [2]",
        "  KV  2 = head 2   q     4     5   [4]",
        "  [h]: copied q rows, nothing in o_proj; [.]: zero or random q rows; "
        "h*x: x of head h's o columns",
    ]
    weighted = slot_map(layout(config, 12, 4, recipe="weighted", alpha=0.7, intermediate_size=50))
    assert "  KV  0 = head 0   q 0*0.7     1 0*0.3" in weighted
    assert "  KV  3 = dead     q   [.]   [.]   [.]" in weighted
    assert weighted.endswith("MLP: 48 channels in 50, zeros between")


def test_a_layout_survives_json():
    config, _ = random_model(6, 3)
    to = layout(config, 12, 4, recipe="weighted", alpha=0.7, seed=3, intermediate_size=50)
    assert Layout.from_dict(json.loads(json.dumps(to.to_dict()))) == to


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"heads": [0, 1, 2]}, "layout.heads"),
        ({"heads": [0, 1, 2, 3, 4, 6, 5, 5, 5]}, "layout.heads holds 6, expected null or 0 to 5"),
        ({"heads": [0, 0, 0, 2, 3, 2, 4, 5, 4]}, "layout.heads has no place for 1"),
        ({"kv": None}, "layout.kv"),
        ({"kv": [0, 1, True]}, "layout.kv holds True"),
        ({"shares": [1.0]}, "layout.shares"),
        ({"shares": ["1"] * 9}, "layout.shares is '1'"),
        ({"shares": [float("nan")] * 9}, "layout.shares is nan"),
        ({"source_heads": 10**30}, "layout.source_heads"),
        ({"source_heads": 10**18}, "layout.heads is"),
        ({"source_kv_heads": 0}, "layout.source_kv_heads"),
        ({"head_dim": 8.0}, "layout.head_dim"),
        ({"recipe": ["ghost"]}, "layout.recipe"),
        ({"seed": "7"}, "layout.seed"),
        ({"intermediate": [0, 1]}, "layout.intermediate"),
        ({"intermediate": "all"}, "layout.intermediate"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_file_that_describes_no_layout_is_refused_in_one_line(changes, said):
    config, _ = random_model(6, 3)
    with pytest.raises(HeadsError) as error:
        Layout.from_dict(layout(config, 9).to_dict() | changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_errors_are_mistakes_told_in_one_line():
    assert issubclass(HeadsError, MinqwenError)
