"""The planner's estimates beside arithmetic by hand, and beside resident memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from support.paths import DATA, ROOT

from minqwen import ModelConfig
from minqwen.errors import ConfigError, ParallelError
from minqwen.lab import peak_memory
from minqwen.lab.peak_memory import Job
from minqwen.lab.planner import (
    CARDS,
    PACKINGS,
    QUANTIZATIONS,
    Fit,
    Planner,
    rank_weights,
    yarn_for,
)
from minqwen.lab.shapes import SIZES, official_config
from minqwen.parallel import valid_degrees

SEVEN = official_config("7B")
PUBLISHED = json.loads((DATA / "configs.json").read_text())["models"]


def all_bytes(ranks: list[dict[str, int]]) -> int:
    return sum(sum(held.values()) for held in ranks)


def test_an_estimate_adds_weights_cache_and_activations():
    estimate = Planner(SEVEN).estimate(context=4096, batch=2)
    assert estimate.weights == SEVEN.weight_bytes() == 15_231_233_024
    assert estimate.kv_cache == 2 * 4096 * SEVEN.kv_bytes_per_token()
    assert estimate.phase in ("attention", "MLP", "logits") and estimate.activations > 0
    assert estimate.total == estimate.weights + estimate.kv_cache + estimate.activations


# ---- weights ------------------------------------------------------------------------------------


def test_weights_of_the_7b_on_four_ranks_by_hand():
    attention = 7 * 128 * 3584 + 896  # q: 28 / 4 heads and their bias
    attention += 2 * (128 * 3584 + 128) + 3584 * 896  # k and v: one head each; o
    mlp = 3 * (18944 // 4) * 3584
    elements = 28 * (attention + mlp + 2 * 3584) + 3584 + 2 * (152064 // 4) * 3584
    assert 2 * elements == 3_808_114_688 == Planner(SEVEN, 4).weights
    assert Planner(SEVEN).weights == 2 * 7_615_616_512 == 15_231_233_024
    # The ranks hold everything once, but the norms four times: 57 of 3,584 numbers.
    held = all_bytes(rank_weights(SEVEN, 4, "bfloat16"))
    assert held == 15_231_233_024 + 3 * 2 * 57 * 3584


@pytest.mark.parametrize("size", SIZES)
def test_official_sizes(size):
    config, model = official_config(size), PUBLISHED[f"Qwen/Qwen2.5-{size}-Instruct"]
    assert config.num_parameters() == model["parameters"]
    assert Planner(config).weights == model["weight_bytes_bf16"]
    assert Planner(config).kv_per_token == model["kv_bytes_per_token_bf16"]
    assert Planner(config, dtype="float32").weights == model["weight_bytes_fp32"]
    for degree in valid_degrees(config, 8):
        total = all_bytes(rank_weights(config, degree, "bfloat16"))
        assert model["weight_bytes_bf16"] <= total < 1.06 * model["weight_bytes_bf16"]


def test_the_vocabularys_last_piece():
    """97 rows on 4 ranks: pieces of 25, 25, 25 and 22; the fullest rank counts."""
    config = ModelConfig(
        vocab_size=97,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    held = [rank["model.embed_tokens.weight"] // 16 for rank in rank_weights(config, 4, "bfloat16")]
    assert held == [25, 25, 25, 22]


SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    dtype="float16",
)


def last_rank(quantization: str, config: ModelConfig = SMALL, size: int = 1) -> dict[str, int]:
    return rank_weights(config, size, "float16", quantization)[-1]


def test_packed_weights_by_hand():
    gate = "model.layers.0.mlp.gate_proj.weight"
    # 256 inputs, 512 outputs: nibbles; 2 groups of zeros (a nibble each output) and 16-bit scales
    assert last_rank("awq")[gate] == 256 * 512 // 2 + 2 * 512 // 2 + 2 * 512 * 2
    # g_idx: an int32 for each input
    assert last_rank("gptq")[gate] == last_rank("awq")[gate] + 256 * 4
    assert last_rank("gptq-int8")[gate] == 256 * 512 + 2 * 512 + 2 * 512 * 2 + 256 * 4
    assert last_rank("int8")[gate] == 256 * 512 + 512 * 2


def test_a_rank_with_half_a_group_of_inputs_holds_that_groups_zeros_and_scales():
    """down_proj is split by its inputs: a rank of eight has 64 of the 512."""
    config = SMALL.replace(num_attention_heads=8, num_key_value_heads=8)
    down = last_rank("awq", config, 8)["model.layers.0.mlp.down_proj.weight"]
    assert down == 64 * 256 // 2 + 1 * 256 // 2 + 1 * 256 * 2


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight",
    ],
)
def test_what_is_not_a_projection_stays_in_16_bits(name):
    expected = 2 * math.prod(SMALL.parameter_shapes()[name])
    assert {last_rank(kind)[name] for kind in QUANTIZATIONS} == {expected}


@pytest.mark.parametrize("kind", PACKINGS)
def test_packed_attention_has_the_writers_shapes(kind):
    """The same layouts, as head extension writes them."""
    packing, held = PACKINGS[kind], rank_weights(SEVEN, 1, "float16", kind)[0]
    for projection in "qkvo":
        name = f"model.layers.5.self_attn.{projection}_proj."
        parts = ["qweight", "qzeros", *(["g_idx"] if packing.method == "gptq" else [])]
        words = sum(4 * math.prod(packing.shape(name + part, SEVEN)) for part in parts)
        scales = 2 * math.prod(packing.shape(name + "scales", SEVEN))
        assert held[name + "weight"] == words + scales


def test_a_quantised_config_is_counted_as_it_says():
    spec = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "version": "gemm",
        "zero_point": True,
    }
    config = SEVEN.replace(quantization_config=spec, dtype="float16")
    assert Planner(config).weights == Planner(SEVEN, dtype="float16", quantization="awq").weights
    assert Planner(config).quantization == "awq 4-bit"


# ---- cache, time, what fits ---------------------------------------------------------------------


def test_cache_in_whole_blocks_and_with_replicated_heads():
    assert Planner(SEVEN).estimate(17).kv_cache == 2 * 16 * 57_344  # two blocks of 16 tokens
    assert Planner(SEVEN, 4, block_size=128).estimate(129, 3).kv_cache == 3 * 256 * 57_344 // 4
    assert 57_344 == 2 * 28 * 4 * 128 * 2  # keys and values, layers, heads, head_dim, bytes
    wide = SEVEN.replace(num_attention_heads=32)
    # 4 heads on 8 ranks: each of them is on two ranks, none is divided
    assert Planner(wide, 8).kv_per_token == 57_344 // 4
    held = rank_weights(wide, 8, "bfloat16")
    assert held[0]["model.layers.3.self_attn.k_proj.weight"] == 128 * 3584 * 2


def test_time_floors_by_hand():
    estimate = Planner(SEVEN).estimate(32_768)
    # The embedding is looked up, not read.
    read = 15_231_233_024 - 152_064 * 3_584 * 2 + 57_344 * 32_768
    assert estimate.decode_bytes == read
    assert estimate.decode_seconds(CARDS["RTX 4090"]) == read / 1008e9
    # Every token through the matrices, 13,050,576,896 FLOPs, and against those before it, 401,408
    # FLOPs each; the head once.
    flops = 32_768 * 13_050_576_896 + 401_408 * 32_768 * 32_769 // 2 + 2 * 152_064 * 3_584
    assert estimate.prefill_seconds(CARDS["A100 80GB"]) == flops / 312e12
    assert Planner(SEVEN, 4).estimate(32_768, 2).prefill_flops == 2 * flops / 4


def test_ranks_that_hold_copies_of_a_kv_head_all_compute_its_keys_and_values():
    estimate = Planner(SEVEN.replace(num_attention_heads=32), 8).estimate(32_768)
    # On one of eight GPUs: 4 query heads, one KV head, and an eighth of the MLP and of the head.
    layer = 3584 * (2 * 4 * 128 + 2 * 128 + 3 * 18_944 // 8)
    per_token = 2 * 28 * layer
    logits, pair = 2 * 152_064 // 8 * 3584, 4 * 28 * 4 * 128
    assert estimate.decode_flops == per_token + logits + pair * 32_768
    assert estimate.prefill_flops == 32_768 * per_token + pair * 32_768 * 32_769 // 2 + logits


def test_a_tied_embedding_is_the_head_and_is_read():
    tied = Planner(official_config("3B")).estimate(1)
    assert tied.decode_bytes == 6_171_877_376 + 36_864


def test_a_step_of_enough_sequences_is_bound_by_flops():
    many, card = Planner(official_config("0.5B")).estimate(1, 2048), CARDS["RTX 3090"]
    assert many.decode_seconds(card) == many.decode_flops / 71e12 > many.decode_bytes / 936e9


@pytest.mark.parametrize("size, gb", [(1, 24), (4, 24), (2, 48)])
def test_largest_is_the_last_that_fits(size, gb):
    planner, limit = Planner(SEVEN, size), int(gb * 0.9e9)
    context = planner.largest_context(limit, 3)
    assert planner.estimate(context, 3).total <= limit < planner.estimate(context + 1, 3).total
    batch = planner.largest_batch(limit, 8192)
    assert planner.estimate(8192, batch).total <= limit < planner.estimate(8192, batch + 1).total
    fit = planner.fit(planner.estimate(8192, 3), limit)
    assert fit == Fit(planner.estimate(8192, 3).total <= limit, min(context, 32768), batch)
    longest = planner.fit(planner.estimate(10**9), limit)
    assert longest.largest_context == planner.largest_context(limit) < 10**9
    assert Planner(official_config("72B")).largest_context(limit) == 0


def with_yarn(block: dict) -> ModelConfig:
    return ModelConfig.from_dict({**SEVEN.to_dict(), "rope_scaling": block})


@pytest.mark.parametrize("context", [32769, 40_000, 65_536, 131_072, 131_073, 1_000_003])
def test_the_yarn_that_a_context_needs(context):
    block = yarn_for(SEVEN, context)
    assert with_yarn(block).context_length >= context
    less = {**block, "factor": block["factor"] - 0.01}
    assert with_yarn(less).context_length < context


def test_the_yarn_of_models_that_reach_further():
    assert yarn_for(SEVEN, 32768) is None
    documented = yarn_for(SEVEN, 131_072)  # the block in Qwen's documentation
    assert documented == {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    scaled = with_yarn(documented)
    assert yarn_for(scaled, 131_072) is None
    assert yarn_for(scaled, 262_144) == {**documented, "factor": 8.0}
    base = SEVEN.replace(max_position_embeddings=131_072)  # the 7B that is not Instruct
    assert yarn_for(base, 131_072) is None
    assert yarn_for(base, 262_144)["original_max_position_embeddings"] == 131_072


def test_yarn_does_not_take_a_dual_chunk_model_further():
    raw = {
        **SEVEN.to_dict(),
        "max_position_embeddings": 1_010_000,
        "dual_chunk_attention_config": {"original_max_position_embeddings": 262_144},
    }
    config = ModelConfig.from_dict(raw)
    assert yarn_for(config, 262_144) is None
    with pytest.raises(ConfigError, match="context is 262145, expected at most 262144"):
        yarn_for(config, 262_145)


def test_what_cannot_work_is_refused():
    with pytest.raises(ParallelError, match="28 query heads do not divide by 8.*heads 32"):
        Planner(SEVEN, 8)
    for wrong in ({"dtype": "int3"}, {"quantization": "gguf"}, {"block_size": 0}):
        with pytest.raises(ConfigError, match=str(next(iter(wrong)))):
            Planner(SEVEN, **wrong)
    with pytest.raises(ConfigError, match="batch is 3000"):
        Planner(SEVEN).estimate(10, 3000)
    with pytest.raises(ConfigError, match="context is 0"):
        Planner(SEVEN).estimate(0)


# ---- against resident memory --------------------------------------------------------------------


@pytest.mark.parametrize(
    "job",
    [
        Job({**peak_memory.WIDE, "num_hidden_layers": 2}, "float32", 1, 1536, 1536),
        Job(peak_memory.ATTENTION, "float32", 1, 8192, 1024),
        Job(peak_memory.ATTENTION, "float32", 24, 512, 1024),
    ],
    ids=["weights and MLP", "blocks and scores", "many sequences"],
)
def test_peak_resident_memory_within_five_percent(job):
    found = peak_memory.measure(job)
    assert found.predicted == pytest.approx(found.measured, rel=0.05)
    # The control: each part of the sum is needed, where it is large enough to matter.
    for part in (found.weights, found.kv_cache, found.activations):
        if part > 0.1 * found.measured:
            assert found.predicted - part != pytest.approx(found.measured, rel=0.05)


def test_the_planner_needs_no_plots():
    code = "import sys, minqwen.lab.planner; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
