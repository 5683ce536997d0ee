#!/usr/bin/env python3
"""Is another engine right? If not, where does it go wrong first, and by what mistake?

python tools/diff.py PACK CANDIDATE                     a table of points, and one sentence
python tools/diff.py PACK CANDIDATE --html report.html  and a page with heat maps

PACK is a directory of tools/golden.py make, CANDIDATE one that minqwen/lab/dump.py wrote in the
other engine, or a directory of .npy, .npz or .safetensors files. Exit code: 0 it agrees, 1 it
diverges, 2 it cannot be compared. docs/diff.md says how to read the report.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path

from minqwen import Checkpoint, Tokenizer  # before torch, for Ctrl-C

# isort: split
from minqwen.cli import Parser, check_writable, run
from minqwen.errors import MinqwenError, TokenizerError
from minqwen.files import write_text
from minqwen.lab.diff.diagnosis import examine, named_tokens
from minqwen.lab.diff.diff import Report, UnknownPrompt, as_json, refused_as_json
from minqwen.lab.diff.dumps import Dump
from minqwen.lab.diff.page import as_html, as_text
from minqwen.lab.packs.pack import Pack


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", metavar="PACK", help="a golden pack: what is right")
    parser.add_argument("candidate", metavar="CANDIDATE", help="what the other engine computed")
    parser.add_argument(
        "--model", metavar="DIR", help="the model's directory (default: what the pack says)"
    )
    parser.add_argument("--json", metavar="F", help="write the report there as JSON")
    parser.add_argument("--html", metavar="F", help="write the report there as one page")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read .pt files too, by torch's weights-only loading",
    )
    args: argparse.Namespace = parser.parse_args()
    return args


def compared(args: argparse.Namespace) -> Report:
    """The report. Raises MinqwenError if nothing can be compared."""
    pack = Pack.open(args.pack)
    dump = Dump.open(args.candidate, pack.config, allow_pickle=args.allow_pickle)
    directory = pack.check_model(args.model)
    try:
        return examine(pack, dump, Checkpoint(directory))
    except UnknownPrompt as error:
        with contextlib.suppress(TokenizerError):  # a model without a tokenizer
            named = named_tokens(pack, error.ids, Tokenizer.from_dir(directory))
            if named is not None:
                return named
        raise


def text_of(args: argparse.Namespace) -> Callable[[int], str]:
    """A token's text, or its id where the model has no tokenizer."""
    pack = Pack.open(args.pack)
    try:
        tokenizer = Tokenizer.from_dir(pack.model_dir if args.model is None else args.model)
    except TokenizerError:
        return str
    return lambda id: tokenizer.decode([id])


def main() -> int:
    args = parse()
    for path, flag in ((args.json, "--json"), (args.html, "--html")):
        if path is not None:
            check_writable(path, flag)
    try:
        report = compared(args)
    except MinqwenError as error:
        if args.json is not None:
            write_text(Path(args.json), refused_as_json(str(error)), MinqwenError)
        raise
    if args.json is not None:
        write_text(Path(args.json), as_json(report), MinqwenError)
    if args.html is not None:
        title = f"{Path(args.candidate).name} against {Path(args.pack).name}"
        write_text(Path(args.html), as_html(report, title, text_of(args)), MinqwenError)
    print(as_text(report))
    return 0 if report.verdict == "agree" else 1


if __name__ == "__main__":
    run(main)
