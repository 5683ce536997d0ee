"""A catalogue of things that people get wrong, each as a small variant of a right model.

What finds mistakes is tested with them, and their damage can be shown. So far these are wrong ways
to add heads. Never use one to make a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minqwen.config import ModelConfig
from minqwen.heads.layout import derived_head_dim, extended_config, layout
from minqwen.heads.tensors import extend_tensor, suffix

Weights = dict[str, Tensor]
Variant = tuple[ModelConfig, Weights]


@dataclass(frozen=True)
class Fault:
    """what: one sentence on what its author would have written.

    apply: (config, tensors by name) of the right model to those of the wrong one.
    """

    name: str
    what: str
    apply: Callable[[ModelConfig, Weights], Variant]


def _article(config: ModelConfig, weights: Weights) -> Variant:
    wide = {name: _append_queries(config, name, w) for name, w in weights.items()}
    return config, wide


def _append_zero(config: ModelConfig, weights: Weights) -> Variant:
    return _append(config, weights, lambda o, first: torch.cat((o, torch.zeros_like(first)), 1))


def _append_copy(config: ModelConfig, weights: Weights) -> Variant:
    return _append(config, weights, lambda o, first: torch.cat((o, first), 1))


def _append_halved(config: ModelConfig, weights: Weights) -> Variant:
    def halved(o: Tensor, first: Tensor) -> Tensor:
        return torch.cat((first / 2, o[:, first.shape[1] :], first / 2), 1)

    return _append(config, weights, halved)


def _append(
    config: ModelConfig, weights: Weights, o_columns: Callable[[Tensor, Tensor], Tensor]
) -> Variant:
    """Copies of the first heads after the last one: slots no longer match their groups.

    o_columns: (o_proj's weight, its columns of the copied heads) to the new weight.
    """
    d, extra = config.head_dim, _appended_heads(config)
    wide = {}
    for name, w in weights.items():
        if suffix(name) == "o_proj.weight":
            wide[name] = o_columns(w, w[:, : extra * d])
        else:
            wide[name] = _append_queries(config, name, w)
    return config.replace(num_attention_heads=config.num_attention_heads + extra, head_dim=d), wide


def _append_queries(config: ModelConfig, name: str, w: Tensor) -> Tensor:
    if suffix(name) not in ("q_proj.weight", "q_proj.bias"):
        return w
    return torch.cat((w, w[: _appended_heads(config) * config.head_dim]))


def _appended_heads(config: ModelConfig) -> int:
    """How many heads are missing to the next multiple of 8."""
    return -config.num_attention_heads % 8 or 8


def _no_split(config: ModelConfig, weights: Weights) -> Variant:
    heads = config.num_attention_heads + config.num_key_value_heads
    to = layout(config, heads, recipe="split")
    wide = {}
    for name, w in weights.items():
        if suffix(name) == "o_proj.weight":
            columns: Tensor = w.unflatten(1, (to.source_heads, to.head_dim))
            wide[name] = columns[:, list(to.heads)].flatten(1)
        else:
            wide[name] = extend_tensor(name, w, to)
    return extended_config(config, to), wide


def _forget_bias(config: ModelConfig, weights: Weights) -> Variant:
    to = layout(config, config.num_attention_heads + config.num_key_value_heads)
    wide = {}
    for name, w in weights.items():
        wide[name] = extend_tensor(name, w, to)
        if suffix(name) == "q_proj.bias":
            wide[name] = torch.cat((w, w.new_zeros(len(wide[name]) - len(w))))
    return extended_config(config, to), wide


def _derive_head_dim(config: ModelConfig, weights: Weights) -> Variant:
    to = layout(config, config.num_attention_heads + config.num_key_value_heads)
    target = extended_config(config, to)
    derived = derived_head_dim(target)
    derived -= derived % 2
    sizes = {"q_proj": len(to.heads), "k_proj": len(to.kv), "v_proj": len(to.kv)}
    wide = {}
    for name, w in weights.items():
        w = extend_tensor(name, w, to)
        projection = suffix(name).partition(".")[0]
        if projection in sizes:
            w = w[: sizes[projection] * derived]
        elif projection == "o_proj":
            w = w[:, : len(to.heads) * derived]
        wide[name] = w.contiguous()
    return target.replace(head_dim=derived), wide


HEAD_FAULTS = {
    fault.name: fault
    for fault in (
        Fault(
            "article",
            "The circulating recipe: append copies of q_proj's first heads, and leave o_proj and "
            "config.json alone.",
            _article,
        ),
        Fault(
            "append-zero",
            "Its first repair: pad o_proj with zero columns and raise the config's head count.",
            _append_zero,
        ),
        Fault(
            "append-copy",
            "Its second repair: append copies of o_proj's first columns too.",
            _append_copy,
        ),
        Fault(
            "append-halved",
            "Its third repair: halve the copied columns of o_proj on both sides.",
            _append_halved,
        ),
        Fault(
            "no-split",
            "Place the copies per group, as it should be, but give each of them whole o_proj "
            "columns, so that the copied heads count twice.",
            _no_split,
        ),
        Fault(
            "forget-bias",
            "Place the copies per group, but leave q's bias in its old order and pad it with "
            "zeros at the end.",
            _forget_bias,
        ),
        Fault(
            "derive-head-dim",
            "Read a right extension with head_dim = hidden_size / heads (128 becomes 112), and "
            "drop the rows and columns beyond what that expects.",
            _derive_head_dim,
        ),
    )
}
