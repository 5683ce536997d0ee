"""What config.json says about a Qwen2 model, and what follows from it: shapes, bytes and FLOPs.

`ModelConfig` holds checked values. config_json.py knows the two layouts of the file in circulation.

Letters in formulas: L layers, D hidden_size, I intermediate_size, H query heads, K key/value heads,
d head_dim, V vocabulary rows.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minqwen.checks import (
    BYTES_PER_ELEMENT,
    MAX_TOKEN_ID,
    boolean,
    dtype_name,
    integer,
    mapping,
    number,
    optional_integer,
    token_ids,
    wrong,
)
from minqwen.config.config_json import (
    MAX_RMS_NORM_EPS,
    MAX_ROPE_THETA,
    MAX_SIZES,
    check_model_type,
    read_fields,
    write_fields,
)
from minqwen.config.rope_scaling import RopeScaling
from minqwen.errors import ConfigError
from minqwen.files import check_directory, read_json_object, write_text


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Qwen2 model's hyperparameters under Hugging Face's names. Raises ConfigError.

    Sizes are counts. num_attention_heads is any multiple of num_key_value_heads. Left out,
    num_key_value_heads is num_attention_heads, and head_dim is hidden_size / num_attention_heads if
    that is whole. Once set, head_dim never follows the other two.

    `raw` holds every key of the config.json that was read, so that writing it again loses none. It
    and `source` (the name used in errors) take no part in equality.

    model_type "llama" is the Qwen2 function under another name: with attention_bias true, which in
    Llama gives o_proj a bias as well. That bias has to be zero; parameter_shapes() lists it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    # None only until __post_init__ fills it in, so that readers of these two need no check.
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
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
    quantization_config: dict[str, Any] | None = field(default=None, hash=False)
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    source: str = field(default="ModelConfig", repr=False, compare=False)

    # ---- checking

    def __post_init__(self) -> None:
        self._settle_sizes()
        self._settle_head_dim()
        self._settle_numbers()
        self._settle_token_ids()
        check_model_type(self.source, self.model_type)
        self._put("dtype", dtype_name(self._where("dtype"), self.dtype))
        if not isinstance(self.quantization_config, dict | None):
            where = self._where("quantization_config")
            raise wrong(where, self.quantization_config, "an object or null")
        # Copies: whoever made the dictionaries may go on to change them.
        self._put("quantization_config", copy.deepcopy(self.quantization_config))
        self._put("raw", copy.deepcopy(dict(self.raw)))

    def _where(self, name: str) -> str:
        return f"{self.source}: {name}"

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    def _settle_sizes(self) -> None:
        if self.num_key_value_heads is None:
            self._put("num_key_value_heads", self.num_attention_heads)
        for name, most in MAX_SIZES.items():
            if name != "head_dim":
                self._put(name, integer(self._where(name), getattr(self, name), 1, most))
        H, K = self.num_attention_heads, self.num_key_value_heads
        if H % K:
            expected = f"a multiple of num_key_value_heads ({K})"
            remedy = "every key/value head serves the same number of query heads"
            raise wrong(self._where("num_attention_heads"), H, expected, remedy)

    def _settle_head_dim(self) -> None:
        where, H, D = self._where("head_dim"), self.num_attention_heads, self.hidden_size
        if self.head_dim is None:
            if D % H:
                reason = f"num_attention_heads ({H}) does not divide hidden_size ({D})"
                expected = f"a value, since {reason}"
                raise wrong(where, None, expected, "write head_dim into the config")
            self._put("head_dim", D // H)
        self._put("head_dim", integer(where, self.head_dim, 1, MAX_SIZES["head_dim"]))
        if self.head_dim % 2:
            remedy = "rotary embedding pairs the dimensions of a head"
            raise wrong(where, self.head_dim, "an even number", remedy)

    def _settle_numbers(self) -> None:
        for name, most in (("rms_norm_eps", MAX_RMS_NORM_EPS), ("rope_theta", MAX_ROPE_THETA)):
            self._put(name, number(self._where(name), getattr(self, name), high=most))
        if not isinstance(self.rope_scaling, RopeScaling | None):
            where = self._where("rope_scaling")
            raise wrong(where, self.rope_scaling, "a RopeScaling or None", "build one")
        if self.rope_scaling is not None and self.rope_theta <= 1:
            raise wrong(self._where("rope_theta"), self.rope_theta, "a number above 1 with YaRN")
        boolean(self._where("tie_word_embeddings"), self.tie_word_embeddings)

    def _settle_token_ids(self) -> None:
        ids = token_ids(self._where("eos_token_id"), self.eos_token_id)
        self._put("eos_token_id", ids)
        for name in ("bos_token_id", "pad_token_id"):
            id = optional_integer(self._where(name), getattr(self, name), 0, MAX_TOKEN_ID)
            self._put(name, id)

    # ---- reading and writing

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """Reads config.json. `path` is the file or the directory that holds it."""
        path = Path(path)
        if not path.is_file() and path.suffix != ".json":
            check_directory(path, ConfigError)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_dict(read_json_object(path, ConfigError), source=str(path))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Checks a config.json that is already parsed. `source` is the file's name in errors.

        Keys that decide what is computed must be there. Token ids may be absent, and so may the
        dtype, which is then float32 as in PyTorch. Keys that no Qwen2 forward pass reads are kept
        in `raw` and otherwise ignored.
        """
        remedy = "fetch the file again or repair it"
        mapping(f"{source}: the top level", d, "a JSON object", remedy)
        return cls(**read_fields(source, d), raw=dict(d), source=source)

    @property
    def names_dtype(self) -> bool:
        """Whether a dtype was in config.json. If not, and there are weight files, theirs counts."""
        return any(self.raw.get(key) is not None for key in ("dtype", "torch_dtype"))

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, checked like a file; head_dim stays unless named."""
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            remedy = "correct the name"
            raise wrong("ModelConfig.replace", unknown[0], "a field of ModelConfig", remedy)
        # Through to_dict, so that `raw` follows, and keys that depend on each other are checked.
        changed = dataclasses.replace(self, **changes)
        return ModelConfig.from_dict(changed.to_dict(), changed.source)

    def to_dict(self) -> dict[str, Any]:
        """config.json: `raw` with the fields in it, in the layout that was read.

        head_dim is always written. A config made by hand gets the older layout, which transformers
        4 and 5 both read.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return write_fields(self.raw, fields)

    def save(self, directory: str | os.PathLike[str]) -> Path:
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
        """Up to how many tokens full attention with this RoPE is what the model's makers meant.

        This is max_position_embeddings, or YaRN's factor * original where that is more: the YaRN
        block that Qwen documents leaves max_position_embeddings at 32,768. A model with
        dual_chunk_attention_config (the 1M models) is full attention only up to that block's
        original_max_position_embeddings, 262,144.
        """
        length = self.max_position_embeddings
        if self.rope_scaling is not None:
            scaled = self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings
            length = max(length, int(scaled))
        dual_chunk = self.raw.get("dual_chunk_attention_config")
        if dual_chunk:
            length = min(length, dual_chunk["original_max_position_embeddings"])
        return length

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name (Hugging Face's) -> shape, in module order.

        A model with tied embeddings has no lm_head.weight.
        """
        D, V = self.hidden_size, self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
        layer = self._layer_shapes()
        for i in range(self.num_hidden_layers):
            for name, shape in layer.items():
                shapes[f"model.layers.{i}.{name}"] = shape
        shapes["model.norm.weight"] = (D,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (V, D)
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name within its layer -> shape, of the parameters of one layer."""
        D, I, Q, KV = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        attention: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (Q, D),
            "self_attn.q_proj.bias": (Q,),
            "self_attn.k_proj.weight": (KV, D),
            "self_attn.k_proj.bias": (KV,),
            "self_attn.v_proj.weight": (KV, D),
            "self_attn.v_proj.bias": (KV,),
            "self_attn.o_proj.weight": (D, Q),
        }
        if self.model_type == "llama":
            attention["self_attn.o_proj.bias"] = (D,)
        return attention | {
            "mlp.gate_proj.weight": (I, D),
            "mlp.up_proj.weight": (I, D),
            "mlp.down_proj.weight": (D, I),
            "input_layernorm.weight": (D,),
            "post_attention_layernorm.weight": (D,),
        }

    def _matrix_parameters(self) -> int:
        """Elements of one layer's seven matrices: q and o, k and v, gate, up and down."""
        return self.hidden_size * (2 * self.q_size + 2 * self.kv_size + 3 * self.intermediate_size)

    def num_parameters(self) -> int:
        """Parameters stored, a tied head counted once: 7,615,616,512 for Qwen2.5-7B."""
        biases = self.q_size + 2 * self.kv_size
        if self.model_type == "llama":
            biases += self.hidden_size  # o_proj.bias
        layer = self._matrix_parameters() + biases + 2 * self.hidden_size  # two norms
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + self.hidden_size

    def weight_bytes(self, dtype: Any = None) -> int:
        """Bytes of all parameters, unquantised.

        dtype: a name or a torch.dtype; by default the config's.
        """
        return self.num_parameters() * self._bytes_per_element(dtype)

    def kv_bytes_per_token(self, dtype: Any = None) -> int:
        """Bytes of one token's keys and values, 2 * L * K * d elements.

        57,344 for Qwen2.5-7B in bfloat16. dtype: a name or a torch.dtype; by default the config's.
        """
        return 2 * self.num_hidden_layers * self.kv_size * self._bytes_per_element(dtype)

    def _bytes_per_element(self, dtype: Any) -> int:
        return BYTES_PER_ELEMENT[dtype_name("dtype", dtype or self.dtype)]

    def flops_per_token(self, context_len: int, lm_head: bool = True) -> int:
        """FLOPs of one token's forward pass that attends to `context_len` tokens, itself included.

            2 * (L * (2*D*H*d + 2*D*K*d + 3*D*I) + V*D)  +  4 * L * H * d * context_len

        A multiply-add counts 2. The first term is every matrix once, with lm_head; lm_head=False
        drops V*D, as for all but the last position of a prefill. The second is the scores q.k and
        the weighted sum of values. Norms, biases, softmax, RoPE, SiLU and the embedding look-up are
        not counted. For Qwen2.5-7B: 14,140,571,648 + 401,408 * context_len (without the head
        13,050,576,896).
        """
        integer("flops_per_token: context_len", context_len, 0)
        matrices = self.num_hidden_layers * self._matrix_parameters()
        if lm_head:
            matrices += self.vocab_size * self.hidden_size
        return 2 * matrices + 4 * self.num_hidden_layers * self.q_size * context_len
