"""Models and rows of numbers for the tests of exact arithmetic."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import torch
from torch import Tensor

from minqwen import ModelConfig, Qwen2
from minqwen.lab.golden import digest
from minqwen.model import Native

STORAGE = [torch.float32, torch.bfloat16]
Weights = tuple[ModelConfig, dict[str, Tensor]]


def build(
    weights: Weights, arithmetic: str | Native = "exact", dtype: torch.dtype = torch.float32
) -> Qwen2:
    config, tensors = weights
    return Qwen2.from_tensors(
        config, lambda name, shard: tensors[name], dtype=dtype, arithmetic=arithmetic
    )


def random_model(seed: int = 0, outlier: float = 1.0, bf16: bool = True, **changes) -> Weights:
    """outlier: a factor on one channel of the embedding and of up_proj."""
    shape = {
        "vocab_size": 128,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = ModelConfig(**(shape | changes))
    g, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in config.parameter_shapes().items():
        x = torch.randn(shape, generator=g)
        if "norm" in name:
            x = 1 + x / 5
        elif "embed" in name:
            x[:, 5] *= outlier
        elif "weight" in name:
            x /= shape[1] ** 0.5
        if "up_proj" in name:
            x[3] *= outlier
        tensors[name] = x.bfloat16() if bf16 else x
    return config, tensors


def more_heads(weights: Weights, per_group: int, seed: int = 0) -> Weights:
    """The same model with `per_group` query heads for each key/value head.

    New q rows are random, and new columns of o_proj zero, at the end of every group.
    """
    config, tensors = weights
    K, d, G = config.num_key_value_heads, config.head_dim, config.group_size
    g, out = torch.Generator().manual_seed(seed), {}
    for name, x in tensors.items():
        if "q_proj" in name:
            new = torch.randn(K, (per_group - G) * d, *x.shape[1:], generator=g) * 1000
            x = torch.cat((x.unflatten(0, (K, G * d)), new.to(x)), 1).flatten(0, 1)
        elif "o_proj" in name:
            zeros = x.new_zeros(len(x), K, (per_group - G) * d)
            x = torch.cat((x.unflatten(1, (K, G * d)), zeros), 2).flatten(1)
        out[name] = x
    return config.replace(num_attention_heads=K * per_group), out


def ragged_ids(count: int, longest: int, seed: int = 0, vocab_size: int = 2048) -> list[Tensor]:
    r = random.Random(seed)
    lengths = [r.randint(1, longest) for _ in range(count)]
    return [torch.tensor([r.randrange(vocab_size) for _ in range(length)]) for length in lengths]


def alone(model: Qwen2, sequences: Iterable[Tensor]) -> list[Tensor]:
    """Logits of each sequence in a forward pass of its own, without a cache."""
    return [model(ids[None])[0] for ids in sequences]


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    """All in every bit, signs of zeros too."""
    return digest(list(a)) == digest(list(b))


def integers(row: Tensor) -> list[int]:
    """A row of floats in units of the largest power of two that divides them all."""
    ratios = [v.as_integer_ratio() for v in row.tolist()]
    unit = max(q for _, q in ratios)
    whole = [p * (unit // q) for p, q in ratios]
    shift = min(((n & -n).bit_length() - 1 for n in whole if n), default=0)
    return [n >> shift for n in whole]


def adversarial_rows(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows that sit on the edges of what the grids assume: [13, n]."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=g)
    rows = [
        normal,
        normal.clone().index_fill_(0, torch.tensor(n // 2), 1e4),  # with an outlier
        torch.zeros(n),
        -torch.zeros(n),
        normal * 1e-41,  # denormal
        normal * (1e4 if dtype == torch.float16 else 1e37),
        torch.ones(n),
        torch.eye(n)[0],
        torch.full((n,), 1 - 2.0**-8),
        torch.ones(n) - 2 * (torch.arange(n) % 2),
        2.0 ** -(torch.arange(n) % 24),
        torch.cat((normal[: n // 2], -normal[: n // 2])),  # cancelling
        torch.full((n,), (1 - 2.0**-9) * (1 - 2.0**-12) / math.sqrt(n)),  # a norm near 1
    ]
    return torch.stack([row.to(dtype) for row in rows])
