"""A writer that fails or dies leaves the old directory or the new one, never half of one."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import Q0, assert_holds, refusal, tiny, weights, write
from support.paths import ROOT

from minqwen.checkpoint import write_checkpoint
from minqwen.config import ModelConfig


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failing_source_leaves_the_old_one_and_no_rubbish(tmp_path, failure):
    old = write(tmp_path / "c")

    def broken():
        yield from list(weights(tiny(), 1).items())[:9]
        raise failure("source")

    with pytest.raises(failure):
        write_checkpoint(tmp_path / "c", tiny(), broken(), overwrite=True)
    assert_holds(tmp_path / "c", old)
    assert os.listdir(tmp_path) == ["c"]


def no_library(*_):
    raise OSError("no such library")


@pytest.mark.parametrize("exchange", [True, False])
def test_swap_with_and_without_the_exchange_call(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(ctypes, "CDLL", no_library)
    write(tmp_path / "c")
    assert_holds(tmp_path / "c", write(tmp_path / "c", seed=1, overwrite=True))
    assert os.listdir(tmp_path) == ["c"]


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    import resource

    old = write(tmp_path / "c")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # a real write that really fails
    try:
        refusal(
            lambda: write(tmp_path / "c", seed=1, overwrite=True),
            f"{tmp_path}/c: could not be written",
            "as it was",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000)
    )
    refusal(lambda: write(tmp_path / "c", seed=1, overwrite=True), "5000 bytes free")
    monkeypatch.undo()
    for call in ("fsync", "truncate"):

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, call, full)
        refusal(
            lambda: write(tmp_path / "c", seed=1, overwrite=True),
            "No space left on device",
            "as it was",
        )
        monkeypatch.undo()
    assert_holds(tmp_path / "c", old)
    assert os.listdir(tmp_path) == ["c"]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from support.checkpoints import *
torch.set_num_threads(1)
os.fsync = lambda fd: None  # a kill, unlike a power cut, loses nothing that was written
path = Path(sys.argv[1]) / "c"
versions = [weights(tiny(), 0), weights(tiny(), 1)]
def put(v):
    write_checkpoint(path, tiny(), versions[v].items(), max_file_bytes=20000, overwrite=True)

def run(kill_at):
    # A child writes version 1 over version 0; it is killed when it calls its kill_at-th function.
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    count = 0
    def event(*_):
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(event)
    try:
        put(1)
        sys.setprofile(None)
        Path(sys.argv[1], "calls").write_text(str(count))
    finally:
        os._exit(0)

put(0)
assert run(0) == 0
total = int(Path(sys.argv[1], "calls").read_text())
points = sorted({*range(1, total, total // 60), *range(total - 150, total, 5)})
survived = [0, 0]
for k in points:
    put(0)
    assert os.WTERMSIG(run(k)) == signal.SIGKILL
    same = [all(torch.equal(Checkpoint(path).read(n), t) for n, t in v.items()) for v in versions]
    Checkpoint(path).check()
    assert sum(same) == 1, k
    survived[same[1]] += 1
put(0)
left = [p for p in os.listdir(sys.argv[1]) if p not in ("c", "calls")]
print(len(points), *survived, left)
"""


def test_killed_at_any_call_it_leaves_the_old_or_the_new(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(ROOT / "tests")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    points, old, new, left = done.stdout.split(maxsplit=3)
    assert int(old) + int(new) == int(points) > 60 and int(old) > 30 and int(new) > 1
    assert left.strip() == "[]"  # the next write removed what the killed ones left


def test_a_killed_writer_is_cleaned_up_after_and_a_live_one_is_not(tmp_path):
    dead, live, other = (tmp_path / n for n in (".c.tmp-1", ".c.tmp-2", ".cc.tmp-3"))
    for d in (dead, live, other):
        d.mkdir()
        (d / "model.safetensors").write_text("half")
    fd = os.open(live, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    write(tmp_path / "c")
    os.close(fd)
    assert sorted(os.listdir(tmp_path)) == [".c.tmp-2", ".cc.tmp-3", "c"]


def interrupted(path: Path, config: ModelConfig, after: int, resume: str) -> set[str]:
    """Write with a source that is interrupted after some tensors; those that it was asked for."""
    asked: set[str] = set()

    def tensors(done: set[str]):
        left = [item for item in weights(config).items() if item[0] not in done]
        asked.update(name for name, _ in left)
        yield from left[:after]
        if after < len(left):
            raise KeyboardInterrupt

    try:
        write_checkpoint(path, config, tensors, resume=resume, max_file_bytes=20000)
    except KeyboardInterrupt:
        assert not path.exists()
    return asked


def test_an_interrupted_writer_with_a_name_is_taken_up_where_it_was(tmp_path):
    config = tiny()
    names = list(weights(config))
    assert interrupted(tmp_path / "c", config, 9, "name") == set(names)
    assert interrupted(tmp_path / "c", config, 5, "name") == set(names[9:])
    assert interrupted(tmp_path / "c", config, 99, "name") == set(names[14:])
    assert_holds(tmp_path / "c", weights(config))
    assert os.listdir(tmp_path) == ["c"]


def test_other_content_does_not_go_on_from_there(tmp_path):
    config = tiny()
    interrupted(tmp_path / "c", config, 9, "name")
    assert interrupted(tmp_path / "c", config, 99, "other") == set(weights(config))
    assert os.listdir(tmp_path) == ["c"]


def test_a_journal_without_its_weight_files_is_not_believed(tmp_path):
    config = tiny()
    interrupted(tmp_path / "c", config, 9, "name")
    file = next((tmp_path / ".c.tmp-name").glob("*.safetensors"))
    os.truncate(file, 100)
    assert interrupted(tmp_path / "c", config, 3, "name") == set(weights(config))
    assert interrupted(tmp_path / "c", config, 99, "name") == set(list(weights(config))[3:])
    assert_holds(tmp_path / "c", weights(config))


def test_the_journal_names_what_is_on_the_disk_and_half_a_line_is_none(tmp_path):
    config = tiny()
    names = list(weights(config))
    interrupted(tmp_path / "c", config, 9, "name")
    journal = tmp_path / ".c.tmp-name" / ".written"
    assert journal.read_text() == "".join(f"{name}\n" for name in names[:9])
    with journal.open("a") as file:
        file.write(names[9])  # the writer was killed before it wrote the end of the line
    assert interrupted(tmp_path / "c", config, 99, "name") == set(names[9:])
    assert_holds(tmp_path / "c", weights(config))


def test_wrong_content_leaves_nothing_to_go_on_from(tmp_path):
    wrong = [(Q0, torch.zeros(1))]
    act = lambda: write_checkpoint(tmp_path / "c", tiny(), lambda done: wrong, resume="name")
    refusal(act, Q0, "(32, 24)")
    assert os.listdir(tmp_path) == []
