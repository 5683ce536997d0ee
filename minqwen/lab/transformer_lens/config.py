"""`model.cfg`: TransformerLens' names of what config.json says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from minqwen.model import Qwen2


@dataclass
class HookedTransformerConfig:
    """Sizes and settings. Only the `use_` fields may be changed, by the model's `set_use_`."""

    model_name: str
    n_layers: int
    d_model: int
    n_ctx: int  # the whole context; TransformerLens cuts it to 2048
    d_head: int
    n_heads: int
    n_key_value_heads: int
    d_mlp: int
    d_vocab: int
    d_vocab_out: int
    eps: float
    attn_scale: float  # what q k^T is divided by
    rotary_base: float
    rotary_dim: int
    n_params: int
    tie_word_embeddings: bool
    dtype: torch.dtype
    device: str
    act_fn: str = "silu"
    normalization_type: str = "RMS"
    positional_embedding_type: str = "rotary"
    original_architecture: str = "Qwen2ForCausalLM"
    attention_dir: str = "causal"
    default_prepend_bos: bool = False
    tokenizer_prepends_bos: bool = False
    final_rms: bool = True
    gated_mlp: bool = True
    attn_only: bool = False
    parallel_attn_mlp: bool = False
    use_attn_scale: bool = True
    use_attn_result: bool = False
    use_attn_in: bool = False
    use_hook_mlp_in: bool = False
    use_split_qkv_input: bool = False
    ungroup_grouped_query_attention: bool = False

    @classmethod
    def of(cls, model: Qwen2, name: str) -> HookedTransformerConfig:
        c = model.config
        return cls(
            model_name=name,
            n_layers=c.num_hidden_layers,
            d_model=c.hidden_size,
            n_ctx=c.context_length,
            d_head=c.head_dim,
            n_heads=c.num_attention_heads,
            n_key_value_heads=c.num_key_value_heads,
            d_mlp=c.intermediate_size,
            d_vocab=c.vocab_size,
            d_vocab_out=c.vocab_size,
            eps=c.rms_norm_eps,
            attn_scale=c.head_dim**0.5,
            rotary_base=c.rope_theta,
            rotary_dim=c.head_dim,
            n_params=c.num_parameters(),
            tie_word_embeddings=c.tie_word_embeddings,
            dtype=model.dtype,
            device=str(model.device),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
