"""The cache of keys and values by itself: what is written is read, from blocks in any order."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode

from minqwen.model.kv_cache import Int8KVCache, KVCache

LAYERS, BLOCKS, SIZE, HEADS, DIM = 2, 6, 4, 2, 3


def cache(kind: type[KVCache] = KVCache) -> KVCache:
    return kind(LAYERS, BLOCKS, SIZE, HEADS, DIM, torch.float32, "cpu")


def numbered(tokens: int, start: float = 1.0) -> torch.Tensor:
    """[T, K, d], in which every number is another one, and none is 0."""
    return torch.arange(tokens * HEADS * DIM).add(start).view(tokens, HEADS, DIM)


def slots(blocks: list[int], tokens: int) -> torch.Tensor:
    return torch.tensor([b * SIZE + i for b in blocks for i in range(SIZE)][:tokens])


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 9])
def test_what_is_written_is_read_by_the_order_of_the_blocks(tokens):
    ours, blocks = cache(), [4, 0, 5]
    k, v = numbered(tokens), numbered(tokens, 1000.0)
    ours.write(1, slots(blocks, tokens), k, v)
    tables = torch.tensor([blocks, [3, 2, 1]])
    for x, read in zip((k, v), ours.read(1, tables, tokens)):
        assert read.shape == (2, HEADS, tokens, DIM) and read.dtype == torch.float32
        assert torch.equal(read[0], x.transpose(0, 1)) and not read[1].any()
    assert not ours.pool[0].any()


def test_blocks_that_are_cleared_are_zeros_and_the_others_stay():
    ours = cache()
    ours.write(0, torch.arange(BLOCKS * SIZE), numbered(BLOCKS * SIZE), numbered(BLOCKS * SIZE))
    before = ours.pool.clone()
    ours.clear([])
    assert torch.equal(ours.pool, before)
    ours.clear([1, 4])
    assert not ours.pool[:, :, [1, 4]].any()
    assert torch.equal(ours.pool[:, :, [0, 2, 3, 5]], before[:, :, [0, 2, 3, 5]])


@pytest.mark.parametrize("kind", [KVCache, Int8KVCache])
def test_two_reads_do_not_disturb_what_is_kept(kind):
    """What is read may be written to, and the next read, longer or shorter, has its own numbers."""
    ours = cache(kind)
    ours.write(0, slots([2, 3], 8), numbered(8), numbered(8, 50.0))
    tables = torch.tensor([[2, 3]])
    first = [x.clone() for x in ours.read(0, tables, 8)]
    for length in (3, 8, 5):
        for x, again in zip(first, ours.read(0, tables, length)):
            assert torch.equal(again, x[:, :, :length])
            again.zero_()


class AtNewMemory(TorchFunctionMode):
    """Notes at each `new_empty` whether what a cache had for reading is still there."""

    def __init__(self, ours: KVCache):
        super().__init__()
        self.had, self.alive = weakref.ref(ours.gathered), list[bool]()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.new_empty:
            self.alive.append(self.had() is not None)
        return func(*args, **(kwargs or {}))


def test_memory_for_reading_grows_only_when_it_must_and_never_beside_the_old():
    ours = cache()
    with AtNewMemory(ours) as seen:
        ours.read(0, torch.tensor([[0, 1]]), 8)
        ours.read(0, torch.tensor([[0, 1]]), 3)
        ours.read(0, torch.tensor([[2], [3]]), 4)
    assert seen.alive == [False] and ours.gathered.numel() == 2 * 2 * SIZE * HEADS * DIM
