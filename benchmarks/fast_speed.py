#!/usr/bin/env python3
"""Fast arithmetic beside native and transformers: the same bfloat16 weights, in one run.

  python tools/make_checkpoint.py --size 0.5B /tmp/qwen05b
  python benchmarks/fast_speed.py /tmp/qwen05b --threads 1 --clock process

Prefill and decode go through the models without the engine around them, ours over the cache's
blocks, transformers' (sdpa) over a DynamicCache. The candidates take turns, so that a change of the
machine's speed meets all. The table gives medians in milliseconds and, in brackets, the median of
the ratios native float32 / candidate: above 1 the candidate is faster than native float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from minqwen import Batch, Qwen2
from minqwen.model import Fast
from minqwen.model.packed import Form, Half, half_scale

BLOCK_SIZE = 16  # tokens
BASE = "native float32"


class Job(NamedTuple):
    """What is timed: the prefill, or (steps > 0) the decode steps after it."""

    name: str
    num_seqs: int
    length: int  # tokens of each sequence's prefill
    steps: int


JOBS = [
    Job("prefill 512", 1, 512, 0),
    Job("decode B1", 1, 128, 8),
    Job("decode B8", 8, 128, 4),
    Job("decode B1, 1024 of context", 1, 1024, 4),
]

# Seconds of a job's prefill, or the median of its decode steps.
Run = Callable[[Job], float]


class HalfFast(Fast):
    """Fast as on a CPU without instructions for bfloat16: float16 weights."""

    def form(self, weight: torch.Tensor) -> Form | None:
        scale = half_scale(weight)
        return None if scale is None else Half(weight, scale)


class Ours:
    def __init__(self, model: Qwen2, clock: Callable[[], float]):
        self.model, self.clock = model, clock

    @torch.inference_mode()
    def __call__(self, job: Job) -> float:
        per_seq = -(-(job.length + job.steps) // BLOCK_SIZE)
        cache = self.model.new_cache(job.num_seqs * per_seq, BLOCK_SIZE)
        blocks = [list(range(i * per_seq, (i + 1) * per_seq)) for i in range(job.num_seqs)]

        def step(count: int, end: int) -> float:
            ids = torch.randint(0, 1000, (job.num_seqs * count,))
            lens = [count] * job.num_seqs, [end] * job.num_seqs
            batch = Batch.paged(*lens, blocks, BLOCK_SIZE, num_logits=[1] * job.num_seqs)
            began = self.clock()
            self.model(ids, batch, cache)
            return self.clock() - began

        if not job.steps:
            return step(job.length, job.length)
        cache.pool.normal_()  # the context
        return statistics.median(step(1, job.length + 1 + i) for i in range(job.steps))


class Theirs:
    def __init__(self, model: Any, clock: Callable[[], float]):
        self.model, self.clock = model.eval(), clock

    @torch.inference_mode()
    def __call__(self, job: Job) -> float:
        cache = DynamicCache(config=self.model.config)
        if job.steps:
            c = self.model.config
            head_dim = c.hidden_size // c.num_attention_heads
            shape = (job.num_seqs, c.num_key_value_heads, job.length, head_dim)
            for layer in range(c.num_hidden_layers):
                context = torch.randn(shape).to(self.model.dtype)
                cache.update(context, context, layer)

        def step(count: int) -> float:
            ids = torch.randint(0, 1000, (job.num_seqs, count))
            began = self.clock()
            self.model(ids, past_key_values=cache, logits_to_keep=1)
            return self.clock() - began

        if not job.steps:
            return step(job.length)
        return statistics.median(step(1) for _ in range(job.steps))


def candidates(path: str, quantised: list[str]) -> dict[str, Callable[[], Any]]:
    """What makes each candidate's model. quantised: AWQ or GPTQ checkpoints of the same shape."""

    def ours(dtype: str, arithmetic: Any) -> Callable[[], Any]:
        return lambda: Qwen2.from_pretrained(path, dtype=dtype, arithmetic=arithmetic)

    def theirs(dtype: str) -> Callable[[], Any]:
        return lambda: AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa"
        )

    def packed(path: str) -> Callable[[], Any]:
        return lambda: Qwen2.from_pretrained(path, dtype="bfloat16", arithmetic="fast")

    return {
        BASE: ours("float32", "native"),
        "native bfloat16": ours("bfloat16", "native"),
        "fast float32": ours("float32", "fast"),
        "fast bfloat16": ours("bfloat16", "fast"),
        "fast bfloat16, float16 weights": ours("bfloat16", HalfFast()),
        "int8": ours("bfloat16", "int8"),
        "transformers float32": theirs("float32"),
        "transformers bfloat16": theirs("bfloat16"),
        **{f"fast bfloat16, {Path(path).name}": packed(path) for path in quantised},
    }


def load(args: argparse.Namespace) -> dict[str, Run]:
    clock = time.process_time if args.clock == "process" else time.perf_counter
    runs: dict[str, Run] = {}
    for name, make in candidates(args.model, args.quantised).items():
        if args.only and name not in args.only and name != BASE:
            continue
        began = time.process_time()
        model = make()
        print(f"{name}: loaded in {time.process_time() - began:.1f} CPU-seconds", flush=True)
        runs[name] = (Theirs if name.startswith("transformers") else Ours)(model, clock)
    return runs


def measure(runs: dict[str, Run], job: Job, rounds: int) -> dict[str, tuple[float, float]]:
    """{candidate: (median milliseconds, median of native float32's time over its own)}."""
    times = [{name: run(job) for name, run in runs.items()} for _ in range(rounds + 1)]
    del times[0]  # the first round warms up
    return {
        name: (
            statistics.median(t[name] for t in times) * 1e3,
            statistics.median(t[BASE] / t[name] for t in times),
        )
        for name in runs
    }


def machine() -> dict[str, str]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    bfloat16 = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    return {
        "cpu": f"{cpu}, {bfloat16} AVX512_BF16",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint directory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--clock", default="wall", choices=["wall", "process"])
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"candidates beside {BASE}")
    parser.add_argument("--quantised", nargs="+", default=[], metavar="DIR", help="as they are")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    runs = load(args)
    about = machine() | {"clock": args.clock, "model": args.model, "rounds": str(args.rounds)}
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    figures = {}
    for job in JOBS:
        figures[job.name] = measure(runs, job, args.rounds)
        print(job.name)
        for name, (milliseconds, ratio) in figures[job.name].items():
            print(f"  {name:32}{milliseconds:9.1f} ms ({ratio:.2f})", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps({"about": about, "jobs": figures}, indent=1))


if __name__ == "__main__":
    main()
