"""Qwen2.5's tokenizer, once from each of its two kinds of files, and as transformers has it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from support.tokenizer import TOKENIZER_DATA, tiny_json, write_qwen_vocabulary

from minqwen.tokenizer import Tokenizer


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="session")
def vocab_dir(tmp_path_factory) -> Path:
    """Qwen2.5 as vocab.json and merges.txt."""
    path = tmp_path_factory.mktemp("qwen_vocab")
    merges, compact = write_qwen_vocabulary(path)
    # the published files'
    assert sha256(merges) == "599bab54075088774b1733fde865d5bd747cbcc7a547c5bc12610e874e26f5e3"
    assert sha256(compact) == "ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910"
    shutil.copy(TOKENIZER_DATA / "tokenizer_config.json", path)
    return path


@pytest.fixture(scope="session")
def hf(vocab_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(vocab_dir)


@pytest.fixture(scope="session")
def json_dir(hf, tmp_path_factory) -> Path:
    """Qwen2.5 as the tokenizer.json and chat_template.jinja that transformers writes."""
    path = tmp_path_factory.mktemp("qwen_json")
    hf.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def from_vocab(vocab_dir) -> Tokenizer:
    return Tokenizer.from_dir(vocab_dir)


@pytest.fixture(scope="session")
def qwen(json_dir) -> Tokenizer:
    return Tokenizer.from_dir(json_dir)


@pytest.fixture(params=["qwen", "from_vocab"])
def either(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture
def tiny(tmp_path) -> Tokenizer:
    return Tokenizer.from_dir(tiny_json(tmp_path / "tiny", eos_token="<|im_end|>"))
