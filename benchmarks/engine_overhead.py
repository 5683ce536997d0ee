#!/usr/bin/env python3
"""What a decode step costs besides the forward pass: scheduling, sampling, detokenising, grammar masks.

  python tools/make_checkpoint.py --size 0.5B --vocab-size 152064 --tokenizer QWEN /tmp/qwen05b
  python benchmarks/engine_overhead.py /tmp/qwen05b

QWEN is a directory with Qwen2.5's tokenizer, whose 151,665 tokens the masks are over. Each line: the whole step, the
share of all that is not the forward pass, and the share of the masks (computing them and following the text).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter

import torch

from minqwen import LLM, SamplingParams
from minqwen.sampling.structured import Constraint, StructuredOutputs

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "size": {"type": "number"},
    },
    "required": ["name", "tags", "size"],
}
KINDS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.05},
    "greedy, logprobs": {"temperature": 0, "logprobs": 5},
    "greedy, JSON schema": {"temperature": 0, "structured_outputs": StructuredOutputs(json=SCHEMA)},
}
spent: Counter[str] = Counter()


def timed(name: str, function):
    """`function`, whose time is added to `spent`."""

    def run(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[name] += time.perf_counter() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint directory with a tokenizer")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=32, metavar="B")
    parser.add_argument(
        "--context", type=int, default=64, metavar="N", help="tokens of each prompt"
    )
    parser.add_argument("--steps", type=int, default=10, metavar="N")
    args = parser.parse_args()

    llm = LLM(
        args.model,
        dtype=args.dtype,
        max_num_seqs=args.batch,
        max_model_len=args.context + args.steps + 16,
        max_num_batched_tokens=max(2048, args.batch),
        enable_prefix_caching=False,
        seed=0,
    )
    llm.model.forward = timed("forward", llm.model.forward)
    Constraint.mask, Constraint.accept = (
        timed("masks", Constraint.mask),
        timed("masks", Constraint.accept),
    )
    print(
        f"{args.model}, {args.dtype}, {llm.model.device}, vocabulary {llm.config.vocab_size}, batch {args.batch}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"{'':22}{'step':>11}{'not forward':>14}{'masks':>9}")
    for kind, options in KINDS.items():
        for i in range(args.batch):
            prompt = torch.randint(
                0, 150_000, (args.context + i % 8,), generator=torch.Generator().manual_seed(i)
            )
            llm.add_request(
                prompt.tolist(),
                SamplingParams(max_tokens=args.steps + 2, ignore_eos=True, **options),
            )
        while any(s.computed < s.num_prompt for r in llm.requests.values() for s in r.sequences):
            llm.step()
        steps, shares, masks = [], [], []
        for _ in range(args.steps):
            spent.clear()
            start = time.perf_counter()
            llm.step()
            steps.append(time.perf_counter() - start)
            shares.append(1 - spent["forward"] / steps[-1])
            masks.append(spent["masks"] / steps[-1])
        for request in list(llm.requests):
            llm.abort(request)
        step, share, mask = (statistics.median(x) for x in (steps, shares, masks))
        print(f"{kind:22}{step * 1e3:8.1f} ms{share:13.1%}{mask:9.1%}")


if __name__ == "__main__":
    main()
