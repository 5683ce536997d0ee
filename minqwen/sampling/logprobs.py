"""The model's log probabilities, before any sampling transform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minqwen.model.arithmetic import Native
from minqwen.sampling.kernels import largest, padded, sort_falling

NATIVE = Native()


def wide(x: Tensor) -> Tensor:
    """float32, as transformers samples, or float64 where the model computes in that."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


@dataclass
class Logprob:
    """Natural logarithm of a token's probability; rank: 1 + the number of likelier tokens.

    The shape is vLLM's. The engine fills in decoded_token.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def logprobs_of(
    logits: Tensor, ids: Sequence[int], num: int | Sequence[int], ops: Native = NATIVE
) -> list[dict[int, Logprob]]:
    """The model's logprobs, before any sampling transform: logits [T, V], ids [T] -> T dicts.

    Each is {id: Logprob}: the row's id first, then the `num` likeliest (-1: all), equals by rising
    id. ops: the arithmetic of the log_softmax: native in float32, or in float64 for float64 logits;
    exact in float64. One row's values do not depend on the other rows.
    """
    nums = [num] * len(ids) if isinstance(num, int) else num
    step = 16 if logits.device.type == "cpu" else 256  # rows at a time, to bound the memory
    entries: list[dict[int, Logprob]] = []
    for start in range(0, len(ids), step):
        some = slice(start, start + step)
        entries += _of_rows(ops.log_softmax(wide(logits[some])), ids[some], nums[some])
    return entries


def _of_rows(lp: Tensor, ids: Sequence[int], nums: Sequence[int]) -> list[dict[int, Logprob]]:
    """`logprobs_of` some rows, from log probabilities lp [R, V]."""
    width = lp.shape[1]
    chosen = lp.gather(1, torch.as_tensor(ids, device=lp.device)[:, None])
    above = _count_above(lp, chosen)
    nums = [width if n < 0 else min(n, width) for n in nums]
    best = _best(lp, max(nums))
    entries = []
    for i, logprob in enumerate(chosen[:, 0].tolist()):
        values, likeliest = best[i]
        entry = {int(ids[i]): Logprob(logprob, 1 + above[i])}
        _add_likeliest(entry, values[: nums[i]], likeliest[: nums[i]])
        entries.append(entry)
    return entries


def _add_likeliest(entry: dict[int, Logprob], values: list[float], ids: list[int]) -> None:
    """Adds values, falling, of ids. Equal values have one rank, and the id that is there stays."""
    rank = 1
    for j, value in enumerate(values):
        if j and value != values[j - 1]:
            rank = j + 1
        entry.setdefault(ids[j], Logprob(value, rank))


def _count_above(x: Tensor, limit: Tensor) -> list[int]:
    """How many entries of each row of x [R, V] are above limit [R, 1]."""
    if x.device.type == "cpu":  # numpy takes a sixth of the time of torch's sum of booleans
        return [int(np.count_nonzero(row > c)) for row, c in zip(x.numpy(), limit.numpy())]
    counts: list[int] = (x > limit).sum(-1).tolist()
    return counts


def _best(x: Tensor, n: int) -> list[tuple[list[float], list[int]]]:
    """Values and ids of the n largest of each row, falling; those of equal value by rising id."""
    if n == 0:
        return [([], []) for _ in x]
    x = padded(x)
    m = n
    while True:  # until all that ties with the n-th is among the m largest
        m = min(2 * m + 16, x.shape[1])
        values, ids = largest(x, m)
        if m == x.shape[1] or (values.amin(-1) < values.topk(n).values[:, -1]).all():
            break
    values, ids, order = sort_falling(values, ids)
    return list(zip(values[:, :n].tolist(), ids.gather(1, order)[:, :n].tolist()))
