#!/usr/bin/env python3
"""How fast the engine is here, beside its peers, and what share of the machine's limit that is.

  python tools/bench.py                                             the embedded model
  python tools/bench.py --size 0.5B --layers 6 --threads 1
  python tools/bench.py --size 0.5B --arithmetic native/float32,fast,int8,exact/float32 \\
      --against transformers,llama.cpp/q8_0,vllm --json bench.json --plot bench.svg
  python tools/bench.py --device cuda --size 7B --heads 28,32 --batch 1,32

First the machine's limits are measured: reading memory and multiplying matrices. Then the
contestants, each a process of its own, take turns at every job: a prefill, decode steps, ragged
requests at the same time. The table has medians of wall and processor time; ratio is the first
contestant's time over this one's: above 1 is faster than the first. "of roof" is the least time
that the limits allow over the wall time. A contestant is written NAME/DTYPE, where the dtype may be
left out; NAME/DTYPE/bare is the model without the engine, fast/DTYPE/captured has steps that are
compiled, on a GPU. A peer that is not installed is left out, with what to do; one that lives in
another virtual environment is found by --python.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from minqwen.checkpoint import write_checkpoint  # before torch, for Ctrl-C

# isort: split
import torch

from minqwen.checkpoint.load import check_options
from minqwen.checks import integer
from minqwen.cli import EMBEDDED, Parser, check_writable, run
from minqwen.errors import MinqwenError
from minqwen.files import write_text
from minqwen.lab.bench.contestants import DTYPES, PEERS, Contestant, read_contestant
from minqwen.lab.bench.jobs import KINDS, Job, decode_job
from minqwen.lab.bench.page import Report
from minqwen.lab.bench.roofs import described
from minqwen.lab.bench.setup import Setup
from minqwen.lab.bench.turns import Turns, roofs_of
from minqwen.lab.figures import new_figure
from minqwen.lab.machine import this_machine
from minqwen.lab.shapes import SIZES, random_tensors

ROOF_SECONDS = 20.0
ARTICLE_RANKS = ("4x2", "8")  # on eight devices: two copies of four, or one of eight


# ---- the command line ---------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    who_flags(parser)
    what_flags(parser)
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", metavar="FILE", help="tokens per second as .svg, .png or .pdf")
    args: argparse.Namespace = parser.parse_args()
    if args.model and args.size:
        parser.error("expected --model or --size, not both")
    if args.layers is not None and not args.size:
        parser.error("--layers cuts the shape of --size, which is not given")
    return args


def who_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="DIR", help="a safetensors directory (default: the embedded model)")
    add("--size", choices=SIZES, help="random weights of an official shape instead")
    add("--layers", type=int, metavar="N", help="only so many layers of --size")
    add("--checkpoint", metavar="DIR", help="keep the random weights that peers need there")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    add("--threads", type=int, metavar="N", help="of a CPU (default: PyTorch's number)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    add(
        "--arithmetic",
        default="native,fast",
        metavar="LIST",
        help="ours, of native, fast, int8, exact; the first is the base (default: %(default)s)",
    )
    add("--against", default="", metavar="LIST", help=f"peers, of {', '.join(PEERS)}")
    add(
        "--python",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help="the Python that a peer is installed in",
    )
    add("--heads", metavar="LIST", help="each of ours with these numbers of query heads: 28,32")
    add(
        "--tp",
        metavar="LIST",
        help="each of ours on so many ranks: 8, or 4x2 for two copies on four each (default: 1; "
        f"with --heads on eight GPUs also {' and '.join(ARTICLE_RANKS)})",
    )


def what_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--jobs", default=",".join(KINDS), metavar="LIST", help="default: %(default)s")
    add("--prompt", default="512", metavar="LIST", help="tokens of a prefill (default: 512)")
    add("--context", type=int, default=128, metavar="N", help="tokens before a decode step")
    add("--new", type=int, default=16, metavar="N", help="decode steps of a run (default: 16)")
    add("--batch", default="1,8", metavar="LIST", help="sequences of a decode step (default: 1,8)")
    add("--requests", type=int, default=64, metavar="N", help="of the mixed load (default: 64)")
    add("--rounds", type=int, default=5, metavar="N", help="runs after the first (default: 5)")
    add("--max-num-batched-tokens", type=int, default=2048, metavar="N", help="of a step")
    add(
        "--one-at-a-time",
        action="store_true",
        help="one contestant in memory after the other, not in turns",
    )
    add("--no-roofs", action="store_true", help="do not measure the machine's limits")


def numbers(text: str, flag: str) -> list[int]:
    """Of "1,8"."""
    words = text.split(",")
    if not all(word.isdigit() and int(word) for word in words):
        raise MinqwenError(f"{flag} {text}: expected positive numbers with commas between them")
    return [int(word) for word in words]


def jobs_of(args: argparse.Namespace) -> list[Job]:
    kinds = args.jobs.split(",")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise MinqwenError(f"--jobs {unknown[0]}: expected some of {', '.join(KINDS)}")
    found: list[Job] = []
    if "prefill" in kinds:
        found += [Job("prefill", 1, length, 1) for length in numbers(args.prompt, "--prompt")]
    if "decode" in kinds:
        step_tokens = args.max_num_batched_tokens
        batches = numbers(args.batch, "--batch")
        found += [decode_job(batch, args.context, args.new, step_tokens) for batch in batches]
    if "mixed" in kinds:
        found.append(Job("mixed", args.requests, args.context, 4 * args.new))
    return found


def contestants_of(args: argparse.Namespace, device: str) -> list[Contestant]:
    """Ours, in every number of heads and of ranks; then the peers."""
    ours = [read_contestant(word, args.dtype) for word in args.arithmetic.split(",")]
    peers = [read_contestant(word, args.dtype) for word in args.against.split(",") if word]
    if any(each.engine != "minqwen" for each in ours):
        raise MinqwenError("--arithmetic names a peer: peers go to --against")
    if any(each.engine == "minqwen" for each in peers):
        raise MinqwenError("--against names an arithmetic of ours: those go to --arithmetic")
    heads = numbers(args.heads, "--heads") if args.heads else [None]
    ranks = [read_ranks(word) for word in ranks_asked(args, device)]
    varied = [
        replace(each, heads=count, degree=degree, replicas=replicas)
        for degree, replicas in ranks
        for count in heads
        for each in ours
    ]
    return varied + peers


def ranks_asked(args: argparse.Namespace, device: str) -> list[str]:
    """The words of --tp, or what there are devices for."""
    if args.tp:
        return list(args.tp.split(","))
    if args.heads and device == "cuda" and torch.cuda.device_count() >= 8:
        return ["1", *ARTICLE_RANKS]
    if args.heads:
        count = torch.cuda.device_count()
        print(f"TP 4 x 2 against TP 8 needs eight GPUs and this machine has {count}: left out")
    return ["1"]


def read_ranks(text: str) -> tuple[int, int]:
    """(degree, replicas) of "8" or "4x2"."""
    degree, _, replicas = text.partition("x")
    if not degree.isdigit() or not (replicas or "1").isdigit() or not int(degree):
        raise MinqwenError(f"--tp {text}: expected a number of ranks, or RANKSxCOPIES as 4x2")
    return int(degree), int(replicas or 1)


def pythons_of(args: argparse.Namespace) -> dict[str, str]:
    found = {}
    for text in args.python:
        peer, _, path = text.partition("=")
        if peer not in PEERS or not Path(path).is_file():
            raise MinqwenError(f"--python {text}: expected one of {', '.join(PEERS)}, =, a file")
        found[peer] = path
    return found


# ---- all of it ----------------------------------------------------------------------------------


def setups_of(
    args: argparse.Namespace, who: list[Contestant], jobs: list[Job], device: str, scratch: str
) -> list[Setup]:
    """What each contestant is told. Peers need a checkpoint; then all load that one."""
    model = args.model or (None if args.size else str(EMBEDDED))
    first = Setup(
        contestant=who[0],
        model=model,
        size=args.size,
        layers=args.layers,
        device=device,
        threads=args.threads or torch.get_num_threads(),
        longest=max(job.longest for job in jobs),
        batch=max(job.batch for job in jobs),
        step_tokens=args.max_num_batched_tokens,
    )
    config = first.config()
    if model is None and any(each.engine != "minqwen" for each in who):
        model = args.checkpoint or scratch
        if not (Path(model) / "config.json").exists():
            print(f"writing random weights, {config.weight_bytes() / 1e9:.1f} GB, to {model}")
            write_checkpoint(model, config, random_tensors(config, 0), overwrite=True)
    return [replace(first, contestant=each, model=model) for each in who]


def about(args: argparse.Namespace, setup: Setup) -> dict[str, str]:
    """The machine, the versions and the question."""
    found = this_machine() | {"threads": str(setup.threads), "device": setup.device}
    if setup.device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    layers = f", {args.layers} layers" if args.layers else ""
    found["model"] = f"{args.size}{layers}, random" if args.size else args.model or "embedded"
    order = "one at a time" if args.one_at_a_time else "in turns"
    return found | {"rounds": str(args.rounds), "order": order}


def measure(
    args: argparse.Namespace, setups: list[Setup], jobs: list[Job], pythons: dict[str, str]
) -> Report:
    said = about(args, setups[0])
    print(", ".join(f"{name} {value}" for name, value in said.items()), flush=True)
    roofs = None
    if not args.no_roofs:
        roofs = roofs_of(setups[0].device, setups[0].threads, ROOF_SECONDS)
        print("\n".join(described(roofs)), flush=True)
    with Turns(setups, pythons, lambda text: print(text, flush=True)) as turns:
        act = turns.run_in_sequence if args.one_at_a_time else turns.run_together
        results = act(jobs, args.rounds)
    return Report(setups[0].config(), jobs, results, roofs, said)


def main() -> int:
    args = parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_options(device=device)
    integer("--rounds", args.rounds, 1)
    integer("--requests", args.requests, 1)
    who, jobs, pythons = contestants_of(args, device), jobs_of(args), pythons_of(args)
    for file, flag in ((args.json, "--json"), (args.plot, "--plot")):
        if file is not None:
            check_writable(file, flag)
    if args.plot:
        new_figure(1, 1)  # is matplotlib there?
    with tempfile.TemporaryDirectory() as scratch:
        setups = setups_of(args, who, jobs, device, scratch)
        report = measure(args, setups, jobs, pythons)
    print(report.text())
    if args.json:
        write_text(Path(args.json), json.dumps(report.as_json(), indent=1) + "\n", MinqwenError)
    if args.plot:
        report.plot(args.plot)
    return 0 if report.rows else 1


if __name__ == "__main__":
    run(main)
