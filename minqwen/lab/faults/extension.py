"""Wrong ways to add heads; docs/head-extension.md has the right ones. Make no checkpoint so."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minqwen.config import ModelConfig
from minqwen.heads.layout import derived_head_dim, extended_config, layout
from minqwen.heads.tensors import extend_tensor, suffix
from minqwen.lab.faults.fault import Need, Variant, Weights
from minqwen.lab.faults.weights import cut_heads

NEXT_MULTIPLE = Need(
    "key/value heads that divide the next multiple of 8",
    lambda config: wider_count(config) % config.num_key_value_heads == 0,
)
WIDER_HEADS = Need(
    "a head_dim above hidden_size / (query heads + key/value heads)",
    lambda config: 2 <= config.hidden_size // one_more_each(config) < config.head_dim,
)


def wider_count(config: ModelConfig) -> int:
    """The next number of heads that is a multiple of 8."""
    return config.num_attention_heads + appended_heads(config)


def appended_heads(config: ModelConfig) -> int:
    """How many heads are missing to the next multiple of 8."""
    return -config.num_attention_heads % 8 or 8


def one_more_each(config: ModelConfig) -> int:
    """The number of query heads with one more in each group."""
    return config.num_attention_heads + config.num_key_value_heads


def article(config: ModelConfig, weights: Weights) -> Variant:
    wide = {name: _append_queries(config, name, w) for name, w in weights.items()}
    return config, wide


def append_zero(config: ModelConfig, weights: Weights) -> Variant:
    return _append(config, weights, lambda o, first: torch.cat((o, torch.zeros_like(first)), 1))


def append_copy(config: ModelConfig, weights: Weights) -> Variant:
    return _append(config, weights, lambda o, first: torch.cat((o, first), 1))


def append_halved(config: ModelConfig, weights: Weights) -> Variant:
    def halved(o: Tensor, first: Tensor) -> Tensor:
        return torch.cat((first / 2, o[:, first.shape[1] :], first / 2), 1)

    return _append(config, weights, halved)


def _append(
    config: ModelConfig, weights: Weights, o_columns: Callable[[Tensor, Tensor], Tensor]
) -> Variant:
    """Copies of the first heads after the last one: slots no longer match their groups.

    o_columns: (o_proj's weight, its columns of the copied heads) to the new weight.
    """
    d, extra = config.head_dim, appended_heads(config)
    wide = {}
    for name, w in weights.items():
        if suffix(name) == "o_proj.weight":
            wide[name] = o_columns(w, w[:, : extra * d])
        else:
            wide[name] = _append_queries(config, name, w)
    return config.replace(num_attention_heads=wider_count(config), head_dim=d), wide


def _append_queries(config: ModelConfig, name: str, w: Tensor) -> Tensor:
    if suffix(name) not in ("q_proj.weight", "q_proj.bias"):
        return w
    return torch.cat((w, w[: appended_heads(config) * config.head_dim]))


def no_split(config: ModelConfig, weights: Weights) -> Variant:
    to = layout(config, one_more_each(config), recipe="split")
    wide = {}
    for name, w in weights.items():
        if suffix(name) == "o_proj.weight":
            columns: Tensor = w.unflatten(1, (to.source_heads, to.head_dim))
            wide[name] = columns[:, list(to.heads)].flatten(1)
        else:
            wide[name] = extend_tensor(name, w, to)
    return extended_config(config, to), wide


def forget_bias(config: ModelConfig, weights: Weights) -> Variant:
    to = layout(config, one_more_each(config))
    wide = {}
    for name, w in weights.items():
        wide[name] = extend_tensor(name, w, to)
        if suffix(name) == "q_proj.bias":
            wide[name] = torch.cat((w, w.new_zeros(len(wide[name]) - len(w))))
    return extended_config(config, to), wide


def derive_head_dim(config: ModelConfig, weights: Weights) -> Variant:
    to = layout(config, one_more_each(config))
    target = extended_config(config, to)
    derived = derived_head_dim(target)
    wrong = target.replace(head_dim=derived - derived % 2)
    wide = {name: extend_tensor(name, w, to) for name, w in weights.items()}
    return wrong, cut_heads(wrong, wide)
