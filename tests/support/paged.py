"""Sequences through a cache of scattered blocks, a chunk of some of them in every step."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minqwen import Batch, Qwen2

Chunk = Callable[[int, int], int]  # (sequence, tokens of it that are done) -> how many more


def whole(i: int, done: int) -> int:
    """Every sequence in one step."""
    return 10**9


def random_chunks(seed: int, largest: int = 10**9) -> Chunk:
    """Decodes, chunks and whole prompts, mixed."""
    draw = random.Random(seed)
    return lambda i, done: min(draw.choice([1, 1, 2, 5, 50, 10**9]), largest)


def run_paged(
    model: Qwen2,
    sequences: Sequence[Tensor],
    block_size: int = 16,
    chunk: Chunk = whole,
    seed: int = 0,
    *,
    shuffled: bool = False,
    stale: float | None = None,
) -> list[Tensor]:
    """Logits of every token of every sequence [T_i, V].

    Every step brings `chunk(i, done)` tokens of each sequence, or, if `shuffled`, of some of them
    in a random order. Blocks are handed out in no order; they held `stale` before, or rubbish, and
    block tables are padded with any block.
    """
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    needed = [-(-len(ids) // block_size) for ids in sequences]
    num_blocks = sum(needed) + 3
    cache = model.new_cache(num_blocks, block_size)
    if stale is None:
        cache.pool.normal_(generator=generator).mul_(100)
    else:
        cache.pool.fill_(stale)
    some = torch.randperm(num_blocks, generator=generator)[: sum(needed)]
    tables = [own.tolist() for own in some.split(needed)]
    done: list[int] = [0] * len(sequences)
    logits: list[list[Tensor]] = [[] for _ in sequences]
    while step := [i for i, ids in enumerate(sequences) if done[i] < len(ids)]:
        if shuffled:
            step = draw.sample(step, draw.randint(1, len(step)))
        counts = [min(chunk(i, done[i]), len(sequences[i]) - done[i]) for i in step]
        ends = [done[i] + n for i, n in zip(step, counts)]
        batch = Batch.paged(counts, ends, [tables[i] for i in step], block_size)
        padded = torch.randint(num_blocks, batch.block_tables.shape, generator=generator)
        for row, i in zip(padded, step):
            row[: needed[i]] = torch.tensor(tables[i])
        batch = dataclasses.replace(batch, block_tables=padded)
        ids = torch.cat([sequences[i][done[i] : end] for i, end in zip(step, ends)])
        for i, rows in zip(step, model(ids, batch, cache).split(counts)):
            logits[i].append(rows)
            done[i] += len(rows)
    return [torch.cat(rows) for rows in logits]
