"""Everything that minqwen writes, written again and again until something stops it.

  python tests/support/writes.py --runs 100 --seed 0

Each run starts from a sound old file or directory, or from nothing, in a fork that is

  killed   by a signal that nobody handles, at a random moment of the run;
  full     on a disk (a file-size limit, or a small tmpfs where that can be mounted) that holds a
           random part of what is to be written.

Afterwards the old content is there, or the new one, never a part; a full disk is one line; and the
next writer finishes, with the very bytes of an undisturbed one and nothing left beside them. (Who
is killed while it writes a single file leaves a hidden one beside it.)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from minqwen.checkpoint import Checkpoint, write_checkpoint
from minqwen.checkpoint.quantise import quantise
from minqwen.checkpoint.tensor_file import save_tensors
from minqwen.errors import MinqwenError
from minqwen.files import write_text
from minqwen.heads.adapter import extend_adapter
from minqwen.heads.convert import extend, shrink
from minqwen.heads.layout import layout
from minqwen.heads.packed import extend_packed, shrink_packed
from support import packs
from support.checkpoints import tiny, weights, write
from support.quantised import GPTQ, checkpoint
from support.quantised import tiny as tiny_quantised

Content = dict[str, bytes]
Act = Callable[[Path, Path], object]
CONFIG = tiny(hidden_size=32)


def make_sources(root: Path) -> None:
    """What the writers read: checkpoints of every kind, and an adapter."""
    write(root / "source", CONFIG)
    (root / "source" / "tokenizer.json").write_text("{}")
    extend(root / "source", root / "wide", layout(CONFIG, 8))
    checkpoint(root / "words", tiny_quantised(quant=GPTQ, group=8), files=1)
    extend_packed(root / "words", root / "wide words", layout(Checkpoint(root / "words").config, 6))
    packs.model(root / "model")
    adapter = root / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {"A.weight": torch.ones(2, 32), "B.weight": torch.ones(32, 2)}
    save_file({name + end: x for end, x in factors.items()}, adapter / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(said))


def saved(seed: int) -> Act:
    tensors = weights(CONFIG, seed)
    return lambda root, to: write_checkpoint(to, CONFIG, tensors.items(), overwrite=True)


def made(ids: list[int]) -> Act:
    return lambda root, to: packs.make(
        to, packs.Recipe(root / "model", packs.prompts([ids]), runs=("float64",)), overwrite=True
    )


def resumed(root: Path, to: Path) -> object:
    return extend(root / "source", to, layout(CONFIG, 8), overwrite=True)


# name -> what makes the old content (None: nothing is replaced), and the writer
WRITERS: dict[str, tuple[Act | None, Act]] = {
    "save": (saved(0), saved(1)),
    "extend": (saved(0), resumed),
    "shrink": (saved(1), lambda root, to: shrink(root / "wide", to, overwrite=True)),
    "extend words": (
        saved(0),
        lambda root, to: extend_packed(
            root / "words", to, layout(Checkpoint(root / "words").config, 6), overwrite=True
        ),
    ),
    "shrink words": (
        saved(0),
        lambda root, to: shrink_packed(root / "wide words", to, overwrite=True),
    ),
    "quantise": (
        saved(0),
        lambda root, to: quantise(root / "source", to, group_size=8, overwrite=True),
    ),
    "pack": (made([1, 2, 3]), made([5, 17])),
    "adapter": (
        None,
        lambda root, to: extend_adapter(root / "adapter", to, layout(CONFIG, 8), CONFIG),
    ),
    "report": (
        lambda root, to: to.write_text("old"),
        lambda root, to: write_text(to, "x" * 50_000, MinqwenError),
    ),
    "trace": (
        lambda root, to: save_file({"a": torch.zeros(9)}, to),
        lambda root, to: save_tensors(to, {"a": torch.ones(9999)}, MinqwenError),
    ),
}


def content(path: Path) -> Content | None:
    """Every file of a directory, or a file alone; None where nothing is."""
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): _plain(file.read_bytes()) for file in files}


def _plain(data: bytes) -> bytes:
    """The library writes the metadata of a safetensors file in any order: here they are sorted."""
    length = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or length > len(data):
        return data
    return (
        json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode() + data[8 + length :]
    )


class Place:
    """Where one writer writes, with its old content and its new one."""

    def __init__(self, name: str, root: Path, work: Path):
        self.root, self.work, self.to = root, work, work / "to"
        self.make_old, self.act = WRITERS[name]
        self.begin()
        self.old = content(self.to)
        start = time.perf_counter()
        self.act(root, self.to)
        self.seconds = time.perf_counter() - start
        self.new = content(self.to)
        assert self.new is not None and self.new != self.old

    def begin(self) -> None:
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.make_old is not None:
            self.make_old(self.root, self.to)

    def stopped(self, stop: Callable[[], object]) -> str:
        """What a writer came to that stops at some moment: "old" or "new", and never another.

        stop: what the fork does before it writes.
        """
        # Its usual lock is shared with forks: one that is killed while it holds it stops us all.
        tqdm.set_lock(threading.RLock())
        self.begin()
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                code = self.write_in_fork(stop)
            os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = content(self.to)
        assert status in (0, 2, -signal.SIGALRM), status
        assert found == self.new or (found == self.old and status != 0), "neither old nor new"
        state = "new" if found == self.new else "old"
        if found == self.new and self.make_old is None:
            shutil.rmtree(self.to)  # it is never replaced
        self.act(self.root, self.to)
        assert content(self.to) == self.new, "the next writer does not finish"
        left = [path.name for path in self.work.iterdir() if path != self.to]
        assert not left or self.to.is_file(), f"{left} is left"
        return f"{state}, {'refused' if status == 2 else 'killed' if status else 'finished'}"

    def write_in_fork(self, stop: Callable[[], object]) -> int:
        warnings.simplefilter("ignore")
        stop()
        try:
            self.act(self.root, self.to)
        except MinqwenError as error:
            line = str(error)
            return 2 if line.isprintable() and len(line) <= 480 else 3
        return 0


def alarm(seconds: float) -> Callable[[], object]:
    """SIGALRM ends a process that does not handle it, as SIGKILL does, and comes on time."""

    def stop() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # another test may handle it
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))

    return stop


def smallest_files(size: int) -> Callable[[], object]:
    """No file may be longer. Python ignores the signal, and write() fails as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@contextlib.contextmanager
def small_disk(path: Path, size: int):
    """A tmpfs of `size` bytes at `path`; nothing where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=True)


def on_small_disk(name: str, root: Path, size: int) -> str:
    """What a writer comes to on a disk that holds the old content and `size` bytes more."""
    make_old, act = WRITERS[name]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        probe = Path(directory, "probe")
        if make_old is not None:
            make_old(root, probe)
        old = content(probe)
        room = sum(-(-len(data) // 4096) * 4096 for data in (old or {}).values()) + 8192
        disk = Path(directory, "disk")
        disk.mkdir()
        with small_disk(disk, room + size) as mounted:
            if not mounted:
                return "cannot be mounted"
            if make_old is not None:
                make_old(root, disk / "to")
            try:
                act(root, disk / "to")
            except MinqwenError as error:
                assert str(error).isprintable() and len(str(error)) <= 480
                assert content(disk / "to") == old, "the old content is damaged"
                return "old, refused"
            assert content(disk / "to") is not None and path.exists()
            return "new, finished"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100, metavar="N", help="of each writer")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    r = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory, "sources")
        root.mkdir()
        make_sources(root)
        for name in WRITERS:
            work = Path(directory, "work")
            work.mkdir()
            place = Place(name, root, work)
            largest = max(len(data) for data in place.new.values())
            killed = Counter(
                place.stopped(alarm(r.uniform(0, 1.2 * place.seconds))) for _ in range(args.runs)
            )
            limits = (smallest_files(r.randrange(largest + 1)) for _ in range(args.runs // 4))
            full = Counter(place.stopped(limit) for limit in limits)
            total = sum(map(len, place.new.values()))
            disks = Counter(
                on_small_disk(name, root, r.randrange(int(1.5 * total)))
                for _ in range(args.runs // 4)
            )
            shutil.rmtree(work)
            print(f"{name}: at a moment {dict(killed)}, files {dict(full)}, disk {dict(disks)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
