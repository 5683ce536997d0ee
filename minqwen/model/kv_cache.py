"""Where one rank's keys and values are kept: in blocks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

KV_DTYPES = ("auto", "int8")
LARGEST = 127  # of 8 bits with a sign
SCALE_BYTES = 2  # of each token and head


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
        self.pool = torch.zeros(shape, dtype=self.stored_dtype(dtype), device=device)
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        # The same memory as rows of a whole block, [2 P, S K d]: whole rows are copied fastest.
        self.rows = self.pool.view(layers, 2 * num_blocks, -1)
        self.halves = torch.tensor([[0], [num_blocks]], device=device)  # first row of keys, values
        # What `read` fills. It is kept, because memory taken anew costs more than the copy.
        self.gathered = self.pool.new_empty(0, dtype=dtype)
        self.add_scales()

    def add_scales(self) -> None:
        """Make what is kept beside the pool: nothing here."""

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In what the pool holds keys and values of `dtype`."""
        return dtype

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v [T, K, d] at `slots` [T]."""
        keys, values = self.pool[layer].flatten(1, 2)  # [P * S, K, d] each
        keys.index_copy_(0, slots, k)
        values.index_copy_(0, slots, v)

    def clear(self, blocks: list[int]) -> None:
        """Put zeros into blocks. What an earlier owner left there may be NaN."""
        if blocks:
            index = torch.tensor(blocks).to(self.pool.device, non_blocking=True)
            self.pool.index_fill_(2, index, 0)

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
            self.gathered = self.pool.new_empty(size, dtype=self.dtype)
        rows = (blocks + self.halves).flatten()
        out = self.gathered[:size].view(len(rows), -1)
        self.copy_rows(layer, rows, out)
        both = out.view(2, len(block_tables), -1, *block[1:])  # [2, B, tokens, K, d]
        keys, values = both[:, :, :length].transpose(2, 3)
        return keys, values

    def copy_rows(self, layer: int, rows: Tensor, out: Tensor) -> None:
        """Fill `out` [R, S K d] with these rows of `self.rows[layer]`."""
        torch.index_select(self.rows[layer], 0, rows, out=out)


class Int8KVCache(KVCache):
    """The same in 8 bits: a scale for each token and head, of keys and of values.

    What is read is q s, with q from -127 to 127. s is at least the largest entry over 127, rounded
    up to a 16-bit number, so that q needs no cutting. A NaN or an infinity makes all of its head
    NaN. scales [layers, 2, P, S, K].
    """

    def add_scales(self) -> None:
        # bfloat16 has the range of all dtypes that are wider than float16.
        narrow = torch.float16 if self.dtype == torch.float16 else torch.bfloat16
        self.scales = self.pool.new_zeros(self.pool.shape[:-1], dtype=narrow)
        self.scale_rows = self.scales.view(len(self.pool), 2 * self.num_blocks, -1)

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.int8

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        for half, x in enumerate((k, v)):
            numbers, scale = self.rounded(x)
            self.pool[layer, half].flatten(0, 1).index_copy_(0, slots, numbers)
            self.scales[layer, half].flatten(0, 1).index_copy_(0, slots, scale)

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q, int8 [T, K, d], and s [T, K]."""
        wide = x.float()
        top = wide.abs().amax(-1) * ((1 + 2.0**-8) / LARGEST)  # rounding can take 2^-9 of it
        scale = top.clamp_(min=torch.finfo(self.scales.dtype).tiny).to(self.scales.dtype)
        numbers = (wide / scale.float().unsqueeze(-1)).round_()
        return numbers.to(torch.int8), scale

    def copy_rows(self, layer: int, rows: Tensor, out: Tensor) -> None:
        numbers, scales = (x[layer].index_select(0, rows) for x in (self.rows, self.scale_rows))
        block = self.pool.shape[3:]  # [S, K, d]
        out.copy_(numbers).view(-1, *block).mul_(scales.view(-1, *block[:2], 1))
