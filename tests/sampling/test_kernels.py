"""The kernels that draw for many rows at once, against the definition and exact distributions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.sampling import INF, by_hand, logits_like, make_row

from minqwen.sampling.draw import sample
from minqwen.sampling.kernels import draw_many, pick
from minqwen.sampling.logprobs import NATIVE
from minqwen.sampling.params import SamplingParams
from minqwen.sampling.warp import draw, warp


def test_draw_many_is_draw_of_warp_for_each_row():
    x = torch.tensor([[2.0, 0.0, 2.0, 1.0]] * 3)
    params = [SamplingParams(top_k=2), SamplingParams(top_k=2), SamplingParams(temperature=0.5)]
    u = [0.49, 0.5, 0.99]
    assert draw_many(x, params, u, NATIVE) == [0, 2, 3]
    assert [draw(warp(row, p), v) for row, p, v in zip(x, params, u)] == [0, 2, 3]


@pytest.mark.parametrize(
    "params",
    [
        dict(),
        dict(temperature=0.6, top_k=12),
        dict(top_p=0.8),
        dict(min_p=0.1),
        dict(temperature=1.5, top_k=30, top_p=0.9, min_p=0.02),
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(params):
    """Chi-square over 10,000 draws: five samples of each of 40 requests at 50 positions."""
    rng = np.random.default_rng(3)
    x, p = logits_like(rng, 1, 40, scale=1.5), SamplingParams(**params)
    counts = np.zeros(40)
    for position in range(50):
        ids = [0] * position  # without penalties only their number matters
        rows = [make_row(p, (), ids, seed=i // 5, index=i % 5) for i in range(200)]
        for token in sample(x.expand(200, -1), rows)[0]:
            counts[token] += 1
    expected = warp(x[0], p).double().softmax(-1).numpy() * counts.sum()
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    degrees = kept.sum() - 1
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < degrees + 4 * math.sqrt(
        2 * degrees
    ) + 4


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_the_ends_of_the_interval_never_draw_what_is_impossible(u):
    rng = np.random.default_rng(6)
    for width in (1, 130, 1000, 5000):
        x = logits_like(rng, 60, width, scale=5.0)
        x[:, rng.random(width) < 0.9] = -INF
        x[:, int(rng.integers(width))] = 0.0
        for params in (
            dict(),
            dict(top_k=3),
            dict(top_p=0.5),
            dict(min_p=0.3),
            dict(temperature=1e-5),
        ):
            p = SamplingParams(**params)
            tokens = draw_many(x, [p] * 60, [u] * 60, NATIVE)
            for row, token in zip(x, tokens):
                assert 0 <= token < width and warp(row, p)[token] > -INF
                assert token == draw(warp(row, p), u)


def test_top_p_at_exact_thresholds_keeps_what_the_definition_keeps():
    """i of n equal tokens have exactly top_p: the highest u draws the last of those that stay."""
    for n in (2, 3, 4, 5, 10, 64, 200):
        params = [SamplingParams(top_p=i / n) for i in range(1, n + 1)]
        x, u = torch.zeros(n, n), 1 - 2.0**-53
        assert draw_many(x, params, [u] * n, NATIVE) == [draw(warp(x[0], p), u) for p in params]
        assert draw_many(x, params, [u] * n, NATIVE) == list(range(n))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, 5e-324, 1e-300, 1e-17, 0.1, 1 / 3, 1.0, 1e9]), min_size=1, max_size=30
    ),
    st.integers(0, 2**53),
)
@example([0.0, 1.0, 0.0], 2**53)
def test_pick_is_the_first_above_and_never_a_zero(weights, n):
    if not any(weights):
        return
    w = torch.tensor([weights], dtype=torch.float64)
    target = n * 2.0**-53 * float(np.cumsum(weights)[-1])
    i, rest = pick(w, torch.tensor([[target]], dtype=torch.float64))
    i, sums = int(i), [0.0, *np.cumsum(weights).tolist()]
    assert weights[i] > 0 and rest >= 0 and sums[i] <= target
    assert sums[i + 1] > target or sums[i + 1] == sums[-1]


def test_equals_that_outnumber_the_candidates_all_count():
    """500 tie with the tenth: top_k keeps all, and top_p must know their sum before it cuts."""
    x = torch.zeros(40, 2000)
    x[:, 100:600], x[:, 700:705] = 1.0, 2.0
    for fields in (
        dict(top_k=10),
        dict(top_k=10, top_p=0.5),
        dict(top_k=10, top_p=0.02),
        dict(top_p=1e-9),
    ):
        rows = [make_row(SamplingParams(**fields), seed=seed) for seed in range(40)]
        assert sample(x, rows)[0] == [by_hand(a, row) for a, row in zip(x, rows)]


def topk_calls(x, row):
    """How often torch selects the largest of something while one row is sampled."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sample(x, [row])
    return sum(event.count for event in profile.key_averages() if event.key == "aten::topk")


def test_a_mask_that_leaves_few_tokens_needs_one_look():
    """That all else is -inf is known from the first candidates: no wider search follows."""
    x, mask = torch.randn(1, 5000), torch.zeros(5000, dtype=torch.bool)
    mask[[3, 4999]] = True
    one_look = topk_calls(x, make_row(SamplingParams(top_k=1)))
    assert topk_calls(x * 0.01, make_row(SamplingParams(top_p=0.9))) > one_look
    for fields in (dict(top_k=20), dict(top_k=20, top_p=0.9), dict(top_p=0.9), dict(min_p=0.1)):
        row = make_row(SamplingParams(**fields), seed=1, mask=mask)
        assert sample(x, [row])[0] == [by_hand(x[0], row)]
        assert topk_calls(x, row) == one_look


def test_ten_thousand_near_equal_tokens_need_every_candidate():
    """top_p far beyond the first candidates: the search widens until the cut is among them."""
    rng = np.random.default_rng(8)
    x = torch.from_numpy(rng.normal(0, 0.01, (3, 10_000))).float()
    rows = [
        make_row(SamplingParams(top_p=p, top_k=k)) for p, k in ((0.97, 0), (0.5, 3000), (1, 9000))
    ]
    assert sample(x, rows)[0] == [by_hand(a, row) for a, row in zip(x, rows)]
