#!/usr/bin/env python3
"""What a decode step costs besides the forward pass: scheduling, sampling, text, grammar masks.

  python tools/make_checkpoint.py --size 0.5B --vocab-size 152064 --tokenizer QWEN /tmp/qwen05b
  python benchmarks/engine_overhead.py /tmp/qwen05b

QWEN is a directory with Qwen2.5's tokenizer, whose 151,665 tokens the masks are over. Each line has
the time of the whole step, the share of all that is not the forward pass, and the share of the
masks (computing them, and following the text).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from minqwen import LLM, SamplingParams
from minqwen.cli import Parser, run
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
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.05},
    "greedy, logprobs": {"temperature": 0, "logprobs": 5},
    "greedy, JSON schema": {"temperature": 0, "structured_outputs": StructuredOutputs(json=SCHEMA)},
}


class Stopwatch:
    """Adds up the time that is spent in functions."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run_timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                now = time.perf_counter()
                self.spent[name] = self.spent.get(name, 0.0) + now - start

        return run_timed


def measure(llm: LLM, watch: Stopwatch, options: dict[str, Any], batch: int, args: Any) -> None:
    """Print one line: the median step of `batch` requests that are all decoding."""
    params = SamplingParams(max_tokens=args.steps + 2, ignore_eos=True, **options)
    for i in range(batch):
        generator = torch.Generator().manual_seed(i)
        length = args.context + i % 8
        llm.add_request(torch.randint(0, 150_000, (length,), generator=generator), params)
    completions = [c for request in llm.core.requests.values() for c in request.completions]
    while any(c.computed < c.num_prompt for c in completions):
        llm.step()
    steps, shares, masks = [], [], []
    for _ in range(args.steps):
        watch.spent.clear()
        start = time.perf_counter()
        llm.step()
        steps.append(time.perf_counter() - start)
        shares.append(1 - watch.spent.get("forward", 0.0) / steps[-1])
        masks.append(watch.spent.get("masks", 0.0) / steps[-1])
    for request_id in list(llm.core.requests):
        llm.abort(request_id)
    step, share, mask = (statistics.median(x) for x in (steps, shares, masks))
    print(f"{step * 1e3:8.1f} ms{share:13.1%}{mask:9.1%}")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        arithmetic="native",
        max_num_seqs=args.batch,
        max_model_len=args.context + args.steps + 16,
        max_num_batched_tokens=max(2048, args.batch),
        enable_prefix_caching=False,
        seed=0,
    )
    watch = Stopwatch()
    llm.core.runner.run = watch.timed("forward", llm.core.runner.run)  # type: ignore[method-assign]  # to time it
    for name in ("mask", "accept"):
        setattr(Constraint, name, watch.timed("masks", getattr(Constraint, name)))
    print(
        f"{args.model}, {args.dtype}, {llm.model.device}, vocabulary {llm.config.vocab_size}, "
        f"batch {args.batch}, {torch.get_num_threads()} threads"
    )
    print(f"{'':22}{'step':>11}{'not forward':>14}{'masks':>9}")
    for kind, options in KINDS.items():
        print(f"{kind:22}", end="", flush=True)
        measure(llm, watch, options, args.batch, args)


if __name__ == "__main__":
    run(main)
