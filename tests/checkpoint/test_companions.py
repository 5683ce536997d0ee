"""What is copied from beside a checkpoint's weights, and what a source and a target may be."""

from __future__ import annotations

import os
import warnings

import pytest
from support.checkpoints import refusal, write

from minqwen.checkpoint import Checkpoint


def test_the_tokenizer_and_the_licence_go_with_the_weights(tmp_path):
    write(tmp_path / "a")
    for name in ("tokenizer.json", "LICENSE"):
        (tmp_path / "a" / name).write_text("x")
    (tmp_path / "a" / "LICENSE").chmod(0o640)
    write(tmp_path / "b", sources=tmp_path / "a")
    assert {"tokenizer.json", "LICENSE"} < set(os.listdir(tmp_path / "b"))
    assert (tmp_path / "b" / "LICENSE").stat().st_mode & 0o777 == 0o640


def test_files_that_no_checkpoint_has_are_neither_copied_nor_in_the_way(tmp_path):
    write(tmp_path / "a")
    for name in ("ok", "README.md"):
        (tmp_path / "a" / name).write_text("")
    (tmp_path / "a" / "eval.json").write_text("{}")
    write(tmp_path / "b", sources=tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "b")) == ["config.json", "model.safetensors"]


def test_a_link_that_leads_out_of_the_source_is_not_followed(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "secret").write_text("key")
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "a" / "tokenizer.json").symlink_to("../secret")
    (tmp_path / "a" / "LICENSE").write_text("mine")
    (tmp_path / "a" / "NOTICE").symlink_to("LICENSE")
    with pytest.warns(UserWarning, match="tokenizer.json: is a link to .*secret"):
        write(tmp_path / "b", sources=tmp_path / "a")
    assert not (tmp_path / "b" / "tokenizer.json").exists()
    assert (tmp_path / "b" / "NOTICE").read_text() == "mine"


def test_the_links_of_hugging_faces_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0a", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f00").write_text("tokens")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/f00")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path / "b", sources=snapshot)
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "tokens"
    assert not (tmp_path / "b" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("kind", ["path", "link", "files that are links"])
def test_a_source_is_never_its_own_target(tmp_path, kind):
    tensors = write(tmp_path / "a")
    source = tmp_path / "sub" / ".." / "a"
    (tmp_path / "sub").mkdir()
    if kind == "link":
        source = tmp_path / "link"
        source.symlink_to("a")
    elif kind == "files that are links":
        source = tmp_path / "farm"
        source.mkdir()
        for file in (tmp_path / "a").iterdir():
            (source / file.name).symlink_to(file)
    refusal(
        lambda: write(tmp_path / "a", seed=1, sources=source, overwrite=True), "another directory"
    )
    assert set(Checkpoint(tmp_path / "a").names) == set(tensors)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "LICENSE"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_file_is_refused_and_never_opened(tmp_path, name, kind):
    write(tmp_path / "a")
    path = tmp_path / "a" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    if name == "LICENSE" and kind == "device":  # a link that leads out
        with pytest.warns(UserWarning, match="/dev/zero"):
            write(tmp_path / "b", sources=tmp_path / "a")
    elif name == "LICENSE":
        refusal(lambda: write(tmp_path / "b", sources=tmp_path / "a"), name, "regular file")
    else:
        refusal(lambda: Checkpoint(tmp_path / "a"), name, "regular file")


def test_what_is_left_out_is_said_in_one_line(tmp_path):
    write(tmp_path / "a")
    for name in ("notes.md", "eval.json", "pytorch_model.bin", ".gitattributes", "LICENSE"):
        (tmp_path / "a" / name).write_text("mine")
    (tmp_path / "a" / "onnx").mkdir()
    (tmp_path / "a" / "README.md").write_text("")  # nothing is lost
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write(tmp_path / "b", sources=tmp_path / "a", omit={"LICENSE"})
    [said] = [str(warning.message) for warning in caught]
    left_out = "'eval.json', 'notes.md', 'onnx', 'pytorch_model.bin'"
    assert said == f"{tmp_path / 'a'}: not copied, because no checkpoint needs it: {left_out}"


def test_a_checkpoint_with_nothing_else_is_copied_without_a_word(tmp_path):
    write(tmp_path / "a", max_file_bytes=4000)
    for name in ("tokenizer.json", "LICENSE", ".gitattributes"):
        (tmp_path / "a" / name).write_text("x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path / "b", sources=tmp_path / "a")


def test_named_chat_templates_are_companions_too(tmp_path):
    write(tmp_path / "a")
    templates = tmp_path / "a" / "additional_chat_templates"
    templates.mkdir()
    (templates / "rag.jinja").write_text("rag")
    (templates / "notes.txt").write_text("mine")
    write(tmp_path / "b", sources=tmp_path / "a")
    copied = tmp_path / "b" / "additional_chat_templates"
    assert [path.name for path in copied.iterdir()] == ["rag.jinja"]
    write(tmp_path / "b", seed=1, sources=tmp_path / "a", overwrite=True)
    (copied / "notes.txt").write_text("mine")
    refusal(lambda: write(tmp_path / "b", sources=tmp_path / "a", overwrite=True), "additional")
    assert (copied / "notes.txt").read_text() == "mine"


def test_named_chat_templates_elsewhere_are_not_followed(tmp_path):
    write(tmp_path / "a")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret.jinja").write_text("key")
    templates = tmp_path / "a" / "additional_chat_templates"
    templates.symlink_to(elsewhere)
    with pytest.warns(UserWarning, match="is a link to .*elsewhere"):
        write(tmp_path / "b", sources=tmp_path / "a")
    templates.unlink()
    templates.mkdir()
    (templates / "rag.jinja").symlink_to(elsewhere / "secret.jinja")
    with pytest.warns(UserWarning, match="is a link to .*secret"):
        write(tmp_path / "c", sources=tmp_path / "a")
    assert not (tmp_path / "b" / "additional_chat_templates").exists()
    assert not list((tmp_path / "c" / "additional_chat_templates").iterdir())
