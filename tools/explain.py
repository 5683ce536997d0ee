#!/usr/bin/env python3
"""Show what happens in one forward pass: each operation, its code, its numbers, who reads whom.

python tools/explain.py "In the beginning God created the"
python tools/explain.py "In the beginning" --layer 3              the last layer in every detail
python tools/explain.py "What is 47 + 38?" --chat --html page.html    to open in class
python tools/explain.py "In the beginning God" --fault rope-interleaved --html page.html

With --fault a mistake is put into the model (`tools/trace.py faults` lists them), and what it
changes is shown beside what is right. docs/lesson.md is a lesson of 45 minutes with this.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from minqwen import Mesh, ModelConfig  # before torch, for Ctrl-C
from minqwen.checks import integer
from minqwen.cli import Parser, check_writable, model_flags, model_options, run
from minqwen.errors import MinqwenError, is_first_rank
from minqwen.files import write_text
from minqwen.lab.explain import contrast_page, contrast_text
from minqwen.lab.explain import page as explain_page
from minqwen.lab.explain import text as explain_text
from minqwen.lab.explain.contrast import Contrast, contrast
from minqwen.lab.explain.explain import BLOCK_SIZE, Explanation, explain
from minqwen.lab.faults import HEAD_FAULTS, Fault
from minqwen.lab.prompt import (
    check_prompt,
    chosen_fault,
    load_model,
    name_of,
    prompt_flags,
    read_prompt,
    speller,
)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    prompt_flags(parser)
    parser.add_argument("--html", metavar="FILE", help="write a page to this file")
    parser.add_argument("--json", metavar="FILE", help="write all that is shown to this file")
    parser.add_argument(
        "--layer", type=int, default=0, metavar="N", help="the layer to show in detail (default: 0)"
    )
    parser.add_argument(
        "--block-size",
        type=int,
        default=BLOCK_SIZE,
        metavar="N",
        help=f"tokens in a block of the KV cache (default: {BLOCK_SIZE}; the engine has 16)",
    )
    model_flags(parser)
    args: argparse.Namespace = parser.parse_args()
    check_prompt(parser, args)
    return args


def check(args: argparse.Namespace, config: ModelConfig) -> None:
    """Raise MinqwenError for options that cannot be, before a weight is read."""
    for flag, path in (("--html", args.html), ("--json", args.json)):
        if path is not None:
            check_writable(path, flag)
    integer("--block-size", args.block_size, 1)
    layers = config.num_hidden_layers
    if not 0 <= args.layer < layers:
        raise MinqwenError(f"--layer is {args.layer}, expected 0 to {layers - 1}")
    if args.fault in HEAD_FAULTS:
        raise MinqwenError(
            f"--fault {args.fault} is a wrong way to add heads: `tools/heads.py demo` shows it"
        )


def main() -> int:
    args = parse()
    mesh = Mesh.from_env(args.device)
    config = ModelConfig.from_json(args.model)
    check(args, config)
    fault = chosen_fault(args, config)
    if fault is None:
        told = tell_one(args, config, mesh)
        text, page = explain_text.as_text(told, args.layer), explain_page.as_html(told)
        found: Explanation | Contrast = told
    else:
        both = tell_both(args, config, mesh, fault)
        text, page, found = contrast_text.as_text(both), contrast_page.as_html(both), both
    if is_first_rank():
        print(text)
        if args.html is not None:
            write_text(Path(args.html), page, MinqwenError)
        if args.json is not None:
            told_as_json = json.dumps(plain(dataclasses.asdict(found)), indent=1, allow_nan=False)
            write_text(Path(args.json), told_as_json + "\n", MinqwenError)
    return 0


def tell_one(args: argparse.Namespace, config: ModelConfig, mesh: Mesh) -> Explanation:
    ids, _ = read_prompt(args, config, None)
    spell = speller(args)
    model = load_model(args.model, mesh, None, **model_options(args))
    return explain(model, ids, spell, name_of(args), args.block_size)


def tell_both(args: argparse.Namespace, config: ModelConfig, mesh: Mesh, fault: Fault) -> Contrast:
    right_ids, _ = read_prompt(args, config, None)
    wrong_ids, _ = read_prompt(args, config, fault)
    spell = speller(args)
    wrong = load_model(args.model, mesh, fault, **model_options(args))
    right = wrong
    if fault.in_model:
        right = load_model(args.model, mesh, None, **model_options(args))
    return contrast(fault, right, wrong, right_ids, wrong_ids, spell, name_of(args))


def plain(value: Any) -> Any:
    """What JSON knows: infinities and NaN become texts."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    run(main)
