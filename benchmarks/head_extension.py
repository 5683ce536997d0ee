#!/usr/bin/env python3
"""What more heads cost: a checkpoint and its extension beside each other, in one process, interleaved.

  python tools/make_checkpoint.py --size 0.5B /tmp/qwen05b && python benchmarks/head_extension.py /tmp/qwen05b

First the count (parameters, bytes, multiply-adds; no run needed), then the clock: each round times the
original and the extension one after the other, in alternating order, and the table gives medians and the
median of the rounds' ratios extended / original (above 1: the extension is slower). Both go through the
engine. Besides the clock on the wall it gives the processor time of this process, which other work on the
machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from tqdm import tqdm

from minqwen import LLM, ModelConfig, Qwen2, SamplingParams
from minqwen.cli import run
from minqwen.heads.layout import RECIPES, extended_config, layout
from minqwen.heads.proposals import attention_macs
from minqwen.heads.tensors import extend_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def clocks() -> tuple[float, float]:
    """Seconds on the wall and of this process's threads, after all work has been done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def timed(llm: LLM, ids: list[list[int]], steps: int) -> tuple[float, float]:
    """(wall, processor) seconds of the prefill of `ids` if steps is 0, else of each decode step after."""
    params = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True)
    start = clocks()
    for row in ids:
        llm.add_request(row, params)
    llm.step()
    if steps:
        start = clocks()
    while llm.has_unfinished_requests:
        llm.step()
    return tuple((b - a) / max(steps, 1) for a, b in zip(start, clocks()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint directory")
    parser.add_argument(
        "--num-attention-heads", type=int, metavar="N", help="default: the next multiple of 16"
    )
    parser.add_argument("--num-key-value-heads", type=int, metavar="N")
    parser.add_argument("--recipe", choices=list(RECIPES), default="ghost")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--prefill", type=int, default=256, metavar="N", help="tokens of the prefill"
    )
    parser.add_argument(
        "--context", type=int, default=256, metavar="N", help="tokens before the decode"
    )
    parser.add_argument("--steps", type=int, default=16, metavar="N", help="decode steps per round")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], metavar="B")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    args = parser.parse_args()

    config = ModelConfig.from_json(args.model)
    wanted = args.num_attention_heads or -(-config.num_attention_heads // 16) * 16
    to = layout(config, wanted, args.num_key_value_heads, recipe=args.recipe)
    target = extended_config(config, to)
    print(
        f"{args.model}: {config.num_attention_heads}/{config.num_key_value_heads} heads and "
        f"{len(to.heads)}/{len(to.kv)}, {args.dtype}, {DEVICE}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    counts = {
        "parameters": [c.num_parameters() for c in (config, target)],
        "bytes of weights": [c.weight_bytes(args.dtype) for c in (config, target)],
        "bytes of cache per token": [c.kv_bytes_per_token(args.dtype) for c in (config, target)],
        f"FLOPs per token at {args.context}": [
            c.flops_per_token(args.context) for c in (config, target)
        ],
        f"attention MACs per layer at {args.context}": [
            attention_macs(c, args.context) for c in (config, target)
        ],
    }
    print(f"{'':32}{'original':>16}{'extended':>16}{'ratio':>8}")
    for name, (a, b) in counts.items():
        print(f"{name:32}{a:16,}{b:16,}{b / a:8.4f}")

    longest = max(args.prefill, args.context + args.steps + 1) + 16
    options = {
        "max_model_len": longest,
        "num_blocks": max(args.batches) * (longest // 16 + 1),
        "max_num_batched_tokens": max(args.prefill, max(args.batches) * args.context),
        "enable_prefix_caching": False,
    }
    original = Qwen2.from_pretrained(args.model, dtype=args.dtype, device=DEVICE)
    weights = (
        original.state_dict()
    )  # what no head touches is shared, so that two models fit where one does
    wide = Qwen2.from_tensors(
        target,
        lambda name, shard: extend_tensor(name, weights[name], to),
        dtype=original.dtype,
        device=DEVICE,
    )
    pair = [LLM(model, **options) for model in (original, wide)]
    jobs = [(f"prefill {args.prefill}", 1, args.prefill, 0)]
    jobs += [(f"decode, batch {b}", b, args.context, args.steps) for b in args.batches]
    print(f"\n{'':32}{'original':>16}{'extended':>16}{'ratio':>8}{'quartiles':>16}")
    for job, batch, length, steps in jobs:
        rounds = []
        for n in tqdm(range(args.rounds + 1), desc=job, leave=False, disable=None):
            ids = torch.randint(0, config.vocab_size, (batch, length)).tolist()
            times = [None, None]
            for i in (0, 1) if n % 2 else (1, 0):
                times[i] = timed(pair[i], ids, steps)
            if n:  # the first warms up
                rounds.append(times)
        for which, clock in enumerate(("wall", "processor")):
            a, b = (statistics.median(r[i][which] for r in rounds) for i in (0, 1))
            low, ratio, high = statistics.quantiles(
                [r[1][which] / r[0][which] for r in rounds], n=4
            )
            print(
                f"{job + ', ' + clock:32}{a * 1e3:13.1f} ms{b * 1e3:13.1f} ms{ratio:8.3f}"
                f"{low:9.3f} - {high:.3f}"
            )
    return 0


if __name__ == "__main__":
    run(main)
