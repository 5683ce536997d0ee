"""Files of a tokenizer that are not right: each is refused in one line."""

from __future__ import annotations

import json
import os

import pytest
from support.tokenizer import (
    ALPHABET,
    edited_json,
    one_line,
    tiny_json,
)

from minqwen.errors import TokenizerError
from minqwen.tokenizer import Tokenizer


def test_a_directory_is_enough_and_tokenizer_json_is_preferred(tmp_path):
    path = tiny_json(tmp_path / "t")
    (path / "tokenizer.model").write_bytes(b"not read")
    assert Tokenizer.from_dir(str(path)).encode("hell<|im_end|>") == [258, 259]


def broken(name, content):
    def change(path):
        (path / name).unlink(missing_ok=True)
        if content is not None:
            (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def edited(name, **changes):
    return lambda path: edited_json(path / name, **changes)


def two_tokens_one_id(path):
    data = json.loads((path / "tokenizer.json").read_text())
    data["model"]["vocab"]["hell"] = 257
    (path / "tokenizer.json").write_text(json.dumps(data))


NOT_FILES = {
    "fifo": "is not a regular file",
    "broken link": "cannot be read",
    "empty": "is empty (0 bytes)",
    "too large": "expected at most ",
}


def replace(path, kind):
    """Puts something that is not a file with contents in place of a file."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "broken link":
        path.symlink_to("gone")
    else:
        path.touch()
        os.truncate(path, (100 << 20) + 1 if kind == "too large" else 0)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7031645\n"


@pytest.mark.parametrize(
    "change, words",
    [
        (broken("tokenizer.json", None), "no tokenizer here"),
        (broken("tokenizer.json", ""), "tokenizer.json: is empty (0 bytes)"),
        (broken("tokenizer.json", '{"version": "1.0"'), "tokenizer.json: damaged"),
        (broken("tokenizer.json", b"\xff\xfe\x00"), "tokenizer.json: damaged"),
        (broken("tokenizer.json", LFS), "git lfs pull"),
        (edited("tokenizer.json", decoder=None), "its decoder is None"),
        (edited("tokenizer.json", decoder={"type": "Fuse"}), "its decoder is Fuse"),
        (edited("tokenizer.json", model__merges=["x y z"]), "tokenizer.json: damaged"),
        (two_tokens_one_id, "ids are not 0 to"),
        (broken("tokenizer_config.json", "{"), "tokenizer_config.json: is not valid JSON"),
        (
            broken("tokenizer_config.json", "[]"),
            "tokenizer_config.json: the top level is [], expected a JSON object",
        ),
        (broken("tokenizer_config.json", LFS), "git lfs pull"),
        (edited("tokenizer_config.json", eos_token="<nope>"), "eos_token is '<nope>'"),
        (edited("tokenizer_config.json", pad_token=7), "pad_token is 7"),
        (
            edited("tokenizer_config.json", added_tokens_decoder={"300": {"content": "<x>"}}),
            "'<x>' the id 300",
        ),
        (
            edited("tokenizer_config.json", added_tokens_decoder={"4": {"content": "<|im_end|>"}}),
            "the id 4",
        ),
        (
            edited("tokenizer_config.json", added_tokens_decoder={"260": {"special": True}}),
            "the id 260",
        ),
        (
            edited("tokenizer_config.json", added_tokens_decoder={"x": {"content": "<x>"}}),
            "must map ids",
        ),
        (edited("tokenizer_config.json", added_tokens_decoder=[1]), "must map ids"),
        (edited("tokenizer_config.json", chat_template=7), "chat_template must be"),
        (edited("tokenizer_config.json", chat_template=[{"name": "x"}]), "chat_template must be"),
        (broken("chat_template.jinja", b"\xff"), "chat_template.jinja: is damaged"),
        (broken("config.json", "{"), "config.json: is not valid JSON"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, change, words):
    path = tiny_json(tmp_path / "t")
    Tokenizer.from_dir(path)
    change(path)
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_dir(path)
    assert words in one_line(error) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "vocab, merges, words",
    [
        (ALPHABET, None, "merges.txt: cannot be read"),
        (None, "a b\n", "vocab.json: cannot be read"),
        (ALPHABET, "a b c\n", "line 1"),
        (ALPHABET, "a b\n", "merges 'a' and 'b', and 'ab' is no token"),
        (ALPHABET, LFS, "git lfs pull"),
        ({**ALPHABET, "ab": 255}, "a b\n", "ids are not 0 to 256"),
        ({**ALPHABET, "ab": -1}, "", "ids are not 0 to 256"),
        ({**ALPHABET, "ab": 300}, "a b\n", "ids are not 0 to 256"),
        ({**ALPHABET, "ab": "x"}, "a b\n", "ids are not 0 to 256"),
        ([], "a b\n", "vocab.json: the top level is [], expected a JSON object"),
    ],
)
def test_a_broken_vocab_or_merges_is_refused(tmp_path, vocab, merges, words):
    if vocab is not None:
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    if merges is not None:
        (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_dir(tmp_path)
    assert words in one_line(error)


def test_a_vocab_without_config_is_enough_and_a_damaged_tokenizer_model_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({**ALPHABET, "ab": 256}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.encode("aab") == [64, 256] and tokenizer.special_ids == frozenset()
    (tmp_path / "vocab.json").unlink(), (tmp_path / "merges.txt").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_dir(tmp_path)
    assert "tokenizer.model" in one_line(error)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
    ],
)
@pytest.mark.parametrize("make", ["fifo", "broken link", "empty", "too large"])
def test_what_is_not_a_file_with_contents_is_refused_and_not_waited_for(tmp_path, name, make):
    path = tiny_json(tmp_path / "t")
    (path / "additional_chat_templates").mkdir()
    replace(path / name, make)
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_dir(path)
    assert one_line(error).startswith(f"{path / name}: ") and NOT_FILES[make] in str(error.value)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.model"])
@pytest.mark.parametrize("make", ["fifo", "broken link", "empty", "too large"])
def test_so_are_the_files_of_other_tokenizers(tmp_path, name, make):
    if name != "tokenizer.model":
        (tmp_path / "vocab.json").write_text(json.dumps(ALPHABET))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    replace(tmp_path / name, make)
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_dir(tmp_path)
    assert one_line(error).startswith(f"{tmp_path / name}: ") and NOT_FILES[make] in str(
        error.value
    )


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "vocab.json"])
def test_json_with_a_key_twice_is_refused(tmp_path, name):
    (tmp_path / "vocab.json").write_text(json.dumps(ALPHABET))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / name).write_text('{"a": 1, "a": 1}')
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_dir(tmp_path)
    assert f"{name}: is not valid JSON (the key 'a' appears more than once)" in one_line(error)
