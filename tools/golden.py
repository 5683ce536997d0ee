#!/usr/bin/env python3
"""Numbers to compare with: golden packs, and one that any machine must reproduce to the last bit.

python tools/golden.py make OUT                       the embedded model on three prompts
python tools/golden.py make OUT --model DIR --prompt "In the beginning" --run float64
python tools/golden.py make OUT --model DIR --stream-layers --points "*.resid_post"
python tools/golden.py verify OUT                     compute it again and compare
python tools/golden.py fingerprint                    SHA-256 of the embedded model's exact logits
python tools/golden.py fingerprint MODEL --dtype float32

docs/golden.md says what a pack is. Exit code of verify: 0, the numbers are the pack's, in every bit
or to rounding; 1, they are not, or a file of the pack is damaged; 2, nothing could be compared.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from minqwen.cli import (  # before torch, for Ctrl-C
    EMBEDDED,
    Parser,
    heads_flags,
    heads_options,
    run,
)
from minqwen.config import BYTES_PER_ELEMENT
from minqwen.errors import PackError
from minqwen.files import lines_of, read_text
from minqwen.lab.golden import fingerprint
from minqwen.lab.packs.check import Checker, RunCheck
from minqwen.lab.packs.pack import Pack, PackPrompt
from minqwen.lab.packs.runs import RUNS
from minqwen.lab.packs.writer import DEFAULT_RUNS, DEFAULT_TOP_K, Recipe, check_replaceable, make
from minqwen.parallel import Mesh
from minqwen.tokenizer import Tokenizer

PROMPTS = (
    "In the beginning God created the heaven and the earth.",
    "What is 47 + 38?",
    "And the LORD spake unto Moses, saying, Speak unto all the congregation of the children of "
    "Israel, and say unto them, Ye shall be holy: for I the LORD your God am holy.",
)
MOST_SHOWN = 8  # points that differ, of each run


def print_fingerprints(args: argparse.Namespace) -> int:
    """One line for each dtype, from rank 0."""
    mesh = Mesh.from_env(args.device)
    for dtype in args.dtype:
        digest = fingerprint(args.model, dtype, mesh=mesh, **heads_options(args))
        if mesh.rank == 0:
            print(dtype, digest, flush=True)
    mesh.close()
    return 0


# ---- make ---------------------------------------------------------------------------------------


def make_pack(args: argparse.Namespace) -> int:
    refuse_torchrun()
    check_replaceable(args.out, args.overwrite)
    recipe = Recipe(
        model_dir=args.model,
        prompts=read_prompts(args),
        points=args.points,
        runs=tuple(args.run),
        top_k=0 if args.full_logits else args.top_k,
        streamed=args.stream_layers,
    )
    print_pack(make(args.out, recipe, args.overwrite))
    return 0


def refuse_torchrun() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PackError("a pack is computed by one process: start it without torchrun")


def read_prompts(args: argparse.Namespace) -> tuple[PackPrompt, ...]:
    """The prompts of the command line, or else the built-in ones."""
    if args.ids is not None:
        return tuple(PackPrompt(ids, None) for ids in args.ids)
    texts = args.prompt or PROMPTS
    if args.prompt_file is not None:
        texts = lines_of(read_text(args.prompt_file, PackError))
    tokenizer = Tokenizer.from_dir(args.model)
    return tuple(PackPrompt(tokenizer.encode(text), text) for text in texts)


def print_pack(pack: Pack) -> None:
    """What a pack holds, in two lines."""
    files = list(pack.path.iterdir())
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    lengths = ", ".join(str(len(prompt.ids)) for prompt in pack.prompts)
    logits = "whole rows" if pack.full_logits else f"{pack.top_k} of each row"
    print(f"{pack.path}: {len(files)} files, {megabytes:.1f} MB; runs {', '.join(pack.runs)}")
    print(f"prompts of {lengths} tokens; {len(pack.names)} points; logits: {logits}")


# ---- verify -------------------------------------------------------------------------------------


def verify_pack(args: argparse.Namespace) -> int:
    refuse_torchrun()
    pack = Pack.open(args.pack)
    damage = pack.damage()
    for line in damage:
        print(line)
    if damage:
        print(f"differs: {len(damage)} tensors are damaged")
        return 1
    checker = Checker(pack, args.model, args.stream_layers or None)
    print_pack(pack)
    print("made on this kind of machine" if checker.same_machine else "made on another machine")
    print(f"{'run':16} {'same bits':>9} {'rounding':>9} {'differ':>9}  most units")
    checks = []
    for name in pack.runs:
        checks.append(checker.check(name))
        print_check(checks[-1])
    bad = [check.run for check in checks if not check.good]
    print(f"differs: {', '.join(bad)}" if bad else "good: these are the numbers of the pack")
    return 1 if bad else 0


def print_check(check: RunCheck) -> None:
    """A row of the table, and the points that differ."""
    same, rounded = check.having("bitwise"), check.having("equal to rounding")
    different = check.having("different")
    row = f"{check.run:16} {len(same):9} {len(rounded):9} {len(different):9}"
    others = rounded + different
    if others:
        most = max(others, key=lambda point: point.units)
        row += f"  {most.units:.3g} at {most.name}"
    print(row, flush=True)
    for point in different[:MOST_SHOWN]:
        must = ", where every bit must be the same" if check.same_bits else ""
        print(f"    {point.name} differs by {point.units:.3g} units{must}")
    if len(different) > MOST_SHOWN:
        print(f"    and {len(different) - MOST_SHOWN} more points")


# ---- the command line ---------------------------------------------------------------------------


def integers(text: str) -> list[int]:
    """The ids of "1,2,3"."""
    return [int(part) for part in text.split(",")]


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_make(parser)
    add_verify(parser)
    add_fingerprint(parser)
    args: argparse.Namespace = parser.parse_args()
    return args


def add_make(parser: Parser) -> None:
    command = parser.add_command("make", help="write a golden pack")
    command.set_defaults(do=make_pack)
    command.add_argument("out", type=Path, metavar="OUT", help="the directory to write")
    command.add_argument(
        "--model",
        type=Path,
        default=EMBEDDED,
        metavar="DIR",
        help="a safetensors directory (default: the embedded model)",
    )
    prompts = command.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="default: three texts")
    prompts.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="a text file with a prompt on each line"
    )
    prompts.add_argument(
        "--ids", nargs="+", type=integers, metavar="ID,ID,...", help="token ids of each prompt"
    )
    command.add_argument(
        "--points",
        nargs="+",
        metavar="NAME",
        help="points to keep, as in tools/trace.py (default: all but attn.result); logits always",
    )
    command.add_argument(
        "--run",
        nargs="+",
        choices=list(RUNS),
        default=list(DEFAULT_RUNS),
        help=f"what to compute (default: {', '.join(DEFAULT_RUNS)})",
    )
    logits = command.add_mutually_exclusive_group()
    logits.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="keep the logits of K tokens of each row, and the row's SHA-256 (default: of all, or "
        f"of {DEFAULT_TOP_K} where the vocabulary is large)",
    )
    logits.add_argument("--full-logits", action="store_true", help="keep all, however many")
    command.add_argument("--overwrite", action="store_true", help="replace the pack that is there")
    stream_flag(command)


def add_verify(parser: Parser) -> None:
    command = parser.add_command("verify", help="compute a golden pack again and compare")
    command.set_defaults(do=verify_pack)
    command.add_argument("pack", type=Path, metavar="PACK", help="the pack's directory")
    command.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="where the pack's model is now (default: where it was)",
    )
    stream_flag(command)


def stream_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--stream-layers",
        action="store_true",
        help="read the model layer by layer: for one that is far larger than memory",
    )


def add_fingerprint(parser: Parser) -> None:
    command = parser.add_command("fingerprint", help="print the SHA-256 of exact logits")
    command.set_defaults(do=print_fingerprints)
    command.add_argument(
        "model", nargs="?", default=EMBEDDED, help="a safetensors directory (default: the embedded)"
    )
    command.add_argument(
        "--dtype",
        nargs="+",
        choices=["auto", *BYTES_PER_ELEMENT],
        default=["float32", "bfloat16"],
        help="of storage (default: float32 and bfloat16)",
    )
    command.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: GPUs if there is one for each rank"
    )
    heads_flags(command)


def main() -> int:
    args = parse_args()
    code: int = args.do(args)
    return code


if __name__ == "__main__":
    run(main)
