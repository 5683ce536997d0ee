"""What an engine said, and what is right, about the same tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minqwen.heads.view import open_weights
from minqwen.lab.audit.forced import (
    FAITHFUL,
    Forced,
    Rows,
    blocks_of,
    forced,
    rows_of,
    said,
    spreads,
)
from minqwen.lab.audit.printed import precision_of
from minqwen.lab.audit.records import Record
from minqwen.lab.compare import rms
from minqwen.lab.faults import Fault, build
from minqwen.model import Native, Qwen2
from minqwen.tokenizer import Tokenizer

BLOCK = 8  # places whose errors are taken to be alike
TIE = 8.0  # a margin of so many root mean squares of the margins' rounding is no tie


class Original:
    """The model that the engine is said to be: its config, tensors, and tokenizer if it has one.

    What models say of some tokens is remembered, so that the audit of a second engine by the same
    tokens is quick. Raises MinqwenError for a directory that cannot be loaded.
    """

    def __init__(self, path: str | Path):
        source = open_weights(path)
        source.check()
        self.path = Path(path)
        self.config = source.config
        self.weights = {name: source.read(name) for name in source.names}
        self.tokenizer = tokenizer_of(self.path)
        self._known: dict[Hashable, Forced] = {}

    def right(self, dtype: torch.dtype, ops: Native) -> Qwen2:
        return build(self.config, self.weights, dtype, ops)

    def wrong(self, fault: Fault, dtype: torch.dtype) -> Qwen2:
        return fault.model(self.config, self.weights, dtype=dtype)

    def remembered(
        self, what: Hashable, records: Sequence[Record], compute: Callable[[], Forced]
    ) -> Forced:
        """What `compute` gives, computed once for these tokens."""
        asked = [(r.ids, r.prompt, r.greedy, [e[:2] for e in r.entries]) for r in records]
        key = (what, repr(asked))
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


def tokenizer_of(path: Path) -> Tokenizer | None:
    names = ("tokenizer.json", "vocab.json", "tokenizer.model")
    return Tokenizer.from_dir(path) if any((path / name).exists() for name in names) else None


@dataclass(frozen=True)
class Evidence:
    """What the engine said, and what is right, about the same tokens.

    said, spread [n] as in audit_forced. blocks [n]. faithful: of several implementations in dtype.
    """

    records: list[Record]
    said: Tensor
    truth: Forced
    rows: list[Rows]
    faithful: list[Forced]
    spread: Tensor
    blocks: Tensor
    dtype: torch.dtype

    @property
    def tie(self) -> float:
        """A margin of logits up to which a faithful implementation may choose either token."""
        errors = [rms(each.leads - self.truth.leads) for each in self.faithful]
        return TIE * max(errors)

    @property
    def unit(self) -> Tensor:
        """The errors of the faithful implementations, weighed. [F, n]"""
        return torch.stack([self.weighed(f.values - self.truth.values) for f in self.faithful])

    @property
    def error(self) -> Tensor:
        """The engine's, weighed. [n]"""
        return self.weighed(self.said - self.truth.values)

    def weighed(self, error: Tensor) -> Tensor:
        """Over the spread, so that sure and unlikely tokens count alike."""
        return error / self.spread


def gather_evidence(
    original: Original, records: list[Record], dtype: torch.dtype, has_numbers: bool = True
) -> Evidence:
    """The truth, and what faithful implementations say, rounded as the engine's numbers are."""
    if not has_numbers:
        records = [dataclasses.replace(record, entries=()) for record in records]
    numbers = said(records)
    rows = list(rows_of(original.right(torch.float64, FAITHFUL[0]()), records))
    printed = precision_of(numbers)
    faithful = []
    for ops in FAITHFUL:
        exact = faithful_of(original, records, dtype, ops)
        faithful.append(dataclasses.replace(exact, values=printed.round(exact.values)))
    return Evidence(
        records=records,
        said=numbers,
        truth=forced(rows),
        rows=rows,
        faithful=faithful,
        spread=spreads(rows) if has_numbers else numbers,
        blocks=blocks_of(records, BLOCK),
        dtype=dtype,
    )


def faithful_of(
    original: Original, records: list[Record], dtype: torch.dtype, ops: type[Native]
) -> Forced:
    def compute() -> Forced:
        return forced(rows_of(original.right(dtype, ops()), records))

    return original.remembered((ops.__name__, dtype), records, compute)
