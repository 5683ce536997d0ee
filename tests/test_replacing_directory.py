"""A directory is replaced in one step: the old one stays until the new one is whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from minqwen.errors import CheckpointError
from minqwen.files import replacing_directory


def write(destination: Path, text: str, resume: str | None = None) -> None:
    with replacing_directory(destination, CheckpointError, resume) as directory:
        (directory / "a").write_text(text)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def leftovers(destination: Path) -> list[str]:
    return [path.name for path in destination.parent.iterdir() if path != destination]


@pytest.fixture
def model(tmp_path) -> Path:
    """A directory that holds something already."""
    write(tmp_path / "model", "old")
    return tmp_path / "model"


def test_a_directory_is_written_and_replaced(tmp_path):
    model = tmp_path / "new" / "model"
    write(model, "old")
    assert contents(model) == {"a": "old"}
    with replacing_directory(model, CheckpointError) as directory:
        (directory / "b").write_text("new")
        assert directory.parent == model.parent and contents(model) == {"a": "old"}
    assert contents(model) == {"b": "new"} and not leftovers(model)


@pytest.mark.parametrize("wrong", [CheckpointError("wrong"), KeyboardInterrupt(), KeyError("bug")])
def test_whatever_is_raised_meanwhile_the_old_directory_stays(model, wrong):
    with pytest.raises(type(wrong)) as error, replacing_directory(model, CheckpointError) as new:
        (new / "a").write_text("new")
        raise wrong
    assert error.value is wrong
    assert contents(model) == {"a": "old"} and not leftovers(model)


def test_a_full_disk_is_one_line_and_the_old_directory_stays(model):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a")
    with pytest.raises(CheckpointError) as error, replacing_directory(model, CheckpointError):
        raise full
    assert str(error.value) == (
        f"{model}: could not be written: No space left on device (a); what was there is as it was"
    )
    assert contents(model) == {"a": "old"} and not leftovers(model)


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="could not be written: File exists"):
        write(tmp_path / "file" / "model", "new")
    with pytest.raises(CheckpointError, match="could not be written"):
        write(Path("/proc/model"), "new")
    assert contents(tmp_path) == {"file": "x"}


def test_where_two_directories_cannot_be_exchanged_the_old_one_is_renamed_first(model, monkeypatch):
    def no_libc(name):
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", no_libc)
    write(model, "new")
    assert contents(model) == {"a": "new"} and not leftovers(model)


# ---- what a killed writer leaves

KILLED = """
import os, signal, sys
from pathlib import Path
from minqwen.errors import CheckpointError
from minqwen.files import replacing_directory
with replacing_directory(Path(sys.argv[1]), CheckpointError, sys.argv[2] or None) as directory:
    (directory / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_writer(destination: Path, resume: str = "") -> str:
    """The name of the directory that a writer leaves which is killed while it writes."""
    done = subprocess.run([sys.executable, "-c", KILLED, destination, resume], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    [name] = leftovers(destination)
    return name


def test_the_next_writer_removes_what_a_killed_one_left(model):
    killed_writer(model)
    assert contents(model) == {"a": "old"}
    write(model, "new")
    assert contents(model) == {"a": "new"} and not leftovers(model)


def test_a_killed_writer_may_have_had_the_process_id_that_the_next_one_has(model):
    left = killed_writer(model)
    (model.parent / left).rename(model.parent / f".model.tmp-{os.getpid()}")  # as in a container
    write(model, "new")
    assert contents(model) == {"a": "new"} and not leftovers(model)


def test_a_living_writer_keeps_its_directory(model):
    with replacing_directory(model, CheckpointError, "one") as first:
        (first / "a").write_text("first")
        write(model, "second")
        assert contents(model) == {"a": "second"}
    assert contents(model) == {"a": "first"} and not leftovers(model)


def test_other_destinations_leftovers_are_left_alone(tmp_path):
    left = killed_writer(tmp_path / "modeled")
    write(tmp_path / "model", "new")
    write(tmp_path / "model*", "new")  # the name is no pattern
    assert sorted(os.listdir(tmp_path)) == sorted([left, "model", "model*"])


def test_a_writer_with_the_same_name_for_its_content_goes_on(model):
    killed_writer(model, "content-1")
    with replacing_directory(model, CheckpointError, "content-1") as directory:
        assert contents(directory) == {"half": "half"}
        (directory / "a").write_text("new")
    assert contents(model) == {"half": "half", "a": "new"} and not leftovers(model)


def test_a_writer_with_another_name_for_its_content_begins_anew(model):
    killed_writer(model, "content-1")
    with replacing_directory(model, CheckpointError, "content-2") as directory:
        assert not contents(directory)
    assert not leftovers(model)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interruption_and_a_full_disk_can_be_resumed(model, stop):
    expected = CheckpointError if isinstance(stop, OSError) else KeyboardInterrupt
    with pytest.raises(expected), replacing_directory(model, CheckpointError, "one") as directory:
        (directory / "half").write_text("half")
        raise stop
    assert contents(model) == {"a": "old"} and leftovers(model)
    write(model, "new", "one")
    assert contents(model) == {"half": "half", "a": "new"} and not leftovers(model)


def test_wrong_content_cannot_be_resumed(model):
    with contextlib.suppress(CheckpointError), replacing_directory(model, CheckpointError, "one"):
        raise CheckpointError("the tensors do not fit")
    assert contents(model) == {"a": "old"} and not leftovers(model)
