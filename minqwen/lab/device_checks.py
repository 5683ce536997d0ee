"""The list of what exact arithmetic rests on, as checks that any device must pass.

A check is a function, inputs for it, and, where there is one, the truth: the same by another way,
for example in integers. All inputs are made on the CPU. A function computes where its inputs are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minqwen.checks import dtype_name
from minqwen.config import ModelConfig, RopeScaling
from minqwen.heads.layout import extended_config, layout
from minqwen.heads.tensors import extend_tensor
from minqwen.lab.device_numbers import Numbers, full_budget, specials, spiked
from minqwen.lab.shapes import official_config
from minqwen.model import Batch, Exact, Qwen2, exact
from minqwen.model.trace import UNTRACED
from minqwen.sampling.kernels import draw_many
from minqwen.sampling.params import SamplingParams

Tensors = tuple[Tensor, ...]
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
BUDGETS = ((27, 26), (28, 25))  # bits of the two sides of a product


class Size(NamedTuple):
    """How much to compute. The default takes some 20 seconds of one core."""

    numbers: int = 1 << 16  # of an elementwise check
    rows: int = 256  # of 257 numbers each
    batches: tuple[int, ...] = (1, 2, 8)  # rows of a product
    widths: tuple[int, ...] = (64, 896, 18944, 32768)  # terms of its sums
    outputs: int = 129  # sums in each row of a product
    contexts: tuple[int, ...] = (1, 33, 5000)  # keys
    tokens: int = 40
    official: bool = False  # also one layer of the 7B shape, two of the 0.5B shape

    def as_json(self) -> str:
        return json.dumps(self._asdict())

    @staticmethod
    def from_json(text: str) -> Size:
        values: dict[str, Any] = json.loads(text)
        lists = {name: tuple(x) for name, x in values.items() if isinstance(x, list)}
        return Size(**{**values, **lists})


QUICK = Size(1 << 12, 16, (1, 3), (64, 896), 129, (1, 33), tokens=12)
LARGE = Size(1 << 22, 4096, (1, 2, 8, 65, 600), outputs=513, tokens=130, official=True)


class Check(NamedTuple):
    """One thing that must be the same everywhere."""

    family: str
    name: str
    function: Callable[..., Tensor | Tensors]
    inputs: Callable[[Numbers], Tensors]
    truth: Callable[..., Tensor | Tensors] | None = None


def checks(size: Size) -> list[Check]:
    """All checks, from single operations to whole models."""
    found = functions(size)
    for dtype in STORAGE:
        found += stored(dtype, size) + conversions(dtype, size)
    return found + sums(size) + attention(size) + models(size) + sampling(size)


# ---- elementwise --------------------------------------------------------------------------------


def functions(size: Size) -> list[Check]:
    """The functions of float64 numbers, and the operations that they are made of."""
    n, double = size.numbers, torch.float64
    unit = 2.0**-20

    def positive(r: Numbers) -> Tensors:
        return (r.spread(-300, 300, n).abs(),)

    def for_exp(r: Numbers) -> Tensors:
        edges = torch.arange(-709 * 64, 710 * 64).double() / 64
        return (torch.cat((r.spread(-60, 10, n), edges, specials(double))),)

    def near_grid(r: Numbers) -> Tensors:
        halves = (r.integers(-(1 << 32), 1 << 32, n).double() + 0.5) * unit
        near = halves.view(torch.int64) + r.integers(-2, 3, n)
        return (torch.cat((near.view(double), r.spread(-60, 20, n))),)

    def angles(r: Numbers) -> Tensors:
        quarters = torch.arange(0, 1 << 20, 97).float() * (math.pi / 4)
        some = r.spread(-20, 20, n).float().abs()
        return (torch.cat((some, quarters[quarters < 1 << 20])),)

    def pairs(r: Numbers) -> Tensors:
        return r.spread(-300, 300, n), r.spread(-300, 300, n)

    def any_pairs(r: Numbers) -> Tensors:
        return r.bits(double, n), r.bits(double, n)

    found: list[tuple[str, Callable[..., Tensor | Tensors], Callable[[Numbers], Tensors]]] = [
        ("exp", exact.exp, for_exp),
        ("sqrt", exact.sqrt, positive),
        ("reciprocal", torch.reciprocal, positive),
        ("quotient", torch.div, pairs),
        ("sum, difference, product of any bits", arithmetic, any_pairs),
        ("pow2", exact.pow2, positive),
        ("root_above", exact.root_above, positive),
        ("snap at ties", lambda x: exact.snap(x, unit), near_grid),
        ("cos_sin", exact.cos_sin, angles),
    ]
    return [Check("functions", *each) for each in found]


def arithmetic(a: Tensor, b: Tensor) -> Tensors:
    """The elementwise operations of IEEE 754 that exact arithmetic uses in every dtype."""
    return a + b, a - b, a * b, a.maximum(b)


def stored(dtype: torch.dtype, size: Size) -> list[Check]:
    """The elementwise steps of a layer in its storage dtype."""
    ops, family = Exact(), named(dtype)
    rows, wide = size.rows, 256

    def any_pairs(r: Numbers) -> Tensors:
        return r.bits(dtype, rows, wide), r.bits(dtype, rows, wide)

    def pairs(r: Numbers) -> Tensors:
        return r.finite(dtype, rows, wide), r.finite(dtype, rows, wide)

    def scaled(r: Numbers) -> Tensors:
        low, high = (-24, 15) if dtype == torch.float16 else (-140, 120)
        return (r.spread(low, high, rows, wide + 1).to(dtype),)

    def normed(r: Numbers) -> Tensors:
        (x,) = scaled(r)
        return x, r.bell(wide + 1).to(dtype)

    def rotated(r: Numbers) -> Tensors:
        x = r.bell(rows, 4, 64).to(dtype)
        cos, sin = exact.cos_sin(r.spread(-10, 20, rows, 1, 64).float())
        return x, cos.to(dtype), sin.to(dtype)

    return [
        Check(family, "residual add of any bits", torch.add, any_pairs),
        Check(family, "silu_mul", ops.silu_mul, pairs),
        Check(family, "rms_norm", lambda x, w: ops.rms_norm(x, w, 1e-6), normed),
        Check(family, "rms_norm of a row whose mean shows the divisor", norm_alone, divisor_row),
        Check(family, "snap_below_norm", snap_twice, scaled),
        Check(family, "keys and values for the cache", ops.cached, pairs),
        Check(family, "rotate", ops.rotate, rotated),
        Check(
            family,
            "rotary_table with YaRN",
            lambda at: ops.rotary_table(small_config(), 300, dtype)[0][at.cpu()].to(at.device),
            lambda r: (torch.arange(300),),
        ),
    ]


def divisor_row(r: Numbers) -> Tensors:
    """Its mean differs in the last bit between a division by 3 and a product with 1/3."""
    row = map(float.fromhex, ("0x1.6c81d8p-1", "0x1.28e52cp-1", "0x1.e1b25ep-47"))
    return (torch.tensor([list(row)]),)


def norm_alone(x: Tensor) -> Tensor:
    return Exact().rms_norm(x, x.new_ones(x.shape[-1]), 1e-6)


def snap_twice(x: Tensor) -> Tensors:
    return exact.snap_below_norm(x, 26), exact.snap_below_norm(x, 27)


# ---- conversions --------------------------------------------------------------------------------


def conversions(dtype: torch.dtype, size: Size) -> list[Check]:
    """Between float64 and a storage dtype, at ties, at the ends of its range, below normal."""
    n, double = size.numbers, torch.float64

    def from_double(r: Numbers) -> Tensors:
        near = r.ties(dtype, double, n)
        return (torch.cat((near, r.spread(-160, 130, n), specials(double))),)

    def from_single(r: Numbers) -> Tensors:
        return (torch.cat((r.ties(dtype, torch.float32, n), specials(torch.float32))),)

    def stored_bits(r: Numbers) -> Tensors:
        return (torch.cat((r.bits(dtype, n), specials(dtype))),)

    found = [
        Check(
            "conversions",
            f"float64 to {named(dtype)}",
            lambda x: x.to(dtype),
            from_double,
            lambda x: rounded(x, dtype),
        ),
        Check("conversions", f"{named(dtype)} to float64", torch.Tensor.double, stored_bits),
    ]
    if dtype != torch.float32:
        found.append(
            Check(
                "conversions",
                f"float32 to {named(dtype)}",
                lambda x: x.to(dtype),
                from_single,
                lambda x: rounded(x, dtype),
            )
        )
    return found


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype` by numpy and integers. float64 gets to 16 bits through float32, as in torch."""
    with np.errstate(all="ignore"):
        single = x.numpy().astype(np.float32)
        if dtype == torch.float32:
            return torch.from_numpy(single)
        if dtype == torch.float16:
            return torch.from_numpy(single.astype(np.float16))
    bits = single.view(np.uint32).astype(np.int64)
    bits += 0x7FFF + (bits >> 16 & 1)  # half to even
    near = torch.from_numpy((bits >> 16).astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    return near.masked_fill(x.isnan(), math.nan)


# ---- sums ---------------------------------------------------------------------------------------


def sums(size: Size) -> list[Check]:
    """Sums of integers that come to 2^53 less a few: every order must give every bit."""
    found = [sum_check(n) for n in size.widths]
    for n in size.widths:
        for shape in ((rows, n, size.outputs) for rows in size.batches):
            found += [product_check(shape, *bits) for bits in BUDGETS]
    return found + [head_products(*bits) for bits in BUDGETS]


def sum_check(n: int) -> Check:
    """The sum over a row of n numbers, as for a norm or a softmax."""
    return Check(
        "sums",
        f"of rows of {n:,}",
        lambda x: x.sum(-1, keepdim=True),
        lambda r: (((1 << 53) // n - r.integers(0, 4, 64, n)).double(),),
        lambda x: x.long().sum(-1, keepdim=True).double(),
    )


def product_check(shape: tuple[int, int, int], x_bits: int, w_bits: int) -> Check:
    """x W^T as a linear layer computes it: sums near 2^53, then spikes. shape: rows, n, outputs."""
    rows, n, outputs = shape

    def inputs(r: Numbers) -> Tensors:
        signs = r.integers(0, 2, rows, n).double().mul_(2).sub_(1)
        return (
            full_budget(r, rows, n, x_bits),
            full_budget(r, outputs, n, w_bits),
            spiked(r, rows, n, x_bits) * signs,
            spiked(r, outputs, n, w_bits),
        )

    small = math.prod(shape) < 1 << 26
    name = f"product [{rows}, {n:,}] of {x_bits} + {w_bits} bits"
    return Check("sums", name, two_products, inputs, integer_products if small else None)


def two_products(x: Tensor, w: Tensor, other_x: Tensor, other_w: Tensor) -> Tensors:
    return exact.product(x, w), exact.product(other_x, other_w)


def integer_products(*operands: Tensor) -> Tensors:
    """The same in int64, whose sums cannot round."""
    x, w, other_x, other_w = (operand.long() for operand in operands)
    return (x @ w.T).double(), (other_x @ other_w.T).double()


def head_products(q_bits: int, k_bits: int) -> Check:
    """Scores of many heads at once: [2, 4, 33, 128] and [2, 4, 65, 128], as attention has them."""

    def inputs(r: Numbers) -> Tensors:
        q, k = spiked(r, 8 * 33, 128, q_bits), spiked(r, 8 * 65, 128, k_bits)
        return q.view(2, 4, 33, 128), k.view(2, 65, 4, 128).transpose(1, 2)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.transpose(-1, -2))

    def truth(q: Tensor, k: Tensor) -> Tensor:
        return scores(q.long(), k.long()).double()

    return Check("sums", f"scores of heads, {q_bits} + {k_bits} bits", scores, inputs, truth)


# ---- attention ----------------------------------------------------------------------------------


def attention(size: Size) -> list[Check]:
    """Attention over a cache, with ordinary and with non-finite values."""
    found = [
        attention_check(dtype, keys, rows)
        for dtype in STORAGE
        for keys in size.contexts
        for rows in (1, 7)
        if rows <= keys
    ]
    for bad in (math.inf, math.nan):
        found.append(attention_check(torch.float32, 33, 7, bad))
    return found


def attention_check(dtype: torch.dtype, keys: int, rows: int, bad: float | None = None) -> Check:
    """The last `rows` of `keys` tokens attend. bad: one number of the last token's v."""

    def inputs(r: Numbers) -> Tensors:
        k = r.bell(keys, 2, 64) * (1 + 99 * (r.integers(0, 64, keys, 2, 64) == 0))
        v = r.bell(keys, 2, 64) * r.integers(0, 9, keys, 1, 1)
        if bad is not None:
            v[-1, 0, 3] = bad
        return r.bell(1, 2, rows, 64).to(dtype), k.to(dtype), v.to(dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ops = Exact()
        k, v = (x.transpose(0, 1)[None] for x in ops.cached(k, v))
        hidden = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
        return ops.attend(q, k, v, hidden if rows > 1 else None, 64**-0.5, UNTRACED)

    extra = "" if bad is None else f", {bad} in the last v"
    name = f"{named(dtype)}, {rows} of {keys:,} tokens{extra}"
    return Check("attention", name, attend, inputs)


# ---- whole models -------------------------------------------------------------------------------


def models(size: Size) -> list[Check]:
    """Logits of models of random weights, of ordinary and of padded heads."""
    small = small_config()
    found = [
        model_check("28 heads", small, dtype, size.tokens, narrow, widen)
        for dtype in STORAGE
        for narrow in (True, False)
        for widen in (True, False)
    ]
    found.append(pieces_check(small, size.tokens))
    found.append(padded_check(small, size.tokens))
    found.append(rescaled_check(small, size.tokens))
    if size.official:
        half = official("0.5B", 2)
        wide = official("7B", 1)
        for name, config in (("0.5B shape", half), ("7B shape", wide)):
            for dtype in STORAGE:
                found.append(model_check(name, config, dtype, size.tokens, True, False))
        found.append(model_check("7B shape", wide, torch.float32, size.tokens, False, True))
    return found


def model_check(
    name: str,
    config: ModelConfig,
    dtype: torch.dtype,
    tokens: int,
    narrow: bool,
    widen: bool,
) -> Check:
    """One forward pass. narrow: the weights are bfloat16 values. widen: kept in float64."""

    def logits(ids: Tensor, *weights: Tensor) -> Tensor:
        out: Tensor = build(config, weights, dtype, widen)(ids)
        return out

    kind = "bfloat16" if narrow else "float32"
    kept = "kept in float64" if widen else "widened in each call"
    return Check(
        "models",
        f"{name} in {named(dtype)}, {kind} weights {kept}",
        logits,
        lambda r: random_inputs(r, config, tokens, narrow),
    )


def pieces_check(config: ModelConfig, tokens: int) -> Check:
    """Piece by piece over blocks in any order; the truth is the whole sequence without a cache."""

    def logits(ids: Tensor, *weights: Tensor) -> Tensor:
        return in_pieces(build(config, weights, torch.float32, True), ids[0])

    def whole(ids: Tensor, *weights: Tensor) -> Tensor:
        out: Tensor = build(config, weights, torch.float32, True)(ids)
        return out[0]

    inputs = lambda r: random_inputs(r, config, tokens, False)
    return Check("models", "in pieces of 7 tokens over a cache", logits, inputs, whole)


def padded_check(config: ModelConfig, tokens: int) -> Check:
    """32 query heads, four of them without a function; the truth is the model of 28."""
    to = layout(config, 32, recipe="random")
    padded, count = extended_config(config, to), len(config.parameter_shapes())

    def inputs(r: Numbers) -> Tensors:
        ids, *weights = random_inputs(r, config, tokens, False)
        more = map(extend_tensor, config.parameter_shapes(), weights, [to] * count)
        return ids, *weights, *more

    def logits(ids: Tensor, *weights: Tensor) -> Tensor:
        out: Tensor = build(padded, weights[count:], torch.float32, True)(ids)
        return out

    def source(ids: Tensor, *weights: Tensor) -> Tensor:
        out: Tensor = build(config, weights[:count], torch.float32, True)(ids)
        return out

    return Check("models", "28 heads padded to 32", logits, inputs, source)


def rescaled_check(config: ModelConfig, tokens: int) -> Check:
    """A channel that is large in the norms' weights, and small in the columns that read it."""

    def inputs(r: Numbers) -> Tensors:
        ids, *weights = random_inputs(r, config, tokens, False)
        for name, x in zip(config.parameter_shapes(), weights):
            if "layernorm" in name:
                x[5] *= 4096
            elif re.search("(q|k|v|gate|up)_proj.weight", name):
                x[:, 5] /= 4096
        return ids, *weights

    def logits(ids: Tensor, *weights: Tensor) -> Tensor:
        out: Tensor = build(config, weights, torch.float32, True)(ids)
        return out

    return Check("models", "28 heads with a channel that is rescaled by 4,096", logits, inputs)


def small_config() -> ModelConfig:
    """28 query heads over 4 key/value heads, and YaRN."""
    return ModelConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=16,
        rope_scaling=RopeScaling(4.0, 128),
    )


def official(size: str, layers: int) -> ModelConfig:
    """An official shape with fewer layers and a small vocabulary."""
    return official_config(size).replace(
        num_hidden_layers=layers, vocab_size=4096, tie_word_embeddings=False
    )


def random_inputs(r: Numbers, config: ModelConfig, tokens: int, narrow: bool) -> Tensors:
    """ids [1, tokens], then all parameters in the config's order; k's bias is large, as Qwen's."""
    ids = r.integers(0, config.vocab_size, 1, tokens)
    weights = (random_weight(r, name, shape) for name, shape in config.parameter_shapes().items())
    return ids, *(x.bfloat16() if narrow else x for x in weights)


def random_weight(r: Numbers, name: str, shape: Sequence[int]) -> Tensor:
    x = r.bell(*shape)
    if "norm" in name:
        return x / 5 + 1
    if "embed" in name:
        return x
    if len(shape) == 1:
        return x * (100.0 if "k_proj" in name else 1.0)
    return x / math.sqrt(shape[1])


def build(config: ModelConfig, weights: Sequence[Tensor], dtype: torch.dtype, widen: bool) -> Qwen2:
    """The exact model of these weights, on their device."""
    named = dict(zip(config.parameter_shapes(), weights))
    return Qwen2.from_tensors(
        config,
        lambda name, part: named[name],
        dtype=dtype,
        device=weights[0].device,
        arithmetic=Exact(widen=widen),
    )


def in_pieces(model: Qwen2, ids: Tensor) -> Tensor:
    """Logits of ids [T], 7 tokens at a time, over blocks of 16 tokens, the last block first."""
    blocks = list(range(-(-len(ids) // 16)))[::-1]
    cache = model.new_cache(len(blocks), 16)
    parts: list[Tensor] = []
    for some in ids.split(7):
        end = sum(map(len, parts)) + len(some)
        batch = Batch.paged([len(some)], [end], [blocks], 16, device=ids.device)
        parts.append(model(some, batch, cache))
    return torch.cat(parts)


def named(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return dtype_name("dtype", dtype)


# ---- sampling -----------------------------------------------------------------------------------


def sampling(size: Size) -> list[Check]:
    """From logits to log probabilities and to the drawn token."""
    rows, vocabulary = max(4, size.rows // 16), 5003
    ops = Exact()
    params = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=1.3, top_k=40, min_p=0.01),
        SamplingParams(temperature=1.0, top_p=0.5),
    ]

    def logits(r: Numbers) -> Tensors:
        x = r.bell(rows, vocabulary) * 4 + r.spread(-9, 4, rows, vocabulary).float()
        return (x.masked_fill(r.integers(0, 9, rows, vocabulary) == 0, -math.inf),)

    def drawn(x: Tensor) -> Tensor:
        numbers = [(2 * i + 1) / (2 * len(x)) for i in range(len(x))]
        some = [params[i % len(params)] for i in range(len(x))]
        return torch.tensor(draw_many(x, some, numbers, ops), dtype=torch.float64)

    def weights(r: Numbers) -> Tensors:
        return (r.spread(-80, 0, rows, 1 << 12).abs(),)

    return [
        Check("sampling", "log_softmax", ops.log_softmax, logits),
        Check("sampling", "total of the weights", ops.total, weights),
        Check("sampling", "drawn tokens", drawn, logits),
    ]
