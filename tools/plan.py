#!/usr/bin/env python3
"""How many GPUs a model needs, what fits on them, and how fast they can be at best. docs/memory.md has the formulas.

  python tools/plan.py --size 7B                                   at 1, 2, 4 and 8 GPUs
  python tools/plan.py MODEL --tp 4 --gpu-memory 24 --context 32768 --batch 8
  python tools/plan.py --size 7B --num-attention-heads 32 --tp 8 --quantization awq --dtype float16
  python tools/plan.py --size 7B --tp 4 --plot memory.svg          memory against context

Per GPU, in GB of 10^9 bytes. A card may be filled to --gpu-memory-utilization, as in the engine; the rest is for
the CUDA context and what the allocator cannot use.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from minqwen.cli import run
from minqwen.config import BYTES_PER_ELEMENT, ModelConfig
from minqwen.errors import MinqwenError, ParallelError
from minqwen.lab.planner import CAPACITIES, CARDS, GB, QUANTIZATIONS, Plan, Planner
from minqwen.lab.shapes import SIZES, official_config


def answer(planner: Planner, plan: Plan, capacities: list[float], utilization: float) -> dict:
    """Everything known about one degree, for --json and for the tables."""
    fits = {}
    for gb in capacities:
        limit = int(gb * GB * utilization)
        fits[f"{gb:g}"] = {
            "fits": plan.total <= limit,
            "largest_context": planner.largest_context(limit, plan.batch),
            "largest_batch": planner.largest_batch(limit, plan.context),
        }
    floors = {
        name: {
            "decode_seconds": plan.decode_seconds(card),
            "prefill_seconds": plan.prefill_seconds(card),
        }
        for name, card in CARDS.items()
        if card.gb in capacities
    }
    return {**asdict(plan), "total": plan.total, "cards_gb": fits, "floors": floors}


def show(answers: list[dict]) -> None:
    found = [a for a in answers if "error" not in a]
    print("\nGB per GPU\nGPUs  weights  KV cache  activations    total  (the step's peak is in)")
    for a in found:
        print(
            f"{a['size']:4}{a['weights'] / GB:9.2f}{a['kv_cache'] / GB:10.2f}{a['activations'] / GB:13.2f}"
            f"{a['total'] / GB:9.2f}  {a['phase']}"
        )
    for a in answers:
        if "error" in a:
            print(f"{a['size']:4}  {a['error']}")
    if not found:
        return
    one = found[0]
    print(
        f"\nLargest context at batch {one['batch']}, and largest batch at {one['context']:,} tokens, on cards of"
    )
    print("GPUs" + "".join(f"{gb + ' GB':>20}" for gb in one["cards_gb"]))
    for a in found:
        pairs = (
            f"{f['largest_context']:,} / {f['largest_batch']:,}" if f["largest_context"] else "-"
            for f in a["cards_gb"].values()
        )
        print(f"{a['size']:4}" + "".join(f"{pair:>20}" for pair in pairs))
    if one["floors"]:
        print(
            "\nNo faster than: ms per decode step (from bandwidth), s for the prefill (from FLOPs)"
        )
        print("GPUs" + "".join(f"{name:>16}" for name in one["floors"]))
        for a in found:
            print(
                f"{a['size']:4}"
                + "".join(
                    f"{f['decode_seconds'] * 1e3:8.2f} {f['prefill_seconds']:7.2f}"
                    for f in a["floors"].values()
                )
            )


def plot(
    planners: list[Planner], batch: int, longest: int, capacities: list[float], file: str
) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MinqwenError(
            "--plot needs matplotlib, which is not installed: pip install 'minqwen[plot]'"
        ) from None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    at = [max(1, longest * i // 64) for i in range(65)]
    top = 0.0
    for planner in planners:
        plans = [planner.plan(n, batch) for n in at]
        (line,) = axes.plot(
            at, [p.total / GB for p in plans], label=f"{planner.size} GPU{'s' * (planner.size > 1)}"
        )
        axes.plot(
            at,
            [(p.weights + p.kv_cache) / GB for p in plans],
            ":",
            color=line.get_color(),
            linewidth=1,
        )
        top = max(top, plans[-1].total / GB)
    for gb in capacities:
        if gb < 1.5 * top:
            axes.axhline(gb, color="grey", linewidth=0.6)
            axes.text(
                longest, gb, f"{gb:g} GB card ", ha="right", va="bottom", color="grey", fontsize=8
            )
    axes.set(
        xlabel=f"context, tokens (batch {batch})",
        ylabel="GB per GPU (dotted: without activations)",
        xlim=(0, longest),
        ylim=(0, None),
    )
    axes.legend(loc="upper left", fontsize=8)
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise MinqwenError(
            f"{file}: the plot cannot be written ({error}); choose another file"
        ) from None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape = parser.add_mutually_exclusive_group(required=True)
    shape.add_argument("model", nargs="?", help="a model's directory, or its config.json")
    shape.add_argument("--size", choices=SIZES, help="an official Qwen2.5 size")
    parser.add_argument(
        "--tp", type=int, metavar="N", help="tensor-parallel degree (default: 1, 2, 4 and 8)"
    )
    parser.add_argument(
        "--num-attention-heads", type=int, metavar="N", help="after head extension; head_dim stays"
    )
    parser.add_argument("--dtype", choices=list(BYTES_PER_ELEMENT), help="default: the config's")
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="of the weights (default: the config's)"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens per sequence (default: the config's maximum)",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default 1)")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="of one card (default: the common sizes)"
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="X", help="default 0.9"
    )
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=2048, metavar="N", help="default 2048"
    )
    parser.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens per page (default 16)"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--plot", metavar="FILE", help="memory against context as .svg, .png or .pdf"
    )
    args = parser.parse_args()
    config = official_config(args.size) if args.size else ModelConfig.from_json(Path(args.model))
    if args.num_attention_heads is not None:
        config = config.replace(num_attention_heads=args.num_attention_heads)
    if not 0 < args.gpu_memory_utilization <= 1:
        raise MinqwenError(
            f"--gpu-memory-utilization is {args.gpu_memory_utilization:g}, expected above 0, at most 1"
        )
    if args.gpu_memory is not None and not 0 < args.gpu_memory < 1e6:
        raise MinqwenError(f"--gpu-memory is {args.gpu_memory:g}, expected the GB of one card")
    capacities = [args.gpu_memory] if args.gpu_memory else list(CAPACITIES)
    context = config.context_length if args.context is None else args.context
    planners, answers = [], []
    for size in (1, 2, 4, 8) if args.tp is None else (args.tp,):
        try:
            planner = Planner(
                config,
                size,
                dtype=args.dtype,
                quantization=args.quantization,
                block_size=args.block_size,
                max_num_batched_tokens=args.max_num_batched_tokens,
            )
        except ParallelError as error:
            if args.tp is not None:
                raise
            answers.append({"size": size, "error": str(error)})
            continue
        planners.append(planner)
        answers.append(
            answer(
                planner, planner.plan(context, args.batch), capacities, args.gpu_memory_utilization
            )
        )
    if args.plot:
        plot(planners, args.batch, max(context, 1024), capacities, args.plot)
    if args.json:
        print(json.dumps(answers, indent=1))
        return 0
    p, c = planners[0], config
    print(
        f"{args.size or args.model}: {c.num_attention_heads} query and {c.num_key_value_heads} KV heads of "
        f"{c.head_dim}, {c.num_parameters():,} parameters, {p.dtype}, quantisation {p.quantization}, "
        f"{c.kv_bytes_per_token(p.dtype):,} bytes of cache per token\n"
        f"context {context:,}, batch {args.batch}, at most {p.tokens:,} tokens a step"
    )
    if context > c.context_length:
        print(
            f"note: the config allows {c.context_length:,} tokens; more needs YaRN (rope_scaling)"
        )
    show(answers)
    return 0


if __name__ == "__main__":
    run(main)
