"""Decode steps of the model itself as CUDA graphs: nothing is compiled, and no bit changes.

In exact arithmetic a step is thousands of small kernels, which Python starts more slowly than a GPU
runs them. The order of a sum and the zeros in it change nothing there, so a graph may see more keys
than there are, and hide the rest. One is captured for each number of sequences 1, 2, 4, ... and
each length of the longest context 256, 512, 1024, ..., when it first comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minqwen.engine.buffers import Buffers, Graph, announce, captured, sequences
from minqwen.engine.scheduler import Scheduled
from minqwen.errors import MinqwenError
from minqwen.model import Batch, KVCache, Qwen2

SHORTEST = 256  # tokens of context


class CapturedModel:
    """Runs the steps of one model over one cache. Its arithmetic must be order-free.

    capture: whether steps of one token a sequence are captured; tests do without.
    """

    def __init__(
        self,
        model: Qwen2,
        cache: KVCache,
        max_model_len: int,
        max_num_seqs: int,
        *,
        capture: bool = True,
    ):
        self.model, self.cache, self.longest = model, cache, max_model_len
        most_blocks = -(-max_model_len // cache.block_size)
        self.buffers = Buffers(max_num_seqs, most_blocks, cache.block_size, model.device)
        self.capture = capture
        self.checked: set[tuple[int, int]] = set()
        self.graphs: dict[tuple[int, int], Graph] = {}
        # Memory that a graph reads or writes and that the cache would let go of for a larger one.
        self.kept: list[Tensor] = []
        model.rotary(self.batch(1, max_model_len)[1])  # the whole table, which then stays

    def run(self, step: Sequence[Scheduled], pack: Callable[[], tuple[Tensor, Batch]]) -> Tensor:
        """Logits [N, V] of the tokens that the step's batch names; the next step overwrites them.

        pack: makes the step's ids and batch, where they are needed. Raises MinqwenError where the
        logits are not the model's own in every bit, when a graph is used first.
        """
        if any(item.count != 1 for item in step):
            logits: Tensor = self.model(*pack(), self.cache)
            return logits
        size = self.size_for(step)
        logits = self.decode(step, size)[: len(step)]
        if size not in self.checked:
            check(logits, self.model(*pack(), self.cache))
            self.checked.add(size)
        return logits

    def size_for(self, step: Sequence[Scheduled]) -> tuple[int, int]:
        """How many sequences and how many tokens of context the step's graph has room for."""
        longest = max(SHORTEST, *(item.end for item in step))
        return self.buffers.size_for(len(step)), min(1 << (longest - 1).bit_length(), self.longest)

    def decode(self, step: Sequence[Scheduled], size: tuple[int, int]) -> Tensor:
        self.buffers.fill(step, size[0])
        if not self.capture:
            return self._decode(size)
        if size not in self.graphs:
            count, length = size
            announce(f"capturing the step of {sequences(count)} and {length} tokens of context")
            others = self.graphs.values()
            self.graphs[size] = captured(lambda: self._decode(size), self.model.device, others)
            self.kept.append(self.cache.gathered)
        graph, logits = self.graphs[size]
        graph.replay()
        return logits

    def _decode(self, size: tuple[int, int]) -> Tensor:
        logits: Tensor = self.model(*self.batch(*size), self.cache)
        return logits

    def batch(self, count: int, length: int) -> tuple[Tensor, Batch]:
        """Ids and batch of what the buffers hold. length: of context, at least the longest one."""
        ids, positions, slots, blocks = self.buffers.of(count)
        return ids, Batch(
            positions=positions.long(),
            query_lens=(1,) * count,
            context_lens=(length,) * count,
            shortest_context=1,
            query_starts=torch.arange(count + 1, device=ids.device),
            context_lengths=positions.long() + 1,
            slots=slots,
            block_tables=blocks.tables[:, : -(-length // self.cache.block_size)].long(),
        )


def check(logits: Tensor, own: Tensor) -> None:
    """Raise MinqwenError unless the logits are the model's own, NaN apart."""
    if not torch.equal(logits.nan_to_num(), own.nan_to_num()):
        different = int((logits.nan_to_num() != own.nan_to_num()).sum())
        raise MinqwenError(
            f"{different} of {own.numel()} captured logits differ from the model's own"
        )
