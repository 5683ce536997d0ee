#!/usr/bin/env python3
"""Does this machine compute what every other one does, and how fast is it?

python tools/doctor.py                                this CPU, one to two minutes
python tools/doctor.py --quick                        with fewer numbers, without speeds
python tools/doctor.py --device cuda --size 7B        this GPU, and speeds of a full shape
python tools/doctor.py --model DIR --json report.json

Checks of what is true come first: ok, or DIFF with how many numbers differ and the first of them.
Notes follow: the machine's limits, prefill and decode against them, and memory beside the planner's
estimate. A section that has no time left in --seconds is skipped, and says so. The last line is the
verdict. Exit code 0: every check ran and holds; 1: one does not; 2: a mistake in the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Iterable
from pathlib import Path

from minqwen.checkpoint import Checkpoint  # before torch, for Ctrl-C

# isort: split
import torch

from minqwen.checkpoint.load import check_options
from minqwen.cli import EMBEDDED, Parser, check_writable, run
from minqwen.errors import MinqwenError, kind_and_words
from minqwen.files import write_text
from minqwen.lab.bench.roofs import Roofs
from minqwen.lab.device import Outcome, examine_cpu, examine_device
from minqwen.lab.device_checks import LARGE, QUICK, Size
from minqwen.lab.device_model import (
    beside_transformers,
    fingerprints,
    in_any_company,
    on_ranks,
)
from minqwen.lab.device_speed import (
    CPU_JOBS,
    FULL_JOBS,
    SMALL_JOBS,
    memory_on_cpu,
    on_gpus,
    roofs_of,
    setup_for,
    speeds,
)
from minqwen.lab.machine import described_cpu, package_version
from minqwen.lab.shapes import SIZES
from minqwen.model.emulation import library_settings, refuse_emulation

ROOT = Path(__file__).resolve().parent.parent
FROZEN = ROOT / "tests" / "data" / "fingerprints.json"  # of the embedded model
PACKAGES = ("torch", "transformers", "safetensors", "numpy")


class Report:
    """Prints what is found at once, and keeps it for the JSON file."""

    def __init__(self, file: str | None, limit: float):
        self.file, self.began, self.limit = file, time.perf_counter(), limit
        self.cut: list[str] = []  # sections of checks that did not end in time
        self.machine: dict[str, str] = {}
        self.outcomes: list[Outcome] = []

    def show(self, outcome: Outcome) -> None:
        """One line; where something differs, one more for each difference."""
        self.outcomes.append(outcome)
        state = "ok  " if outcome.holds else "DIFF"
        if not outcome.against:
            state = "note"
        what = f"{outcome.family}: {outcome.name}"
        against = ", ".join(outcome.against)
        print(
            f"{self.seconds:6.1f}s {state} {what:72} {against} {outcome.note}".rstrip(), flush=True
        )
        for sentence in outcome.differences:
            print(f"             {sentence}", flush=True)

    def show_all(self, name: str, outcomes: Iterable[Outcome], is_truth: bool = True) -> None:
        """One line after the other, as the outcomes come; then the file, as far as we are.

        What raises is told, and the next section begins: a new machine may have several faults.
        When the time is over, the rest of the section is skipped.
        """
        waiting = iter(outcomes)
        try:
            while self.left > 0:
                outcome = next(waiting, None)
                if outcome is None:
                    break
                self.show(outcome)
            else:
                self.skip(name, is_truth)
        except MinqwenError:
            raise
        except Exception as error:
            line = f"raises {kind_and_words(error)}"
            self.show(Outcome("section", "the rest of it", against=["itself"], differences=[line]))
        self.write()

    def skip(self, name: str, is_truth: bool) -> None:
        """Say that a section, or its rest, was not run."""
        note = f"skipped: the {self.limit:.0f} s of --seconds are over"
        self.show(Outcome("section", name, note=note))
        if is_truth:
            self.cut.append(name)

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit - self.seconds

    @property
    def digests(self) -> dict[str, str]:
        """The fingerprints by dtype."""
        return {each.name: each.note for each in self.outcomes if each.family == "fingerprint"}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.holds]

    @property
    def holds(self) -> bool:
        """Whether every check of what is true ran and holds."""
        return not self.failed and not self.cut

    @property
    def verdict(self) -> str:
        count = sum(bool(outcome.against) for outcome in self.outcomes)
        if self.cut and not self.failed:
            return f"not all checks ran in time: {', '.join(self.cut)}; give more --seconds"
        if not self.failed:
            return f"all {count} checks hold: exact arithmetic gives its one answer here"
        families = sorted({outcome.family for outcome in self.failed})
        return f"{len(self.failed)} of {count} checks do not hold: {', '.join(families)}"

    def write(self) -> None:
        if self.file is None:
            return
        content = {
            "machine": self.machine,
            "fingerprints": self.digests,
            "checks": [dataclasses.asdict(outcome) for outcome in self.outcomes],
            "verdict": self.verdict,
            "holds": self.holds,
            "seconds": round(self.seconds, 1),
        }
        write_text(Path(self.file), json.dumps(content, indent=1) + "\n", MinqwenError)


def machine(device: str) -> dict[str, str]:
    """What may decide what is computed: versions, processors, settings."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        found[package] = package_version(package)
    found["cpu"] = described_cpu()
    found["threads"] = str(torch.get_num_threads())
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
        found |= product_settings()
    return found | library_settings()


def product_settings() -> dict[str, str]:
    """PyTorch's own switches for products on a GPU; those of float64 there are none."""
    switches = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation")
    return {f"matmul.{name}": str(getattr(switches, name)) for name in names}


def frozen_fingerprints(model: Path) -> dict[str, str]:
    """Those of the embedded model, if that is what is examined and the file is there."""
    if model.resolve() != EMBEDDED.resolve() or not FROZEN.exists():
        return {}
    found: dict[str, str] = json.loads(FROZEN.read_text())
    return found


def examine(report: Report, model: Path, device: str, quick: bool) -> None:
    """All sections of what is true; each prints as it goes."""
    if device != "cpu":
        report.show_all("this GPU", examine_device(Size() if quick else LARGE, device))
    report.show_all("this CPU", examine_cpu(QUICK if quick else Size()))
    report.show_all("fingerprints", fingerprints(model, device, frozen_fingerprints(model)))
    report.show_all("company", in_any_company(model, device))
    for each in dict.fromkeys(("cpu", device)):
        seconds = max(1.0, report.left)
        report.show_all(f"ranks, {each}", on_ranks(model, each, seconds=seconds))
    report.show_all("transformers", beside_transformers(model, device))


def examine_speed(report: Report, model: Path, device: str, size: str | None) -> None:
    """The sections of notes: how fast, and how large."""
    roofs, jobs = Roofs(), SMALL_JOBS

    def show(name: str, outcomes: Iterable[Outcome]) -> None:
        report.show_all(name, outcomes, is_truth=False)

    show("roofs", roofs_of(device, 10.0, roofs))
    setup = setup_for(str(model), None, device, jobs)
    show("speed", speeds(setup, ["native", "fast", "exact"], jobs, roofs))
    if size is not None:
        jobs = FULL_JOBS if device == "cuda" else CPU_JOBS
        setup = setup_for(None, size, device, jobs)
        show(f"speed of {size}", speeds(setup, ["native", "fast"], jobs, roofs))
    if device == "cpu":
        show("memory", memory_on_cpu())
    else:
        show("several GPUs", on_gpus(setup, jobs, roofs))


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--model",
        default=str(EMBEDDED),
        metavar="DIR",
        help="a small safetensors directory (default: the embedded model)",
    )
    parser.add_argument(
        "--size", choices=SIZES, help="speeds of this shape too, with random weights"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer numbers in each check, and no speeds"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=180.0,
        metavar="N",
        help="begin nothing after this time (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there too")
    args: argparse.Namespace = parser.parse_args()
    return args


def main() -> int:
    args = parse_args()
    check_options(device=args.device)
    if args.json is not None:
        check_writable(args.json, "--json")
    Checkpoint(args.model).check()
    report = Report(args.json, args.seconds)
    report.machine = machine(args.device)
    for name, value in report.machine.items():
        print(f"{name:20} {value}", flush=True)
    if args.device == "cuda":
        refuse_emulation()
    examine(report, Path(args.model), args.device, args.quick)
    if not args.quick or args.size:
        examine_speed(report, Path(args.model), args.device, args.size)
    print(report.verdict)
    return 0 if report.holds else 1


if __name__ == "__main__":
    run(main)
