"""A tokenizer.model, against the sentencepiece library."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tokenizer import (
    FUZZ,
    GOLDEN,
)

from minqwen.tokenizer import Tokenizer


@pytest.fixture(
    scope="module", params=[{}, {"remove_extra_whitespaces": False}, {"add_dummy_prefix": False}]
)
def pieces(request, tmp_path_factory):
    """A tokenizer trained on the golden texts, with one token appended, and the bare model."""
    import sentencepiece

    path, file = tmp_path_factory.mktemp("pieces"), io.BytesIO()
    texts = [pair["text"] for pair in GOLDEN if pair["text"].isprintable()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=file,
        vocab_size=800,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        minloglevel=2,
        **request.param,
    )
    (path / "tokenizer.model").write_bytes(file.getvalue())
    model = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    added = {str(model.get_piece_size()): {"content": "<|im_end|>", "special": True}}
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": True,
                "bos_token": "<s>",
                "eos_token": "<|im_end|>",
                "added_tokens_decoder": added,
            }
        )
    )
    return Tokenizer.from_dir(path), model


@FUZZ
@given(
    text=st.text(max_size=40) | st.sampled_from([pair["text"] for pair in GOLDEN]),
    seed=st.randoms(),
)
def test_ids_and_text_are_those_of_the_library(pieces, text, seed):
    tokenizer, model = pieces
    ids = tokenizer.encode(text, allow_special=False, add_special_tokens=False)
    assert ids == model.encode(text) and tokenizer.decode(ids) == model.decode(ids)
    space, end = model.piece_to_id("\u2581"), model.get_piece_size()
    shuffled = [
        seed.choice([space, seed.randrange(259, end)]) for _ in ids
    ]  # 0 to 258 are bytes and control
    assert tokenizer.decode(shuffled) == model.decode(shuffled)
    decoder = tokenizer.decoder()
    for row in (shuffled + ids, ids):
        assert "".join(decoder.push(id) for id in row) + decoder.flush() == tokenizer.decode(row)


def test_added_tokens_are_matched_and_the_library_never_makes_them_from_text(pieces):
    tokenizer, _ = pieces
    end = tokenizer.vocab_size - 1
    assert tokenizer.eos_token_id == tokenizer.token_to_id("<|im_end|>") == end
    assert tokenizer.bos_token_id == 1
    a = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a<|im_end|>a</s>") == [1, *a, end, *a, 2]
    assert end not in tokenizer.encode("<|im_end|>", allow_special=False)
    assert tokenizer.decode([1, *a, end], skip_special_tokens=True) == "a"
    assert tokenizer.decode([1, *a, end]) in ("<s>a<|im_end|>", "<s> a<|im_end|>")
    assert len({tokenizer.id_to_token(id) for id in range(end + 1)}) == end + 1
