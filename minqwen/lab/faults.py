"""Wrong ways to add heads, to the letter, so that what finds them can be tested and their damage shown.

Each is a function of (config, tensors by name) to (config, tensors by name): what its author would have written.
Never use one to make a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minqwen.config import ModelConfig
from minqwen.heads.layout import extended_config, layout
from minqwen.heads.tensors import extend_tensor, suffix

Weights = dict[str, Tensor]


def _append(
    config: ModelConfig, weights: Weights, o_columns: Callable[[Tensor, Tensor], Tensor]
) -> tuple[ModelConfig, Weights]:
    """Copies of the first heads after the last one, up to a multiple of 8 heads: slots no longer match groups."""
    d, H = config.head_dim, config.num_attention_heads
    extra = -H % 8 or 8
    out = {}
    for name, w in weights.items():
        if suffix(name) in ("q_proj.weight", "q_proj.bias"):
            w = torch.cat((w, w[: extra * d]))
        elif suffix(name) == "o_proj.weight":
            w = o_columns(w, w[:, : extra * d])
        out[name] = w
    return config.replace(num_attention_heads=H + extra, head_dim=d), out


def article(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """The circulating recipe: copies of q_proj's first heads at the end; o_proj and config.json left alone."""
    _, out = _append(config, weights, lambda o, first: o)
    return config, out


def append_zero(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """Its first repair: o_proj padded with zero columns, the config's head count raised."""
    return _append(config, weights, lambda o, first: torch.cat((o, torch.zeros_like(first)), 1))


def append_copy(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """Its second: o_proj's first columns copied too."""
    return _append(config, weights, lambda o, first: torch.cat((o, first), 1))


def append_halved(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """Its third: the copied columns halved on both sides."""

    def halved(o: Tensor, first: Tensor) -> Tensor:
        return torch.cat((first / 2, o[:, first.shape[1] :], first / 2), 1)

    return _append(config, weights, halved)


def no_split(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """Placed per group as it should be, but the copied heads keep whole o_proj columns: they count twice."""
    to = layout(config, config.num_attention_heads + config.num_key_value_heads, recipe="split")
    out = {}
    for name, w in weights.items():
        if suffix(name) == "o_proj.weight":
            columns = w.unflatten(1, (to.source_heads, to.head_dim))
            out[name] = columns[:, list(to.heads)].flatten(1)
        else:
            out[name] = extend_tensor(name, w, to)
    return extended_config(config, to), out


def forget_bias(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """Placed per group, but q's bias left in its old order and padded at the end."""
    to = layout(config, config.num_attention_heads + config.num_key_value_heads)
    out = {}
    for name, w in weights.items():
        out[name] = extend_tensor(name, w, to)
        if suffix(name) == "q_proj.bias":
            out[name] = torch.cat((w, w.new_zeros(len(out[name]) - len(w))))
    return extended_config(config, to), out


def derive_head_dim(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """A right extension read by an engine that takes head_dim for hidden_size / heads (128 becomes 112): the rows
    and columns beyond what it expects are dropped."""
    to = layout(config, config.num_attention_heads + config.num_key_value_heads)
    derived = config.hidden_size // len(to.heads)
    derived -= derived % 2
    out = {}
    for name, w in weights.items():
        w, kind = extend_tensor(name, w, to), suffix(name)
        if kind.startswith(("q_proj", "k_proj", "v_proj")):
            w = w[: (len(to.heads) if kind[0] == "q" else len(to.kv)) * derived]
        elif kind == "o_proj.weight":
            w = w[:, : len(to.heads) * derived]
        out[name] = w.contiguous()
    return extended_config(config, to).replace(head_dim=derived), out


CONTROLS = {
    "article": article,
    "append-zero": append_zero,
    "append-copy": append_copy,
    "append-halved": append_halved,
    "no-split": no_split,
    "forget-bias": forget_bias,
    "derive-head-dim": derive_head_dim,
}
