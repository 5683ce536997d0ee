"""Reads what another engine computed: a directory that lab/dump.py wrote, or plain arrays.

A plain directory holds .npy, .npz and .safetensors files, and .pt files if the caller allows them.
Each array is named by its file (.npy, .pt of one tensor) or by its key in the file. Names are those
of our points, TransformerLens's for them, or Hugging Face's of the module whose output it is
(`HF_OUTPUTS`), of its input with ".input" at the end (`HF_INPUTS`), or hidden_states.N. A batch
dimension of 1 and heads that are one row, [T, H d], are understood. Optional are `input_ids` and
`positions`, and a dump.json with {"dtype": "bfloat16"}, where the arrays are wider than what the
engine computed in. Files that are called 0.safetensors, 1.npz and so on are passes; otherwise all
files are one pass.

No pickle is read, but .pt through torch's weights-only loading, if the caller allows it. Nothing is
read of a tensor before its shape, its dtype and its size in the file are as they must be.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minqwen.checks import did_you_mean, dtype_name, integer, one_of
from minqwen.config import ModelConfig
from minqwen.errors import DumpError
from minqwen.files import quoted, read_json_object
from minqwen.lab.diff.arrays import (
    FLOATS,
    INTEGERS,
    OF_TORCH,
    SUFFIXES,
    Stored,
    stored_arrays,
    wrong,
)
from minqwen.model.trace import Point, canonical, every_name, hidden_state_names, point_of
from minqwen.parallel import kv_heads_per_rank

FORMAT = "minqwen dump 1"
MOST_TOKENS = 1 << 20  # of one pass; what a header may say
PASS = re.compile(r"(\d{1,5})(?:\.rank(\d{1,3})of(\d{1,3}))?")
LISTS = {"input_ids": "input_ids", "positions": "positions", "position_ids": "positions"}

# The point that a module of Hugging Face's puts out, and the one that goes into it.
HF_MODEL = {"model.embed_tokens": "embed", "model.norm": "final_norm", "lm_head": "logits"}
HF_OUTPUTS = {
    "": "resid_post",
    ".input_layernorm": "norm1",
    ".self_attn.q_proj": "attn.q",
    ".self_attn.k_proj": "attn.k",
    ".self_attn.v_proj": "attn.v",
    ".self_attn.o_proj": "attn.out",
    ".self_attn": "attn.out",
    ".post_attention_layernorm": "norm2",
    ".mlp.gate_proj": "mlp.gate",
    ".mlp.up_proj": "mlp.up",
    ".mlp.down_proj": "mlp.out",
    ".mlp": "mlp.out",
}
HF_INPUTS = {
    "": "resid_pre",
    ".input_layernorm": "resid_pre",
    ".self_attn": "norm1",
    ".self_attn.o_proj": "attn.z",
    ".post_attention_layernorm": "resid_mid",
    ".mlp": "norm2",
    ".mlp.down_proj": "mlp.act",
}


@dataclass
class PassFiles:
    """The arrays of one forward pass: by name, then by rank."""

    ranks: int = 1
    found: dict[str, dict[int, Stored]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)  # what T and L were found to be

    def add(self, name: str, rank: int, stored: Stored) -> None:
        others = self.found.setdefault(name, {})
        if rank in others:
            raise wrong(
                stored.where,
                f"is {name}, and so is {others[rank].where}, expected one of them; remove one",
            )
        others[rank] = stored


class Dump:
    """What another engine computed in some forward passes. `open` makes it.

    passes: how many. dtype: what the engine computed in. engine: its name, or "".
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        passes: list[PassFiles],
        dtype: torch.dtype,
        engine: str,
    ):
        self.path, self.config, self.dtype, self.engine = path, config, dtype, engine
        self._passes = passes

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], config: ModelConfig, *, allow_pickle: bool = False
    ) -> Dump:
        """Read all headers, and check names and shapes against the config. No tensor is read yet.

        allow_pickle: read .pt files too, by torch.load(weights_only=True). Raises DumpError, in one
        line, for whatever is wrong with the directory.
        """
        path = Path(path)
        if not path.is_dir():
            raise wrong(path, "is no directory, expected one with a dump; correct the name")
        about = path / "dump.json"
        described = read_json_object(about, DumpError) if os.path.lexists(about) else {}
        ours = "format" in described
        if ours:
            one_of(f"{about}: format", described["format"], (FORMAT,), error=DumpError)
        passes = _Directory(path, config, allow_pickle).passes()
        if ours:
            _check_count(about, described, passes)
        for files in passes:
            _check_pass(files, config)
        engine = described.get("engine", "")
        if not isinstance(engine, str):
            raise wrong(about, f"engine is {quoted(engine)}, expected a text; correct it")
        return cls(path, config, passes, _dtype(about, described, passes), engine)

    @property
    def passes(self) -> int:
        return len(self._passes)

    def names(self, n: int) -> list[str]:
        """The points of pass n, in the order of computation."""
        found = self._passes[n].found
        return [name for name in every_name(self.config.num_hidden_layers) if name in found]

    def ids(self, n: int) -> list[int] | None:
        """The tokens of pass n, if the dump says which."""
        return self._list(n, "input_ids")

    def positions(self, n: int) -> list[int] | None:
        """Their positions, if the dump says them."""
        return self._list(n, "positions")

    def read(self, n: int, name: str) -> Tensor:
        """A point of pass n, the ranks' parts joined, in the file's dtype.

        Shapes are those of `minqwen.model.trace.POINTS`. Of logits there may be fewer rows than
        tokens: they are then the last tokens'.
        """
        files, name = self._passes[n], canonical(name)
        if name not in files.found:
            raise DumpError(f"{self.path}: pass {n} has no point {quoted(name)}")
        point = point_of(name)
        parts = [_shaped(stored, point, self, files) for stored in _ranks(files, name)]
        if len(parts) == 1:
            return parts[0]
        dim = 0 if point.shape.startswith("H") else 1
        if point.axis == "kv heads":  # neighbours may hold the same one
            held = kv_heads_per_rank(self.config, files.ranks) * files.ranks
            parts = parts[:: held // self.config.num_key_value_heads]
        return torch.cat(parts, dim)

    def _list(self, n: int, name: str) -> list[int] | None:
        if name not in self._passes[n].found:
            return None
        values: list[int] = _ranks(self._passes[n], name)[0].load().flatten().tolist()
        return values


def _ranks(files: PassFiles, name: str) -> list[Stored]:
    """The parts of a name in the order of the ranks; one for what every rank has whole."""
    by_rank = files.found[name]
    if name in LISTS or point_of(name).axis is None or files.ranks == 1:
        return [by_rank[min(by_rank)]]
    return [by_rank[rank] for rank in range(files.ranks)]


def _shaped(stored: Stored, point: Point, dump: Dump, files: PassFiles) -> Tensor:
    """The tensor without its batch dimension, its heads apart."""
    shape = _letters(point, dump.config, files)
    x = stored.load()
    if point.name == "logits":
        return x.reshape(-1, x.shape[-1])
    return x.reshape(shape)


# ---- shapes -------------------------------------------------------------------------------------


def _letters(point: Point, config: ModelConfig, files: PassFiles) -> list[int]:
    """The shape of a rank's part of a point. T and L are those of the pass."""
    ranks = files.ranks if point.axis is not None else 1
    of_letter = {
        "D": config.hidden_size,
        "H": config.num_attention_heads // ranks,
        "K": kv_heads_per_rank(config, ranks),
        "d": config.head_dim,
        "I": config.intermediate_size // ranks,
        "V": config.vocab_size,
        **files.lengths,
    }
    return [of_letter[letter] for letter in point.shape.split()]


def _check_count(about: Path, described: dict[str, Any], passes: list[PassFiles]) -> None:
    count = integer(f"{about}: passes", described.get("passes"), 1, error=DumpError)
    if count != len(passes):
        raise wrong(about, f"says {count} passes, and there are files of {len(passes)}; dump again")
    ranks = integer(f"{about}: ranks", described.get("ranks", 1), 1, error=DumpError)
    for n, files in enumerate(passes):
        if files.ranks != ranks:
            raise wrong(
                about,
                f"says {ranks} ranks, and the files of pass {n} say {files.ranks}; dump again",
            )


def _check_pass(files: PassFiles, config: ModelConfig) -> None:
    """Every part of every point is there, in its shape. Finds out T and L."""
    _check_ranks(files, config)
    points = [name for name in files.found if name not in LISTS]
    for name in set(files.found) - set(points):
        for stored in files.found[name].values():
            _check_list(stored, files)
    for name in sorted(points, key=lambda name: name == "logits"):  # they may lack tokens
        _check_parts(files.found[name], point_of(name), files)
        for stored in files.found[name].values():
            _check_point(stored, point_of(name), config, files)


def _check_parts(by_rank: dict[int, Stored], point: Point, files: PassFiles) -> None:
    """Every rank's part is there, if ranks have parts of the point."""
    if point.axis is not None and len(by_rank) < files.ranks:
        missing = min(set(range(files.ranks)) - set(by_rank))
        raise wrong(
            next(iter(by_rank.values())).where,
            f"is there of {len(by_rank)} ranks, expected all {files.ranks}; add that of rank "
            f"{missing}",
        )


def _check_ranks(files: PassFiles, config: ModelConfig) -> None:
    ranks, kv_heads = files.ranks, config.num_key_value_heads
    fits = not config.num_attention_heads % ranks and not config.intermediate_size % ranks
    if not fits or (kv_heads % ranks and ranks % kv_heads):
        path = next(iter(next(iter(files.found.values())).values())).path
        raise wrong(path, f"is of {ranks} ranks, which cannot share {config.source}; dump again")


def _check_list(stored: Stored, files: PassFiles) -> None:
    """ids or positions: integers, [T] or [1, T]."""
    if stored.code not in INTEGERS or math.prod(stored.shape) != max(stored.shape, default=0):
        raise wrong(
            stored.where,
            f"has dtype {stored.code} and shape {list(stored.shape)}, expected int64 of shape [T]; "
            "save it so",
        )
    _found(stored, "T", max(stored.shape), files)


def _check_point(stored: Stored, point: Point, config: ModelConfig, files: PassFiles) -> None:
    letters, shape = _plain(stored, point, config, files)
    if stored.code not in FLOATS or len(shape) != len(letters) or 0 in shape:
        raise _bad_shape(stored, point, config, files)
    rows = letters.index("T")
    if point.name == "logits":  # the last tokens' may be all there are
        files.lengths.setdefault("T", shape[rows])
        if shape[rows] > files.lengths["T"]:
            raise _bad_shape(stored, point, config, files)
    else:
        _found(stored, "T", shape[rows], files)
    if "L" in letters:
        _found(stored, "L", shape[-1], files)
    expected = _letters(point, config, files)
    if letters[-1] == "width":
        expected = [expected[0], expected[1] * expected[2]]
    if point.name == "logits":
        expected[0] = shape[0]
    if shape != expected:
        raise _bad_shape(stored, point, config, files)


def _plain(
    stored: Stored, point: Point, config: ModelConfig, files: PassFiles
) -> tuple[list[str], list[int]]:
    """The letters of the shape, and the shape without a batch of one.

    Heads may lie side by side in one dimension; then the letters are T and "width".
    """
    letters, shape = point.shape.split(), list(stored.shape)
    if letters[-1] == "d" and shape:
        heads = config.num_attention_heads // files.ranks
        if letters[1] == "K":
            heads = kv_heads_per_rank(config, files.ranks)
        if len(shape) == 2 or (shape[-1] == heads * config.head_dim and heads > 1):
            letters = [letters[0], "width"]
    if len(shape) == len(letters) + 1 and shape[0] == 1:
        shape = shape[1:]
    return letters, shape


def _found(stored: Stored, letter: str, length: int, files: PassFiles) -> None:
    """A length that all tensors of a pass must agree about."""
    if not 0 < length <= MOST_TOKENS:
        raise wrong(
            stored.where,
            f"is of {length} tokens, expected from 1 to {MOST_TOKENS}; dump one prompt at a time",
        )
    if files.lengths.setdefault(letter, length) != length:
        raise wrong(
            stored.where,
            f"has shape {list(stored.shape)}, of {length} tokens, expected the "
            f"{files.lengths[letter]} that others of its pass have; dump one prompt at a time",
        )


def _bad_shape(stored: Stored, point: Point, config: ModelConfig, files: PassFiles) -> DumpError:
    expected = {"T": files.lengths.get("T", "T"), "L": files.lengths.get("L", "L")}
    numbers = _letters(point, config, PassFiles(files.ranks, lengths={"T": 0, "L": 0}))
    shape = [
        str(expected.get(letter, number))
        for letter, number in zip(point.shape.split(), numbers, strict=True)
    ]
    part = f" on each of {files.ranks} ranks" if point.axis and files.ranks > 1 else ""
    return wrong(
        stored.where,
        f"has dtype {stored.code} and shape {list(stored.shape)}, expected floats "
        f"[{', '.join(shape)}]{part} by {config.source}; correct the one or the other",
    )


def _dtype(about: Path, described: dict[str, Any], passes: list[PassFiles]) -> torch.dtype:
    """What dump.json says, or the widest dtype of the arrays."""
    if "dtype" in described:
        name = dtype_name(f"{about}: dtype", described["dtype"], error=DumpError)
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    codes = {
        stored.code
        for files in passes
        for parts in files.found.values()
        for stored in parts.values()
    }
    widest = max(codes & set(FLOATS), key=FLOATS.__getitem__)
    return next(dtype for dtype, code in OF_TORCH.items() if code == widest)


# ---- names --------------------------------------------------------------------------------------


def point_name(name: str, num_layers: int) -> str | None:
    """Our name for one of ours, TransformerLens's or Hugging Face's; None if it means no point."""
    name = canonical(LISTS.get(name, name))
    if name in LISTS or name in every_name(num_layers):
        return name
    hidden = re.fullmatch(r"hidden_states\.(\d{1,5})", name)
    if hidden:
        names = hidden_state_names(num_layers)
        return names[int(hidden[1])] if int(hidden[1]) < len(names) else None
    module, dot, end = name.rpartition(".")
    table = HF_OUTPUTS
    if dot and end in ("input", "output"):
        name, table = module, HF_INPUTS if end == "input" else HF_OUTPUTS
    layer = re.fullmatch(r"model\.layers\.(\d{1,5})(|\..*)", name)
    if layer is None:
        return HF_MODEL.get(name) if table is HF_OUTPUTS else None
    point = table.get(layer[2])
    if point is None or int(layer[1]) >= num_layers:
        return None
    return f"layers.{int(layer[1])}.{point}"


# ---- files --------------------------------------------------------------------------------------


class _Directory:
    """The arrays of a directory, each under the name of its point."""

    def __init__(self, path: Path, config: ModelConfig, allow_pickle: bool):
        self.path, self.config, self.allow_pickle = path, config, allow_pickle

    def passes(self) -> list[PassFiles]:
        paths = sorted(p for p in self.path.iterdir() if p.suffix in SUFFIXES)
        if not paths:
            raise wrong(
                self.path,
                f"holds no file that ends in {', '.join(SUFFIXES)}, expected a dump; dump again",
            )
        numbered = [PASS.fullmatch(path.stem) for path in paths]
        if not all(numbered):
            return [self._one_pass(paths)]
        passes: dict[int, PassFiles] = {}
        for path, match in zip(paths, numbered, strict=True):
            assert match is not None
            self._add_numbered(passes, path, match)
        if sorted(passes) != list(range(len(passes))):
            missing = min(set(range(len(passes))) - set(passes))
            raise wrong(self.path, f"holds no file of pass {missing}, expected all; dump again")
        return [passes[n] for n in range(len(passes))]

    def _one_pass(self, paths: list[Path]) -> PassFiles:
        files = PassFiles()
        for path in paths:
            self._add(files, path, rank=0)
        return files

    def _add_numbered(self, passes: dict[int, PassFiles], path: Path, match: re.Match[str]) -> None:
        number, rank, ranks = int(match[1]), int(match[2] or 0), int(match[3] or 1)
        files = passes.setdefault(number, PassFiles(ranks))
        if files.ranks != ranks or not 0 <= rank < ranks:
            raise wrong(
                path,
                f"is of rank {rank} of {ranks}, and another file of its pass is of "
                f"{files.ranks} ranks; remove the files of the other dump",
            )
        self._add(files, path, rank)

    def _add(self, files: PassFiles, path: Path, rank: int) -> None:
        for stored in stored_arrays(path, self.allow_pickle):
            name = point_name(stored.name, self.config.num_hidden_layers)
            if name is None:
                layers = self.config.num_hidden_layers
                raise wrong(
                    stored.where,
                    f"is no point of a model of {layers} layers, expected a name of "
                    "`tools/trace.py points` or of a module such as "
                    "'model.layers.0.self_attn.q_proj'; rename or remove it"
                    + did_you_mean(stored.name, every_name(layers)),
                )
            files.add(name, rank, stored)
