"""A step of fast arithmetic as plain functions over tensors: what a GPU compiles and captures.

The definition of the model is qwen2.py. These few functions compute the same, so that
`torch.compile` sees nothing but tensors: no modules, hooks or taps, and each layer's weights as
arguments, so that one compiled function serves all layers. A sum and the norm after it are in one
function, since they are compiled into one kernel. Under tensor parallelism the partial results meet
between two functions.

Attention of sequences that bring one token reads the blocks where they lie
(`torch.nn.attention.flex_attention`, arXiv:2412.05496). That of longer ones is FlashAttention
(arXiv:2307.08691) over all sequences of the step at once (`torch.nn.attention.varlen`).

Shapes: T tokens, B sequences with one new token each, D hidden, H query heads, K key/value heads,
G = H / K, d head_dim, P blocks of S tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from minqwen.model.arithmetic import Linear, Native, is_watched
from minqwen.model.fast import Fast, Joined
from minqwen.model.packed import Whole
from minqwen.model.qwen2 import Layer, Qwen2

QUERY_TILE = 128  # rows of a tile of flex_attention's masks; a power of two from 16 on
FUSED_HEAD_DIMS = (16, 32, 64, 128, 256)  # what torch's fused attention takes unpadded


class Weights(NamedTuple):
    """Of linear layers with one input: one matrix [out, in], and their biases [out] or None."""

    matrix: Tensor
    bias: Tensor | None


class LayerWeights(NamedTuple):
    norm1: Tensor
    qkv: Weights
    o: Weights
    norm2: Tensor
    gate_up: Weights
    down: Weights


class Shape(NamedTuple):
    """What the functions must know of a model besides its tensors. heads: this rank's."""

    head_dim: int
    kv_heads: int
    sizes: tuple[int, int, int]  # outputs of q, k and v
    eps: float
    scale: float


class Blocks(NamedTuple):
    """Where B sequences have their keys and values.

    tables [B, most blocks], counts [B] of blocks in use, last [B] the last block, and filled [B]
    how many of its tokens are there; all int32. size: S.
    """

    tables: Tensor
    counts: Tensor
    last: Tensor
    filled: Tensor
    size: int


def shape_of(model: Qwen2) -> Shape:
    layer = model.model.layers[0]
    assert isinstance(layer, Layer)
    attention = layer.self_attn
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    sizes = (q.out_features, k.out_features, v.out_features)
    d = model.config.head_dim
    return Shape(d, sizes[1] // d, sizes, model.config.rms_norm_eps, model.ops.attention_scale(d))


# ---- the parts of a layer --------------------------------------------------------------------


def times(x: Tensor, weights: Weights) -> Tensor:
    """x W^T + b. [T, in] -> [T, out]."""
    return F.linear(x, weights.matrix, weights.bias)


def heads(
    ops: Native,
    shape: Shape,
    x: Tensor,
    delta: Tensor,
    layer: LayerWeights,
    rotary: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The residual stream x + delta [T, D], and q [T, H, d], k and v [T, K, d] of it, rotated.

    rotary: cos and sin [T, 1, d].
    """
    x = x + delta
    joined = times(ops.rms_norm(x, layer.norm1, shape.eps), layer.qkv)
    q, k, v = (y.unflatten(-1, (-1, shape.head_dim)) for y in joined.split(shape.sizes, -1))
    cos, sin = rotary
    return x, ops.rotate(q, cos, sin), ops.rotate(k, cos, sin), v


def one_token(
    ops: Native,
    shape: Shape,
    x: Tensor,
    delta: Tensor,
    layer: LayerWeights,
    rotary: Sequence[Tensor],
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    blocks: Blocks,
    options: Any,
) -> tuple[Tensor, Tensor]:
    """The residual stream, and what attention adds to it; of one token of each sequence.

    keys, values [P S, K, d]: this layer's part of the cache, which gets the new ones at `slots`.
    options: flex_attention's `kernel_options`.
    """
    x, q, k, v = heads(ops, shape, x, delta, layer, rotary)
    keys.index_copy_(0, slots, k)
    values.index_copy_(0, slots, v)
    rows = q.view(len(q), shape.kv_heads, -1, shape.head_dim)
    z = attend_blocks(rows, keys, values, blocks, shape.scale, options)
    return x, times(z.reshape(len(q), -1), layer.o)


def attend_blocks(
    q: Tensor, keys: Tensor, values: Tensor, blocks: Blocks, scale: float, options: Any
) -> Tensor:
    """One token of each sequence against its context. q [B, K, G, d] -> [B, K, G, d].

    The query heads of a group are the rows against one key/value head. Only the last block of a
    sequence has places that must not be seen. They must be finite: their weight is 0, and 0 times
    NaN is NaN.
    """
    # Here, because it takes half as long to import as torch itself, and few need it.
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    last, filled, size = blocks.last, blocks.filled, blocks.size

    def seen(sequence: Tensor, head: Tensor, row: Tensor, place: Tensor) -> Tensor:
        return (place // size != last[sequence]) | (place % size < filled[sequence])

    mask = BlockMask.from_kv_blocks(
        blocks.counts[:, None, None],
        blocks.tables[:, None, None],
        BLOCK_SIZE=(QUERY_TILE, size),
        mask_mod=seen,
        seq_lengths=(q.shape[2], len(keys)),
        compute_q_blocks=False,
    )
    k, v = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]  # [1, K, P S, d]
    z: Tensor = flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=options)
    return z


def mlp(
    ops: Native, shape: Shape, x: Tensor, delta: Tensor, layer: LayerWeights
) -> tuple[Tensor, Tensor]:
    """The residual stream x + delta, and what the MLP adds to it. [T, D] each."""
    x = x + delta
    gate, up = times(ops.rms_norm(x, layer.norm2, shape.eps), layer.gate_up).chunk(2, -1)
    return x, times(F.silu(gate) * up, layer.down)


def last(
    ops: Native, shape: Shape, x: Tensor, delta: Tensor, norm: Tensor, head: Weights
) -> Tensor:
    """The head's output [N, V / size] of a residual stream x + delta [N, D]."""
    return times(ops.rms_norm(x + delta, norm, shape.eps), head)


# ---- attention of several tokens ---------------------------------------------------------------


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest: tuple[int, int],
    scale: float,
) -> Tensor:
    """Causal attention of sequences that lie one after another. q [T, H, d] -> [T, H, d].

    k, v [all contexts, K, d]. query_starts, key_starts [B + 1] int32. longest: the most new tokens
    of a sequence, and the longest context. A sequence's last query sees all its keys. Other
    sequences are never read; a NaN in a sequence's own hidden keys would pass, but then its own
    last token is NaN too, and the engine keeps nothing of it.
    """
    from torch.nn.attention import varlen  # here for the same reason as in `attend_blocks`

    z = varlen.varlen_attn(
        *(q, k, v, query_starts, key_starts, *longest),
        scale=scale,
        window_size=(-1, 0),
        **_grouped(varlen.varlen_attn),
    )
    assert isinstance(z, Tensor)  # alone, as nothing else was asked for
    return z


def _grouped(function: Callable[..., Any]) -> dict[str, Any]:
    """Later versions of torch want to be told that there are fewer key/value heads."""
    known = inspect.signature(function).parameters
    return {"enable_gqa": True} if "enable_gqa" in known else {}


# ---- the model's weights as these functions want them --------------------------------------------


class ModelWeights(NamedTuple):
    layers: list[LayerWeights]
    norm: Tensor
    head: Weights


def weights_of(model: Qwen2) -> ModelWeights | None:
    """The model's weights; None where they are not all here and packed as fast arithmetic does.

    They are the model's own tensors: what is written into one of them counts at once. One that is
    replaced does not, and `Changes` sees it.
    """
    if type(model.ops) is not Fast or model.config.head_dim not in FUSED_HEAD_DIMS:
        return None
    layers = []
    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        found = [_joined(linears) for linears in layer.by_input()]
        if None in found:
            return None
        qkv, o, gate_up, down = (weights for weights in found if weights is not None)
        if model.mesh.size > 1 and (o.bias is not None or down.bias is not None):
            return None  # each rank would add it
        norm1, norm2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        layers.append(LayerWeights(norm1, qkv, o, norm2, gate_up, down))
    head = _joined([model.lm_head])
    return None if head is None else ModelWeights(layers, model.model.norm.weight, head)


def _joined(linears: Sequence[Linear]) -> Weights | None:
    """The weights of these layers as one; None if they are in another form, or watched."""
    first, packed = linears[0], linears[0].packed
    if isinstance(packed, Joined):
        if isinstance(packed.form, Whole) and packed.serves(linears):
            return Weights(packed.form.packed, packed.bias)
        return None
    if len(linears) == 1 and first.is_here and not is_watched(first):
        return Weights(first.weight, first.bias)
    return None
