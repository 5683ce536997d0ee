"""A byte order mark, which some editors put before a text, is not part of it."""

from __future__ import annotations

import json

import pytest
from support.tokenizer import ALPHABET, USER, tiny_json

from minqwen.config import GenerationDefaults, ModelConfig
from minqwen.tokenizer import Tokenizer

BOM = b"\xef\xbb\xbf"


def with_mark(path):
    path.write_bytes(BOM + path.read_bytes())


def test_every_file_of_a_tokenizer_is_read_without_it(tmp_path):
    path = tiny_json(tmp_path / "t", chat_template="not this one")
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (path / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (path / "added_tokens.json").write_text('{"<x>": 260}')
    (path / "config.json").write_text('{"vocab_size": 300}')
    for file in sorted(path.iterdir()):
        with_mark(file)
    tokenizer = Tokenizer.from_dir(path)
    assert tokenizer.encode("hell<x>") == [258, 260] and tokenizer.eos_token_id == 259
    assert tokenizer.apply_chat_template(USER) == "hi" and tokenizer.padded_vocab_size == 300


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_so_are_vocab_and_merges(tmp_path, line_end):
    (tmp_path / "vocab.json").write_text(
        json.dumps({**ALPHABET, "he": 256, "ll": 257, "hell": 258})
    )
    lines = ["#version: 0.2", "h e", "l l", "he ll", ""]
    (tmp_path / "merges.txt").write_bytes(line_end.join(lines).encode())
    with_mark(tmp_path / "vocab.json"), with_mark(tmp_path / "merges.txt")
    assert Tokenizer.from_dir(tmp_path).encode("hell he") == [258, 220, 256]


def test_so_are_the_configs_of_a_model(tmp_path):
    config = ModelConfig(
        **{"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
        num_attention_heads=2,
    )
    config.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 7}')
    for file in list(tmp_path.iterdir()):
        with_mark(file)
    assert ModelConfig.from_json(tmp_path) == config
    assert GenerationDefaults.from_dir(tmp_path, config).max_new_tokens == 7
