"""Arrays in files: .safetensors, .npy, .npz and, where it is allowed, .pt.

Opening reads headers only. No pickle is read, but .pt through torch's weights-only loading. Every
header must account for the bytes of its file, so that no file makes us allocate more than it holds.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minqwen.errors import DumpError
from minqwen.files import check_regular, printable, quoted

SUFFIXES = (".safetensors", ".npy", ".npz", ".pt")
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of each
INTEGERS = {"I64": 8, "I32": 4}
CODES = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32"}  # numpy's
OF_TORCH = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}


@dataclass(frozen=True)
class Stored:
    """An array in a file, and how to read it. code: safetensors' name of its dtype.

    key: its name in the file, or "" where a file holds one array without a name.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    code: str
    load: Callable[[], Tensor]

    @property
    def name(self) -> str:
        return self.key or self.path.stem

    @property
    def where(self) -> str:
        return f"{self.path}: {quoted(self.key)}" if self.key else str(self.path)


def wrong(where: object, text: str) -> DumpError:
    """The error to raise: one printable line."""
    return DumpError(printable(f"{where}: {text}"))


def stored_arrays(path: Path, allow_pickle: bool) -> list[Stored]:
    """The arrays of one file. Raises DumpError, in one line, for whatever is wrong with it."""
    check_regular(path, DumpError)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix == ".npy":
        with path.open("rb") as file:
            return [_npy(path, "", file, path.stat().st_size)]
    if path.suffix == ".npz":
        return _npz(path)
    if not allow_pickle:
        raise wrong(
            path,
            "is a .pt file, which holds a pickle, expected .safetensors, .npy or .npz; save it "
            "so, or allow .pt files (they are read by torch's weights-only loading)",
        )
    return _pt(path)


def _safetensors(path: Path) -> list[Stored]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            views = {key: file.get_slice(key) for key in file.keys()}
            return [
                Stored(
                    path, key, tuple(view.get_shape()), view.get_dtype(), partial(_load, path, key)
                )
                for key, view in views.items()
            ]
    except (SafetensorError, OSError, RuntimeError) as e:
        why = " ".join(str(e).split())[:200]
        raise wrong(path, f"is no whole safetensors file ({why}); dump again") from None


def _load(path: Path, key: str) -> Tensor:
    with safe_open(path, framework="pt", device="cpu") as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor


def _npy(path: Path, key: str, file: IO[bytes], size: int) -> Stored:
    """An array in numpy's format. size: of the file, in bytes. Refuses objects, which are pickles.

    The header must account for every byte, so that no header makes us allocate more than there is.
    """
    where = f"{path}: {quoted(key)}" if key else path
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(file)
        start = file.tell()
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as e:
        why = " ".join(str(e).split())[:200]
        raise wrong(where, f"is no array in numpy's format ({why}); save it again") from None
    code = CODES.get(dtype.str[1:], "")
    if not code or dtype.hasobject:
        raise wrong(
            where,
            f"has numpy's dtype {quoted(str(dtype), 60)}, expected float64, float32, float16 or "
            "int64 (bfloat16 as float32, and its name as the dtype in dump.json); save it so",
        )
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != size - start:
        raise wrong(
            where,
            f"holds {size - start} bytes, expected those of {list(shape)[:8]} numbers of "
            f"{dtype.itemsize} bytes; save it again",
        )

    def load() -> Tensor:
        with _opened(path, key) as again:
            again.read(start)
            data = np.frombuffer(again.read(size - start), dtype=dtype)
        array = data.reshape(shape, order="F" if fortran else "C")
        return torch.from_numpy(np.ascontiguousarray(array.astype(dtype.newbyteorder("="))))

    return Stored(path, key, tuple(int(n) for n in shape), code, load)


def _opened(path: Path, key: str) -> Any:
    """A .npy file, or a member of a .npz file, open for reading."""
    return zipfile.ZipFile(path).open(f"{key}.npy") if key else path.open("rb")


def _npz(path: Path) -> list[Stored]:
    try:
        with zipfile.ZipFile(path) as archive:
            found = []
            for member in archive.infolist():
                key, dot, end = member.filename.rpartition(".")
                if end != "npy" or not dot:
                    raise wrong(path, f"holds {quoted(member.filename)}, expected arrays only")
                with archive.open(member) as file:
                    found.append(_npy(path, key, file, member.file_size))
            return found
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError) as e:
        why = " ".join(str(e).split())[:200]
        raise wrong(path, f"is no whole .npz file ({why}); save it again") from None


def _pt(path: Path) -> list[Stored]:
    """A tensor, or a dict of them."""
    held: Any = None
    with suppress(Exception):  # whatever it is: torch's unpickler raises many kinds of errors
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(held, Tensor):
        held = {"": held}
    if not isinstance(held, dict) or not all(
        isinstance(key, str) and isinstance(x, Tensor) for key, x in held.items()
    ):
        raise wrong(
            path,
            "is not readable by torch.load(weights_only=True) as a tensor or a dict of tensors by "
            "name; save it as .safetensors",
        )
    return [
        Stored(path, key, tuple(x.shape), OF_TORCH.get(x.dtype, str(x.dtype)), partial(_same, x))
        for key, x in held.items()
    ]


def _same(x: Tensor) -> Tensor:
    return x
