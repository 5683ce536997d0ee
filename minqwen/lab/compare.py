"""How far two tensors are apart, in units of the error that a faithful implementation makes anyway.

Model A is the original, model B the candidate, and A in float64 the truth. No computation in
float32 or bfloat16 gives the truth: each rounding moves the result a little. So the question "is B
the same model?" has no answer in absolute numbers, but it has one in units: A's own error against
the truth, in the dtype at hand, is 1 unit. If B is the same model its error is about 1 unit too. If
B is another model its error is thousands of units, and several even in bfloat16.

The threshold is 1.5 units (`ROUNDING`). B may add in another order than A, or add more terms. Its
rounding errors are then others than A's, but of about the same size, and two independent errors of
one size add up to at most sqrt(2) = 1.41 of one.

In float64 there is nothing more exact above, so A's error cannot be measured against a truth. What
can be measured is how far two faithful float64 implementations of A are apart. The second one is A
with every sum of its linear layers taken in reverse order (`ReversedSums`). The root mean square of
their difference is the unit. B's difference from A is of the same kind, if B is the same model: the
difference of two faithful implementations. The error that A has in float32, times 2^-29, would
be a bad guess: on a CPU with AVX-512 float32 products are more exact than that, and right recipes
come out at up to 3.4 units.

Units measured on the embedded model, with ten right recipes of head extension, the six wrong ones
of lab/faults/extension.py that run, and six texts of 8 to 128 tokens:

    dtype      right recipes   wrong recipes
    float64    0.27 to 0.83    6.4e12 and more
    float32    0.81 to 1.15    34,000 and more
    bfloat16   0.98 to 1.04    3.1 and more

A text should have some dozens of tokens, because the few errors of a short one scatter: on a text
of one token a right recipe came to 1.68 units in float32, and of 126 texts of tiny random models
(10 to 40 tokens) one brought a right recipe to 1.58 units in float64.

`measure` is this for any tensor, `measure_logits` for logits, with what they mean for the next
token. An error is either *inherited*, because an operation was given wrong inputs, or *added* by
the operation. `recompute` tells them apart: it repeats every operation on the candidate's own
inputs. Done in float64 it is the truth about the operation alone, and done in the candidate's dtype
a faithful implementation of it: `measure` of these two is the added error, in units.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minqwen.model import Native, Qwen2
from minqwen.model.arithmetic import Linear
from minqwen.model.trace import check_replacement
from minqwen.parallel import Mesh

ROUNDING = 1.5  # units of error in the logits up to which B is the same model; the reason is above
POINT_ROUNDING = 2.0  # the same for one intermediate: fewer numbers, so their mean scatters more

Verdict = Literal["bitwise", "equal to rounding", "different"]
Label = TypeVar("Label")


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.pow(2).mean().sqrt())


# ---- one tensor ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """How far a candidate's tensor is from the truth.

    error, unit: root mean square of the candidate's and of the faithful implementation's error.
    count: the numbers that were compared. max_abs: the largest error, `at` its coordinate, and ulps
    the same in units in the last place of the truth there, in the candidate's dtype.
    """

    error: float
    unit: float
    count: int
    max_abs: float
    at: tuple[int, ...]
    relative_l2: float
    cosine: float
    ulps: float

    @property
    def units(self) -> float:
        """The error in units; infinite if a faithful implementation makes none but this does."""
        return in_units(self.error, self.unit)


def in_units(error: float, unit: float) -> float:
    """error / unit; infinite where only the unit is 0, and where the error is not a number."""
    if math.isnan(error):
        return math.inf
    if unit:
        return error / unit
    return 0.0 if error == 0 else math.inf


def measure(candidate: Tensor, faithful: Tensor, truth: Tensor) -> Measure:
    """The candidate's error against the truth, in units of the faithful implementation's.

    All have one shape. What a candidate handed over in a narrower dtype than it was computed in has
    lost bits on the way, so the faithful implementation is first given the candidate's dtype too.
    Left out are hidden scores, -inf in the truth and in the candidate, and what is NaN in both, for
    example because it was recomputed from the candidate's NaN; also what a faithful implementation
    has no finite number for, as where float16 overflows. If else a number is not finite on one
    side only, the error is infinite.
    """
    dtype = candidate.dtype
    if torch.finfo(dtype).eps > torch.finfo(faithful.dtype).eps:
        faithful = faithful.to(dtype)
    b, a, t = (x.detach().double() for x in (candidate, faithful, truth))
    left_out = _alike_and_not_finite(b, t) | (t.isfinite() & ~a.isfinite())
    b, a, t = (x.masked_fill(left_out, 0) for x in (b, a, t))
    wrong = (b - t).nan_to_num(math.inf, math.inf, math.inf).abs()
    count = int((~left_out).sum())
    if not count:
        return Measure(0.0, 0.0, 0, 0.0, (0,) * t.dim(), 0.0, 1.0, 0.0)
    worst = int(wrong.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), t.shape))
    largest = float(wrong[at])
    return Measure(
        error=math.sqrt(float(wrong.square().sum()) / count),
        unit=math.sqrt(float((a - t).nan_to_num(0, 0, 0).square().sum()) / count),
        count=count,
        max_abs=largest,
        at=at,
        relative_l2=in_units(float(wrong.norm()), float(t.norm())),
        cosine=_cosine(b, t),
        ulps=largest / ulp(float(t[at]), dtype),
    )


def _alike_and_not_finite(a: Tensor, b: Tensor) -> Tensor:
    return (a.isnan() & b.isnan()) | (a.isinf() & (a == b))


def _cosine(a: Tensor, b: Tensor) -> float:
    """Of two tensors as vectors; 1 of two zeros, NaN where a number is not finite."""
    if not a.any() and not b.any():
        return 1.0
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def ulp(x: float, dtype: torch.dtype) -> float:
    """The distance of the numbers of that dtype around x."""
    info = torch.finfo(dtype)
    if not math.isfinite(x):
        return math.inf
    exponent = math.frexp(max(abs(x), info.tiny))[1] - 1
    return math.ldexp(info.eps, exponent)


def pooled(measures: Iterable[Measure]) -> float:
    """The units of several tensors as if they were one: of one point in several prompts."""
    found = list(measures)
    error = sum(m.count * m.error**2 for m in found)
    unit = sum(m.count * m.unit**2 for m in found)
    return in_units(math.sqrt(error), math.sqrt(unit))


@torch.no_grad()
def recompute(model: Qwen2, ids: Tensor, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each point of `seen`, {name: tensor [T, ...]}, as the model computes it from the others.

    ids [T]. What a point gets is the nearest that `seen` has before it, or the ids. So the result
    differs from `seen` by what was added between the two points, not by what was inherited. Of
    logits `seen` may have the last rows only; then the result has these. Raises TraceError for a
    shape that the model does not have there.
    """
    computed = {}

    def replace(x: Tensor, name: str) -> Tensor | None:
        value = seen[name]
        computed[name] = x[0, -len(value) :].clone()
        check_replacement(name, value, computed[name])
        if len(computed) == len(seen):
            raise _Enough
        return value[None].to(x)

    with contextlib.suppress(_Enough):
        if seen:
            model.run_with_hooks(ids[None].to(model.device), [(list(seen), replace)])
    return computed


class _Enough(Exception):
    """Nobody asks for what comes later in the forward pass."""


# ---- two models ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """One tensor as four computations have it. All have one shape; float64, so as to be subtracted.

    original: A's. candidate: B's. faithful: that of a faithful implementation of A in A's dtype
    (`faithful`). truth: A's in float64.
    """

    original: Tensor
    candidate: Tensor
    faithful: Tensor
    truth: Tensor

    @cached_property
    def measured(self) -> Measure:
        """B's error against the truth."""
        return measure(self.candidate, self.faithful, self.truth)

    @property
    def error(self) -> float:
        """B's error: the root mean square of its difference from the truth."""
        return self.measured.error

    @property
    def unit(self) -> float:
        """The error that a faithful implementation makes."""
        return self.measured.unit

    @property
    def units(self) -> float:
        """B's error in units; infinite if a faithful implementation makes none but B does.

        Infinite also where no number can be compared, because all are NaN.
        """
        return self.measured.units if self.measured.count else math.inf

    @property
    def bitwise(self) -> bool:
        """Whether A and B agree in every bit."""
        return torch.equal(self.original, self.candidate)

    @property
    def verdict(self) -> Verdict:
        """Whether B is the same model, judged by these logits."""
        if self.bitwise:
            return "bitwise"
        return "equal to rounding" if self.units < ROUNDING else "different"

    def differs(self, order_free: bool) -> bool:
        """Whether B has left A at this point.

        order_free: the arithmetic gives equal functions equal bits, so that any difference counts.
        """
        if self.bitwise:
            return False
        return order_free or not self.units <= POINT_ROUNDING  # a NaN differs


def first_difference(
    points: Iterable[tuple[Label, Compared]], order_free: bool = False
) -> Label | None:
    """The label of the first point at which B has left A. points: in the order of computation."""
    for label, compared in points:
        if compared.differs(order_free):
            return label
    return None


@dataclass(frozen=True)
class LogitDifference:
    """How far two models' logits are apart, over all positions of a text."""

    max_abs: float
    mean_abs: float
    cosine: float  # of all logits as one vector
    kl: float  # Kullback-Leibler divergence of A from B, nats per token
    kl_p99: float  # of 100 tokens, 99 are below
    kl_max: float
    top1: float  # share of positions whose most probable token is the same
    top5: float  # share of A's five most probable tokens that are among B's
    perplexity_ratio: float  # B's perplexity of the text over A's; NaN of a single token


def logit_difference(a: Tensor, b: Tensor, ids: Tensor) -> LogitDifference:
    """a, b: logits [B, T, V], float64. ids: the text [B, T]."""
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    following = ids[:, 1:, None]
    gain = log_a[:, :-1].gather(-1, following) - log_b[:, :-1].gather(-1, following)
    kl = torch.where(log_a.isneginf(), 0.0, log_a.exp() * (log_a - log_b)).sum(-1)
    return LogitDifference(
        max_abs=float((a - b).abs().max()),
        mean_abs=float((a - b).abs().mean()),
        cosine=float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)),
        kl=float(kl.mean()),
        kl_p99=float(kl.flatten().quantile(0.99, interpolation="higher")),
        kl_max=float(kl.max()),
        top1=float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        top5=_top_agreement(a, b, min(5, a.shape[-1])),
        perplexity_ratio=float(gain.mean().exp()),
    )


def _top_agreement(a: Tensor, b: Tensor, count: int) -> float:
    """The share of A's `count` most probable tokens that are among B's, over all positions."""
    of_a, of_b = a.topk(count).indices, b.topk(count).indices
    return float((of_a[..., :, None] == of_b[..., None, :]).any(-1).double().mean())


@dataclass(frozen=True)
class LogitMeasure:
    """A candidate's logits: its error, and its difference from the truth for the next tokens."""

    measure: Measure
    difference: LogitDifference


def measure_logits(candidate: Tensor, faithful: Tensor, truth: Tensor, ids: Tensor) -> LogitMeasure:
    """Of logits [T, V] of a text's ids [T]."""
    a, b = truth.detach().double(), candidate.detach().double()
    found = logit_difference(a[None], b[None], ids[None].to(a.device))
    return LogitMeasure(measure(candidate, faithful, truth), found)


def same_greedy_text(a: Qwen2, b: Qwen2, ids: Tensor, count: int) -> bool:
    """Whether A and B continue ids [1, T] with the same `count` most probable tokens."""
    return _continue_greedily(a, ids, count) == _continue_greedily(b, ids, count)


def _continue_greedily(model: Qwen2, ids: Tensor, count: int) -> list[int]:
    length = ids.shape[1]
    for _ in range(count):
        following: Tensor = model(ids)[:, -1:].argmax(-1)
        ids = torch.cat((ids, following), dim=1)
    continuation: list[int] = ids[0, length:].tolist()
    return continuation


def faithful(model: Qwen2) -> Qwen2:
    """A model whose error against float64 is that of a faithful implementation of `model`.

    `model` itself; or, if it computes in float64, its weights (shared, not copied) under
    `ReversedSums`.
    """
    if model.dtype != torch.float64:
        return model
    weights = model.state_dict()
    return Qwen2.from_tensors(
        model.config,
        lambda name, shard: weights[name],
        dtype=model.dtype,
        device=model.device,
        arithmetic=ReversedSums(),
    )


class ReversedSums(Native):
    """Native, with every sum of a linear layer taken from the last input to the first."""

    name = "reversed sums"

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        return F.linear(x.flip(-1), linear.weight.flip(-1), linear.bias)

    def row_parallel_linear(self, x: Tensor, linear: Linear, mesh: Mesh) -> Tensor:
        return self.linear(x, linear)
