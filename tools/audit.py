#!/usr/bin/env python3
"""Is an engine that can only be asked the model that it says it is?

python tools/audit.py http://127.0.0.1:8000 --model DIR       an OpenAI-compatible endpoint
python tools/audit.py --jsonl ROLLOUT.jsonl --model DIR       what a trainer or an engine wrote
python tools/audit.py --pairs TRAINER.jsonl ROLLOUT.jsonl --model DIR     which side is wrong?

Exit code 0: it agrees; 1: it diverges; 2: nothing can be said. docs/audit.md says what to send.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from minqwen.checks import integer, number  # before torch, for Ctrl-C
from minqwen.cli import EMBEDDED, Parser, check_writable, run
from minqwen.errors import MinqwenError
from minqwen.files import read_text, write_text
from minqwen.lab.audit.audit import CLAIMS, Report, audit
from minqwen.lab.audit.client import Endpoint, Limits, base_of
from minqwen.lab.audit.endpoint import audit_endpoint
from minqwen.lab.audit.evidence import Original
from minqwen.lab.audit.explain import Among
from minqwen.lab.audit.page import as_html, as_text, pair_as_html, pair_as_text
from minqwen.lab.audit.pairs import Pair, audit_pair
from minqwen.lab.audit.questions import TEXT
from minqwen.lab.audit.records import at_most, read_jsonl

CODES = {"agree": 0, "diverge": 1, "refused": 2}


def of_endpoint(args: argparse.Namespace, among: Among) -> Report:
    limits = Limits(
        integer("--max-requests", args.max_requests, 1, error=MinqwenError),
        number("--timeout", args.timeout, error=MinqwenError),
        integer("--max-bytes", args.max_bytes, 1, error=MinqwenError),
    )
    base_of(args.url)  # or raise MinqwenError, before a weight is read
    text = TEXT if args.text is None else read_text(Path(args.text), MinqwenError)
    original = Original(args.model)
    endpoint = Endpoint(args.url, os.environ.get(args.key_variable), limits)
    return audit_endpoint(
        endpoint, original, args.claimed_dtype, name=args.name, text=text, among=among
    )


def of_file(args: argparse.Namespace, among: Among) -> Report:
    original = Original(args.model)
    records = at_most(read_jsonl(Path(args.jsonl), original.config), args.tokens)
    return audit(original, records, args.claimed_dtype, among=among)


def of_pair(args: argparse.Namespace, among: Among) -> Pair:
    original = Original(args.model)
    trainer, rollout = (read_jsonl(Path(path), original.config) for path in args.pairs)
    count = len(at_most(trainer, args.tokens))
    if len(trainer) == len(rollout):
        trainer, rollout = trainer[:count], rollout[:count]
    return audit_pair(original, trainer, rollout, args.claimed_dtype, among=among)


def title_of(args: argparse.Namespace) -> str:
    if args.pairs:
        return " and ".join(Path(path).name for path in args.pairs)
    return args.url or Path(args.jsonl).name


def finite(value: Any) -> Any:
    """The value with null in the place of infinity and NaN, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", metavar="URL", help="an OpenAI-compatible endpoint")
    parser.add_argument("--jsonl", metavar="FILE", help="records, one JSON object in a line")
    parser.add_argument("--pairs", nargs=2, metavar=("TRAINER", "ROLLOUT"), help="two such files")
    parser.add_argument(
        "--model",
        default=str(EMBEDDED),
        metavar="DIR",
        help="the model that it should be (default: the embedded model)",
    )
    parser.add_argument("--claimed-dtype", default="bfloat16", choices=CLAIMS)
    parser.add_argument("--json", metavar="FILE", help="write the report there, as JSON")
    parser.add_argument("--html", metavar="FILE", help="write the report there, as one page")
    parser.add_argument(
        "--tokens", type=int, default=2048, help="of the files, judge about so many (default: 2048)"
    )
    parser.add_argument(
        "--no-hypotheses",
        action="store_true",
        help="do not try the catalogue of mistakes: quick, and blind to what rounding hides",
    )
    group = parser.add_argument_group("endpoint")
    group.add_argument("--name", help="the model's name there (default: the first that it lists)")
    group.add_argument("--text", metavar="FILE", help="a text to ask about (default: our own)")
    group.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="the environment variable that holds the key (default: OPENAI_API_KEY)",
    )
    group.add_argument("--max-requests", type=int, default=Limits.requests)
    group.add_argument("--timeout", type=float, default=Limits.seconds, help="seconds, in all")
    group.add_argument("--max-bytes", type=int, default=Limits.bytes, help="of answers, in all")
    args: argparse.Namespace = parser.parse_args()
    if sum(given is not None for given in (args.url, args.jsonl, args.pairs)) != 1:
        parser.error("what is to be audited? give one of URL, --jsonl FILE, --pairs FILE FILE")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", args.key_variable):
        parser.error("--key-variable is the NAME of an environment variable, not the key itself")
    return args


def main() -> int:
    args = parse_args()
    for flag, path in (("--json", args.json), ("--html", args.html)):
        if path is not None:
            check_writable(path, flag)
    among: Among = "none" if args.no_hypotheses else "all"
    found: Report | Pair
    if args.pairs:
        pair = found = of_pair(args, among)
        text, page = pair_as_text(pair), pair_as_html(pair, title_of(args))
    else:
        report = found = of_endpoint(args, among) if args.url else of_file(args, among)
        text, page = as_text(report), as_html(report, title_of(args))
    print(text)
    if args.json is not None:
        told = json.dumps(finite(found.as_json()), indent=1, ensure_ascii=False)
        write_text(Path(args.json), told + "\n", MinqwenError)
    if args.html is not None:
        write_text(Path(args.html), page, MinqwenError)
    return CODES[found.verdict]


if __name__ == "__main__":
    run(main)
