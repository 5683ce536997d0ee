"""A config.json that cannot be is refused in one line that names the file and the key."""

from __future__ import annotations

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import (
    B7,
    TINY,
    YARN,
    assert_one_line,
    changed,
)

from minqwen.config import ModelConfig, RopeScaling
from minqwen.errors import ConfigError

YARN7 = dict(rope_scaling=YARN | {"type": "yarn"})
BAD = [
    ("missing", key, {}, (key,))
    for key in (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "rope_theta",
    )
]
BAD += [
    ("bad size", key, {key: value}, ())
    for value in ("8", 8.0, True, 0, -1, [8], 10**30)
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    )
]
BAD += [
    ("null size", key, {key: None}, ())
    for key in ("vocab_size", "hidden_size", "max_position_embeddings")
]
BAD += [
    ("bad number", key, {key: value}, ())
    for key in ("rms_norm_eps", "rope_theta")
    for value in ("1e6", True, 0, -1.0, math.nan, math.inf, [1.0], 10**400)
]
BAD += [
    ("bad", key, {key: value}, ())
    for key, value in [
        ("rms_norm_eps", None),
        ("tie_word_embeddings", None),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 1),
        ("num_attention_heads", 30),
        ("num_key_value_heads", 5),
        ("num_key_value_heads", 56),
        ("head_dim", 127),
        ("hidden_act", "gelu"),
        ("hidden_act", None),
        ("model_type", "qwen3"),
        ("model_type", "qwen2_moe"),
        ("model_type", None),
        ("model_type", ["qwen2"]),
        ("model_type", "llama"),
        ("architectures", ["Qwen2ForSequenceClassification"]),
        ("architectures", "Qwen2ForCausalLM"),
        ("architectures", ["LlamaForCausalLM"]),
        ("architectures", [{}]),
        ("architectures", 3),
        ("torch_dtype", "int8"),
        ("torch_dtype", "bf16"),
        ("torch_dtype", 16),
        ("dtype", "float8_e4m3fn"),
        ("dtype", {"": "bfloat16"}),
        ("dtype", []),
        ("eos_token_id", "<|im_end|>"),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", -1),
        ("eos_token_id", 1.0),
        ("eos_token_id", True),
        ("bos_token_id", [1]),
        ("bos_token_id", -1),
        ("pad_token_id", "x"),
        ("quantization_config", "awq"),
        ("quantization_config", [1]),
        ("attention_bias", False),
        ("attention_bias", None),
        ("attention_bias", 1),
        ("mlp_bias", True),
        ("mlp_bias", None),
        ("use_mrope", True),
        ("partial_rotary_factor", 0.5),
        ("use_sliding_window", "no"),
        ("use_sliding_window", 1),
        ("layer_types", ["sliding_attention"] * 28),
        ("layer_types", ["full_attention"]),
        ("layer_types", "full_attention"),
        ("layer_types", {}),
        ("dual_chunk_attention_config", 3),
        ("dual_chunk_attention_config", {}),
        ("dual_chunk_attention_config", {"original_max_position_embeddings": 0}),
        ("rope_scaling", "yarn"),
        ("rope_scaling", []),
        ("rope_scaling", False),
        ("rope_parameters", 3),
    ]
]
BAD += [
    ("sliding", "use_sliding_window", dict(use_sliding_window=True) | more, ("max_window_layers",))
    for more in (
        dict(max_window_layers=27),
        dict(max_window_layers=None),
        dict(max_window_layers="28"),
    )
]
BAD += [
    ("rope", key, {"rope_scaling": block}, ("rope_scaling",))
    for key, block in [
        ("rope_type", {"type": "linear", "factor": 2.0}),
        ("rope_type", {"rope_type": "llama3"}),
        ("rope_type", {"type": "dynamic", "factor": 2.0}),
        ("rope_type", {"type": "mrope"}),
        ("rope_type", {"type": ["yarn"]}),
        ("type", YARN | {"type": "default", "rope_type": "yarn"}),
        ("factor", {"factor": 4.0}),
        ("factor", {"type": "default", "factor": 4.0}),
        ("attn_factor", YARN | {"type": "yarn", "attn_factor": 1.0}),
        ("full_attention", {"full_attention": YARN | {"type": "yarn"}}),
        ("partial_rotary_factor", YARN | {"type": "yarn", "partial_rotary_factor": 0.5}),
        ("rope_theta", YARN | {"type": "yarn", "rope_theta": 10000.0}),
        ("rope_theta", YARN | {"type": "yarn", "rope_theta": "x"}),
        ("odd\\nkey", YARN | {"type": "yarn", "odd\nkey": 1}),
    ]
]
BAD += [
    ("yarn", key, {"rope_scaling": YARN | {"type": "yarn", key: value}}, ("rope_scaling." + key,))
    for key, values in {
        "factor": ("4", 0.5, 0, -4.0, True, math.nan, math.inf, [4.0]),
        "original_max_position_embeddings": (0, -1, 32768.0, "32768", True),
        "attention_factor": (0, -1.0, "1", True, math.inf),
        "beta_fast": (0, -1, "32", 0.5, True),
        "beta_slow": (0, -1, True, []),
        "mscale": (-1, "1", True),
        "mscale_all_dim": (-1, "1", True),
        "truncate": (None, 1, "true"),
    }.items()
    for value in values
]
BAD += [
    (
        "yarn",
        "beta_fast",
        {"rope_scaling": YARN | {"type": "yarn", "beta_slow": 33}},
        ("beta_slow",),
    ),
    (
        "yarn",
        "factor",
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 10**6}},
        (),
    ),
    ("yarn", "rope_theta", YARN7 | {"rope_theta": 1.0}, ()),
    (
        "yarn",
        "max_position_embeddings",
        {"rope_scaling": {"type": "yarn"}, "max_position_embeddings": "x"},
        (),
    ),
    (
        "yarn",
        "original_max_position_embeddings",
        YARN7 | {"original_max_position_embeddings": 16384},
        (),
    ),
    ("two", "rope_theta", {"rope_parameters": {"rope_theta": 10000.0}}, ()),
    (
        "two",
        "rope_scaling",
        YARN7 | {"rope_parameters": {"rope_type": "default"}},
        ("rope_parameters",),
    ),
    ("two", "dtype", {"dtype": "float32"}, ("torch_dtype",)),
    (
        "llama",
        "attention_bias",
        {"model_type": "llama", "architectures": None, "attention_bias": False},
        (),
    ),
    ("llama", "attention_bias", {"model_type": "llama", "architectures": None}, ()),
    (
        "llama",
        "mlp_bias",
        {"model_type": "llama", "architectures": None, "attention_bias": True, "mlp_bias": True},
        (),
    ),
]


@pytest.mark.parametrize(
    "kind, key, changes, also",
    BAD,
    ids=[f"{kind}-{key}-{i}" for i, (kind, key, _, _) in enumerate(BAD)],
)
def test_a_key_with_a_wrong_value_is_refused(kind, key, changes, also, tmp_path):
    d = changed(B7, (key,)) if kind == "missing" else changed(**changes)
    (tmp_path / "config.json").write_text(json.dumps(d))
    if kind == "bad" and key == "model_type" and changes[key] == "llama":
        also, key = (), "architectures"  # a Qwen2 class under the name llama
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_json(tmp_path)
    assert_one_line(error, str(tmp_path / "config.json"), key, *also)


@pytest.mark.parametrize(
    "changes",
    [
        dict(vocab_size=0),
        dict(num_attention_heads=3),
        dict(head_dim=7),
        dict(num_attention_heads=10),
        dict(dtype="int4"),
        dict(model_type="qwen3"),
        dict(model_type=["qwen2"]),
        dict(rope_theta=True),
        dict(rope_scaling={"factor": 4}),
        dict(tie_word_embeddings=0),
        dict(eos_token_id="a"),
        dict(hidden_size=None),
        dict(quantization_config=[]),
    ],
)
def test_a_wrong_field_of_a_config_made_by_hand_is_refused(changes):
    with pytest.raises(ConfigError) as error:
        ModelConfig(**TINY | changes)
    assert_one_line(error, "ModelConfig: ")


def test_a_wrong_field_of_yarn_made_by_hand_is_refused():
    with pytest.raises(ConfigError) as error:
        RopeScaling(factor=0.5, original_max_position_embeddings=32768)
    assert_one_line(error, "RopeScaling.factor", "0.5")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty (0 bytes)"),
        (b"{", "is not valid JSON"),
        (b"[1]", "the top level is [1]"),
        (b"null", "the top level is None"),
        (b'{"a": 1, "a": 2}', "the key 'a' appears more than once"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b'\xef\xbb\xbf\xef\xbb\xbf{"a": 1}', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "is not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run `git lfs pull`"),
        (b"{}", "model_type is missing"),
    ],
)
def test_a_damaged_file_is_refused(content, words, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_json(tmp_path)
    assert_one_line(error, str(tmp_path / "config.json"), words)


def test_a_fifo_in_place_of_the_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_json(tmp_path)
    assert_one_line(error, str(tmp_path / "config.json"), "is not a regular file")


def test_an_absent_file_is_refused(tmp_path):
    for path, says in (
        (tmp_path, "cannot be read"),
        (tmp_path / "nowhere.json", "cannot be read"),
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path / "odd\nname", "no such directory"),
    ):
        with pytest.raises(ConfigError) as error:
            ModelConfig.from_json(path)
        assert_one_line(error, says, tmp_path.name)
    for d in ([], None, "config.json"):
        with pytest.raises(ConfigError) as error:
            ModelConfig.from_dict(d)
        assert_one_line(error, "config.json")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 130)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["yarn", "default", "silu", "qwen2", "llama", "float32", 1e6, 128, 28, YARN]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "rope_type", "rope_theta", "truncate", "mscale", "original", *YARN]
            )
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        *B7,
        "head_dim",
        "rope_scaling",
        "rope_parameters",
        "dtype",
        "layer_types",
        "pad_token_id",
        "quantization_config",
        "attention_bias",
        "mlp_bias",
        "dual_chunk_attention_config",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    ]
)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3), st.sets(KEYS, max_size=1))
def test_any_json_is_read_or_refused_in_one_line(changes, removed):
    d = {k: v for k, v in (B7 | changes).items() if k not in removed}
    try:
        config = ModelConfig.from_dict(d, "some/config.json")
    except ConfigError as e:
        text = str(e)
        assert text.startswith("some/config.json: ") and text.isprintable() and len(text) < 500
    else:
        assert ModelConfig.from_dict(config.to_dict()) == config
        assert config.num_parameters() > 0 and config.context_length > 0
