"""Mistakes planted in transformers' own Qwen2: a second implementation of minqwen's catalogue.

Nothing of minqwen is imported here. Each mistake is made with what transformers is made of: its
functions are replaced (`patched`), its modules, buffers, config or weights changed. So what finds
mistakes is tested with wrong numbers that the catalogue itself has not computed, and the catalogue
is tested too. Attention must be eager.

benchmarks/planted.py loads this file by its path, because nothing imports tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen2 import modeling_qwen2 as qwen2

BLOCK = 16  # tokens of a block of the cache and of a chunk
LOST = 4  # tokens at the end of a chunk that are not written


class Planted(NamedTuple):
    """One mistake. name: the catalogue's. first: where a dump of transformers shows it first.

    plant: changes a float32 model in place. functions: those of transformers that are replaced, by
    name; each replacement is called with the original before its arguments. needs: whether a config
    of transformers makes it possible. faint: too small to be seen in bfloat16.
    """

    name: str
    first: str
    plant: Callable[[nn.Module], None] = lambda model: None
    functions: dict[str, Callable] = {}
    needs: Callable[[object], bool] = lambda config: True
    faint: bool = False


@contextmanager
def broken(planted: Planted, model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """A copy of a float32 model in `dtype`, with the mistake, as long as the context lasts."""
    model = copy.deepcopy(model)
    planted.plant(model)
    rotary = model.model.rotary_emb
    frequencies = rotary.inv_freq
    model.to(dtype)
    rotary.inv_freq = frequencies  # from_pretrained(dtype=...) does not round them
    with patched(planted.functions):
        yield model


@contextmanager
def patched(functions: dict[str, Callable]) -> Iterator[None]:
    if not functions:
        yield
        return
    (name, wrong), *rest = functions.items()
    right = getattr(qwen2, name)
    with patch.object(qwen2, name, lambda *args, **kw: wrong(right, *args, **kw)):
        with patched(dict(rest)):
            yield


def attentions(model):
    return [layer.self_attn for layer in model.model.layers]


def mlps(model):
    return [layer.mlp for layer in model.model.layers]


def norms(model):
    pairs = [(x.input_layernorm, x.post_attention_layernorm) for x in model.model.layers]
    return [norm for pair in pairs for norm in pair] + [model.model.norm]


def has_yarn(config):
    return config.rope_parameters["rope_type"] == "yarn"


def tied(config):
    return config.tie_word_embeddings


# ---- rotary position embedding ------------------------------------------------------------------


def interleaved(right, q, k, cos, sin, unsqueeze_dim=1):
    """Meta's: two neighbours are a complex number."""
    half = cos.shape[-1] // 2
    turn = torch.complex(cos[..., :half].float(), sin[..., :half].float())[:, None]

    def turned(x):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (half, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    return turned(q), turned(k)


def half_backwards(right, x):
    return -right(x)


def rotary_forward(change):
    """rotary_emb called with other positions: (positions) to positions."""

    def plant(model):
        rotary = model.model.rotary_emb
        right = rotary.forward
        rotary.forward = lambda x, position_ids: right(x, change(position_ids))

    return plant


def table_interleaved(model):
    rotary = model.model.rotary_emb

    def forward(x, position_ids):
        freqs = position_ids[..., None].float() * rotary.inv_freq
        emb = freqs.repeat_interleave(2, dim=-1)
        scale = rotary.attention_scaling
        return (emb.cos() * scale).to(x.dtype), (emb.sin() * scale).to(x.dtype)

    rotary.forward = forward


def one_ahead(model):
    """cos and sin of both positions in one: the first half is for keys, the second for queries."""
    rotary = model.model.rotary_emb
    right = rotary.forward

    def forward(x, position_ids):
        tables = zip(right(x, position_ids), right(x, position_ids + 1), strict=True)
        return tuple(torch.cat(pair, -1) for pair in tables)

    rotary.forward = forward


def turned_apart(right, q, k, cos, sin, unsqueeze_dim=1):
    (cos_k, cos_q), (sin_k, sin_q) = cos.chunk(2, -1), sin.chunk(2, -1)
    return right(q, q, cos_q, sin_q)[0], right(k, k, cos_k, sin_k)[1]


def other_rope(**changes):
    """The rotary module of a config with other rope_parameters."""

    def plant(model):
        config = copy.deepcopy(model.config)
        config.rope_parameters = {**config.rope_parameters, **changes}
        model.model.rotary_emb = qwen2.Qwen2RotaryEmbedding(config)

    return plant


def attention_scaling(change):
    def plant(model):
        rotary = model.model.rotary_emb
        rotary.attention_scaling = change(rotary.attention_scaling)

    return plant


def frequencies_in_bfloat16(model):
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.to(torch.bfloat16).to(torch.float32)


def all_frequencies_divided(model):
    factor = model.config.rope_parameters["factor"]
    other_rope(rope_type="default")(model)
    model.model.rotary_emb.inv_freq /= factor


# ---- attention ----------------------------------------------------------------------------------


def eager(
    before=lambda key, value: (key, value),
    mask=lambda mask: mask,
    product=lambda product: product,
    softmax=lambda scores: F.softmax(scores, dim=-1, dtype=torch.float32),
    after=lambda z: z.transpose(1, 2),
):
    """eager_attention_forward, written anew with a mistake in one of its steps."""

    def forward(right, module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        key, value = before(key, value)
        key = qwen2.repeat_kv(key, module.num_key_value_groups)
        value = qwen2.repeat_kv(value, module.num_key_value_groups)
        scores = product(torch.matmul(query, key.transpose(2, 3))) * scaling
        attention_mask = mask(attention_mask)
        if attention_mask is not None:
            scores = scores + attention_mask
        pattern = softmax(scores).to(query.dtype)
        return after(torch.matmul(pattern, value)).contiguous(), pattern

    return {"eager_attention_forward": forward}


def padded(right, module, query, key, value, attention_mask, scaling, **kwargs):
    """Keys and values of zeros up to a multiple of 16, which the mask does not hide."""
    length = key.shape[2]
    more = (0, 0, 0, -length % 16)
    attention_mask = F.pad(attention_mask, (0, -length % 16))
    z, pattern = right(
        module, query, F.pad(key, more), F.pad(value, more), attention_mask, scaling, **kwargs
    )
    return z, pattern[..., :length]


def sees_next(mask):
    lowest = torch.finfo(mask.dtype).min
    return torch.full_like(mask, lowest).triu(2)


def window(model):
    """As transformers itself does it, where use_sliding_window is true."""
    config = model.config
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    config.sliding_window = WINDOW
    model.model.has_sliding_layers = True


WINDOW = 8  # of the models that this is planted in


def tiled(right, hidden_states, n_rep):
    return hidden_states.repeat(1, n_rep, 1, 1)


def stale(key, value):
    """[B, K, L, d]: block 1 holds block 0's tokens."""

    def held(x):
        blocks = list(x.split(BLOCK, dim=2))
        if len(blocks) > 1:
            blocks[1] = blocks[0][:, :, : blocks[1].shape[2]]
        return torch.cat(blocks, dim=2)

    return held(key), held(value)


def tail_lost(key, value):
    position = torch.arange(key.shape[2])
    kept = (position < BLOCK - LOST) | (position >= BLOCK)
    return key * kept[:, None].to(key.dtype), value * kept[:, None].to(key.dtype)


def held_in_int8(*held):
    def rounded(x):
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        return torch.round(x / scale).clamp(-127, 127).to(torch.int8).to(x.dtype) * scale

    return [rounded(x) for x in held]


def held_in_float8(*held):
    return [x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(x.dtype) for x in held]


def scale(change):
    def plant(model):
        for attention in attentions(model):
            attention.scaling = change(model.config)

    return plant


# ---- norms, MLP, residual stream ----------------------------------------------------------------


def norm_forward(formula):
    """Every norm computes formula(float32 input, weight, eps)."""

    def plant(model):
        for norm in norms(model):
            norm.forward = lambda x, norm=norm: formula(
                x.float(), norm.weight, norm.variance_epsilon
            ).to(x.dtype)

    return plant


def outside_root(x, weight, eps):
    return weight * (x / (x.square().mean(-1, keepdim=True).sqrt() + eps)).to(weight.dtype)


def layer_norm(x, weight, eps):
    return weight * F.layer_norm(x, x.shape[-1:], eps=eps).to(weight.dtype)


def narrow_mean(x, weight, eps):
    narrow = x.to(torch.bfloat16)
    variance = (narrow * narrow).mean(-1, keepdim=True).float()
    return weight * (x * torch.rsqrt(variance + eps)).to(weight.dtype)


def other_eps(model):
    for norm in norms(model):
        norm.variance_epsilon = 1e-5


def plus_one(model):
    for norm in norms(model):
        norm.weight.data = 1 + norm.weight.data


def no_final_norm(model):
    model.model.norm = nn.Identity()


def two_final_norms(model):
    right = model.model.norm.forward
    model.model.norm.forward = lambda x: right(right(x))


def with_gelu(model):
    for mlp in mlps(model):
        mlp.act_fn = nn.GELU()


def residual_after_norm(model):
    for layer in model.model.layers:

        def forward(x, layer=layer, **kwargs):
            x = layer.input_layernorm(x)
            x = x + layer.self_attn(hidden_states=x, **kwargs)[0]
            x = layer.post_attention_layernorm(x)
            return x + layer.mlp(x)

        layer.forward = forward


# ---- weights ------------------------------------------------------------------------------------


def each(list_modules, change):
    def plant(model):
        for module in list_modules(model):
            change(module)

    return plant


def zero_bias(name):
    return each(attentions, lambda attention: getattr(attention, name).bias.data.zero_())


def exchanged(modules, a, b):
    def change(module):
        first, second = getattr(module, a), getattr(module, b)
        setattr(module, a, second)
        setattr(module, b, first)

    return each(modules, change)


def first_heads_exchanged(attention):
    order = list(range(attention.config.num_attention_heads))
    order[:2] = [1, 0]
    for parameter in attention.q_proj.parameters():
        parameter.data = parameter.data.unflatten(0, (len(order), -1))[order].flatten(0, 1)


def biases_twice(attention):
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.bias.data *= 2


def halves_exchanged(attention):
    first, second = attention.o_proj.weight.data.chunk(2, dim=1)
    attention.o_proj.weight.data = torch.cat((second, first), dim=1)


def first_rank_only(projection):
    """A row-parallel layer whose second rank is not added."""

    def forward(x):
        return F.linear(x.chunk(2, -1)[0], projection.weight.chunk(2, 1)[0])

    projection.forward = forward


def row_parallel(model):
    return [x.o_proj for x in attentions(model)] + [x.down_proj for x in mlps(model)]


def embedding_shifted(model):
    weight = model.model.embed_tokens.weight
    weight.data = weight.data[[-1, *range(len(weight) - 1)]]
    if model.config.tie_word_embeddings:
        model.lm_head.weight = weight


def head_shifted(model):
    weight = model.lm_head.weight
    weight.data = weight.data[[-1, *range(len(weight) - 1)]]


def head_is_embedding(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def in_integers(bits, group):
    """Every linear layer of the layers, rounded to `bits`; group: inputs that share a scale."""
    largest = 2 ** (bits - 1) - 1

    def rounded(w):
        scale = w.abs().amax(dim=1, keepdim=True) / largest if group else w.abs().max() / largest
        return torch.round(w / scale.clamp_min(1e-30)).clamp(-largest, largest) * scale

    def plant(model):
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                w = module.weight.data.double()
                parts = w.split(group, dim=1) if group else [w]
                module.weight.data = torch.cat([rounded(part) for part in parts], dim=1).float()

    return plant


def flushed(model):
    for parameter in model.parameters():
        half = parameter.data.to(torch.float16)
        half[parameter.data.abs() < torch.finfo(torch.float16).smallest_normal] = 0
        parameter.data = half.float()


# ---- the table ----------------------------------------------------------------------------------

AT = SimpleNamespace(
    q="layers.0.attn.q",
    k="layers.0.attn.k",
    v="layers.0.attn.v",
    rot_q="layers.0.attn.rot_q",
    scores="layers.0.attn.scores",
    pattern="layers.0.attn.pattern",
    z="layers.0.attn.z",
    out="layers.0.attn.out",
    norm1="layers.0.norm1",
)

PLANTED = [
    Planted("rope-interleaved", AT.rot_q, functions={"apply_rotary_pos_emb": interleaved}),
    Planted("rope-table-interleaved", AT.rot_q, table_interleaved),
    Planted("rope-backwards", AT.rot_q, functions={"rotate_half": half_backwards}),
    Planted("rope-theta-10000", AT.rot_q, other_rope(rope_theta=1e4)),
    Planted("rope-frequencies-bfloat16", AT.rot_q, frequencies_in_bfloat16, faint=True),
    Planted("positions-from-one", AT.rot_q, rotary_forward(lambda positions: positions + 1)),
    Planted(
        "query-one-ahead", AT.rot_q, one_ahead, functions={"apply_rotary_pos_emb": turned_apart}
    ),
    Planted("positions-restarted", AT.rot_q, rotary_forward(lambda positions: positions % BLOCK)),
    Planted(
        "position-skipped-in-chunk",
        AT.rot_q,
        rotary_forward(lambda positions: positions + positions // BLOCK),
    ),
    Planted("yarn-off", AT.rot_q, other_rope(rope_type="default"), needs=has_yarn),
    Planted("yarn-no-attention-factor", AT.rot_q, attention_scaling(lambda f: 1.0), needs=has_yarn),
    Planted(
        "yarn-attention-factor-twice", AT.rot_q, attention_scaling(lambda f: f * f), needs=has_yarn
    ),
    Planted(
        "yarn-attention-factor-half",
        AT.rot_q,
        attention_scaling(lambda f: float(torch.tensor(f).half())),
        needs=has_yarn,
        faint=True,
    ),
    Planted("yarn-linear", AT.rot_q, all_frequencies_divided, needs=has_yarn),
    Planted("q-bias-missing", AT.q, zero_bias("q_proj")),
    Planted("k-bias-missing", AT.k, zero_bias("k_proj")),
    Planted("v-bias-missing", AT.v, zero_bias("v_proj")),
    Planted("k-v-exchanged", AT.k, exchanged(attentions, "k_proj", "v_proj")),
    Planted("heads-tiled", AT.scores, functions={"repeat_kv": tiled}),
    Planted("heads-exchanged", AT.q, each(attentions, first_heads_exchanged)),
    Planted("heads-not-transposed", AT.z, functions=eager(after=lambda z: z)),
    Planted("scale-missing", AT.scores, scale(lambda config: 1.0)),
    Planted("scale-of-hidden-size", AT.scores, scale(lambda config: config.hidden_size**-0.5)),
    Planted("mask-sees-next", AT.scores, functions=eager(mask=sees_next)),
    Planted("mask-missing", AT.scores, functions=eager(mask=lambda mask: None)),
    Planted("padding-attended", AT.pattern, functions={"eager_attention_forward": padded}),
    Planted("sliding-window", AT.scores, window),
    Planted(
        "softmax-bfloat16",
        AT.pattern,
        functions=eager(softmax=lambda scores: F.softmax(scores, dim=-1, dtype=torch.bfloat16)),
        faint=True,
    ),
    Planted(
        "scores-float16",
        AT.scores,
        functions=eager(product=lambda product: product.half().to(product.dtype)),
        faint=True,
    ),
    Planted("norm-eps-1e-5", AT.norm1, other_eps, faint=True),
    Planted("norm-eps-outside-root", AT.norm1, norm_forward(outside_root), faint=True),
    Planted("norm-subtracts-mean", AT.norm1, norm_forward(layer_norm)),
    Planted("norm-one-plus-weight", AT.norm1, plus_one),
    Planted("norm-reduced-bfloat16", AT.norm1, norm_forward(narrow_mean), faint=True),
    Planted("final-norm-missing", "final_norm", no_final_norm),
    Planted("final-norm-twice", "final_norm", two_final_norms),
    Planted("gate-up-exchanged", "layers.0.mlp.gate", exchanged(mlps, "gate_proj", "up_proj")),
    Planted("gelu", "layers.0.mlp.act", with_gelu),
    Planted("residual-after-norm", "layers.0.resid_mid", residual_after_norm),
    Planted("head-tied", "logits", head_is_embedding, needs=lambda config: not tied(config)),
    Planted("embedding-rows-shifted", "embed", embedding_shifted),
    Planted("head-rows-shifted", "logits", head_shifted, needs=lambda config: not tied(config)),
    Planted("stale-block", AT.scores, functions=eager(before=stale)),
    Planted("chunk-tail-lost", AT.scores, functions=eager(before=tail_lost)),
    Planted("kv-cache-int8", AT.scores, functions=eager(before=held_in_int8), faint=True),
    Planted("kv-cache-float8", AT.scores, functions=eager(before=held_in_float8)),
    Planted("shard-exchanged", AT.out, each(attentions, halves_exchanged)),
    Planted("shard-not-added", AT.out, each(row_parallel, first_rank_only)),
    Planted("bias-on-every-rank", AT.q, each(attentions, biases_twice)),
    Planted("weights-int8-per-group", AT.q, in_integers(8, 128), faint=True),
    Planted("weights-int8-per-tensor", AT.q, in_integers(8, None), faint=True),
    Planted("weights-int4-per-group", AT.q, in_integers(4, 128)),
    Planted("weights-int4-per-tensor", AT.q, in_integers(4, None)),
    Planted("weights-float16-flushed", "embed", flushed, faint=True),
]
