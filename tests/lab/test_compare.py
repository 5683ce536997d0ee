"""How far two tensors or two models are apart, in units of a faithful implementation's error."""

from __future__ import annotations

import dataclasses
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
    measure,
    measure_logits,
    pooled,
    recompute,
    rms,
    same_greedy_text,
    ulp,
)
from minqwen.lab.faults import HEAD_FAULTS
from minqwen.lab.recipes import right_recipes
from minqwen.model.trace import point_names

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


def test_the_tail_of_kl_and_the_five_likeliest_tokens_by_hand():
    a = torch.zeros(1, 3, 8, dtype=torch.float64)
    a[..., :5] = torch.arange(5, 0, -1)  # 0 to 4 are the likeliest
    b = a.clone()
    b[0, 2, 7] = 9.0
    found = logit_difference(a, b, torch.tensor([[0, 1, 2]]))
    only = (a[0, 2].softmax(-1) * (a[0, 2].log_softmax(-1) - b[0, 2].log_softmax(-1))).sum()
    assert found.kl == pytest.approx(float(only) / 3)
    assert found.kl_max == found.kl_p99 == pytest.approx(float(only))
    assert found.top1 == pytest.approx(2 / 3)
    assert found.top5 == pytest.approx((5 + 5 + 4) / 15)
    a[0, 0, 6] = -math.inf  # a token that cannot be drawn adds nothing
    assert logit_difference(a, a, torch.tensor([[0, 1, 2]])).kl == 0


# ---- one tensor ----------------------------------------------------------------------------------


def test_a_measure_by_hand():
    truth = torch.tensor([[3.0, 0.0], [4.0, 100.0]], dtype=torch.float64)
    faithful = truth + torch.tensor([[1e-3, -1e-3], [1e-3, 1e-3]], dtype=torch.float64)
    candidate = truth.clone()
    candidate[1, 1] += 0.008
    found = measure(candidate, faithful, truth)
    assert found.units == pytest.approx(4)
    assert found.at == (1, 1) and found.max_abs == pytest.approx(0.008) and found.count == 4
    assert found.relative_l2 == pytest.approx(0.008 / math.sqrt(9 + 16 + 10000))
    assert 1 - 1e-8 < found.cosine <= 1
    assert found.ulps == pytest.approx(0.008 / 2.0**-46)  # between 64 and 128


def test_an_error_in_units_in_the_last_place_is_of_the_candidates_dtype():
    truth = torch.tensor([1.5, -3.0], dtype=torch.float64)
    for dtype, step in ((torch.float32, 2.0**-22), (torch.bfloat16, 2.0**-6)):
        candidate = (truth + torch.tensor([0.0, 2 * step], dtype=torch.float64)).to(dtype)
        assert measure(candidate, truth, truth).ulps == 2
    assert ulp(0.0, torch.float32) == 2.0**-149
    assert ulp(2.0, torch.bfloat16) == 2.0**-6 and ulp(1.99, torch.bfloat16) == 2.0**-7


def test_what_was_handed_over_in_a_narrower_dtype_is_measured_in_that_dtype():
    """Bits that were cut off on the way are no error of what was computed."""
    truth = torch.linspace(1, 2, 1000, dtype=torch.float64)
    faithful = (truth + 1e-7).float()
    assert measure(faithful.bfloat16(), faithful, truth).units == 1
    assert measure(faithful.bfloat16().float(), faithful, truth).units > 1000
    wider = truth.bfloat16()
    assert measure(wider.float(), wider, truth).units == 1


def test_hidden_scores_are_left_out_and_other_infinities_count():
    inf = math.inf
    truth = torch.tensor([[1.0, -inf], [1.0, 1.0]], dtype=torch.float64)
    faithful = truth + 1e-6
    found = measure(truth + 2e-6, faithful, truth)
    assert found.units == pytest.approx(2) and found.count == 3
    for wrong in (-inf, inf, math.nan):
        candidate = truth.clone()
        candidate[1, 0] = wrong
        found = measure(candidate, faithful, truth)
        assert (found.units, found.max_abs, found.at) == (inf, inf, (1, 0)), wrong
    seen = truth.clone()
    seen[0, 1] = 3.0  # a token that must not be seen
    assert measure(seen, faithful, truth).units == inf
    seen[0, 1] = inf
    assert measure(seen, faithful, truth).units == inf


def test_what_nobody_has_a_number_for_is_left_out():
    nan = torch.full((3,), math.nan, dtype=torch.float64)
    found = measure(nan, nan, nan)
    assert (found.units, found.count) == (0, 0)
    truth = torch.tensor([1.0, 1e6], dtype=torch.float64)
    overflown = torch.tensor([1.001, math.inf], dtype=torch.float64)
    assert measure(overflown, overflown, truth).units == 1
    assert Compared(nan, nan, nan, nan).verdict == "different"


def test_several_tensors_are_measured_as_if_they_were_one():
    g = torch.Generator().manual_seed(0)
    truth, faithful, candidate = (torch.randn(50, generator=g) for _ in range(3))
    whole = measure(candidate, faithful, truth).units
    parts = [slice(0, 7), slice(7, 50)]
    found = [measure(candidate[p], faithful[p], truth[p]) for p in parts]
    assert pooled(found) == pytest.approx(whole)
    assert pooled([dataclasses.replace(found[0], error=0.0, unit=0.0)]) == 0


def test_logits_have_a_measure_and_what_it_means_for_the_next_token():
    ids = torch.tensor([0, 1, 1])
    truth = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
    found = measure_logits((truth + 3e-6).float(), (truth + 1e-6).float(), truth, ids)
    assert found.measure.units == pytest.approx(3, rel=0.1)
    assert found.difference.top1 == 1 and found.difference.kl < 1e-9
    flat = measure_logits(torch.zeros(3, 8), truth.float(), truth, ids)
    assert flat.difference.kl > 0.1 and flat.measure.units > 1e5


# ---- inherited and added -------------------------------------------------------------------------


def traced(model) -> dict[str, torch.Tensor]:
    return {name: x[0] for name, x in model.run_with_cache(IDS)[1].items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_models_own_values_are_recomputed_bit_for_bit(dtype):
    model = build(*random_model(6, 3), dtype=dtype)
    seen = traced(model)
    again = recompute(model, IDS[0], seen)
    assert list(again) == point_names(2)
    assert all(torch.equal(again[name], x) for name, x in seen.items())
    assert recompute(model, IDS[0], {}) == {}


def test_what_a_point_inherits_is_not_in_what_it_adds():
    config, weights = random_model(6, 3)
    native, truth = build(config, weights), build(config, weights, dtype=torch.float64)
    wrong = HEAD_FAULTS["no-split"].model(config, weights)  # o_proj's output is wrong
    names = ["layers.0.resid_post", "layers.1.attn.out", "layers.1.mlp.out", "logits"]
    seen = {name: x for name, x in traced(wrong).items() if name in names}
    a, t = (recompute(model, IDS[0], seen) for model in (native, truth))
    right = {name: x.double() for name, x in traced(truth).items()}
    added = [measure(seen[name], a[name], t[name]).units for name in names]
    whole = [measure(seen[name], traced(native)[name], right[name]).units for name in names]
    assert min(whole) > 1000
    # The first layer adds an error, and so does each attn.out. An MLP inherits it.
    assert added[0] > 1000 and added[1] > 1000
    assert max(added[2:]) < POINT_ROUNDING


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
