"""Special tokens that tokenizer_config.json and its older companions name, as in transformers."""

from __future__ import annotations

import json
import shutil

import pytest
from support.tokenizer import USER, edited_json, one_line, tiny_json
from transformers import AutoTokenizer

from minqwen.errors import TokenizerError
from minqwen.tokenizer import Tokenizer

SPECIALS = ("<|im_end|>", "<|endoftext|>")
TEXTS = ["hello hell<|im_end|>x", " hell", "<mask>a<e1> <e2>b<|endoftext|>", "<e2><e1>"]


def test_a_token_that_the_config_names_is_special(tmp_path):
    tokenizer = Tokenizer.from_dir(tiny_json(tmp_path / "t", SPECIALS, mask_token="hell"))
    assert tokenizer.named_tokens == {"mask_token": "hell"}
    assert tokenizer.decode(tokenizer.encode("a hell"), skip_special_tokens=True) == "a "


CONFIGS = {
    "mask": {"mask_token": "<mask>"},
    "all names": {
        **{"mask_token": "<mask>", "sep_token": "<e2>", "cls_token": "<e1>"},
        **{"bos_token": "he", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    },
    "a name of its own": {"image_token": "<e1>", "eos_token": "<|im_end|>"},
    "extra": {"extra_special_tokens": ["<e1>", "<e2>", "hell"]},
    "extra with names": {"extra_special_tokens": {"image_token": "<e1>", "boi": "hell"}},
    "additional": {"additional_special_tokens": ["<e1>", "<|im_end|>"]},
    "both": {"additional_special_tokens": ["<e1>"], "extra_special_tokens": ["<e2>"]},
    "none of them": {"additional_special_tokens": None, "mask_token": None},
    "strips": {
        "mask_token": {
            **{"__type": "AddedToken", "content": "<e1>", "lstrip": True, "rstrip": True},
            **{"normalized": False, "single_word": False, "special": True},
        }
    },
    "spaces": {"clean_up_tokenization_spaces": True, "add_prefix_space": False},
}


def assert_same(path, texts=TEXTS):
    ours, theirs = Tokenizer.from_dir(path), AutoTokenizer.from_pretrained(path)
    assert ours.added_tokens == {str(t): id for id, t in theirs.added_tokens_decoder.items()}
    special = {id for id, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.special_ids == special
    assert ours.named_tokens == theirs.special_tokens_map
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    return ours


@pytest.mark.parametrize("name", CONFIGS)
def test_beside_tokenizer_json_they_are_transformers(tmp_path, name):
    path = tiny_json(
        tmp_path / "t", SPECIALS, tokenizer_class="PreTrainedTokenizerFast", **CONFIGS[name]
    )
    assert_same(path, [*TEXTS, "a . b n't <e1> x"])


def test_chat_templates_read_their_names(tmp_path):
    names = {"mask_token": "hell", "extra_special_tokens": {"boi": "<e1>"}}
    tokenizer = Tokenizer.from_dir(tiny_json(tmp_path / "t", SPECIALS, **names))
    source = "{{ mask_token }}{{ boi }}{{ sep_token }}"
    assert tokenizer.apply_chat_template(USER, chat_template=source) == "hell<e1>"


@pytest.fixture
def older(vocab_dir, tmp_path):
    """Qwen2.5 with added_tokens.json and special_tokens_map.json, as transformers 4 saved it."""
    path = shutil.copytree(vocab_dir, tmp_path / "older")
    config = json.loads((path / "tokenizer_config.json").read_text())
    added = {t["content"]: int(id) for id, t in config.pop("added_tokens_decoder").items()}
    special = {
        "eos_token": {**dict.fromkeys(("lstrip", "rstrip"), False), "content": "<|im_end|>"},
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": config.pop("additional_special_tokens"),
    }
    config["eos_token"] = "<|endoftext|>"  # the older file has the last word
    for name, value in (
        ("tokenizer_config.json", config),
        ("added_tokens.json", added),
        ("special_tokens_map.json", special),
    ):
        (path / name).write_text(json.dumps(value))
    return path


def test_the_older_files_are_read_where_the_config_has_no_tokens(older, qwen):
    ours = Tokenizer.from_dir(older)
    theirs = AutoTokenizer.from_pretrained(older)
    assert ours.added_tokens == qwen.added_tokens and ours.eos_token_id == theirs.eos_token_id
    assert ours.added_tokens == theirs.get_added_vocab()
    assert ours.special_ids == {i for i, t in theirs.added_tokens_decoder.items() if t.special}
    for text in ["<|im_start|>user\nhi<|im_end|>", "<tool_call>x</tool_call><|endoftext|>"]:
        assert ours.encode(text) == theirs.encode(text) == qwen.encode(text)
    assert ours.named_tokens["eos_token"] == "<|im_end|>"


def test_the_config_comes_before_the_older_files(tmp_path):
    decoder = {"260": {"content": "<e1>", "special": True}}
    path = tiny_json(tmp_path / "t", added_tokens_decoder=decoder)
    (path / "added_tokens.json").write_text('{"<e2>": 260}')
    (path / "special_tokens_map.json").write_text('{"eos_token": "<nope>"}')
    tokenizer = Tokenizer.from_dir(path)
    assert tokenizer.added_tokens == {"<|im_end|>": 259, "<e1>": 260}


def test_added_tokens_json_beside_tokenizer_json_is_read_too(tmp_path):
    path = tiny_json(tmp_path / "t", SPECIALS, tokenizer_class="PreTrainedTokenizerFast")
    (path / "added_tokens.json").write_text('{"<e1>": 261, "<|im_end|>": 259}')
    assert assert_same(path).special_ids == {259, 260}


@pytest.mark.parametrize("token", ["Übung", "Ġthe", "«x»", "的", "🙂", "éé", "ÿĀ"])
def test_an_added_token_with_any_letters_becomes_its_own_text(tmp_path, token):
    tokenizer = Tokenizer.from_dir(tiny_json(tmp_path / "t", (token,)))
    ids = tokenizer.encode(f"a{token} b")
    assert 259 in ids and tokenizer.token_bytes(259) == token.encode()
    assert tokenizer.decode(ids) == f"a{token} b"
    later = tiny_json(tmp_path / "later", added_tokens_decoder={"260": {"content": token}})
    tokenizer = Tokenizer.from_dir(later)
    assert tokenizer.decode(tokenizer.encode(f"a{token} b")) == f"a{token} b"


@pytest.mark.parametrize("token, text", [("ç", "的"), ("Ġ", "a b"), ("Ģ", "的"), ("hell", "hell")])
def test_what_the_model_makes_of_text_keeps_its_bytes_if_it_is_added_too(tmp_path, token, text):
    tokenizer = Tokenizer.from_dir(tiny_json(tmp_path / "t", (token,)))
    assert tokenizer.decode(tokenizer.encode(text)) == text


BROKEN = {
    "split_special_tokens": (True, "split_special_tokens is True"),
    "add_prefix_space": (True, "add_prefix_space is True"),
    "extra_special_tokens": ("<e1>", "extra_special_tokens is '<e1>'"),
    "additional_special_tokens": ([7], "additional_special_tokens[0] is 7"),
    "mask_token": (7, "mask_token is 7"),
    "bos_token": ("<nope>", "bos_token is '<nope>'"),
}


@pytest.mark.parametrize("key", BROKEN)
def test_what_cannot_be_meant_is_refused(tmp_path, key):
    value, words = BROKEN[key]
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_dir(tiny_json(tmp_path / "t", **{key: value}))
    assert words in one_line(error) and "tokenizer_config.json" in str(error.value)


@pytest.mark.parametrize("value", [["<e1>"], {"<e1>": "x"}, {"<e1>": 300}, {"<e1>": 4}])
def test_an_added_tokens_json_that_does_not_fit_is_refused(tmp_path, value):
    path = tiny_json(tmp_path / "t")
    (path / "added_tokens.json").write_text(json.dumps(value))
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_dir(path)
    assert "added_tokens.json" in one_line(error)


def test_a_prefix_space_in_tokenizer_json_goes_with_the_same_in_the_config(tmp_path):
    path = tiny_json(tmp_path / "t", add_prefix_space=True)
    edited_json(path / "tokenizer.json", pre_tokenizer__add_prefix_space=True)
    assert Tokenizer.from_dir(path).encode("hell") == [220, 258]
