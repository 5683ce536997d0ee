"""How AWQ and GPTQ checkpoints lie in their files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minqwen.checkpoint.reader import WeightDirectory
from minqwen.checkpoint.weight_files import PACKED_DTYPES
from minqwen.config import ModelConfig
from minqwen.errors import CheckpointError
from minqwen.files import quoted

REQUANTISE = "extend the unquantised checkpoint and quantise that"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")  # those of the attention, which has heads

# quant_method -> the forms that are read, each with its number of bits
_KNOWN = {
    "awq": (("gemm", 4),),
    "gptq": (("gptq", 4), ("gptq", 8), ("gptq_v2", 4), ("gptq_v2", 8)),
}


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
        form = _form(found)
        if not isinstance(bits, int) or (form, bits) not in _KNOWN.get(str(method), ()):
            raise CheckpointError(
                f"{source}: quantization_config is {quoted(method)} {quoted(form)} with "
                f"{quoted(bits)} bits, expected awq gemm with 4, or gptq or gptq_v2 with 4 or 8: "
                f"{REQUANTISE}"
            )
        if type(group) is not int or (group < 1 and group != -1):
            raise CheckpointError(
                f"{source}: quantization_config.group_size is {quoted(group)}, expected a number "
                "of inputs, or -1; correct it"
            )
        act_order = method == "gptq" and found.get("desc_act") is True
        return cls(str(method), bits, group, int(form == "gptq"), act_order)

    @property
    def pack(self) -> int:
        """Numbers in a word."""
        return 32 // self.bits

    @property
    def parts(self) -> tuple[str, ...]:
        """What files hold in the place of a `weight`; g_idx may be absent without act_order."""
        names = ("qweight", "qzeros", "scales")
        return (*names, "g_idx") if self.act_order else names

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
        groups = 1 if self.group == -1 else -(-inputs // self.group)
        along_in, along_out = (inputs // self.pack, outputs), (inputs, outputs // self.pack)
        shapes: dict[str, tuple[int, ...]] = {
            "qweight": along_out if self.method == "awq" else along_in,
            "qzeros": (groups, outputs // self.pack),
            "scales": (groups, outputs),
            "g_idx": (inputs,),
            "bias": (outputs,),
            "weight": (outputs, inputs),
        }
        return shapes.get(part, ())


def _form(found: Mapping[str, Any]) -> str:
    """Which variant of its method a quantization_config names."""
    if found.get("quant_method") == "gptq":
        return str(found.get("checkpoint_format", "gptq")).lower()
    return str(found.get("version", "gemm")).lower()


class PackedCheckpoint(WeightDirectory):
    """A quantised checkpoint under the names in its files; reads in bounded memory."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        found = self.config.quantization_config
        if found is None:
            raise CheckpointError(
                f"{path}: has no quantization_config, expected an AWQ or GPTQ checkpoint"
            )
        self.packing = Packing.read(found, self.path / "config.json")
        self.check_dtypes(PACKED_DTYPES)

    def check(self) -> None:
        """Every part of every attention is there, in the shape that config and packing give."""
        for name in self.tensors:
            self._check_shape(name)
        for name in self.config.parameter_shapes():
            if ".self_attn." in name and name not in self.tensors:
                self._check_parts(name)

    def _check_shape(self, name: str) -> None:
        expected = self.packing.shape(name, self.config)
        if expected is not None and expected != self.shape(name):
            raise CheckpointError(
                f"{self.file(name)}: tensor {name} has shape {self.shape(name)}, expected "
                f"{expected or 'no such tensor'} from config.json; fix the one or the other"
            )

    def _check_parts(self, name: str) -> None:
        """The words that stand for a weight are there; nothing stands for a bias."""
        module, _, part = name.rpartition(".")
        parts = self.packing.parts if part == "weight" else (part,)
        missing = [f"{module}.{p}" for p in parts if f"{module}.{p}" not in self.tensors]
        if missing:
            raise CheckpointError(
                f"{self.path}: tensor {missing[0]} is missing, expected every part of {module}; "
                "fetch the checkpoint again"
            )
