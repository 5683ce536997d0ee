"""NaN and infinity travel forwards only: what a query must not see does not reach it."""

from __future__ import annotations

import pytest
import torch
from support.paged import run_paged
from support.qwen2 import cast, oracle, ours, tokens

from minqwen.model import attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BAD = 7  # the token whose value overflows in the models of `overflowing`


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_earlier_tokens_keep_every_bit(dtype, value):
    model = ours(cast(oracle(), dtype))
    ids = tokens(model, 2, 9)
    plain = model(ids)
    for t in range(ids.shape[1]):

        def spoil(v, name, t=t):
            v = v.clone()
            v[1, t, 0, 3] = value
            return v

        logits = model.run_with_hooks(ids, [("layers.0.attn.v", spoil)])
        assert torch.equal(logits[0], plain[0])
        assert torch.equal(logits[1, :t], plain[1, :t])
        assert not logits[1, t:].isfinite().any()


def test_only_the_entries_that_meet_it_are_spoiled():
    model = ours(oracle())
    ids = tokens(model, 1, 9)
    _, plain = model.run_with_cache(ids, "layers.0.attn.z")
    seen = {}

    def spoil(v, name):
        v = v.clone()
        v[0, 4, 1, 3] = torch.inf
        return v

    keep = lambda z, name: seen.update({name: z})
    model.run_with_hooks(ids, [("layers.0.attn.v", spoil), ("layers.0.attn.z", keep)])
    z, plain = seen["layers.0.attn.z"], plain["layers.0.attn.z"]
    spoiled = torch.zeros_like(z, dtype=torch.bool)
    spoiled[0, 4:, 3:, 3] = True  # key/value head 1 serves query heads 3 to 5
    assert torch.equal(~z.isfinite(), spoiled)
    assert torch.equal(z[~spoiled], plain[~spoiled])


def test_a_pattern_that_a_hook_turns_to_a_later_key_meets_it():
    model = ours(oracle())
    ids, seen = tokens(model, 1, 5), {}

    def look_ahead(pattern, name):
        pattern = pattern.clone()
        pattern[..., 1, 4] = 0.5
        return pattern

    hooks = [
        ("layers.0.attn.v", lambda v, name: v.index_fill(1, torch.tensor([4]), torch.inf)),
        ("layers.0.attn.pattern", look_ahead),
        ("layers.0.attn.z", lambda z, name: seen.update({name: z})),
    ]
    model.run_with_hooks(ids, hooks)
    finite = seen["layers.0.attn.z"].isfinite().flatten(2).all(-1)[0]
    assert finite.tolist() == [True, False, True, True, False]


def overflowing(dtype):
    """A model in which the value of the token BAD, and of no other one, overflows in layer 0."""
    hf = oracle()
    with torch.no_grad():
        embedding = hf.model.embed_tokens.weight
        embedding[:, 0] = 0
        embedding[BAD] = 0
        embedding[BAD, 0] = 1  # normed it is sqrt(24): more than 2 times the largest number
        hf.model.layers[0].input_layernorm.weight[0] = 1
    model = ours(cast(hf, dtype))
    model.model.layers[0].self_attn.v_proj.weight.data[3, 0] = torch.finfo(dtype).max
    return model


@pytest.mark.parametrize("tile", [10**9, 16, 3, 1], ids=lambda n: f"rows{n}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_do_not_decide_what_is_finite(dtype, tile, monkeypatch):
    monkeypatch.setattr(attention, "tile_rows", lambda device, scores_per_row: tile)
    model = overflowing(dtype)
    sequences = [tokens(model, T, seed=T) for T in (20, 23, 31)]
    sequences = [ids.where(ids != BAD, 0) for ids in sequences]
    for ids, t in zip(sequences, (0, 11, 30)):
        ids[t] = BAD
    for size in (1, 2, 5, 16, 100):
        paged = run_paged(model, sequences, 4, lambda i, done, size=size: size)
        for ids, t, logits in zip(sequences, (0, 11, 30), paged):
            for found in (logits, model(ids[None])[0]):
                finite = found.isfinite().all(-1).tolist()
                assert finite == [i < t for i in range(len(ids))], (size, t)
