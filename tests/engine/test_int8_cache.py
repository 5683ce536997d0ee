"""kv_cache_dtype="int8": a scale for each token and head, half the memory, and nothing else new."""

from __future__ import annotations

import pytest
import torch
from support.exact import build, random_model
from support.paged import random_chunks, run_paged

from minqwen import LLM, Qwen2, SamplingParams
from minqwen.errors import ConfigError
from minqwen.lab.planner import Planner
from minqwen.model.kv_cache import Int8KVCache
from minqwen.model.memory import block_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def filled(dtype: torch.dtype, k: torch.Tensor, v: torch.Tensor) -> Int8KVCache:
    """A cache whose second layer has these tokens in its last block."""
    cache = Int8KVCache(2, 3, 4, k.shape[1], k.shape[2], dtype, "cpu")
    cache.write(1, torch.arange(8, 8 + len(k)), k, v)
    return cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_read_is_within_half_a_step_of_what_was_written(dtype):
    g = torch.Generator().manual_seed(1)
    k, v = (
        torch.randn(4, 2, 16, generator=g) * 10.0 ** torch.arange(-1, 3)[:, None, None]
        for _ in "kv"
    )
    k, v = k.to(dtype), v.to(dtype)
    k[2, 1] = 0
    cache = filled(dtype, k, v)
    for x, read in zip((k, v), cache.read(1, torch.tensor([[2]]), 4)):
        found = read[0].transpose(0, 1)
        assert found.dtype == dtype
        step = x.float().abs().amax(-1, keepdim=True) / 127 * (1 + 2.0**-7)
        allowed = step / 2 + x.float().abs() * torch.finfo(dtype).eps
        assert ((found.float() - x.float()).abs() <= allowed).all()
        assert not found[x == 0].any() or x.abs().max() > 0
    assert not cache.read(1, torch.tensor([[2]]), 4)[0][0, 1, 2].any()


def test_numbers_are_what_a_hand_computes():
    k = torch.tensor([[[127.0, -63.5, 1.0, 0.2]]])
    cache = filled(torch.float32, k, 2 * k)
    # The scale is 1.0 + 2^-8, which bfloat16 rounds up to 1 + 2^-7 or down to 1.
    scale = float(cache.scales[1, 0, 2, 0, 0])
    assert 1.0 <= scale <= 1 + 2.0**-7
    assert cache.pool[1, 0, 2, 0, 0].tolist() == [round(x / scale) for x in k.flatten().tolist()]
    assert cache.scales[1, 1, 2, 0, 0] == 2 * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_number_is_cut_off(dtype):
    x = torch.linspace(0.5, 2, 5000).to(dtype)[:, None, None].expand(-1, 1, 16).contiguous()
    cache = Int8KVCache(1, 1250, 4, 1, 16, dtype, "cpu")
    cache.write(0, torch.arange(5000), x, -x)
    assert cache.pool[0, 0].min() >= 125 and cache.pool[0, 1].max() <= -125


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad):
    k = torch.ones(3, 2, 8)
    k[1, 0, 3] = bad
    read = filled(torch.float32, k, k).read(1, torch.tensor([[2]]), 3)[0][0]
    assert read.isfinite().all(-1).tolist() == [[True, False, True], [True, True, True]]


# ---- engines ------------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
OPTIONS = dict(max_model_len=64, num_blocks=40, block_size=4, kv_cache_dtype="int8", seed=0)


def engine(model, **options) -> LLM:
    return LLM(model, **{**OPTIONS, **options})


def prompts(count: int) -> list[list[int]]:
    shared = tokens_of(0, 13)
    return [shared + tokens_of(i, 5 + i) for i in range(1, count + 1)]


def tokens_of(seed: int, n: int) -> list[int]:
    return torch.randint(128, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(llm: LLM, asked: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], GREEDY, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


@pytest.mark.parametrize("arithmetic", ["native", "fast"])
def test_no_history_changes_a_token(arithmetic):
    """Prefixes that are used again, preemption and chunks of prompts read the same numbers."""
    model = build(random_model(seed=2), arithmetic)
    asked = prompts(4)
    right = [run(engine(model, enable_prefix_caching=False), [ids])[0] for ids in asked]
    assert len({tuple(ids) for ids in right}) > 1
    caching = engine(model)
    assert run(caching, asked) == right
    assert run(caching, asked) == right  # from the prefix cache
    tight = engine(model, num_blocks=16, max_num_batched_tokens=7, max_num_seqs=4)
    assert run(tight, asked) == right
    assert tight.core.scheduler.num_preemptions > 0


def test_a_model_that_gets_another_dtype_gets_another_int8_cache():
    model = build(random_model(seed=2), "native")
    llm = engine(model)
    before = run(llm, prompts(1))
    llm.model.to(torch.float64)
    after = run(llm, prompts(1))
    cache = llm.core.runner.cache
    assert isinstance(cache, Int8KVCache) and cache.dtype == torch.float64
    assert len(before[0]) == len(after[0])


def test_the_embedded_model_errs_a_little(embedded):
    truth, model = (Qwen2.from_pretrained(embedded, dtype=d) for d in ("float64", "bfloat16"))
    ids = torch.randint(2000, (2, 60), generator=torch.Generator().manual_seed(2))
    right = truth(ids)
    cache = {}
    for kind in ("auto", "int8"):
        model.new_cache = lambda n, size, kind=kind: Qwen2.new_cache(model, n, size, kind)
        logits = torch.stack(run_paged(model, list(ids), chunk=random_chunks(1, 9), stale=0.0))
        difference = right.log_softmax(-1) - logits.double().log_softmax(-1)
        cache[kind] = float((difference * right.softmax(-1)).sum(-1).mean())
    assert 0 < cache["int8"] < 0.02
    assert cache["int8"] != cache["auto"]


def test_blocks_take_half_the_bytes_and_twice_as_many_fit():
    model = build(random_model(head_dim=64), "native", torch.bfloat16)
    caches = [model.new_cache(1, 16, kind) for kind in ("auto", "int8")]
    held = [block_bytes(model.config, 1, 16, "bfloat16", kind) for kind in ("auto", "int8")]
    assert held[0] == caches[0].pool.nbytes
    assert held[1] == caches[1].pool.nbytes + caches[1].scales.nbytes
    options = dict(num_blocks=None, kv_cache_bytes=100 * held[0], block_size=16)
    blocks = [
        engine(model, kv_cache_dtype=kind, **options).core.pool.num_blocks
        for kind in ("auto", "int8")
    ]
    assert blocks[0] == 100 and blocks[1] == 100 * held[0] // held[1] >= 193
    planned = [Planner(model.config, kv_cache_dtype=kind) for kind in ("auto", "int8")]
    assert [16 * p.kv_per_token for p in planned] == held
    assert planned[0].estimate(400).kv_cache == 25 * held[0]
    assert planned[1].estimate(400).kv_cache == 25 * held[1]


def test_what_cannot_be_is_refused_in_one_line(embedded):
    with pytest.raises(ConfigError, match="'int8', but exact arithmetic takes keys and values as"):
        LLM(embedded, arithmetic="exact", kv_cache_dtype="int8")
    with pytest.raises(ConfigError, match="'int8', but exact"):
        engine(build(random_model(), "exact"))
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'fp8', expected 'auto' or 'int8'"):
        LLM(embedded, kv_cache_dtype="fp8")
