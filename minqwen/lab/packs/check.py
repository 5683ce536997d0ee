"""Computes a golden pack again and says where the numbers are still those of the pack.

Exact runs must agree in every bit, anywhere. Native and float64 runs must agree in every bit on a
machine with the same processor, torch and number of threads. On another one each point may differ
by rounding, which is measured as in compare.py: the error against float64 of what is computed here,
in units of the pack's own error, or the other way round, whichever is more; so what is wrong in the
pack is found too. Of the float64 run itself the unit is how far two faithful float64
implementations are apart on this machine.

The threshold is 2 units (`POINT_ROUNDING`) for logits too, because another processor's kernels add
up in other widths. A pack of the embedded model by the libraries' oldest code (no vector
instructions, no fused multiply-add) came to 0.94 units in float64, 1.47 in native float32 and 1.02
in native bfloat16 beside AVX-512, and to the same bits in exact arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minqwen.lab.compare import POINT_ROUNDING, Compared, ReversedSums, Verdict, rms
from minqwen.lab.machine import same_bits_expected, this_machine
from minqwen.lab.packs.pack import LOGITS, TOP_IDS, TOP_VALUES, Pack, described
from minqwen.lab.packs.runs import TRUTH, Run, Tensors, compute, find_run
from minqwen.lab.packs.writer import row_digests

Read = Callable[[int, str], Tensor]  # (number of the prompt, point) -> tensor
Apart = Callable[[Tensor, Tensor, Tensor], float]  # (pack, here, reference) -> units


@dataclass(frozen=True)
class Point:
    """One point of a run, over all prompts. units: 0 where every bit is the same."""

    name: str
    verdict: Verdict
    units: float


@dataclass(frozen=True)
class RunCheck:
    """A run, computed again. same_bits: whether any other bit is a difference."""

    run: str
    same_bits: bool
    points: list[Point]

    def having(self, verdict: Verdict) -> list[Point]:
        return [point for point in self.points if point.verdict == verdict]

    @property
    def good(self) -> bool:
        return not self.having("different")


class Checker:
    """Computes the runs of a pack again.

    model_dir: where the pack's model is; its files must be those that the pack names. streamed:
    read the model layer by layer; None: as the pack was made. Raises PackError.
    """

    def __init__(
        self, pack: Pack, model_dir: str | Path | None = None, streamed: bool | None = None
    ):
        self.pack = pack
        self.model_dir = pack.check_model(model_dir)
        self.streamed = pack.streamed if streamed is None else streamed
        self.same_machine = same_bits_expected(pack.machine, this_machine())

    def check(self, name: str) -> RunCheck:
        """A run of the pack, point by point."""
        run = find_run(name)
        same_bits = run.exact or self.same_machine
        other = self._other_bits(run)
        units = self._units(run, other)
        kept = self.pack.recorded[name, 0].tensors
        points = [
            Point(point, verdict_of(units.get(point), same_bits), units.get(point, 0.0))
            for point in kept
            if point != TOP_IDS
        ]
        return RunCheck(name, same_bits, points)

    def _other_bits(self, run: Run) -> dict[str, dict[int, Tensor]]:
        """{point: {prompt: what is computed here}} where that is not, bit for bit, the pack's."""
        other: dict[str, dict[int, Tensor]] = {}
        for n, tensors in enumerate(self._compute(run, {*self.pack.names, LOGITS})):
            recorded = self.pack.recorded[run.name, n]
            here = self._as_kept(n, tensors)
            kept = recorded.tensors.items()
            wrong = {name for name, entry in kept if entry != described(here[name])}
            if row_digests(tensors[LOGITS]) != recorded.rows:
                wrong.add(LOGITS if self.pack.full_logits else TOP_VALUES)
            for name in wrong:
                other.setdefault(name, {})[n] = here[name]
        return other

    def _units(self, run: Run, other: dict[str, dict[int, Tensor]]) -> dict[str, float]:
        """How far each of these points is from the pack, in units of rounding."""
        if not other:
            return {}
        stored = partial(self.pack.read, run.name)
        apart: Apart = units_of_native
        if run.name == TRUTH:
            apart = units_of_truth
            reference = self._computed(Run("reversed", "float64", ReversedSums()), set(other))
        elif TRUTH in self.pack.runs:
            reference = partial(self.pack.read, TRUTH)
        else:
            reference = self._computed(find_run(TRUTH), set(other))
        found = {}
        for name, differing in other.items():
            prompts = range(len(self.pack.prompts))
            packed = [stored(n, name) for n in prompts]
            here = [differing.get(n, packed[n]) for n in prompts]
            pooled = in_one_row(packed, here, [reference(n, name) for n in prompts])
            found[name] = math.inf if pooled is None else apart(*pooled)
        return found

    def _computed(self, run: Run, names: set[str]) -> Read:
        """A run that is not in the pack, of these points only."""
        points = {LOGITS if name == TOP_VALUES else name for name in names} | {LOGITS}
        found = [self._as_kept(n, x) for n, x in enumerate(self._compute(run, points))]
        return lambda n, name: found[n][name]

    def _compute(self, run: Run, names: set[str]) -> list[Tensors]:
        prompts = [prompt.ids for prompt in self.pack.prompts]
        return list(compute(self.model_dir, run, prompts, names, self.streamed))

    def _as_kept(self, prompt: int, tensors: Tensors) -> Tensors:
        """The tensors as the pack has them: with the logits of as many tokens."""
        if self.pack.full_logits:
            return tensors
        ids, _ = self.pack.top(self.pack.runs[0], prompt)
        return tensors | {TOP_IDS: ids, TOP_VALUES: tensors[LOGITS].gather(-1, ids)}


def verdict_of(units: float | None, same_bits: bool) -> Verdict:
    """units: None where every bit is the same."""
    if units is None:
        return "bitwise"
    return "equal to rounding" if units <= POINT_ROUNDING and not same_bits else "different"


def units_of_native(pack: Tensor, here: Tensor, truth: Tensor) -> float:
    """The larger of two errors against the truth, in units of the other; NaN if one is NaN."""
    forth = Compared(pack, here, pack, truth).units
    back = Compared(here, pack, here, truth).units
    return math.nan if math.isnan(forth + back) else max(forth, back)


def units_of_truth(pack: Tensor, here: Tensor, reversed_sums: Tensor) -> float:
    """How far the pack's float64 is from this machine's.

    The unit is the difference between two orders of adding up. It is at least half a unit in the
    last place: no implementation rounds by less, and the first norm has no linear layer before it.
    """
    unit = max(rms(reversed_sums - here), 2.0**-53 * rms(here))
    difference = rms(pack - here)
    if unit:
        return difference / unit
    return 0.0 if difference == 0 else math.inf


def in_one_row(*columns: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Of several computations the numbers of all prompts, in float64; None if shapes differ.

    A prompt of one token alone would have too few numbers to judge by. Scores that are hidden
    (-inf) in the first two computations are left out.
    """
    rows: list[list[Tensor]] = [[] for _ in columns]
    for prompt in zip(*columns, strict=True):
        if len({x.shape for x in prompt}) > 1:
            return None
        shown = ~(prompt[0].isneginf() & prompt[1].isneginf())
        for row, x in zip(rows, prompt):
            row.append(x[shown].double())
    return tuple(torch.cat(row) for row in rows)
