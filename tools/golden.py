#!/usr/bin/env python3
"""Numbers that any machine must reproduce, to the last bit.

python tools/golden.py fingerprint                    SHA-256 of the embedded model's exact logits
python tools/golden.py fingerprint MODEL --dtype float32
"""

from __future__ import annotations

import argparse

from minqwen.cli import EMBEDDED, Parser, heads_flags, heads_options, run
from minqwen.config import BYTES_PER_ELEMENT
from minqwen.lab.golden import fingerprint
from minqwen.parallel import Mesh


def print_fingerprints(args: argparse.Namespace) -> None:
    """One line for each dtype, from rank 0."""
    mesh = Mesh.from_env(args.device)
    for dtype in args.dtype:
        digest = fingerprint(args.model, dtype, mesh=mesh, **heads_options(args))
        if mesh.rank == 0:
            print(dtype, digest, flush=True)
    mesh.close()


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    args: argparse.Namespace = parser.parse_args()
    return args


def main() -> int:
    args = parse_args()
    args.do(args)
    return 0


if __name__ == "__main__":
    run(main)
