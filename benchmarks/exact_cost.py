#!/usr/bin/env python3
"""The cost of exact arithmetic: exact over native float32, the same weights, in one run, interleaved.

  python tools/make_checkpoint.py --size 0.5B /tmp/qwen05b --num-hidden-layers 6
  python benchmarks/exact_cost.py /tmp/qwen05b

Prefill and decode go through the model over the paged cache, without the engine around it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from minqwen import Batch, Qwen2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 16


def clock() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def seconds(model: Qwen2, batch: int, length: int, steps: int) -> float:
    """Of the prefill of `length` tokens (steps 0), or of one decode step of `batch` sequences after it."""
    pages = -(-(length + steps) // PAGE)
    cache = model.new_cache(batch * pages, PAGE)
    tables = torch.arange(batch * pages, device=DEVICE).view(batch, pages)

    def run(start: int, count: int) -> float:
        at = torch.arange(start, start + count, device=DEVICE)
        slots = (tables[:, at // PAGE] * PAGE + at % PAGE).flatten()
        last = torch.arange(1, batch + 1, device=DEVICE) * count - 1
        ids = torch.randint(0, model.config.vocab_size, (batch * count,), device=DEVICE)
        began = clock()
        model(
            ids,
            Batch(
                at.repeat(batch), (count,) * batch, (start + count,) * batch, slots, tables, last
            ),
            cache,
        )
        return clock() - began

    prefill = run(0, length)
    return statistics.median(run(length + i, 1) for i in range(steps)) if steps else prefill


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint directory")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    args = parser.parse_args()
    native, exact = (
        Qwen2.from_pretrained(args.model, dtype="float32", device=DEVICE, arithmetic=a)
        for a in ("native", "exact")
    )
    print(f"{args.model}, {DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':20}{'native':>11}{'exact':>11}{'exact / native':>16}")
    for name, job in {
        "prefill 128": (1, 128, 0),
        "prefill 512": (1, 512, 0),
        "decode, batch 1": (1, 64, 8),
        "decode, batch 8": (8, 64, 8),
    }.items():
        pairs = [(seconds(native, *job), seconds(exact, *job)) for _ in range(args.rounds + 1)][1:]
        a, b = (statistics.median(p[i] for p in pairs) * 1e3 for i in (0, 1))
        print(f"{name:20}{a:8.1f} ms{b:8.1f} ms{statistics.median(y / x for x, y in pairs):16.2f}")


if __name__ == "__main__":
    main()
