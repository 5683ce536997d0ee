#!/usr/bin/env python3
"""The cost of exact arithmetic: exact over native float32, the same weights, in one run.

  python tools/make_checkpoint.py --size 0.5B /tmp/qwen05b --num-hidden-layers 6
  python benchmarks/exact_cost.py /tmp/qwen05b

Prefill and decode go through the model over the cache's blocks, without the engine around it. The
two arithmetics take turns, so that a change of the machine's speed meets both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import NamedTuple

import torch

from minqwen import Batch, Qwen2
from minqwen.model import KVCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_SIZE = 16  # tokens


class Job(NamedTuple):
    """What is timed: the prefill, or (steps > 0) the decode steps after it."""

    name: str
    num_seqs: int
    length: int  # tokens of each sequence's prefill
    steps: int


JOBS = [
    Job("prefill 128", 1, 128, 0),
    Job("prefill 512", 1, 512, 0),
    Job("decode, batch 1", 1, 64, 8),
    Job("decode, batch 8", 8, 64, 8),
]


def clock() -> float:
    """Seconds, when all work on the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def seconds(model: Qwen2, job: Job) -> float:
    """Of the job's prefill, or the median of its decode steps."""
    per_seq = -(-(job.length + job.steps) // BLOCK_SIZE)
    cache = model.new_cache(job.num_seqs * per_seq, BLOCK_SIZE)
    blocks = [list(range(i * per_seq, (i + 1) * per_seq)) for i in range(job.num_seqs)]
    prefill = run(model, cache, blocks, job.length, job.length)
    if not job.steps:
        return prefill
    ends = range(job.length + 1, job.length + job.steps + 1)
    return statistics.median(run(model, cache, blocks, 1, end) for end in ends)


def run(model: Qwen2, cache: KVCache, blocks: list[list[int]], count: int, end: int) -> float:
    """Seconds of one step: every sequence brings `count` random tokens, the last of `end`."""
    num_seqs = len(blocks)
    ids = torch.randint(0, model.config.vocab_size, (num_seqs * count,), device=DEVICE)
    batch = Batch.paged(
        [count] * num_seqs,
        [end] * num_seqs,
        blocks,
        BLOCK_SIZE,
        num_logits=[1] * num_seqs,
        device=DEVICE,
    )
    began = clock()
    model(ids, batch, cache)
    return clock() - began


def measure(native: Qwen2, exact: Qwen2, job: Job, rounds: int) -> str:
    """One line of the table: medians in milliseconds, and the median of the ratios."""
    pairs = [(seconds(native, job), seconds(exact, job)) for _ in range(rounds + 1)]
    del pairs[0]  # the first round warms up
    a = statistics.median(pair[0] for pair in pairs) * 1e3
    b = statistics.median(pair[1] for pair in pairs) * 1e3
    ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
    return f"{job.name:20}{a:8.1f} ms{b:8.1f} ms{ratio:16.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint directory")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    args = parser.parse_args()
    native = Qwen2.from_pretrained(args.model, dtype="float32", device=DEVICE, arithmetic="native")
    exact = Qwen2.from_pretrained(args.model, dtype="float32", device=DEVICE, arithmetic="exact")
    print(f"{args.model}, {DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':20}{'native':>11}{'exact':>11}{'exact / native':>16}")
    for job in JOBS:
        print(measure(native, exact, job, args.rounds))


if __name__ == "__main__":
    main()
