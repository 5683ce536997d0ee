"""Reads a safetensors directory in Hugging Face layout; refuses everything that is not exactly one.

The layout: config.json beside either model.safetensors or model.safetensors.index.json and the shards it names.
A safetensors file is an 8-byte little-endian header length, a JSON header {name: dtype, shape, data_offsets},
then the data (https://github.com/huggingface/safetensors). No pickle is ever opened.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..config import ModelConfig
from ..errors import CheckpointError
from ..parallel import Shard

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}

# A mapped page counts as resident until the mapping is closed, so tensors are copied out of a fresh mapping of
# this many bytes at a time: that, and not the largest tensor, is what a load needs beyond what it keeps.
PIECE_BYTES = 4 << 20
MAX_INDEX_BYTES = 100 << 20  # safetensors' own bound on a header

_SHARD_FILE = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl)")
_BASE_MODEL = re.compile(r"(embed_tokens|layers|norm)\.")  # what Qwen2Model alone, without its head, would save
_ROPE_BUFFER = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class Checkpoint:
    """A checked view of a checkpoint directory. Opening reads the config, the index and every header, no weights.

    names  canonical tensor names: `model.` added where a base-model save left it out, `rotary_emb.inv_freq`
           dropped, and on a tied model `lm_head.weight` dropped too (`check` requires it to equal the embedding).
    Raises CheckpointError (or ConfigError for config.json), one line, for whatever is wrong with the directory.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        files = self._find_files()
        require_regular(self.path / "config.json")
        self.config = ModelConfig.from_json(self.path)
        if self.config.quantization_config is not None:
            method = self.config.quantization_config.get("quant_method")
            raise CheckpointError(f"{self.path / 'config.json'}: quantization_config says quant_method {method!r}; "
                                  "quantised weights are not read here, expected the bf16 checkpoint")
        self._stamps = {file: require_regular(self.path / file) for file in files}
        self._tensors: dict[str, tuple[str, str, torch.dtype, tuple[int, ...]]] = {}  # file, name in it, dtype, shape
        for file, listed in files.items():
            self._read_header(file, listed)
        self._head_copy = self._tensors.pop(HEAD, None) if self.config.tie_word_embeddings else None
        self.names = list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[3]

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name)[2]

    def file(self, name: str) -> Path:
        """The file that holds a tensor, for error messages."""
        return self.path / self._entry(name)[0]

    def read(self, name: str, shard: Shard | None = None, dtype: torch.dtype | None = None,
             device: torch.device | str = "cpu") -> torch.Tensor:
        """One tensor, or the slice [start, stop) of one dimension, as a tensor of its own (never a mapping).

        dtype defaults to the file's. Only the pages of the slice are read, and converted and moved piece by piece,
        so that the process never holds more than the result and PIECE_BYTES.
        """
        entry = self._entry(name)
        shape = list(entry[3])
        if shard is not None:
            if not (0 <= shard.dim < len(shape) and 0 <= shard.start <= shard.stop <= shape[shard.dim]):
                raise CheckpointError(f"{self.file(name)}: tensor {_q(name)} has shape {entry[3]}; "
                                      f"it has no slice {shard.start}:{shard.stop} along dimension {shard.dim}")
            shape[shard.dim] = shard.stop - shard.start
        out = torch.empty(shape, dtype=dtype or entry[2], device=device)
        for i, piece in self._pieces(entry, shard):
            out[i:i + len(piece)].copy_(piece)
        return out

    def check(self) -> None:
        """Compares names and shapes with config.parameter_shapes(); reads only what must equal something known."""
        if self.config.num_hidden_layers > len(self.names):  # before a table of as many entries is built
            raise CheckpointError(f"{self.path / 'config.json'}: num_hidden_layers is {self.config.num_hidden_layers}, "
                                  f"but there are {len(self.names)} tensors in all; fix config.json")
        expected = self.config.parameter_shapes()
        extra = [n for n in self.names if n not in expected]
        if extra:
            raise CheckpointError(f"{self.file(extra[0])}: unexpected tensor {_q(extra[0])}{_more(extra)}; config.json "
                                  f"describes {len(expected)} tensors without it; fix config.json or remove the tensor")
        missing = [n for n in expected if n not in self._tensors]
        if missing:
            raise CheckpointError(f"{self.path}: tensor {_q(missing[0])} is missing{_more(missing)}; "
                                  f"found {len(self.names)} of the {len(expected)} that config.json describes; "
                                  "fetch the checkpoint again or fix config.json")
        wrong = [n for n in expected if self.shape(n) != tuple(expected[n])]
        if wrong:
            raise CheckpointError(f"{self.file(wrong[0])}: tensor {_q(wrong[0])} has shape {self.shape(wrong[0])}"
                                  f"{_more(wrong)}; config.json makes it {tuple(expected[wrong[0]])}; fix config.json")
        if self._head_copy is not None and not self._same(self._head_copy, self._tensors[EMBEDDING]):
            raise CheckpointError(f"{self.path / self._head_copy[0]}: tensor {_q(HEAD)} differs from {_q(EMBEDDING)}, "
                                  "but config.json says tie_word_embeddings true; set it to false if the head is real")
        for name in expected:  # a Llama-style config has this bias where Qwen2 has none: the same function only if 0
            if name.endswith(".o_proj.bias") and bool(self.read(name).any()):
                raise CheckpointError(f"{self.file(name)}: tensor {_q(name)} is not zero; Qwen2 has no such bias, "
                                      "so this model computes something else and cannot be read")

    def check_finite(self) -> None:
        """Reads every weight, PIECE_BYTES at a time; raises naming the first tensor that holds NaN or infinity."""
        for name, entry in self._tensors.items():
            nans = infs = 0
            for _, piece in self._pieces(entry):
                low, high = piece.aminmax() if piece.numel() else (piece.sum(), piece.sum())
                if not (low.isfinite() and high.isfinite()):  # NaN wins both: one pass, no mask where all is well
                    nans += int(piece.isnan().sum())
                    infs += int(piece.isinf().sum())
            if nans or infs:
                raise CheckpointError(f"{self.file(name)}: tensor {_q(name)} holds {nans} NaN and {infs} infinite values "
                                      f"of {entry[3]}; expected finite weights; fetch or export the checkpoint again")

    def _entry(self, name: str) -> tuple[str, str, torch.dtype, tuple[int, ...]]:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: no tensor {_q(name)} among its {len(self._tensors)}")
        return self._tensors[name]

    def _find_files(self) -> dict[str, set[str] | None]:
        """{file: the tensors the index says it holds, or None without an index}."""
        if not self.path.is_dir():
            if self.path.exists():
                raise CheckpointError(f"{self.path}: is a file; expected the directory that holds config.json and it")
            hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(self.path))
            raise CheckpointError(f"{self.path}: no such directory" + (
                f"; nothing is downloaded here: if it is a Hugging Face name, run `hf download {self.path} "
                f"--local-dir DIR` and give DIR" if hub else "; expected one with config.json and model.safetensors"))
        try:
            present = sorted(os.listdir(self.path))
        except OSError as e:
            raise CheckpointError(f"{self.path}: cannot be listed: {e.strerror}") from None
        if INDEX in present:
            files = self._read_index()
        elif SINGLE in present:
            files = {SINGLE: None}
        else:
            pickles = [f for f in present if _PICKLE.fullmatch(f)]
            shards = [f for f in present if f.endswith(".safetensors")]
            why = ("the directory is empty" if not present else
                   f"found {shards[0]} without an index" if shards else
                   f"found {pickles[0]}, a pickle, which can run code and is never opened: convert it with "
                   "transformers' from_pretrained and save_pretrained" if pickles else f"found {len(present)} other files")
            raise CheckpointError(f"{self.path}: no {SINGLE} and no {INDEX}; {why}")
        stray = [f for f in present if f not in files and (f == SINGLE or _SHARD_FILE.fullmatch(f))]
        if stray:
            raise CheckpointError(f"{self.path / stray[0]}: is not named by {INDEX if INDEX in present else SINGLE}"
                                  f"{_more(stray)}; expected one checkpoint per directory; remove what does not belong")
        return files

    def _read_index(self) -> dict[str, set[str]]:
        path = self.path / INDEX
        size = require_regular(path)[1]
        if size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{path}: is {size} bytes long; expected less than {MAX_INDEX_BYTES}")
        index = _parse_json(path, path.read_bytes())
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path}: key 'weight_map' is missing or empty; expected {{tensor name: file name}}")
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            if not (isinstance(file, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", file)):
                raise CheckpointError(f"{path}: tensor {_q(name)} is said to be in {_q(file)}; expected the plain name "
                                      "of a .safetensors file in the same directory")
            files.setdefault(file, set()).add(name)
        return files

    def _read_header(self, file: str, listed: set[str] | None) -> None:
        path = self.path / file
        with self._opened(file) as f:
            with open(path, "rb") as raw:  # safetensors lets the last of two equal names win
                _parse_json(path, raw.read(int.from_bytes(raw.read(8), "little")))
            stored = list(f.keys())
            for name in stored:
                piece = f.get_slice(name)
                shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
                if listed is not None and name not in listed:
                    raise CheckpointError(f"{path}: holds tensor {_q(name)}, which {INDEX} does not place in this file")
                if _ROPE_BUFFER.fullmatch(name):
                    continue
                canonical = "model." + name if _BASE_MODEL.match(name) else name
                if canonical in self._tensors:
                    other = self._tensors[canonical]
                    raise CheckpointError(f"{path}: tensor {_q(name)} is a duplicate of {_q(other[1])} in {other[0]}; "
                                          "expected each tensor once")
                if dtype not in DTYPES or not shape:
                    raise CheckpointError(f"{path}: tensor {_q(name)} has dtype {dtype} and shape {shape}; expected "
                                          f"weights of one or two dimensions in one of {', '.join(DTYPES)}")
                self._tensors[canonical] = (file, name, DTYPES[dtype], shape)
        absent = sorted((listed or set()) - set(stored))
        if absent:
            raise CheckpointError(f"{path}: does not hold tensor {_q(absent[0])}{_more(absent)}, which {INDEX} "
                                  "places there; fetch the shard again")

    @contextmanager
    def _opened(self, file: str) -> Iterator:
        path = self.path / file
        if require_regular(path) != self._stamps[file]:  # a mapping of a file that shrinks would kill the process
            raise CheckpointError(f"{path}: changed since the checkpoint was opened; open it again")
        try:
            handle = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError, RuntimeError) as e:  # RuntimeError: torch could not map the file
            why = " ".join(str(e).split())[:200]
            raise CheckpointError(f"{path}: not a whole safetensors file ({path.stat().st_size} bytes: {why}); "
                                  "it may be cut short or damaged; fetch it again") from None
        with handle as f:
            yield f

    def _pieces(self, entry: tuple, shard: Shard | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row in the slice, rows of it as a view of mapped memory): valid only until the next one."""
        file, name, dtype, shape = entry
        lo, hi = (shard.start, shard.stop) if shard is not None and shard.dim == 0 else (0, shape[0] if shape else 0)
        columns = slice(shard.start, shard.stop) if shard is not None and shard.dim == 1 else slice(None)
        # Whole rows are counted, not columns: pages and the kernel's read-ahead straddle them.
        row_bytes = max(1, torch.Size(shape[1:]).numel() * dtype.itemsize)
        rows = max(1, PIECE_BYTES // row_bytes)
        for i in range(lo, hi, rows):
            with self._opened(file) as f:
                part = f.get_slice(name)
                part = part[i:min(i + rows, hi), columns] if len(shape) > 1 else part[i:min(i + rows, hi)]
                yield i - lo, part

    def _same(self, a: tuple, b: tuple) -> bool:
        """Whether two stored tensors agree in dtype, shape and every bit."""
        return a[2:] == b[2:] and all(torch.equal(x.view(torch.uint8), y.view(torch.uint8))
                                      for (_, x), (_, y) in zip(self._pieces(a), self._pieces(b)))


def require_regular(path: Path) -> tuple[int, int, int]:
    """(inode, size, mtime) of a regular file, links followed (a Hugging Face cache links to ../../blobs).

    Looked at before it is opened, since to open a fifo blocks and to open a device may do anything.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}; "
                              "fetch the checkpoint again") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: is not a regular file; expected the file itself or a link to it")
    if found.st_size == 0:
        raise CheckpointError(f"{path}: is empty (0 bytes); fetch it again")
    try:
        with open(path, "rb") as f:
            start = f.read(24)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from None
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a git-lfs pointer of {found.st_size} bytes, not the file; run `git lfs pull`")
    return found.st_ino, found.st_size, found.st_mtime_ns


def _parse_json(path: Path, data: bytes) -> object:
    """JSON in which no key appears twice: of two tensors of one name, nobody can say which is meant."""
    def no_duplicates(pairs: list) -> dict:
        seen: dict = {}
        for key, value in pairs:
            if key in seen:
                raise CheckpointError(f"{path}: key {_q(key)} appears twice; expected each once")
            seen[key] = value
        return seen

    try:
        return json.loads(data, object_pairs_hook=no_duplicates)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: is not valid JSON: {e}; fetch it again") from None


def _q(name: object) -> str:
    """A name out of a file, in one short printable line whatever it holds."""
    text = repr(name)
    return text if len(text) <= 200 else text[:197] + "..."


def _more(names: list) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
