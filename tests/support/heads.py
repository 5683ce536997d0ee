"""Small random models with any number of heads, and their extensions."""

from __future__ import annotations

import torch
from torch import Tensor

from minqwen import Checkpoint, ModelConfig, Qwen2
from minqwen.heads.layout import Layout, extended_config
from minqwen.heads.tensors import extend_tensor
from support.paths import EMBEDDED

IDS = torch.tensor([[5, 30, 17, 42, 90, 11, 7, 3, 60, 61]])
QWEN_7B = ModelConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)

Weights = dict[str, Tensor]


def random_model(
    H: int,
    K: int,
    d: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    intermediate_size: int = 48,
) -> tuple[ModelConfig, Weights]:
    """Two layers of width 40, 97 tokens, H query and K key/value heads of d."""
    config = ModelConfig(
        vocab_size=97,
        hidden_size=40,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=d,
        dtype=str(dtype).removeprefix("torch."),
    )
    g = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.parameter_shapes().items():
        w = torch.randn(shape, generator=g) * (0.3 if len(shape) == 2 else 0.5)
        weights[name] = (w + 1 if "norm" in name else w).to(dtype)
    return config, weights


def embedded_weights() -> tuple[ModelConfig, Weights]:
    """The embedded model: 28 query and 4 key/value heads, as the 7B has."""
    source = Checkpoint(EMBEDDED)
    return source.config, {name: source.read(name) for name in source.names}


def build(config: ModelConfig, weights: Weights, **options: object) -> Qwen2:
    return Qwen2.from_tensors(config, lambda name, shard: weights[name].clone(), **options)


def extended(config: ModelConfig, weights: Weights, to: Layout) -> tuple[ModelConfig, Weights]:
    to.check()
    return extended_config(config, to), {n: extend_tensor(n, w, to) for n, w in weights.items()}
