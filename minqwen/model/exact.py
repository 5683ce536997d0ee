"""Exact: sums whose order cannot matter, so that logits are the same bits everywhere, by construction.

Floating-point addition rounds, so the last bits of a matrix product depend on how the kernel tiles it, and with
it on the batch, the number of threads, the tensor-parallel degree, the library, the device. Here the rounding
is done *before* the sum: operands are snapped to a grid, an integer number of units (a power of two), so coarse
that every product and every partial sum, in whatever order, is an integer of at most 2^53 product units. float64
holds those without rounding. What is left of rounding is elementwise IEEE 754, which is the same on any machine.

Units are fixed by the values, never by shapes. Two vectors' units follow from their 2-norms: by Cauchy and
Schwarz any partial sum of x . w is at most |x| |w|, so `bits(x) + bits(w) = 53` below the norms is enough for
any length, and zeros (padded heads) change nothing. The budget of every sum, in bits:

    sum                   terms are multiples of                       largest sum
    linear                |x| 2^-28 times |w| 2^-25, per row           28 + 25 = 53
    scores q . k          |q| 2^-27 times |k| 2^-26, per head          27 + 26 = 53
    softmax denominator   2^-36; terms at most 1; 2^17 keys            36 + 17 = 53
    pattern . v           2^-29 (a row adds up to 1) times             29 + 23 < 53
                          2^-23 of v's largest entry, per token
    sums of squares       2^-38 of the largest; 2^15 terms             38 + 15 = 53

(pre-rounding: Demmel and Hida 2004; Rump, Ogita and Oishi 2008; Ozaki et al. 2012, doi:10.1007/s11075-011-9478-1.)
docs/exact-arithmetic.md has the proof, what follows from it and what does not.
"""
from __future__ import annotations

import math
import os
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqwen.config import ModelConfig
from minqwen.errors import ConfigError
from minqwen.model.arithmetic import Native
from minqwen.model.rope import inverse_frequencies
from minqwen.parallel import SINGLE, Mesh

X_BITS, W_BITS = 28, 25  # a linear's input and weight
Q_BITS, K_BITS = 27, 26
EXP_BITS, CONTEXT = 36, 1 << 17
P_BITS, V_BITS = 29, 23
SQUARE_BITS, WIDTH = 38, 1 << 15

BLOCK = 1 << 16  # float64s to work on at a time, so that elementwise chains stay in a CPU's second-level cache


# ---------------------------------------------------------------------------------------------- grids
def pow2(a: Tensor) -> Tensor:
    """The smallest power of two that is at least a, for float64 a >= 0 (0 of 0). Carries into the exponent bits."""
    mantissa = (1 << 52) - 1
    return ((a.view(torch.int64) + mantissa) & ~mantissa).view(torch.float64)


def snap(x: Tensor, unit: Tensor | float) -> Tensor:
    """x, float64, rounded to multiples of `unit`, a power of two with |x| < 2^51 unit; ties to even.

    1.5 * 2^52 units have an ulp of one unit, so adding them rounds. Never gives -0. A unit of 0 leaves x alone.
    """
    magic = unit * (1.5 * 2.0**52)
    return (x + magic).sub_(magic)


def square_sum(squares: Tensor, largest: Tensor) -> Tensor:
    """Exact sum over the last dimension, kept, of squares <= largest (a power of two) snapped to 2^-38 of it."""
    return snap(squares, largest * 2.0**-SQUARE_BITS).sum(-1, keepdim=True)


def norm_bound(x: Tensor, mesh: Mesh = SINGLE) -> Tensor:
    """A power of two at or above the 2-norm of each row of float64 x, of x snapped below it, too. [..., 1].

    `mesh` holds the rows' other columns. The margin of 2^-9 covers both snaps for rows of up to 2^15.
    """
    top = pow2(mesh.all_reduce(x.abs().amax(-1, keepdim=True), "max"))
    x = snap(x, top * 2.0 ** (-SQUARE_BITS // 2))  # squares are multiples of 2^-38 top^2 as they are
    squares = mesh.all_reduce((x * x).sum(-1, keepdim=True))
    return pow2(squares.sqrt_().mul_(1 + 2.0**-9))


def within(count: int, most: int, what: str) -> None:
    if count > most:
        raise ConfigError(f"{what} is {count}: exact arithmetic is proven up to {most}; use arithmetic native")


# ---------------------------------------------------------------------------------------------- functions
LN2_HIGH = 0x2C5C85FDF4 * 2.0**-38  # 38 bits of ln 2, ...
LN2_LOW = 0x1CF79ABC9E3 * 2.0**-80  # ... and 41 of the rest: their products with an 11-bit integer are exact
# (r/2) coth(r/2) = 1 + r^2/12 - r^4/720 + ..., coefficients B_2n / (2n)! with Bernoulli's numbers
BERNOULLI = [Fraction(1, 6), Fraction(-1, 30), Fraction(1, 42), Fraction(-1, 30), Fraction(5, 66), Fraction(-691, 2730)]
COTH = [float(b / math.factorial(2 * n)) for n, b in enumerate(BERNOULLI, 1)]


def exp(x: Tensor) -> Tensor:
    """e^x of float64 x, within 2.3e-16 of the truth for -708 <= x <= 709, clamped there; exp(0) is 1.

    x = n ln 2 + r with |r| <= ln 2 / 2, e^r = 1 + r / ((r/2) coth(r/2) - r/2), and n goes into the exponent
    bits. Only separate IEEE operations, or exact products, which a fused multiply-add does not change.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = BLOCK if x.device.type == "cpu" else x.numel() + 1
    for x, y in zip(x.flatten().split(size), out.view(-1).split(size)):
        r = x.clamp(-708.0, 709.0)
        n = (r * (1 / math.log(2))).add_(1.5 * 2.0**52)
        t = n - 1.5 * 2.0**52  # nearest integer; n holds it in its last bits
        r.sub_(t, alpha=LN2_HIGH).sub_(t, alpha=LN2_LOW)
        torch.mul(r, r, out=t)
        torch.mul(t, COTH[-1], out=y)
        for c in COTH[-2::-1]:
            y.add_(c).mul_(t)
        y.add_(1.0).sub_(r, alpha=0.5)
        torch.div(r, y, out=y).add_(1.0)
        y.view(torch.int64).add_(n.view(torch.int64).bitwise_left_shift_(52))
    return out


# pi/2 in three parts of 33 bits: their products with a 20-bit integer are exact
HALF_PI = [0x1921FB544 * 2.0**-32, 0x85A308D3 * 2.0**-65, 0x2633145C * 2.0**-98]


def cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of float32 angles of at most 2^20 radians, in float32, by Taylor's series on [-pi/4, pi/4]."""
    a = angles.double()
    magic = 1.5 * 2.0**52
    n = (a * (2 / math.pi)).add_(magic).sub_(magic)
    for part in HALF_PI:
        a.sub_(n, alpha=part)
    t = a * a
    series = []
    for first in (0, 1):  # 1 - t/2! + t^2/4! ..., 1 - t/3! + t^2/5! ...
        y = torch.zeros_like(t)
        for i in range(16 + first, first, -2):
            y.add_((-1) ** (i // 2) / math.factorial(i)).mul_(t)
        series.append(y.add_(1.0))
    c, s, quadrant = series[0], series[1].mul_(a), n.long()
    turned = quadrant % 2 == 1
    cos, sin = c.where(~turned, s), s.where(~turned, c)
    return cos.where((quadrant + 1) & 2 == 0, -cos).float(), sin.where(quadrant & 2 == 0, -sin).float()


def float32(x: Decimal) -> float:
    """The float32 nearest to x, rounded once."""
    exponent = math.frexp(float(x))[1] - 24
    return math.ldexp(int((x / Decimal(2) ** exponent).to_integral_value(ROUND_HALF_EVEN)), exponent)


def log(x: float) -> float:
    """The float64 nearest to ln x: math.log is the C library's, which may differ in its last bit."""
    return float(Decimal(x).ln())


# ---------------------------------------------------------------------------------------------- operations
class Exact(Native):
    """The operations with order-free sums. Storage float32, bfloat16 or float16; inside, float64.

    widen: keep weights in float64 (8 bytes each). False widens a block of a matrix at a time, in every call:
    slower, the same bits. None: widen while that takes at most half of the device's memory.
    """

    name = "exact"
    most_scores = 1 << 18  # smaller tiles than Native's: most passes over the scores find them in the cache

    def __init__(self, widen: bool | None = None):
        self.widen, self.widened_bytes = widen, 0

    @torch.no_grad()
    def prepare(self, linear: nn.Module, mesh: Mesh) -> None:
        """Snap the weight, row by row, to |w| 2^-25. It stays representable in its dtype: no bits are added.

        Twice, because the norm of what is snapped can pass a power of two that the norm before it did not;
        then nothing changes if this is called again.
        """
        weight, storage = linear.weight, linear.weight.dtype
        if storage == torch.float64 and not hasattr(linear, "live"):
            raise ConfigError("exact arithmetic stores float32, bfloat16 or float16, found float64: choose another dtype")
        within(weight.shape[-1] * mesh.size, WIDTH, "the input size of a linear layer")
        wide = weight.double()
        for _ in range(2):
            wide = snap(wide, norm_bound(wide, mesh) * 2.0**-W_BITS)
        self.widened_bytes += wide.nbytes
        if not (self.widen if self.widen is not None else self.widened_bytes * mesh.size <= memory(wide.device) // 2):
            wide = wide.to(storage)
        linear.weight = nn.Parameter(wide, requires_grad=False)  # a tied embedding keeps its own
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.double() + 0.0, requires_grad=False)  # no -0
        live = (wide != 0).any(0)
        linear.live = None if bool(live.all()) else live

    def rotary_table(self, config: ModelConfig, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As Native's, from float32 angles, but by routines that are the same everywhere."""
        within(length, CONTEXT, "the context")
        with localcontext() as context:
            context.prec = 50
            theta, d = Decimal(config.rope_theta), config.head_dim
            wavelengths = torch.tensor([float32(theta ** (Decimal(2 * i) / d)) for i in range(d // 2)])
            inv_freq, factor = inverse_frequencies(config, torch.float32, wavelengths, log)
        cos, sin = cos_sin(torch.arange(length).float()[:, None] * inv_freq)
        return tuple((torch.cat((x, x), dim=-1) * factor).to(dtype) for x in (cos, sin))

    def linear(self, x: Tensor, linear: nn.Module) -> Tensor:
        return self.row_parallel_linear(x, linear, SINGLE)

    def row_parallel_linear(self, x: Tensor, linear: nn.Module, mesh: Mesh) -> Tensor:
        """Exact partial sums, their exact sum over ranks, + bias in float64, one rounding to x's dtype."""
        wide = x.double()
        if linear.live is not None:  # what meets only zeros must not move the grid either: padded heads
            wide = wide.where(linear.live, 0.0)
        wide = snap(wide, norm_bound(wide, mesh) * 2.0**-X_BITS)
        y = mesh.all_reduce(product(wide, linear.weight))
        if linear.bias is None:
            return y.to(x.dtype).add_(0.0)  # a sum of nothing but -0 depends on the kernel: -0 + 0 = 0
        return y.add_(linear.bias).to(x.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.double()
        within(x.shape[-1], WIDTH, "hidden_size")
        squares = wide * wide
        mean = square_sum(squares, pow2(squares.amax(-1, keepdim=True))) / x.shape[-1]
        return weight * wide.mul_(1 / (mean + eps).sqrt()).to(x.dtype)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        rows = max(1, BLOCK // gate.shape[-1]) if gate.device.type == "cpu" else len(gate) + 1
        wide = (g.double() for g in gate.split(rows))
        return torch.cat([(g / exp(-g).add_(1.0)).to(gate.dtype) for g in wide]) * up

    def cached(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k snapped to |k| 2^-26, v to 2^-23 of its largest entry; both stay representable in their dtype."""
        wide_k, wide_v = k.double(), v.double()
        wide_k = snap(wide_k, norm_bound(wide_k) * 2.0**-K_BITS)
        wide_v = snap(wide_v, pow2(wide_v.abs().amax(-1, keepdim=True)) * 2.0**-V_BITS)
        return wide_k.to(k.dtype), wide_v.to(v.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, tap: Callable) -> Tensor:
        """As Native's; k and v come from `cached`, scores and pattern are float64.

        Every token's v is scaled to [-1, 1], and its scale moved into the pattern: then all tokens have one unit.
        """
        within(k.shape[-2], CONTEXT, "the context")
        wide = q.double()
        wide = snap(wide, norm_bound(wide) * 2.0**-Q_BITS)
        scores = torch.matmul(wide, k.double().transpose(-1, -2)).mul_(scale)
        if visible is not None:
            scores.masked_fill_(~visible, float("-inf"))
        scores = tap("attn.scores", scores)
        p = snap(exp(scores - scores.amax(-1, keepdim=True)), 2.0**-EXP_BITS)
        pattern = tap("attn.pattern", p.mul_(1 / p.sum(-1, keepdim=True)))
        wide = v.double()
        tops = pow2(wide.abs().amax(-1, keepdim=True)).clamp_min_(2.0**-200)  # [N, heads, L, 1]; not 0
        wide.div_(tops)
        tops = tops.transpose(-1, -2)
        top = tops if visible is None else tops.where(visible, 0.0)
        top = top.amax(-1, keepdim=True)  # [N, heads, R or 1, 1], of the tokens this row sees
        z = torch.matmul(snap(pattern * (tops / top), 2.0**-P_BITS), wide)
        return z.mul_(top).to(q.dtype).add_(0.0)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float64: [T, in], [out, in] -> [T, out]. W in a narrower dtype is widened some rows at a time."""
    if weight.dtype == torch.float64:
        return F.linear(x, weight)
    y = x.new_empty(len(x), len(weight))
    rows = max(1, (1 << 20) // weight.shape[-1])
    for out, block in zip(y.split(rows, 1), weight.split(rows)):
        out.copy_(F.linear(x, block.double()))
    return y


def memory(device: torch.device) -> int:
    """Bytes of memory that the device has, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
