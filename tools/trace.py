#!/usr/bin/env python3
"""Look at a model's intermediates.

python tools/trace.py points                  every point: name, shape, dtype, other name
python tools/trace.py show "In the beginning" --names "*.attn.z" "final_norm"
python tools/trace.py save "In the beginning" OUT.safetensors --names "*.resid_post"
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import save_file
from torch import Tensor

from minqwen import Checkpoint, Mesh, ModelConfig, Qwen2, Tokenizer
from minqwen.cli import Parser, check_writable, is_first_rank, model_flags, model_options, run
from minqwen.errors import MinqwenError
from minqwen.model.trace import POINTS, Point, select


def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def print_points(args: argparse.Namespace) -> None:
    dtype = Checkpoint(args.model).config.dtype if args.dtype == "auto" else args.dtype
    header = ("name", "shape", "dtype", "split by", "TransformerLens", "what it is")
    print_table([header, *(row_of(point, dtype) for point in POINTS)])


def row_of(point: Point, dtype: str) -> tuple[str, ...]:
    name, alias = point.name, point.alias or "-"
    if point.layered:
        name, alias = f"layers.N.{point.name}", f"blocks.N.{point.alias}"
    return name, f"[{point.shape}]", dtype, point.axis or "-", alias, point.what


def compute(args: argparse.Namespace) -> dict[str, Tensor]:
    """The text's intermediates, on every rank: {name: tensor}."""
    mesh = Mesh.from_env(args.device)
    tokenizer = Tokenizer.from_dir(args.model)
    ids = tokenizer.encode(args.text)
    if not ids:
        raise MinqwenError("the text has no tokens: give at least one")
    select(args.names, ModelConfig.from_json(args.model).num_hidden_layers)  # or raise TraceError
    model = Qwen2.from_pretrained(args.model, mesh=mesh, **model_options(args))
    with torch.inference_mode():
        prompt = torch.tensor([ids], device=model.device)
        _, seen = model.run_with_cache(prompt, args.names, to="cpu")
    return {name: x[0] for name, x in seen.items()}


def show(args: argparse.Namespace) -> None:
    seen = compute(args)
    rows: list[tuple[str, ...]] = [("name", "shape", "mean", "std", "max |x|")]
    for name, x in seen.items():
        finite = x.double()[x.isfinite()]
        numbers = (finite.mean(), finite.std(), finite.abs().max())
        rows.append((name, str(list(x.shape)), *(f"{number:.5f}" for number in numbers)))
    if is_first_rank():
        print_table(rows)


def save(args: argparse.Namespace) -> None:
    check_writable(args.out, "OUT.safetensors")
    seen = compute(args)
    if is_first_rank():
        save_file({name: x.contiguous() for name, x in seen.items()}, args.out)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_flags(parser.add_command("points", help="print the table of points"))
    for name, what in (
        ("show", "print size and spread of intermediates"),
        ("save", "write intermediates to a safetensors file"),
    ):
        command = parser.add_command(name, help=what)
        command.add_argument("text")
        if name == "save":
            command.add_argument("out", metavar="OUT.safetensors")
        command.add_argument(
            "--names",
            nargs="+",
            default=["*.resid_post", "final_norm", "logits"],
            metavar="NAME",
            help="names or patterns, ours or TransformerLens's",
        )
        model_flags(command)
    args: argparse.Namespace = parser.parse_args()
    return args


def main() -> int:
    args = parse()
    {"points": print_points, "show": show, "save": save}[args.command](args)
    return 0


if __name__ == "__main__":
    run(main)
