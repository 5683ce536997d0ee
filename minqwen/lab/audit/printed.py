"""In how many digits an engine prints its log probabilities: that is rounding too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

MOST_DECIMALS = 7
MOST_DIGITS = 7  # float32 needs up to 9, so no more than 7 were cut off on purpose


@dataclass(frozen=True)
class Printed:
    """what: the precision in words. round: any numbers [n] in it."""

    what: str
    round: Callable[[Tensor], Tensor]


def precision_of(said: Tensor) -> Printed:
    """The coarsest precision that all the numbers [n], float64, have.

    Every number of bfloat16 has few decimals too, and one with few digits may have few decimals.
    """
    for dtype in (torch.bfloat16, torch.float16):
        in_dtype = narrowing(dtype)
        if torch.equal(in_dtype(said), said):
            return Printed(str(dtype).removeprefix("torch."), in_dtype)
    found = [x for x in (by_decimals(said), by_digits(said)) if x is not None]
    if not found:
        return Printed("full precision", lambda x: x)
    return max(found, key=lambda pair: pair[0])[1]


def by_decimals(said: Tensor) -> tuple[float, Printed] | None:
    """The fewest decimals that do, with the mean step between numbers."""
    for decimals in range(MOST_DECIMALS + 1):
        rounded = each(partial(round, ndigits=decimals))
        if torch.equal(rounded(said), said):
            return 10.0**-decimals, Printed(f"{decimals} decimals", rounded)
    return None


def by_digits(said: Tensor) -> tuple[float, Printed] | None:
    """The same with significant digits."""
    for digits in range(1, MOST_DIGITS + 1):
        rounded = each(partial(to_digits, digits=digits))
        if torch.equal(rounded(said), said):
            sizes = said.abs().clamp_min(1e-30).log10().floor()
            return float((10 ** (sizes - digits + 1)).mean()), Printed(f"{digits} digits", rounded)
    return None


def to_digits(x: float, digits: int) -> float:
    return float(f"{x:.{digits}g}")


def each(rounded: Callable[[float], float]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.tensor([rounded(number) for number in x.tolist()], dtype=torch.float64)


def narrowing(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).double()
