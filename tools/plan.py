#!/usr/bin/env python3
"""How many GPUs a model needs, what fits on them, and how fast they can be at best.

  python tools/plan.py --size 7B                                   at 1, 2, 4 and 8 GPUs
  python tools/plan.py MODEL --tp 4 --gpu-memory 24 --context 32768 --batch 8
  python tools/plan.py --size 7B --num-attention-heads 32 --tp 8 --quantization awq --dtype float16
  python tools/plan.py --size 7B --tp 4 --plot memory.svg          memory against context
  python tools/plan.py --size 7B --gpus 8 --batch 64               replicas beside more GPUs each

Figures are per GPU, in GB of 10^9 bytes; docs/memory.md has the formulas. A card may be filled to
--gpu-memory-utilization, as in the engine; the rest is for the CUDA context and what the allocator
cannot use.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minqwen.checkpoint import Checkpoint
from minqwen.checkpoint.weight_files import INDEX, SINGLE
from minqwen.checks import integer
from minqwen.cli import Parser, check_writable, heads_flags, run
from minqwen.commands import as_called_here
from minqwen.config import BYTES_PER_ELEMENT, ModelConfig
from minqwen.errors import MinqwenError, ParallelError
from minqwen.heads.layout import extended_config
from minqwen.heads.proposals import asked_layout, asks_for_heads
from minqwen.lab.choices import Comparison, choices
from minqwen.lab.choices_page import as_text
from minqwen.lab.figures import new_figure, save
from minqwen.lab.planner import (
    CAPACITIES,
    CARDS,
    GB,
    PACKINGS,
    QUANTIZATIONS,
    Card,
    Estimate,
    Fit,
    Planner,
    uneven_groups,
    yarn_for,
)
from minqwen.lab.shapes import SIZES, official_config
from minqwen.model.kv_cache import KV_DTYPES

DEGREES = (1, 2, 4, 8)  # without --tp
MOST = {  # of a flag: far beyond any machine, and still planned in a second
    "tp": 1 << 12,
    "gpus": 1 << 12,
    "context": 1 << 30,
    "batch": 1 << 24,
    "max_num_batched_tokens": 1 << 24,
    "block_size": 1 << 20,
}
COMPARED_CARD_GB = 80  # with --gpus and without --gpu-memory


@dataclass(frozen=True)
class Answer:
    """All that is said of one number of GPUs."""

    planner: Planner
    estimate: Estimate
    fits: dict[str, Fit]  # by the card's GB
    cards: dict[str, Card]  # those of these sizes
    yarn: dict[str, object] | None  # the rope_scaling that the context needs beyond the config's

    def as_json(self) -> dict[str, object]:
        floors = {
            name: {
                "decode_seconds": self.estimate.decode_seconds(card),
                "prefill_seconds": self.estimate.prefill_seconds(card),
            }
            for name, card in self.cards.items()
        }
        return {
            **asdict(self.estimate),
            "total": self.estimate.total,
            "cards_gb": {gb: asdict(fit) for gb, fit in self.fits.items()},
            "floors": floors,
            "yarn": self.yarn,
        }


@dataclass(frozen=True)
class Refused:
    """A number of GPUs that cannot share the model, and why."""

    size: int
    error: str

    def as_json(self) -> dict[str, object]:
        return asdict(self)


# ---- the command line ---------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Not a group of argparse's: after a mistyped flag it would complain about the flag's value.
    parser.add_argument("model", nargs="?", help="a model's directory, or its config.json")
    parser.add_argument("--size", choices=SIZES, help="an official Qwen2.5 size")
    model_flags(parser)
    load_flags(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--plot", metavar="FILE", help="memory against context as .svg, .png or .pdf"
    )
    args: argparse.Namespace = parser.parse_args()
    if (args.model is None) == (args.size is None):
        parser.error("expected a model's directory, or --size and one of its choices, not both")
    return args


def model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tp", type=int, metavar="N", help="tensor-parallel degree (default: 1, 2, 4 and 8)"
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="compare the ways to use N GPUs, with replicas too"
    )
    heads_flags(parser)
    parser.add_argument("--dtype", choices=list(BYTES_PER_ELEMENT), help="default: the config's")
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="of the weights (default: the config's)"
    )


def load_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens per sequence (default: the config's maximum; for more, YaRN is named)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="sequences (default 1; with --gpus N they are those of all replicas, default N)",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GB",
        help="of one card (default: the common sizes; with --gpus 80)",
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="X", help="default 0.9"
    )
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=2048, metavar="N", help="default 2048"
    )
    parser.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens per block (default 16)"
    )
    parser.add_argument("--kv-cache-dtype", choices=KV_DTYPES, default="auto", help="of the cache")


def check_args(args: argparse.Namespace) -> None:
    """Raise MinqwenError for what argparse lets through."""
    for name, most in MOST.items():
        if (getattr(args, name) or 0) > most:
            flag = "--" + name.replace("_", "-")
            raise MinqwenError(f"{flag} is {getattr(args, name)}, expected at most {most:,}")
    if args.gpus is not None:
        check_gpus(args)
    if not 0 < args.gpu_memory_utilization <= 1:
        raise MinqwenError(
            f"--gpu-memory-utilization is {args.gpu_memory_utilization:g}, "
            "expected above 0, at most 1"
        )
    if args.gpu_memory is not None and not 0 < args.gpu_memory < 1e6:
        raise MinqwenError(f"--gpu-memory is {args.gpu_memory:g}, expected the GB of one card")
    if args.plot:
        check_writable(args.plot, "--plot")


def check_gpus(args: argparse.Namespace) -> None:
    if args.tp is not None:
        raise MinqwenError(
            "--gpus compares all tensor-parallel degrees, --tp asks for one: leave one of them out"
        )
    if args.plot:
        raise MinqwenError(
            "--plot draws single models, --gpus compares replicas: leave one of them out"
        )
    integer("--gpus", args.gpus, 1)


def read_config(args: argparse.Namespace) -> ModelConfig:
    config = described_config(args)
    heads = (args.num_attention_heads, args.num_key_value_heads, args.head_recipe)
    if not asks_for_heads(*heads):
        return config
    return extended_config(config, asked_layout(config, *heads))


def described_config(args: argparse.Namespace) -> ModelConfig:
    """That of a size, or of a directory, where the weight files say what config.json does not."""
    if args.size:
        return official_config(args.size, quantised=args.quantization in PACKINGS)
    path = Path(args.model)
    config = ModelConfig.from_json(path)
    if config.names_dtype or not any((path / name).is_file() for name in (SINGLE, INDEX)):
        return config
    return config.replace(dtype=Checkpoint(path).config.dtype)


# ---- the answers --------------------------------------------------------------------------------


def planner_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": args.dtype,
        "quantization": args.quantization,
        "block_size": args.block_size,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "kv_cache_dtype": args.kv_cache_dtype,
    }


def answer(args: argparse.Namespace, config: ModelConfig, size: int) -> Answer:
    """Raises ParallelError where `size` GPUs cannot share the model."""
    planner = Planner(config, size, **planner_options(args))
    context = config.context_length if args.context is None else args.context
    estimate = planner.estimate(context, 1 if args.batch is None else args.batch)
    capacities = [args.gpu_memory] if args.gpu_memory else list(CAPACITIES)
    limits = {f"{gb:g}": int(gb * GB * args.gpu_memory_utilization) for gb in capacities}
    return Answer(
        planner,
        estimate,
        fits={gb: planner.fit(estimate, limit) for gb, limit in limits.items()},
        cards={name: card for name, card in CARDS.items() if card.gb in capacities},
        yarn=yarn_for(config, context),
    )


def answers_for(args: argparse.Namespace, config: ModelConfig) -> list[Answer | Refused]:
    """Of the degree asked for, which has to work, or of the usual ones, where 1 always works."""
    if args.tp is not None:
        return [answer(args, config, args.tp)]
    answers: list[Answer | Refused] = []
    for size in DEGREES:
        try:
            answers.append(answer(args, config, size))
        except ParallelError as error:
            answers.append(Refused(size, str(error)))
    return answers


# ---- what is printed ----------------------------------------------------------------------------


def show(args: argparse.Namespace, config: ModelConfig, answers: list[Answer | Refused]) -> None:
    found = [a for a in answers if isinstance(a, Answer)]
    show_model(args, config, found[0])
    show_quantised(found)
    show_memory(found)
    for refused in answers:
        if isinstance(refused, Refused):
            print(f"{refused.size:4}  {refused.error}")
    show_fits(found)
    if found[0].cards:
        show_floors(found)


def show_model(args: argparse.Namespace, config: ModelConfig, first: Answer) -> None:
    planner, estimate = first.planner, first.estimate
    show_header(args, planner)
    print(
        f"context {estimate.context:,}, batch {estimate.batch}, "
        f"at most {planner.tokens:,} tokens a step"
    )
    show_yarn(config, estimate.context)
    if args.dtype is None and not config.names_dtype:
        print(f"note: config.json names no dtype: {planner.dtype} is assumed; --dtype says another")


def show_quantised(found: list[Answer]) -> None:
    """What is not plain about packed weights."""
    for a in found:
        packing, c = a.planner.packing, a.planner.config
        if packing is None:
            continue
        if a is found[0]:
            print(
                "note: weights are counted as they are packed; minqwen itself computes with "
                "dequantised ones: --quantization none counts those"
            )
        wider = uneven_groups(c, packing, a.estimate.size)
        if wider is not None:
            extend = as_called_here("tools/heads.py extend")
            print(
                f"note: {a.estimate.size} GPUs cannot share the MLP's {c.intermediate_size:,} in "
                f"whole groups of {packing.group}, and most engines then refuse: before "
                f"quantising, pad it with {extend} --intermediate-size {wider}"
            )


def show_header(args: argparse.Namespace, planner: Planner) -> None:
    c = planner.config
    print(
        f"{args.size or args.model}: {c.num_attention_heads} query and {c.num_key_value_heads} KV "
        f"heads of {c.head_dim}, {c.num_parameters():,} parameters, {planner.dtype}, "
        f"quantisation {planner.quantization}, "
        f"{c.kv_bytes_per_token(planner.dtype):,} bytes of cache per token"
    )


def show_yarn(config: ModelConfig, context: int) -> None:
    yarn = yarn_for(config, context)
    if yarn is not None:
        print(
            f"note: the config ends at {config.context_length:,} tokens; {context:,} need "
            f'"rope_scaling": {json.dumps(yarn)}\n'
            "note: Qwen documents YaRN up to factor 4, for the Instruct models of 7B and more; it "
            "changes what short prompts get too"
        )


def show_memory(found: list[Answer]) -> None:
    print("\nGB per GPU\nGPUs  weights  KV cache  activations    total  (the step's peak is in)")
    for e in (a.estimate for a in found):
        print(
            f"{e.size:4}{e.weights / GB:9.2f}{e.kv_cache / GB:10.2f}{e.activations / GB:13.2f}"
            f"{e.total / GB:9.2f}  {e.phase}"
        )


def show_fits(found: list[Answer]) -> None:
    one = found[0].estimate
    print(
        f"\nLargest context at batch {one.batch}, and largest batch at {one.context:,} tokens, "
        "on cards of"
    )
    print("GPUs" + "".join(f"{gb + ' GB':>20}" for gb in found[0].fits))
    for a in found:
        print(f"{a.estimate.size:4}" + "".join(f"{pair(fit):>20}" for fit in a.fits.values()))
    longest = max(one.context, found[0].planner.config.context_length)
    if any(fit.largest_context == longest for a in found for fit in a.fits.values()):
        print(f"Contexts end at {longest:,} tokens here; --context N says which YaRN more needs.")


def pair(fit: Fit) -> str:
    if not fit.largest_context:
        return "-"
    return f"{fit.largest_context:,} / {fit.largest_batch:,}"


def show_floors(found: list[Answer]) -> None:
    print("\nNo faster than: ms per decode step (from bandwidth), s for the prefill (from FLOPs)")
    print("GPUs" + "".join(f"{name:>16}" for name in found[0].cards))
    for e, cards in ((a.estimate, a.cards.values()) for a in found):
        times = (
            f"{e.decode_seconds(card) * 1e3:8.2f} {e.prefill_seconds(card):7.2f}" for card in cards
        )
        print(f"{e.size:4}" + "".join(times))


# ---- the ways to use a number of GPUs -----------------------------------------------------------


def compare(args: argparse.Namespace, config: ModelConfig) -> Comparison:
    gb = args.gpu_memory or COMPARED_CARD_GB
    return Comparison.of(
        choices(config, args.gpus, **planner_options(args)),
        context=config.context_length if args.context is None else args.context,
        batch=args.gpus if args.batch is None else args.batch,
        limit=int(gb * GB * args.gpu_memory_utilization),
        cards={name: card for name, card in CARDS.items() if card.gb == gb},
    )


def show_comparison(args: argparse.Namespace, seen: Comparison) -> None:
    show_header(args, seen.checkpoint)
    print(
        f"{args.gpus} GPUs of {args.gpu_memory or COMPARED_CARD_GB:g} GB, "
        f"filled to {args.gpu_memory_utilization:g}; "
        f"{seen.batch:,} sequences of {seen.context:,} tokens, shared out among the replicas"
    )
    show_yarn(seen.checkpoint.config, seen.context)
    print()
    print(as_text(seen))


# ---- the plot -----------------------------------------------------------------------------------


def plot(figure: Any, answers: list[Answer | Refused], file: str) -> None:
    """Memory against context: a line for each number of GPUs, and one for each size of card."""
    found = [a for a in answers if isinstance(a, Answer)]
    batch, longest = found[0].estimate.batch, max(found[0].estimate.context, 1024)
    axes = figure.subplots()
    top = max(plot_line(axes, a.planner, longest, batch) for a in found)
    for gb in map(float, found[0].fits):
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
    save(figure, file)


def plot_line(axes: Any, planner: Planner, longest: int, batch: int) -> float:
    """Two lines, with activations and without; returns the GB at the longest context."""
    contexts = [max(1, longest * i // 64) for i in range(65)]
    estimates = [planner.estimate(context, batch) for context in contexts]
    totals = [e.total / GB for e in estimates]
    label = "1 GPU" if planner.size == 1 else f"{planner.size} GPUs"
    (line,) = axes.plot(contexts, totals, label=label)
    axes.plot(
        contexts,
        [(e.weights + e.kv_cache) / GB for e in estimates],
        ":",
        color=line.get_color(),
        linewidth=1,
    )
    return totals[-1]


def main() -> int:
    args = parse_args()
    check_args(args)
    figure = new_figure(7, 4.2) if args.plot else None
    config = read_config(args)
    if args.gpus is not None:
        seen = compare(args, config)
        if args.json:
            print(json.dumps(seen.as_json(), indent=1))
        else:
            show_comparison(args, seen)
        return 0
    answers = answers_for(args, config)
    if args.plot:
        plot(figure, answers, args.plot)
    if args.json:
        print(json.dumps([a.as_json() for a in answers], indent=1))
    else:
        show(args, config, answers)
    return 0


if __name__ == "__main__":
    run(main)
