"""Under exact arithmetic logprobs and tokens follow from the logits alike on every machine."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from support.paths import ROOT
from support.sampling import INF, logits_like, make_row

from minqwen.model import Exact, Native
from minqwen.sampling.draw import sample
from minqwen.sampling.params import SamplingParams

ALL_STEPS = [
    dict(),
    dict(temperature=0.6, top_k=12),
    dict(top_p=0.8),
    dict(min_p=0.01),
    dict(temperature=1.7, top_k=300, top_p=0.9, min_p=0.0001),
]


def test_log_softmax_of_two_equal_logits():
    assert Exact().log_softmax(torch.zeros(1, 2)).tolist() == [[-math.log(2)] * 2]


def true_logprobs(row: list[float]) -> list[float]:
    with localcontext() as context:
        context.prec = 40
        exact = [Decimal(x) for x in row]
        total = sum((x - max(exact)).exp() for x in exact).ln()
        return [float(x - max(exact) - total) for x in exact]


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0, 60.0])
def test_log_softmax_is_true_to_the_last_bits_of_float64(scale):
    x = torch.randn(3, 700, generator=torch.Generator().manual_seed(0)) * scale
    truth = torch.tensor([true_logprobs(row) for row in x.double().tolist()], dtype=torch.float64)
    assert ((Exact().log_softmax(x) - truth).abs() <= 4e-16 * truth.abs().clamp_min(1.0)).all()


def test_what_is_impossible_stays_so_and_is_never_drawn():
    x = torch.tensor([[0.0, -INF, 3.0, -1e30]])
    assert Exact().log_softmax(x)[0, 1] == -INF
    assert Exact().log_softmax(x.double()).isnan().sum() == 0
    for fields in ALL_STEPS:
        rows = [make_row(SamplingParams(**fields), seed=i) for i in range(200)]
        assert set(sample(x.expand(200, -1), rows, Exact())[0]) <= {0, 2}
    nothing = torch.full((1, 300), -INF)
    assert sample(nothing, [make_row(SamplingParams())], Exact())[0] == [-1]
    assert Exact().log_softmax(torch.tensor([[1.0, math.nan, INF]])).isnan().all()


@pytest.mark.parametrize("ops, equal", [(Exact(), True), (Native(), False)])
def test_sums_over_the_vocabulary_have_no_order(ops, equal):
    rng = np.random.default_rng(0)
    x = logits_like(rng, 8, 5000, scale=3.0)
    order = torch.from_numpy(rng.permutation(5000))
    assert torch.equal(ops.log_softmax(x)[:, order], ops.log_softmax(x[:, order])) is equal
    w = (x.double() - x.amax(-1, keepdim=True)).exp()
    assert torch.equal(ops.total(w), ops.total(w[:, order])) is equal


def test_the_longest_sums_stay_in_their_budgets():
    """As many equal terms as there may be, just above 1/2 of a unit: all low parts are largest."""
    n = 1 << 18
    x = torch.full((1, n), 1 - 2.0**-36 + 2.0**-50, dtype=torch.float64)
    high = 1.0  # 2^35 units: a tie would go there too
    assert Exact().total(x).item() == n * high + n * (x[0, 0].item() - high)
    with pytest.raises(Exception, match="262145"):
        Exact().total(torch.ones(1, n + 1, dtype=torch.float64))


@pytest.mark.parametrize("fields", ALL_STEPS, ids=str)
def test_tokens_are_those_of_native_arithmetic(fields):
    """But for those whose random number falls within a rounding of a border: none of these do."""
    x = logits_like(np.random.default_rng(1), 300, 3000, scale=2.0)
    rows = [make_row(SamplingParams(**fields), seed=i) for i in range(300)]
    assert sample(x, rows, Exact())[0] == sample(x, rows)[0]


def test_one_row_does_not_depend_on_the_others():
    x = logits_like(np.random.default_rng(2), 40, 3000, scale=2.0)
    params = [SamplingParams(**ALL_STEPS[i % len(ALL_STEPS)], logprobs=3) for i in range(40)]
    rows = [make_row(p, seed=i) for i, p in enumerate(params)]
    tokens, logprobs = sample(x, rows, Exact())
    for i, row in enumerate(rows):
        assert sample(x[i : i + 1], [row], Exact()) == ([tokens[i]], [logprobs[i]])


CHILD = """
import hashlib, torch
from minqwen.model import Exact, Native
from minqwen.sampling.draw import Row, sample
from minqwen.sampling.params import SamplingParams
steps = {steps}
torch.set_num_threads({threads})
x = (torch.arange(60 * 4001, dtype=torch.float64) * 0.6180339887498949 % 1 * 9).float().view(60, -1)
for ops in (Exact(), Native()):
    rows = [
        Row(
            params=SamplingParams(**steps[i % len(steps)], logprobs=8),
            ids=[0], num_prompt=1, seed=i,
        )
        for i in range(60)
    ]
    tokens, entries = sample(x, rows, ops)
    found = [[(i, e.logprob.hex(), e.rank) for i, e in entry.items()] for entry in entries]
    sums = ops.total(ops.exp(x.double() - 9).view(60, -1)).tolist()
    print(hashlib.sha256(repr((tokens, found, [s.hex() for s in sums])).encode()).hexdigest())
"""


def test_the_same_with_other_instructions_and_threads():
    """Three processes: vector instructions, none, two threads. Native is the control."""
    settings = [({}, 1), ({"ATEN_CPU_CAPABILITY": "default"}, 1), ({}, 2)]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD.format(steps=ALL_STEPS, threads=threads)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **setting},
        )
        for setting, threads in settings
    ]
    exact, native = zip(*(run.communicate(timeout=300)[0].split() for run in runs))
    assert len(set(exact)) == 1
    assert len(set(native)) > 1
