"""Reads a safetensors directory in Hugging Face layout; refuses everything that is not exactly one.

The layout: config.json beside model.safetensors, or beside model.safetensors.index.json and its shards. A
safetensors file is an 8-byte little-endian header length, a JSON header {name: dtype, shape, offsets}, and
the data (https://github.com/huggingface/safetensors). No pickle is ever opened.
"""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from minqwen.config import ModelConfig
from minqwen.errors import CheckpointError
from minqwen.parallel import Shard

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}

# A mapped page is resident until the mapping is closed, so tensors are copied out of fresh mappings, this
# many bytes at a time: that, and not the largest tensor, is what a load needs beyond what it keeps.
PIECE_BYTES = 4 << 20
MAX_INDEX_BYTES = 100 << 20  # safetensors' own bound on a header

_SHARD_FILE = re.compile(r"model-\d+-of-\d+\.safetensors")
_PLAIN_NAME = re.compile(r"[^/\\\0]+\.safetensors")
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl)")
_BASE_MODEL = re.compile(
    r"(embed_tokens|layers|norm)\."
)  # as Qwen2Model, which has no head, saves its names
_ROPE_BUFFER = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class _Stored(NamedTuple):
    file: str
    name: str  # in the file
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """A checked view of a checkpoint directory. Opening reads config, index and every header, no weights.

    names  canonical tensor names: `model.` added where a base-model save left it out, `rotary_emb.inv_freq`
           dropped, and on a tied model `lm_head.weight` too (`check` requires it to equal the embedding).
    Raises CheckpointError (ConfigError for config.json), one line, for whatever is wrong with the directory.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        files = self._find_files()
        require_regular(self.path / "config.json")
        self.config = ModelConfig.from_json(self.path)
        if self.config.quantization_config is not None:
            raise CheckpointError(
                f"{self.path / 'config.json'}: quantization_config says quant_method "
                f"{self.config.quantization_config.get('quant_method')!r}, but quantised "
                "weights cannot be read; expected the unquantised checkpoint"
            )
        self._stamps = {file: require_regular(self.path / file) for file in files}
        self._tensors: dict[str, _Stored] = {}
        for file, listed in files.items():
            self._read_header(file, listed)
        self._head_copy = self._tensors.pop(HEAD, None) if self.config.tie_word_embeddings else None
        self.names = list(self._tensors)

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
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One tensor, or the slice [start, stop) of one of its dimensions, in memory of its own, or in `out`.

        dtype defaults to the file's. Only the pages of the slice are read, and converted and moved piece by
        piece, so that the process never holds more than the result and a few times PIECE_BYTES.
        """
        stored = self._stored(name)
        shape = list(stored.shape)
        if shard is not None:
            if not (
                0 <= shard.dim < len(shape) and 0 <= shard.start <= shard.stop <= shape[shard.dim]
            ):
                raise _bad(
                    self.file(name),
                    f"tensor {_q(name)} has shape {stored.shape}, expected one with "
                    f"a slice {shard.start}:{shard.stop} along dimension {shard.dim}",
                )
            shape[shard.dim] = shard.stop - shard.start
        if out is None:
            out = torch.empty(shape, dtype=dtype or stored.dtype, device=device)
        for i, piece in self._pieces(stored, shard):
            out[i : i + len(piece)].copy_(piece)
        return out

    def check(self) -> None:
        """Compares names and shapes with config.parameter_shapes(), and the few values known beforehand."""
        layers, found = self.config.num_hidden_layers, len(self.names)
        if layers > found:  # before a table of that many layers is built
            raise _bad(
                self.path / "config.json",
                f"num_hidden_layers is {layers}, expected fewer "
                f"than the {found} tensors there are; fix it or fetch the checkpoint again",
            )
        expected = self.config.parameter_shapes()
        if extra := [n for n in self.names if n not in expected]:
            raise _bad(
                self.file(extra[0]),
                f"unexpected tensor {_q(extra[0])}{_more(extra)}, expected only "
                f"the {len(expected)} that config.json describes; fix the one or the other",
            )
        if missing := [n for n in expected if n not in self._tensors]:
            raise _bad(
                self.path,
                f"tensor {_q(missing[0])} is missing{_more(missing)}; found {found} of the "
                f"{len(expected)} that config.json describes; fetch the checkpoint again or fix it",
            )
        if wrong := [n for n in expected if self.shape(n) != tuple(expected[n])]:
            raise _bad(
                self.file(wrong[0]),
                f"tensor {_q(wrong[0])} has shape "
                f"{self.shape(wrong[0])}{_more(wrong)}, expected {tuple(expected[wrong[0]])} from "
                "config.json; fix the one or the other",
            )
        if self._head_copy is not None and not self._same(
            self._head_copy, self._tensors[EMBEDDING]
        ):
            raise _bad(
                self.path / self._head_copy.file,
                f"tensor {_q(HEAD)} differs from {_q(EMBEDDING)}, "
                "expected its copy, since config.json says tie_word_embeddings true; set that to "
                "false if the head is meant",
            )
        for name in expected:  # a Llama config has this bias, Qwen2 none: the same only if zero
            if name.endswith(".o_proj.bias") and self.read(name).any():
                raise _bad(
                    self.file(name),
                    f"tensor {_q(name)} is not zero, expected zeros, since Qwen2 has "
                    "no such bias; this is another model and cannot be read",
                )

    def check_finite(self) -> None:
        """Reads every weight, a piece at a time; raises for the first tensor that holds NaN or infinity."""
        for name, stored in self._tensors.items():
            nans = infs = 0
            for _, piece in self._pieces(stored):
                if (
                    piece.numel() and not torch.stack(piece.aminmax()).isfinite().all()
                ):  # one pass, no mask
                    nans += int(piece.isnan().sum())
                    infs += int(piece.isinf().sum())
            if nans or infs:
                raise _bad(
                    self.file(name),
                    f"tensor {_q(name)} holds {nans} NaN and {infs} infinite values "
                    f"among {torch.Size(stored.shape).numel()}, expected finite weights; fetch or "
                    "export the checkpoint again",
                )

    # ---- opening

    def _stored(self, name: str) -> _Stored:
        if name not in self._tensors:
            raise _bad(self.path, f"no tensor {_q(name)} among its {len(self._tensors)}")
        return self._tensors[name]

    def _find_files(self) -> dict[str, set[str] | None]:
        """{file: the tensors that the index says it holds, or None where there is no index}."""
        if not self.path.is_dir():
            if self.path.exists():
                raise _bad(
                    self.path, "is a file, expected the directory that holds it and config.json"
                )
            hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(self.path))
            hint = (
                (
                    "; nothing is downloaded here: if this is a Hugging Face name, run "
                    f"`hf download {self.path} --local-dir DIR` and give DIR"
                )
                if hub_name
                else ""
            )
            raise _bad(
                self.path, f"no such directory, expected one with config.json and {SINGLE}{hint}"
            )
        try:
            present = sorted(os.listdir(self.path))
        except OSError as e:
            raise _bad(self.path, f"cannot be listed ({e.strerror})") from None
        if INDEX not in present and SINGLE not in present:
            pickle = next(filter(_PICKLE.fullmatch, present), None)
            other = next((f for f in present if f.endswith(".safetensors")), None)
            what = (
                "nothing at all"
                if not present
                else f"{_q(other)} alone"
                if other
                else f"{_q(pickle)}, a pickle, which can run code and is never opened: convert it with "
                "transformers' from_pretrained and save_pretrained"
                if pickle
                else f"{len(present)} other files"
            )
            raise _bad(self.path, f"found neither {SINGLE} nor {INDEX}, but {what}")
        files = self._read_index() if INDEX in present else {SINGLE: None}
        if stray := [
            f for f in present if f not in files and (f == SINGLE or _SHARD_FILE.fullmatch(f))
        ]:
            raise _bad(
                self.path / stray[0],
                f"is not part of {INDEX if INDEX in present else SINGLE}"
                f"{_more(stray)}, expected one checkpoint in a directory; remove the other",
            )
        return files

    def _read_index(self) -> dict[str, set[str]]:
        path = self.path / INDEX
        size = require_regular(path)[1]
        if size > MAX_INDEX_BYTES:
            raise _bad(path, f"is {size} bytes long, expected less than {MAX_INDEX_BYTES}")
        index = _parse_json(path, path.read_bytes())
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise _bad(path, "key 'weight_map' is missing or empty, expected {tensor: file name}")
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            if not (isinstance(file, str) and _PLAIN_NAME.fullmatch(file)):
                raise _bad(
                    path,
                    f"tensor {_q(name)} is placed in {_q(file)}, expected the plain name of a "
                    ".safetensors file in the same directory",
                )
            files.setdefault(file, set()).add(name)
        return files

    def _read_header(self, file: str, listed: set[str] | None) -> None:
        path = self.path / file
        with self._opened(file) as f:
            with open(path, "rb") as raw:  # safetensors itself lets the last of two equal names win
                _parse_json(path, raw.read(int.from_bytes(raw.read(8), "little")))
            found = {name: f.get_slice(name) for name in f.keys()}
            found = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in found.items()}
        if listed is not None and listed != set(found):
            name = min(listed ^ set(found))
            has = "does not hold" if name in listed else "holds"
            raise _bad(
                path, f"{has} tensor {_q(name)}, expected as {INDEX} places it; fetch both again"
            )
        for name, (dtype, shape) in found.items():
            if _ROPE_BUFFER.fullmatch(name):
                continue
            canonical = "model." + name if _BASE_MODEL.match(name) else name
            if other := self._tensors.get(canonical):
                raise _bad(
                    path,
                    f"tensor {_q(name)} is also {_q(other.name)} in {other.file}, expected each "
                    "tensor once; remove one",
                )
            if dtype not in DTYPES or not shape:
                raise _bad(
                    path,
                    f"tensor {_q(name)} has dtype {dtype} and shape {shape}, expected a weight "
                    f"vector or matrix in one of {', '.join(DTYPES)}",
                )
            self._tensors[canonical] = _Stored(file, name, DTYPES[dtype], shape)

    # ---- reading

    @contextmanager
    def _opened(self, file: str) -> Iterator:
        path = self.path / file
        if require_regular(path) != self._stamps[file]:  # mapped, it would kill us if it shrank
            raise _bad(path, "changed since the checkpoint was opened; open it again")
        try:
            handle = safe_open(path, framework="pt", device="cpu")
        except (
            SafetensorError,
            OSError,
            RuntimeError,
        ) as e:  # RuntimeError: torch could not map the file
            why = " ".join(str(e).removeprefix("Error while deserializing header: ").split())[:200]
            raise _bad(
                path,
                f"{self._stamps[file][1]} bytes that are not a whole safetensors file ({why}); "
                "it may be cut short or damaged: fetch it again",
            ) from None
        with handle as f:
            yield f

    def _pieces(
        self, stored: _Stored, shard: Shard | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row within the slice, some rows of it in mapped memory); valid until the next one."""
        lo, hi = (shard.start, shard.stop) if shard and shard.dim == 0 else (0, stored.shape[0])
        columns = (slice(shard.start, shard.stop),) if shard and shard.dim == 1 else ()
        # Whole rows count even if only some columns are read: pages and the kernel's read-around span them.
        row_bytes = torch.Size(stored.shape[1:]).numel() * stored.dtype.itemsize
        rows = max(1, PIECE_BYTES // max(1, row_bytes))
        for i in range(lo, hi, rows):
            with self._opened(stored.file) as f:
                yield i - lo, f.get_slice(stored.name)[(slice(i, min(i + rows, hi)), *columns)]

    def _same(self, a: _Stored, b: _Stored) -> bool:
        """Whether two stored tensors agree in dtype, shape and every bit."""
        return (a.dtype, a.shape) == (b.dtype, b.shape) and all(
            torch.equal(x.view(torch.uint8), y.view(torch.uint8))
            for (_, x), (_, y) in zip(self._pieces(a), self._pieces(b))
        )


def require_regular(path: Path) -> tuple[int, int, int]:
    """(inode, size, mtime) of a regular file that is not empty. Follows links (Hugging Face's cache).

    Looked at before it is opened, since to open a fifo blocks and to open a device may do anything.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise _bad(path, "is not a regular file, expected the file itself or a link to it")
        with open(path, "rb") as f:
            start = f.read(23)
    except OSError as e:
        raise _bad(path, f"cannot be read ({e.strerror}); fetch the checkpoint again") from None
    if not start:
        raise _bad(path, "is empty (0 bytes); fetch it again")
    if start == b"version https://git-lfs":
        raise _bad(
            path,
            f"is a git-lfs pointer of {found.st_size} bytes, expected the file itself; run "
            "`git lfs pull`",
        )
    return found.st_ino, found.st_size, found.st_mtime_ns


def _bad(where: object, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: {what}")


def _parse_json(path: Path, data: bytes) -> object:
    """JSON in which no key appears twice: of two tensors of one name, nobody can say which is meant."""

    def unique(pairs: list) -> dict:
        d = dict(pairs)
        if len(d) < len(pairs):
            raise ValueError(
                f"key {_q(Counter(k for k, _ in pairs).most_common(1)[0][0])} appears twice"
            )
        return d

    try:
        return json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise _bad(path, f"is not valid JSON ({e}); fetch it again") from None


def _q(name: object) -> str:
    """A name out of a file as one short printable line, whatever it holds."""
    text = repr(name)
    return text if len(text) <= 200 else text[:197] + "..."


def _more(names: list) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
