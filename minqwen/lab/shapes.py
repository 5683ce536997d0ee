"""The shapes of the official Qwen2.5 models, and random weights for a model of any shape."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from minqwen.config import ModelConfig

# Qwen/Qwen2.5-*-Instruct: hidden, intermediate, layers, query heads, KV heads, vocabulary rows, tied head
SIZES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}


BLOCK = 16_777_213


STD = 0.02


def official_config(size: str) -> ModelConfig:
    """The config.json of an official Instruct size, e.g. "7B"."""
    D, I, L, H, K, V, tied = SIZES[size]
    return ModelConfig.from_dict(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_act": "silu",
            "hidden_size": D,
            "initializer_range": STD,
            "intermediate_size": I,
            "max_position_embeddings": 32768,
            "max_window_layers": L,
            "model_type": "qwen2",
            "num_attention_heads": H,
            "num_hidden_layers": L,
            "num_key_value_heads": K,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": tied,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": V,
        },
        source=f"--size {size}",
    )


def random_tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) in module order and config.dtype; each depends on seed, name and shape alone."""
    dtype = getattr(torch, config.dtype)
    block = (
        torch.empty(BLOCK).normal_(0, STD, generator=torch.Generator().manual_seed(seed)).to(dtype)
    )
    for name, shape in config.parameter_shapes().items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, dtype=dtype)
            continue
        if name.endswith(
            "o_proj.bias"
        ):  # a Llama-style config lists it; Qwen2 has none, so it is zero
            yield name, torch.zeros(shape, dtype=dtype)
            continue
        tensor = torch.empty(shape, dtype=dtype)
        flat = tensor.view(-1)
        start = (
            int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") % BLOCK
        )
        done = 0
        while done < len(flat):
            count = min(BLOCK - start, len(flat) - done)
            flat[done : done + count] = block[start : start + count]
            done, start = done + count, 0
        yield name, tensor
