#!/usr/bin/env python3
"""Does this machine compute what every other one does?

python tools/doctor.py                                this CPU, about a minute
python tools/doctor.py --quick                        with fewer numbers
python tools/doctor.py --device cuda                  and this GPU, some 2 minutes
python tools/doctor.py --model DIR --json report.json

One line for each check: ok, or DIFF with how many numbers differ and the first of them. The last
line is the verdict. Exit code 0: every check holds; 1: one does not; 2: a mistake in the command.
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
from minqwen.errors import MinqwenError
from minqwen.files import write_text
from minqwen.lab.device import Outcome, examine_cpu, examine_device
from minqwen.lab.device_checks import LARGE, QUICK, Size
from minqwen.lab.device_model import (
    beside_transformers,
    fingerprints,
    in_any_company,
    on_ranks,
)
from minqwen.lab.machine import described_cpu, package_version
from minqwen.model.emulation import library_settings, refuse_emulation

ROOT = Path(__file__).resolve().parent.parent
FROZEN = ROOT / "tests" / "data" / "fingerprints.json"  # of the embedded model
PACKAGES = ("torch", "transformers", "safetensors", "numpy")


class Report:
    """Prints what is found at once, and keeps it for the JSON file."""

    def __init__(self, file: str | None):
        self.file, self.began = file, time.perf_counter()
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

    def show_all(self, outcomes: Iterable[Outcome]) -> None:
        """One line after the other, as the outcomes come; then the file, as far as we are.

        What raises is told, and the next section begins: a new machine may have several faults.
        """
        try:
            for outcome in outcomes:
                self.show(outcome)
        except MinqwenError:
            raise
        except Exception as error:
            line = f"raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self.show(Outcome("section", "the rest of it", against=["itself"], differences=[line]))
        self.write()

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
    def verdict(self) -> str:
        count = sum(bool(outcome.against) for outcome in self.outcomes)
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
            "holds": not self.failed,
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
    """All sections; each prints as it goes."""
    if device != "cpu":
        report.show_all(examine_device(Size() if quick else LARGE, device))
    report.show_all(examine_cpu(QUICK if quick else Size()))
    report.show_all(fingerprints(model, device, frozen_fingerprints(model)))
    report.show_all(in_any_company(model, device))
    report.show_all(on_ranks(model, ROOT / "tools" / "golden.py"))
    report.show_all(beside_transformers(model, device))


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--model",
        default=str(EMBEDDED),
        metavar="DIR",
        help="a small safetensors directory (default: the embedded model)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer numbers in each check")
    parser.add_argument("--json", metavar="FILE", help="write the report there too")
    args: argparse.Namespace = parser.parse_args()
    return args


def main() -> int:
    args = parse_args()
    check_options(device=args.device)
    if args.json is not None:
        check_writable(args.json, "--json")
    Checkpoint(args.model).check()
    report = Report(args.json)
    report.machine = machine(args.device)
    for name, value in report.machine.items():
        print(f"{name:20} {value}", flush=True)
    if args.device == "cuda":
        refuse_emulation()
    examine(report, Path(args.model), args.device, args.quick)
    print(report.verdict)
    return 1 if report.failed else 0


if __name__ == "__main__":
    run(main)
