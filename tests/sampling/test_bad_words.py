"""bad_words on Qwen2.5's vocabulary: whichever way a word is spelled, it is banned."""

import pytest
from support.tokenizer import write_qwen_vocabulary

from minqwen.sampling.draw import bad_word_ids
from minqwen.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("qwen_vocabulary")
    write_qwen_vocabulary(path)
    return Tokenizer.from_dir(path)


def plain(tokenizer):
    return lambda text: tokenizer.encode(text, allow_special=False, add_special_tokens=False)


def test_a_word_of_one_token_after_a_space_and_of_two_without(qwen):
    banned = {(61158,), (327, 10114, 657)}
    assert set(bad_word_ids(["exaggerated"], plain(qwen))) == banned
    assert set(bad_word_ids([" exaggerated"], plain(qwen))) == banned


def test_no_word_of_one_token_escapes(qwen):
    """Every token that is a word, or a word after a space, is banned by the word."""
    words = {}  # {word: the tokens that are nothing but this word}
    for i in range(qwen.vocab_size):
        text = qwen.token_bytes(i).decode("utf-8", "replace")
        if text.lstrip(" ").isalpha() and text.count(" ") <= 1:
            words.setdefault(text.lstrip(" "), []).append(i)
    spellings = [*words, *(" " + word for word in words)]
    encoded = dict(zip(spellings, qwen.encode_batch(spellings)))
    escaped, after_a_space = [], 0
    for word, ids in words.items():
        banned = bad_word_ids([word], encoded.__getitem__)
        for i in ids:
            text = qwen.decode([i])
            written = encoded[text] == [i]  # some tokens are never used for their own text
            after_a_space += written and text.startswith(" ")
            if written and (i,) not in banned:
                escaped.append(text)
    assert len(words) > 40_000 and after_a_space > 40_000 and escaped == []
