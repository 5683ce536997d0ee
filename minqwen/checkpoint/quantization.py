"""How AWQ and GPTQ checkpoints lie in their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from minqwen.checkpoint import reader
from minqwen.checkpoint.reader import Checkpoint
from minqwen.config import ModelConfig
from minqwen.errors import CheckpointError

REQUANTISE = "extend the unquantised checkpoint and quantise that"


@dataclass(frozen=True)
class Packing:
    """How numbers lie in words. offset: what GPTQ v1 subtracts from a zero point before it stores it.
    act_order (desc_act): inputs belong to groups in any order, so that a group of o spans heads."""

    method: str
    bits: int
    group: int
    offset: int
    act_order: bool

    @classmethod
    def read(cls, found: dict, source: object = "config.json") -> Packing:
        """From config.json's quantization_config. Raises CheckpointError for what is not AWQ gemm or GPTQ."""
        method, bits, group = found.get("quant_method"), found.get("bits"), found.get("group_size")
        gptq = method == "gptq"
        form = str(
            found.get("checkpoint_format", "gptq") if gptq else found.get("version", "gemm")
        ).lower()
        known = {"awq": ["gemm 4"], "gptq": ["gptq 4", "gptq 8", "gptq_v2 4", "gptq_v2 8"]}
        if f"{form} {bits!r}" not in known.get(str(method), ()):
            raise CheckpointError(
                f"{source}: quantization_config is {method!r} {form!r} with {bits!r} bits, "
                f"expected awq gemm with 4, or gptq or gptq_v2 with 4 or 8: {REQUANTISE}"
            )
        if type(group) is not int or group < 1 and group != -1:
            raise CheckpointError(
                f"{source}: quantization_config.group_size is {group!r}, expected a number of "
                "inputs, or -1; correct it"
            )
        return cls(
            method,
            bits,
            group,
            int(gptq and form == "gptq"),
            gptq and found.get("desc_act") is True,
        )

    @property
    def pack(self) -> int:
        return 32 // self.bits

    def word(self, value: int) -> int:
        """One int32 that holds `value` everywhere."""
        word = sum(value << shift for shift in range(0, 32, self.bits))
        return word - (1 << 32) if word >> 31 else word

    def shape(self, name: str, config: ModelConfig) -> tuple[int, ...] | None:
        """What a tensor of the attention must have under `config`; None for other tensors."""
        *_, module, projection, part = name.split(".")
        if module != "self_attn":
            return None
        outputs = {"q_proj": config.q_size, "o_proj": config.hidden_size}.get(
            projection, config.kv_size
        )
        inputs = config.q_size if projection == "o_proj" else config.hidden_size
        groups = 1 if self.group == -1 else -(-inputs // self.group)
        words = (
            (inputs, outputs // self.pack)
            if self.method == "awq"
            else (inputs // self.pack, outputs)
        )
        shapes = {
            "qweight": words,
            "qzeros": (groups, outputs // self.pack),
            "scales": (groups, outputs),
            "g_idx": (inputs,),
            "bias": (outputs,),
            "weight": (outputs, inputs),
        }
        return shapes.get(part, ())


class PackedCheckpoint(Checkpoint):
    """A quantised checkpoint under the names in its files; reads as `Checkpoint` does, in bounded memory."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files = self._find_files()
        reader.require_regular(self.path / "config.json")
        self.config = ModelConfig.from_json(self.path)
        if self.config.quantization_config is None:
            raise CheckpointError(
                f"{path}: has no quantization_config, expected an AWQ or GPTQ checkpoint"
            )
        self.packing = Packing.read(self.config.quantization_config, self.path / "config.json")
        self._stamps = {file: reader.require_regular(self.path / file) for file in files}
        self._tensors = {}
        for file, listed in files.items():
            self._read_header(file, listed)
        self.names = list(self._tensors)

    def _read_header(self, file: str, listed: set[str] | None) -> None:
        types = reader.DTYPES | {"I32": torch.int32}
        with self._opened(file) as f:
            found = {name: f.get_slice(name) for name in f.keys()}
            if listed is not None and listed != set(found):
                raise CheckpointError(
                    f"{self.path / file}: holds other tensors than {reader.INDEX} says, "
                    "expected exactly those; fetch both again"
                )
            for name, at in found.items():
                if at.get_dtype() not in types or not at.get_shape():
                    raise CheckpointError(
                        f"{self.path / file}: tensor {name} has dtype {at.get_dtype()} and "
                        f"shape {at.get_shape()}, expected a vector or matrix of "
                        f"{', '.join(types)}"
                    )
                self._tensors[name] = reader._Stored(
                    file, name, types[at.get_dtype()], tuple(at.get_shape())
                )

    def check(self) -> None:
        """Every part of every attention is there, of the shape that config.json and the packing give."""
        for name in self.names:
            if (expected := self.packing.shape(name, self.config)) not in (None, self.shape(name)):
                raise CheckpointError(
                    f"{self.file(name)}: tensor {name} has shape {self.shape(name)}, expected "
                    f"{expected or 'no such tensor'} from config.json; fix the one or the other"
                )
        packed = ("qweight", "qzeros", "scales", *(["g_idx"] if self.packing.act_order else []))
        for name in self.config.parameter_shapes():
            stem, _, part = name.rpartition(".")
            if ".self_attn." not in name or name in self._tensors:
                continue
            missing = [f"{stem}.{p}" for p in (packed if part == "weight" else (part,))]
            if missing := [n for n in missing if n not in self._tensors]:
                raise CheckpointError(
                    f"{self.path}: tensor {missing[0]} is missing, expected every part of "
                    f"{stem}; fetch the checkpoint again"
                )
