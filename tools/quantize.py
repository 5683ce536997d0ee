#!/usr/bin/env python3
"""Quantise a checkpoint: weights in 4 or 8 bits, in the layout of AWQ or GPTQ, without calibration.

  python tools/quantize.py SRC DST --bits 4                  gptq, symmetric, groups of 128
  python tools/quantize.py SRC DST --bits 4 --layout awq     asymmetric: a smaller error
  python tools/quantize.py SRC DST --bits 8 --report         and say what it costs, on a text

docs/quantised.md says how the numbers are found, and what reads them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minqwen.checkpoint.quantise import LAYOUTS, packing_for, quantise
from minqwen.cli import Parser, read_flag, run
from minqwen.errors import MinqwenError
from minqwen.lab.quantisation import Loss, by_kind, measure_loss
from minqwen.tokenizer import Tokenizer

TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and "
    "void; and darkness was upon the face of the deep. And the Spirit of God moved upon the face "
    "of the waters. And God said, Let there be light: and there was light."
)
MOST_TOKENS = 512  # of the text of a report


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="an unquantised checkpoint")
    parser.add_argument("dst", help="the directory to write")
    parser.add_argument("--bits", type=int, choices=(4, 8), required=True, help="of a weight")
    parser.add_argument("--layout", choices=LAYOUTS, default="gptq", help="default: gptq")
    parser.add_argument(
        "--group-size", type=int, default=128, metavar="N", help="inputs to a scale (default 128)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in DST")
    parser.add_argument(
        "--report", action="store_true", help="compare both models' logits on a text"
    )
    parser.add_argument(
        "--text", metavar="FILE", help=f"that of --report: its first {MOST_TOKENS} tokens"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args: argparse.Namespace = parser.parse_args()
    if args.text and not args.report:
        parser.error("--text is the text of --report: add that")
    return args


def main() -> int:
    args = parse_args()
    packing = packing_for(args.bits, args.layout, args.group_size)
    ids = read_ids(args) if args.report else None
    errors = quantise(
        args.src,
        args.dst,
        bits=args.bits,
        layout=args.layout,
        group_size=args.group_size,
        progress=True,
        overwrite=args.overwrite,
    )
    loss = None if ids is None else measure_loss(args.src, args.dst, ids)
    if args.json:
        print(json.dumps(as_json(args, errors, loss), indent=1))
        return 0
    before, after = weight_bytes(args.src), weight_bytes(args.dst)
    print(
        f"{args.dst}: {packing}; {after:,} bytes of weights, {after / before:.0%} of the source's"
    )
    print("relative error of the weights (root mean square over all layers)")
    for kind, error in by_kind(errors).items():
        print(f"  {kind:<10} {error:.4f}")
    if loss is not None:
        show(loss)
    return 0


def read_ids(args: argparse.Namespace) -> list[int]:
    """The ids of the report's text."""
    text = read_flag("--text", args.text) if args.text else TEXT
    ids = Tokenizer.from_dir(args.src).encode(text)[:MOST_TOKENS]
    if len(ids) < 2:
        raise MinqwenError(
            f"--text {args.text}: has {len(ids)} tokens, expected at least 2, so that one can be "
            "predicted"
        )
    return ids


def weight_bytes(directory: str) -> int:
    return sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))


def show(loss: Loss) -> None:
    found = loss.difference
    print(
        f"logits on {loss.tokens} tokens, both models in float64\n"
        f"  KL divergence       {found.kl:.6f} nats a token\n"
        f"  perplexity          {found.perplexity_ratio:.4f} of the source's\n"
        f"  same likeliest      {found.top1:.1%} of the positions\n"
        f"  largest difference  {found.max_abs:.4f}\n"
        f"  error               {loss.units:.2f} units, each the error that {loss.dtype} makes "
        f"in the source ({loss.unit:.3g})"
    )


def as_json(
    args: argparse.Namespace, errors: dict[str, float], loss: Loss | None
) -> dict[str, Any]:
    return {
        "bits": args.bits,
        "layout": args.layout,
        "group_size": args.group_size,
        "weight_bytes": {"source": weight_bytes(args.src), "target": weight_bytes(args.dst)},
        "relative_errors": errors,
        "loss": None if loss is None else asdict(loss),
    }


if __name__ == "__main__":
    run(main)
