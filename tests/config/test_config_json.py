"""The two layouts of config.json: read as transformers reads them, and kept when written."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from support.configs import (
    BFLOAT16_7B,
    TINY,
    YARN,
    assert_same_as_transformers,
    changed,
    load_with_transformers,
)
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minqwen.config import ModelConfig, RopeScaling
from minqwen.errors import ConfigError

YARN_BLOCKS = {
    "documented": YARN | {"type": "yarn"},
    "newer name": YARN | {"rope_type": "yarn"},
    "both names": YARN | {"rope_type": "yarn", "type": "yarn"},
    "original missing": {"rope_type": "yarn", "factor": 2},
    "nulls": YARN
    | {"rope_type": "yarn", "attention_factor": None, "mscale": None, "beta_fast": None},
    "everything": YARN
    | {
        "type": "yarn",
        "attention_factor": 1.25,
        "beta_fast": 16,
        "beta_slow": 2.5,
        "truncate": False,
    },
    "mscales": YARN | {"type": "yarn", "mscale": 0.7, "mscale_all_dim": 1.5},
    "mscale zero": YARN | {"type": "yarn", "mscale": 0, "mscale_all_dim": 1.5},
    "explicit default": {"type": "default"},
}


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("max_positions", [32768, 131072])
@pytest.mark.parametrize("block", YARN_BLOCKS.values(), ids=YARN_BLOCKS)
def test_yarn_as_transformers_reads_it(block, max_positions, layout, tmp_path):
    if layout == "old":
        d = changed(max_position_embeddings=max_positions, rope_scaling=block)
    else:
        d = changed(
            without=("rope_theta",),
            max_position_embeddings=max_positions,
            rope_parameters=block | {"rope_theta": 1e6},
        )
    config = ModelConfig.from_dict(d)
    (tmp_path / "config.json").write_text(json.dumps(d))
    hf = AutoConfig.from_pretrained(tmp_path)
    assert_same_as_transformers(config, hf)
    written = config.to_dict()
    here, not_here = ("rope_parameters", "rope_scaling")[:: 1 if layout == "new" else -1]
    assert not_here not in written
    for key, value in block.items():
        assert written[here][key] == value
    if config.rope_scaling:  # only what another reader could miss is added
        added = {"rope_type", "rope_theta", "original_max_position_embeddings"}
        assert set(written[here]) <= set(block) | added
    again = load_with_transformers(config, tmp_path / "again")
    assert_same_as_transformers(config, again)
    assert ModelConfig.from_json(tmp_path / "again") == config
    if config.rope_scaling:
        assert config.context_length == (2 * max_positions if block["factor"] == 2 else 131072)
        for yarn in (config.replace(), config.replace(num_attention_heads=32)):
            loaded = load_with_transformers(yarn, tmp_path / "yarn")
            inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](hf, "cpu")
            again = ROPE_INIT_FUNCTIONS["yarn"](loaded, "cpu")
            assert torch.equal(inv_freq, again[0]) and attention_factor == again[1]


def test_yarn_factor_left_out_is_max_over_original():
    block = {"type": "yarn", "original_max_position_embeddings": 32768}
    for extra in ({}, {"factor": None}):
        config = ModelConfig.from_dict(
            changed(max_position_embeddings=131072, rope_scaling=block | extra)
        )
        assert config.rope_scaling == RopeScaling(
            factor=4.0, original_max_position_embeddings=32768
        )
        assert (
            config.to_dict()["rope_scaling"]["factor"] == 4.0
        )  # written, so that other readers agree
    top = changed(
        rope_scaling={"type": "yarn", "factor": 4.0}, original_max_position_embeddings=16384
    )
    config = ModelConfig.from_dict(top)
    assert config.rope_scaling.original_max_position_embeddings == 16384
    other = config.replace(rope_scaling=RopeScaling(4.0, 8192)).to_dict()
    assert other["original_max_position_embeddings"] == 8192
    assert other["rope_scaling"]["original_max_position_embeddings"] == 8192


def test_default_original_survives_a_changed_maximum():
    block = {"type": "yarn", "factor": 4}
    config = ModelConfig.from_dict(changed(max_position_embeddings=32768, rope_scaling=block))
    longer = config.replace(max_position_embeddings=131072)
    assert longer.rope_scaling == config.rope_scaling
    assert ModelConfig.from_dict(longer.to_dict()) == longer


# ---- writing


@pytest.mark.parametrize("layout", ["old", "new", "by hand"])
def test_changed_fields_reach_transformers(layout, tmp_path):
    base = {
        "old": BFLOAT16_7B,
        "new": ModelConfig.from_dict(
            changed(
                without=("torch_dtype", "rope_theta"),
                dtype="bfloat16",
                layer_types=["full_attention"] * 28,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            )
        ),
        "by hand": ModelConfig(**TINY),
    }[layout]
    for step in (
        dict(rope_scaling=RopeScaling(4.0, 32768, truncate=False)),
        dict(rope_theta=5e5),
        dict(rope_scaling=RopeScaling(2.0, 4096, beta_fast=20)),
        dict(rope_scaling=None),
        dict(dtype="float64"),
        dict(eos_token_id=(3, 4)),
        dict(eos_token_id=7),
        dict(eos_token_id=()),
        dict(num_hidden_layers=3),
        dict(num_attention_heads=12, head_dim=6),
        dict(pad_token_id=1),
        dict(vocab_size=101, tie_word_embeddings=True, rms_norm_eps=1e-5),
        dict(pad_token_id=None),
    ):
        base = base.replace(**step)
        for name, value in step.items():
            assert getattr(base, name) == ((7,) if value == 7 else value)
        assert ModelConfig.from_dict(base.to_dict()) == base
        assert_same_as_transformers(base, load_with_transformers(base, tmp_path))
        written = base.to_dict()
        assert ("rope_parameters" in written) == ("dtype" in written) == (layout == "new")
        assert ("rope_theta" in written) == ("torch_dtype" in written) == (layout != "new")


def test_both_layouts_at_once_stay_in_step():
    d = changed(
        dtype="bfloat16",
        rope_scaling=YARN | {"type": "yarn"},
        rope_parameters=YARN | {"rope_type": "yarn", "rope_theta": 1e6},
    )
    changes = dict(rope_theta=2e6, rope_scaling=RopeScaling(8.0, 32768), dtype="float16")
    config = ModelConfig.from_dict(d).replace(**changes)
    w = config.to_dict()
    assert w["dtype"] == w["torch_dtype"] == "float16"
    assert w["rope_theta"] == w["rope_parameters"]["rope_theta"] == 2e6
    assert w["rope_scaling"]["factor"] == w["rope_parameters"]["factor"] == 8.0
    assert ModelConfig.from_dict(w) == config


def test_unknown_keys_and_the_source_are_left_alone(tmp_path):
    d = changed(my_key={"a": [1, None]}, quantization_config={"quant_method": "awq", "bits": 4})
    before = copy.deepcopy(d)
    config = ModelConfig.from_dict(d)
    config.to_dict()["my_key"]["a"].append(2)
    config.replace(vocab_size=7).to_dict()["quantization_config"]["bits"] = 3
    assert d == before and config.to_dict() == before | {"head_dim": 128}
    d["my_key"]["a"].clear()
    d["quantization_config"].clear()
    assert config.to_dict() == before | {"head_dim": 128}
    assert config.quantization_config == before["quantization_config"]
    config.save(tmp_path / "a" / "b")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["config.json"]
    text = (tmp_path / "a" / "b" / "config.json").read_text()
    assert list(json.loads(text)) == [*before, "head_dim"] and text.endswith("}\n")
    with pytest.raises(ConfigError, match="cannot be written"):
        config.save(tmp_path / "a" / "b" / "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        dict(use_sliding_window=True, max_window_layers=28),
        dict(use_sliding_window=True, sliding_window=None),
        dict(use_sliding_window=True, max_window_layers=2, layer_types=["full_attention"] * 28),
        dict(architectures=None),
        dict(architectures=["Qwen2Model"]),
        dict(attention_bias=True, mlp_bias=False),
        dict(num_key_value_heads=None),
        dict(head_dim=None),
        dict(head_dim=64),
        dict(num_attention_heads=32),
        dict(torch_dtype="torch.float16"),
        dict(rope_theta=1000000),
        dict(eos_token_id=None),
        dict(eos_token_id=[1, 1]),
        dict(partial_rotary_factor=1.0),
        dict(rope_scaling={}),
        dict(rope_scaling=None, dtype="bfloat16"),
    ],
)
def test_accepted_and_understood_as_transformers_does(changes, tmp_path):
    config = ModelConfig.from_dict(changed(**changes))
    assert ModelConfig.from_dict(config.to_dict()) == config
    if "eos_token_id" not in changes:
        assert_same_as_transformers(config, load_with_transformers(config, tmp_path))


def test_sliding_layers_are_found_again_after_a_change():
    config = ModelConfig.from_dict(changed(use_sliding_window=True, max_window_layers=28))
    assert config.replace(num_hidden_layers=4).num_hidden_layers == 4
    with pytest.raises(ConfigError, match="use_sliding_window"):
        config.replace(num_hidden_layers=29)
