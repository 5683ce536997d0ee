"""The definition of how a token is chosen: transformers' processors are the oracle."""

import math

import numpy as np
import pytest
import torch
from support.sampling import INF, logits_like, random_params
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minqwen.sampling.params import SamplingParams
from minqwen.sampling.warp import draw, uniform, warp


def test_top_k_keeps_the_k_likeliest_and_the_draw_goes_by_their_weights():
    x = warp(torch.tensor([2.0, 0.0, 2.0, 1.0]), SamplingParams(top_k=2))
    assert x.tolist() == [2.0, -INF, 2.0, -INF]
    assert [draw(x, u) for u in (0.0, 0.49, 0.5, 0.99)] == [0, 0, 2, 2]


def test_philox_is_philox():
    """The three known answers published with Random123 (philox4x32-10)."""
    for seed, position, index, w0, w1 in [
        (0, 0, 0, 0x6627E8D5, 0xE169C58D),
        (2**64 - 1, 2**64 - 1, 2**64 - 1, 0x408F276D, 0x41C83B0E),
        (0x299F31D0A4093822, 0x85A308D3243F6A88, 0x0370734413198A2E, 0xD16CFE09, 0x94FDCCEB),
    ]:
        assert uniform(seed, index, position) == ((w0 >> 5) * 2**26 + (w1 >> 6)) / 2**53


@pytest.mark.parametrize(
    "key",
    [lambda i: (i, 0, 0), lambda i: (7, i, 0), lambda i: (7, 3, i)],
    ids=["seed", "sample", "position"],
)
def test_uniform_is_uniform_along_every_coordinate(key):
    u = np.array([uniform(*key(i)) for i in range(10_000)])
    assert len(set(u)) == len(u) and u.min() >= 0 and u.max() < 1
    chi2 = ((np.histogram(u, 100, (0, 1))[0] - 100) ** 2 / 100).sum()
    assert chi2 < 99 + 4 * math.sqrt(2 * 99)
    pairs = np.histogram2d(u[:-1], u[1:], 10, ((0, 1), (0, 1)))[0]  # neighbours are independent
    assert ((pairs - 99.99) ** 2 / 99.99).sum() < 99 + 4 * math.sqrt(2 * 99)


def transformers_warp(x, p):
    """What generate() applies, in its order, on a CPU."""
    x = x[None]
    if p.temperature != 1:
        x = TemperatureLogitsWarper(p.temperature)(None, x)
    if p.top_k > 0:
        x = TopKLogitsWarper(p.top_k)(None, x)
    if p.top_p < 1:
        x = TopPLogitsWarper(p.top_p)(None, x)
    if p.min_p > 0:
        x = MinPLogitsWarper(p.min_p)(None, x)
    return x[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_warp_is_transformers_bit_for_bit(dtype):
    rng = np.random.default_rng(0)
    dropped = swapped = 0
    for _ in range(800):
        p, width = random_params(rng), int(rng.choice([1, 2, 17, 100, 600]))
        x = logits_like(rng, 1, width, dtype, rng.choice([0.3, 3.0]))[0]
        want, got = transformers_warp(x, p), warp(x, p)
        assert torch.equal(got.sort().values, want.sort().values), p
        if not torch.equal(
            got, want
        ):  # torch.sort leaves the order of equals open: one stayed for another
            swapped += 1
            assert p.top_p < 1 and all(
                (x / p.temperature == (x / p.temperature)[i]).sum() > 1
                for i in (got != want).nonzero()
            )
        dropped += int((got == -INF).sum())
    assert dropped > 10_000 and swapped < 8


def test_warp_at_ties_and_exact_thresholds():
    differs = 0
    for n in (2, 3, 4, 5, 10, 64):
        for i in range(1, n + 1):  # i of n equal tokens are exactly top_p: the i lowest ids stay
            got, theirs = (
                f(torch.zeros(n), SamplingParams(top_p=i / n)) for f in (warp, transformers_warp)
            )
            assert torch.equal(got, torch.tensor([0.0] * i + [-INF] * (n - i))), (n, i)
            differs += (
                int((theirs == 0).sum()) != i
            )  # transformers adds float32: one token more or less
            assert abs(int((theirs == 0).sum()) - i) <= 1
    assert differs < 10
    for x in ([1.0, 1, 1, 0, 0], [0.0, 0, 0, 0], [2.0, 1, 1, 1]):
        for k in (1, 2, 3):
            p = SamplingParams(top_k=k)
            assert torch.equal(warp(torch.tensor(x), p), transformers_warp(torch.tensor(x), p))
