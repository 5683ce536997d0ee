"""ModelConfig and GenerationDefaults: published configs, exact counts, transformers as oracle, bad input."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minqwen.config import ModelConfig, RopeScaling
from minqwen.errors import ConfigError, MinqwenError
from minqwen.generation_config import GenerationDefaults

transformers.utils.logging.set_verbosity_error()
DATA = json.loads((Path(__file__).parent / "data" / "configs.json").read_text())
CONFIGS = {name: entry["config"] for name, entry in DATA["models"].items()}
CONFIGS |= {
    name: CONFIGS[entry["base"]] | entry["changes"] for name, entry in DATA["relatives"].items()
}
PARAMETERS = {
    name: e["parameters"] for part in ("models", "relatives") for name, e in DATA[part].items()
}
TENSORS = {name: e["tensors"] for part in ("models", "relatives") for name, e in DATA[part].items()}
B7 = CONFIGS["Qwen/Qwen2.5-7B"]
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
BFLOAT16_7B = ModelConfig.from_dict(B7)
TINY = dict(
    vocab_size=80,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def changed(base=B7, without=(), **changes):
    """A copy of a config.json with keys removed and set."""
    return {k: copy.deepcopy(v) for k, v in (base | changes).items() if k not in without}


def assert_same_as_transformers(config, hf):
    """Every field that transformers knows has transformers' value."""
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "bos_token_id",
        "pad_token_id",
        "model_type",
    ):
        assert getattr(config, name) == getattr(hf, name), name
    assert config.head_dim == (
        getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    )
    eos = hf.eos_token_id if isinstance(hf.eos_token_id, list) else [hf.eos_token_id]
    assert config.eos_token_id == tuple(i for i in eos if i is not None)
    assert config.dtype == str(hf.dtype or torch.float32).removeprefix("torch.")
    rope = hf.rope_parameters
    assert config.rope_theta == rope["rope_theta"]
    if config.rope_scaling is None:
        assert rope["rope_type"] == "default"
    else:
        assert rope["rope_type"] == "yarn"
        for name in (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
        ):
            assert getattr(config.rope_scaling, name) == rope.get(name), name
        assert config.rope_scaling.beta_fast == (rope.get("beta_fast") or 32)
        assert config.rope_scaling.beta_slow == (rope.get("beta_slow") or 1)
        assert config.rope_scaling.truncate == rope.get("truncate", True)
    assert all(kind == "full_attention" for kind in getattr(hf, "layer_types", None) or [])


def load_with_transformers(config, directory):
    config.save(directory)
    return AutoConfig.from_pretrained(directory)


# ---- every published config


@pytest.mark.parametrize("name", CONFIGS)
def test_published_config(name, tmp_path):
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


@pytest.mark.parametrize("name", DATA["models"])
def test_published_counts(name):
    entry, config = DATA["models"][name], ModelConfig.from_dict(CONFIGS[name])
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

    T = 6  # eager attention multiplies the whole T x T matrix, so every token is charged a context of T
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


def test_by_hand():
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


# ---- refused, each in one line that names the file and the key


def assert_one_line(error, *parts):
    text = str(error.value)
    assert text.isprintable() and len(text.splitlines()) == 1, text
    assert "expected" in text and "; " in text, text
    for part in parts:
        assert part in text, (part, text)


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
def test_refused(kind, key, changes, also, tmp_path):
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
def test_refused_by_hand(changes):
    with pytest.raises(ConfigError) as error:
        ModelConfig(**TINY | changes)
    assert_one_line(error, "ModelConfig: ")


def test_refused_yarn_by_hand():
    with pytest.raises(ConfigError) as error:
        RopeScaling(factor=0.5, original_max_position_embeddings=32768)
    assert_one_line(error, "RopeScaling.factor", "0.5")


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[1]", "object"),
        (b"null", "object"),
        (b'{"a": 1, "a": 2}', "'a'"),
        (b"\xff\xfe{}", "JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "JSON"),
        (b"{}", "model_type"),
    ],
)
def test_bad_files(content, part, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_json(tmp_path)
    assert_one_line(error, str(tmp_path / "config.json"), part)


def test_absent_files(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "odd\nname"):
        with pytest.raises(ConfigError) as error:
            ModelConfig.from_json(path)
        assert_one_line(error, "cannot be read", tmp_path.name)
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


# ---- generation_config.json


def generation(tmp_path, d, config=BFLOAT16_7B):
    (tmp_path / "generation_config.json").write_text(json.dumps(d))
    return GenerationDefaults.from_dir(tmp_path, config)


@pytest.mark.parametrize("name", DATA["models"])
def test_published_generation_config(name, tmp_path):
    d, config = DATA["models"][name]["generation_config"], ModelConfig.from_dict(CONFIGS[name])
    g = generation(tmp_path, d, config)
    hf = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (g.do_sample, g.repetition_penalty) == (bool(hf.do_sample), hf.repetition_penalty or 1.0)
    if "Instruct" in name:
        assert (
            (g.temperature, g.top_p, g.top_k)
            == (hf.temperature, hf.top_p, hf.top_k)
            == (0.7, 0.8, 20)
        )
        assert (
            g.eos_token_ids == (151645, 151643)
            and g.pad_token_id == 151643
            and g.max_new_tokens is None
        )
    else:
        assert (g.temperature, g.top_p, g.top_k, g.max_new_tokens) == (0.0, 1.0, 0, 2048)
        assert g.eos_token_ids == (151643,) and g.pad_token_id is None
    assert g.bos_token_id == 151643


def test_generation_defaults(tmp_path):
    config = BFLOAT16_7B.replace(eos_token_id=(5, 6), pad_token_id=9)
    absent = GenerationDefaults.from_dir(tmp_path, config)
    assert absent == GenerationDefaults(eos_token_ids=(5, 6), bos_token_id=151643, pad_token_id=9)
    assert absent.temperature == 0 and absent.repetition_penalty == 1
    assert generation(tmp_path, {}, config) == absent
    nulls = dict.fromkeys(["do_sample", "top_p", "eos_token_id", "num_beams"])
    assert generation(tmp_path, nulls, config) == absent
    g = generation(
        tmp_path,
        {
            "eos_token_id": [7, 5],
            "do_sample": True,
            "top_k": -1,
            "min_p": 0.05,
            "max_new_tokens": 3,
            "num_beams": 1,
            "pad_token_id": 2,
            "bos_token_id": 1,
        },
        config,
    )
    assert g.eos_token_ids == (7, 5, 6)
    assert (g.temperature, g.top_k, g.min_p, g.max_new_tokens) == (1.0, 0, 0.05, 3)
    assert (g.bos_token_id, g.pad_token_id) == (1, 2)
    assert generation(tmp_path, {"eos_token_id": 6, "temperature": 0.5}, config).eos_token_ids == (
        6,
        5,
    )
    assert generation(tmp_path, {"temperature": 0.5}).temperature == 0  # do_sample absent: greedy
    assert generation(tmp_path, {"do_sample": True, "temperature": 0}).temperature == 0


BAD_GENERATION = {
    "temperature": (-0.1, "1", True, math.nan, math.inf),
    "top_p": (0, 1.1, -1, "0.8", True),
    "top_k": (-2, 2.0, True, "20"),
    "min_p": (-0.1, 1.5, "0"),
    "do_sample": (1, "true"),
    "repetition_penalty": (0, -1, "1.1", math.nan),
    "max_new_tokens": (0, -1, 2.5, True),
    "eos_token_id": (-1, "x", [1, None], 1.5, {}),
    "bos_token_id": ([1], -1),
    "pad_token_id": ("a", -1),
    "num_beams": (4,),
    "stop_strings": (["x"],),
    "no_repeat_ngram_size": (3,),
    "suppress_tokens": ([1],),
    "forced_eos_token_id": (5,),
}


@pytest.mark.parametrize(
    "key, value", [(k, v) for k, values in BAD_GENERATION.items() for v in values]
)
def test_generation_refused(key, value, tmp_path):
    with pytest.raises(ConfigError) as error:
        generation(tmp_path, {key: value})
    assert_one_line(error, str(tmp_path / "generation_config.json"), key)


def test_generation_bad_file(tmp_path):
    (tmp_path / "generation_config.json").write_text("{,}")
    with pytest.raises(ConfigError, match="generation_config.json: is not valid JSON"):
        GenerationDefaults.from_dir(tmp_path, BFLOAT16_7B)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").symlink_to("gone")  # a broken link is not an absent file
    with pytest.raises(ConfigError, match="cannot be read"):
        GenerationDefaults.from_dir(tmp_path, BFLOAT16_7B)
    with pytest.raises(ConfigError, match="top level"):
        GenerationDefaults.from_dict([], BFLOAT16_7B)
