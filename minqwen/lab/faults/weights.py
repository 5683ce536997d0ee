"""Mistakes in config.json and in the weights, as they are read, split or stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minqwen.config import ModelConfig
from minqwen.heads.layout import derived_head_dim
from minqwen.heads.tensors import suffix
from minqwen.lab.faults.fault import Need, Variant, Weights

Change = Callable[[ModelConfig, Weights], Variant]

BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
ROW_PARALLEL = ("o_proj.weight", "down_proj.weight")
MATRICES = (
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "o_proj.weight",
    "gate_proj.weight",
    "up_proj.weight",
    "down_proj.weight",
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GROUP = 128  # inputs that share a scale, in AWQ's and GPTQ's usual layout
SMALLEST_HALF = 2.0**-14  # the smallest normal number of float16
INITIAL = 0.02  # spread of weights that were never loaded, transformers' initializer_range

OTHER_THETA = Need("another rope_theta than 10,000", lambda config: config.rope_theta != 1e4)
OTHER_EPS = Need("another rms_norm_eps than 1e-5", lambda config: config.rms_norm_eps != 1e-5)
TIED = Need("tied embeddings", lambda config: config.tie_word_embeddings)
UNTIED = Need("a head of its own", lambda config: not config.tie_word_embeddings)
SEVERAL_HEADS = Need("several query heads", lambda config: config.num_attention_heads > 1)
EVEN_HEADS = Need(
    "an even number of query heads", lambda config: config.num_attention_heads % 2 == 0
)
WIDER_HEADS = Need(
    "a head_dim above hidden_size / num_attention_heads",
    lambda config: 2 <= derived_head_dim(config) < config.head_dim,
)


def each(suffixes: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> Change:
    """The change of every tensor whose name ends so."""

    def changed(config: ModelConfig, weights: Weights) -> Variant:
        return config, {
            name: change(w) if suffix(name) in suffixes else w for name, w in weights.items()
        }

    return changed


def missing(name: str) -> Change:
    return each((name,), torch.zeros_like)


def exchanged(a: str, b: str) -> Change:
    """Two linear layers of one input in each other's place."""

    def partner(name: str) -> str:
        if f".{a}." in name:
            return name.replace(f".{a}.", f".{b}.")
        return name.replace(f".{b}.", f".{a}.")

    def changed(config: ModelConfig, weights: Weights) -> Variant:
        return config, {name: weights[partner(name)] for name in weights}

    return changed


# ---- config.json --------------------------------------------------------------------------------


def eps_of_llama(config: ModelConfig, weights: Weights) -> Variant:
    return config.replace(rms_norm_eps=1e-5), weights


def head_dim_derived(config: ModelConfig, weights: Weights) -> Variant:
    """head_dim = hidden_size / heads, and whatever rows and columns are beyond are dropped."""
    derived = derived_head_dim(config)
    wrong = config.replace(head_dim=derived - derived % 2)
    return wrong, cut_heads(wrong, weights)


def cut_heads(config: ModelConfig, weights: Weights) -> Weights:
    """q, k, v and o without the rows and columns that `config` does not expect."""
    rows = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    cut = {}
    for name, w in weights.items():
        projection = suffix(name).partition(".")[0]
        if projection in rows:
            w = w[: rows[projection]]
        elif suffix(name) == "o_proj.weight":
            w = w[:, : config.q_size]
        cut[name] = w.contiguous()
    return cut


# ---- which weights ------------------------------------------------------------------------------


def first_heads_exchanged(config: ModelConfig, weights: Weights) -> Variant:
    """Query heads 0 and 1 in each other's place; o_proj's columns stay."""
    d = config.head_dim

    def exchange(w: Tensor) -> Tensor:
        return torch.cat((w[d : 2 * d], w[:d], w[2 * d :]))

    return each(("q_proj.weight", "q_proj.bias"), exchange)(config, weights)


def one_plus_norms(config: ModelConfig, weights: Weights) -> Variant:
    """Added in float32, as Gemma does: in 16 bits the sum would be rounded in every model."""

    def one_plus(w: Tensor) -> Tensor:
        return w.to(torch.promote_types(w.dtype, torch.float32)) + 1

    return config, {name: one_plus(w) if "norm" in name else w for name, w in weights.items()}


def head_tied(config: ModelConfig, weights: Weights) -> Variant:
    return config, {**weights, HEAD: weights[EMBEDDING]}


def head_never_loaded(config: ModelConfig, weights: Weights) -> Variant:
    generator = torch.Generator().manual_seed(0)
    shape = weights[EMBEDDING].shape
    head = torch.randn(shape, generator=generator) * INITIAL
    return config.replace(tie_word_embeddings=False), {**weights, HEAD: head}


def rows_shifted(name: str) -> Change:
    """Each token has the row of the token before it."""

    def changed(config: ModelConfig, weights: Weights) -> Variant:
        return config, {**weights, name: weights[name].roll(1, 0)}

    return changed


# ---- shards of two ranks ------------------------------------------------------------------------


def halves_exchanged(w: Tensor) -> Tensor:
    """Each of two ranks has the columns of the other."""
    return w.roll(w.shape[1] // 2, 1)


def second_half_missing(w: Tensor) -> Tensor:
    """The sum lacks what the second of two ranks adds."""
    w = w.clone()
    w[:, w.shape[1] // 2 :] = 0
    return w


def twice(w: Tensor) -> Tensor:
    return w * 2


# ---- fewer bits ---------------------------------------------------------------------------------


def quantised(bits: int, group: int | None) -> Change:
    """The layers' matrices as signed integers, a scale for each `group` of inputs or one for all.

    Round to nearest, symmetric: the simplest of all methods.
    """

    def rounded(w: Tensor) -> Tensor:
        wide = w.double()
        if group is None:
            return to_integers(wide, bits, wide.abs().amax())
        parts = wide.split(group, dim=1)
        return torch.cat([to_integers(p, bits, p.abs().amax(1, keepdim=True)) for p in parts], 1)

    return each(MATRICES, rounded)


def to_integers(w: Tensor, bits: int, largest: Tensor) -> Tensor:
    step = largest.clamp_min(torch.finfo(w.dtype).tiny) / (2 ** (bits - 1) - 1)
    rounded: Tensor = (w / step).round() * step
    return rounded


def flushed_to_half(config: ModelConfig, weights: Weights) -> Variant:
    """All weights in float16, numbers below its smallest normal one as zero."""
    return config, {
        name: w.masked_fill(w.abs() < SMALLEST_HALF, 0).half() for name, w in weights.items()
    }
