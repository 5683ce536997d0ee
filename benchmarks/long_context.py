#!/usr/bin/env python3
"""Peak memory on this CPU beside the planner's: of chunked prefill at 8K, 32K and 128K tokens, and of other shapes.

  python benchmarks/long_context.py [--plot docs/long-context.svg] [--json FILE]       a few minutes
  python benchmarks/long_context.py --validate                                         the planner at several shapes

Each run is a process of its own, which runs a tiny model in the same dtype first (libraries set up their buffers
then), and reports how far its resident memory rose above that, from before the weights to the highest point
of `LLM.generate`. Three things are kept out of it that are not the model's: glibc hands freed blocks back at once,
oneDNN keeps few of the kernels that it compiles (in bfloat16, one for every tile of attention), and the prefix
cache, whose books are Python objects, is off.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 131072,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768},
}
WIDE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}  # 126 million parameters
# The 0.5B with 2 of its 24 layers
TIED = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 2,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
ATTENTION = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
# config, dtype, prompts, tokens each, max_num_batched_tokens
LONG = [(SMALL, "float32", 1, length - 4, 2048) for length in (8192, 32768, 131072)]
VALIDATION = [
    (WIDE, "float32", 1, 4096, 2048),
    (WIDE, "float32", 1, 2048, 2048),
    (WIDE, "float32", 8, 256, 1024),
    (WIDE, "bfloat16", 1, 1024, 512),
    (TIED, "float32", 1, 4096, 2048),
    (TIED, "bfloat16", 8, 128, 512),
    (ATTENTION, "float32", 1, 8192, 1024),
    (ATTENTION, "float32", 32, 512, 2048),
    (SMALL, "float32", 64, 512, 4096),
]


def job(config: dict, dtype: str, prompts: int, length: int, tokens: int) -> dict:
    return {
        "config": config,
        "dtype": dtype,
        "prompts": prompts,
        "length": length,
        "tokens": tokens,
    }


def measure(job: dict, threads: int = 1) -> dict:
    """{"measured", "predicted": bytes, "phase", "seconds"} of one job, in a process of its own."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(job)],
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def resident(field: str = "VmRSS") -> int:
    """Bytes of main memory this process has now, or, as VmHWM, had at most since the last reset."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def config_of(job: dict):
    from minqwen import ModelConfig
    from minqwen.config import RopeScaling

    rope = job["config"].get("rope_scaling")
    return ModelConfig(
        **{**job["config"], "rope_scaling": rope and RopeScaling(**rope), "dtype": job["dtype"]}
    )


def new_tokens(job: dict) -> int:
    """So many that at last all sequences decode together."""
    return 4 if job["prompts"] == 1 else 2 * job["prompts"] * job["length"] // job["tokens"] + 4


def planned(job: dict):
    from minqwen.lab.planner import Planner

    planner = Planner(config_of(job), max_num_batched_tokens=job["tokens"], device="cpu")
    return planner.plan(job["length"] + new_tokens(job), job["prompts"])


def one(job: dict) -> dict:
    """What `measure` asks for, in this process."""
    import torch

    from minqwen import LLM, Qwen2, SamplingParams

    def model_of(job: dict) -> Qwen2:
        model = Qwen2(config_of(job), dtype=getattr(torch, job["dtype"]))
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.02)
        return model.prepare()

    def run(model: Qwen2, prompts: list[list[int]], new: int, tokens: int) -> None:
        longest = len(prompts[0]) + new
        llm = LLM(
            model,
            max_model_len=longest,
            block_size=16,
            num_blocks=len(prompts) * -(-longest // 16),
            max_num_batched_tokens=tokens,
            max_num_seqs=len(prompts),
            enable_prefix_caching=False,
        )
        llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True), use_tqdm=False
        )

    plan = planned(job)
    draw = random.Random(0)
    prompts = [
        draw.choices(range(job["config"]["vocab_size"]), k=job["length"])
        for _ in range(job["prompts"])
    ]
    run(model_of({**job, "config": SMALL}), [[1] * 2048] * 2, 3, 2048)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    model = model_of(job)
    began = time.perf_counter()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again from here
    run(model, prompts, new_tokens(job), job["tokens"])
    return {
        "measured": resident("VmHWM") - before,
        "predicted": plan.total,
        "weights": plan.weights,
        "kv_cache": plan.kv_cache,
        "activations": plan.activations,
        "phase": plan.phase,
        "seconds": time.perf_counter() - began,
    }


def slope(points: list[tuple[int, int]]) -> tuple[float, float]:
    """(slope, intercept) of the least-squares line."""
    n, mx, my = (
        len(points),
        sum(x for x, _ in points) / len(points),
        sum(y for _, y in points) / len(points),
    )
    up = sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)
    return up, my - up * mx


def draw(rows: list[dict], file: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    at = [row["length"] for row in rows]
    axes.plot(at, [row["predicted"] / 1e6 for row in rows], label="planner")
    axes.plot(at, [row["measured"] / 1e6 for row in rows], "o", label="measured")
    axes.set(
        xlabel="context, tokens",
        ylabel="peak memory, MB",
        xlim=(0, None),
        ylim=(0, None),
        xticks=[0, *at],
    )
    axes.legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--validate", action="store_true", help="other shapes instead of long contexts"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--json", metavar="FILE", help="write what is printed")
    parser.add_argument("--one", metavar="JOB", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(one(json.loads(args.one))))
    jobs = [job(*shape) for shape in (VALIDATION if args.validate else LONG)]
    print(
        "hidden layers dtype      batch  tokens  step   measured  predicted  differ  peak in       seconds"
    )
    rows = []
    for j in jobs:
        rows.append(row := {**j, **measure(j, args.threads)})
        print(
            f"{j['config']['hidden_size']:6} {j['config']['num_hidden_layers']:6} {j['dtype']:9}{j['prompts']:7}"
            f"{j['length']:8}{j['tokens']:6}{row['measured'] / 1e6:8.1f} MB{row['predicted'] / 1e6:8.1f} MB"
            f"{row['predicted'] / row['measured'] - 1:+8.1%}  {row['phase']:14}{row['seconds']:7.1f}",
            flush=True,
        )
    if not args.validate:
        for name in ("measured", "predicted"):
            up, at_zero = slope([(row["length"], row[name]) for row in rows])
            worst = max(abs(row[name] / (at_zero + up * row["length"]) - 1) for row in rows)
            print(
                f"{name}: {up:,.0f} bytes per token + {at_zero / 1e6:.1f} MB; all points within {worst:.1%} of that"
            )
    if args.plot:
        draw(rows, args.plot)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
