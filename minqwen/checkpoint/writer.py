"""Writes a checkpoint directory that transformers loads strictly, and never leaves half of one behind.

All is known before the first tensor arrives: config.parameter_shapes() gives names, shapes and order, so
shards, headers and index are laid out first and each tensor goes straight to its place. Tensors may come in
any order, and one at a time is in memory.

Atomicity: all is written to a sibling `.NAME.tmp-PID` and flushed to the disk. Then one system call puts it
in place: rename, or Linux's renameat2(RENAME_EXCHANGE) where there is something to replace. Until that call,
whatever happens (a full disk, a kill, a power cut), the old directory is as it was; after it, the new one is
complete. What a killed writer leaves is removed by the next write to the same destination. Where the exchange
does not exist (macOS, some network file systems) the old directory is first renamed to `.NAME.old-PID`: a
kill between the two renames leaves it there, whole, and nothing at the destination.
"""

import ctypes
import fcntl
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from minqwen.checkpoint.reader import (
    DTYPES,
    INDEX,
    SINGLE,
    Checkpoint,
    _bad,
    _more,
    _q,
    require_regular,
)
from minqwen.config import ModelConfig
from minqwen.errors import CheckpointError

MAX_SHARD_BYTES = 4 * 10**9
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_COMPANIONS = (
    ".json",
    ".jinja",
    ".txt",
    ".md",
    ".model",
    "",
)  # tokenizer, template, licence: no weights
_EXTRA = re.compile(r"(?!config\.json$|.*\.index\.json$|.*\.safetensors$)[\w-][\w.-]*")
_NOT_COPIED = re.compile(
    r"config\.json|quantize_config\.json|adapter_config\.json|.*\.index\.json|\..*"
)


def write_checkpoint(
    dst: str | os.PathLike,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    sources: str | os.PathLike | None = None,
    extra_files: Mapping[str, bytes | str | Callable[[], bytes | str]] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    omit: Iterable[str] = (),
    resume: str | None = None,
) -> None:
    """Writes config.json, the weight files, their index if there are several, and companion files.

    tensors      (name, tensor) pairs in any order, each of config.parameter_shapes() once and nothing else,
                 in config.dtype, or in dtypes[name] where that is given (a checkpoint of mixed precision)
    sources      a directory whose tokenizer, generation_config and licence files are copied
    extra_files  {plain file name: content}, over those; a function is asked when all tensors have come
    omit         names of files in sources that are not copied
    resume       a name for this very content: a writer that was killed or interrupted, or filled the disk,
                 leaves what it had, and the next with the same name goes on from there. tensors is then a
                 function of the set of names that are written already, and gives the others
    A dst that exists is replaced only if it is a checkpoint and nothing else. Raises CheckpointError, for
    a tensor that does not fit, a dst that must not be replaced or a full disk; dst is then as it was.
    """
    dst = Path(os.path.realpath(dst))  # what a link points to is replaced, not the link
    plan = plan_shards(config, max_shard_bytes, dtypes or {})
    for name in extra_files or {}:
        if not _EXTRA.fullmatch(name):
            raise _bad(
                dst,
                f"extra file {_q(name)} is refused, expected a plain file name that is not "
                "config.json, a weight file or their index",
            )
    tmp = dst.parent / f".{dst.name}.tmp-{resume or os.getpid()}"
    lock, keep = None, False
    try:
        _refuse_foreign(dst)
        dst.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(dst, keep=tmp)
        need, free = sum(size for _, size, _ in plan.values()), shutil.disk_usage(dst.parent).free
        if need > free and not tmp.exists():
            raise _bad(dst, f"the disk has {free} bytes free, expected at least {need}; make room")
        tmp.mkdir(exist_ok=resume is not None)
        lock = os.open(tmp, os.O_RDONLY)
        fcntl.flock(
            lock, fcntl.LOCK_EX
        )  # held exactly as long as this process lives: see _remove_stale
        keep = resume is not None
        if sources is not None:
            _copy_companions(Path(sources), tmp, set(omit))
        config.save(tmp)
        _write_weights(tmp, plan, tensors, resumable=keep)
        keep = False
        for name, content in (extra_files or {}).items():
            content = content() if callable(content) else content
            (tmp / name).write_bytes(content.encode() if isinstance(content, str) else content)
        Checkpoint(tmp).check()  # read back before anything is replaced
        for path in (*tmp.iterdir(), tmp):
            _flush(path)
        _put_in_place(tmp, dst)
    except CheckpointError:
        keep = False  # wrong content does not get better by going on
        raise
    except OSError as e:
        raise _bad(
            dst,
            f"could not be written: {e.strerror or e}{f' ({e.filename})' if e.filename else ''}; "
            "what was there is as it was",
        ) from None
    finally:
        if lock is not None:
            if not keep:
                shutil.rmtree(
                    tmp, ignore_errors=True
                )  # half a checkpoint, or, after the exchange, the old one
            os.close(lock)


def plan_shards(
    config: ModelConfig,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, tuple[bytes, int, dict]]:
    """{file: (header with its length, size of the file, {tensor: (place in the file, dtype, shape)})}; bytes.

    Cut as Hugging Face does: in module order, a new shard where the next tensor would exceed max_shard_bytes.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1")
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...], int]]] = [{}]
    for name, shape in config.parameter_shapes().items():
        dtype = (dtypes or {}).get(name, getattr(torch, config.dtype))
        if dtype not in _CODES:
            raise CheckpointError(
                f"tensor {_q(name)} has dtype {dtype}, expected one of {', '.join(DTYPES)}"
            )
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and sum(s for _, _, s in shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1][name] = (dtype, tuple(shape), size)
    plan = {}
    for i, shard in enumerate(shards, 1):
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in sorted(shard, key=lambda n: -shard[n][0].itemsize):  # widest first: all aligned
            dtype, shape, size = shard[name]
            header[name] = {
                "dtype": _CODES[dtype],
                "shape": shape,
                "data_offsets": (end, end + size),
            }
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        places = {n: (start + header[n]["data_offsets"][0], *shard[n][:2]) for n in shard}
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        plan[file] = (len(text).to_bytes(8, "little") + text, start + end, places)
    return plan


JOURNAL = ".written"  # names of the tensors that are on the disk, one a line


def _write_weights(tmp: Path, plan: dict, tensors, resumable: bool = False) -> None:
    journal, done = tmp / JOURNAL, set()
    if journal.exists() and all(
        (tmp / f).is_file() and (tmp / f).stat().st_size == size for f, (_, size, _) in plan.items()
    ):
        done = set(
            journal.read_text().split("\n")[:-1]
        )  # a last line without its end was not finished
    else:
        for file, (header, size, _) in plan.items():
            (tmp / file).write_bytes(header)
            os.truncate(tmp / file, size)
    if resumable:
        tensors = tensors(done)
    waiting = {
        name: (file, *at) for file, (_, _, places) in plan.items() for name, at in places.items()
    }
    known = set(waiting)
    waiting = {name: at for name, at in waiting.items() if name not in done}
    if len(plan) > 1:
        total = sum(size - len(header) for header, size, _ in plan.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {n: waiting[n][0] for n in sorted(known)},
        }
        (tmp / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for name, tensor in tensors:
        if name not in waiting:
            raise CheckpointError(
                f"tensor {_q(name)} "
                + (
                    "was given twice, expected each once"
                    if name in known
                    else f"is not one of the {len(known)} that the config describes"
                )
            )
        file, place, dtype, shape = waiting.pop(name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"tensor {_q(name)} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{dtype} {shape} from the config; change the one or the other"
            )
        data = memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        with open(tmp / file, "r+b", buffering=0) as f:
            f.seek(place)
            while data:  # one call writes at most 2 GiB
                data = data[f.write(data) :]
            if resumable:
                os.fsync(f.fileno())
        if resumable:
            with open(journal, "a") as f:
                f.write(f"{name}\n")
        del tensor, data  # or it would stay while the next one is made
    journal.unlink(missing_ok=True)
    if waiting:
        raise CheckpointError(
            f"tensor {_q(next(iter(waiting)))} was not given{_more(list(waiting))}, "
            f"expected all {len(known)} that the config describes"
        )


def _refuse_foreign(dst: Path) -> None:
    """A destination that exists must be empty, or a checkpoint and nothing else that would be lost."""
    if not dst.name or (dst.exists() and not dst.is_dir()):
        raise _bad(dst, "is not a directory that can be replaced; choose another")
    present = sorted(dst.iterdir()) if dst.exists() else []
    names = {p.name for p in present}
    if present and not ("config.json" in names and names & {SINGLE, INDEX}):
        raise _bad(
            dst,
            f"exists and is not a checkpoint (it holds {_q(present[0].name)}{_more(present)}); "
            "it is not replaced: choose another directory",
        )
    for p in present:
        if not p.is_file() or p.suffix not in (*_COMPANIONS, ".safetensors"):
            raise _bad(
                dst,
                f"holds {_q(p.name)}, which is no part of a checkpoint and would be lost; it is "
                "not replaced: choose another directory or move that away",
            )


def _copy_companions(source: Path, tmp: Path, omit: set[str]) -> None:
    if not source.is_dir():
        raise _bad(source, "is not a directory, expected the one with the tokenizer's files")
    for p in sorted(source.iterdir()):
        if (
            p.suffix in _COMPANIONS
            and p.name not in omit
            and not p.is_dir()
            and not _NOT_COPIED.fullmatch(p.name)
        ):
            require_regular(p)
            shutil.copyfile(p, tmp / p.name)


def _remove_stale(dst: Path, keep: Path | None = None) -> None:
    """Removes what killed writers to this destination left; a live one holds a lock on its directory."""
    for name in glob.glob(f".{glob.escape(dst.name)}.tmp-*", root_dir=dst.parent):
        if keep is not None and name == keep.name:
            continue
        try:
            fd = os.open(dst.parent / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(dst.parent / name, ignore_errors=True)
        except OSError:
            pass  # locked
        finally:
            os.close(fd)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _put_in_place(tmp: Path, dst: Path) -> None:
    """tmp becomes dst; what dst was is then at tmp, to be removed."""
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
        pass  # it is in place; only a power cut within seconds could still bring the old one back


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two directories in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0
