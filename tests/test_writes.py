"""A small share of tests/support/writes.py: writers that are killed or whose disk is full."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file
from support.writes import WRITERS, Place, alarm, make_sources, smallest_files

from minqwen.checkpoint.tensor_file import save_tensors
from minqwen.errors import PackError
from minqwen.files import write_text


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    make_sources(root)
    return root


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_that_is_stopped_leaves_the_old_content_or_the_new_one(sources, tmp_path, name):
    place = Place(name, sources, tmp_path)
    place.stopped(alarm(place.seconds / 2))
    largest = max(len(data) for data in place.new.values())
    assert place.stopped(smallest_files(largest // 2)) == "old, refused"
    assert place.stopped(lambda: None) == "new, finished"


def test_a_file_of_tensors_is_written_in_one_step(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(3)}, PackError, {"run": "b"})
    assert torch.equal(load_file(path)["x"], torch.ones(3))
    assert os.listdir(tmp_path) == ["a.safetensors"]
    with pytest.raises(PackError, match="nowhere/a.safetensors: could not be written") as error:
        save_tensors(tmp_path / "nowhere" / "a.safetensors", {"x": torch.ones(3)}, PackError)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, make):
    """A user who may, root, would put a file in the place of /dev/null."""
    path = tmp_path / "device"
    make(path)
    for act in (
        lambda: write_text(path, "x", PackError),
        lambda: save_tensors(path, {"x": torch.ones(3)}, PackError),
    ):
        with pytest.raises(PackError, match="device: is not a regular file"):
            act()
        assert not path.is_file() and os.listdir(tmp_path) == ["device"]
