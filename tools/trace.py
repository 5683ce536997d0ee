#!/usr/bin/env python3
"""Look at a model's intermediates.

python tools/trace.py points                  every point: name, shape, dtype, other name
python tools/trace.py show "In the beginning" --names "*.attn.z" "final_norm"
python tools/trace.py show "What is 47 + 38?" --chat
python tools/trace.py save "In the beginning" OUT.safetensors --names "*.resid_post"
python tools/trace.py save OUT.safetensors --ids 5,300,17 --names "*"
python tools/trace.py plot "In the beginning" OUT.html
python tools/trace.py faults                  every mistake that --fault can put into the model
python tools/trace.py show "In the beginning" --fault rope-interleaved

A plotted page has the attention patterns, the logit lens and what each head adds, and needs nothing
else. A saved file says in its metadata what it is of: ids, text, dtype, arithmetic, model, and the
SHA-256 of config.json and of each weight file; the numbers of heads and the mistake, if the command
named any.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minqwen import Checkpoint, Mesh, ModelConfig  # before torch, for Ctrl-C

# isort: split
import torch
from torch import Tensor

from minqwen.checkpoint.tensor_file import save_tensors
from minqwen.checks import dtype_name
from minqwen.cli import (
    Parser,
    check_writable,
    heads_options,
    model_flags,
    model_options,
    run,
)
from minqwen.errors import MinqwenError, is_first_rank
from minqwen.files import write_text
from minqwen.lab.explain.picture import as_html, picture
from minqwen.lab.faults import FAULTS, Fault
from minqwen.lab.golden import file_digests
from minqwen.lab.prompt import (
    check_prompt,
    chosen_fault,
    load_model,
    name_of,
    prompt_flags,
    read_prompt,
    speller,
)
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
        name = f"layers.N.{point.name}"
        alias = f"blocks.N.{point.alias}" if point.alias else "-"
    return name, f"[{point.shape}]", dtype, point.axis or "-", alias, point.what


def print_faults(args: argparse.Namespace) -> None:
    """Each mistake in two lines."""
    for fault in FAULTS.values():
        needs = f"; needs {fault.needs.what}" if fault.needs else ""
        print(f"{fault.name}  ({fault.kind}, first at {fault.first or 'no point'}{needs})")
        print(f"    {fault.symptom} Source: {fault.source}.")


def plot(args: argparse.Namespace) -> None:
    """A page of pictures."""
    check_writable(args.out, "OUT.html")
    mesh = Mesh.from_env(args.device)
    config = ModelConfig.from_json(args.model)
    fault = told_fault(args, config)
    ids, _ = read_prompt(args, config, fault)
    spell = speller(args)
    model = load_model(args.model, mesh, fault, **model_options(args))
    drawn = as_html(picture(model, ids, spell, name_of(args), args.layers))
    if is_first_rank():
        write_text(Path(args.out), drawn, MinqwenError)


@dataclass
class Traced:
    """What passed the points, {name: tensor}, and of what."""

    seen: Mapping[str, Tensor]
    ids: list[int]
    text: str | None
    dtype: str


def compute(args: argparse.Namespace) -> Traced:
    """The input's intermediates, on every rank."""
    mesh = Mesh.from_env(args.device)
    config = ModelConfig.from_json(args.model)
    fault = told_fault(args, config)
    ids, text = read_prompt(args, config, fault)
    select(args.names, config.num_hidden_layers)  # or raise TraceError
    model = load_model(args.model, mesh, fault, **model_options(args))
    with torch.inference_mode():
        prompt = torch.tensor([ids], device=model.device)
        _, seen = model.run_with_cache(prompt, args.names, to="cpu")
    first = {name: x[0] for name, x in seen.items()}
    return Traced(first, ids, text, dtype_name("the model's dtype", model.dtype))


def told_fault(args: argparse.Namespace, config: ModelConfig) -> Fault | None:
    """The mistake that the command asks for, told on stderr; MinqwenError if there is none such."""
    fault = chosen_fault(args, config)
    if fault is None:
        return None
    if fault.report is not None:
        raise MinqwenError(
            f"--fault {fault.name} is in what is reported of the logits: no trace shows it"
        )
    if is_first_rank():
        place = "model" if fault.in_model else "tokens"
        print(f"mistake in the {place}: {fault.name}. {fault.symptom}", file=sys.stderr)
    return fault


def show(args: argparse.Namespace) -> None:
    traced = compute(args)
    rows: list[tuple[str, ...]] = [("name", "shape", "mean", "std", "max |x|")]
    for name, x in traced.seen.items():
        rows.append((name, str(list(x.shape)), *(f"{number:.5f}" for number in spread(x))))
    if is_first_rank():
        print_table(rows)


def spread(x: Tensor) -> tuple[float, float, float]:
    """Mean, standard deviation and largest magnitude of the finite numbers; nan where none are."""
    finite = x.double()[x.isfinite()]
    if not finite.numel():
        return math.nan, math.nan, math.nan
    std = finite.std().item() if finite.numel() > 1 else 0.0
    return finite.mean().item(), std, finite.abs().max().item()


def save(args: argparse.Namespace) -> None:
    check_writable(args.out, "OUT.safetensors")
    traced = compute(args)
    if is_first_rank():
        save_tensors(Path(args.out), traced.seen, MinqwenError, metadata(traced, args))


def metadata(traced: Traced, args: argparse.Namespace) -> dict[str, str]:
    """What a saved file says of itself; lists and objects are JSON."""
    given = {} if traced.text is None else {"text": traced.text}
    if args.num_attention_heads is not None or args.num_key_value_heads is not None:
        given["heads"] = json.dumps(heads_options(args))
    if args.fault is not None:
        given["fault"] = args.fault
    return given | {
        "format": "pt",
        "ids": json.dumps(traced.ids),
        "dtype": traced.dtype,
        "arithmetic": args.arithmetic,
        "model": str(args.model),
        "sha256": json.dumps(file_digests(Path(args.model))),
    }


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_flags(parser.add_command("points", help="print the table of points"))
    parser.add_command("faults", help="print the catalogue of mistakes")
    for name, what, out in (
        ("show", "print size and spread of intermediates", None),
        ("save", "write intermediates to a safetensors file", "OUT.safetensors"),
        ("plot", "draw patterns, logit lens and heads on one HTML page", "OUT.html"),
    ):
        command = parser.add_command(name, help=what)
        prompt_flags(command)
        if out is not None:
            command.add_argument("out", metavar=out)
        if name == "plot":
            layers_flag(command)
        else:
            names_flag(command)
        model_flags(command)
    args: argparse.Namespace = parser.parse_args()
    if args.command in ("show", "save", "plot"):
        check_prompt(parser, args)
    return args


def names_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--names",
        nargs="+",
        default=["*.resid_post", "final_norm", "logits"],
        metavar="NAME",
        help="names or patterns, ours or TransformerLens's",
    )


def layers_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--layers",
        nargs="+",
        type=int,
        metavar="N",
        help="layers whose attention patterns are drawn (default: all)",
    )


def main() -> int:
    args = parse()
    commands = {
        "points": print_points,
        "faults": print_faults,
        "show": show,
        "save": save,
        "plot": plot,
    }
    commands[args.command](args)
    return 0


if __name__ == "__main__":
    run(main)
