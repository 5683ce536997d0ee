"""What `warp` and `draw` define, for many rows at once; and the largest entries of a row.

A vocabulary has about 150,000 entries: too many to sort them for every token. So these functions
look at a row in blocks. First they take a sum or a maximum for each block, then they look inside
the few blocks that matter. What is decided from a few numbers is decided on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from minqwen.model.arithmetic import Native
from minqwen.sampling.params import SamplingParams
from minqwen.sampling.warp import INF, divisor

BLOCK = 128  # entries of the vocabulary whose sum or maximum is taken at once

Value = TypeVar("Value")


def take(x: Tensor, at: list[int]) -> Tensor:
    """Rows `at` (rising) of x; x itself where they are all of them."""
    return x if len(at) == len(x) else x[torch.tensor(at, device=x.device)]


def put(target: list[Value], at: list[int], values: Sequence[Value]) -> None:
    """target[at[i]] = values[i]."""
    for i, value in zip(at, values, strict=True):
        target[i] = value


def partition(flags: Iterable[bool]) -> tuple[list[int], list[int]]:
    """Where the flags are true, and where they are false."""
    where: tuple[list[int], list[int]] = [], []
    for i, flag in enumerate(flags):
        where[0 if flag else 1].append(i)
    return where


def padded(x: Tensor) -> Tensor:
    """x [R, V] with V filled up to a multiple of BLOCK by -inf."""
    missing = -x.shape[1] % BLOCK
    return pad(x, (0, missing), value=-INF) if missing else x


def largest(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m largest entries of each row of x [R, V], in any order, on the CPU: values, ids [R, m].

    V is a multiple of BLOCK, or m is V. The entries lie in the m blocks with the largest maxima:
    to look there takes a tenth of the time of x.topk(m).
    """
    if m == x.shape[1]:
        return x.cpu(), torch.arange(m).expand(len(x), -1)
    blocks = x.view(len(x), -1, BLOCK)
    maxima = blocks.amax(-1)
    best = maxima.topk(min(m, maxima.shape[1])).indices
    values, at = blocks.gather(1, best[..., None].expand(-1, -1, BLOCK)).flatten(1).topk(m)
    return values.cpu(), (best.gather(1, at // BLOCK) * BLOCK + at % BLOCK).cpu()


def sort_falling(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries [R, m] sorted: values falling, those of equal value by rising id.

    Returns (values, ids, order): ids rise, and values[r, j] is that of id ids[r, order[r, j]].
    """
    ids, rising = ids.sort()
    values, order = values.gather(1, rising).sort(descending=True, stable=True)
    return values, ids, order


def pick(w: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first index [R, 1] at which the running sum of w [R, N] exceeds target [R, 1].

    w is float64, not negative, on the CPU, and not all 0 in any row. Also returns the target less
    the sum of what lies before the index.

    On the CPU the running sum is taken one by one. So it never falls, and it grows only at weights
    above 0: the index found never has weight 0. Further entries of weight 0 anywhere in the row
    would change nothing, not even a rounding.
    """
    running = w.cumsum(-1)
    target = torch.minimum(target, torch.nextafter(running[:, -1:], torch.zeros_like(target)))
    i = torch.searchsorted(running, target, right=True)
    return i, target - pad(running, (1, 0)).gather(1, i)


class Rows(NamedTuple):
    """R rows of logits and what draws from them. All but x is on the CPU."""

    x: Tensor  # [R, V], float32 or float64, before temperature; V is a multiple of BLOCK
    t: Tensor  # [R, 1], x's dtype: temperature
    top: Tensor  # [R, 1], x's dtype: the largest logit
    u: Tensor  # [R, 1], float64: the random number
    params: list[SamplingParams]
    ops: Native  # whose exponentials and sums these are

    def some(self, at: list[int]) -> Rows:
        """The rows `at` (rising)."""
        if len(at) == len(self.params):
            return self
        params = [self.params[i] for i in at]
        return Rows(take(self.x, at), self.t[at], self.top[at], self.u[at], params, self.ops)

    def column(self, numbers: list[float]) -> Tensor:
        """One number for each row, in x's dtype: [R, 1]."""
        return torch.tensor(numbers, dtype=self.x.dtype)[:, None]


def draw_many(x: Tensor, params: list[SamplingParams], u: list[float], ops: Native) -> list[int]:
    """draw(warp(x[r], params[r]), u[r]) for the rows of x [R, V], float32 or float64.

    The id is -1 where none can be drawn: the row holds NaN or +inf, or nothing but -inf, or its
    largest logit overflows when the temperature divides it.
    """
    x = padded(x)
    rows = Rows(
        x,
        torch.tensor([[divisor(p.temperature, x.dtype)] for p in params], dtype=x.dtype),
        x.amax(-1, keepdim=True).cpu(),
        torch.tensor(u, dtype=torch.float64)[:, None],
        params,
        ops,
    )
    ids = [-1] * len(params)
    usable, _ = partition((rows.top / rows.t)[:, 0].isfinite().tolist())
    if usable:
        put(ids, usable, _draw(rows.some(usable)))
    return ids


def _draw(rows: Rows) -> list[int]:
    """A token of each row; every row has one."""
    cut, whole = partition(_cuts(p) for p in rows.params)
    ids = [-1] * len(rows.params)
    if whole:
        put(ids, whole, _draw_from_all(rows.some(whole)))
    if cut:
        some = rows.some(cut)
        enough = max(64, *(2 * p.top_k + 32 for p in some.params))  # in most cases
        put(ids, cut, _draw_from_largest(some, enough))
    return ids


def _cuts(p: SamplingParams) -> bool:
    """Whether a step may drop tokens."""
    return p.top_k > 0 or p.top_p < 1 or p.min_p > 0


def _draw_from_all(rows: Rows) -> list[int]:
    """A token of each row where no step drops any: first its block, then the token in the block."""
    sums = _block_sums(rows)
    block, rest = pick(sums, rows.u * sums.cumsum(-1)[:, -1:])
    at = block * BLOCK + torch.arange(BLOCK)
    logits = rows.x.gather(1, at.to(rows.x.device)).cpu()
    w = rows.ops.exp((logits / rows.t).double() - rows.top / rows.t)
    ids: list[int] = at.gather(1, pick(w, rest)[0])[:, 0].tolist()
    return ids


def _block_sums(rows: Rows) -> Tensor:
    """The sum of exp(x/t - top/t) in each block: float64 [R, V / BLOCK] on the CPU."""
    device = rows.x.device
    step = 1 if device.type == "cpu" else 32  # one row of float64 stays in a CPU's cache
    y = torch.empty_like(rows.x[:step])
    z = torch.empty_like(y, dtype=torch.float64)
    limits = (rows.top / rows.t).to(device).split(step)
    sums = []
    for x, t, limit in zip(rows.x.split(step), rows.t.to(device).split(step), limits):
        y, z = y[: len(x)], z[: len(x)]
        z.copy_(torch.div(x, t, out=y)).sub_(limit)
        sums.append(rows.ops.total(rows.ops.exp(z).view(len(z), -1, BLOCK)).cpu())
    return torch.cat(sums)


def _draw_from_largest(rows: Rows, m: int) -> list[int]:
    """A token of each row where some step drops tokens: the m largest entries decide which.

    Rows for which they do not suffice are looked at again, with 16 times as many. m decides nothing
    else: the tokens do not depend on it.
    """
    width = rows.x.shape[1]
    m = min(m, width)
    values, ids = largest(rows.x, m)
    # Division keeps the order, but may make neighbours equal: so it comes before the sort.
    values, ids, order = sort_falling(values / rows.t, ids)
    w, enough = _weights_left(rows, values)
    w = torch.zeros_like(w).scatter(1, order, w)  # in the order of ids, as `draw` adds them
    drawn: list[int] = ids.gather(1, pick(w, rows.u * w.cumsum(-1)[:, -1:])[0])[:, 0].tolist()
    _, again = partition(enough.tolist())
    if again and m < width:
        put(drawn, again, _draw_from_largest(rows.some(again), 16 * m))
    return drawn


def _weights_left(rows: Rows, values: Tensor) -> tuple[Tensor, Tensor]:
    """What top_k, top_p and min_p leave of the m largest scores, values [R, m], falling.

    Returns the weights, float64 [R, m], 0 for what is dropped, and bool [R]: whether m entries were
    enough to know them.
    """
    width, m = rows.x.shape[1], values.shape[1]
    last = values[:, -1:]  # every entry above this one is among the m
    k = torch.tensor([[p.top_k if 0 < p.top_k < width else width] for p in rows.params])
    kth = torch.where(k <= m, values.gather(1, (k - 1).clamp(max=m - 1)), -INF)
    w = rows.ops.exp(values.double() - values[:, :1].double()) * (values >= kth)
    min_p = rows.column([p.min_p for p in rows.params])
    keep = (w > 0) & _inside_top_p(rows, w, (k == width)[:, 0]) & (w.to(min_p.dtype) >= min_p)
    keep[:, 0] = True
    lowest = values.masked_fill(~keep, INF).amin(-1, keepdim=True)
    everything = last == -INF  # what is not among the m is -inf too
    enough = (lowest > last) & ((kth > last) | (k == width)) | everything
    return w * keep, enough[:, 0]


def _inside_top_p(rows: Rows, w: Tensor, no_top_k: Tensor) -> Tensor:
    """bool [R, m]: does top_p keep the token? w [R, m] are the weights that top_k leaves, falling.

    It does if the token and all that are less likely have together more than 1 - top_p. Without
    top_k (no_top_k, bool [R]) tokens beyond the m count too.
    """
    running = w.cumsum(-1)
    total = running[:, -1:].clone()
    whole = [i for i, p in enumerate(rows.params) if p.top_p < 1 and no_top_k[i]]
    if whole:
        total[whole] = _block_sums(rows.some(whole)).cumsum(-1)[:, -1:]
    rest = (total - (running - w)) / total
    cut = rows.column([1 - p.top_p for p in rows.params])
    return (rest.to(cut.dtype) > cut) | (cut == 0)
