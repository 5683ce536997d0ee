"""A vocabulary without some of the 256 bytes: the text that would lose a character is refused."""

from __future__ import annotations

import json
import shutil

import pytest
from support.checkpoints import tiny, write
from support.tokenizer import one_line, tiny_json
from transformers import AutoTokenizer

from minqwen import LLM, SamplingParams
from minqwen.errors import TokenizerError
from minqwen.tokenizer import Tokenizer
from minqwen.tokenizer.backends import ByteLevelBPE

# The 21 that SmolLM2 lacks are of this kind: bytes of no UTF-8, and of rare planes. Here "é" (0xC3
# 0xA9) is lost too, but not the other letters that begin with 0xC3.
MISSING = [*range(0xC0, 0xC2), 0xA9, *range(0xF1, 0x100)]


@pytest.fixture
def lacking(tmp_path):
    path = tiny_json(tmp_path / "lacking", ("<|im_end|>", "<é>"))
    data = json.loads((path / "tokenizer.json").read_text())
    lost = {symbol for symbol, byte in ByteLevelBPE.alphabet.items() if byte in MISSING}
    names = [name for name in data["model"]["vocab"] if name not in lost]
    data["model"]["vocab"] = {name: id for id, name in enumerate(names)}
    for n, token in enumerate(data["added_tokens"]):
        token["id"] = len(names) + n
    (path / "tokenizer.json").write_text(json.dumps(data))
    return path


def test_a_text_that_loses_nothing_is_encoded(lacking):
    tokenizer = Tokenizer.from_dir(lacking)
    text = "hell, ä 的 🙂<|im_end|>"
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(lacking).encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text, character",
    [("a é b", "'é' (U+00E9)"), ("\U000fffff", "U+FFFFF"), ("<|im_end|>é", "'é'"), ("ä©", "'©'")],
)
def test_a_character_that_would_be_lost_is_named(lacking, text, character):
    tokenizer = Tokenizer.from_dir(lacking)
    for call in (
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode(text, allow_special=False),
        lambda: tokenizer.encode_batch(["fine", text]),
        lambda: tokenizer.encode_chat(
            [{"role": "user", "content": text}], chat_template="{{ messages[0].content }}"
        ),
    ):
        with pytest.raises(TokenizerError) as error:
            call()
        assert character in one_line(error) and "tokenizer.json" in str(error.value)


def test_an_added_token_may_hold_any_character_where_it_is_a_token(lacking):
    tokenizer = Tokenizer.from_dir(lacking)
    ids = tokenizer.encode("a<é>b")
    assert tokenizer.decode(ids) == "a<é>b" and len(ids) == 3
    with pytest.raises(TokenizerError, match="'é'"):
        tokenizer.encode("a<é>b", allow_special=False)


def test_the_same_from_vocab_and_merges(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (tmp_path / "merges.txt").write_text("a b\n")
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.encode("abb") == [2, 1]
    with pytest.raises(TokenizerError, match=r"vocab.json: .*' ' \(U\+0020\)"):
        tokenizer.encode("a b")


def test_a_model_with_such_a_tokenizer_runs(lacking, tmp_path):
    vocab = Tokenizer.from_dir(lacking).vocab_size
    write(tmp_path / "model", tiny(vocab_size=vocab, dtype="float32"))
    for file in lacking.iterdir():
        shutil.copy(file, tmp_path / "model")
    llm = LLM(tmp_path / "model")
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    assert len(llm.generate("hell", params, use_tqdm=False)[0].outputs[0].token_ids) == 3
    with pytest.raises(TokenizerError, match="'é'"):
        llm.generate("é", params, use_tqdm=False)
    assert not llm.has_unfinished_requests
