"""Other numbers of heads while a checkpoint is loaded: nothing is written.

`tools/heads.py extend` writes an extended checkpoint; the view here reads the source as if that had
been done. Every tensor is what `extend` would have written, bit for bit, because both call
heads/tensors.py. A rank reads the source's heads that its own slots need, and no others.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minqwen.checkpoint import Checkpoint
from minqwen.checkpoint import load_pretrained as load_checkpoint
from minqwen.checkpoint.load import OPTIONS, Weights
from minqwen.checkpoint.quantised import PackedWeights
from minqwen.checks import refuse_unknown_arguments
from minqwen.config import ModelConfig
from minqwen.heads.adapter import refuse_adapter
from minqwen.heads.layout import Layout, extended_config
from minqwen.heads.manifest import refuse_extended
from minqwen.heads.proposals import asked_layout, asks_for_heads
from minqwen.heads.tensors import Blocks, blocks_of, extend_slots, extend_tensor, needs_whole
from minqwen.model import Qwen2
from minqwen.parallel import Shard

HEAD_OPTIONS = ("num_attention_heads", "num_key_value_heads", "head_recipe")


def load_pretrained(
    path: str | Path,
    *,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    head_recipe: str = "ghost",
    **options: Any,
) -> Qwen2:
    """The model in `path` on this rank, with these numbers of heads in memory.

    None is the checkpoint's own number. head_recipe: what the new heads hold, one of
    layout.RECIPES. options: those of `checkpoint.load_pretrained`. Raises what that raises, and
    HeadsError for numbers that cannot work, before any weight is read.
    """
    unknown = {name: value for name, value in options.items() if name not in OPTIONS}
    refuse_unknown_arguments(unknown, (*OPTIONS, *HEAD_OPTIONS))
    counts = (num_attention_heads, num_key_value_heads)
    if counts == (None, None) and head_recipe == "ghost":
        return load_checkpoint(path, **options)
    return load_checkpoint(open_weights(path, *counts, head_recipe), **options)


def open_weights(
    path: str | Path,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    head_recipe: str = "ghost",
) -> Weights:
    """The checkpoint in `path`, or a view of it with other numbers of heads. Reads no weight.

    Raises HeadsError for numbers that cannot work, with those that can, and for a checkpoint that
    is an extension already.
    """
    if not asks_for_heads(num_attention_heads, num_key_value_heads, head_recipe):
        return Checkpoint(path)
    refuse_adapter(path)
    source = Checkpoint(path)
    to = asked_layout(source.config, num_attention_heads, num_key_value_heads, head_recipe)
    if has_counts_of(source.config, to):
        return source
    refuse_extended(path)
    return ExtendedCheckpoint(source, to)


def has_counts_of(config: ModelConfig, to: Layout) -> bool:
    """Whether the layout leaves both numbers of heads as they are."""
    return (len(to.heads), len(to.kv)) == (config.num_attention_heads, config.num_key_value_heads)


class ExtendedCheckpoint:
    """A `Checkpoint` in another layout. `read` and `check` are those of the checkpoint.

    config: the target's. names: the target's tensors.
    """

    def __init__(self, source: Checkpoint, to: Layout) -> None:
        to.check()
        self.source, self.layout = source, to
        self.config = extended_config(source.config, to)

    @property
    def names(self) -> list[str]:
        return list(self.config.parameter_shapes())

    @property
    def files(self) -> list[Path]:
        return self.source.files

    def words_of(self, name: str) -> PackedWeights | str | None:
        """The source's words of a weight that has no heads; why there are none of one that has."""
        words = self.source.words_of(name)
        if words is None or blocks_of(name, self.layout) is None:
            return words
        return "they have other heads here than in their files"

    def check(self) -> None:
        self.source.check()

    def check_finite(self) -> None:
        self.source.check_finite()

    def read(
        self,
        name: str,
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        out: Tensor | None = None,
    ) -> Tensor:
        """One tensor of the target, or a slice of it, as `WeightDirectory.read` gives it.

        It is made in the dtype of the file, as `extend` does, and converted afterwards.
        """
        blocks = blocks_of(name, self.layout)
        if blocks is None:
            return self.source.read(name, shard, dtype, device, out)
        value = self._extended(name, shard, blocks)
        if out is not None:
            return out.copy_(value)
        return value.to(device=device, dtype=dtype or value.dtype)

    def _extended(self, name: str, shard: Shard | None, blocks: Blocks) -> Tensor:
        slots = _slots_of(shard, blocks)
        if slots is not None and not needs_whole(name, self.layout):
            return extend_slots(
                name, self.layout, slots, lambda heads: self._read_blocks(name, blocks, heads)
            )
        whole = extend_tensor(name, self.source.read(name), self.layout)
        if shard is None:
            return whole
        return whole.narrow(shard.dim, shard.start, shard.stop - shard.start).clone(
            memory_format=torch.contiguous_format
        )

    def _read_blocks(self, name: str, blocks: Blocks, wanted: list[int]) -> Tensor:
        """The source's blocks with these numbers, ascending, side by side."""
        shape = list(self.source.shape(name))
        shape[blocks.dim] = len(wanted) * blocks.unit
        found = torch.empty(shape, dtype=self.source.dtype(name))
        place = 0
        for first, last in runs(wanted):
            size = (last - first) * blocks.unit
            piece = Shard(blocks.dim, first * blocks.unit, last * blocks.unit)
            self.source.read(name, piece, out=found.narrow(blocks.dim, place, size))
            place += size
        return found


def _slots_of(shard: Shard | None, blocks: Blocks) -> range | None:
    """The slots that a slice holds; None if it cuts one, or lies along another dimension."""
    if shard is None or shard.dim != blocks.dim:
        return None
    if shard.start % blocks.unit or shard.stop % blocks.unit:
        return None
    return range(shard.start // blocks.unit, shard.stop // blocks.unit)


def runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers, as ranges (first, last + 1): [0, 4, 5, 6] is [(0, 1), (4, 7)]."""
    if not numbers:
        return []
    gaps = [(a + 1, b) for a, b in pairwise(numbers) if b != a + 1]
    starts = [numbers[0], *(start for _, start in gaps)]
    stops = [*(stop for stop, _ in gaps), numbers[-1] + 1]
    return list(zip(starts, stops))
