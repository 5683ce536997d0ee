"""Random logits and rows, and what `sample` must return for a row, transform by transform."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from minqwen.sampling.draw import Row
from minqwen.sampling.params import SamplingParams
from minqwen.sampling.warp import draw, uniform, warp

INF, NAN = math.inf, math.nan


def logits_like(
    rng: np.random.Generator,
    rows: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
) -> Tensor:
    """Gaussian; bfloat16 makes many ties, as in a real model's logits."""
    x = torch.from_numpy(rng.normal(0, scale, (rows, width)))
    return x.bfloat16().to(dtype) if rng.random() < 0.5 else x.to(dtype)


def make_row(
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    seed: int = 0,
    **fields: Any,
) -> Row:
    ids = [*prompt, *output]
    return Row(params=params, ids=ids, num_prompt=len(prompt), seed=seed, **fields)


def random_params(rng: np.random.Generator, **fixed: Any) -> SamplingParams:
    def pick(*choices: float) -> float:
        return choices[rng.integers(len(choices))]

    fields = dict(
        temperature=pick(1.0, 0.7, 0.2, 1.9, 1e-3),
        top_k=pick(0, 0, 1, 2, 20, 63, 70, 400),
        top_p=pick(1.0, 1.0, 0.9, 0.8, 0.5, 0.1, 0.999, 1e-6),
        min_p=pick(0.0, 0.0, 0.05, 0.5, 1.0),
    )
    return SamplingParams(**{**fields, **fixed})


def random_row(rng: np.random.Generator, width: int, seed: int, **fixed: Any) -> Row:
    """A row with any combination of what changes logits."""

    def ids(most: int) -> list[int]:
        return rng.integers(0, width, rng.integers(0, most)).tolist()

    some: dict[str, Any] = {}
    if rng.random() < 0.5:
        some["repetition_penalty"] = float(rng.choice([1.05, 0.8, 2.0]))
    if rng.random() < 0.3:
        some["presence_penalty"] = float(rng.uniform(-2, 2))
        some["frequency_penalty"] = float(rng.uniform(-2, 2))
    if rng.random() < 0.3:
        some["logit_bias"] = {i: float(rng.uniform(-9, 9)) for i in ids(5)}
    if rng.random() < 0.3:
        some["min_tokens"] = int(rng.integers(9))
        some["ignore_eos"] = bool(rng.random() < 0.3)
        some["stop_token_ids"] = ids(3)
    if rng.random() < 0.3:
        some["temperature"] = 0
    params = random_params(rng, **{**some, **fixed})
    mask = torch.from_numpy(rng.random(width) < 0.5) if rng.random() < 0.3 else None
    output = ids(12)
    bad_words: tuple[tuple[int, ...], ...] = ()
    if rng.random() < 0.3 and output:
        bad_words = ((output[-1], int(rng.integers(width))), (*ids(3), 0), (1,))
    return make_row(
        params,
        ids(30),
        output,
        seed,
        index=int(rng.integers(3)),
        eos_token_ids=tuple(ids(3)),
        bad_words=bad_words,
        mask=mask,
    )


def by_hand(logits: Tensor, row: Row) -> int:
    """What `sample` must return for logits [V]: one transform after the other; -1 for no token."""
    p, output = row.params, row.ids[row.num_prompt :]
    if p.forced_ids is not None and len(output) < len(p.forced_ids):
        return p.forced_ids[len(output)]
    x = logits.double() if logits.dtype == torch.float64 else logits.float()
    if row.ids and p.repetition_penalty != 1:
        penalise = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)
        x = penalise(torch.tensor([row.ids]), x[None].clone())[0]
    x = x.clone()
    for i, count in Counter(output).items():
        x[i] -= p.frequency_penalty * count + p.presence_penalty
    for i, bias in (p.logit_bias or {}).items():
        x[i] += bias
    if len(output) < p.min_tokens:
        x[list(() if p.ignore_eos else row.eos_token_ids) + list(p.stop_token_ids)] = -INF
    for *head, last in row.bad_words:
        if output[len(output) - len(head) :] == head:
            x[last] = -INF
    if row.mask is not None:
        x[~row.mask] = -INF
    if not x.max().isfinite():
        return -1
    if p.temperature == 0:
        return int((x == x.max()).nonzero()[0, 0])
    if not warp(x, p).max().isfinite():
        return -1
    return draw(warp(x, p), uniform(row.seed, row.index, len(output)))
