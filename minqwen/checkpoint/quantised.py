"""The weights of a checkpoint that lie in words: which they are, their checks, and their slices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from minqwen.checkpoint.quantization import PackedWeight, Packing
from minqwen.errors import CheckpointError
from minqwen.files import quoted
from minqwen.parallel import Shard

PARTS = ("qweight", "qzeros", "scales", "g_idx")


class Files(Protocol):
    """What is needed of a directory of weight files (reader.WeightDirectory)."""

    path: Path

    @property
    def names_in_files(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def file(self, name: str) -> Path: ...

    def read(
        self,
        name: str,
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        out: Tensor | None = None,
    ) -> Tensor: ...


class PackedWeights:
    """The quantised weights of a directory. `read` gives a rank's slice of one, in its words.

    A linear layer `module` is quantised if there is a module.qweight; its weight is then known as
    module.weight. A slice may begin in the middle of a word or of a group: all words and groups
    that it touches are read. So every tensor-parallel degree that fits the unquantised model fits
    the quantised one.
    """

    def __init__(self, files: Files, packing: Packing) -> None:
        self.files, self.packing = files, packing
        self.parts: dict[str, list[str]] = {}  # weight -> the tensors that stand for it
        present = files.names_in_files
        quantised = {name.removesuffix(".qweight") for name in present if name.endswith(".qweight")}
        for name in present:
            module, _, part = name.rpartition(".")
            if module in quantised and part in PARTS:
                self.parts.setdefault(module + ".weight", []).append(name)

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    def shape(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a weight, as its qweight has them."""
        shape = self.files.shape(self.part(name, "qweight"))
        if len(shape) != 2:
            raise CheckpointError(
                f"{self.file(name)}: tensor {quoted(self.part(name, 'qweight'))} has shape "
                f"{shape}, expected a matrix; fetch the checkpoint again"
            )
        rows, columns = shape
        if self.packing.packed_dim == 1:
            return columns * self.packing.pack, rows
        return columns, rows * self.packing.pack

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a weight is dequantised: that of its scales."""
        return self.files.dtype(self.part(name, "scales"))

    def file(self, name: str) -> Path:
        return self.files.file(self.part(name, "qweight"))

    @staticmethod
    def part(name: str, part: str) -> str:
        """The tensor that holds a part of a weight."""
        return f"{name.removesuffix('.weight')}.{part}"

    # ---- checks

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless every part is there, in its shape and dtype.

        shapes: of all parameters. The order of the groups is read and checked too.
        """
        for name in self.parts:
            if name in shapes:
                self._check_sizes(name, shapes[name])
                self._check_parts(name, shapes[name])
                self._check_order(name)

    def _check_sizes(self, name: str, shape: tuple[int, ...]) -> None:
        """Words hold whole rows, or numbers would be missing."""
        if len(shape) != 2 or not name.endswith(("_proj.weight", "lm_head.weight")):
            raise CheckpointError(
                f"{self.file(name)}: {name} is quantised, expected only linear layers to be; take "
                "the unquantised checkpoint"
            )
        outputs, inputs = shape
        pack = self.packing.pack
        if outputs % pack or (self.packing.packed_dim == 0 and inputs % pack):
            raise CheckpointError(
                f"{self.file(name)}: {name} has {outputs} outputs and {inputs} inputs, expected "
                f"multiples of {pack}, the {self.packing.bits}-bit numbers in a word; fix "
                "config.json or fetch the checkpoint again"
            )
        group = self.packing.group
        if self.packing.method == "awq" and group != -1 and inputs % group:
            raise CheckpointError(
                f"{self.file(name)}: {name} has {inputs} inputs, expected a multiple of the "
                f"{group} in a group, as AWQ writes them; fix group_size in config.json or fetch "
                "the checkpoint again"
            )

    def _check_parts(self, name: str, shape: tuple[int, ...]) -> None:
        found = self.parts[name]
        missing = [part for part in self.packing.parts if self.part(name, part) not in found]
        if missing:
            raise CheckpointError(
                f"{self.files.path}: tensor {self.part(name, missing[0])} is missing, expected "
                f"every part of {name} ({self.packing}); fetch the checkpoint again"
            )
        expected = self.packing.part_shapes(shape[0], shape[1])
        for tensor in found:
            part = tensor.rpartition(".")[2]
            self._check_part(tensor, expected[part], integers=part != "scales")

    def _check_part(self, tensor: str, shape: tuple[int, ...], integers: bool) -> None:
        files = self.files
        if files.shape(tensor) != shape:
            raise CheckpointError(
                f"{files.file(tensor)}: tensor {tensor} has shape {files.shape(tensor)}, expected "
                f"{shape} from config.json ({self.packing}); fix the one or the other"
            )
        if (files.dtype(tensor) == torch.int32) != integers:
            raise CheckpointError(
                f"{files.file(tensor)}: tensor {tensor} has dtype {files.dtype(tensor)}, expected "
                f"{'torch.int32' if integers else 'a float dtype'}; fetch the checkpoint again"
            )

    def _check_order(self, name: str) -> None:
        """g_idx says groups that exist, and is in order unless act-order says otherwise."""
        tensor = self.part(name, "g_idx")
        if tensor not in self.parts[name]:
            return
        if self.packing.method == "awq":
            raise CheckpointError(
                f"{self.files.file(tensor)}: unexpected tensor {tensor}, expected none in awq; "
                "fix config.json or fetch the checkpoint again"
            )
        group, groups = self.files.read(tensor), self.files.shape(self.part(name, "scales"))[0]
        if group.numel() and not 0 <= int(group.min()) <= int(group.max()) < groups:
            raise CheckpointError(
                f"{self.files.file(tensor)}: tensor {tensor} names groups {int(group.min())} to "
                f"{int(group.max())}, expected 0 to {groups - 1}; fetch the checkpoint again"
            )
        in_order = self.packing.groups_of(len(group)).to(group.dtype)
        if not self.packing.act_order and not torch.equal(group, in_order):
            raise CheckpointError(
                f"{self.files.file(tensor)}: tensor {tensor} is not in order, expected input // "
                f"{self.packing.group} since desc_act is false; if the checkpoint was made with "
                "desc_act, say so in config.json"
            )

    # ---- reading

    def read(
        self, name: str, shard: Shard | None = None, device: torch.device | str = "cpu"
    ) -> PackedWeight:
        """A weight in its words, or the slice of it that `shard` says. `check` has passed."""
        outputs, inputs = (range(length) for length in self.shape(name))
        if shard is not None and shard.dim == 0:
            outputs = range(shard.start, shard.stop)
        elif shard is not None:
            inputs = range(shard.start, shard.stop)
        group, first_group, touched = self._groups(name, inputs), 0, {}
        if shard is not None and shard.dim == 0:
            touched = self._by_outputs(outputs)
        elif shard is not None:
            first_group = int(group.min())
            touched = self._by_inputs(inputs, first_group, int(group.max()) + 1)
        parts = {
            part: self.files.read(self.part(name, part), touched.get(part), device=device)
            for part in ("qweight", "qzeros", "scales")
        }
        packs_inputs = self.packing.packed_dim == 0
        return PackedWeight(
            self.packing,
            (len(outputs), len(inputs)),
            **parts,
            group=(group - first_group).to(device),
            skipped=(
                outputs.start % self.packing.pack,
                inputs.start % self.packing.pack if packs_inputs else 0,
            ),
        )

    def _groups(self, name: str, inputs: range) -> Tensor:
        """The groups of these inputs, int64."""
        tensor, piece = self.part(name, "g_idx"), Shard(0, inputs.start, inputs.stop)
        if self.packing.act_order:
            return self.files.read(tensor, piece).long()
        return self.packing.groups_of(self.shape(name)[1])[inputs.start : inputs.stop]

    def _by_outputs(self, outputs: range) -> dict[str, Shard]:
        """The columns of each part that hold these outputs."""
        in_words = _covering(1, outputs, self.packing.pack)
        alone = _covering(1, outputs, 1)
        qweight = in_words if self.packing.packed_dim == 1 else alone
        return {"qweight": qweight, "qzeros": in_words, "scales": alone}

    def _by_inputs(self, inputs: range, first_group: int, last_group: int) -> dict[str, Shard]:
        """The rows of each part that hold these inputs, or their groups.

        With act-order the inputs of a rank may be of all groups, or of a few.
        """
        groups = Shard(0, first_group, last_group)
        unit = self.packing.pack if self.packing.packed_dim == 0 else 1
        return {"qweight": _covering(0, inputs, unit), "qzeros": groups, "scales": groups}


def _covering(dim: int, numbers: range, unit: int) -> Shard:
    """The words that hold these numbers, `unit` in each."""
    return Shard(dim, numbers.start // unit, -(-numbers.stop // unit))
