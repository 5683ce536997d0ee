"""What config.json says about a Qwen2 model, checked, and what follows from it: shapes, bytes and FLOPs.

`ModelConfig` reads both layouts in circulation: transformers 4 (`torch_dtype`, `rope_theta`, `rope_scaling`)
and transformers 5 (`dtype`, `rope_parameters`). Nothing is guessed: a key that would change the function
computed, and that this package does not implement, is refused. `GenerationDefaults` reads
generation_config.json.

Letters in formulas: L layers, D hidden_size, I intermediate_size, H query heads, K key/value heads,
d head_dim, V vocabulary rows.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minqwen.checks import (
    boolean,
    config_error,
    integer,
    number,
    optional_integer,
    token_ids,
    wrong,
)
from minqwen.errors import ConfigError
from minqwen.files import read_json_object, write_text

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
BYTES_PER_ELEMENT = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
ARCHITECTURES = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
    "llama": ("LlamaForCausalLM", "LlamaModel"),
}


def _dtype_name(where: str, dtype: Any) -> str:
    """`dtype` (a name, or a torch.dtype) as one of the names of BYTES_PER_ELEMENT."""
    name = str(dtype).removeprefix("torch.")
    if name not in BYTES_PER_ELEMENT:
        raise wrong(where, dtype, f"one of {', '.join(BYTES_PER_ELEMENT)}", "correct it")
    return name


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071), the only RoPE scaling Qwen2.5 uses; transformers' names.

    factor: context extension, >= 1. original_max_position_embeddings: positions seen in training.
    attention_factor: multiplies cos and sin; None derives it from factor (and mscale, mscale_all_dim).
    beta_fast, beta_slow: rotations over the original context that bound the ramp. truncate: round the ramp's
    ends outwards to whole dimensions. Raises ConfigError.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 (frozen)
        put("factor", number("RopeScaling.factor", self.factor, 1.0, open_low=False))
        integer(
            "RopeScaling.original_max_position_embeddings", self.original_max_position_embeddings, 1
        )
        for name in ("beta_fast", "beta_slow"):
            put(name, number(f"RopeScaling.{name}", getattr(self, name)))
        if self.beta_fast < self.beta_slow:
            raise wrong(
                "RopeScaling.beta_fast",
                self.beta_fast,
                f"at least beta_slow ({self.beta_slow:g})",
                "exchange the two",
            )
        if self.attention_factor is not None:
            put("attention_factor", number("RopeScaling.attention_factor", self.attention_factor))
        for name in ("mscale", "mscale_all_dim"):  # zero means unset, as in transformers
            if getattr(self, name) is not None:
                put(name, number(f"RopeScaling.{name}", getattr(self, name), open_low=False))
        boolean("RopeScaling.truncate", self.truncate)


ROPE_FIELDS = tuple(f.name for f in dataclasses.fields(RopeScaling))


def _read_rope_block(
    source: str, name: str, block: Any, d: Mapping
) -> tuple[Any, RopeScaling | None]:
    """(rope_theta or None, scaling) of the `rope_scaling` or `rope_parameters` object of the config d."""
    where = f"{source}: {name}"
    if not isinstance(block, Mapping):
        raise wrong(where, block, "an object or null", "remove it for plain RoPE")
    kind = block.get("rope_type", block.get("type"))
    kind = "default" if kind is None else kind
    if block.get("type", kind) != kind:
        raise wrong(
            f"{where}.type", block["type"], f"the same as rope_type ({kind!r})", "keep one of them"
        )
    if kind not in ("default", "yarn"):
        raise wrong(f"{where}.rope_type", kind, "'default' or 'yarn'", "Qwen2.5 uses no other RoPE")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    known |= set(ROPE_FIELDS) if kind == "yarn" else set()
    for key in block:
        if key not in known:
            raise wrong(
                f"{where}.{key}",
                block[key],
                f"no such key for rope type {kind!r}",
                "remove it, or name the rope_type it belongs to",
            )
    if block.get("partial_rotary_factor", 1.0) != 1.0:
        raise wrong(
            f"{where}.partial_rotary_factor",
            block["partial_rotary_factor"],
            "1.0 or no such key",
            "Qwen2 rotates whole heads",
        )
    theta = block.get("rope_theta")
    if kind == "default":
        return theta, None
    maximum = integer(f"{source}: max_position_embeddings", d["max_position_embeddings"], 1)
    # Absent or null: the defaults of transformers 5, which reads `original...` from the top level too.
    given = {
        k: block[k]
        for k in ROPE_FIELDS
        if block.get(k) is not None or (k == "truncate" and k in block)
    }
    top = d.get("original_max_position_embeddings")
    original = given.setdefault("original_max_position_embeddings", maximum if top is None else top)
    if top is not None and top != original:
        raise wrong(
            f"{where}.original_max_position_embeddings",
            original,
            f"the same as the top-level key ({top!r})",
            "keep one of them",
        )
    integer(f"{where}.original_max_position_embeddings", original, 1)
    given.setdefault("factor", maximum / original)
    try:
        return theta, RopeScaling(**given)
    except ConfigError as e:
        raise config_error(f"{where}.{str(e).removeprefix('RopeScaling.')}") from None


def _read_rope(source: str, d: Mapping) -> tuple[Any, RopeScaling | None]:
    """rope_theta and scaling from either layout, or both where they agree."""
    thetas = [("rope_theta", d["rope_theta"])] if d.get("rope_theta") is not None else []
    scalings = []
    for name in ("rope_scaling", "rope_parameters"):
        if d.get(name) not in (None, {}):
            theta, scaling = _read_rope_block(source, name, d[name], d)
            scalings.append(scaling)
            if theta is not None:
                thetas.append((f"{name}.rope_theta", theta))
    if not thetas:
        raise config_error(
            f"{source}: rope_theta is missing, expected at the top level or in "
            "rope_parameters; add it (1000000.0 in most Qwen2.5 models)"
        )
    for key, theta in thetas:
        number(f"{source}: {key}", theta)
        if theta != thetas[0][1]:
            raise wrong(
                f"{source}: {key}",
                theta,
                f"the same as {thetas[0][0]} ({thetas[0][1]!r})",
                "keep one of them",
            )
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise wrong(
            f"{source}: rope_scaling",
            d["rope_scaling"],
            "the same as rope_parameters",
            "keep one of them",
        )
    return thetas[0][1], scalings[0] if scalings else None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Qwen2 model's hyperparameters under Hugging Face's names. Sizes are counts; raises ConfigError.

    Left out, num_key_value_heads is num_attention_heads, and head_dim is hidden_size / num_attention_heads if
    that is whole. Once set, head_dim never follows the other two. num_attention_heads is any multiple of
    num_key_value_heads. `raw` holds every key of the config.json read, so that writing it again loses none;
    it and `source` (the name used in errors) take no part in equality.

    model_type "llama" is the Qwen2 function under the other name: attention_bias true, which there also gives
    o_proj a bias; it has to be zero, and parameter_shapes() lists it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None
    head_dim: int = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    model_type: str = "qwen2"
    quantization_config: dict | None = field(default=None, hash=False)
    raw: dict = field(default_factory=dict, repr=False, compare=False)
    source: str = field(default="ModelConfig", repr=False, compare=False)

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 (frozen)
        at = lambda name: f"{self.source}: {name}"  # noqa: E731
        for name in SIZES:
            check = optional_integer if name in ("num_key_value_heads", "head_dim") else integer
            check(at(name), getattr(self, name), 1)
        H, D = self.num_attention_heads, self.hidden_size
        K = H if self.num_key_value_heads is None else self.num_key_value_heads
        put("num_key_value_heads", K)
        if H % K:
            raise wrong(
                at("num_attention_heads"),
                H,
                f"a multiple of num_key_value_heads ({K})",
                "every key/value head serves the same number of query heads",
            )
        if self.head_dim is None and D % H:
            raise wrong(
                at("head_dim"),
                None,
                f"a value, since num_attention_heads ({H}) does not divide hidden_size ({D})",
                "write head_dim into the config",
            )
        put("head_dim", D // H if self.head_dim is None else self.head_dim)
        if self.head_dim % 2:
            raise wrong(
                at("head_dim"),
                self.head_dim,
                "an even number",
                "rotary embedding pairs the dimensions of a head",
            )
        for name in ("rms_norm_eps", "rope_theta"):
            put(name, number(at(name), getattr(self, name)))
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise wrong(at("rope_scaling"), self.rope_scaling, "a RopeScaling or None", "build one")
        if self.rope_scaling is not None and self.rope_theta <= 1:
            raise wrong(
                at("rope_theta"), self.rope_theta, "a number above 1 with YaRN", "correct it"
            )
        boolean(at("tie_word_embeddings"), self.tie_word_embeddings)
        put("dtype", _dtype_name(at("dtype"), self.dtype))
        put("eos_token_id", token_ids(at("eos_token_id"), self.eos_token_id))
        for name in ("bos_token_id", "pad_token_id"):
            optional_integer(at(name), getattr(self, name), 0)
        if self.model_type not in tuple(ARCHITECTURES):
            raise wrong(
                at("model_type"),
                self.model_type,
                " or ".join(map(repr, ARCHITECTURES)),
                "only the dense Qwen2 architecture is implemented",
            )
        if not isinstance(self.quantization_config, dict | None):
            raise wrong(
                at("quantization_config"),
                self.quantization_config,
                "an object or null",
                "correct it",
            )
        put("quantization_config", copy.deepcopy(self.quantization_config))
        put("raw", copy.deepcopy(dict(self.raw)))

    # ---- reading

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "ModelConfig":
        """Reads config.json, given its path or its directory's."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_dict(read_json_object(path, ConfigError), source=str(path))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], source: str = "config.json") -> "ModelConfig":
        """Checks a config.json already parsed; `source` is the file's name in errors.

        Keys that decide what is computed must be there; token ids may be absent, and so may the dtype, which
        is then float32 as in PyTorch. Keys that no Qwen2 forward pass reads are only kept (`raw`).
        """
        if not isinstance(d, Mapping):
            raise wrong(
                f"{source}: the top level", d, "a JSON object", "fetch the file again or repair it"
            )
        for key in ("model_type", *SIZES, "hidden_act", "rms_norm_eps", "tie_word_embeddings"):
            if key not in d and key != "head_dim":
                raise config_error(
                    f"{source}: {key} is missing, expected in every Qwen2 config; "
                    "fetch the file again or add the key"
                )
        _check_function(source, d)
        rope_theta, rope_scaling = _read_rope(source, d)
        names = [k for k in ("dtype", "torch_dtype") if d.get(k) is not None]
        dtypes = [_dtype_name(f"{source}: {k}", d[k]) for k in names]
        if len(set(dtypes)) == 2:
            raise wrong(
                f"{source}: torch_dtype",
                dtypes[1],
                f"the same as dtype ({dtypes[0]!r})",
                "keep one of them",
            )
        same_name = (
            *SIZES,
            "rms_norm_eps",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "model_type",
            "quantization_config",
        )
        return cls(
            **{k: d.get(k) for k in same_name},
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            dtype=dtypes[0] if dtypes else "float32",
            raw=dict(d),
            source=source,
        )

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, validated like a file; head_dim stays unless itself changed."""
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            raise wrong(
                "ModelConfig.replace", unknown[0], "a field of ModelConfig", "correct the name"
            )
        # Through to_dict, so that `raw` follows and keys that depend on each other are checked again.
        changed = dataclasses.replace(self, **changes)
        return ModelConfig.from_dict(changed.to_dict(), changed.source)

    # ---- writing

    def to_dict(self) -> dict[str, Any]:
        """config.json in Hugging Face's layout: `raw`, changed fields updated, head_dim always written.

        The layout that was read is kept (rope_theta and rope_scaling, or rope_parameters; torch_dtype or
        dtype); a config made by hand gets the older one, which transformers 4 and 5 both read.
        """
        d = copy.deepcopy(self.raw)
        if d.get("model_type") != self.model_type or not d.get("architectures"):
            d |= {
                "architectures": [ARCHITECTURES[self.model_type][0]],
                "model_type": self.model_type,
            }
            d |= {"attention_bias": True, "mlp_bias": False} if self.model_type == "llama" else {}
        d.setdefault("hidden_act", "silu")
        for key in (*SIZES, "rms_norm_eps", "tie_word_embeddings"):
            d[key] = getattr(self, key)
        for key in ("bos_token_id", "pad_token_id", "quantization_config"):
            if key in d or getattr(self, key) is not None:
                d[key] = copy.deepcopy(getattr(self, key))
        if token_ids("eos_token_id", d.get("eos_token_id")) != self.eos_token_id:
            ids = list(self.eos_token_id)
            d["eos_token_id"] = ids if len(ids) > 1 else ids[0] if ids else None
        for key in [k for k in ("dtype", "torch_dtype") if k in d] or ["torch_dtype"]:
            d[key] = self.dtype
        if d.get("layer_types") is not None:
            d["layer_types"] = ["full_attention"] * self.num_hidden_layers
        self._write_rope(d)
        return d

    def _write_rope(self, d: dict[str, Any]) -> None:
        """Brings those of rope_theta, rope_scaling and rope_parameters that d has in line with the fields."""
        new_layout = bool(d.get("rope_parameters"))
        if not new_layout or d.get("rope_theta") is not None:
            d["rope_theta"] = self.rope_theta
        if d.get("original_max_position_embeddings") is not None and self.rope_scaling is not None:
            d["original_max_position_embeddings"] = (
                self.rope_scaling.original_max_position_embeddings
            )
        names = [k for k in ("rope_scaling", "rope_parameters") if d.get(k)]
        if not names and self.rope_scaling is not None:
            names = ["rope_scaling"]
        for name in names:
            block = d.get(name) or {}
            if name == "rope_scaling" and self.rope_scaling is None:
                if block.get("rope_type", block.get("type")) == "yarn":
                    d[name] = None
                    continue
            if "rope_theta" in block or name == "rope_parameters":
                block["rope_theta"] = self.rope_theta
            kind = "default" if self.rope_scaling is None else "yarn"
            for key in [k for k in ("rope_type", "type") if k in block] or ["rope_type"]:
                block[key] = kind
            for key in ROPE_FIELDS:
                value = getattr(self.rope_scaling, key, None)
                default = RopeScaling.__dataclass_fields__[key].default
                if self.rope_scaling is None:
                    block.pop(key, None)
                elif block.get(key, default) is None and value == default:
                    pass  # null or absent means the default already
                elif key in block or value != default:
                    block[key] = value
            d[name] = block

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes directory/config.json (replacing it in one step) and returns its path."""
        path = Path(directory) / "config.json"
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n", ConfigError)
        return path

    # ---- what follows

    @property
    def group_size(self) -> int:
        """Query heads per key/value head, H / K."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def q_size(self) -> int:
        """Rows of q_proj, H * d."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k_proj and of v_proj, K * d."""
        return self.num_key_value_heads * self.head_dim

    @property
    def context_length(self) -> int:
        """Tokens up to which full attention with this RoPE is what the model's makers meant.

        max_position_embeddings, or YaRN's factor * original where that is more (Qwen's documented block
        leaves max_position_embeddings at 32,768). A model with dual_chunk_attention_config (the 1M models) is
        full attention only up to that block's original_max_position_embeddings, 262,144.
        """
        length = self.max_position_embeddings
        if self.rope_scaling is not None:
            scaled = self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings
            length = max(length, int(scaled))
        dual_chunk = self.raw.get("dual_chunk_attention_config")
        return min(length, dual_chunk["original_max_position_embeddings"]) if dual_chunk else length

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name (Hugging Face's) -> shape of every parameter, in module order; no lm_head.weight if tied."""
        D, I, Q, KV = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        shapes = {"model.embed_tokens.weight": (self.vocab_size, D)}
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}."
            shapes |= {
                layer + "self_attn.q_proj.weight": (Q, D),
                layer + "self_attn.q_proj.bias": (Q,),
                layer + "self_attn.k_proj.weight": (KV, D),
                layer + "self_attn.k_proj.bias": (KV,),
                layer + "self_attn.v_proj.weight": (KV, D),
                layer + "self_attn.v_proj.bias": (KV,),
                layer + "self_attn.o_proj.weight": (D, Q),
            }
            if self.model_type == "llama":
                shapes[layer + "self_attn.o_proj.bias"] = (D,)
            shapes |= {
                layer + "mlp.gate_proj.weight": (I, D),
                layer + "mlp.up_proj.weight": (I, D),
                layer + "mlp.down_proj.weight": (D, I),
                layer + "input_layernorm.weight": (D,),
                layer + "post_attention_layernorm.weight": (D,),
            }
        shapes["model.norm.weight"] = (D,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, D)
        return shapes

    def _matrix_parameters(self) -> int:
        """Elements of one layer's seven matrices: q and o, k and v, gate, up and down."""
        return self.hidden_size * (2 * self.q_size + 2 * self.kv_size + 3 * self.intermediate_size)

    def num_parameters(self) -> int:
        """Parameters stored, a tied head counted once: 7,615,616,512 for Qwen2.5-7B."""
        vectors = (
            self.q_size + 2 * self.kv_size + 2 * self.hidden_size
        )  # q, k, v biases and two norms
        vectors += self.hidden_size if self.model_type == "llama" else 0  # o_proj.bias
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return (
            embeddings
            + self.num_hidden_layers * (self._matrix_parameters() + vectors)
            + self.hidden_size
        )

    def weight_bytes(self, dtype: Any = None) -> int:
        """Bytes of all parameters in `dtype` (a name or a torch.dtype; default the config's), unquantised."""
        return self.num_parameters() * BYTES_PER_ELEMENT[_dtype_name("dtype", dtype or self.dtype)]

    def kv_bytes_per_token(self, dtype: Any = None) -> int:
        """Bytes of one token's keys and values, 2 * L * K * d elements: 57,344 for the 7B in bfloat16."""
        elements = 2 * self.num_hidden_layers * self.kv_size
        return elements * BYTES_PER_ELEMENT[_dtype_name("dtype", dtype or self.dtype)]

    def flops_per_token(self, context_len: int, lm_head: bool = True) -> int:
        """FLOPs of one token's forward pass that attends to `context_len` tokens, itself included.

            2 * (L * (2*D*H*d + 2*D*K*d + 3*D*I) + V*D)  +  4 * L * H * d * context_len

        A multiply-add counts 2. First term: every matrix once, with lm_head (lm_head=False drops V*D, as for
        all but the last position of a prefill). Second: scores q.k and the weighted sum of values. Norms,
        biases, softmax, RoPE, SiLU and the embedding look-up are not counted. For Qwen2.5-7B:
        14,140,571,648 + 401,408 * context_len (without the head 13,050,576,896).
        """
        integer("flops_per_token: context_len", context_len, 0)
        matrices = self.num_hidden_layers * self._matrix_parameters()
        matrices += self.vocab_size * self.hidden_size if lm_head else 0
        return 2 * matrices + 4 * self.num_hidden_layers * self.q_size * context_len


def _check_function(source: str, d: Mapping[str, Any]) -> None:
    """Refuses keys outside ModelConfig's fields that ask for another function than Qwen2's."""
    model_type, architectures = d["model_type"], d.get("architectures")
    if model_type not in tuple(ARCHITECTURES):
        raise wrong(
            f"{source}: model_type",
            model_type,
            " or ".join(map(repr, ARCHITECTURES)),
            "only the dense Qwen2 architecture is implemented",
        )
    if architectures is not None:
        known = ARCHITECTURES[model_type]
        if not isinstance(architectures, (list, tuple)) or not set(map(str, architectures)) <= set(
            known
        ):
            raise wrong(
                f"{source}: architectures",
                architectures,
                f"[{known[0]!r}]",
                "only the dense causal language model is implemented",
            )
    if d["hidden_act"] != "silu":
        raise wrong(
            f"{source}: hidden_act", d["hidden_act"], "'silu'", "no other activation is implemented"
        )

    # Llama asks for its biases; Qwen2 always has them on q, k and v, and never elsewhere.
    bias = d.get("attention_bias", model_type == "qwen2")
    if bias is not True:
        raise wrong(
            f"{source}: attention_bias",
            d.get("attention_bias"),
            "true (biases on q, k and v)",
            "a model without them is not a Qwen2 model",
        )
    if d.get("mlp_bias", False) is not False:
        raise wrong(f"{source}: mlp_bias", d["mlp_bias"], "false", "Qwen2's MLP has no biases")
    if d.get("use_mrope", False) not in (False, None):
        raise wrong(
            f"{source}: use_mrope", d["use_mrope"], "false", "multimodal RoPE is not implemented"
        )
    if d.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise wrong(
            f"{source}: partial_rotary_factor",
            d["partial_rotary_factor"],
            "1.0 or no such key",
            "Qwen2 rotates whole heads",
        )

    dual_chunk = d.get("dual_chunk_attention_config")
    if (
        dual_chunk is not None
    ):  # transformers ignores it too; ModelConfig.context_length says how far
        where, key = f"{source}: dual_chunk_attention_config", "original_max_position_embeddings"
        if not isinstance(dual_chunk, Mapping):
            raise wrong(where, dual_chunk, "an object or null", "correct it")
        integer(f"{where}.{key}", dual_chunk.get(key), 1)
    _check_no_layer_slides(source, d)


def _check_no_layer_slides(source: str, d: Mapping[str, Any]) -> None:
    """transformers' rule: layer_types decides; without it, layers from max_window_layers on may slide."""
    layers, types = d["num_hidden_layers"], d.get("layer_types")
    if types is not None:
        if not isinstance(types, (list, tuple)) or len(types) != layers:
            raise wrong(
                f"{source}: layer_types",
                types,
                f"an entry for each of {layers!r} layers",
                "correct it",
            )
        for i, kind in enumerate(types):
            if kind != "full_attention":
                raise wrong(
                    f"{source}: layer_types[{i}]",
                    kind,
                    "'full_attention'",
                    "sliding-window attention is not implemented",
                )
    sliding = d.get("use_sliding_window")
    if sliding is not None and boolean(f"{source}: use_sliding_window", sliding) and types is None:
        window = d.get("sliding_window", "missing")
        if window is None:
            return
        first = d.get("max_window_layers")
        if type(first) is not int or type(layers) is not int or first < layers:
            raise wrong(
                f"{source}: use_sliding_window",
                True,
                f"false, or max_window_layers ({first!r}) not below num_hidden_layers ({layers!r})",
                "sliding-window attention is not implemented; set it to false for full attention",
            )
