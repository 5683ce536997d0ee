"""What must be the same on every rank is compared, before anything is computed with it.

Ranks that load different weights, or complete different prompts, do not fail: they compute nonsense
together. So they compare facts: a name and a text each. Where all is well that costs one exchange
of sixteen bytes. Where it is not, all ranks raise the same ParallelError, which says what differs,
and on which ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from minqwen.errors import ParallelError
from minqwen.parallel import Mesh, goes_on

WHOLE = 64 << 20  # bytes of a file up to which all of it is compared
SAMPLES, SAMPLE_BYTES = 256, 4096  # of a larger file, spread evenly, the first and last included
SHOWN = 60  # characters of a value in a message
MOST_SHOWN = 3  # facts that differ

Told = tuple[str, str]  # of one rank: a fact in short, and its note


def agree(mesh: Mesh, facts: Mapping[str, object], notes: Mapping[str, str] | None = None) -> None:
    """Raise ParallelError on every rank of `mesh` unless all have the same facts.

    All ranks call this. A value is a text, or has a repr that tells it from others. notes: what is
    said beside a fact that differs, such as where a file lies.
    """
    if mesh.size == 1:
        return
    texts = {name: v if isinstance(v, str) else repr(v) for name, v in facts.items()}
    if not _is_same(mesh, json.dumps(texts)):
        raise ParallelError(_differences(mesh, texts, notes or {}))


def _is_same(mesh: Mesh, text: str) -> bool:
    """Whether all ranks have this text. All call it."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    numbers = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(mesh.device)
    rows = mesh.all_gather(numbers).view(mesh.size, -1).tolist()
    return all(row == rows[0] for row in rows)


def _differences(mesh: Mesh, texts: Mapping[str, str], notes: Mapping[str, str]) -> str:
    own = {name: (_short(text), notes.get(name, "")) for name, text in texts.items()}
    ranks = [json.loads(data) for data in mesh.all_gather_bytes(json.dumps(own).encode())]
    told = []
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        values = [rank.get(name, ("not given", "")) for rank in ranks]
        if len({value for value, _ in values}) > 1:
            told.append(_who_has_what(name, values))
    more = f"; and {len(told) - MOST_SHOWN} more" if len(told) > MOST_SHOWN else ""
    return f"the ranks must agree, but {'; '.join(told[:MOST_SHOWN])}{more}"


def _who_has_what(name: str, values: Sequence[Told]) -> str:
    """As in "max_tokens is 5 on ranks 0, 1, but 7 on rank 2"."""
    groups: dict[str, list[int]] = {}
    for rank, (value, _) in enumerate(values):
        groups.setdefault(value, []).append(rank)
    parts = [f"{value}{values[r[0]][1]} on {_ranks(r)}" for value, r in groups.items()]
    return f"{name} is {', but '.join(parts)}"


def _ranks(numbers: Sequence[int]) -> str:
    some = ", ".join(map(str, numbers[:8])) + ", ..." * (len(numbers) > 8)
    return f"rank{'s' * (len(numbers) > 1)} {some}"


def _short(text: str) -> str:
    """A text or, of a long one, its beginning and a mark that tells it from others."""
    if len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN - 20]} ... (digest {hashlib.sha256(text.encode()).hexdigest()[:8]})"


# ---- files --------------------------------------------------------------------------------------


def digests_of_files(mesh: Mesh, files: Sequence[Path]) -> dict[str, str]:
    """Facts: a digest of each file; none at all if every rank has the very same files.

    All ranks call this.
    """
    identities = json.dumps([_identity(file) for file in files])
    if mesh.size == 1 or _is_same(mesh, identities):
        return {}
    return {file.name: f"of digest {_digest(file)}" for file in files}


def _identity(file: Path) -> list[str | int]:
    """What no two files share, and what changes when one is written to."""
    found = file.stat()
    return [_machine(), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return str(os.getpid())  # no two processes agree: then the content decides


def _digest(file: Path) -> str:
    """Of all that is in the file; of a large one its size and samples."""
    size = file.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    with open(file, "rb") as data:
        if size <= WHOLE:
            sha.update(data.read())
        else:
            for i in range(SAMPLES):
                data.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                sha.update(data.read(SAMPLE_BYTES))
    goes_on()
    return sha.hexdigest()[:12]
