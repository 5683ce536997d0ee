"""Numbers at which arithmetic goes wrong, with the same bits on every machine.

They are drawn as integers and multiplied by powers of two. `torch.randn` would not do: its numbers
depend on the instruction set.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from minqwen.lab.golden import BITS

PERIOD = (1 << 22) - 3  # numbers of `bell` that are drawn, after which they repeat: a prime


class Numbers:
    """A source of numbers. seed: any text; one text always gives the same numbers."""

    def __init__(self, seed: str):
        self.generator = torch.Generator("cpu").manual_seed(zlib.crc32(seed.encode()))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 from `low` to `high` - 1; any int64 has at most 2^32 different values."""
        return torch.randint(low, high, shape, generator=self.generator, device="cpu")

    def bits(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Any bits at all: NaN, infinity and subnormal numbers are among them."""
        low = self.integers(0, 1 << 32, *shape)
        if dtype.itemsize == 8:
            low = (self.integers(0, 1 << 32, *shape) << 32) + low
        return low.to(BITS[dtype.itemsize]).view(dtype)

    def finite(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Any bits of a finite number; 1 in place of the others."""
        x = self.bits(dtype, *shape)
        return x.where(x.isfinite(), torch.ones((), dtype=dtype))

    def spread(self, low: int, high: int, *shape: int) -> Tensor:
        """float64 of both signs between 2^low and 2^high in size, all exponents alike."""
        mantissa = (self.integers(0, 1 << 26, *shape) << 26) + self.integers(0, 1 << 26, *shape)
        exponent = self.integers(low + 1023, high + 1023, *shape) << 52
        sign = self.integers(0, 2, *shape).double().mul_(2).sub_(1)
        return sign * (mantissa + exponent).view(torch.float64)

    def bell(self, *shape: int) -> Tensor:
        """float32, about normal with variance 1: sums of four integers."""
        size = math.prod(shape)
        drawn = self.integers(-(1 << 19), 1 << 19, 4, min(size, PERIOD)).sum(0) * 7
        numbers = drawn.float() * 2.0**-22
        return numbers.repeat(-(-size // max(1, len(numbers))))[:size].view(shape)

    def ties(self, dtype: torch.dtype, wide: torch.dtype, count: int) -> Tensor:
        """Numbers in `wide` half way between two neighbours in `dtype`, or up to 3 ulps beside."""
        here = self.finite(dtype, count)
        number = BITS[dtype.itemsize]
        after = (here.view(number) + 1).view(dtype)
        before = (here.view(number) - 1).view(dtype)
        step = torch.where(
            after.isfinite(), after.double() - here.double(), here.double() - before.double()
        )
        step = step.where(step.isfinite(), torch.zeros_like(step))
        tie = (here.double() + step / 2).to(wide).view(BITS[wide.itemsize])
        return (tie + self.integers(-3, 4, count).to(tie.dtype)).view(wide)


def specials(dtype: torch.dtype) -> Tensor:
    """Zeros, the smallest and the largest numbers, infinities, NaN."""
    info = torch.finfo(dtype)
    some = [0.0, 1.0, info.tiny, info.smallest_normal, info.max, info.eps, math.inf]
    numbers = torch.tensor([s * x for x in some for s in (1, -1)] + [math.nan], dtype=dtype)
    smallest = torch.ones(1, dtype=BITS[dtype.itemsize]).view(dtype)  # subnormal
    return torch.cat((numbers, smallest, -smallest))


def full_budget(numbers: Numbers, rows: int, n: int, bits: int) -> Tensor:
    """float64 [rows, n]: integers, all positive, with a 2-norm just below 2^bits.

    The product of two such rows is a sum just below 2^(bits + bits'): 2^53 where the two take a
    whole budget. Most of the sums are odd, so that one lost bit shows.
    """
    largest = math.isqrt((1 << 2 * bits) // n)
    return (largest - numbers.integers(0, 4, rows, n)).double()


def spiked(numbers: Numbers, rows: int, n: int, bits: int) -> Tensor:
    """The same with one number of each row that takes all `bits`, and smaller ones beside it."""
    x = (full_budget(numbers, rows, n, bits) * 0.375).floor()
    spike = (1 << bits) * 7 // 8 + 1 + 2 * numbers.integers(0, 1 << 16, rows, 1)
    return x.scatter(1, numbers.integers(0, n, rows, 1), spike.double())
