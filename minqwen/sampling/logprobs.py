"""The model's log probabilities, before any sampling transform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from minqwen.sampling.warp import INF

BLOCK = 128  # entries of the vocabulary whose sum or maximum is taken at once


def wide(x: Tensor) -> Tensor:
    """float32, as transformers samples, or float64 where the model computes in that."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def take(x: Tensor, at: list[int]) -> Tensor:
    return x if len(at) == len(x) else x[torch.tensor(at, device=x.device)]


def largest(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m largest entries of each row of x [R, V], in any order, on the CPU: values and ids [R, m].

    They lie in the m blocks with the largest maxima: a tenth of the time of x.topk(m).
    """
    if m == x.shape[1]:
        return x.cpu(), torch.arange(m).expand(len(x), -1)
    blocks = x.view(len(x), -1, BLOCK)
    maxima = blocks.amax(-1)
    best = maxima.topk(min(m, maxima.shape[1])).indices
    values, at = blocks.gather(1, best[..., None].expand(-1, -1, BLOCK)).flatten(1).topk(m)
    return values.cpu(), (best.gather(1, at // BLOCK) * BLOCK + at % BLOCK).cpu()


@dataclass
class Logprob:
    """Natural logarithm of a token's probability; rank: 1 + the number of likelier tokens (vLLM's shape)."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def logprobs_of(
    logits: Tensor, ids: Sequence[int], num: int | Sequence[int]
) -> list[dict[int, Logprob]]:
    """The model's logprobs, before any sampling transform: logits [T, V], ids [T] -> T dicts of id: Logprob.

    Each holds the row's id first, then the `num` likeliest (-1: all; equals in the order of their ids).
    float32 log_softmax; float64 for float64 logits. One row's values do not depend on the other rows.
    """
    out: list[dict[int, Logprob]] = []
    nums = [num] * len(ids) if isinstance(num, int) else list(num)
    step = 16 if logits.device.type == "cpu" else 256
    for start in range(0, len(ids), step):
        some = slice(start, start + step)
        lp = wide(logits[some]).log_softmax(-1)
        chosen = lp.gather(1, torch.as_tensor(ids[some], device=lp.device)[:, None])
        above = _count_above(lp, chosen)
        counts = [lp.shape[1] if n < 0 else min(n, lp.shape[1]) for n in nums[some]]
        best = _best(lp, max(counts)) if max(counts) else [([], [])] * len(lp)
        for i, own, larger, n, (values, tops) in zip(
            ids[some], chosen[:, 0].tolist(), above, counts, best
        ):
            row, rank = {int(i): Logprob(own, 1 + int(larger))}, 1
            for j in range(n):
                rank = rank if j and values[j] == values[j - 1] else j + 1
                row.setdefault(tops[j], Logprob(values[j], rank))
            out.append(row)
    return out


def _count_above(x: Tensor, limit: Tensor) -> list[int]:
    if x.device.type == "cpu":  # a sixth of the time of torch's sum of booleans
        return [np.count_nonzero(row > c) for row, c in zip(x.numpy(), limit.numpy())]
    return (x > limit).sum(-1).tolist()


def _best(x: Tensor, n: int) -> list[tuple[list[float], list[int]]]:
    """The n largest of each row, falling, equals by rising id."""
    x = pad(x, (0, -x.shape[1] % BLOCK), value=-INF) if x.shape[1] % BLOCK else x
    m = n
    while True:  # until all that ties with the n-th is among the m largest
        m = min(2 * m + 16, x.shape[1])
        values, ids = largest(x, m)
        if m == x.shape[1] or (values.amin(-1) < values.topk(n).values[:, -1]).all():
            break
    ids, order = ids.sort()
    values, order = values.gather(1, order).sort(descending=True, stable=True)
    return list(zip(values[:, :n].tolist(), ids.gather(1, order)[:, :n].tolist()))
