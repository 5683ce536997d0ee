"""Whether log probabilities are off by more than rounding, and what explains how they are off.

The errors of log probabilities scatter: those of sure tokens are small, those of unlikely ones
large. So each is divided by its spread (`audit_forced.spreads`) before a root mean square is taken,
in the candidate and in the faithful implementations alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minqwen.lab.compare import ROUNDING, rms

DRAWS = 2000  # bootstrap samples
SEED = 0
INTERVAL = 0.99  # of the bootstrap
CLEAR = 1.2  # the interval's lower end, from which on an error above ROUNDING is not chance
SIGNIFICANT = 5.0  # standard errors of a mistake's share, among some sixty mistakes that are tried
SHARE = (0.6, 1.4)  # of a mistake in the candidate: 0 is none of it, 1 is all of it


@dataclass(frozen=True)
class Units:
    """An error in units of a faithful one, with the interval of the bootstrap."""

    units: float
    low: float
    high: float

    @property
    def too_large(self) -> bool:
        """Whether the error is no rounding."""
        return not (self.units <= ROUNDING or self.low <= CLEAR)


def error_in_units(error: Tensor, unit: Tensor, blocks: Tensor) -> Units:
    """rms(error) / rms(unit). error [n]; unit [F, n], of several faithful implementations.

    blocks [n]: entries whose errors may be alike have one number, and are drawn together.
    """
    tops = block_sums(error.pow(2), blocks)
    bottoms = block_sums(unit.pow(2).mean(0), blocks)
    ratios = (drawn(tops) / drawn(bottoms).clamp_min(1e-300)).sqrt()
    low, high = torch.quantile(
        ratios, torch.tensor([0.5 - INTERVAL / 2, 0.5 + INTERVAL / 2]).double()
    )
    return Units(ratio(rms(error), rms(unit)), float(low), float(high))


def ratio(a: float, b: float) -> float:
    if b:
        return a / b
    return 0.0 if a == 0 else math.inf


def block_sums(x: Tensor, blocks: Tensor) -> Tensor:
    return torch.zeros(int(blocks.max()) + 1, dtype=torch.float64).index_add_(0, blocks, x)


def drawn(sums: Tensor) -> Tensor:
    """The total of as many blocks as there are, drawn with replacement. [DRAWS]"""
    generator = torch.Generator().manual_seed(SEED)
    which = torch.randint(len(sums), (DRAWS, len(sums)), generator=generator)
    return sums[which].sum(-1)


@dataclass(frozen=True)
class Share:
    """How much of a mistake's effect is in the candidate's error, by least squares."""

    share: float
    standard_error: float

    @property
    def significance(self) -> float:
        """How many standard errors the share is above 0."""
        return ratio(self.share, self.standard_error)

    @property
    def significant(self) -> bool:
        low, high = SHARE
        return low < self.share < high and self.significance > SIGNIFICANT


def share_of(effect: Tensor, error: Tensor, blocks: Tensor) -> Share:
    """effect [n]: the mistaken model's numbers less the truth; error [n]: the candidate's less it.

    The standard error is that of blocks of entries, which holds for heavy tails too.
    """
    power = float(effect.pow(2).sum())
    if power == 0:
        return Share(0.0, math.inf)
    share = float((effect * error).sum()) / power
    rest = block_sums(effect * (error - share * effect), blocks)
    return Share(share, float(rest.pow(2).sum().sqrt()) / power)
