#!/usr/bin/env python3
"""Where the time of a step goes: matrix products, attention, softmax, norms, scheduling, ...

  python tools/profiler.py                                     the embedded model
  python tools/profiler.py --size 0.5B --layers 6 --arithmetic native --prompt 512 --batch 8
  python tools/profiler.py --device cuda --size 7B --trace trace.json

A prefill and decode steps run through the engine under torch.profiler. Every operation's own time
is in one category, so they add up to the step; the table says how nearly. --trace writes the decode
steps for chrome://tracing or ui.perfetto.dev. Only native arithmetic has a softmax that can be
seen: fast attention is one operation. (Not "profile.py": Python has a module of that name,
which cProfile, and so PyTorch, would then find here.)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from minqwen.checkpoint.load import check_options  # before torch, for Ctrl-C

# isort: split
import torch

from minqwen.cli import EMBEDDED, Parser, check_writable, run
from minqwen.errors import MinqwenError
from minqwen.files import write_text
from minqwen.lab.bench.contestants import DTYPES, Contestant
from minqwen.lab.bench.jobs import Job, decode_job
from minqwen.lab.bench.ours import Scheduled, load_model
from minqwen.lab.bench.setup import Setup
from minqwen.lab.machine import this_machine
from minqwen.lab.profiling import Profile, profile_job
from minqwen.lab.shapes import SIZES
from minqwen.model import ARITHMETICS
from minqwen.parallel import Mesh


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="DIR", help="a safetensors directory (default: the embedded model)")
    add("--size", choices=SIZES, help="random weights of an official shape instead")
    add("--layers", type=int, metavar="N", help="only so many layers of --size")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of a CPU")
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    add("--arithmetic", choices=list(ARITHMETICS), default="fast", help="default: %(default)s")
    add("--prompt", type=int, default=512, metavar="N", help="tokens of the prefill")
    add("--context", type=int, default=128, metavar="N", help="tokens before the decode steps")
    add("--batch", type=int, default=1, metavar="N", help="sequences of a decode step")
    add("--new", type=int, default=16, metavar="N", help="decode steps")
    add("--trace", metavar="FILE", help="write the decode steps there as a Chrome trace")
    add("--json", metavar="FILE", help="write the figures there")
    args: argparse.Namespace = parser.parse_args()
    if args.model and args.size:
        parser.error("expected --model or --size, not both")
    for name in ("threads", "prompt", "context", "batch", "new"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    return args


def profiles(args: argparse.Namespace, device: str) -> list[Profile]:
    """Of the prefill and of the decode steps; each is printed."""
    step_tokens = max(2048, args.prompt)
    jobs = [Job("prefill", 1, args.prompt, 1)]
    jobs.append(decode_job(args.batch, args.context, args.new, step_tokens))
    setup = Setup(
        contestant=Contestant("minqwen", args.dtype, args.arithmetic),
        model=args.model or (None if args.size else str(EMBEDDED)),
        size=args.size,
        layers=args.layers,
        device=device,
        threads=args.threads,
        longest=max(job.longest for job in jobs),
        batch=args.batch,
        step_tokens=step_tokens,
    )
    torch.set_num_threads(args.threads)
    llm = Scheduled(load_model(setup, Mesh()), setup).llm
    found = []
    for job in jobs:
        found.append(profile_job(llm, job, args.trace if job.kind == "decode" else None))
        print("\n".join(found[-1].lines()), flush=True)
    return found


def main() -> int:
    args = parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_options(device=device)
    for file, flag in ((args.json, "--json"), (args.trace, "--trace")):
        if file is not None:
            check_writable(file, flag)
    about = this_machine() | {
        "threads": str(args.threads),
        "device": device,
        "arithmetic": args.arithmetic,
        "dtype": args.dtype,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    found = profiles(args, device)
    if args.json:
        content = {"about": about, "profiles": [each.as_json() for each in found]}
        write_text(Path(args.json), json.dumps(content, indent=1) + "\n", MinqwenError)
    return 0


if __name__ == "__main__":
    run(main)
