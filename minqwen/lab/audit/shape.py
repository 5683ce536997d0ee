"""What an engine reports of its logits: log probabilities as they are, or after the sampler.

Engines report them raw, after a temperature, or renormalised over the tokens that top-k or top-p
keeps. The catalogue has one value of each; here the value is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minqwen.lab.audit.forced import FLOOR, Report, Rows, entries_of, forced, joined
from minqwen.lab.compare import rms
from minqwen.lab.faults.outputs import warped
from minqwen.sampling.params import SamplingParams

Way = tuple[str, str, Report]  # name in the catalogue, words, function

MOST_KEPT = 1024  # the largest top_k that is looked for
STEP = 1.25
COARSE = [0.1 * STEP**i for i in range(21)]  # temperatures from 0.1 to 8.7
STEPS = 8  # each doubles the digits that are right
FAR = 3.0
TOP_P = [i / 100 for i in range(1, 100)]


@dataclass(frozen=True)
class Shape:
    """One way to report. fault: its name in the catalogue.

    what: it in words, with the value that fits best. values [n]: what it makes of the truth.
    report: the way itself.
    """

    fault: str
    what: str
    values: Tensor
    report: Report


def shapes(rows: Sequence[Rows], said: Tensor, spread: Tensor) -> list[Shape]:
    """The best of each kind for what was said [n]."""

    def distance(values: Tensor) -> float:
        # At the edge of top-k and top-p rounding decides whether a token is kept: no single token
        # may decide which value is best.
        return rms(((values - said) / spread).clamp(-FAR, FAR))

    ways = [temperature_of(rows, said), of_top_k(rows, distance), of_top_p(rows, distance)]
    return [Shape(name, what, forced(rows, way).values, way) for name, what, way in ways]


def temperature_of(rows: Sequence[Rows], said: Tensor) -> Way:
    """By least squares: the best of a coarse grid, then Gauss and Newton's steps."""
    inside = said > FLOOR

    def at(temperature: float) -> tuple[Tensor, Tensor]:
        """The log probabilities, and their derivative by the temperature's logarithm."""
        values, slopes = [], []
        for each in rows:
            logprobs = (each.logits.double() / temperature).log_softmax(-1)
            mean = (logprobs.exp() * logprobs).sum(-1, keepdim=True)
            values.append(entries_of(each, logprobs))
            slopes.append(entries_of(each, mean - logprobs))
        return joined(values), joined(slopes)

    def distance(temperature: float) -> float:
        return rms((at(temperature)[0] - said)[inside])

    best = min(COARSE, key=distance) if inside.any() else 1.0
    for _ in range(STEPS):
        values, slope = (x[inside] for x in at(best))
        power = float(slope.pow(2).sum())
        if not power:
            break
        step = float((slope * (said[inside] - values)).sum()) / power
        best *= math.exp(max(-0.2, min(0.2, step)))
    best = min(max(best, COARSE[0]), COARSE[-1])

    def report(logits: Tensor, ids: Tensor) -> Tensor:
        return (logits / best).log_softmax(-1)

    return "logprobs-of-temperature", f"scaled by a temperature of {best:.4g}", report


def of_top_k(rows: Sequence[Rows], distance: Callable[[Tensor], float]) -> Way:
    tables = [Kept(each) for each in rows]
    kept = min(MOST_KEPT, *(each.logits.shape[-1] for each in rows))
    best = min(range(1, kept + 1), key=lambda k: distance(joined([t.top_k(k) for t in tables])))

    def report(logits: Tensor, ids: Tensor) -> Tensor:
        return warped(logits, SamplingParams(temperature=1.0, top_k=best))

    return "logprobs-of-top-k", f"renormalised after top_k={best}", report


def of_top_p(rows: Sequence[Rows], distance: Callable[[Tensor], float]) -> Way:
    tables = [Kept(each) for each in rows]
    best = min(TOP_P, key=lambda p: distance(joined([t.top_p(p) for t in tables])))

    def report(logits: Tensor, ids: Tensor) -> Tensor:
        return warped(logits, SamplingParams(temperature=1.0, top_p=best))

    return "logprobs-of-top-p", f"renormalised after top_p={best:g}", report


class Kept:
    """The most probable tokens at each entry of one record."""

    def __init__(self, rows: Rows):
        logprobs = rows.logits.double().log_softmax(-1)
        self.raw = entries_of(rows, logprobs)  # [n]
        before = [entry.position - 1 for entry in rows.record.entries]
        table = logprobs[before]  # [n, V]
        self.rank = (table > self.raw[:, None]).sum(-1)  # how many tokens are more probable
        count = min(MOST_KEPT, table.shape[-1])
        self.mass = table.topk(count, dim=-1).values.exp().cumsum(-1)  # [n, count]

    def top_k(self, k: int) -> Tensor:
        return self.within(self.rank < k, self.mass[:, k - 1])

    def top_p(self, p: float) -> Tensor:
        """The fewest tokens that have p together are kept; the one that reaches p is among them."""
        last = (self.mass < p).sum(-1).clamp_max(self.mass.shape[-1] - 1)
        return self.within(self.rank <= last, self.mass.gather(-1, last[:, None])[:, 0])

    def within(self, kept: Tensor, mass: Tensor) -> Tensor:
        return torch.where(kept, (self.raw - mass.log()).clamp_max(0), FLOOR)
