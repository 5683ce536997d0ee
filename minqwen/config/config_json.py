"""The two layouts of config.json, read and written.

transformers 4 writes `torch_dtype`, `rope_theta` and `rope_scaling`; transformers 5 writes `dtype`
and `rope_parameters`. `read_fields` understands both and gives ModelConfig's fields; `write_fields`
keeps the layout that was read. Nothing is guessed: a key that would change the function computed,
and that this package does not implement, is refused with a ConfigError.

In every function, d is the parsed config.json and `source` its name in errors.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from minqwen.checks import (
    boolean,
    dtype_name,
    integer,
    is_integer,
    mapping,
    number,
    one_of,
    token_ids,
    wrong,
)
from minqwen.config.rope_scaling import MAX_CONTEXT, ROPE_FIELDS, RopeScaling
from minqwen.errors import ConfigError
from minqwen.files import printable

Json = Mapping[str, Any]

# Sizes, with the largest that is taken for one. Beside each is the largest that anybody has
# published: a number far beyond it is damage, and tables and plans of it would never end.
MAX_SIZES = {
    "vocab_size": 1 << 22,  # 262,144: Gemma 3
    "hidden_size": 1 << 17,  # 18,432: PaLM
    "intermediate_size": 1 << 20,  # 73,728: PaLM
    "num_hidden_layers": 1 << 10,  # 128: Llama 3.1 405B has 126
    "num_attention_heads": 1 << 12,  # 128: Llama 3.1 405B
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,  # 512: Gemma 4's full attention
    "max_position_embeddings": MAX_CONTEXT,  # 10,485,760: Llama 4 Scout
}
SIZES = tuple(MAX_SIZES)
MAX_ROPE_THETA = 1e12  # 45e9: Gradient's Llama 3 for 4 million tokens
MAX_RMS_NORM_EPS = 0.1  # 1e-5
ARCHITECTURES = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
    "llama": ("LlamaForCausalLM", "LlamaModel"),
}
# The keys that decide what is computed. Only head_dim may be absent: it can be derived.
REQUIRED = (
    "model_type",
    *(name for name in SIZES if name != "head_dim"),
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
)
# Fields of ModelConfig that config.json has under the same name, in both layouts.
SAME_NAME = (
    *SIZES,
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "model_type",
    "quantization_config",
)


# ---- reading ------------------------------------------------------------------------------------


def read_fields(source: str, d: Json) -> dict[str, Any]:
    """ModelConfig's fields out of a config.json; ModelConfig itself checks the values of most."""
    for key in REQUIRED:
        if key not in d:
            raise _missing(
                source, key, "in every Qwen2 config; fetch the file again or add the key"
            )
    check_model_type(source, d["model_type"])
    _check_architectures(source, d)
    _check_activation_and_biases(source, d)
    _check_rotation(source, d)
    _check_dual_chunk(source, d)
    _check_no_layer_slides(source, d)
    rope_theta, rope_scaling = _read_rope(source, d)
    return {key: d.get(key) for key in SAME_NAME} | {
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "dtype": _read_dtype(source, d),
    }


def _missing(source: str, key: str, expected: str) -> ConfigError:
    return ConfigError(printable(f"{source}: {key} is missing, expected {expected}"))


def check_model_type(source: str, model_type: Any) -> None:
    """ConfigError unless it is "qwen2", or "llama", under which the same function may go."""
    one_of(
        f"{source}: model_type",
        model_type,
        tuple(ARCHITECTURES),
        "only the dense Qwen2 architecture is implemented",
    )


def _check_architectures(source: str, d: Json) -> None:
    found, known = d.get("architectures"), ARCHITECTURES[d["model_type"]]
    if found is None:
        return
    if not isinstance(found, (list, tuple)) or any(name not in known for name in found):
        remedy = "only the dense causal language model is implemented"
        raise wrong(f"{source}: architectures", found, f"[{known[0]!r}]", remedy)


def _check_activation_and_biases(source: str, d: Json) -> None:
    """Llama has to ask for biases. Qwen2 always has them on q, k and v, and nowhere else."""
    remedy = "no other activation is implemented"
    one_of(f"{source}: hidden_act", d["hidden_act"], ("silu",), remedy)
    if d.get("attention_bias", d["model_type"] == "qwen2") is not True:
        expected = "true (biases on q, k and v)"
        remedy = "a model without them is not a Qwen2 model"
        raise wrong(f"{source}: attention_bias", d.get("attention_bias"), expected, remedy)
    if d.get("mlp_bias", False) is not False:
        raise wrong(f"{source}: mlp_bias", d["mlp_bias"], "false", "Qwen2's MLP has no biases")


def _check_rotation(source: str, d: Json) -> None:
    if d.get("use_mrope", False) not in (False, None):
        remedy = "multimodal RoPE is not implemented"
        raise wrong(f"{source}: use_mrope", d["use_mrope"], "false", remedy)
    if d.get("partial_rotary_factor") is not None:
        _check_whole_heads_rotate(f"{source}: partial_rotary_factor", d["partial_rotary_factor"])


def _check_whole_heads_rotate(where: str, factor: Any) -> None:
    if factor != 1.0:
        raise wrong(where, factor, "1.0 or no such key", "Qwen2 rotates whole heads")


def _check_dual_chunk(source: str, d: Json) -> None:
    """The 1M models have this block. transformers ignores it too.

    What it is used for is ModelConfig.context_length, so the one number for that must be there.
    """
    block = d.get("dual_chunk_attention_config")
    if block is not None:
        where, key = f"{source}: dual_chunk_attention_config", "original_max_position_embeddings"
        value = mapping(where, block, "an object or null").get(key)
        integer(f"{where}.{key}", value, 1, MAX_CONTEXT)


def _check_no_layer_slides(source: str, d: Json) -> None:
    """transformers' rule: layer_types decides; without it, use_sliding_window and two more keys."""
    if d.get("layer_types") is not None:
        _check_layer_types(f"{source}: layer_types", d["layer_types"], d["num_hidden_layers"])
    where, sliding = f"{source}: use_sliding_window", d.get("use_sliding_window")
    if sliding is None or not boolean(where, sliding) or d.get("layer_types") is not None:
        return
    if "sliding_window" in d and d["sliding_window"] is None:
        return
    # Layers from max_window_layers on would slide: there must be none.
    first, layers = d.get("max_window_layers"), d["num_hidden_layers"]
    if not is_integer(first) or not is_integer(layers) or first < layers:
        expected = f"false, or max_window_layers ({first!r}) not below num_hidden_layers"
        remedy = "sliding-window attention is not implemented; set it to false for full attention"
        raise wrong(where, True, f"{expected} ({layers!r})", remedy)


def _check_layer_types(where: str, types: Any, layers: Any) -> None:
    if not isinstance(types, (list, tuple)) or len(types) != layers:
        raise wrong(where, types, f"an entry for each of {layers!r} layers")
    for i, kind in enumerate(types):
        remedy = "sliding-window attention is not implemented"
        one_of(f"{where}[{i}]", kind, ("full_attention",), remedy)


def _read_dtype(source: str, d: Json) -> str:
    """torch_dtype is the older name of dtype. With neither, the dtype is PyTorch's, float32.

    (A reader of weight files takes theirs instead: ModelConfig.names_dtype.)
    """
    keys = [key for key in ("dtype", "torch_dtype") if d.get(key) is not None]
    names = [dtype_name(f"{source}: {key}", d[key]) for key in keys]
    if len(set(names)) == 2:
        expected = f"the same as dtype ({names[0]!r})"
        raise wrong(f"{source}: torch_dtype", names[1], expected, "keep one of them")
    return names[0] if names else "float32"


def _read_rope(source: str, d: Json) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling, from either layout, or from both where they agree."""
    thetas = {"rope_theta": d.get("rope_theta")}
    scalings = []
    for name in ("rope_scaling", "rope_parameters"):
        if d.get(name) not in (None, {}):
            theta, scaling = _read_rope_block(source, name, d[name], d)
            thetas[f"{name}.rope_theta"] = theta
            scalings.append(scaling)
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        expected = "the same as rope_parameters"
        raise wrong(f"{source}: rope_scaling", d["rope_scaling"], expected, "keep one of them")
    return _the_one_theta(source, thetas), scalings[0] if scalings else None


def _the_one_theta(source: str, thetas: Json) -> float:
    """The value of rope_theta, which may stand in several places (`thetas`: place -> value)."""
    given = [(place, theta) for place, theta in thetas.items() if theta is not None]
    if not given:
        expected = "at the top level or in rope_parameters"
        remedy = "add it (1000000.0 in most Qwen2.5 models)"
        raise _missing(source, "rope_theta", f"{expected}; {remedy}")
    first_place, first = given[0]
    for place, theta in given:
        number(f"{source}: {place}", theta, high=MAX_ROPE_THETA)
        if theta != first:
            expected = f"the same as {first_place} ({first!r})"
            raise wrong(f"{source}: {place}", theta, expected, "keep one of them")
    return float(first)


def _read_rope_block(source: str, name: str, block: Any, d: Json) -> tuple[Any, RopeScaling | None]:
    """(rope_theta or None, scaling) out of the block d[name], rope_scaling or rope_parameters."""
    where = f"{source}: {name}"
    mapping(where, block, "an object or null", "remove it for plain RoPE")
    kind = _rope_kind(block)
    if block.get("type", kind) != kind:
        expected = f"the same as rope_type ({kind!r})"
        raise wrong(f"{where}.type", block["type"], expected, "keep one of them")
    one_of(f"{where}.rope_type", kind, ("default", "yarn"), "Qwen2.5 uses no other RoPE")
    _check_rope_keys(where, kind, block)
    scaling = _read_yarn(source, where, block, d) if kind == "yarn" else None
    return block.get("rope_theta"), scaling


def _rope_kind(block: Json) -> Any:
    """The block's rope_type, which older files call type; without either it is "default"."""
    kind = block.get("rope_type", block.get("type"))
    return "default" if kind is None else kind


def _check_rope_keys(where: str, kind: str, block: Json) -> None:
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind == "yarn":
        known |= set(ROPE_FIELDS)
    for key in block:
        if key not in known:
            expected = f"no such key for rope type {kind!r}"
            remedy = "remove it, or name the rope_type it belongs to"
            raise wrong(f"{where}.{key}", block[key], expected, remedy)
    _check_whole_heads_rotate(
        f"{where}.partial_rotary_factor", block.get("partial_rotary_factor", 1.0)
    )


def _read_yarn(source: str, where: str, block: Json, d: Json) -> RopeScaling:
    """The block's YaRN, with transformers 5's defaults for what is absent or null.

    transformers 5 reads original_max_position_embeddings from the top level too.
    """
    name = "max_position_embeddings"
    maximum = integer(f"{source}: {name}", d[name], 1, MAX_CONTEXT)
    given = {key: block[key] for key in ROPE_FIELDS if block.get(key) is not None}
    if "truncate" in block:  # null is no default here: transformers takes it for false
        given["truncate"] = block["truncate"]
    key = "original_max_position_embeddings"
    top = d.get(key)
    original = given.setdefault(key, maximum if top is None else top)
    if top is not None and top != original:
        expected = f"the same as the top-level key ({top!r})"
        raise wrong(f"{where}.{key}", original, expected, "keep one of them")
    given.setdefault("factor", maximum / integer(f"{where}.{key}", original, 1))
    return RopeScaling.from_fields(where, given)


# ---- writing ------------------------------------------------------------------------------------


def write_fields(raw: Json, fields: Json) -> dict[str, Any]:
    """The config.json `raw` with ModelConfig's `fields` in it, in the layout that `raw` has.

    A model made by hand has no `raw`: it gets the older layout, which transformers 4 and 5 both
    read. head_dim is always written, because a reader that derives it may derive it wrongly.
    """
    d = copy.deepcopy(dict(raw))
    _write_architecture(d, fields["model_type"])
    d.setdefault("hidden_act", "silu")
    for key in (*SIZES, "rms_norm_eps", "tie_word_embeddings"):
        d[key] = fields[key]
    for key in ("bos_token_id", "pad_token_id", "quantization_config"):
        if key in d or fields[key] is not None:
            d[key] = copy.deepcopy(fields[key])
    if fields["quantization_config"] is None:
        d.pop("quantization_config", None)  # null is no word for "unquantised" everywhere
    _write_eos(d, fields["eos_token_id"])
    for key in _names_in(d, "dtype", "torch_dtype") or ["torch_dtype"]:
        d[key] = fields["dtype"]
    if d.get("layer_types") is not None:
        d["layer_types"] = ["full_attention"] * fields["num_hidden_layers"]
    _write_rope(d, fields["rope_theta"], fields["rope_scaling"])
    return d


def _names_in(d: Json, *names: str) -> list[str]:
    """Those of several names for one thing that d uses."""
    return [name for name in names if name in d]


def _write_architecture(d: dict[str, Any], model_type: str) -> None:
    if d.get("model_type") == model_type and d.get("architectures"):
        return
    d["architectures"] = [ARCHITECTURES[model_type][0]]
    d["model_type"] = model_type
    if model_type == "llama":
        d["attention_bias"] = True
        d["mlp_bias"] = False


def _write_eos(d: dict[str, Any], ids: tuple[int, ...]) -> None:
    """One id as a number, several as a list; as it was read where it says the same."""
    if token_ids("eos_token_id", d.get("eos_token_id")) == ids:
        return
    if len(ids) > 1:
        d["eos_token_id"] = list(ids)
    else:
        d["eos_token_id"] = ids[0] if ids else None


def _write_rope(d: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    """Put theta and scaling wherever d has them: at the top level and in one block or two."""
    if not d.get("rope_parameters") or d.get("rope_theta") is not None:
        d["rope_theta"] = theta
    key = "original_max_position_embeddings"
    if scaling is not None and d.get(key) is not None:
        d[key] = scaling.original_max_position_embeddings
    for name in _rope_blocks(d, scaling):
        d[name] = _written_block(name, d.get(name) or {}, theta, scaling)


def _rope_blocks(d: Json, scaling: RopeScaling | None) -> list[str]:
    """The blocks to write: those that d has, or else the older one if there is a scaling."""
    blocks = [name for name in ("rope_scaling", "rope_parameters") if d.get(name)]
    if scaling is not None and not blocks:
        return ["rope_scaling"]
    return blocks


def _written_block(
    name: str, block: dict[str, Any], theta: float, scaling: RopeScaling | None
) -> dict[str, Any] | None:
    """The block d[name] with theta and scaling in it, under the names that it uses for them."""
    if name == "rope_scaling" and scaling is None and _rope_kind(block) == "yarn":
        return None  # how transformers 4 writes plain RoPE
    if name == "rope_parameters" or "rope_theta" in block:
        block["rope_theta"] = theta
    for key in _names_in(block, "rope_type", "type") or ["rope_type"]:
        block[key] = "default" if scaling is None else "yarn"
    if scaling is None:
        return {key: value for key, value in block.items() if key not in ROPE_FIELDS}
    return block | _fields_to_write(block, scaling)


def _fields_to_write(block: Json, scaling: RopeScaling) -> dict[str, Any]:
    """The scaling's fields, without those that the block leaves out because they are defaults."""
    fields = {}
    for field in dataclasses.fields(scaling):
        value = getattr(scaling, field.name)
        if block.get(field.name) is not None or value != field.default:
            fields[field.name] = value
    return fields
