"""A second Qwen2, in plain numpy and float64, written from the published formulas and not from minqwen.

One sequence, no cache, no batch, one loop per head: as little code as possible between the reader and the
mathematics. The tests compare float64 logits with it. RMSNorm: arXiv:1910.07467; RoPE: arXiv:2104.09864 (here
as what it is, a rotation of the complex plane); YaRN: arXiv:2309.00071; SwiGLU: arXiv:2002.05202.
"""

import numpy as np


def frequencies(c):
    """(radians per position [d/2], factor on the rotated vectors) of a config.json dict with rope_parameters."""
    rope, d = c["rope_parameters"], c["head_dim"]
    k = np.arange(d // 2)
    plain = rope["rope_theta"] ** (-2.0 * k / d)
    if rope["rope_type"] == "default":
        return plain, 1.0
    s, original = rope["factor"], rope["original_max_position_embeddings"]

    def pair_that_turns(r):  # r times in the original context, as a real number
        return d * np.log(original / (2 * np.pi * r)) / (2 * np.log(rope["rope_theta"]))

    low = max(np.floor(pair_that_turns(32.0)), 0)
    high = min(np.ceil(pair_that_turns(1.0)), d - 1)
    slow = np.clip(
        (k - low) / (high - low if high != low else 0.001), 0.0, 1.0
    )  # share of interpolation
    return plain * (1 - slow) + plain / s * slow, 1.0 if s <= 1 else 1 + 0.1 * np.log(s)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def attention(c, w, x):
    """x [T, D] -> [T, D]."""
    T, d, H, K = len(x), c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    q, k, v = (x @ w[f"{n}_proj.weight"].T + w[f"{n}_proj.bias"] for n in "qkv")
    radians, factor = frequencies(c)
    turn = factor * np.exp(1j * np.arange(T)[:, None] * radians)

    def rotated(head):  # dimension i and i + d/2 are one complex number
        z = (head[:, : d // 2] + 1j * head[:, d // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    out = []
    for h in range(H):
        mine, theirs = slice(h * d, (h + 1) * d), slice(h // (H // K) * d, (h // (H // K) + 1) * d)
        scores = rotated(q[:, mine]) @ rotated(k[:, theirs]).T / np.sqrt(d)
        scores[np.triu_indices(T, 1)] = -np.inf
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out.append(p / p.sum(axis=1, keepdims=True) @ v[:, theirs])
    return np.concatenate(out, axis=1) @ w["o_proj.weight"].T


def mlp(w, x):
    gate, up = x @ w["gate_proj.weight"].T, x @ w["up_proj.weight"].T
    return gate / (1 + np.exp(-gate)) * up @ w["down_proj.weight"].T


def qwen2(c, weights, ids):
    """Logits [T, V] of token ids [T]. c: config.json with head_dim; weights: Hugging Face name -> float64 array."""

    def under(prefix):
        return {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith(prefix)
        }

    x, eps = weights["model.embed_tokens.weight"][ids], c["rms_norm_eps"]
    for i in range(c["num_hidden_layers"]):
        w = under(f"model.layers.{i}.")
        x = x + attention(
            c, under(f"model.layers.{i}.self_attn."), rms_norm(x, w["input_layernorm.weight"], eps)
        )
        x = x + mlp(
            under(f"model.layers.{i}.mlp."), rms_norm(x, w["post_attention_layernorm.weight"], eps)
        )
    x = rms_norm(x, weights["model.norm.weight"], eps)
    return (
        x @ weights["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"].T
    )
