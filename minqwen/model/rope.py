"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and YaRN (arXiv:2309.00071).

The formulas and their order are those of transformers' `modeling_rope_utils.py`, so that float32
tables have its bits. YaRN is static: the same frequencies and the same scale at every position of
every prompt. Tables are made on the CPU, whatever torch's default device is, and moved after that:
another device's pow, cos and sin have other bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minqwen.config import ModelConfig, RopeScaling

Log = Callable[[float], float]


def wavelengths_of(config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """theta^(2i/d): positions per radian of each pair of dimensions. [d/2]"""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu")
    exponents = pairs.to(dtype) / config.head_dim
    wavelengths: Tensor = config.rope_theta**exponents
    return wavelengths


def inverse_frequencies(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    wavelengths: Tensor | None = None,
    log: Log = math.log,
) -> tuple[Tensor, float]:
    """Angles per position, and the factor on cos and sin.

    Returns (inv_freq [d/2] in `dtype`, radians per position; attention factor). Plain RoPE has
    theta^(-2i/d) and 1. A caller may bring wavelengths [d/2] and logarithms that are better than
    those of the C library.
    """
    if wavelengths is None:
        wavelengths = wavelengths_of(config, dtype)
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / wavelengths, 1.0
    extrapolated, interpolated = 1.0 / wavelengths, 1.0 / (scaling.factor * wavelengths)
    low, high = yarn_range(config.head_dim, config.rope_theta, scaling, log)
    pairs = torch.arange(config.head_dim // 2, dtype=dtype, device="cpu")
    ramp = torch.clamp((pairs - low) / (high - low), 0, 1)
    # 1 for fast dimensions, which are left alone; 0 for slow ones, which the factor interpolates.
    keep = 1 - ramp
    frequencies = interpolated * (1 - keep) + extrapolated * keep
    return frequencies, yarn_attention_factor(scaling, log)


def yarn_range(
    head_dim: int, theta: float, scaling: RopeScaling, log: Log = math.log
) -> tuple[float, float]:
    """First and last dimension pair of the ramp (YaRN, section 3.2).

    They are the pairs that turn beta_fast and beta_slow times within the original context.
    """

    def pair(rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * log(turns) / (2 * log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, (high + 0.001 if low == high else high)


def yarn_attention_factor(scaling: RopeScaling, log: Log = math.log) -> float:
    """The factor on cos and sin, and so its square on every score (YaRN, section 3.4)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def mscale(weight: float = 1.0) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return float(mscale(scaling.mscale) / mscale(scaling.mscale_all_dim))
    return mscale()


def rotary_table(
    config: ModelConfig,
    length: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0..length-1, each [length, d] in `dtype`, both halves of d alike.

    They are computed in float32 and rounded once, as transformers does; for a float64 model they
    are computed in float64 throughout. On `device`: the last bits of a cosine are its library's.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    inv_freq, factor = inverse_frequencies(config, compute)
    positions = torch.arange(length, dtype=torch.int64, device="cpu").to(compute)
    angles = positions[:, None] * inv_freq  # [length, d/2]
    angles = torch.cat((angles, angles), dim=-1).to(device)  # [length, d]
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def table_length(length: int) -> int:
    """How many positions a table gets that must have `length`: the next power of two.

    So a table that grows with a context is made again only when the context has doubled.
    """
    return 1 << (length - 1).bit_length()


def rotate_half(x: Tensor) -> Tensor:
    """(x1, x2) -> (-x2, x1) over the halves of the last dimension: Qwen pairs i with i + d/2."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
