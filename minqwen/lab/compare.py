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
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minqwen.model import Native, Qwen2
from minqwen.model.arithmetic import Linear
from minqwen.parallel import Mesh

ROUNDING = 1.5  # units of error in the logits up to which B is the same model; the reason is above
POINT_ROUNDING = 2.0  # the same for one intermediate: fewer numbers, so their mean scatters more

Verdict = Literal["bitwise", "equal to rounding", "different"]
Label = TypeVar("Label")


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.pow(2).mean().sqrt())


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

    @property
    def error(self) -> float:
        """B's error: the root mean square of its difference from the truth."""
        return rms(self.candidate - self.truth)

    @property
    def unit(self) -> float:
        """The error that a faithful implementation makes."""
        return rms(self.faithful - self.truth)

    @property
    def units(self) -> float:
        """B's error in units; infinite if a faithful implementation makes none but B does."""
        error, unit = self.error, self.unit
        if unit:
            return error / unit
        return 0.0 if error == 0 else math.inf

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
    top1: float  # share of positions whose most probable token is the same
    perplexity_ratio: float  # B's perplexity of the text over A's


def logit_difference(a: Tensor, b: Tensor, ids: Tensor) -> LogitDifference:
    """a, b: logits [B, T, V], float64. ids: the text [B, T]."""
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    following = ids[:, 1:, None]
    gain = log_a[:, :-1].gather(-1, following) - log_b[:, :-1].gather(-1, following)
    return LogitDifference(
        max_abs=float((a - b).abs().max()),
        mean_abs=float((a - b).abs().mean()),
        cosine=float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)),
        kl=float((log_a.exp() * (log_a - log_b)).sum(-1).mean()),
        top1=float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        perplexity_ratio=float(gain.mean().exp()),
    )


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
