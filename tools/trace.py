#!/usr/bin/env python3
"""Look at a model's intermediates.

python tools/trace.py points                  every point: name, shape, dtype, other name
python tools/trace.py show "In the beginning" --names "*.attn.z" "final_norm"
python tools/trace.py show "What is 47 + 38?" --chat
python tools/trace.py save "In the beginning" OUT.safetensors --names "*.resid_post"
python tools/trace.py save OUT.safetensors --ids 5,300,17 --names "*"
python tools/trace.py faults                  every mistake that --fault can put into the model
python tools/trace.py show "In the beginning" --fault rope-interleaved

A saved file says in its metadata what it is of: ids, text, dtype, arithmetic, model, and the
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

from minqwen import Checkpoint, Mesh, ModelConfig, Qwen2, Tokenizer  # before torch, for Ctrl-C

# isort: split
import torch
from safetensors.torch import save_file
from torch import Tensor

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
from minqwen.lab.faults import FAULTS, Fault, find
from minqwen.lab.faults.load import load_mistaken
from minqwen.lab.golden import file_digests
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
    fault = chosen_fault(args, config)
    ids, text = read_input(args, config, fault)
    select(args.names, config.num_hidden_layers)  # or raise TraceError
    model = load_model(args, mesh, fault)
    with torch.inference_mode():
        prompt = torch.tensor([ids], device=model.device)
        _, seen = model.run_with_cache(prompt, args.names, to="cpu")
    first = {name: x[0] for name, x in seen.items()}
    return Traced(first, ids, text, dtype_name("the model's dtype", model.dtype))


def chosen_fault(args: argparse.Namespace, config: ModelConfig) -> Fault | None:
    """The mistake that the command asks for, told on stderr; MinqwenError if there is none such."""
    if args.fault is None:
        return None
    fault = find(args.fault)
    if fault.report is not None:
        raise MinqwenError(
            f"--fault {fault.name} is in what is reported of the logits: no trace shows it"
        )
    if fault.encode is not None and not args.chat:
        raise MinqwenError(f"--fault {fault.name} is in the tokens of a chat: add --chat")
    fault.check(config)
    if is_first_rank():
        print(f"mistake in the {place(fault)}: {fault.name}. {fault.symptom}", file=sys.stderr)
    return fault


def place(fault: Fault) -> str:
    return "model" if fault.in_model else "tokens"


def load_model(args: argparse.Namespace, mesh: Mesh, fault: Fault | None) -> Qwen2:
    if fault is None or not fault.in_model:
        return Qwen2.from_pretrained(args.model, mesh=mesh, **model_options(args))
    return load_mistaken(fault, args.model, mesh=mesh, **model_options(args))


def read_input(
    args: argparse.Namespace, config: ModelConfig, fault: Fault | None
) -> tuple[list[int], str | None]:
    """The ids to look at, and their text if it was given."""
    if args.ids is not None:
        wrong = [id for id in args.ids if not 0 <= id < config.vocab_size]
        if wrong:
            raise MinqwenError(f"--ids has {wrong[0]}, expected 0 to {config.vocab_size - 1}")
        return args.ids, None
    tokenizer, text = Tokenizer.from_dir(args.model), args.text
    chat = [{"role": "user", "content": text}]
    if fault is not None and fault.encode is not None:
        ids = fault.ids(tokenizer, chat)
        return ids, tokenizer.decode(ids)
    if args.chat:
        text = tokenizer.apply_chat_template(chat)
    ids = tokenizer.encode(text, add_special_tokens=not args.chat)
    if not ids:
        raise MinqwenError("the text has no tokens: give at least one")
    return ids, text


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
        save_file(dict(traced.seen), args.out, metadata=metadata(traced, args))


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


def integers(text: str) -> list[int]:
    """The ids of "1,2,3"."""
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_flags(parser.add_command("points", help="print the table of points"))
    parser.add_command("faults", help="print the catalogue of mistakes")
    for name, what in (
        ("show", "print size and spread of intermediates"),
        ("save", "write intermediates to a safetensors file"),
    ):
        command = parser.add_command(name, help=what)
        command.add_argument("text", nargs="?")
        if name == "save":
            command.add_argument("out", metavar="OUT.safetensors")
        command.add_argument(
            "--names",
            nargs="+",
            default=["*.resid_post", "final_norm", "logits"],
            metavar="NAME",
            help="names or patterns, ours or TransformerLens's",
        )
        command.add_argument("--chat", action="store_true", help="the text is a user's message")
        command.add_argument(
            "--ids", type=integers, metavar="ID,ID,...", help="token ids in place of the text"
        )
        command.add_argument(
            "--fault",
            metavar="NAME",
            help="a mistake to put into the model, from the catalogue: trace.py faults",
        )
        model_flags(command)
    args: argparse.Namespace = parser.parse_args()
    if args.command in ("show", "save"):
        check_input(parser, args)
    return args


def check_input(parser: Parser, args: argparse.Namespace) -> None:
    """Exit unless there is one text, or ids in its place."""
    if args.ids is None and args.text is None:
        parser.error("nothing to look at: give a text, or token ids as in --ids 5,300,17")
    if args.ids is not None and args.text is not None:
        parser.error("--ids and a text: give one of them")
    if args.ids is not None and args.chat:
        parser.error("--chat makes a prompt of a text: --ids is one already")


def main() -> int:
    args = parse()
    commands = {"points": print_points, "faults": print_faults, "show": show, "save": save}
    commands[args.command](args)
    return 0


if __name__ == "__main__":
    run(main)
