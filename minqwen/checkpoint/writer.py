"""Writes a checkpoint directory that transformers loads strictly, without ever leaving half of one behind.

Everything about the files is known before the first tensor arrives: config.parameter_shapes() gives names, shapes
and order, so shards, headers and index are laid out first and each tensor goes straight to its place. Tensors may
therefore come in any order, and one at a time is in memory.

Atomicity: all is written to a sibling `.NAME.tmp-PID` and flushed to the disk; then one system call swaps it with
the destination (rename if there is none, Linux's renameat2(RENAME_EXCHANGE) if there is). Whatever happens before
that call, a full disk, a kill, a power cut, the old directory is as it was; after it, the new one is complete. What
a killed writer leaves is removed by the next write to the same destination. Where the exchange does not exist
(macOS, some network file systems) the old directory is first renamed to `.NAME.old-PID`: a kill between the two
renames leaves it there, whole, and nothing at the destination.
"""

import ctypes
import fcntl
import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ..config import ModelConfig
from ..errors import CheckpointError
from .reader import DTYPES, INDEX, SINGLE, Checkpoint, _more, _q, require_regular

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_COMPANIONS = (".json", ".jinja", ".txt", ".md", ".model", "")  # tokenizer, templates, licence: never weights
_NOT_COPIED = re.compile(r"config\.json|quantize_config\.json|adapter_config\.json|.*\.index\.json|\..*")


def write_checkpoint(dst: str | os.PathLike, config: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]],
                     max_shard_bytes: int = 4 * 10**9, sources: str | os.PathLike | None = None,
                     extra_files: Mapping[str, bytes | str] | None = None,
                     dtypes: Mapping[str, torch.dtype] | None = None) -> None:
    """Writes config.json, the shards (with model.safetensors.index.json if more than one) and companion files.

    tensors      (name, tensor) pairs, in any order, each of config.parameter_shapes() once and nothing else, in
                 config.dtype, or in dtypes[name] where that is given (a checkpoint that mixes precisions).
    sources      a directory whose tokenizer, generation_config and licence files are copied
    extra_files  {plain file name: content}, after and over those
    An existing dst is replaced only if it is a checkpoint and nothing else. Raises CheckpointError, one line, for a
    tensor that does not fit, a destination that must not be replaced, or a disk that is full; dst is then untouched.
    """
    dst = Path(os.path.realpath(dst))
    plan = plan_shards(config, max_shard_bytes, dtypes or {})
    _refuse_foreign(dst)
    tmp = dst.parent / f".{dst.name}.tmp-{os.getpid()}"
    lock = None
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(dst)
        need, free = sum(size for _, size, _ in plan.values()), shutil.disk_usage(dst.parent).free
        if need > free:
            raise CheckpointError(f"{dst}: needs {need} bytes, but {free} are free; nothing was written")
        tmp.mkdir()
        lock = os.open(tmp, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)  # says "alive" to _remove_stale, until this process ends in any way
        if sources is not None:
            _copy_companions(Path(sources), tmp)
        for name, content in (extra_files or {}).items():
            if not re.fullmatch(r"[\w-][\w.-]*", name) or name in (INDEX, "config.json") or name.endswith(".safetensors"):
                raise CheckpointError(f"{dst}: extra file {_q(name)} is refused; expected a plain name that is not a "
                                      "weight file, the index or config.json")
            (tmp / name).write_bytes(content.encode() if isinstance(content, str) else content)
        config.save(tmp)
        _write_weights(tmp, plan, tensors)
        Checkpoint(tmp).check()  # what was written is read back before it replaces anything
        for file in [*tmp.iterdir(), tmp]:
            _flush(file)
        _put_in_place(tmp, dst)
    except OSError as e:
        raise CheckpointError(f"{dst}: could not be written: {e.strerror or e}"
                              f"{f' ({e.filename})' if e.filename else ''}; what was there before is untouched") from None
    finally:
        if lock is not None:
            shutil.rmtree(tmp, ignore_errors=True)  # half a checkpoint, or, after the swap, the old one
            os.close(lock)


def plan_shards(config: ModelConfig, max_shard_bytes: int = 4 * 10**9,
                dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, tuple[bytes, int, dict]]:
    """{file: (header, file size in bytes, {tensor: (offset in the file, dtype, shape)})}.

    Cut as Hugging Face does: tensors in module order, a new shard when the next would not fit in max_shard_bytes.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}; expected at least 1")
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...], int]]] = [{}]
    filled = 0
    for name, shape in config.parameter_shapes().items():
        dtype = (dtypes or {}).get(name, getattr(torch, config.dtype))
        if dtype not in _CODES:
            raise CheckpointError(f"tensor {_q(name)} has dtype {dtype}; expected one of {', '.join(DTYPES)}")
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, tuple(shape), size)
        filled += size
    plan = {}
    for i, shard in enumerate(shards, 1):
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(shard, key=lambda n: -shard[n][0].itemsize):  # widest first keeps every tensor aligned
            dtype, shape, size = shard[name]
            header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": (end, end + size)}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        plan[file] = (len(text).to_bytes(8, "little") + text, start + end,
                      {n: (start + header[n]["data_offsets"][0], shard[n][0], shard[n][1]) for n in shard})
    return plan


def _write_weights(tmp: Path, plan: dict, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    for file, (header, size, _) in plan.items():
        (tmp / file).write_bytes(header)
        os.truncate(tmp / file, size)
    waiting = {name: (file, *where) for file, (_, _, places) in plan.items() for name, where in places.items()}
    if len(plan) > 1:
        total = sum(size - len(header) for header, size, _ in plan.values())
        index = {"metadata": {"total_size": total}, "weight_map": {n: waiting[n][0] for n in sorted(waiting)}}
        (tmp / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    known = set(waiting)
    for name, tensor in tensors:
        if name not in waiting:
            raise CheckpointError(f"tensor {_q(name)} was given twice; expected each once" if name in known else
                                  f"tensor {_q(name)} is not one of the {len(known)} that the config describes")
        file, offset, dtype, shape = waiting.pop(name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(f"tensor {_q(name)} is {tensor.dtype} {tuple(tensor.shape)}; the config makes it "
                                  f"{dtype} {shape}; convert the tensor or change the config")
        with open(tmp / file, "r+b", buffering=0) as f:
            data = memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            f.seek(offset)
            while data:
                data = data[f.write(data):]
    if waiting:
        raise CheckpointError(f"tensor {_q(next(iter(waiting)))} was not given{_more(list(waiting))}; "
                              f"expected all {len(known)} that the config describes")


def _refuse_foreign(dst: Path) -> None:
    """An existing destination may be replaced if it is empty or holds a checkpoint and only such files."""
    if not dst.name or (os.path.lexists(dst) and not dst.is_dir()):
        raise CheckpointError(f"{dst}: exists and is not a directory that can be replaced; choose another")
    try:
        present = sorted(dst.iterdir()) if dst.exists() else []
    except OSError as e:
        raise CheckpointError(f"{dst}: cannot be listed: {e.strerror}") from None
    names = {p.name for p in present}
    if present and not ("config.json" in names and names & {SINGLE, INDEX}):
        raise CheckpointError(f"{dst}: exists and is not a checkpoint (it holds {_q(present[0].name)}"
                              f"{_more(present)}); it is not replaced; choose another directory or empty it")
    for p in present:
        if not p.is_file() or p.suffix not in (*_COMPANIONS, ".safetensors"):
            raise CheckpointError(f"{dst}: holds {_q(p.name)}, which is no part of a checkpoint and would be lost; "
                                  "it is not replaced; choose another directory or move that away")


def _copy_companions(source: Path, tmp: Path) -> None:
    if not source.is_dir():
        raise CheckpointError(f"{source}: is not a directory; expected the one to copy the tokenizer's files from")
    for p in sorted(source.iterdir()):
        if p.suffix in _COMPANIONS and not p.is_dir() and not _NOT_COPIED.fullmatch(p.name):
            require_regular(p)
            shutil.copyfile(p, tmp / p.name)


def _remove_stale(dst: Path) -> None:
    """Removes what killed writers to this destination left: a live one holds a lock on its directory."""
    for p in dst.parent.glob(f".{glob.escape(dst.name)}.tmp-*"):
        if p.is_dir() and not p.is_symlink():
            fd = os.open(p, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(p)
            except OSError:
                pass  # somebody's, or not ours to remove
            finally:
                os.close(fd)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _put_in_place(tmp: Path, dst: Path) -> None:
    """tmp becomes dst; an old dst ends up at tmp's name, to be removed."""
    if not dst.exists():
        os.rename(tmp, dst)
    elif not _exchange(tmp, dst):
        old = dst.parent / f".{dst.name}.old-{os.getpid()}"
        os.rename(dst, old)
        try:
            os.rename(tmp, dst)
        except BaseException:
            os.rename(old, dst)
            raise
        os.rename(old, tmp)
    try:
        _flush(dst.parent)
    except OSError:
        pass  # the swap has happened; only its place on the disk is not yet certain


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two directories in one step; False where the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0
