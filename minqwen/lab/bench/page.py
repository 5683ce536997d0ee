"""The results as a table, as JSON, and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minqwen.config import ModelConfig
from minqwen.lab.bench.jobs import Job
from minqwen.lab.bench.roofs import Roofs, least_seconds
from minqwen.lab.bench.setup import with_heads
from minqwen.lab.bench.timing import Run, Spread
from minqwen.lab.bench.turns import Result
from minqwen.lab.figures import new_figure, save
from minqwen.lab.planner import GB

HEADER = (
    f"{'':36}{'wall':>11}{'middle half':>19}{'ratio':>7}{'processor':>12}{'ratio':>7}"
    f"{'tokens/s':>10}{'of roof':>9}{'first':>10}{'peak':>9}  same text"
)


@dataclass(frozen=True)
class Row:
    """What one contestant reached in one job. Seconds are those of `Run.seconds`.

    ratio: the base's time over this one's, the median of the rounds: above 1 is faster than the
    base. rate: tokens per second: of the prompt at a prefill, else new ones. share: of the roof.
    first, last_first: seconds after which half, and 95 %, of the requests had their first token.
    same: new tokens that equal the base's, up to the first that differs, and how many there are.
    """

    contestant: str
    job: str
    wall: Spread
    processor: Spread
    ratio: float
    processor_ratio: float
    rate: float
    share: float | None
    first: float
    last_first: float
    peak_bytes: int
    same: tuple[int, int]

    def line(self) -> str:
        share = f"{self.share:9.0%}" if self.share is not None else f"{'':9}"
        half = f"{self.wall.low * 1e3:,.1f}-{self.wall.high * 1e3:,.1f}"
        return (
            f"  {self.contestant:34}{self.wall.median * 1e3:8,.1f} ms{half:>19}{self.ratio:7.2f}"
            f"{self.processor.median * 1e3:9,.1f} ms{self.processor_ratio:7.2f}"
            f"{self.rate:10,.1f}{share}{self.first * 1e3:7,.0f} ms{self.peak_bytes / GB:6.2f} GB"
            f"  {self.same[0]} of {self.same[1]}"
        )


@dataclass(frozen=True)
class Report:
    """All that was measured. The first contestant that ran is the base of the ratios."""

    config: ModelConfig
    jobs: list[Job]
    results: list[Result]
    roofs: Roofs | None
    about: Mapping[str, str]

    @property
    def rows(self) -> list[Row]:
        return [row for job in self.jobs for row in self.rows_of(job)]

    def rows_of(self, job: Job) -> list[Row]:
        ran = [result for result in self.results if result.runs.get(job.name)]
        return [self._row(job, result, ran[0]) for result in ran]

    def _row(self, job: Job, result: Result, base: Result) -> Row:
        runs, of_base = result.runs[job.name], base.runs[job.name]
        wall = Spread.of([run.seconds(job) for run in runs])
        config = with_heads(self.config, result.contestant.heads)
        least = self.roofs and least_seconds(self.roofs, result.contestant, config, job)
        return Row(
            contestant=result.contestant.name,
            job=job.name,
            wall=wall,
            processor=Spread.of([run.seconds(job, "processor") for run in runs]),
            ratio=_ratio(job, runs, of_base, "wall"),
            processor_ratio=_ratio(job, runs, of_base, "processor"),
            rate=_tokens(job) / wall.median,
            share=least / wall.median if least else None,
            first=Spread.of([run.first_token(0.5) for run in runs]).median,
            last_first=Spread.of([run.first_token(0.95) for run in runs]).median,
            peak_bytes=result.peaks[job.name],
            same=_same_tokens(runs[0], of_base[0]),
        )

    def text(self) -> str:
        """The tables, and below them who did not take part."""
        lines = [HEADER]
        for job in self.jobs:
            lines += [job.name, *(row.line() for row in self.rows_of(job))]
        for result in self.results:
            if result.error:
                lines.append(f"left out: {result.contestant.name}: {result.error}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "about": dict(self.about),
            "shape": self.config.to_dict(),
            "roofs": self.roofs.as_json() if self.roofs else None,
            "jobs": [{"name": job.name, **asdict(job)} for job in self.jobs],
            "contestants": [
                {
                    "name": result.contestant.name,
                    **result.contestant.as_json(),
                    "version": result.version,
                    "load_seconds": result.load_seconds,
                    "error": result.error,
                }
                for result in self.results
            ],
            "rows": [asdict(row) for row in self.rows],
        }

    def plot(self, file: str) -> None:
        """Tokens per second of every contestant, a panel for each job."""
        jobs = [job for job in self.jobs if self.rows_of(job)]
        figure = new_figure(3.2 * max(1, len(jobs)), 0.35 * len(self.results) + 1.6)
        panels = figure.subplots(1, max(1, len(jobs)), sharey=True, squeeze=False)[0]
        for panel, job in zip(panels, jobs):
            rows = self.rows_of(job)[::-1]
            panel.barh(
                [row.contestant for row in rows], [row.rate for row in rows], color="#4477aa"
            )
            panel.set_title(job.name, fontsize=10)
            panel.set_xlabel("tokens/s")
        save(figure, file)


def _ratio(job: Job, runs: list[Run], of_base: list[Run], clock: str) -> float:
    """The median over the rounds of the base's time over this one's; 0 where no time was seen."""
    pairs = [(a.seconds(job, clock), b.seconds(job, clock)) for a, b in zip(of_base, runs)]
    ratios = [a / b for a, b in pairs if b]
    return Spread.of(ratios).median if ratios else 0.0


def _tokens(job: Job) -> int:
    """That the job's seconds are spent on."""
    if job.kind == "prefill":
        return job.batch * job.prompt
    if job.kind == "decode":
        return job.batch
    return sum(new for _, new in job.lengths())


def _same_tokens(run: Run, base: Run) -> tuple[int, int]:
    same = 0
    for own, other in zip(run.tokens, base.tokens):
        for a, b in zip(own, other):
            if a != b:
                break
            same += 1
    return same, sum(map(len, base.tokens))
