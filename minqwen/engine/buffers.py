"""What a captured step reads, the sizes that are captured, and how a CUDA graph is made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from minqwen.engine.scheduler import Scheduled
from minqwen.errors import is_first_rank
from minqwen.model.steps import Blocks

NUMBERS = 6  # of each sequence, see `Buffers`
WARM_UPS = 2  # runs before a graph is captured: they compile, and libraries take their memory
Graph = tuple[torch.cuda.CUDAGraph, Tensor]  # and the logits that it writes


class Buffers:
    """What a captured step reads, on the device, and what fills it from here.

    tables [sequences, most blocks] and numbers [NUMBERS, sequences], int32: the new id, its
    position, its slot, how many blocks the sequence has, the last of them, and how many of its
    tokens are there. A step smaller than its graph is filled up with its last sequence again.

    There is room for the largest of `sizes`, numbers of sequences, and each has room for `blocks`.
    """

    def __init__(self, sequences: int, blocks: int, block_size: int, device: torch.device):
        self.block_size = block_size
        self.sizes = ladder(sequences)
        most = self.sizes[-1]
        pinned: dict[str, Any] = {"pin_memory": device.type == "cuda", "dtype": torch.int32}
        self.numbers_here = torch.zeros(NUMBERS, most, **pinned)
        self.tables_here = torch.zeros(most, blocks, **pinned)
        self.numbers, self.tables = (
            torch.zeros_like(x, device=device, pin_memory=False)
            for x in (self.numbers_here, self.tables_here)
        )
        self.rows: list[list[int]] = [[] for _ in range(most)]  # what `tables_here` holds

    def size_for(self, sequences: int) -> int:
        """The smallest size that has room for so many."""
        return next(size for size in self.sizes if size >= sequences)

    def fill(self, step: Sequence[Scheduled], count: int) -> None:
        """Put the step's sequences, `count` with the repeated ones, on the device."""
        padded = [*step, *[step[-1]] * (count - len(step))]
        here = [self._numbers(item) for item in padded]
        self.numbers_here[:, :count] = torch.tensor(here, dtype=torch.int32).T
        self.numbers.copy_(self.numbers_here, non_blocking=True)
        changed = [self.put(i, item.completion.blocks) for i, item in enumerate(padded)]
        if any(changed):
            self.tables[:count].copy_(self.tables_here[:count], non_blocking=True)

    def _numbers(self, item: Scheduled) -> tuple[int, ...]:
        place, blocks = item.end - 1, item.completion.blocks
        block, offset = divmod(place, self.block_size)
        slot = blocks[block] * self.block_size + offset
        return item.completion.ids[place], place, slot, block + 1, blocks[block], offset + 1

    def put(self, row: int, blocks: list[int]) -> bool:
        """Have these blocks in a row; whether they were not there."""
        known = self.rows[row]
        if known == blocks:
            return False
        start = len(known) if known == blocks[: len(known)] else 0
        self.tables_here[row, start : len(blocks)] = torch.tensor(blocks[start:])
        self.rows[row] = blocks.copy()
        return True

    def of(self, count: int) -> tuple[Tensor, Tensor, Tensor, Blocks]:
        """Ids, positions, slots [count] and blocks of the first `count` sequences."""
        ids, positions, slots, counts, last, filled = self.numbers[:, :count]
        blocks = Blocks(self.tables[:count], counts, last, filled, self.block_size)
        return ids, positions, slots.long(), blocks


def ladder(most: int) -> list[int]:
    """1, 2, 4, ... up to the first that is at least `most`."""
    return [1 << i for i in range((most - 1).bit_length() + 1)]


def captured(decode: Callable[[], Tensor], device: torch.device, others: Iterable[Graph]) -> Graph:
    """A CUDA graph of `decode`, which shares its memory with those that were made before."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            decode()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    pool = next((other.pool() for other, _ in others), None)
    with torch.cuda.graph(graph, pool=pool):
        logits = decode()
    return graph, logits


def announce(what: str) -> None:
    """Say why the first step of a size takes long."""
    if is_first_rank() and sys.stderr is not None:
        print(f"note: {what}, once", file=sys.stderr, flush=True)


def sequences(count: int) -> str:
    return "one sequence" if count == 1 else f"{count} sequences"
