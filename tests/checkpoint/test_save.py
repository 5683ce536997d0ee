"""Saving a model, above all onto the directory that it came from."""

from __future__ import annotations

import os

import pytest
import torch
from support.checkpoints import refusal, tiny, write

from minqwen.checkpoint import Checkpoint, load_pretrained, save_pretrained
from minqwen.heads.convert import extend, shrink
from minqwen.heads.layout import layout
from minqwen.heads.manifest import MANIFEST, read_manifest

COMPANIONS = {"tokenizer.json": "{}", "generation_config.json": '{"top_k": 3}', "LICENSE": "mine"}


@pytest.fixture
def own(tmp_path):
    """A checkpoint with a tokenizer, its generation config and its licence."""
    write(tmp_path / "own")
    for name, text in COMPANIONS.items():
        (tmp_path / "own" / name).write_text(text)
    return tmp_path / "own"


def trained(path):
    model = load_pretrained(path)
    with torch.no_grad():
        model.model.norm.weight += 1
    return model


def assert_trained(path, was) -> None:
    assert torch.equal(Checkpoint(path).read("model.norm.weight"), was + 1)
    for name, text in COMPANIONS.items():
        assert (path / name).read_text() == text, name


@pytest.mark.parametrize("sources", ["none", "itself", "itself by a link"])
def test_a_model_that_is_saved_onto_its_own_directory_keeps_what_lies_there(own, sources):
    was = Checkpoint(own).read("model.norm.weight")
    link = own.parent / "link"
    link.symlink_to(own)
    options = {"itself": {"sources": own}, "itself by a link": {"sources": link}}.get(sources, {})
    trained(own).save_pretrained(own, overwrite=True, **options)
    assert_trained(own, was)


def test_links_and_named_templates_of_its_own_directory_stay_too(own, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "merges.txt").write_text("a b")
    (own / "merges.txt").symlink_to("../shared/merges.txt")
    (own / "additional_chat_templates").mkdir()
    (own / "additional_chat_templates" / "rag.jinja").write_text("rag")
    trained(own).save_pretrained(own, overwrite=True)
    assert os.readlink(own / "merges.txt") == "../shared/merges.txt"
    assert (own / "additional_chat_templates" / "rag.jinja").read_text() == "rag"


def test_with_other_sources_nothing_of_what_lies_there_is_kept(own, tmp_path):
    was = Checkpoint(own).read("model.norm.weight")
    write(tmp_path / "other")
    (tmp_path / "other" / "LICENSE").write_text("theirs")
    save_pretrained(trained(own), own, overwrite=True, sources=tmp_path / "other")
    assert torch.equal(Checkpoint(own).read("model.norm.weight"), was + 1)
    assert (own / "LICENSE").read_text() == "theirs"
    assert not (own / "tokenizer.json").exists()  # two tokenizers in one directory are worse


def test_without_overwrite_and_beside_other_files_nothing_is_saved(own):
    model = trained(own)
    refusal(lambda: model.save_pretrained(own), "exists", "overwrite=True")
    (own / "notes.md").write_text("mine")
    refusal(lambda: model.save_pretrained(own, overwrite=True), "'notes.md'")
    assert (own / "notes.md").read_text() == "mine"


def test_a_failed_save_leaves_the_directory_as_it_was(own, monkeypatch):
    before = {name: (own / name).read_bytes() for name in os.listdir(own)}
    model = trained(own)

    def no_room(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    refusal(lambda: model.save_pretrained(own, overwrite=True), "No space left")
    assert {name: (own / name).read_bytes() for name in os.listdir(own)} == before


def test_an_extension_that_is_trained_and_saved_onto_itself_keeps_its_manifest(own, tmp_path):
    wide = tmp_path / "wide"
    extend(own, wide, layout(tiny(), 8))
    was = Checkpoint(wide).read("model.norm.weight")
    trained(wide).save_pretrained(wide, overwrite=True)
    assert_trained(wide, was)
    assert read_manifest(wide) is not None
    refusal(lambda: shrink(wide, tmp_path / "back"), "model.norm.weight has changed")
    assert shrink(wide, tmp_path / "back", tolerance=1e-6) == ["model.norm.weight"]


def test_a_manifest_is_not_kept_beside_a_model_of_other_sizes(own, tmp_path):
    wide = tmp_path / "wide"
    extend(own, wide, layout(tiny(), 8))
    trained(own).save_pretrained(wide, overwrite=True)
    assert not (wide / MANIFEST).exists()
