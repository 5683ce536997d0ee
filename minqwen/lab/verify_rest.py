"""The weights that have nothing to do with heads: embedding, norms, MLP and lm_head must be A's.

A text shows nothing of the embedding's rows for tokens that it does not hold. So these weights are
compared themselves, row by row, a few at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minqwen.checkpoint import Checkpoint
from minqwen.heads.tensors import HEAD_TENSORS, suffix
from minqwen.parallel import Shard

PIECE = 1 << 22  # elements of a tensor that are compared at a time
ROUNDED = 2.0**-8  # relative error of a row up to which it is A's in another dtype, bfloat16 too


def differing_weights(a: Checkpoint, b: Checkpoint) -> list[str]:
    """A line for each tensor that heads do not concern and that is not A's in B."""
    found = []
    for name in _in_both(a, b):
        if a.shape(name) == b.shape(name) and (wrong := _wrong_rows(a, b, name)):
            where = f" in {len(wrong):,} of {a.shape(name)[0]:,} rows, the first is {wrong[0]}"
            found.append(f"{name} is not the original's{where if len(a.shape(name)) > 1 else ''}")
    return found


def not_compared(a: Checkpoint, b: Checkpoint) -> list[str]:
    """What `differing_weights` cannot say, because B has another size there."""
    others = [name for name in _in_both(a, b) if a.shape(name) != b.shape(name)]
    if not others:
        return []
    return [
        f"{len(others)} tensors have other sizes, the first is {others[0]}: only outputs are "
        "compared for these"
    ]


def _in_both(a: Checkpoint, b: Checkpoint) -> list[str]:
    names = [name for name in a.config.parameter_shapes() if name in b.tensors]
    return [name for name in names if suffix(name) not in HEAD_TENSORS]


def _wrong_rows(a: Checkpoint, b: Checkpoint, name: str) -> list[int]:
    wrong = []
    for start, own, other in _pieces(a, b, name):
        # "not <=", because a NaN is wrong too.
        right = (other - own).norm(dim=1) <= ROUNDED * own.norm(dim=1)
        wrong += [start + row for row in torch.nonzero(~right).flatten().tolist()]
    return wrong


def _pieces(a: Checkpoint, b: Checkpoint, name: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, rows of A, rows of B) in float64; a vector is one row."""
    shape = a.shape(name)
    if len(shape) == 1:
        own, other = (c.read(name, dtype=torch.float64) for c in (a, b))
        yield 0, own[None], other[None]
        return
    rows = max(1, PIECE // max(1, shape[1]))
    for start in range(0, shape[0], rows):
        part = Shard(0, start, min(start + rows, shape[0]))
        own, other = (c.read(name, part, torch.float64) for c in (a, b))
        yield start, own, other
