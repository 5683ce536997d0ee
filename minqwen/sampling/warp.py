"""The definition of how a token is drawn: temperature, top_k, top_p, min_p, a random number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minqwen.sampling.params import SamplingParams

INF = math.inf


def uniform(seed: int, index: int, position: int) -> float:
    """The number in [0, 1), a multiple of 2^-53, that draws token `position` of sample `index`.

    Philox4x32-10, a counter-based generator: Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", 2011. Key: the 64-bit seed; counter: position and sample index, 64 bits each.
    """
    mask = 0xFFFFFFFF
    key = [seed & mask, seed >> 32 & mask]
    c = [position & mask, position >> 32 & mask, index & mask, index >> 32 & mask]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ key[0], b & mask, a >> 32 ^ c[3] ^ key[1], a & mask]
        key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
    return ((c[0] >> 5) * 2**26 + (c[1] >> 6)) * 2.0**-53


def divisor(temperature: float, dtype: torch.dtype) -> float:
    """The temperature, at most the largest number of dtype.

    Beyond it would be infinity, and -inf / inf is NaN.
    """
    return min(temperature, torch.finfo(dtype).max)


def warp(scores: Tensor, params: SamplingParams) -> Tensor:
    """Scores [V] after temperature, top_k, top_p and min_p: -inf for the tokens that are dropped.

    scores are float32 or float64. The steps are those of transformers'
    generation/logits_process.py: what ties with the k-th score stays; top_p drops the least likely
    tokens as long as their sum is <= 1 - top_p, and keeps one; min_p drops what is less likely than
    min_p times the likeliest.
    Where the cut of top_p falls among equals, the lowest ids stay (transformers' sort leaves that
    open). Sums are float64, rounded to the scores' dtype where they are compared. transformers adds
    in that dtype, which differs only where a sum is within its rounding of 1 - top_p.
    """
    temperature = divisor(params.temperature, scores.dtype)
    x = scores / torch.tensor(temperature, dtype=scores.dtype, device=scores.device)
    if 0 < params.top_k < len(x):
        x = x.masked_fill(x < x.topk(params.top_k).values[-1], -INF)
    if params.top_p < 1:
        order = x.sort(descending=True, stable=True).indices.flip(0)
        drop = x[order].double().softmax(-1).cumsum(-1).to(x.dtype) <= 1 - params.top_p
        drop[-1] = False
        x[order[drop]] = -INF
    ratio = (x.double() - x.max()).exp().to(x.dtype)
    return x.masked_fill(ratio < params.min_p, -INF)


def draw(scores: Tensor, u: float) -> int:
    """The id that u in [0, 1) draws from softmax(scores [V]).

    It is the first id at which the running sum of the probabilities exceeds u.
    """
    running: list[float] = (scores.double() - scores.max()).exp().cumsum(-1).tolist()
    # u * sum may round up to the sum, which no running sum exceeds.
    target = min(u * running[-1], math.nextafter(running[-1], 0))
    return next(i for i, total in enumerate(running) if total > target)
