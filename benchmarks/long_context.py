#!/usr/bin/env python3
"""Peak memory on this CPU beside the planner's estimate, from short to long contexts.

  python benchmarks/long_context.py [--plot docs/long-context.svg] [--json FILE]
      chunked prefill at 8K, 32K and 128K tokens: a few minutes
  python benchmarks/long_context.py --validate
      other shapes, dtypes and batches

`minqwen/lab/peak_memory.py` says what is measured and how.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minqwen.cli import Parser, check_writable, run
from minqwen.lab.figures import new_figure, save
from minqwen.lab.peak_memory import (
    LONG,
    VALIDATION,
    Job,
    Measurement,
    line_through,
    measure,
)

Row = tuple[Job, Measurement]
HEADER = (
    "hidden layers dtype      batch  tokens  step   measured  predicted  differ"
    "  peak in       seconds"
)


def show(job: Job, found: Measurement) -> None:
    print(
        f"{job.config['hidden_size']:6} {job.config['num_hidden_layers']:6} {job.dtype:9}"
        f"{job.prompts:7}{job.length:8}{job.tokens:6}"
        f"{found.measured / 1e6:8.1f} MB{found.predicted / 1e6:8.1f} MB"
        f"{found.predicted / found.measured - 1:+8.1%}  {found.phase:14}{found.seconds:7.1f}",
        flush=True,
    )


def show_lines(rows: list[Row]) -> None:
    show_line("measured", [(job.length, found.measured) for job, found in rows])
    show_line("predicted", [(job.length, found.predicted) for job, found in rows])


def show_line(name: str, points: list[tuple[float, float]]) -> None:
    """Of (tokens, bytes)."""
    slope, at_zero = line_through(points)
    worst = max(abs(y / (at_zero + slope * x) - 1) for x, y in points)
    print(
        f"{name}: {slope:,.0f} bytes per token + {at_zero / 1e6:.1f} MB; "
        f"all points within {worst:.1%} of that"
    )


def draw(figure: Any, rows: list[Row], file: str) -> None:
    axes = figure.subplots()
    lengths = [job.length for job, _ in rows]
    axes.plot(lengths, [found.predicted / 1e6 for _, found in rows], label="planner")
    axes.plot(lengths, [found.measured / 1e6 for _, found in rows], "o", label="measured")
    axes.set(
        xlabel="context, tokens",
        ylabel="peak memory, MB",
        xlim=(0, None),
        ylim=(0, None),
        xticks=[0, *lengths],
    )
    axes.legend()
    save(figure, file)


def write_json(rows: list[Row], file: str) -> None:
    written = [{**asdict(job), **asdict(found)} for job, found in rows]
    Path(file).write_text(json.dumps(written, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--validate", action="store_true", help="other shapes instead of long contexts"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--json", metavar="FILE", help="write what is printed")
    args: argparse.Namespace = parser.parse_args()
    if args.plot:
        check_writable(args.plot, "--plot")
    if args.json:
        check_writable(args.json, "--json")
    return args


def main() -> int:
    args = parse_args()
    figure = new_figure(6.4, 3.6) if args.plot else None
    print(HEADER)
    rows: list[Row] = []
    for job in VALIDATION if args.validate else LONG:
        rows.append((job, measure(job, args.threads)))
        show(*rows[-1])
    if not args.validate:
        show_lines(rows)
    if args.plot:
        draw(figure, rows, args.plot)
    if args.json:
        write_json(rows, args.json)
    return 0


if __name__ == "__main__":
    run(main)
