"""Several ranks in one process: a thread for each, so that many small models can be tried."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from minqwen.parallel import Mesh

Result = TypeVar("Result")


class ThreadMesh(Mesh):
    """A rank whose peers are threads of this process. Ranks are added in a random order."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[Tensor]):
        super().__init__()
        self.rank, self.size = rank, size
        self._barrier, self._board, self._calls = barrier, board, 0

    def _exchange(self, t: Tensor) -> list[Tensor]:
        """Every rank's tensor."""
        self._board[self.rank] = t
        self._barrier.wait()
        tensors = list(self._board)
        self._barrier.wait()
        return tensors

    def all_reduce(self, t: Tensor, op: str = "sum", dtype: torch.dtype | None = None) -> Tensor:
        self._calls += 1
        parts = [part.to(dtype or t.dtype) for part in self._exchange(t)]
        if op == "max":
            return torch.stack(parts).amax(0).to(t.dtype)
        order = torch.Generator().manual_seed(self._calls)
        total = torch.zeros_like(parts[0])
        for i in torch.randperm(self.size, generator=order).tolist():
            total = total + parts[i]
        return total.to(t.dtype)

    def all_gather(self, t: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self._exchange(t), dim)

    def broadcast(self, t: Tensor, src: int = 0, patient: bool = False) -> Tensor:
        return self._exchange(t)[src]


def on_ranks(size: int, run: Callable[[Mesh], Result]) -> list[Result]:
    """run(mesh) on every rank, without gradients; the results in the ranks' order."""
    barrier, board = threading.Barrier(size, timeout=600), [torch.empty(0)] * size

    def one(rank: int) -> Result:
        try:
            with torch.no_grad():
                return run(ThreadMesh(rank, size, barrier, board))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
