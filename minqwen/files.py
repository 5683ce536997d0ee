"""What every reader and writer of files needs: checks, strict JSON, atomic replacement.

Each function takes the class of the error to raise, because each room has its own: ConfigError for
config.json, TokenizerError for tokenizer.json. Every error is one line.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import io
import json
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minqwen.errors import MinqwenError, a_kind
from minqwen.errors import printable as printable  # the rooms above take it from here

# Bytes. The largest of its kind that is in use is named beside each, so that parsing what is larger
# still costs at most a few hundred megabytes.
MAX_SMALL_FILE = 100 << 20  # Gemma 3's tokenizer.json has 33 million, Qwen2.5's 7
MAX_HEADER = 32 << 20  # of a weight file's JSON: 100,000 tensors have 15 million
MOST_BYTES = {
    "config.json": 4 << 20,  # 60,000, with a quantised module a line
    "generation_config.json": 4 << 20,
    "adapter_config.json": 4 << 20,
    "dump.json": 4 << 20,
    "tokenizer_config.json": 16 << 20,  # Gemma 3's has 1.2 million
    "special_tokens_map.json": 16 << 20,
    "added_tokens.json": 16 << 20,
    "minqwen_heads.json": 16 << 20,  # 400,000 for the 72B with a padded MLP
    "model.safetensors.index.json": 32 << 20,  # DeepSeek-V3's has 9 million
    "vocab.json": 32 << 20,
    "merges.txt": 32 << 20,
    "tokenizer.model": 32 << 20,  # Gemma's has 4 million
}
MAX_TEMPLATE = 1 << 20  # of a *.jinja file; the longest in use have 30,000
MAX_NESTING = 100  # of JSON: config.json has four levels, a tool's schema ten
_HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # how JSON spells the half of a surrogate pair
GIT_LFS = b"version https://git-lfs"  # the first bytes of a pointer that git-lfs has not replaced


class Stamp(NamedTuple):
    """What changes when a file is replaced or written to."""

    inode: int
    size: int  # bytes
    modified_ns: int


def quoted(value: object, most: int = 200) -> str:
    """A name or value out of a file as one short printable line, whatever it holds."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more than 4,300 digits, or levels
        text = f"{a_kind(value)} that is too long to show"
    except Exception:  # of the object itself
        text = f"{a_kind(value)} that cannot be shown"
    return text if len(text) <= most else text[: most - 3] + "..."


def and_more(names: Sequence[object]) -> str:
    """What to say after the first of several names: " (and 3 more)" for four, "" for one."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


# ---- reading ------------------------------------------------------------------------------------


def check_directory(path: Path, error: type[MinqwenError]) -> None:
    """Raise `error` unless `path` is a directory. A Hugging Face name is recognised and explained.

    Whoever opens a model's directory asks this first, so that a mistyped name has one answer.
    """
    if os.path.isdir(path):
        return
    if os.path.lexists(path):
        raise _bad(path, "is a file, expected the directory that holds it and config.json", error)
    text = "no such directory, expected one with config.json and model.safetensors"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        text += (
            "; nothing is downloaded here: if this is a Hugging Face name, run "
            f"`hf download {path} --local-dir DIR` and give DIR"
        )
    else:
        text += "; correct the name"
    raise _bad(path, text, error)


def check_regular(path: Path, error: type[MinqwenError]) -> Stamp:
    """Raise `error` unless `path` is a regular file that holds something, or a link to one."""
    with opened(path, error) as (file, found):
        _check_start(path, file.read(len(GIT_LFS)), found, error)
    return Stamp(found.st_ino, found.st_size, found.st_mtime_ns)


def read_small(path: Path, error: type[MinqwenError], limit: int | None = None) -> bytes:
    """The bytes of a regular file of at most `limit` bytes, opened and read once.

    Without `limit` it is what a file of this name may have.
    """
    if limit is None:
        limit = _most_bytes(path)
    with opened(path, error) as (file, found):
        _check_size(path, found.st_size, limit, error)
        data = file.read(limit + 1)
    _check_start(path, data[: len(GIT_LFS)], found, error)
    _check_size(path, len(data), limit, error)  # it may have grown meanwhile
    return data


def _most_bytes(path: Path) -> int:
    usual = MAX_TEMPLATE if path.suffix == ".jinja" else MAX_SMALL_FILE
    return MOST_BYTES.get(path.name, usual)


@contextlib.contextmanager
def opened(
    path: Path, error: type[MinqwenError]
) -> Iterator[tuple[io.BufferedReader, os.stat_result]]:
    """A regular file, open for reading, and what it is.

    The kind of file is asked before it is opened: opening a FIFO blocks, and opening a device may
    do anything. It is asked again of what was opened, which may be another file by then; so it is
    opened without waiting. Links are followed, because Hugging Face's cache is made of them.
    """
    try:
        _check_kind(path, path.stat(), error)
        with open(path, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            _check_kind(path, found, error)
            yield file, found
    except OSError as e:
        raise _unreadable(path, e.strerror or e, error) from None
    except UnicodeEncodeError:  # half a surrogate pair, out of an index
        raise _unreadable(path, "no file can have this name", error) from None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _check_kind(path: Path, found: os.stat_result, error: type[MinqwenError]) -> None:
    if not stat.S_ISREG(found.st_mode):
        text = "is not a regular file, expected the file itself or a link to it"
        raise _bad(path, f"{text}; put the file there", error)


def _check_start(
    path: Path, start: bytes, found: os.stat_result, error: type[MinqwenError]
) -> None:
    if not start:
        raise _bad(path, "is empty (0 bytes), expected the whole file; fetch it again", error)
    if start == GIT_LFS:
        text = f"is a git-lfs pointer of {found.st_size} bytes, expected the file itself"
        raise _bad(path, f"{text}; run `git lfs pull`", error)


def _check_size(path: Path, size: int, limit: int, error: type[MinqwenError]) -> None:
    if size > limit:
        text = f"is {size} bytes long, expected at most {limit}; fetch it again"
        raise _bad(path, text, error)


def copy_regular(path: Path, to: Path, error: type[MinqwenError]) -> None:
    """Copy a regular file, or what a link leads to, with the permissions that it has.

    `to` is made anew. It gets the bytes of the file that was found to be regular, not of what may
    lie there a moment later, and nobody may read it before it has its permissions.
    """
    with opened(path, error) as (file, found):
        to.unlink(missing_ok=True)  # what a killed writer left may have a mode that forbids writing
        descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as copy:
            shutil.copyfileobj(file, copy)
            os.fchmod(descriptor, stat.S_IMODE(found.st_mode) & 0o777)


def read_text(path: Path, error: type[MinqwenError], limit: int | None = None) -> str:
    """The text of a small UTF-8 file, without a byte order mark, which is not part of it."""
    try:
        return read_small(path, error, limit).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise _bad(path, f"is damaged ({e}), expected UTF-8 text; fetch it again", error) from None


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their ends: LF or CR LF.

    str.splitlines also ends a line at U+2028, U+0085 and others, which are characters of a text.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_json(path: Path, error: type[MinqwenError]) -> Any:
    """The value in a small JSON file."""
    return parse_json(read_small(path, error), path, error)


def read_json_object(path: Path, error: type[MinqwenError]) -> dict[str, Any]:
    """The object in a small JSON file; `error` if the file holds another kind of value."""
    value = read_json(path, error)
    if not isinstance(value, dict):
        text = f"the top level is {quoted(value, 100)}, expected a JSON object"
        raise _bad(path, f"{text}; fetch the file again or repair it", error)
    return value


def parse_json(data: bytes, where: object, error: type[MinqwenError]) -> Any:
    """JSON in UTF-8 in which no key appears twice: of two, nobody can say which one is meant.

    It is at most MAX_NESTING levels deep, so that whatever walks through it afterwards comes to an
    end, and every string is one that UTF-8 can have.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
        _check_nesting(value)
        if _HALF_A_PAIR.search(data):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as e:  # also bad UTF-8, and integers too long for Python
        text = f"is not valid JSON ({e}), expected unique keys and nothing after the end"
        raise _bad(where, f"{text}; fetch the file again or repair it", error) from None


def _check_nesting(value: Any) -> None:
    level = [value]
    for _ in range(MAX_NESTING + 1):
        boxes = [box for box in level if isinstance(box, dict | list)]
        level = [x for box in boxes for x in (box.values() if isinstance(box, dict) else box)]
        if not boxes:
            return
    raise ValueError(f"it is nested more than {MAX_NESTING} levels deep")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {quoted(twice)} appears more than once")
    return found


def _bad(where: object, text: str, error: type[MinqwenError]) -> MinqwenError:
    return error(printable(f"{where}: {text}"))


def _unreadable(path: Path, reason: object, error: type[MinqwenError]) -> MinqwenError:
    text = f"cannot be read ({reason}), expected a readable file; correct the name or fetch it"
    return _bad(path, text, error)


# ---- writing ------------------------------------------------------------------------------------


def write_text(path: Path, text: str, error: type[MinqwenError]) -> None:
    """Write a file in one step: a reader sees the old text or the new one, never a part of it."""
    check_replaceable_file(path, error)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        text = f"cannot be written ({e.strerror or e}), expected a writable directory"
        raise _bad(path, f"{text}; choose another", error) from None


def check_replaceable_file(path: Path, error: type[MinqwenError]) -> None:
    """Raise `error` if something is there that is no file: whoever may could replace /dev/null."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise _bad(path, "is not a regular file, expected the name of one; choose another", error)


@contextlib.contextmanager
def replacing_directory(
    destination: Path, error: type[MinqwenError], resume: str | None = None
) -> Iterator[Path]:
    """A temporary directory to write into; at the end it takes the place of `destination`.

    All is written to the sibling `.NAME.tmp-PID` and flushed to the disk. Then one system call puts
    it in place: rename, or Linux's renameat2(RENAME_EXCHANGE) where there is something to replace.
    Whatever happens before that call (a full disk, a kill, a power cut), the old directory is as it
    was; after it, the new one is complete. What a killed writer leaves is removed by the next write
    to the same destination. Where the exchange does not exist (macOS, some network file systems),
    the old directory is first renamed to `.NAME.old-PID`: a kill between the two renames leaves it
    there, whole, and nothing at the destination.

    resume: a name for exactly this content. With it, a writer that is killed or interrupted, or
    that fills the disk, leaves what it has written so far, and the next writer with the same name
    finds that in the directory. An exception of class `error` says that the content is wrong: then
    nothing is left.
    """
    temporary = destination.parent / f".{destination.name}.tmp-{resume or os.getpid()}"
    lock, keep = None, resume is not None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(destination, keep=temporary if resume else None)
        temporary.mkdir(exist_ok=resume is not None)
        lock = os.open(temporary, os.O_RDONLY)
        # The lock ends with this process, so `_remove_abandoned` can tell a killed writer from a
        # living one.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield temporary
        keep = False
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        _put_in_place(temporary, destination)
    except error:
        keep = False  # to go on writing would not make wrong content right
        raise
    except OSError as e:
        name = f" ({e.filename})" if e.filename else ""
        text = f"could not be written: {e.strerror or e}{name}; what was there is as it was"
        raise _bad(destination, text, error) from None
    finally:
        if lock is not None:
            if not keep:  # an unfinished directory or, after the exchange, the old one
                shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def flush(path: Path) -> None:
    """Wait until the disk has the contents of a file or the entries of a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(destination: Path, keep: Path | None) -> None:
    """Remove what killed writers to this destination left, except `keep`."""
    for name in glob.glob(f".{glob.escape(destination.name)}.tmp-*", root_dir=destination.parent):
        path = destination.parent / name
        if path == keep:
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass  # its writer lives and holds the lock
        finally:
            os.close(descriptor)


def _put_in_place(new: Path, destination: Path) -> None:
    """`new` becomes `destination`. The caller removes the old directory, which is then at `new`."""
    if not destination.exists():
        os.rename(new, destination)
    elif not _exchange(new, destination):
        old = destination.parent / f".{destination.name}.old-{os.getpid()}"
        os.rename(destination, old)
        try:
            os.rename(new, destination)
        except BaseException:
            os.rename(old, destination)
            raise
        os.rename(old, new)
    # The new directory is in place. Without this flush, a power cut within seconds could bring the
    # old one back; where the flush fails there is nothing better to do.
    with contextlib.suppress(OSError):
        flush(destination.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step. False if the system or the file system cannot do that."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
    result: int = renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange)
    return result == 0
