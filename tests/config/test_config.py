"""ModelConfig: published configs, exact counts, and transformers as oracle."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.configs import (
    B7,
    BFLOAT16_7B,
    CONFIGS,
    PARAMETERS,
    PUBLISHED,
    TENSORS,
    TINY,
    assert_same_as_transformers,
    load_with_transformers,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from minqwen.config import ModelConfig
from minqwen.errors import ConfigError, MinqwenError


def test_a_config_json_is_read_and_says_how_large_the_model_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(B7))
    config = ModelConfig.from_json(tmp_path)
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (3584, 28, 128)
    assert config.num_parameters() == 7_615_616_512 and config.context_length == 131072
    assert config.parameter_shapes()["model.layers.0.self_attn.k_proj.weight"] == (512, 3584)


# ---- every published config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_read_counted_and_written_as_transformers_does(name, tmp_path):
    d = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(d))
    config = ModelConfig.from_json(tmp_path)
    assert (
        config == ModelConfig.from_json(str(tmp_path / "config.json")) == ModelConfig.from_dict(d)
    )

    assert config.num_parameters() == PARAMETERS[name]
    shapes = config.parameter_shapes()
    assert sum(math.prod(shape) for shape in shapes.values()) == PARAMETERS[name]
    assert len(shapes) == TENSORS[name]
    assert ("lm_head.weight" in shapes) == (not d["tie_word_embeddings"])

    assert config.to_dict() == d | {
        "head_dim": config.head_dim
    }  # nothing lost, nothing else changed
    again = ModelConfig.from_dict(config.to_dict())
    assert again == config and hash(again) == hash(config) and again.to_dict() == config.to_dict()
    assert_same_as_transformers(config, AutoConfig.from_pretrained(tmp_path))
    hf = load_with_transformers(config, tmp_path)
    assert_same_as_transformers(config, hf)
    hf.save_pretrained(tmp_path / "new layout")
    written = json.loads((tmp_path / "new layout" / "config.json").read_text())
    assert (
        "rope_parameters" in written
        and "rope_theta" not in written
        and "torch_dtype" not in written
    )
    assert ModelConfig.from_json(tmp_path / "new layout") == config


@pytest.mark.parametrize("name", PUBLISHED["models"])
def test_bytes_of_published_models_and_what_more_heads_change(name):
    entry, config = PUBLISHED["models"][name], ModelConfig.from_dict(CONFIGS[name])
    assert config.head_dim == entry["head_dim"]
    assert (
        config.weight_bytes() == config.weight_bytes(torch.bfloat16) == entry["weight_bytes_bf16"]
    )
    assert config.weight_bytes("float32") == entry["weight_bytes_fp32"]
    assert config.kv_bytes_per_token() == entry["kv_bytes_per_token_bf16"]
    assert config.kv_bytes_per_token(torch.float64) == 4 * entry["kv_bytes_per_token_bf16"]
    for heads in (1, 3, 8, 11):  # any multiple of the key/value heads; head_dim must not follow
        extended = config.replace(num_attention_heads=heads * config.num_key_value_heads)
        assert extended.head_dim == config.head_dim == extended.to_dict()["head_dim"]
        assert extended.group_size == heads
        assert extended.kv_bytes_per_token() == config.kv_bytes_per_token()
        assert extended.parameter_shapes()["model.layers.0.self_attn.o_proj.weight"] == (
            config.hidden_size,
            extended.q_size,
        )


def test_the_7b_in_numbers():
    c = BFLOAT16_7B
    assert (c.num_parameters(), c.weight_bytes(), c.kv_bytes_per_token()) == (
        7615616512,
        15231233024,
        57344,
    )
    assert (c.head_dim, c.group_size, c.q_size, c.kv_size) == (128, 7, 3584, 512)
    assert (
        c.flops_per_token(0) == 14_140_571_648
        and c.flops_per_token(0, lm_head=False) == 13_050_576_896
    )
    assert c.flops_per_token(1000) - c.flops_per_token(0) == 401_408_000
    with pytest.raises(ConfigError, match="context_len"):
        c.flops_per_token(-1)
    with pytest.raises(ConfigError, match="dtype.*int8"):
        c.weight_bytes("int8")


# ---- transformers as oracle


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("head_dim", [None, 10])
def test_shapes_and_flops_are_those_of_transformers(tie, head_dim, tmp_path):
    config = ModelConfig(**TINY, head_dim=head_dim, tie_word_embeddings=tie, dtype="float32")
    hf = load_with_transformers(config, tmp_path)
    hf._attn_implementation = "eager"
    model = Qwen2ForCausalLM(hf).eval()
    names = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert list(names.items()) == list(config.parameter_shapes().items())  # module order too
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()

    T = 6  # eager attention multiplies the whole T x T matrix, so every token has a context of T
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = model(torch.arange(T)[None]).past_key_values
    assert counter.get_total_flops() == T * config.flops_per_token(T)
    layers = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert sum(t.nbytes for t in layers) == T * config.kv_bytes_per_token()


def test_llama_is_qwen2_with_an_output_bias(tmp_path):
    hf = LlamaConfig(
        **TINY,
        attention_bias=True,
        mlp_bias=False,
        architectures=["LlamaForCausalLM"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    hf.save_pretrained(tmp_path)
    config = ModelConfig.from_json(tmp_path)
    assert_same_as_transformers(config, hf)
    names = {n: tuple(p.shape) for n, p in LlamaForCausalLM(hf).named_parameters()}
    assert list(names.items()) == list(config.parameter_shapes().items())
    assert config.num_parameters() == sum(math.prod(s) for s in names.values())
    assert_same_as_transformers(config, load_with_transformers(config, tmp_path / "again"))

    llama = BFLOAT16_7B.replace(model_type="llama")  # and across
    assert llama.num_parameters() == BFLOAT16_7B.num_parameters() + 28 * 3584
    loaded = load_with_transformers(llama, tmp_path / "7b")
    assert type(loaded) is LlamaConfig and loaded.attention_bias and not loaded.mlp_bias
    assert loaded.architectures == ["LlamaForCausalLM"]
    assert_same_as_transformers(llama, loaded)
    assert llama.replace(model_type="qwen2") == BFLOAT16_7B


def test_a_config_made_by_hand_has_defaults_and_cannot_be_changed():
    config = ModelConfig(**(TINY | {"num_key_value_heads": None}), eos_token_id=3)
    assert (config.num_key_value_heads, config.head_dim, config.eos_token_id) == (4, 6, (3,))
    assert (config.rms_norm_eps, config.rope_theta, config.dtype) == (1e-6, 1e6, "bfloat16")
    assert (
        config.max_position_embeddings == config.context_length == 32768
        and config.rope_scaling is None
    )
    assert ModelConfig(**TINY, dtype=torch.float16).dtype == "float16"
    assert (
        ModelConfig.from_dict(Qwen2Config(**TINY).to_dict()).dtype == "float32"
    )  # transformers' null
    assert config.replace(eos_token_id=[5, 3, 5]).eos_token_id == (5, 3)
    with pytest.raises(AttributeError):
        config.vocab_size = 1
    with pytest.raises(ConfigError, match="head_size"):
        config.replace(head_size=3)
    assert issubclass(ConfigError, MinqwenError) and issubclass(MinqwenError, ValueError)


def test_the_1m_models_are_full_attention_up_to_262144_tokens():
    config = ModelConfig.from_dict(CONFIGS["Qwen/Qwen2.5-7B-Instruct-1M"])
    assert config.max_position_embeddings == 1010000 and config.context_length == 262144
    assert config.raw["dual_chunk_attention_config"]["chunk_size"] == 262144
