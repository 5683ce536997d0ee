"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and YaRN (Peng et al. 2023, arXiv:2309.00071).

The formulas and their order are those of transformers' `modeling_rope_utils.py`, so that float32 tables have
its bits. YaRN is static: the same frequencies and the same scale at every position of every prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minqwen.config import ModelConfig, RopeScaling


def wavelengths_of(config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """theta^(2i/d): positions per radian of each pair of dimensions. [d/2]"""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(dtype) / config.head_dim
    return config.rope_theta**exponents


def inverse_frequencies(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    wavelengths: Tensor | None = None,
    log: Callable[[float], float] = math.log,
) -> tuple[Tensor, float]:
    """Angles per position and the factor on cos and sin.

    Returns (inv_freq [d/2] in `dtype`, radians per position; attention factor). Plain RoPE: theta^(-2i/d) and 1.
    Whoever has better wavelengths [d/2] or logarithms than the C library's can bring them.
    """
    d = config.head_dim
    if wavelengths is None:
        wavelengths = wavelengths_of(config, dtype)
    if config.rope_scaling is None:
        return 1.0 / wavelengths, 1.0
    scaling = config.rope_scaling
    extrapolated, interpolated = 1.0 / wavelengths, 1.0 / (scaling.factor * wavelengths)
    low, high = yarn_range(config, log)
    ramp = torch.clamp((torch.arange(d // 2, dtype=dtype) - low) / (high - low), 0, 1)
    keep = (
        1 - ramp
    )  # 1: fast dimensions, left alone; 0: slow dimensions, interpolated by the factor
    return interpolated * (1 - keep) + extrapolated * keep, yarn_attention_factor(scaling, log)


def yarn_range(
    config: ModelConfig, log: Callable[[float], float] = math.log
) -> tuple[float, float]:
    """First and last dimension pair of the ramp: those that turn beta_fast and beta_slow times in the original
    context (YaRN, section 3.2)."""
    scaling, d = config.rope_scaling, config.head_dim

    def dimension(rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return d * log(turns) / (2 * log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    return low, (high + 0.001 if low == high else high)


def yarn_attention_factor(scaling: RopeScaling, log: Callable[[float], float] = math.log) -> float:
    """The factor on cos and sin, and so its square on every score (YaRN, section 3.4)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def mscale(weight: float = 1.0) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return float(mscale(scaling.mscale) / mscale(scaling.mscale_all_dim))
    return mscale()


def rotary_table(config: ModelConfig, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0..length-1, each [length, d] in `dtype`, both halves of d alike.

    Computed in float32 and rounded once, as transformers does; in float64 throughout for a float64 model.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    inv_freq, factor = inverse_frequencies(config, compute)
    angles = (
        torch.arange(length, dtype=torch.int64).to(compute)[:, None] * inv_freq
    )  # [length, d/2]
    angles = torch.cat((angles, angles), dim=-1)  # [length, d]
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(x1, x2) -> (-x2, x1) over the halves of the last dimension: Qwen pairs i with i + d/2."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
