"""How large the engine is: mistakes are told before a weight is read; the cache is what fits."""

from __future__ import annotations

import json

import pytest
import torch
from support.checkpoints import refusal

from minqwen import LLM, Checkpoint, Mesh, Qwen2
from minqwen.engine.sizing import EngineOptions, size_cache
from minqwen.errors import ConfigError
from minqwen.model.memory import step_bytes, worst_steps


def test_the_cache_has_the_blocks_that_were_asked_for(embedded_model):
    llm = LLM(embedded_model, num_blocks=40, block_size=8, max_model_len=64)
    assert (llm.max_model_len, llm.core.pool.num_blocks, llm.core.pool.block_size) == (64, 40, 8)
    assert llm.core.runner.cache.num_blocks == 40 and llm.core.runner.cache.block_size == 8


def test_a_cache_of_so_many_bytes(embedded_model):
    per_block = embedded_model.new_cache(1, 16).pool.nbytes
    for extra, blocks in ((0, 7), (per_block - 1, 7), (per_block, 8)):
        llm = LLM(embedded_model, kv_cache_bytes=7 * per_block + extra)
        assert llm.core.pool.num_blocks == blocks and llm.max_model_len == blocks * 16
        assert llm.core.runner.cache.pool.nbytes == blocks * per_block


def test_without_a_length_the_context_is_the_models_or_what_the_cache_holds(embedded_model):
    context = embedded_model.config.context_length
    assert LLM(embedded_model, num_blocks=10_000).max_model_len == context
    assert LLM(embedded_model, num_blocks=5, block_size=7).max_model_len == 35


# ---- refused before a weight is read ------------------------------------------------------------

WRONG_OPTIONS = [
    ({"block_size": 0}, "block_size"),
    ({"block_size": 257}, "block_size"),
    ({"block_size": "16"}, "block_size"),
    ({"block_size": True}, "block_size"),
    ({"max_model_len": 1}, "max_model_len"),
    ({"max_model_len": 10**9}, "max_model_len"),
    ({"max_model_len": 64.0}, "max_model_len"),
    ({"max_num_seqs": 0}, "max_num_seqs"),
    ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
    ({"max_num_seqs": 65, "max_num_batched_tokens": 64}, "max_num_seqs"),
    ({"num_blocks": 0}, "num_blocks"),
    ({"num_blocks": 2, "max_model_len": 200}, "num_blocks"),
    ({"kv_cache_bytes": -1}, "kv_cache_bytes"),
    ({"kv_cache_bytes": 5}, "kv_cache_bytes"),
    ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
    ({"gpu_memory_utilization": 0}, "gpu_memory_utilization"),
    ({"enable_prefix_caching": "yes"}, "enable_prefix_caching"),
    ({"seed": "a"}, "seed"),
    ({"seed": -1}, "seed"),
    ({"temprature": 0.5}, "no argument 'temprature'"),
    ({"max_model_length": 64}, "did you mean 'max_model_len'"),
    ({"blocksize": 16}, "did you mean 'block_size'"),
    ({"tokeniser": None}, "did you mean 'tokenizer'"),
]
WRONG_LOADING_OPTIONS = [
    ({"arithmetic": "exakt"}, "did you mean 'exact'"),
    ({"arithmetic": "exact", "dtype": "float64"}, "float64"),
    ({"device": "gpu"}, "did you mean 'cuda'"),
    ({"device": "cuda:99"}, "cuda:99"),
    ({"dtype": "int3"}, "int3"),
    ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
    ({"offload": "cloud"}, "cloud"),
]


class WeightIsReadError(Exception):
    pass


@pytest.fixture
def unreadable(embedded, monkeypatch):
    """The embedded model's directory; whoever reads a weight of it gets a WeightIsReadError."""

    def read(*args, **options):
        raise WeightIsReadError

    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.setattr(Checkpoint, "check_finite", read)
    return embedded


def test_control_a_weight_that_is_read_is_seen(unreadable):
    for options in ({}, {"offload": "memory"}, {"check_finite": True}):
        with pytest.raises(WeightIsReadError):
            LLM(unreadable, **options)


@pytest.mark.parametrize("options, says", WRONG_OPTIONS + WRONG_LOADING_OPTIONS, ids=repr)
def test_every_flag_is_refused_before_a_weight_is_read(unreadable, options, says):
    refusal(lambda: LLM(unreadable, **options), says)


@pytest.mark.parametrize("options, says", WRONG_OPTIONS, ids=repr)
def test_the_same_flags_are_refused_beside_a_model(embedded_model, options, says):
    refusal(lambda: LLM(embedded_model, **options), says)


@pytest.mark.parametrize(
    "options",
    [
        {"arithmetic": "exact"},
        {"arithmetic": "native"},
        {"dtype": "float32"},
        {"dtype": torch.bfloat16},
        {"device": "cpu"},
        {"offload": "memory"},
        {"mesh": Mesh()},
        {"check_finite": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_loading_are_refused_beside_a_model_that_is_loaded(embedded_model, options):
    refusal(lambda: LLM(embedded_model, **options), next(iter(options)), "loaded already")


def test_a_context_longer_than_the_models_is_refused(embedded_model):
    context = embedded_model.config.context_length
    assert LLM(embedded_model, max_model_len=context, num_blocks=10_000).max_model_len == context
    refusal(
        lambda: LLM(embedded_model, max_model_len=context + 1, num_blocks=10_000),
        f"max_model_len is {context + 1}, expected 2 to {context}",
    )


def test_a_dual_chunk_models_context_is_that_of_full_attention(unreadable, tmp_path):
    """The 1M models name a million positions, but full attention is right for a part of them."""
    for file in unreadable.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((unreadable / "config.json").read_text())
    config["max_position_embeddings"] = 1_010_000
    config["dual_chunk_attention_config"] = {
        "chunk_size": 300,
        "local_size": 100,
        "original_max_position_embeddings": 640,
    }
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    refusal(lambda: LLM(tmp_path, max_model_len=641), "max_model_len is 641, expected 2 to 640")
    with pytest.raises(WeightIsReadError):
        LLM(tmp_path, max_model_len=640)


def test_a_dual_chunk_model_runs_no_further_by_itself(embedded_model):
    raw = {"dual_chunk_attention_config": {"original_max_position_embeddings": 640}}
    model = Qwen2(embedded_model.config.replace(max_position_embeddings=10**6, raw=raw))
    assert LLM(model, num_blocks=100).max_model_len == 640


# ---- the pool is what the room leaves -----------------------------------------------------------


@pytest.mark.parametrize("seqs, tokens, length", [(1, 16, 900), (8, 64, 900), (64, 2048, 200)])
@pytest.mark.parametrize("arithmetic", ["native", "exact"])
def test_the_pool_is_what_the_room_leaves_beside_the_fullest_step(
    embedded_model, exact_model, arithmetic, seqs, tokens, length
):
    room = 40_000_000
    model = embedded_model if arithmetic == "native" else exact_model
    options = EngineOptions(max_model_len=length, max_num_seqs=seqs, max_num_batched_tokens=tokens)
    context, num_blocks = size_cache(model, options, room)
    assert context == length
    per_block = model.new_cache(1, 16).pool.nbytes
    assert per_block == 2 * 16 * model.config.num_hidden_layers * model.config.kv_size * 4
    dtype = "float32" if arithmetic == "native" else "float64"

    def taken(blocks: int) -> int:
        few, many = min(seqs, blocks * 16 // length), min(length, blocks * 16 // seqs)
        steps = [*worst_steps(length, few, tokens), *worst_steps(many, seqs, tokens)]
        fullest = max(step_bytes(model.config, *s, dtype=dtype, device="cpu") for s in steps)
        return blocks * per_block + fullest

    assert taken(num_blocks) <= room
    most = seqs * -(-length // 16)  # that could ever be used
    assert num_blocks == most or taken(num_blocks + 1) > room
    with pytest.raises(ConfigError, match="cache has 0: .*gpu_memory_utilization"):
        size_cache(model, options, 100_000)


def test_exact_arithmetics_wider_steps_leave_less_for_the_cache(embedded_model, exact_model):
    options = EngineOptions(max_model_len=900, max_num_seqs=8, max_num_batched_tokens=1024)
    native = size_cache(embedded_model, options, 40_000_000)[1]
    assert 0 < size_cache(exact_model, options, 40_000_000)[1] < native
