"""Reads a directory of weight files; refuses everything that is not exactly one checkpoint.

The layout is Hugging Face's: config.json beside the weight files (weight_files.py). No pickle is
ever opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minqwen.checkpoint.quantised import PackedWeights
from minqwen.checkpoint.quantization import Packing
from minqwen.checkpoint.weight_files import (
    INDEX,
    PACKED_DTYPES,
    WEIGHT_DTYPES,
    find_weight_files,
)
from minqwen.config import ModelConfig
from minqwen.errors import CheckpointError
from minqwen.files import MAX_HEADER, and_more, check_regular, opened, parse_json, quoted
from minqwen.parallel import Shard, goes_on

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# What was read of a mapped file stays in memory until the file is unmapped. So tensors are copied
# out of fresh mappings, this many bytes at a time. A load needs this much memory beyond what it
# keeps, and not the size of the largest tensor.
PIECE_BYTES = 4 << 20

_BASE_MODEL = re.compile(r"(embed_tokens|layers|norm)\.")  # how Qwen2Model, without a head, saves
_LAYER = re.compile(r"layers\.\d+\.")
_ROPE_BUFFER = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class StoredTensor(NamedTuple):
    """What a header says of a tensor."""

    file: str
    name: str  # in the file
    code: str  # safetensors' code of the dtype, one of those in PACKED_DTYPES once that is checked
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return PACKED_DTYPES[self.code]


class WeightDirectory:
    """config.json and the tensors beside it, under the names in their files.

    Opening reads the config, the index and every header, but no weights. `tensors` is what was
    found; the subclasses say which names and dtypes they take. Raises CheckpointError (ConfigError
    for config.json), one line, for whatever is wrong with the directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        placed = find_weight_files(self.path)
        self.config = ModelConfig.from_json(self.path)
        self._stamps = {file: check_regular(self.path / file, CheckpointError) for file in placed}
        self.tensors: dict[str, StoredTensor] = {}
        for file, listed in placed.items():
            found = self._read_header(file)
            if listed is not None:
                self._check_index(file, listed, set(found))
            self.tensors |= found
        if not self.config.names_dtype:
            self.config = self._with_dtype_of_files(self.config)

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return [self.path / file for file in self._stamps]

    @property
    def names_in_files(self) -> list[str]:
        """Those of a quantised checkpoint are not all names of parameters."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._stored(name).dtype

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.path / self._stored(name).file

    def read(
        self,
        name: str,
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        out: Tensor | None = None,
    ) -> Tensor:
        """One tensor, or the slice [start, stop) of one of its dimensions.

        The result is in memory of its own, or in `out`. dtype defaults to the file's. Only what
        holds the slice is read from the file. It is converted and moved piece by piece, so that the
        process never holds more than the result and a few times PIECE_BYTES.
        """
        stored = self._stored(name)
        shape = list(stored.shape)
        if shard is not None:
            self._check_slice(name, shard)
            shape[shard.dim] = shard.stop - shard.start
        if out is None:
            out = torch.empty(shape, dtype=dtype or stored.dtype, device=device)
        for row, piece in self._pieces(stored, shard):
            out[row : row + len(piece)].copy_(piece)
        return out

    def check_finite(self) -> None:
        """Read every weight, a piece at a time; refuse the first tensor with NaN or infinity."""
        for name, stored in self.tensors.items():
            nans, infs = self._count_not_finite(stored)
            if nans or infs:
                raise CheckpointError(
                    f"{self.file(name)}: tensor {quoted(name)} holds {nans} NaN and {infs} "
                    f"infinite values among {torch.Size(stored.shape).numel()}, expected finite "
                    "weights; fetch or export the checkpoint again"
                )

    def check_dtypes(
        self, allowed: dict[str, torch.dtype], names: Iterable[str] | None = None
    ) -> None:
        """Refuse a tensor that is a scalar, or whose dtype is not one of the `allowed`.

        names: of the tensors that are looked at (default all).
        """
        for name in self.tensors if names is None else names:
            stored = self.tensors[name]
            if stored.code not in allowed or not stored.shape:
                raise CheckpointError(
                    f"{self.path / stored.file}: tensor {quoted(stored.name)} has dtype "
                    f"{stored.code} and shape {stored.shape}, expected a weight vector or matrix "
                    f"in one of {', '.join(allowed)}"
                )

    # ---- opening

    def _with_dtype_of_files(self, config: ModelConfig) -> ModelConfig:
        """A config.json that names no dtype has that of the first float tensor, as transformers 5.

        First means: in the first file by name.
        """
        for stored in sorted(self.tensors.values(), key=lambda stored: stored.file):
            if stored.code in WEIGHT_DTYPES:
                return config.replace(dtype=str(stored.dtype).removeprefix("torch."))
        return config

    def _read_header(self, file: str) -> dict[str, StoredTensor]:
        path = self.path / file
        header = _header_bytes(path)
        with self._opened(file) as handle:
            # Of two equal names safetensors itself would take the last.
            parse_json(header, path, CheckpointError)
            found = {name: handle.get_slice(name) for name in handle.keys()}
            return {
                name: StoredTensor(file, name, view.get_dtype(), tuple(view.get_shape()))
                for name, view in found.items()
            }

    def _check_index(self, file: str, listed: set[str], found: set[str]) -> None:
        """The index and a header must agree on what the file holds."""
        if listed == found:
            return
        name = min(listed ^ found)
        has = "does not hold" if name in listed else "holds"
        raise CheckpointError(
            f"{self.path / file}: {has} tensor {quoted(name)}, expected as {INDEX} places it; "
            "fetch both again"
        )

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path}: no tensor {quoted(name)} among its {len(self.tensors)}"
            )
        return self.tensors[name]

    # ---- reading

    @contextmanager
    def _opened(self, file: str) -> Iterator[Any]:
        """A file mapped by safetensors. A file that shrinks while it is mapped would kill us."""
        path, stamp = self.path / file, self._stamps[file]
        if check_regular(path, CheckpointError) != stamp:
            raise CheckpointError(f"{path}: changed since the checkpoint was opened; open it again")
        try:
            handle = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError, RuntimeError) as e:  # RuntimeError: torch cannot map it
            why = " ".join(str(e).removeprefix("Error while deserializing header: ").split())[:200]
            raise CheckpointError(
                f"{path}: {stamp.size} bytes that are not a whole safetensors file ({why}); "
                "it may be cut short or damaged: fetch it again"
            ) from None
        with handle:
            yield handle

    def _check_slice(self, name: str, shard: Shard) -> None:
        shape = self.shape(name)
        if (
            not 0 <= shard.dim < len(shape)
            or not 0 <= shard.start <= shard.stop <= shape[shard.dim]
        ):
            raise CheckpointError(
                f"{self.file(name)}: tensor {quoted(name)} has shape {shape}, expected one with a "
                f"slice {shard.start}:{shard.stop} along dimension {shard.dim}"
            )

    def _pieces(
        self, stored: StoredTensor, shard: Shard | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(first row within the slice, some rows of it in mapped memory); valid until the next."""
        start, stop = 0, stored.shape[0]
        columns: tuple[slice, ...] = ()
        if shard is not None and shard.dim == 0:
            start, stop = shard.start, shard.stop
        elif shard is not None:
            columns = (slice(shard.start, shard.stop),)
        # Whole rows count even if only some columns are read: the kernel reads what lies around, in
        # whole memory pages.
        row_bytes = torch.Size(stored.shape[1:]).numel() * stored.dtype.itemsize
        rows = max(1, PIECE_BYTES // max(1, row_bytes))
        for row in range(start, stop, rows):
            with self._opened(stored.file) as handle:
                view = handle.get_slice(stored.name)
                yield row - start, view[(slice(row, min(row + rows, stop)), *columns)]
            goes_on()

    def _count_not_finite(self, stored: StoredTensor) -> tuple[int, int]:
        """How many values are NaN, and how many infinite."""
        nans = infs = 0
        for _, piece in self._pieces(stored):
            # Smallest and largest tell in one pass, without a mask as large as the piece.
            if piece.numel() and not torch.stack(piece.aminmax()).isfinite().all():
                nans += int(piece.isnan().sum())
                infs += int(piece.isinf().sum())
        return nans, infs

    def _same(self, a: StoredTensor, b: StoredTensor) -> bool:
        """Whether two stored tensors agree in dtype, shape and every bit."""
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        pairs = zip(self._pieces(a), self._pieces(b), strict=True)
        return all(
            torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for (_, x), (_, y) in pairs
        )


class Checkpoint(WeightDirectory):
    """A checkpoint under canonical tensor names.

    `model.` is added where the save of a base model left it out, `rotary_emb.inv_freq` is dropped,
    and so is `lm_head.weight` of a tied model (`check` requires it to equal the embedding).

    An AWQ or GPTQ checkpoint is read as the unquantised one that it stands for: `read` dequantises,
    and `config` is without quantization_config. `packed` then has the weights as they lie in their
    words; it is None for all others.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.tensors = self._canonical()
        self.packed: PackedWeights | None = None
        self._extra_biases: list[str] = []
        quantised = self.config.quantization_config
        if quantised is not None:
            self._unpack(Packing.read(quantised, self.path / "config.json"))
        else:
            self.check_dtypes(WEIGHT_DTYPES)
        self._head_copy: StoredTensor | None = None
        if self.config.tie_word_embeddings:
            self._head_copy = self.tensors.pop(HEAD, None)

    def _unpack(self, packing: Packing) -> None:
        """From now on this is the unquantised checkpoint that the words stand for."""
        self.check_dtypes(PACKED_DTYPES)
        self.config = self.config.replace(quantization_config=None)
        self.packed = PackedWeights(self, packing)
        if not self.packed.parts:
            raise CheckpointError(
                f"{self.path / 'config.json'}: quantization_config is there ({packing}), but no "
                "weight is in words; remove it if the weights are whole, or fetch them again"
            )
        for name in self.packed.parts:
            if name in self.tensors:
                raise CheckpointError(
                    f"{self.packed.file(name)}: {quoted(name)} is there as words and as weights, "
                    "expected one of them; remove the other"
                )
        # AutoGPTQ 0.7.1 and before gave every quantised layer a bias, of zeros where it has none.
        layer = self.config.replace(num_hidden_layers=1).parameter_shapes()
        ours = {_in_layer(name) for name in layer}
        self._extra_biases = [
            name
            for name in self.tensors
            if name.endswith(".bias")
            and name.removesuffix("bias") + "weight" in self.packed
            and _in_layer(name) not in ours
        ]

    @property
    def names(self) -> list[str]:
        """Of the parameters, quantised or not."""
        if self.packed is None:
            return super().names
        left_out = {part for parts in self.packed.parts.values() for part in parts}
        left_out.update(self._extra_biases)
        return [*self.packed.parts, *(name for name in self.tensors if name not in left_out)]

    def shape(self, name: str) -> tuple[int, ...]:
        packed = self.words_of(name)
        return super().shape(name) if packed is None else packed.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        packed = self.words_of(name)
        return super().dtype(name) if packed is None else packed.dtype(name)

    def file(self, name: str) -> Path:
        packed = self.words_of(name)
        return super().file(name) if packed is None else packed.file(name)

    def read(
        self,
        name: str,
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        out: Tensor | None = None,
    ) -> Tensor:
        """As `WeightDirectory.read`. A quantised weight is dequantised on the device.

        It is computed in the dtype of its scales (float16, usually), and converted afterwards.
        """
        packed = self.words_of(name)
        if packed is None:
            return super().read(name, shard, dtype, device, out)
        if shard is not None:
            self._check_slice(name, shard)
        weight = packed.read(name, shard, device if out is None else out.device)
        if out is None:
            out = torch.empty(weight.shape, dtype=dtype or weight.scales.dtype, device=device)
        return weight.dequantise(out)

    def check_finite(self) -> None:
        """As `WeightDirectory.check_finite`; of quantised weights what they are dequantised to."""
        super().check_finite()
        if self.packed is None:
            return
        for name in self.packed.parts:
            pieces = self.packed.read(name).pieces()
            lost = sum(int((~piece.isfinite()).sum()) for _, piece in pieces)
            if lost:
                raise CheckpointError(
                    f"{self.file(name)}: {quoted(name)} has {lost} weights that are infinite once "
                    f"they are dequantised to {self.dtype(name)}, expected finite weights; fetch "
                    "the checkpoint again"
                )

    def words_of(self, name: str) -> PackedWeights | None:
        """Where a weight is to be had, if it is quantised."""
        return self.packed if self.packed is not None and name in self.packed else None

    def check(self) -> None:
        """Compare names and shapes with config.parameter_shapes(), and the values that are known.

        Known are a tied head, which equals the embedding, and biases that Qwen2 does not have,
        which are zero.
        """
        layers, found = self.config.num_hidden_layers, len(self.names)
        if layers > found:  # before a table of that many layers is built
            raise CheckpointError(
                f"{self.path / 'config.json'}: num_hidden_layers is {layers}, expected fewer than "
                f"the {found} tensors there are; fix it or fetch the checkpoint again"
            )
        expected = self.config.parameter_shapes()
        self._check_names(expected)
        if self.packed is not None:
            self.check_dtypes(WEIGHT_DTYPES, [n for n in expected if n not in self.packed])
            self.packed.check(expected)
            self._check_zero(self._extra_biases)
        self._check_shapes(expected)
        self._check_head_copy()
        # A Llama config lists this bias and Qwen2 has none: the same only if it is zero.
        self._check_zero([name for name in expected if name.endswith(".o_proj.bias")])

    def _canonical(self) -> dict[str, StoredTensor]:
        found: dict[str, StoredTensor] = {}
        for name, stored in self.tensors.items():
            if _ROPE_BUFFER.fullmatch(name):
                continue
            canonical = "model." + name if _BASE_MODEL.match(name) else name
            other = found.get(canonical)
            if other is not None:
                raise CheckpointError(
                    f"{self.path / stored.file}: tensor {quoted(name)} is also "
                    f"{quoted(other.name)} in {other.file}, expected each tensor once; remove one"
                )
            found[canonical] = stored
        return found

    def _check_names(self, expected: dict[str, tuple[int, ...]]) -> None:
        names = dict.fromkeys(self.names)
        extra = [name for name in names if name not in expected]
        if extra:
            raise CheckpointError(
                f"{self.file(extra[0])}: unexpected tensor {quoted(extra[0])}{and_more(extra)}, "
                f"expected only the {len(expected)} that config.json describes; fix the one or "
                "the other"
            )
        missing = [name for name in expected if name not in names]
        if missing:
            raise CheckpointError(
                f"{self.path}: tensor {quoted(missing[0])} is missing{and_more(missing)}; found "
                f"{len(names)} of the {len(expected)} that config.json describes; fetch "
                "the checkpoint again or fix it"
            )

    def _check_shapes(self, expected: dict[str, tuple[int, ...]]) -> None:
        wrong = [name for name, shape in expected.items() if self.shape(name) != tuple(shape)]
        if wrong:
            name = wrong[0]
            raise CheckpointError(
                f"{self.file(name)}: tensor {quoted(name)} has shape {self.shape(name)}"
                f"{and_more(wrong)}, expected {tuple(expected[name])} from config.json; fix the "
                "one or the other"
            )

    def _check_head_copy(self) -> None:
        copy = self._head_copy
        if copy is not None and not self._same(copy, self.tensors[EMBEDDING]):
            raise CheckpointError(
                f"{self.path / copy.file}: tensor {quoted(HEAD)} differs from {quoted(EMBEDDING)}, "
                "expected its copy, since config.json says tie_word_embeddings true; set that to "
                "false if the head is meant"
            )

    def _check_zero(self, biases: list[str]) -> None:
        """Biases that Qwen2 does not have change nothing if they are zero."""
        for name in biases:
            if self.read(name).any():
                raise CheckpointError(
                    f"{self.file(name)}: tensor {quoted(name)} is not zero, expected zeros, since "
                    "Qwen2 has no such bias; this is another model and cannot be read"
                )


def _header_bytes(path: Path) -> bytes:
    """The JSON with which a weight file begins, as it is."""
    with opened(path, CheckpointError) as (raw, found):
        length = int.from_bytes(raw.read(8), "little")
        if MAX_HEADER < length < found.st_size:  # longer than its file: safetensors will say so
            raise CheckpointError(
                f"{path}: its header is {length} bytes long, expected at most {MAX_HEADER}; fetch "
                "the file again"
            )
        return raw.read(min(length, MAX_HEADER))


def _in_layer(name: str) -> str:
    """The name of a parameter without its layer's number."""
    return _LAYER.sub("layers.", name)
