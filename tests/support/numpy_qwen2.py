"""A second Qwen2 in plain numpy and float64, written from the published formulas, not from minqwen.

It reads one sequence, without cache or batch, with a loop over the heads: there is as little code
as possible between the reader and the mathematics. The tests compare float64 logits with it.

RMSNorm: arXiv:1910.07467. RoPE: arXiv:2104.09864, written here as a rotation of the complex plane.
YaRN: arXiv:2309.00071. SwiGLU: arXiv:2002.05202.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Config = dict[str, Any]  # a config.json with head_dim and rope_parameters
Weights = dict[str, Array]  # by Hugging Face name


def frequencies(c: Config) -> tuple[Array, float]:
    """(radians per position [d/2], factor on the rotated vectors)."""
    rope, d = c["rope_parameters"], c["head_dim"]
    k = np.arange(d // 2)
    plain: Array = rope["rope_theta"] ** (-2.0 * k / d)
    if rope["rope_type"] == "default":
        return plain, 1.0
    s, original = rope["factor"], rope["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        """The pair of dimensions, as a real number, that turns so often in the original context."""
        return float(d * np.log(original / (2 * np.pi * times)) / (2 * np.log(rope["rope_theta"])))

    low = max(np.floor(pair_that_turns(32.0)), 0)
    high = min(np.ceil(pair_that_turns(1.0)), d - 1)
    width = high - low if high != low else 0.001
    interpolated = np.clip((k - low) / width, 0.0, 1.0)  # the share of interpolation
    factor = 1.0 if s <= 1 else 1 + 0.1 * np.log(s)
    return plain * (1 - interpolated) + plain / s * interpolated, factor


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    mean_square: Array = (x**2).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * weight


def attention(c: Config, w: Weights, x: Array) -> Array:
    """x [T, D] -> [T, D]."""
    T, d, H, K = len(x), c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    q, k, v = (x @ w[f"{n}_proj.weight"].T + w[f"{n}_proj.bias"] for n in "qkv")
    radians, factor = frequencies(c)
    turn = factor * np.exp(1j * np.arange(T)[:, None] * radians)

    def rotated(head: Array) -> Array:
        """Dimensions i and i + d/2 are the two parts of one complex number."""
        z = (head[:, : d // 2] + 1j * head[:, d // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    out = []
    for h in range(H):
        kv_head = h // (H // K)
        mine, theirs = slice(h * d, (h + 1) * d), slice(kv_head * d, (kv_head + 1) * d)
        scores = rotated(q[:, mine]) @ rotated(k[:, theirs]).T / np.sqrt(d)
        scores[np.triu_indices(T, 1)] = -np.inf
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out.append(p / p.sum(axis=1, keepdims=True) @ v[:, theirs])
    return np.concatenate(out, axis=1) @ w["o_proj.weight"].T


def mlp(w: Weights, x: Array) -> Array:
    gate, up = x @ w["gate_proj.weight"].T, x @ w["up_proj.weight"].T
    return gate / (1 + np.exp(-gate)) * up @ w["down_proj.weight"].T


def qwen2(c: Config, weights: Weights, ids: list[int]) -> Array:
    """Logits [T, V] of token ids [T]."""

    def under(prefix: str) -> Weights:
        inside = [name for name in weights if name.startswith(prefix)]
        return {name.removeprefix(prefix): weights[name] for name in inside}

    x, eps = weights["model.embed_tokens.weight"][ids], c["rms_norm_eps"]
    for i in range(c["num_hidden_layers"]):
        w = under(f"model.layers.{i}.")
        normed = rms_norm(x, w["input_layernorm.weight"], eps)
        x = x + attention(c, under(f"model.layers.{i}.self_attn."), normed)
        normed = rms_norm(x, w["post_attention_layernorm.weight"], eps)
        x = x + mlp(under(f"model.layers.{i}.mlp."), normed)
    x = rms_norm(x, weights["model.norm.weight"], eps)
    head = "model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"
    return x @ weights[head].T
