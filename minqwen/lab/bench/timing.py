"""Times of one run of a job: a mark after every step, and figures of them."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from minqwen.lab.bench.jobs import Job


class Mark(NamedTuple):
    """After a step: seconds since the run began, and what was made until then.

    wall, processor: seconds. tokens: new ones of all requests together. started: requests that have
    their first token.
    """

    wall: float
    processor: float
    tokens: int
    started: int


@dataclass
class Run:
    """One run of one job. tokens: the new ids of each request, in the requests' order."""

    marks: list[Mark]
    tokens: list[list[int]] = field(default_factory=list)

    def seconds(self, job: Job, clock: str = "wall") -> float:
        """What the job is judged by, on "wall" or "processor" time."""
        if job.kind == "mixed":
            return float(getattr(self.marks[-1], clock))
        if job.kind == "prefill":
            return self._first_of_all(clock)
        return self._step(job, clock)

    def first_token(self, share: float) -> float:
        """Seconds after which that share of the requests had their first token, 0 to 1."""
        most = self.marks[-1].started
        return next(mark.wall for mark in self.marks if mark.started >= share * most)

    def _first_of_all(self, clock: str) -> float:
        most = self.marks[-1].started
        return next(float(getattr(mark, clock)) for mark in self.marks if mark.started == most)

    def _step(self, job: Job, clock: str) -> float:
        """The median step in which every request got one token; the mean where none is seen."""
        times = [
            getattr(after, clock) - getattr(before, clock)
            for before, after in zip(self.marks, self.marks[1:])
            if before.started == job.batch == after.tokens - before.tokens
        ]
        if times:
            return float(statistics.median(times))
        after_first = float(getattr(self.marks[-1], clock)) - self._first_of_all(clock)
        return after_first / max(1, job.new - 1)


class Stopwatch:
    """Marks the steps of a run. device: whose work must be done before a mark."""

    def __init__(self, device: str, processor: Callable[[], float] | None = None):
        self.device, self.processor = device, processor or family_seconds
        self.marks: list[Mark] = []
        self.wall_0, self.processor_0 = self._now()

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), self.processor()

    def mark(self, tokens: int, started: int) -> None:
        """After a step that has made `tokens` new tokens in all so far."""
        wall, processor = self._now()
        self.marks.append(Mark(wall - self.wall_0, processor - self.processor_0, tokens, started))


def family_seconds() -> float:
    """Processor seconds of this process, and of its children that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


@dataclass(frozen=True)
class Spread:
    """A median, and the middle half of what it is the median of."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 2:
            return cls(*[statistics.median(values)] * 3)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)
