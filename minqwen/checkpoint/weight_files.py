"""The weight files of a checkpoint directory: their names, their dtypes, and what lies where.

A directory holds model.safetensors, or several weight files and model.safetensors.index.json, which
says which tensor is in which file. A safetensors file is an 8-byte little-endian length, a JSON
header {name: dtype, shape, offsets} of that length, and the data
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minqwen.errors import CheckpointError
from minqwen.files import and_more, check_directory, quoted, read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_FILE_BYTES = 4 * 10**9  # of a weight file, as Qwen published theirs

# By safetensors' codes, and by the names in config.json. Packed checkpoints hold words of 32 bits
# as well.
WEIGHT_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
PACKED_DTYPES = WEIGHT_DTYPES | {"I32": torch.int32}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES.values()}
CODES = {dtype: code for code, dtype in PACKED_DTYPES.items()}

_OURS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_PLAIN_NAME = re.compile(r"[^/\\\0]+\.safetensors")
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl)")


class TensorSpec(NamedTuple):
    """What is known of a tensor before it is made."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class FileLayout(NamedTuple):
    """A weight file before it has its data."""

    header: bytes  # the length and the JSON, with which the file begins
    size: int  # bytes of the whole file
    places: dict[str, int]  # tensor -> its first byte in the file


# ---- what there is ------------------------------------------------------------------------------


def find_weight_files(directory: Path) -> dict[str, set[str] | None]:
    """{file name: the tensors that the index says it holds, or None where there is no index}.

    Raises CheckpointError for a directory that does not hold exactly one checkpoint's files.
    """
    present = list_directory(directory)
    files: dict[str, set[str] | None]
    if INDEX in present:
        files = dict(_read_index(directory / INDEX))
    elif SINGLE in present:
        files = {SINGLE: None}
    else:
        raise CheckpointError(
            f"{directory}: found neither {SINGLE} nor {INDEX}, but {_instead(present)}"
        )
    stray = [name for name in present if _OURS.fullmatch(name) and name not in files]
    if stray:
        raise CheckpointError(
            f"{directory / stray[0]}: is not part of {INDEX if INDEX in present else SINGLE}"
            f"{and_more(stray)}, expected one checkpoint in a directory; remove the other"
        )
    return files


def is_weight_file(name: str) -> bool:
    """Whether a file has the name of a checkpoint's weight file."""
    return _OURS.fullmatch(name) is not None


def list_directory(directory: Path) -> list[str]:
    """The sorted names in a checkpoint directory; CheckpointError if it is none."""
    check_directory(directory, CheckpointError)
    try:
        return sorted(os.listdir(directory))
    except OSError as e:
        raise CheckpointError(f"{directory}: cannot be listed ({e.strerror})") from None


def _instead(present: list[str]) -> str:
    """What a directory without weight files under our names holds, in words."""
    for name in present:
        if name.endswith(".safetensors"):
            return f"{quoted(name)} alone"
    for name in present:
        if _PICKLE.fullmatch(name):
            return (
                f"{quoted(name)}, a pickle, which can run code and is never opened: convert it "
                "with transformers' from_pretrained and save_pretrained"
            )
    return f"{len(present)} other files" if present else "nothing at all"


def _read_index(path: Path) -> dict[str, set[str]]:
    """{file name: its tensors}. A name in the index never leads out of the directory."""
    weight_map = read_json_object(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: key 'weight_map' is missing or empty, expected {{tensor: file name}}"
        )
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not (isinstance(file, str) and _PLAIN_NAME.fullmatch(file)):
            raise CheckpointError(
                f"{path}: tensor {quoted(name)} is placed in {quoted(file)}, expected the plain "
                "name of a .safetensors file in the same directory"
            )
        files.setdefault(file, set()).add(name)
    return files


# ---- what will be -------------------------------------------------------------------------------


def lay_out_files(
    specs: Mapping[str, TensorSpec], max_file_bytes: int = MAX_FILE_BYTES
) -> dict[str, FileLayout]:
    """Where every byte of a checkpoint goes: {file name: its layout}.

    Hugging Face's rule: tensors are taken in the order of `specs`, and a new file begins where the
    next tensor would make the data of the current one longer than `max_file_bytes`.
    """
    if max_file_bytes < 1:
        raise CheckpointError(f"max_file_bytes is {max_file_bytes}, expected at least 1")
    groups = _divide(specs, max_file_bytes)
    if len(groups) == 1:
        return {SINGLE: _lay_out(groups[0])}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": _lay_out(group)
        for i, group in enumerate(groups, 1)
    }


def _divide(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[dict[str, TensorSpec]]:
    """The tensors of each file; a tensor that is larger than a file may be has its own."""
    groups: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + spec.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += spec.nbytes
    return groups


def _lay_out(specs: Mapping[str, TensorSpec]) -> FileLayout:
    """One file. The widest elements come first, so that each tensor is aligned to its width."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
        spec = specs[name]
        begins[name], end = end, end + spec.nbytes
        header[name] = {
            "dtype": CODES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (begins[name], end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    start = 8 + len(text)
    places = {name: start + begins[name] for name in specs}
    return FileLayout(len(text).to_bytes(8, "little") + text, start + end, places)


def index_text(files: Mapping[str, FileLayout]) -> str:
    """The text of model.safetensors.index.json, as Hugging Face writes it."""
    total = sum(layout.size - len(layout.header) for layout in files.values())
    where = {name: file for file, layout in files.items() for name in layout.places}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return json.dumps(index, indent=2) + "\n"
