"""Exact arithmetic's functions against decimals: exp, root, cosine, sine, rotary tables."""

from __future__ import annotations

import math
import random
import struct
from decimal import Decimal, localcontext

import pytest
import torch
from support.exact import random_model, same

from minqwen.config import RopeScaling
from minqwen.model import Exact, exact, rope


def test_exp_is_within_its_bound_and_the_same_in_any_grouping():
    r = random.Random(0)
    xs = [r.uniform(-1, 1) * 10 ** r.uniform(-8, 2.85) for _ in range(4000)] + [
        math.log(2) * (n + 0.5) for n in range(-900, 900)
    ]
    xs = [x for x in xs if -708 <= x <= 709] + [0.0, -0.0, -708.0, 709.0]
    y = exact.exp(torch.tensor(xs, dtype=torch.float64))
    with localcontext() as context:
        context.prec = 30
        worst = max(abs(Decimal(b) / Decimal(a).exp() - 1) for a, b in zip(xs, y.tolist()))
    assert worst < Decimal("2.3e-16")
    assert exact.exp(torch.zeros(1, dtype=torch.float64)) == 1
    assert exact.snap(
        exact.exp(torch.tensor([-math.inf, -1e9], dtype=torch.float64)), 2.0**-36
    ).tolist() == [0, 0]
    far = torch.tensor([-math.inf, -1e9, -708.5], dtype=torch.float64)
    assert exact.exp(far).tolist() == [0, 0, 0]
    assert exact.exp(torch.tensor([math.nan], dtype=torch.float64)).isnan()
    x = torch.tensor(xs * 20, dtype=torch.float64)
    assert same([exact.exp(x)], [torch.cat([exact.exp(part) for part in x.split(1001)])])
    assert same([exact.exp(x.view(-1, 4).T)], [exact.exp(x).view(-1, 4).T])


def test_sqrt_is_heron_and_quotients_are_correctly_rounded():
    """IEEE 754 defines quotients; torch.sqrt may be MKL's, one in 150 of which is off by a bit."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(20000, generator=g, dtype=torch.float64) * 2.0 ** torch.randint(
        -60, 60, (20000,), generator=g
    )
    assert (1 / x).tolist() == [1 / v for v in x.tolist()]
    assert (x / x.flip(0)).tolist() == [a / b for a, b in zip(x.tolist(), x.flip(0).tolist())]

    def heron(v):  # in Python's floats
        (bits,) = struct.unpack("<q", struct.pack("<d", v))
        (s,) = struct.unpack("<d", struct.pack("<q", (bits >> 1) + (1023 << 51)))
        for _ in range(4):
            s = (v / s + s) * 0.5
        return s

    assert exact.sqrt(x).tolist() == [heron(v) for v in x.tolist()]
    assert all(
        abs(a / math.sqrt(b) - 1) < 3e-16 for a, b in zip(exact.sqrt(x).tolist(), x.tolist())
    )


def test_cosines_and_sines_are_the_nearest_float32():
    g = torch.Generator().manual_seed(0)
    angles = torch.cat(
        [
            torch.rand(20000, generator=g) * 131072,
            torch.arange(131072.0)[::13],
            torch.rand(1000) * 1e-3,
            torch.arange(1, 5000) * (math.pi / 2),
            torch.zeros(1),
            torch.tensor([2.0**20]),
        ]
    )
    for mine, function in zip(exact.cos_sin(angles), (math.cos, math.sin)):
        truth = torch.tensor([function(a) for a in angles.tolist()], dtype=torch.float64)
        ulp = torch.nextafter(mine.abs(), torch.tensor(2.0)) - mine.abs()
        assert ((mine.double() - truth).abs() <= 0.5000001 * ulp.double()).all()


@pytest.mark.parametrize(
    "theta, d, scaling",
    [
        (1e6, 128, None),
        (1e6, 64, None),
        (1e4, 16, None),
        (1e7, 128, None),
        (1e6, 128, RopeScaling(4.0, 32768)),
        (1e6, 64, RopeScaling(2.5, 1024, truncate=False)),
    ],
)
def test_rope_tables_are_native_ones_but_for_the_last_bit(theta, d, scaling):
    config = random_model(head_dim=d, rope_theta=theta, rope_scaling=scaling)[0]
    cos, sin = Exact().rotary_table(config, 300, torch.float32)
    other = rope.rotary_table(config, 300, torch.float32)
    inv_freq, factor = rope.inverse_frequencies(config, torch.float64)
    angle_error = 300 * inv_freq.max() * 2.0**-22  # two float32 roundings of frequency and angle
    assert all((a - b).abs().max() <= angle_error * factor for a, b in zip((cos, sin), other))
    with localcontext() as context:
        context.prec = 40
        for i in range(0, d, 2):
            nearest = torch.tensor(
                float(Decimal(theta) ** (Decimal(i) / d)), dtype=torch.float64
            ).float()
            assert exact.float32(Decimal(theta) ** (Decimal(i) / d)) == nearest.item()
    if scaling is None:
        mine = torch.tensor(
            [exact.float32(Decimal(theta) ** (Decimal(i) / d)) for i in range(0, d, 2)]
        )
        assert int((1 / mine != rope.inverse_frequencies(config)[0]).sum()) <= d // 32
