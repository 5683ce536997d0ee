"""Exact: sums whose order cannot matter, so that logits have the same bits everywhere.

Floating-point addition rounds. So the last bits of a matrix product depend on how the kernel tiles
it, and with that on the batch, the number of threads, the tensor-parallel degree, the library and
the device. Here the rounding is done *before* the sum. Operands are snapped to a grid, that is,
rounded to an integer number of units (a power of two). The grid is so coarse that every product and
every partial sum, in whatever order, is an integer of at most 2^53 product units, which float64
holds without rounding. What is left of rounding is elementwise IEEE 754, the same on any machine.

Units follow from the values, never from shapes. The units of two vectors follow from their 2-norms:
by Cauchy and Schwarz any partial sum of x . w is at most |x| |w|, so `bits(x) + bits(w) = 53` below
the norms is enough for any length, and zeros (padded heads) change nothing. The budget of every
sum, in bits:

    sum                   terms are multiples of                       largest sum
    linear                |x| 2^-27 times |w| 2^-26, per row           27 + 26 = 53
      of bfloat16 values  |x| 2^-28 times |w| 2^-25                    28 + 25 = 53
    scores q . k          |q| 2^-27 times |k| 2^-26, per head          27 + 26 = 53
    sum of exponentials   2^-35; terms at most 1; 2^18 terms           35 + 18 = 53
      the rest of them    2^-70; at most 2^-36; 2^18 terms             70 - 36 + 18 = 52
    pattern . v           2^-26 (a row adds up to 1) times             26 + 26 < 53
                          2^-26 of v's largest entry, per token
      the rest of it      2^-37; at most 2^-27; 2^17 keys              37 - 27 + 17 + 26 = 53
    sums of squares       2^-38 of the largest; 2^15 terms             38 + 15 = 53

(Pre-rounding: Demmel and Hida 2004; Rump, Ogita and Oishi 2008; Ozaki et al. 2012,
doi:10.1007/s11075-011-9478-1.) docs/exact-arithmetic.md has the proof, what follows from it and
what does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqwen.config import ModelConfig
from minqwen.errors import ConfigError, MinqwenError
from minqwen.model.arithmetic import Linear, Native, RowParallelLinear, is_watched, version
from minqwen.model.attention import weighted_values
from minqwen.model.emulation import refuse_emulation
from minqwen.model.memory import memory_of
from minqwen.model.rope import inverse_frequencies
from minqwen.model.trace import Tap
from minqwen.parallel import SINGLE, Mesh

X_BITS, W_BITS = 27, 26  # a linear's input and weight
# The same where weights are bfloat16 values. Their 8 bits of mantissa fit into fewer bits below the
# norm, but for the smallest of them; the input gets the bits that are left.
X_BITS_BFLOAT16, W_BITS_BFLOAT16 = 28, 25
Q_BITS, K_BITS = 27, 26
EXP_BITS, EXP_BITS_LOW, TERMS = 35, 70, 1 << 18
P_BITS, P_BITS_LOW, V_BITS, CONTEXT = 26, 37, 26, 1 << 17
SQUARE_BITS, WIDTH = 38, 1 << 15

# float64 numbers for each thread to work on at a time: a chain of operations then stays in a CPU's
# second-level cache.
CHUNK = 1 << 15
# Weights to prepare at a time: on a CPU, for the same reason; on a GPU, or where ranks must meet in
# every piece, more, for fewer calls.
PREPARED, PREPARED_TOGETHER, PREPARED_ON_GPU = 1 << 17, 1 << 22, 1 << 24
# Weights to widen at a time for a product. On a CPU a piece stays in a cache. For many rows it is
# larger, so that the product is a large one: 16 MB, because malloc keeps pieces below 32 MB, and
# memory that is new to the process costs more than the conversion.
WIDENED, WIDENED_FOR_MANY, WIDENED_ON_GPU, MANY = 1 << 18, 1 << 21, 1 << 20, 64


# ---- grids --------------------------------------------------------------------------------------


def pow2(a: Tensor) -> Tensor:
    """The smallest power of two that is at least a, for float64 a >= 0 (0 of 0).

    The addition carries into the exponent bits unless the mantissa is zero.
    """
    mantissa = (1 << 52) - 1
    return ((a.view(torch.int64) + mantissa) & ~mantissa).view(torch.float64)


def snap(x: Tensor, unit: Tensor | float, out: Tensor | None = None) -> Tensor:
    """x, float64, rounded to multiples of `unit`, a power of two with |x| < 2^51 unit.

    Ties go to the even multiple. 1.5 * 2^52 units have an ulp of one unit, so adding them rounds.
    The result is never -0. A unit of 0 leaves x alone.
    """
    magic = unit * (1.5 * 2.0**52)
    return torch.add(x, magic, out=out).sub_(magic)


def root_above(square: Tensor) -> Tensor:
    """The smallest power of two that is at least the root of `square`, float64.

    It has half the exponent of the smallest power of two that is at least `square`, rounded up.
    """
    exponent = pow2(square).view(torch.int64) >> 52  # + 1023
    return ((exponent + 1024 >> 1) << 52).view(torch.float64)


def snap_below_norm(x: Tensor, bits: int, mesh: Mesh = SINGLE) -> Tensor:
    """x [..., n <= 2^15] in float64, each row snapped to 2^-bits of a power of two.

    The row's 2-norm does not exceed that power of two, neither before nor after. `mesh` holds the
    rows' other columns. The norm's square is exact: entries snapped to 2^-19 of the largest one
    have squares on a 2^-38 grid. The margin of 2^-8 covers what both snaps can add, which is less
    than 2^-11 of the norm for 2^15 entries.
    """
    return snap_in_place(widened(x), bits, mesh)


def snap_in_place(wide: Tensor, bits: int, mesh: Mesh = SINGLE) -> Tensor:
    """`snap_below_norm` of a float64 tensor that may be written to."""
    rows = rows_at_once(wide)
    work = torch.empty_like(wide[:rows])  # new memory costs more than what is done in it
    most = wide.new_empty(*wide.shape[:-1], 1)
    for some, out in zip(wide.split(rows), most.split(rows)):
        torch.amax(torch.abs(some, out=work[: len(some)]), -1, keepdim=True, out=out)
    top = pow2(mesh.all_reduce(most, "max"))
    square = torch.empty_like(top)
    for some, unit, total in zip(
        wide.split(rows), (top * 2.0**-19).split(rows), square.split(rows)
    ):
        snapped = snap(some, unit, out=work[: len(some)])
        torch.sum(snapped.mul_(snapped), -1, keepdim=True, out=total)
    units = root_above(mesh.all_reduce(square) * (1 + 2.0**-8)) * 2.0**-bits
    for some, unit in zip(wide.split(rows), units.split(rows)):
        snap(some, unit, out=some)
    return wide


def widened(x: Tensor) -> Tensor:
    """x in float64, in memory of its own: the caller will write to it."""
    return x.to(torch.float64, copy=True)


def rows_at_once(x: Tensor) -> int:
    """How many rows of x to work on at a time."""
    if x.device.type != "cpu":
        return len(x) + 1
    return max(1, CHUNK * torch.get_num_threads() * len(x) // max(1, x.numel()))


def within(count: int, most: int, what: str) -> None:
    """Raise ConfigError if a sum is longer than its budget allows."""
    if count > most:
        raise ConfigError(
            f"{what} is {count}: exact arithmetic is proven up to {most}; use arithmetic native"
        )


# ---- functions ----------------------------------------------------------------------------------

LOG2_E = 1.4426950408889634
LN2_HIGH = 0x2C5C85FDF4 * 2.0**-38  # 38 bits of ln 2, ...
LN2_LOW = 0x1CF79ABC9E3 * 2.0**-80  # ... and 41 of the rest: times an 11-bit integer, both exact
# (r/2) coth(r/2) = 1 + r^2/12 - r^4/720 + ..., coefficients B_2n / (2n)! with Bernoulli's numbers
BERNOULLI = [
    Fraction(1, 6),
    Fraction(-1, 30),
    Fraction(1, 42),
    Fraction(-1, 30),
    Fraction(5, 66),
    Fraction(-691, 2730),
]
COTH = [float(b / math.factorial(2 * n)) for n, b in enumerate(BERNOULLI, 1)]


def exp(x: Tensor) -> Tensor:
    """e^x of float64 x, within 2.3e-16 of the truth for -708 <= x <= 709.

    It is 0 below, where a key is hidden or a token banned, and e^709 above.

    exp(0) is 1. x = n ln 2 + r with |r| <= ln 2 / 2, e^r = 1 + r / ((r/2) coth(r/2) - r/2), and n
    goes into the exponent bits. There are only separate IEEE operations, or exact products, which a
    fused multiply-add does not change.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = rows_at_once(x.flatten())
    work = x.new_empty(3, min(size, x.numel()))
    for some, y in zip(x.flatten().split(size), out.view(-1).split(size)):
        _exp_into(some, y, work[:, : len(some)])
    return out


def _exp_into(x: Tensor, y: Tensor, work: Tensor) -> None:
    """y = e^x, for one chunk of numbers, with three more of that size to work in."""
    r, n, t = work
    torch.clamp(x, -708.0, 709.0, out=r)
    torch.mul(r, LOG2_E, out=n).add_(1.5 * 2.0**52)
    torch.sub(n, 1.5 * 2.0**52, out=t)  # the nearest integer; n holds it in its last bits
    r.sub_(t, alpha=LN2_HIGH).sub_(t, alpha=LN2_LOW)
    torch.mul(r, r, out=t)
    torch.mul(t, COTH[-1], out=y)
    for c in COTH[-2::-1]:
        y.add_(c).mul_(t)
    y.add_(1.0).sub_(r, alpha=0.5)
    torch.div(r, y, out=y).add_(1.0)
    y.view(torch.int64).add_(n.view(torch.int64).bitwise_left_shift_(52))
    y.masked_fill_(x < -708.0, 0.0)


def sqrt(a: Tensor) -> Tensor:
    """The root of float64 a > 0, by Heron's method from a start within 7%.

    torch.sqrt cannot be used: on a CPU it may call MKL, which is off in the last bit for one
    argument in 150. IEEE 754, and a GPU, are not.
    """
    s = ((a.view(torch.int64) >> 1) + (1023 << 51)).view(torch.float64)
    for _ in range(4):
        s = (a / s).add_(s).mul_(0.5)
    return s


# pi/2 in three parts of 33 bits: their products with a 20-bit integer are exact
HALF_PI = [0x1921FB544 * 2.0**-32, 0x85A308D3 * 2.0**-65, 0x2633145C * 2.0**-98]


def cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of float32 angles of at most 2^20 radians, in float32.

    By Taylor's series on [-pi/4, pi/4]: 1 - t/2! + t^2/4! ... and 1 - t/3! + t^2/5! ..., t = a^2.
    """
    a = angles.double()
    magic = 1.5 * 2.0**52
    n = (a * (2 / math.pi)).add_(magic).sub_(magic)
    for part in HALF_PI:
        a.sub_(n, alpha=part)
    t = a * a
    series = []
    for first in (0, 1):
        y = torch.zeros_like(t)
        for i in range(16 + first, first, -2):
            y.add_((-1) ** (i // 2) / math.factorial(i)).mul_(t)
        series.append(y.add_(1.0))
    c, s, quadrant = series[0], series[1].mul_(a), n.long()
    turned = quadrant % 2 == 1
    cos, sin = c.where(~turned, s), s.where(~turned, c)
    cos = cos.where((quadrant + 1) & 2 == 0, -cos)
    sin = sin.where(quadrant & 2 == 0, -sin)
    return cos.float(), sin.float()


def float32(x: Decimal) -> float:
    """The float32 nearest to x, rounded once."""
    exponent = math.frexp(float(x))[1] - 24
    units = (x / Decimal(2) ** exponent).to_integral_value(ROUND_HALF_EVEN)
    return math.ldexp(int(units), exponent)


def log(x: float) -> float:
    """The float64 nearest to ln x. math.log is the C library's, which may err in its last bit."""
    return float(Decimal(x).ln())


# ---- operations ---------------------------------------------------------------------------------


class Exact(Native):
    """The operations with order-free sums. Storage float32, bfloat16 or float16; inside, float64.

    widen: keep weights in float64 (8 bytes each). False keeps them in their dtype and widens some
    rows of a matrix at a time, in every call: the same bits. None: on a GPU they are kept in
    float64 while that takes at most half of its memory. On a CPU they are not, because it reads
    fewer bytes then, and converts them in its cache while it would wait for memory.
    """

    name = "exact"
    order_free = True
    differentiable = False  # rounding to a grid has no useful derivative
    can_save = False  # weights are snapped

    def __init__(self, widen: bool | None = None):
        self.widen, self.widened_bytes = widen, 0

    def wide_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64

    def check(self, config: ModelConfig, dtype: torch.dtype, mesh: Mesh) -> None:
        if dtype == torch.float64:
            raise ConfigError(
                "dtype is float64: exact arithmetic stores float32, bfloat16 or float16; choose one"
            )
        width = max(config.hidden_size, config.intermediate_size, config.q_size)
        within(width, WIDTH, "the widest sum of this model")

    @torch.no_grad()
    def prepare(self, linears: Sequence[Linear], mesh: Mesh) -> None:
        """Snap the weights, row by row, to |w| 2^-26, or 2^-25 where they are bfloat16 values.

        What chooses a grid must be the same on every rank and for every number of padded heads.
        So all ranks are asked, and of several linears the first is not: q_proj's rows may be new.
        """
        if linears[0].weight.is_cuda:
            refuse_emulation()
        asked = [linear.weight for linear in linears[1:] or linears]
        wider = torch.tensor(float(not all(map(is_bfloat16, asked))), device=asked[0].device)
        narrow = mesh.all_reduce(wider, "max").item() == 0
        scale = None if isinstance(linears[0], RowParallelLinear) else column_scale(asked, mesh)
        for linear in linears:
            linear.narrow = narrow
            linear.register_buffer("scale", scale, persistent=False)
            self._snap(linear)

    def _snap(self, linear: Linear) -> None:
        """Snap a weight, some rows at a time, and say which columns are not all zero.

        Every row has a grid of its own, so the number of rows changes no bit. A rank's columns of a
        row need the others', so all ranks take the same rows: a row-parallel layer has all of them
        on every rank.
        """
        old = linear.weight
        weight = torch.empty_like(old, dtype=torch.float64 if self._keeps_wide(old) else old.dtype)
        live = torch.zeros(old.shape[1], dtype=torch.bool, device=old.device)
        rows = prepared_rows(old, linear.mesh)
        for some, out in zip(old.split(rows), weight.split(rows)):
            wide = snapped_weight(some, linear)
            out.copy_(wide)
            if isinstance(linear, RowParallelLinear):
                live |= (wide != 0).any(0)
        # A new parameter, so that a tied embedding keeps its own.
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if linear.bias is not None:
            bias = linear.bias.double() + 0.0  # no -0
            linear.bias = nn.Parameter(bias, requires_grad=False)
        if isinstance(linear, RowParallelLinear):
            linear.register_buffer("live", None if bool(live.all()) else live, persistent=False)
        linear.prepared = linear.weight, version(linear.weight)

    def _keeps_wide(self, weight: Tensor) -> bool:
        """Whether this weight is kept in float64."""
        if self.widen is not None or weight.device.type == "cpu":
            return bool(self.widen)
        self.widened_bytes += 8 * weight.numel()
        return self.widened_bytes <= memory_of(weight.device) // 2

    def rotary_table(
        self,
        config: ModelConfig,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """As Native's, from float32 angles, but by routines that are the same everywhere.

        Computed on the CPU, whatever the default device is.
        """
        within(length, CONTEXT, "the context")
        with localcontext() as context:
            context.prec = 50
            theta, d = Decimal(config.rope_theta), config.head_dim
            wavelengths = [float32(theta ** (Decimal(2 * i) / d)) for i in range(d // 2)]
            inv_freq, factor = inverse_frequencies(
                config,
                torch.float32,
                torch.tensor(wavelengths, dtype=torch.float32, device="cpu"),
                log,
            )
        cos, sin = cos_sin(torch.arange(length, device="cpu").float()[:, None] * inv_freq)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        return (cos * factor).to(device, dtype), (sin * factor).to(device, dtype)

    def attention_scale(self, head_dim: int) -> float:
        """1 / sqrt(head_dim), rounded once: Python's ** is the C library's, which may err."""
        with localcontext() as context:
            context.prec = 50
            return float(1 / Decimal(head_dim).sqrt())

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        return self.row_parallel_linear(x, linear, SINGLE)

    def row_parallel_linear(self, x: Tensor, linear: Linear, mesh: Mesh) -> Tensor:
        """Exact partial sums, their exact sum over ranks, + bias in float64, one rounding."""
        return output(snapped_input(x, linear, mesh), linear, mesh, x.dtype)

    def project(self, x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
        """As Native's. Layers with one input have one grid for it, so it is snapped once."""
        if any(map(is_watched, linears)):
            return super().project(x, *linears)
        snapped = snapped_input(x, linears[0], SINGLE)
        for linear in linears[1:]:
            check_prepared(linear)
        return tuple(output(snapped, linear, SINGLE, x.dtype) for linear in linears)

    def head_results(self, z: Tensor, linear: Linear, mesh: Mesh) -> Tensor:
        """As Native's, but float64 and not rounded: the exact terms of o_proj's exact sum.

        So their sum in any order, plus the bias, rounded once to the model's dtype, is o_proj's
        output in every bit.
        """
        heads, d = z.shape[1:]
        x = snapped_input(z.flatten(-2), linear, mesh).split(d, -1)
        columns = linear.weight.split(d, -1)
        shares = [product(x[h], columns[h]) for h in range(heads)]
        return torch.stack(shares, 1).add_(0.0)  # no -0

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = widened(x)
        squares = wide * wide
        squares = snap(squares, pow2(squares.amax(-1, keepdim=True)) * 2.0**-SQUARE_BITS)
        # CUDA multiplies by the reciprocal of a plain number, a CPU divides by it: so it is said.
        mean = squares.sum(-1, keepdim=True) * (1.0 / x.shape[-1])
        return weight * wide.mul_(sqrt(mean + eps).reciprocal()).to(x.dtype)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        act, rows = torch.empty_like(gate), rows_at_once(gate)
        for some, out in zip(gate.split(rows), act.split(rows)):
            wide = some.double()
            out.copy_(wide / exp(-wide).add_(1.0))
        return act.mul_(up)

    def cached(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k snapped to |k| 2^-26, v to 2^-26 of its largest entry.

        Both stay representable in their dtype.
        """
        wide = v.double()
        wide = snap(wide, pow2(largest_finite(wide)) * 2.0**-V_BITS)
        return snap_below_norm(k, K_BITS).to(k.dtype), wide.to(v.dtype)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, tap: Tap
    ) -> Tensor:
        """As Native's; k and v come from `cached`, scores and pattern are float64.

        Every token's v is scaled to [-1, 1], and its scale is moved into the pattern: then all
        tokens have one unit. The pattern is the sum of two terms, each with a grid of its own: one
        would lose too much of a pattern that is spread over many keys.
        """
        within(k.shape[-2], CONTEXT, "the context")
        scores = torch.matmul(snap_below_norm(q, Q_BITS), k.double().transpose(-1, -2)).mul_(scale)
        if hidden is not None:
            scores[..., -hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
        scores = tap("attn.scores", scores).double()
        p = exp(scores - scores.amax(-1, keepdim=True))
        pattern = tap("attn.pattern", p.mul_(sum_of_exps(p).reciprocal())).double()
        wide = widened(v)
        tops = pow2(largest_finite(wide)).clamp_min_(2.0**-200)  # [N, heads, L, 1]
        wide.div_(tops)
        tops = tops.transpose(-1, -2)  # [N, heads, 1, L]
        top = _largest_seen(tops, hidden)
        z = weighted_values(_in_two_terms, pattern * (tops / top), wide, hidden).mul_(top)
        # Infinity or NaN, or which NaN, may depend on what else was multiplied.
        return z.masked_fill_(~z.isfinite(), math.nan).to(q.dtype).add_(0.0)

    def exp(self, x: Tensor) -> Tensor:
        return exp(x)

    def total(self, weights: Tensor) -> Tensor:
        return sum_of_exps(weights)[..., 0]

    def log_softmax(self, logits: Tensor) -> Tensor:
        """As Native's, in float64."""
        wide = logits.double()
        wide = wide - wide.amax(-1, keepdim=True)
        sums = sum_of_exps(exp(wide))
        logs = [log(x) if math.isfinite(x) else x for x in sums.flatten().tolist()]
        return wide.sub_(torch.tensor(logs, dtype=torch.float64, device=wide.device).view_as(sums))


def _in_two_terms(pattern: Tensor, v: Tensor) -> Tensor:
    """pattern v with exact sums: [..., R, L], [..., L, d] -> [..., R, d], v at most 1."""
    both = torch.cat((pattern, pattern), -2)
    high, low = both.tensor_split(2, -2)
    snap(high, 2.0**-P_BITS, out=high)
    snap(low.sub_(high), 2.0**-P_BITS_LOW, out=low)
    high, low = torch.matmul(both, v).tensor_split(2, -2)
    return high + low


def largest_finite(x: Tensor) -> Tensor:
    """The largest finite |x| of each row, [..., 1]: what is not finite spoils only its channel."""
    return x.abs().nan_to_num_(0.0, 0.0).amax(-1, keepdim=True)


def sum_of_exps(p: Tensor) -> Tensor:
    """The sum of float64 numbers from 0 to 1 over the last dimension, which is kept.

    Each number is the sum of two, which lie on a grid of their own and have an exact sum.
    """
    within(p.shape[-1], TERMS, "the number of exponentials")
    high = snap(p, 2.0**-EXP_BITS)
    low = p - high
    snap(low, 2.0**-EXP_BITS_LOW, out=low)
    return high.sum(-1, keepdim=True).add_(low.sum(-1, keepdim=True))


def _largest_seen(tops: Tensor, hidden: Tensor | None) -> Tensor:
    """The largest of `tops` [N, heads, 1, L] that each row sees. [N, heads, R or 1, 1]"""
    if hidden is None:
        return tops.amax(-1, keepdim=True)
    for_all, last = tops.tensor_split([tops.shape[-1] - hidden.shape[-1]], -1)
    of_all = F.pad(for_all, (1, 0)).amax(-1, keepdim=True)
    return of_all.maximum(last.masked_fill(hidden, 0.0).amax(-1, keepdim=True))


def prepared_rows(weight: Tensor, mesh: Mesh = SINGLE) -> int:
    """How many rows of a weight to prepare at a time."""
    count = PREPARED if mesh.size == 1 else PREPARED_TOGETHER
    if weight.device.type != "cpu":
        count = PREPARED_ON_GPU
    return max(1, count // weight.shape[1])


def snapped_weight(rows: Tensor, linear: Linear) -> Tensor:
    """Rows of a linear layer's weight in float64, snapped below their norms.

    They stay representable in their dtype: no bits are added. They are snapped twice, because the
    norm of what is snapped can pass a power of two that the norm before did not pass. After that
    nothing changes if this is called again.
    """
    wide = widened(rows)
    if linear.scale is not None:
        wide.mul_(linear.scale)
    for _ in range(2):
        wide = snap_in_place(wide, W_BITS_BFLOAT16 if linear.narrow else W_BITS, linear.mesh)
    return wide if linear.scale is None else wide.div_(linear.scale)


def is_bfloat16(weight: Tensor) -> bool:
    """Whether all values are bfloat16's."""
    if weight.dtype == torch.bfloat16:
        return True
    parts = weight.split(prepared_rows(weight))
    return all(torch.equal(part.bfloat16().to(part.dtype), part) for part in parts)


def column_scale(weights: Sequence[Tensor], mesh: Mesh) -> Tensor | None:
    """Powers of two [in] that bring the columns of weights [out, in] to about one size, or None.

    Where a checkpoint has a channel that is large in the norm's weight and small in the columns
    that read it, a grid below the row's norm would lose the other channels. The size of a column is
    the largest share that it has in a row, on any rank, over the median of all columns. None: no
    column needs a scale.
    """
    parts = [column_shares(weight) for weight in weights]
    size = mesh.all_reduce(torch.stack(parts).amax(0), "max")
    # The power of two nearest in the logarithm.
    scale = pow2(size / size.median() * 0.7071067811865476).reciprocal()
    scale = scale.where(scale.isfinite() & (scale > 0), 1.0)
    return None if bool((scale == 1).all()) else scale


def column_shares(weight: Tensor) -> Tensor:
    """The largest entry of each column of weight [out, in], its rows scaled alike. float64 [in]"""
    size = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in weight.split(prepared_rows(weight)):
        wide = rows.abs().double()
        top = pow2(wide.amax(-1, keepdim=True)).clamp_min_(2.0**-200)
        size = size.maximum(wide.div_(top).amax(0))
    return size


def check_prepared(linear: Linear) -> None:
    """Raise MinqwenError if the weight is not the one that was prepared."""
    weight, written = linear.prepared or (None, 0)
    if weight is not linear.weight or written != version(linear.weight):
        raise MinqwenError(
            "weights changed since they were prepared for exact arithmetic: call model.prepare()"
        )


def snapped_input(x: Tensor, linear: Linear, mesh: Mesh) -> Tensor:
    """x [T, in] snapped below its rows' norms, in float64.

    If the columns have a scale, the grid is that of x / scale. There the weight's columns times
    scale have theirs, so the products of the two are the same as without it. Raises MinqwenError
    if the weight is not the one that was prepared.
    """
    check_prepared(linear)
    if linear.live is not None:
        # What meets only zeros must not move the grid either: the inputs of padded heads.
        # Only row-parallel layers have this. There every rank holds all rows of its columns.
        # In the others a column may be zero in the rows of one rank and not of another.
        x = x.where(linear.live, 0.0)
    bits = X_BITS_BFLOAT16 if linear.narrow else X_BITS
    if linear.scale is None:
        return snap_below_norm(x, bits, mesh)
    return snap_in_place(x / linear.scale, bits, mesh).mul_(linear.scale)


def output(snapped: Tensor, linear: Linear, mesh: Mesh, dtype: torch.dtype) -> Tensor:
    """A layer's output of a snapped input: an exact sum, over ranks too, and one rounding."""
    y = mesh.all_reduce(product(snapped, linear.weight))
    if linear.bias is None:
        # A sum of nothing but -0 depends on the kernel; -0 + 0 = 0.
        return y.to(dtype).add_(0.0)
    return y.add_(linear.bias).to(dtype)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float64: [T, in], [out, in] -> [T, out].

    W in a narrower dtype is widened some rows at a time.
    """
    if weight.dtype == torch.float64:
        return F.linear(x, weight)
    y = x.new_empty(len(x), len(weight))
    count = WIDENED if len(x) < MANY else WIDENED_FOR_MANY
    if weight.device.type != "cpu":
        count = WIDENED_ON_GPU
    rows = max(1, count // weight.shape[1])
    wide = x.new_empty(min(rows, len(weight)), weight.shape[1])
    for out, some in zip(y.split(rows, 1), weight.split(rows)):
        torch.mm(x, wide[: len(some)].copy_(some).t(), out=out)
    return y
