"""Where one rank's keys and values are kept: in blocks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of `num_blocks` blocks of `block_size` tokens, in every layer.

    pool [layers, 2, P, S, K, d]: `pool[layer, 0]` are the keys, `pool[layer, 1]` the values. A slot
    is the place of one token: block * block_size + offset.
    """

    def __init__(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        shape = (layers, 2, num_blocks, block_size, kv_heads, head_dim)
        self.pool = torch.zeros(shape, dtype=dtype, device=device)
        self.num_blocks, self.block_size = num_blocks, block_size
        # The same memory as rows of a whole block, [2 P, S K d]: whole rows are copied fastest.
        self.rows = self.pool.view(layers, 2 * num_blocks, -1)
        self.halves = torch.tensor([[0], [num_blocks]], device=device)  # first row of keys, values
        # What `read` fills. It is kept, because memory taken anew costs more than the copy.
        self.gathered = self.pool.new_empty(0)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v [T, K, d] at `slots` [T]."""
        keys, values = self.pool[layer].flatten(1, 2)  # [P * S, K, d] each
        keys.index_copy_(0, slots, k)
        values.index_copy_(0, slots, v)

    def read(self, layer: int, block_tables: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of B lists of blocks [B, enough for `length`].

        Returns two tensors [B, K, length, d]: copies that may be written to and that the next call
        overwrites.
        """
        blocks = block_tables[:, : -(-length // self.block_size)].flatten()
        block = self.pool.shape[3:]  # [S, K, d]
        size = 2 * len(blocks) * block.numel()
        if self.gathered.numel() < size:
            del self.gathered  # before there is another one
            self.gathered = self.pool.new_empty(size)
        rows = (blocks + self.halves).flatten()
        out = self.gathered[:size].view(len(rows), -1)
        torch.index_select(self.rows[layer], 0, rows, out=out)
        both = out.view(2, len(block_tables), -1, *block[1:])  # [2, B, tokens, K, d]
        keys, values = both[:, :, :length].transpose(2, 3)
        return keys, values
