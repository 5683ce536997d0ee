"""What a forward pass refuses: one line that says what was found and what to do."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.qwen2 import oracle, ours, tokens, yarn

from minqwen import Batch, MinqwenError


@pytest.fixture(scope="module")
def model():
    with torch.no_grad():
        return ours(oracle())  # 61 tokens


@pytest.mark.parametrize(
    "ids, says",
    [
        ("text", "tokenizer.encode"),
        ([1, 2, 3], "torch.tensor"),
        ([[1, 2], [3, 4]], "torch.tensor"),
        ([[1, 2], [3]], "unequal lengths"),
        (None, "torch.tensor"),
        (torch.tensor([1, 2]), "(2,)"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least one token"),
        (torch.zeros(0, 3, dtype=torch.int64), "at least one token"),
        (torch.tensor([[1.0]]), "torch.float32"),
        (torch.tensor([[1, 2]], dtype=torch.int16), "ids.long()"),
        (torch.tensor([[1, 61]]), "the token 61, expected 0 to 60"),
        (torch.tensor([[-1, 2]]), "the token -1"),
    ],
    ids=str,
)
def test_ids_that_are_none_are_refused_in_one_line(model, ids, says):
    uses = [model, lambda ids: model.run_with_hooks(ids, [])]
    if not (isinstance(ids, list) and isinstance(ids[0], list)):  # which are prompts for it
        uses.append(model.run_with_cache)
    for use in uses:
        with pytest.raises(MinqwenError) as caught:
            use(ids)
        assert says in str(caught.value) and "\n" not in str(caught.value)


def test_int32_ids_are_ids(model):
    ids = tokens(model, 2, 3)
    assert torch.equal(model(ids.int()), model(ids))


def test_a_mask_of_ones_changes_nothing_and_another_is_refused(model):
    ids = tokens(model, 2, 4)
    mask = torch.ones_like(ids)
    assert torch.equal(model(ids, attention_mask=mask), model(ids))
    assert torch.equal(model(ids, attention_mask=mask.bool()), model(ids))
    mask[1, 0] = 0
    for hiding in (mask, mask.bool()):
        with pytest.raises(MinqwenError, match="hides 1 of 8 tokens.*LLM.generate"):
            model(ids, attention_mask=hiding)


@pytest.mark.parametrize(
    "batch, says",
    [
        (Batch.paged([2, 1], [2, 1], [[0], [1]], 4), "1 to 2 tokens and no cache"),
        (Batch.paged([1, 2], [3, 2], [[0], [1]], 4), "continues sequences"),
        (Batch.dense(2, 2), "describes 4"),
    ],
    ids=["unequal lengths", "continued", "other tokens"],
)
def test_a_batch_that_needs_a_cache_is_refused_without_one(model, batch, says):
    with pytest.raises(MinqwenError, match=says):
        model(torch.tensor([1, 2, 3]), batch)


def test_a_cache_without_a_batch_is_refused(model):
    with pytest.raises(MinqwenError, match="needs a Batch"):
        model(tokens(model, 1, 3), cache=model.new_cache(2, 4))


def test_more_tokens_than_the_context_are_told_once():
    hf = oracle(max_position_embeddings=8)
    model = ours(hf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(model, 2, 8))
    with pytest.warns(UserWarning, match="9 tokens are more than the 8") as told:
        first = model(tokens(model, 1, 9))
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(tokens(model, 1, 9)), first)
        # YaRN's context is its factor times the original one.
        long = ours(oracle(max_position_embeddings=8, rope_parameters=yarn(2.0, original=8)))
        long(tokens(long, 1, 16))


def test_exact_arithmetic_says_that_it_has_no_gradients():
    model = ours(oracle(), arithmetic="exact")
    ids = tokens(model, 1, 3)
    plain = model(ids)
    ask = [("layers.0.resid_pre", lambda x, name: x.requires_grad_())]
    with torch.enable_grad():
        assert torch.equal(model(ids), plain)
        with pytest.raises(MinqwenError, match="layers.0.resid_pre.*arithmetic='native'"):
            model.run_with_hooks(ids, ask)
        model.requires_grad_()
        with pytest.raises(MinqwenError, match="no gradients.*arithmetic='native'"):
            model(ids)
    assert torch.equal(model(ids), plain)
