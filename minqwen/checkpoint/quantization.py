"""How the numbers of AWQ and GPTQ checkpoints lie in words, and which weights they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minqwen.config import ModelConfig
from minqwen.errors import CheckpointError
from minqwen.files import quoted

REQUANTISE = "extend the unquantised checkpoint and quantise that"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")  # those of the attention, which has heads
PIECE = 1 << 20  # weights that are taken out of their words at a time, which bounds the memory

# quant_method -> the forms that are read, each with its number of bits
_KNOWN: dict[str, tuple[tuple[str, int], ...]] = {
    "awq": (("gemm", 4),),
    "gptq": (("gptq", 4), ("gptq", 8), ("gptq_v2", 4), ("gptq_v2", 8)),
}
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # AutoAWQ's packing_utils.py


@dataclass(frozen=True)
class Packing:
    """How the numbers of a quantised linear layer lie in words.

    Linear(in, out) of b bits holds 32/b numbers in each int32 word. G is the number of groups of
    inputs; the numbers of a group share a scale and a zero point:

                qweight                    qzeros          scales     g_idx
        AWQ     [in, out/8], along out     [G, out/8]      [G, out]   -
        GPTQ    [in*b/32, out], along in   [G, out*b/32]   [G, out]   [in]

    The weight of input i and output c is (q - z) * s. Both z and s are of group i // size in AWQ,
    and of group g_idx[i] in GPTQ. (AutoAWQ's gemm.py, AutoGPTQ's qlinear_cuda_old.py.)

    method: "awq" or "gptq". bits: b. group: inputs in a group; -1 is all of them. offset: what is
    subtracted from a zero point before it is stored, 1 in GPTQ v1, else 0. act_order (desc_act):
    inputs belong to groups in any order, so that a group of o_proj spans heads.
    """

    method: str
    bits: int
    group: int
    offset: int
    act_order: bool

    @classmethod
    def read(cls, found: Mapping[str, Any], source: object = "config.json") -> Packing:
        """From config.json's quantization_config.

        Raises CheckpointError for what is not AWQ gemm or GPTQ; `source` is where it was found.
        """
        method, bits, group = found.get("quant_method"), found.get("bits"), found.get("group_size")
        if str(method) not in _KNOWN:
            raise CheckpointError(
                f"{source}: quantization_config has quant_method {quoted(method)}, expected awq or "
                "gptq, which are all that is read; take the unquantised checkpoint"
            )
        form = _form(found)
        if not isinstance(bits, int) or (form, bits) not in _KNOWN[str(method)]:
            raise CheckpointError(
                f"{source}: quantization_config is {quoted(method)} {quoted(form)} with "
                f"{quoted(bits)} bits, expected awq gemm with 4, or gptq or gptq_v2 with 4 or 8; "
                "take the unquantised checkpoint"
            )
        if found.get("dynamic"):
            raise CheckpointError(
                f"{source}: quantization_config.dynamic gives modules bits and groups of their "
                "own, expected the same for all; take the unquantised checkpoint"
            )
        if type(group) is not int or (group < 1 and group != -1):
            raise CheckpointError(
                f"{source}: quantization_config.group_size is {quoted(group)}, expected a number "
                "of inputs, or -1; correct it"
            )
        act_order = method == "gptq" and found.get("desc_act") is True
        return cls(str(method), bits, group, int(form == "gptq"), act_order)

    def __str__(self) -> str:
        groups = "one group" if self.group == -1 else f"groups of {self.group}"
        order = ", act-order" if self.act_order else ""
        return f"{self.method} {self.bits}-bit, {groups}{order}"

    @property
    def pack(self) -> int:
        """Numbers in a word."""
        return 32 // self.bits

    @property
    def order(self) -> tuple[int, ...]:
        """Where the numbers of a word lie in it, counted from the lowest bits."""
        return _AWQ_ORDER if self.method == "awq" else tuple(range(self.pack))

    @property
    def packed_dim(self) -> int:
        """The dimension of qweight [inputs, outputs] whose numbers share words."""
        return 1 if self.method == "awq" else 0

    @property
    def parts(self) -> tuple[str, ...]:
        """What files hold in the place of a `weight`; g_idx may be absent without act_order."""
        names = ("qweight", "qzeros", "scales")
        return (*names, "g_idx") if self.act_order else names

    def groups_of(self, inputs: int) -> Tensor:
        """The group of each input of a layer, in order; int64."""
        size = inputs if self.group == -1 else self.group
        return torch.arange(inputs) // size

    def word(self, value: int) -> int:
        """One int32 that holds `value` everywhere."""
        word = sum(value << shift for shift in range(0, 32, self.bits))
        return word - (1 << 32) if word >> 31 else word

    def shape(self, name: str, config: ModelConfig) -> tuple[int, ...] | None:
        """The shape that `config` gives to a tensor of the attention's projections.

        () where there is no such tensor; None for the tensors of other modules.
        """
        module, _, part = name.rpartition(".")
        projection = module.rpartition(".")[2]
        if projection not in PROJECTIONS:
            return None
        inputs, outputs = config.hidden_size, config.kv_size
        if projection == "q_proj":
            outputs = config.q_size
        elif projection == "o_proj":
            inputs, outputs = config.q_size, config.hidden_size
        whole = {"bias": (outputs,), "weight": (outputs, inputs)}
        return (self.part_shapes(outputs, inputs) | whole).get(part, ())

    def part_shapes(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """The shapes of what stands for a weight [outputs, inputs]."""
        groups = 1 if self.group == -1 else -(-inputs // self.group)
        along_in, along_out = (inputs // self.pack, outputs), (inputs, outputs // self.pack)
        return {
            "qweight": along_out if self.method == "awq" else along_in,
            "qzeros": (groups, outputs // self.pack),
            "scales": (groups, outputs),
            "g_idx": (inputs,),
        }


def _form(found: Mapping[str, Any]) -> str:
    """Which variant of its method a quantization_config names."""
    key, default = ("version", "gemm")
    if found.get("quant_method") == "gptq":
        key, default = ("checkpoint_format", "gptq")
    return str(found.get(key, found.get("format", default))).lower()


# ---- numbers and words --------------------------------------------------------------------------


def unpack(words: Tensor, dim: int, packing: Packing) -> Tensor:
    """The numbers in int32 words, `packing.pack` times as many along `dim`; int32."""
    shifts = torch.tensor(packing.order, dtype=torch.int32, device=words.device) * packing.bits
    shifts = shifts.view(-1, *[1] * (words.dim() - dim - 1))
    numbers = words.unsqueeze(dim + 1) >> shifts  # the sign comes down too, and is cut off
    numbers &= (1 << packing.bits) - 1
    return numbers.flatten(dim, dim + 1)


def pack(numbers: Tensor, dim: int, packing: Packing) -> Tensor:
    """The inverse of `unpack`. Numbers are 0 to 2^bits - 1."""
    shifts = torch.tensor(packing.order, dtype=torch.int64, device=numbers.device) * packing.bits
    shifts = shifts.view(-1, *[1] * (numbers.dim() - dim - 1))
    fields: Tensor = numbers.to(torch.int64).unflatten(dim, (-1, packing.pack))
    words = (fields << shifts).sum(dim + 1)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).to(torch.int32)


@dataclass(frozen=True)
class PackedWeight:
    """A weight [outputs, inputs], or a slice of one, as it lies in the files.

    qweight, qzeros, scales: as in `Packing`, with the words and the groups that the slice touches.
    group [inputs], int64: the row of qzeros and scales that belongs to each input. skipped: numbers
    before the slice in its first words, along the outputs and along the inputs; both are 0 where
    the slice begins with a word.
    """

    packing: Packing
    shape: tuple[int, int]
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    group: Tensor
    skipped: tuple[int, int] = (0, 0)

    def zeros(self) -> Tensor:
        """The zero point of each group and output; int32."""
        zeros = self._own_outputs(unpack(self.qzeros, 1, self.packing))
        # AutoGPTQ adds what was subtracted and then keeps the lowest bits.
        return (zeros + self.packing.offset) & ((1 << self.packing.bits) - 1)

    def numbers(self, start: int, stop: int) -> Tensor:
        """q of these inputs and all outputs, [stop - start, outputs]; int32."""
        first, last = start + self.skipped[1], stop + self.skipped[1]
        if self.packing.packed_dim == 1:
            return self._own_outputs(unpack(self.qweight[first:last], 1, self.packing))
        unit = self.packing.pack
        row = first // unit
        numbers = unpack(self.qweight[row : -(-last // unit)], 0, self.packing)
        return numbers[first - row * unit : last - row * unit]

    def _own_outputs(self, numbers: Tensor) -> Tensor:
        """Without the numbers of the first and last words that belong to other outputs."""
        return numbers[:, self.skipped[0] : self.skipped[0] + self.shape[0]]

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(first input, weights [some inputs, outputs]) in the dtype of the scales.

        A weight is (q - z) * s. The difference is a small integer, which every dtype holds, so
        that the product is the only rounding: AutoAWQ's and AutoGPTQ's own value, bit for bit.
        """
        outputs, inputs = self.shape
        zeros, rows = self.zeros(), max(1, PIECE // max(1, outputs))
        for start in range(0, inputs, rows):
            group = self.group[start : start + rows]
            distance = self.numbers(start, start + len(group)) - zeros[group]
            yield start, distance.to(self.scales.dtype) * self.scales[group]

    def dequantise(self, out: Tensor) -> Tensor:
        """Write the weight into `out` [outputs, inputs], of any dtype."""
        for start, weights in self.pieces():
            out[:, start : start + len(weights)].copy_(weights.T)
        return out
