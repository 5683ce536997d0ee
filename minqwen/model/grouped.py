"""Weights that stay numbers of 4 or 8 bits: a group of inputs shares a scale and a zero point.

torch has one product for them that is fast on a CPU, `_weight_int4pack_mm_for_cpu`. It takes
bfloat16 inputs, adds in float32 and rounds the sum to bfloat16. A number of 8 bits is two of 4
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

SIZES = (256, 128, 64, 32)  # inputs of a group that torch's product can have
OUTPUTS = 64  # what the number of outputs must be a multiple of
# From so many rows on the numbers are turned into weights first. That costs as much as the packed
# product of 50 rows, and a product with weights costs half as much a row.
MANY_ROWS = 96
AT_ONCE = 1 << 20  # weights that are made at a time for a product of many rows


@dataclass(frozen=True)
class Groups:
    """How the inputs of a weight fall into groups of one size.

    size: inputs of each group. rows: the row of scales and zeros that belongs to each group. order:
    the inputs sorted by group; None: they lie so.
    """

    size: int
    rows: Tensor
    order: Tensor | None

    @classmethod
    def of(cls, group: Tensor) -> Groups | None:
        """From the row that belongs to each input [inputs]; None: torch has no product for them."""
        order = None
        if not bool((group.diff() >= 0).all()):
            order = torch.argsort(group, stable=True)
            group = group[order]
        for size in SIZES:
            if len(group) and len(group) % size == 0:
                together = group.view(-1, size)
                if bool((together == together[:, :1]).all()):
                    return cls(size, together[:, 0].clone(), order)
        return None

    def same_as(self, other: Groups) -> bool:
        """Whether the inputs of two weights can be those of one product."""
        if self.size != other.size or (self.order is None) != (other.order is None):
            return False
        return self.order is None or other.order is None or torch.equal(self.order, other.order)


@dataclass(frozen=True)
class Numbers:
    """A weight (q - z) s of so many bits, 4 or 8.

    numbers: q, uint8 [inputs, outputs], the inputs as `groups.order` has them. scales: s [rows,
    outputs] in the checkpoint's dtype. zeros: z, uint8, as many.
    """

    bits: int
    groups: Groups
    numbers: Tensor
    scales: Tensor
    zeros: Tensor


@cache
def outputs_in_block() -> int | None:
    """How many outputs lie side by side in torch's packed form on this CPU; None: no fast product.

    64 with AVX-512, 32 with AVX2. The low halves of a block's bytes are its first outputs.
    """
    index = torch.arange(OUTPUTS, dtype=torch.int32)[:, None].expand(OUTPUTS, 32)
    low, high = (
        torch._convert_weight_to_int4pack_for_cpu((index >> shift & 15).contiguous(), 1)
        for shift in (0, 4)
    )
    for block in (64, 32):
        found = [unpacked(x, 32, block).transpose(1, 2).flatten(0, 1) for x in (low, high)]
        if torch.equal(found[0].int() + 16 * found[1].int(), index):
            return block
    return None


def unpacked(packed: Tensor, inputs: int, block: int) -> Tensor:
    """The numbers of 4 bits, uint8 [blocks, inputs, outputs in a block]."""
    words = packed.view(-1, inputs, block // 2)
    return torch.cat((words & 15, words >> 4), -1)


def held_bytes(outputs: int, inputs: int, bits: int, size: int) -> int:
    """Bytes of a weight in this form: its numbers, and what `Grouped` keeps for each group."""
    per_group = 4 * (bits // 4) + 2 + 1  # scale and zero for the product, twice for 8 bits; s; z
    return outputs * (inputs * bits // 8 + inputs // size * per_group)


class Grouped:
    """The weights of linear layers with one input, as one matrix of numbers.

    dtype: of the weights as they would be without this form, which is bfloat16. The scales are
    kept twice: as the product wants them, rounded to bfloat16, and as they were, so that every bit
    of the weights can be given back.
    """

    def __init__(self, weights: Sequence[Numbers], dtype: torch.dtype):
        block = outputs_in_block()
        assert block is not None
        self.bits, self.dtype, self.block = weights[0].bits, dtype, block
        groups = weights[0].groups
        self.size, self.order = groups.size, groups.order
        self.inputs = len(weights[0].numbers)
        self.packed = torch.cat([packed(weight.numbers, weight.bits) for weight in weights])
        self.scales = torch.cat([weight.scales[weight.groups.rows] for weight in weights], 1)
        self.zeros = torch.cat([weight.zeros[weight.groups.rows] for weight in weights], 1)
        self.scales_and_zeros = for_product(self.scales, self.zeros, self.bits)

    @property
    def nbytes(self) -> int:
        held = (self.packed, self.scales, self.zeros, self.scales_and_zeros)
        return sum(x.nbytes for x in held)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.order is not None:
            x = x[:, self.order]
        y = self.few_rows(x) if 0 < len(x) < MANY_ROWS else self.many_rows(x)
        return y if bias is None else y.add_(bias)

    def few_rows(self, x: Tensor) -> Tensor:
        if self.bits == 8:
            x = torch.cat((x, x), -1)
        y: Tensor = torch._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.packed, self.size, self.scales_and_zeros
        )
        return y

    def many_rows(self, x: Tensor) -> Tensor:
        """The product with weights that are made of the numbers, some outputs at a time."""
        y = x.new_empty(len(x), self.scales.shape[1])
        blocks = max(1, AT_ONCE // (self.inputs * self.block))
        for first in range(0, y.shape[1] // self.block, blocks):
            weights = self.weights(first, first + blocks, torch.float32).to(x.dtype)
            columns = weights.transpose(0, 1).reshape(self.inputs, -1)
            start = first * self.block
            y[:, start : start + columns.shape[1]] = x @ columns
        return y

    def weights(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Those of some blocks, [blocks, inputs, outputs in a block]: (q - z) s, rounded once."""
        rows = self.inputs * self.bits // 4
        words = self.packed.view(-1, rows * self.block // 2)[first:last]
        numbers = unpacked(words, rows, self.block)
        if self.bits == 8:
            numbers = numbers[:, : self.inputs] * 16 + numbers[:, self.inputs :]
        wide = numbers.to(dtype).unflatten(1, (-1, self.size))
        for_blocks = slice(first * self.block, last * self.block)
        scales, zeros = (
            x[:, for_blocks].to(dtype).unflatten(1, (-1, self.block)).transpose(0, 1)[:, :, None]
            for x in (self.scales, self.zeros)
        )
        made: Tensor = wide.sub_(zeros).mul_(scales)
        return made.flatten(1, 2)

    def weight(self) -> Tensor:
        """As `PackedWeight.dequantise` makes it: rounded in the scales' dtype, then to `dtype`."""
        outputs = self.scales.shape[1]
        dense = torch.empty(outputs, self.inputs, dtype=self.dtype)
        for first in range(outputs // self.block):
            weights = self.weights(first, first + 1, self.scales.dtype)[0].T
            rows = dense[first * self.block : (first + 1) * self.block]
            if self.order is None:
                rows.copy_(weights)
            else:
                rows[:, self.order] = weights.to(self.dtype)
        return dense


def packed(numbers: Tensor, bits: int) -> Tensor:
    """uint8 numbers [inputs, outputs] in torch's form; of 8 bits the high halves, then the low."""
    if bits == 8:
        numbers = torch.cat((numbers >> 4, numbers & 15))
    inputs, outputs = numbers.shape
    out = torch.empty(outputs, inputs // 2, dtype=torch.uint8)
    some = max(1, AT_ONCE // (inputs * OUTPUTS)) * OUTPUTS  # they are int32 for a moment
    for start in range(0, outputs, some):
        rows = numbers[:, start : start + some].T.to(
            torch.int32, memory_format=torch.contiguous_format
        )
        out[start : start + some] = torch._convert_weight_to_int4pack_for_cpu(rows, 1)
    return out


def for_product(scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """What torch's product wants for each group and output: a and b in (q - 8) a + b, bfloat16.

    Both are of the rounded scale, so that an error stays in proportion to the weight. With 8 bits
    the high halves' a is 16 s, and b is with the low halves.
    """
    rounded = scales.bfloat16().float()
    if bits == 4:
        return torch.stack((rounded, (8 - zeros.float()) * rounded), -1).bfloat16()
    high = torch.stack((16 * rounded, torch.zeros_like(rounded)), -1)
    low = torch.stack((rounded, (8 * 17 - zeros.float()) * rounded), -1)
    return torch.cat((high, low)).bfloat16()
