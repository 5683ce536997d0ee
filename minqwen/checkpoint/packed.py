"""A quantised checkpoint as it lies in its files: words are words here, not weights."""

from __future__ import annotations

import os

from minqwen.checkpoint.quantization import Packing
from minqwen.checkpoint.reader import WeightDirectory
from minqwen.checkpoint.weight_files import PACKED_DTYPES
from minqwen.errors import CheckpointError


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
