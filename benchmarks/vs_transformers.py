#!/usr/bin/env python3
"""Prefill and decode speed beside Hugging Face transformers: the same weights and dtype, in one run, interleaved.

  python tools/make_checkpoint.py --size 0.5B /tmp/qwen05b && python benchmarks/vs_transformers.py /tmp/qwen05b

Each round times both engines one after the other; the table gives medians and the ratio transformers / minqwen
(above 1: minqwen is faster). minqwen is timed through its engine, scheduling, paging and sampling included;
transformers through its forward pass with a DynamicCache and an argmax.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from minqwen import LLM, Qwen2, SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def clock() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def transformers_run(model, ids: torch.Tensor, steps: int) -> tuple[float, float]:
    """Seconds of the prefill of ids [B, T], and of each decode step after it."""
    cache = DynamicCache(config=model.config)
    start = clock()
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    token[0, 0].item()
    prefilled = clock()
    for _ in range(steps):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        token.tolist()
    return prefilled - start, (clock() - prefilled) / max(steps, 1)


def minqwen_run(llm: LLM, ids: torch.Tensor, steps: int) -> tuple[float, float]:
    params = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True)
    start = clock()
    for row in ids.tolist():
        llm.add_request(row, params)
    llm.step()
    prefilled = clock()
    while llm.has_unfinished_requests:
        llm.step()
    return prefilled - start, (clock() - prefilled) / max(steps, 1)


def main() -> None:
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
    args = parser.parse_args()

    theirs = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=args.dtype, attn_implementation=args.attn
    )
    theirs = theirs.to(DEVICE).eval()
    longest = max(args.prefill, args.context + args.steps + 1) + 16
    ours = Qwen2.from_pretrained(args.model, dtype=args.dtype, device=DEVICE)
    llm = LLM(
        ours,
        max_model_len=longest,
        num_blocks=max(args.batches) * (longest // 16 + 1),
        max_num_batched_tokens=max(args.prefill, max(args.batches) * args.context),
        enable_prefix_caching=False,
    )
    jobs = [(f"prefill {args.prefill}", 1, args.prefill, 0)]
    jobs += [(f"decode, batch {b}", b, args.context, args.steps) for b in args.batches]
    print(
        f"{args.model}, {args.dtype}, {DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(f"{'':20}{'transformers':>14}{'minqwen':>12}{'ratio':>8}   tokens/s")
    for name, batch, length, steps in jobs:
        times: list[tuple[float, float]] = []
        for round_number in range(args.rounds + 1):
            ids = torch.randint(0, theirs.config.vocab_size, (batch, length), device=DEVICE)
            pair = transformers_run(theirs, ids, steps), minqwen_run(llm, ids, steps)
            if round_number:  # the first warms up
                times.append(tuple(t[1 if steps else 0] for t in pair))
        a, b = (statistics.median(t[i] for t in times) for i in (0, 1))
        ratio = statistics.median(x / y for x, y in times)
        print(
            f"{name:20}{a * 1e3:11.1f} ms{b * 1e3:9.1f} ms{ratio:8.2f}   {(batch if steps else length) / b:.1f}"
        )


if __name__ == "__main__":
    main()
