#!/usr/bin/env python3
"""What more heads cost: a checkpoint and its extension beside each other, in one process.

  python tools/make_checkpoint.py --size 0.5B /tmp/qwen05b
  python benchmarks/head_extension.py /tmp/qwen05b

First the count (parameters, bytes, multiply-adds; no run is needed), then the clock. Each round
times the original and the extension one after the other, in alternating order. The table gives
medians, and the median of the rounds' ratios extended / original (above 1: the extension is
slower). Both go through the engine. Besides the time on the wall the table gives the processor time
of this process, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from minqwen import LLM, ModelConfig, Qwen2, SamplingParams
from minqwen.cli import Parser, run
from minqwen.heads.layout import RECIPES, Layout, extended_config, layout
from minqwen.heads.proposals import attention_macs
from minqwen.heads.tensors import extend_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 16  # tokens of a block of the engine's cache, its default


class Seconds(NamedTuple):
    wall: float
    processor: float


@dataclass(frozen=True)
class Job:
    """steps: 0 times the prefill; otherwise the decode steps after it are timed."""

    name: str
    batch: int
    length: int  # tokens of each prompt
    steps: int


@dataclass(frozen=True)
class Round:
    original: Seconds
    extended: Seconds


def main() -> int:
    args = parse_args()
    config = ModelConfig.from_json(args.model)
    wanted = args.num_attention_heads or -(-config.num_attention_heads // 16) * 16
    to = layout(config, wanted, args.num_key_value_heads, recipe=args.recipe)
    print(
        f"{args.model}: {config.num_attention_heads}/{config.num_key_value_heads} heads and "
        f"{len(to.heads)}/{len(to.kv)}, {args.dtype}, {DEVICE}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    print_counts(config, extended_config(config, to), args.dtype, args.context)
    original, extended = engines(args, to)
    jobs = [Job(f"prefill {args.prefill}", 1, args.prefill, 0)]
    jobs += [Job(f"decode, batch {b}", b, args.context, args.steps) for b in args.batches]
    print(f"\n{'':32}{'original':>16}{'extended':>16}{'ratio':>8}{'quartiles':>16}")
    for job in jobs:
        rounds = time_rounds(job, args.rounds, original, extended)
        print_times(f"{job.name}, wall", [(r.original.wall, r.extended.wall) for r in rounds])
        print_times(
            f"{job.name}, processor",
            [(r.original.processor, r.extended.processor) for r in rounds],
        )
    return 0


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="a checkpoint directory")
    add("--num-attention-heads", type=int, metavar="N", help="default: the next multiple of 16")
    add("--num-key-value-heads", type=int, metavar="N")
    add("--recipe", choices=list(RECIPES), default="ghost")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--prefill", type=int, default=256, metavar="N", help="tokens of the prefill")
    add("--context", type=int, default=256, metavar="N", help="tokens before the decode")
    add("--steps", type=int, default=16, metavar="N", help="decode steps per round")
    add("--batches", type=int, nargs="+", default=[1], metavar="B")
    add("--rounds", type=int, default=9, metavar="N")
    args: argparse.Namespace = parser.parse_args()
    return args


def print_counts(config: ModelConfig, target: ModelConfig, dtype: str, context: int) -> None:
    both = (config, target)
    counts = {
        "parameters": [c.num_parameters() for c in both],
        "bytes of weights": [c.weight_bytes(dtype) for c in both],
        "bytes of cache per token": [c.kv_bytes_per_token(dtype) for c in both],
        f"FLOPs per token at {context}": [c.flops_per_token(context) for c in both],
        f"attention MACs per layer at {context}": [attention_macs(c, context) for c in both],
    }
    print(f"{'':32}{'original':>16}{'extended':>16}{'ratio':>8}")
    for name, (a, b) in counts.items():
        print(f"{name:32}{a:16,}{b:16,}{b / a:8.4f}")


def engines(args: argparse.Namespace, to: Layout) -> tuple[LLM, LLM]:
    """(original, extended). Weights that no head touches are shared, to save memory."""
    longest = max(args.prefill, args.context + args.steps + 1) + BLOCK
    options: dict[str, Any] = {
        "max_model_len": longest,
        "num_blocks": max(args.batches) * (longest // BLOCK + 1),
        "max_num_batched_tokens": max(args.prefill, max(args.batches) * args.context),
        "enable_prefix_caching": False,
    }
    original = Qwen2.from_pretrained(args.model, dtype=args.dtype, device=DEVICE)
    weights = original.state_dict()
    extended = Qwen2.from_tensors(
        extended_config(original.config, to),
        lambda name, shard: extend_tensor(name, weights[name], to),
        dtype=original.dtype,
        device=DEVICE,
    )
    return LLM(original, **options), LLM(extended, **options)


def time_rounds(job: Job, count: int, original: LLM, extended: LLM) -> list[Round]:
    rounds = []
    for n in tqdm(range(count + 1), desc=job.name, leave=False, disable=None):
        vocabulary = original.model.config.vocab_size
        ids = torch.randint(0, vocabulary, (job.batch, job.length)).tolist()
        if n % 2:
            a = timed(original, ids, job.steps)
            b = timed(extended, ids, job.steps)
        else:
            b = timed(extended, ids, job.steps)
            a = timed(original, ids, job.steps)
        rounds.append(Round(a, b))
    return rounds[1:]  # the first one warms up


def timed(llm: LLM, ids: list[list[int]], steps: int) -> Seconds:
    """Of the prefill of `ids` if steps is 0, else of each decode step after it."""
    params = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True)
    start = clocks()
    for row in ids:
        llm.add_request(row, params)
    llm.step()
    if steps:
        start = clocks()
    while llm.has_unfinished_requests:
        llm.step()
    end, count = clocks(), max(steps, 1)
    return Seconds((end.wall - start.wall) / count, (end.processor - start.processor) / count)


def clocks() -> Seconds:
    """The time on the wall and that of this process's threads, after all work has been done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return Seconds(time.perf_counter(), time.process_time())


def print_times(name: str, times: list[tuple[float, float]]) -> None:
    """times: (original, extended) seconds of each round."""
    a = statistics.median(original for original, _ in times)
    b = statistics.median(extended for _, extended in times)
    ratios = [extended / original for original, extended in times]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    print(
        f"{name:32}{a * 1e3:13.1f} ms{b * 1e3:13.1f} ms{ratio:8.3f}{low:9.3f} - {high:.3f}",
    )


if __name__ == "__main__":
    run(main)
