"""A model far larger than memory, run once over some prompts.

All prompts go through a layer before the next layer is read. The embedding is read by the rows that
the prompts need, and the head by some rows at a time. So there are never more than `LAYERS_HELD`
layers of weights in memory, and one piece of the head.

It is the model's own forward pass: its layers, norm and head, one prompt at a time. So the bits are
those of the model in memory. One thing is left to the library that multiplies: a product of some of
the head's rows must give the bits of the product of all of them. That is so where a piece begins at
a whole block of the library's kernel (with pieces of 8 rows MKL gave other last bits; with any
multiple of 48 it gave the same, in float64, float32 and bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minqwen.checkpoint import Checkpoint
from minqwen.checkpoint.load import resolve_dtype
from minqwen.checkpoint.offload import LayerStream
from minqwen.checkpoint.reader import EMBEDDING, HEAD
from minqwen.model import Batch, Native, Qwen2
from minqwen.model.arithmetic import Linear
from minqwen.model.qwen2 import Embedding
from minqwen.model.trace import Tap
from minqwen.parallel import SINGLE, Shard

HEAD_BYTES = 256 << 20  # of the head's weights in memory, in the model's dtype
ROW_BLOCK = 960  # pieces of the head have a multiple of so many rows: of any kernel's block


class StreamedModel:
    """The model in a checkpoint's directory, of which no layer is in memory yet.

    dtype, arithmetic: as `load_pretrained` takes them. Raises CheckpointError, ConfigError.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: str | torch.dtype,
        arithmetic: str | Native = "native",
        head_bytes: int = HEAD_BYTES,
    ):
        checkpoint = Checkpoint(path)
        checkpoint.check()
        config = checkpoint.config
        kind = resolve_dtype(dtype, config)
        self.model = Qwen2.from_tensors(
            config,
            lambda name, shard: checkpoint.read(name, shard, kind),
            only=lambda name: name == "model.norm.weight",
            arithmetic=arithmetic,
            dtype=kind,
        )
        head = EMBEDDING if config.tie_word_embeddings else HEAD
        self.model.model.embed_tokens = StoredEmbedding(checkpoint, EMBEDDING, kind)
        self.model.lm_head = StoredHead(checkpoint, head, kind, self.model.ops, head_bytes)

        def fetch(name: str, out: Tensor | None) -> Tensor:
            return checkpoint.read(name, None, kind, out=out)

        self.stream = LayerStream(self.model, fetch, "cpu", hooked=False)

    @torch.no_grad()
    def run(self, prompts: list[list[int]], tap_of: Callable[[int], Tap]) -> list[Tensor]:
        """The logits [T, V] of each prompt. tap_of(n): the tap that sees prompt n."""
        taps = [tap_of(n) for n in range(len(prompts))]
        batches = [Batch.dense(1, len(ids)) for ids in prompts]
        turns = [self.model.rotary(batch) for batch in batches]
        embed = self.model.model.embed_tokens
        xs = [tap("embed", embed(torch.tensor(ids))) for tap, ids in zip(taps, prompts)]
        for i, layer in self._layers():
            xs = [
                layer(x, cos, sin, batch, None, tap.at(i))
                for x, (cos, sin), batch, tap in zip(xs, turns, batches, taps)
            ]
        return [self.model.unembed(x, tap) for x, tap in zip(xs, taps)]

    def _layers(self) -> Iterator[tuple[int, nn.Module]]:
        """Each layer while its weights are here."""
        layers = list(self.model.model.layers)
        for i, layer in enumerate(tqdm(layers, "layers", leave=False, disable=None)):
            self.stream.arrive(i)
            try:
                yield i, layer
            finally:
                self.stream.leave(i)


class StoredEmbedding(Embedding):
    """The table in a file, of which the rows are read that are looked up."""

    def __init__(self, checkpoint: Checkpoint, name: str, dtype: torch.dtype):
        rows, size = checkpoint.shape(name)
        super().__init__(SINGLE, range(rows), size, dtype=dtype, device="meta")
        self.checkpoint, self.name, self.dtype = checkpoint, name, dtype

    def forward(self, ids: Tensor) -> Tensor:
        wanted, places = ids.unique(return_inverse=True)
        rows = [
            self.checkpoint.read(self.name, Shard(0, id, id + 1), self.dtype)
            for id in wanted.tolist()
        ]
        return torch.cat(rows)[places]


class StoredHead(Linear):
    """The head in a file, of which some rows are read at a time.

    An arithmetic whose sums do not depend on their order chooses one grid for the whole matrix, so
    there the piece is the whole.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, dtype: torch.dtype, ops: Native, most_bytes: int
    ):
        rows, size = checkpoint.shape(name)
        super().__init__(ops, size, rows, dtype=dtype, device="meta")
        self.checkpoint, self.name, self.dtype = checkpoint, name, dtype
        self.pieces = [range(rows)]
        if not ops.order_free:
            self.pieces = cut(rows, most_bytes // (size * dtype.itemsize))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.ops.linear(x, self.piece(rows)) for rows in self.pieces], -1)

    def piece(self, rows: range) -> Linear:
        """The linear layer of some of the rows."""
        linear = Linear(self.ops, self.weight.shape[1], len(rows), dtype=self.dtype, device="meta")
        shard = Shard(0, rows.start, rows.stop)
        weight = self.checkpoint.read(self.name, shard, self.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        self.ops.prepare([linear], SINGLE)
        return linear


def cut(rows: int, most: int) -> list[range]:
    """Pieces of about `most` rows: multiples of ROW_BLOCK, and the last one is not a short one."""
    step = max(ROW_BLOCK, most // ROW_BLOCK * ROW_BLOCK)
    starts = range(0, max(1, rows - ROW_BLOCK + 1), step)
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], rows])]
