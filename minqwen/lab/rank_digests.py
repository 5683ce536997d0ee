"""Prints the digests of a model's float32 logits on the ranks that torchrun starts.

torchrun ... -m minqwen.lab.rank_digests DIR cpu|cuda: one line for exact arithmetic, one for
native.
"""

from __future__ import annotations

import sys

from minqwen.lab.golden import fingerprint
from minqwen.parallel import Mesh

ARITHMETICS = ("exact", "native")


def main() -> None:
    path, device = sys.argv[1:]
    mesh = Mesh.from_env(device)
    for arithmetic in ARITHMETICS:
        found = fingerprint(path, "float32", arithmetic, mesh=mesh)
        if mesh.rank == 0:
            print(arithmetic, found, flush=True)


if __name__ == "__main__":
    main()
