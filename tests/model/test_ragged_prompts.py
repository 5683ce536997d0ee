"""Prompts of unequal lengths in one forward pass: each has what it has alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from support.exact import build, random_model, same
from support.qwen2 import oracle, ours, tokens
from support.ranks import on_ranks

from minqwen import MinqwenError, Qwen2
from minqwen.model.activations import CONTRIBUTORS
from minqwen.model.trace import every_name

NAMES = ["*", "*.attn.result"]
LENGTHS = (7, 1, 1, 33, 16, 1)


def prompts_of(model):
    return [tokens(model, length, seed=i) for i, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_prompt_has_what_it_has_alone_in_every_bit(dtype):
    """Under exact arithmetic, which does not see its neighbours."""
    model = build(random_model(), "exact", dtype)
    prompts = prompts_of(model)
    logits, caches = model.run_with_cache(prompts, NAMES)
    assert len(logits) == len(caches) == len(prompts)
    for ids, own, cache in zip(prompts, logits, caches):
        expected, alone = model.run_with_cache(ids[None], NAMES)
        assert own.shape == expected.shape and list(cache) == list(alone) == every_name(2)
        assert same([own, *cache.values()], [expected, *alone.values()])
        assert same(cache.head_contributions(5), alone.head_contributions(5))
        lens, expected_lens = cache.logit_lens(), alone.logit_lens()
        assert torch.equal(lens.ids, expected_lens.ids)
        assert same([lens.logits], [expected_lens.logits])


def test_native_arithmetic_gives_the_same_to_rounding():
    model = ours(oracle(), dtype=torch.float64)
    prompts = prompts_of(model)
    logits, caches = model.run_with_cache(prompts, NAMES, per_query_head=True)
    for ids, own, cache in zip(prompts, logits, caches):
        expected, alone = model.run_with_cache(ids[None], NAMES, per_query_head=True)
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)
        assert cache["layers.0.attn.k"].shape[2] == 6
        for name, x in alone.items():
            torch.testing.assert_close(cache[name], x, rtol=1e-10, atol=1e-10, msg=name)


def test_lists_of_ids_are_prompts_and_one_is_enough():
    model = build(random_model())
    prompts = [[5, 3, 17], [2]]
    logits, caches = model.run_with_cache(prompts, "*.attn.pattern")
    assert [x.shape[:2] for x in logits] == [(1, 3), (1, 1)]
    assert [c["layers.1.attn.pattern"].shape[2:] for c in caches] == [(3, 3), (1, 1)]
    for alone, ids, x in zip(([p] for p in prompts), prompts, logits):
        (one,), (_,) = model.run_with_cache(alone, "logits")
        assert same([one], [x]) and same([one], [model(torch.tensor([ids]))])


def test_every_tensor_has_memory_of_its_own(tmp_path):
    model = build(random_model())
    _, caches = model.run_with_cache(prompts_of(model), NAMES)
    for cache in caches:
        save_file(cache, tmp_path / "seen.safetensors")
    every = [x for cache in caches for x in cache.values()]
    assert len({x.untyped_storage().data_ptr() for x in every}) == len(every)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in every)


def test_ranks_gather_each_prompt():
    config, weights = random_model(num_attention_heads=8)
    whole = build((config, weights))
    prompts = prompts_of(whole)

    def read(name, mine):
        x = weights[name]
        return x if mine is None else x.narrow(mine.dim, mine.start, mine.stop - mine.start)

    def outcomes(model):
        logits, caches = model.run_with_cache(prompts, NAMES)
        return [*logits, *(x for cache in caches for x in cache.values())]

    expected = outcomes(whole)
    for found in on_ranks(
        4, lambda mesh: outcomes(Qwen2.from_tensors(config, read, mesh=mesh, arithmetic="exact"))
    ):
        assert same(found, expected)


def test_weights_that_require_gradients_do_not_mind():
    model = ours(oracle()).requires_grad_()
    with torch.enable_grad():
        logits, caches = model.run_with_cache([[1, 2, 3], [4]], CONTRIBUTORS)
    assert not any(x.requires_grad for x in [*logits, *caches[0].values()])


@pytest.mark.parametrize(
    "prompts, says",
    [
        ([[1, 2], []], "at least one token"),
        ([[1, 2], [61]], "the token 61"),
        ([[1, 2], ["a"]], "a prompt is ['a']"),
        ([[1, 2], [[3, 4]]], "a prompt is [[3, 4]]"),
        ([torch.tensor([[1, 2]])], "a prompt is (1, 2)"),
        ([torch.tensor([1.0, 2.0])], "torch.float32"),
        ([[1, 2], 3], "torch.tensor"),
        ([], "[]"),
    ],
    ids=str,
)
def test_what_is_no_prompt_is_refused_in_one_line(prompts, says):
    model = ours(oracle())
    with pytest.raises(MinqwenError) as caught:
        model.run_with_cache(prompts)
    assert says in str(caught.value) and "\n" not in str(caught.value)
