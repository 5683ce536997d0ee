"""What every reader and writer of files needs: checks before a file is opened, strict JSON, atomic replacement.

Each function takes the class of the error to raise, so that a user reads one line from the room
that she asked something of: ConfigError for config.json, TokenizerError for tokenizer.json.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minqwen.errors import MinqwenError

MAX_SMALL_FILE = 100 << 20  # bytes of a JSON or text file; the real tokenizer.json has 7 million
GIT_LFS = b"version https://git-lfs"  # how a pointer file begins that git-lfs has not replaced yet


class Stamp(NamedTuple):
    """What changes when a file is replaced or written to."""

    inode: int
    size: int  # bytes
    modified_ns: int


def quoted(value: object, most: int = 200) -> str:
    """A name or value out of a file as one short printable line, whatever it holds."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def and_more(names: Sequence[object]) -> str:
    """ " (and 3 more)" after the first of four names; "" after the only one."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def printable(text: str) -> str:
    """The text in one line: control characters are spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# ---- reading ------------------------------------------------------------------------------------


def check_regular(path: Path, error: type[MinqwenError]) -> Stamp:
    """Raise `error` unless `path` is a regular file that holds something, or a link to one.

    The file is looked at before it is opened: to open a FIFO blocks, and to open a device may do
    anything. Links are followed, because Hugging Face's cache is made of them.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{path}: is not a regular file, expected the file itself or a link to it")
        with open(path, "rb") as file:
            start = file.read(len(GIT_LFS))
    except OSError as e:
        raise error(
            f"{path}: cannot be read ({e.strerror or e}); fetch the checkpoint again"
        ) from None
    if not start:
        raise error(f"{path}: is empty (0 bytes); fetch it again")
    if start == GIT_LFS:
        raise error(
            f"{path}: is a git-lfs pointer of {found.st_size} bytes, expected the file itself; "
            "run `git lfs pull`"
        )
    return Stamp(found.st_ino, found.st_size, found.st_mtime_ns)


def read_small(path: Path, error: type[MinqwenError], limit: int = MAX_SMALL_FILE) -> bytes:
    """The bytes of a regular file of at most `limit` bytes, read once."""
    size = check_regular(path, error).size
    if size > limit:
        raise error(f"{path}: is {size} bytes long, expected at most {limit}; fetch it again")
    with open(path, "rb") as file:
        return file.read(limit)


def read_text(path: Path, error: type[MinqwenError]) -> str:
    """The text of a small UTF-8 file."""
    try:
        return read_small(path, error).decode("utf-8")
    except UnicodeDecodeError as e:
        raise error(f"{path}: is not UTF-8 text ({e}); fetch it again") from None


def read_json(path: Path, error: type[MinqwenError]) -> Any:
    """The value in a small JSON file."""
    return parse_json(read_small(path, error), path, error)


def read_json_object(path: Path, error: type[MinqwenError]) -> dict[str, Any]:
    """The object in a small JSON file; `error` if it holds another kind of value."""
    value = read_json(path, error)
    if not isinstance(value, dict):
        raise error(
            f"{path}: the top level is {quoted(value, 100)}, expected a JSON object; "
            "fetch the file again or repair it"
        )
    return value


def parse_json(data: bytes, where: object, error: type[MinqwenError]) -> Any:
    """JSON in UTF-8 in which no key appears twice: of two, nobody can say which one is meant."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as e:  # also bad UTF-8, and integers too long for Python
        raise error(
            printable(
                f"{where}: is not valid JSON ({e}), expected unique keys and nothing after the end; "
                "fetch the file again or repair it"
            )
        ) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {quoted(twice)} appears more than once")
    return found


# ---- writing ------------------------------------------------------------------------------------


def write_text(path: Path, text: str, error: type[MinqwenError]) -> None:
    """Write a file in one step: whoever reads it meanwhile sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise error(
            f"{path}: cannot be written ({e.strerror or e}), expected a writable directory; "
            "choose another"
        ) from None


@contextlib.contextmanager
def replacing_directory(
    destination: Path, error: type[MinqwenError], resume: str | None = None
) -> Iterator[Path]:
    """A temporary sibling of `destination` to write into, which takes its place at the end.

    All is written to `.NAME.tmp-PID` and flushed to the disk. Then one system call puts it in
    place: rename, or Linux's renameat2(RENAME_EXCHANGE) where there is something to replace. Until
    that call, whatever happens (a full disk, a kill, a power cut), the old directory is as it was;
    after it, the new one is complete. What a killed writer leaves is removed by the next write to
    the same destination. Where the exchange does not exist (macOS, some network file systems), the
    old directory is first renamed to `.NAME.old-PID`: a kill between the two renames leaves it
    there, whole, and nothing at the destination.

    resume: a name for this very content. A writer that was killed or interrupted, or that filled
    the disk, then leaves what it had, and the next one with the same name finds it in the
    directory. An exception of class `error` says that the content is wrong: nothing is left then.
    """
    temporary = destination.parent / f".{destination.name}.tmp-{resume or os.getpid()}"
    lock, keep = None, resume is not None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(destination, keep=temporary)
        temporary.mkdir(exist_ok=resume is not None)
        lock = os.open(temporary, os.O_RDONLY)
        # Held exactly as long as this process lives: `_remove_abandoned` of others looks at it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield temporary
        keep = False
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        _put_in_place(temporary, destination)
    except error:
        keep = False  # wrong content does not get better by going on
        raise
    except OSError as e:
        name = f" ({e.filename})" if e.filename else ""
        raise error(
            f"{destination}: could not be written: {e.strerror or e}{name}; "
            "what was there is as it was"
        ) from None
    finally:
        if lock is not None:
            if not keep:  # half a directory or, after the exchange, the old one
                shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def flush(path: Path) -> None:
    """Returns when the disk has the file or the directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(destination: Path, keep: Path) -> None:
    """Remove what killed writers to this destination left; a living one holds a lock."""
    for name in glob.glob(f".{glob.escape(destination.name)}.tmp-*", root_dir=destination.parent):
        path = destination.parent / name
        if name == keep.name:
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass  # locked: its writer lives
        finally:
            os.close(descriptor)


def _put_in_place(new: Path, destination: Path) -> None:
    """`new` becomes `destination`; what that was is then at `new`, to be removed."""
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
    # It is in place; only a power cut within seconds could still bring the old one back.
    with contextlib.suppress(OSError):
        flush(destination.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
    result: int = renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange)
    return result == 0
