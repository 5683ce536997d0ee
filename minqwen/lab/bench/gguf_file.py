"""A checkpoint as a GGUF file for llama.cpp, with the same weights and no vocabulary.

The names and keys are those that llama.cpp's own converter writes for Qwen2. Its rotation pairs
numbers as Hugging Face does, so no weight is permuted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minqwen.checkpoint import Checkpoint
from minqwen.config import ModelConfig

WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FORMS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # our names and gguf's


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter: "blk.3.attn_q.bias"."""
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, leaf = rest.rpartition(".")
    return f"blk.{layer}.{OF_LAYER[module]}.{leaf}"


def write_gguf(source: str, file: Path, form: str, gguf: Any) -> None:
    """The checkpoint `source` in one of FORMS; vectors stay float32. gguf: the package."""
    checkpoint = Checkpoint(source)
    writer = gguf.GGUFWriter(file, "qwen2", use_temp_file=True)
    _write_keys(writer, checkpoint.config)
    for name in checkpoint.config.parameter_shapes():
        weight: np.ndarray[Any, Any] = checkpoint.read(name).float().numpy()
        kind = FORMS[form] if weight.ndim > 1 else "F32"
        wanted = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_keys(writer: Any, config: ModelConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
