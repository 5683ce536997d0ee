#!/usr/bin/env python3
"""Prefill and decode speed beside Hugging Face transformers: same weights and dtype, in one run.

  python tools/make_checkpoint.py --size 0.5B /tmp/qwen05b
  python benchmarks/vs_transformers.py /tmp/qwen05b

Each round times both engines one after the other. The table gives medians and the ratio
transformers / minqwen (above 1: minqwen is faster). minqwen is timed through its engine, with
scheduling, blocks and sampling; transformers through its forward pass with a DynamicCache and an
argmax.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from minqwen import LLM, Qwen2, SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Job(NamedTuple):
    """What is timed: the prefill, or (steps > 0) the decode steps after it."""

    name: str
    num_seqs: int
    length: int  # tokens of each sequence's prefill
    steps: int


class Times(NamedTuple):
    """Seconds of a prefill, and of each decode step after it."""

    prefill: float
    decode: float


def clock() -> float:
    """Seconds, when all work on the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def transformers_run(model: Any, ids: Tensor, steps: int) -> Times:
    """transformers' prefill of ids [B, T] and `steps` greedy decode steps."""
    cache = DynamicCache(config=model.config)
    start = clock()
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    token[0, 0].item()
    prefilled = clock()
    for _ in range(steps):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        token.tolist()  # an engine needs the tokens on the CPU, to see whether a text has ended
    return Times(prefilled - start, (clock() - prefilled) / max(steps, 1))


def minqwen_run(llm: LLM, ids: Tensor, steps: int) -> Times:
    """The engine's step that prefills ids [B, T], and `steps` greedy decode steps."""
    params = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True)
    start = clock()
    for row in ids.tolist():
        llm.add_request(row, params)
    llm.step()
    prefilled = clock()
    while llm.has_unfinished_requests:
        llm.step()
    return Times(prefilled - start, (clock() - prefilled) / max(steps, 1))


def measure(theirs: Any, llm: LLM, job: Job, rounds: int) -> str:
    """One line of the table."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        shape = (job.num_seqs, job.length)
        ids = torch.randint(0, theirs.config.vocab_size, shape, device=DEVICE)
        a, b = transformers_run(theirs, ids, job.steps), minqwen_run(llm, ids, job.steps)
        times.append((a.decode, b.decode) if job.steps else (a.prefill, b.prefill))
    del times[0]  # the first round warms up
    theirs_median = statistics.median(pair[0] for pair in times)
    our_median = statistics.median(pair[1] for pair in times)
    ratio = statistics.median(pair[0] / pair[1] for pair in times)
    tokens = job.num_seqs if job.steps else job.length
    return (
        f"{job.name:20}{theirs_median * 1e3:11.1f} ms{our_median * 1e3:9.1f} ms{ratio:8.2f}"
        f"   {tokens / our_median:.1f}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint directory")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--prefill", type=int, default=512, metavar="N", help="tokens of the prefill"
    )
    parser.add_argument(
        "--context", type=int, default=128, metavar="N", help="tokens before the decode"
    )
    parser.add_argument("--steps", type=int, default=16, metavar="N", help="decode steps per round")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="B")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--attn", default="sdpa", help="transformers' attn_implementation")
    return parser.parse_args()


def new_llm(args: argparse.Namespace) -> LLM:
    """An engine with room for the largest job, whose prefill is always one step."""
    longest = max(args.prefill, args.context + args.steps + 1) + 16
    most_seqs = max(args.batches)
    return LLM(
        Qwen2.from_pretrained(args.model, dtype=args.dtype, device=DEVICE),
        max_model_len=longest,
        num_blocks=most_seqs * (longest // 16 + 1),
        max_num_batched_tokens=max(args.prefill, most_seqs * args.context),
        enable_prefix_caching=False,
    )


def main() -> None:
    args = parse()
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=args.dtype, attn_implementation=args.attn
    )
    theirs = theirs.to(DEVICE).eval()
    llm = new_llm(args)
    jobs = [Job(f"prefill {args.prefill}", 1, args.prefill, 0)]
    jobs += [Job(f"decode, batch {b}", b, args.context, args.steps) for b in args.batches]
    print(
        f"{args.model}, {args.dtype}, {DEVICE}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"{'':20}{'transformers':>14}{'minqwen':>12}{'ratio':>8}   tokens/s")
    for job in jobs:
        print(measure(theirs, llm, job, args.rounds))


if __name__ == "__main__":
    main()
