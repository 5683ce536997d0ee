"""How far two tensors or two models are apart, in units of a faithful implementation's error."""

from __future__ import annotations

import math

import pytest
import torch
from support.heads import IDS, build, embedded_weights, extended, random_model
from support.naive import greedy

from minqwen.heads.layout import layout
from minqwen.lab.compare import (
    POINT_ROUNDING,
    ROUNDING,
    Compared,
    faithful,
    first_difference,
    logit_difference,
    rms,
    same_greedy_text,
)
from minqwen.lab.faults import HEAD_FAULTS
from minqwen.lab.recipes import right_recipes

TRUTH = torch.zeros(4, dtype=torch.float64)


def compared(original: float, candidate: float) -> Compared:
    """A and B that are wrong by so much everywhere."""
    a, b = TRUTH + original, TRUTH + candidate
    return Compared(original=a, candidate=b, faithful=a, truth=TRUTH)


def test_the_originals_own_error_is_one_unit():
    assert compared(1e-6, 1e-6).units == 1
    assert compared(1e-6, 3e-6).units == pytest.approx(3)
    assert compared(2e-3, -1e-3).units == 0.5


def test_an_error_where_a_faithful_implementation_has_none_is_infinite():
    assert compared(0, 0).units == 0
    assert compared(0, 1e-100).units == math.inf


def test_the_verdict_is_bitwise_or_rounding_or_different():
    assert compared(1e-6, 1e-6).verdict == "bitwise"
    assert compared(1e-6, ROUNDING * 0.999e-6).verdict == "equal to rounding"
    assert compared(1e-6, ROUNDING * 1.001e-6).verdict == "different"
    assert compared(1e-6, math.nan).verdict == "different"


def test_the_first_difference_is_the_first_point_beyond_rounding():
    points = [
        ("q", compared(1e-6, 1e-6)),
        ("kv", compared(1e-6, POINT_ROUNDING * 0.999e-6)),
        ("attention", compared(1e-6, 5e-6)),
        ("o", compared(1e-6, 1.0)),
    ]
    assert first_difference(points) == "attention"
    assert first_difference(points[:2]) is None
    assert first_difference([("q", compared(1e-6, math.nan))]) == "q"


def test_where_no_order_matters_any_difference_counts():
    points = [("q", compared(1e-6, 1e-6)), ("kv", compared(1e-6, 1.0000001e-6))]
    assert first_difference(points, order_free=True) == "kv"
    assert first_difference(points, order_free=False) is None


def test_points_after_the_first_difference_are_not_asked_for():
    def points():
        yield "q", compared(1e-6, 1.0)
        raise AssertionError("was asked for the next point")

    assert first_difference(points()) == "q"


def test_differences_of_logits_by_hand():
    ids = torch.tensor([[0, 1, 1]])
    half, quarter = math.log(0.5), math.log(0.25)
    a = torch.tensor([[[half, half], [half, half], [half, half]]], dtype=torch.float64)
    b = a.clone()
    b[0, 1] = torch.tensor([math.log(0.75), quarter])  # of the second token, which 1 follows
    found = logit_difference(a, b, ids)
    assert found.max_abs == pytest.approx(half - quarter)
    assert found.mean_abs == pytest.approx((math.log(1.5) + math.log(2)) / 6)
    assert found.kl == pytest.approx(0.5 * (math.log(0.5 / 0.75) + math.log(0.5 / 0.25)) / 3)
    assert found.top1 == 1.0  # ties go to the first token in both
    assert found.perplexity_ratio == pytest.approx(math.sqrt(0.5 / 0.25))
    same = logit_difference(a, a, ids)
    assert (same.max_abs, same.mean_abs, same.kl) == (0, 0, 0)
    assert same.cosine == pytest.approx(1) and same.perplexity_ratio == 1


def test_greedy_texts_are_compared_token_by_token():
    config, weights = random_model(6, 3)
    a = build(config, weights)
    changed = {**weights, "model.norm.weight": -weights["model.norm.weight"]}
    b = build(config, changed)
    assert same_greedy_text(a, a, IDS, 4)
    assert greedy(a, IDS[0].tolist(), 4) != greedy(b, IDS[0].tolist(), 4)
    assert not same_greedy_text(a, b, IDS, 4)
    assert same_greedy_text(a, b, IDS, 0)  # nothing to disagree about


def test_a_model_in_a_narrow_dtype_is_its_own_faithful_implementation():
    model = build(*random_model(6, 3))
    assert faithful(model) is model


def test_in_float64_the_faithful_implementation_adds_in_another_order():
    config, weights = random_model(28, 4)
    model = build(config, weights, dtype=torch.float64)
    other = faithful(model)
    difference, size = rms(other(IDS) - model(IDS)), rms(model(IDS))
    assert 0 < difference < 1e-13 * size
    for a, b in zip(model.parameters(), other.parameters()):
        assert a.data_ptr() == b.data_ptr()  # no second copy of the weights


def verses(tokenizer) -> list[torch.Tensor]:
    """Three texts [1, T]: a passage, a sum, and ids that mean nothing."""
    text = "And God said, Let there be light: and there was light. And God saw the light."
    texts = [tokenizer.encode(text), tokenizer.encode("What is 12 + 30? It is 42.")]
    return [torch.tensor([ids]) for ids in texts] + [torch.arange(40, 72)[None]]


def test_float64_right_recipes_are_within_rounding_and_wrong_ones_are_not(embedded_tokenizer):
    config, weights = embedded_weights()
    truth = build(config, weights, dtype=torch.float64)
    second = faithful(truth)
    texts = verses(embedded_tokenizer)

    def units(config, weights) -> list[float]:
        b = build(config, weights, dtype=torch.float64)
        found = []
        for ids in texts:
            a = truth(ids)
            found.append(Compared(a, b(ids), second(ids), a).units)
        return found

    recipes = right_recipes(config)
    recipes["weighted 56/4"] = layout(config, 56, recipe="weighted", alpha=0.3)
    recipes["split 64/8"] = layout(config, 64, 8, recipe="split")
    for name, to in recipes.items():
        assert max(units(*extended(config, weights, to))) < ROUNDING, name
    for name, fault in HEAD_FAULTS.items():
        if name != "article":  # which no model can be built of
            assert min(units(*fault.apply(config, weights))) > 1e11, name
