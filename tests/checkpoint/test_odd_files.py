"""Whatever lies in place of a small file: one line that names it, from whoever reads it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import refusal, tiny, write
from support.tokenizer import tiny_json

from minqwen import LLM, Checkpoint, ModelConfig, Tokenizer
from minqwen.checkpoint import load_pretrained
from minqwen.files import MAX_SMALL_FILE
from minqwen.heads.adapter import ADAPTER, ADAPTER_CONFIG, extend_adapter
from minqwen.heads.convert import extend, shrink
from minqwen.heads.layout import layout
from minqwen.heads.manifest import MANIFEST, read_manifest
from minqwen.tokenizer.chat_template import ChatRenderer

CONFIG = tiny(vocab_size=260, dtype="float32")
TO = layout(CONFIG, 8)
INDEX = "model.safetensors.index.json"
TEMPLATE = "additional_chat_templates/rag.jinja"

TEXT = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
CHAT = {"chat_template.jinja", TEMPLATE}
OLDER = {"vocab.json", "merges.txt"}  # in place of tokenizer.json
COPIED = {"generation_config.json", "chat_template.json", "tokenizer.model"}
WEIGHTS = {"config.json", "model.safetensors", INDEX}


def too_large(path: Path) -> None:
    path.touch()
    os.truncate(path, MAX_SMALL_FILE + 1)


ODD = {
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "too large": too_large,
    "empty": Path.touch,
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00{"),
    "pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
}


def talk(path: Path) -> None:
    tokenizer = Tokenizer.from_dir(path)
    tokenizer.encode_chat([{"role": "user", "content": "hell"}])


# Who reads which files. Everything else it leaves alone.
READERS = {
    "ModelConfig": (ModelConfig.from_json, {"config.json"}),
    "Checkpoint": (lambda path: Checkpoint(path).check(), WEIGHTS),
    "load_pretrained": (load_pretrained, WEIGHTS),
    "Tokenizer": (talk, TEXT | CHAT | OLDER | {"config.json"}),
    "LLM": (LLM, WEIGHTS | TEXT | CHAT | OLDER | {"generation_config.json"}),
    "read_manifest": (read_manifest, {MANIFEST}),
}
FILES = sorted(WEIGHTS | TEXT | CHAT | OLDER | COPIED | {MANIFEST, "LICENSE"})


@pytest.fixture(autouse=True)
def no_hang():
    """A hang would end as a failure. What else happens does not depend on the clock."""

    def fail(*_: object) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True, scope="module")
def one_renderer():
    """For the chats of all tokenizers: its process takes a tenth of a second to start."""
    renderer = ChatRenderer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minqwen.tokenizer.tokenizer.ChatRenderer", lambda: renderer)
        yield


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints in which every small file is right: with one weight file, with several, with the
    older tokenizer's files, and an extension."""
    root = tmp_path_factory.mktemp("sound")
    one, many, older, wide = (root / name for name in ("one", "many", "older", "wide"))
    write(one, CONFIG)
    tiny_json(one)
    for name in COPIED | TEXT - {"tokenizer.json"} - {"tokenizer.model"}:
        (one / name).write_text("{}")
    (one / "tokenizer.model").unlink()
    (one / "LICENSE").write_text("mine")
    (one / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (one / TEMPLATE).parent.mkdir()
    (one / TEMPLATE).write_text("{{ documents }}")
    write(many, CONFIG, max_file_bytes=20000, sources=one)
    shutil.copytree(one, older)
    model = json.loads((older / "tokenizer.json").read_text())["model"]
    (older / "tokenizer.json").unlink()
    (older / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (older / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    extend(one, wide, TO)
    return {INDEX: many, "vocab.json": older, "merges.txt": older, MANIFEST: wide, "": one}


def with_odd(sound, tmp_path: Path, file: str, kind: str) -> Path:
    path = tmp_path / "odd"
    shutil.copytree(sound.get(file, sound[""]), path)
    if file == "tokenizer.model":
        (path / "tokenizer.json").unlink()
    (path / file).unlink(missing_ok=True)
    ODD[kind](path / file)
    return path


def test_sound_files_are_read_by_all(sound, tmp_path):
    for path in sound.values():
        for read, _ in READERS.values():
            read(path)
    extend(sound[""], tmp_path / "wide", TO)
    shrink(sound[MANIFEST], tmp_path / "back")


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("file", FILES)
def test_an_odd_file_is_named_by_its_readers_and_by_nobody_else(sound, tmp_path, file, kind):
    path = with_odd(sound, tmp_path, file, kind)
    for name, (read, files) in READERS.items():
        if file in files or (file == "tokenizer.model" and name in ("Tokenizer", "LLM")):
            refusal(lambda read=read: read(path), file)
        else:
            read(path)


@pytest.mark.filterwarnings("ignore:.*is a link to")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("file", FILES)
def test_extend_copies_what_is_a_file_and_nothing_else(sound, tmp_path, file, kind):
    """A link out of the checkpoint is left out, and named by a warning; a companion is copied as
    it is. All else is refused."""
    path = with_odd(sound, tmp_path, file, kind)
    work = shrink if file == MANIFEST else lambda src, dst: extend(src, dst, TO)
    copied = file not in WEIGHTS | {MANIFEST}
    if copied and kind in ("device", "too large", "no text"):
        work(path, tmp_path / "out")
        assert (tmp_path / "out" / file).exists() == (kind != "device")
    elif file == "LICENSE" and kind == "empty":
        work(path, tmp_path / "out")
    else:
        refusal(lambda: work(path, tmp_path / "out"), file)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("file", [ADAPTER, ADAPTER_CONFIG])
def test_an_adapters_files_are_no_exception(tmp_path, file, kind):
    path, out = tmp_path / "lora", tmp_path / "out"
    path.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(2, 24)}, path / ADAPTER)
    (path / ADAPTER_CONFIG).write_text('{"peft_type": "LORA"}')
    extend_adapter(path, tmp_path / "sound", TO)
    (path / file).unlink()
    ODD[kind](path / file)
    refusal(lambda: extend_adapter(path, out, TO), file)
    assert not out.exists()
