#!/usr/bin/env python3
"""Look at a model's intermediates.

python tools/trace.py points                        every point: name, shape, dtype, TransformerLens's name
python tools/trace.py show "In the beginning" --names "*.attn.z" "final_norm"
python tools/trace.py save "In the beginning" OUT.safetensors --names "*.resid_post"
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import save_file

from minqwen import Mesh, ModelConfig, Qwen2, Tokenizer
from minqwen.cli import is_first_rank, model_flags, run
from minqwen.errors import MinqwenError
from minqwen.model.trace import POINTS


def table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def print_points(args: argparse.Namespace) -> None:
    dtype = ModelConfig.from_json(args.model).dtype if args.dtype == "auto" else args.dtype
    rows = [("name", "shape", "dtype", "split by", "TransformerLens", "what it is")]
    for p in POINTS:
        name, alias = (
            (f"layers.N.{p.name}", f"blocks.N.{p.alias}") if p.layered else (p.name, p.alias or "-")
        )
        rows.append((name, f"[{p.shape}]", dtype, p.axis or "-", alias, p.what))
    table(rows)


def compute(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    mesh = Mesh.from_env(args.device)
    tokenizer = Tokenizer.from_dir(args.model)
    model = Qwen2.from_pretrained(
        args.model,
        dtype=args.dtype,
        arithmetic=args.arithmetic,
        mesh=mesh,
        check_finite=args.check_finite,
        offload=args.offload,
    )
    ids = tokenizer.encode(args.text)
    if not ids:
        raise MinqwenError("the text has no tokens: give at least one")
    with torch.inference_mode():
        _, seen = model.run_with_cache(
            torch.tensor([ids], device=model.device), args.names, to="cpu"
        )
    return {name: x[0] for name, x in seen.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("points", "print the table of points"),
        ("show", "print size and spread of intermediates"),
        ("save", "write intermediates to a safetensors file"),
    ):
        command = commands.add_parser(name, help=what)
        if name != "points":
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
    args = parser.parse_args()
    if args.command == "points":
        print_points(args)
        return 0
    seen = compute(args)
    if not is_first_rank():
        return 0
    if args.command == "save":
        save_file({name: x.contiguous() for name, x in seen.items()}, args.out)
        return 0
    rows = [("name", "shape", "mean", "std", "max |x|")]
    for name, x in seen.items():
        y = x.double()
        y = y[y.isfinite()]
        rows.append(
            (name, str(list(x.shape)), f"{y.mean():.5f}", f"{y.std():.5f}", f"{y.abs().max():.5f}")
        )
    table(rows)
    return 0


if __name__ == "__main__":
    run(main)
