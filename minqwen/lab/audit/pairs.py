"""A trainer and a rollout engine disagree about the same tokens: which of them is nearer the truth?

Reinforcement learning divides the trainer's probability of a token by the rollout engine's. Two
faithful engines differ by their rounding, which is independent: by up to sqrt(2) times the error of
one of them. More than that is a mistake on one side or on both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from minqwen.errors import MinqwenError
from minqwen.lab.audit.audit import Report, audit
from minqwen.lab.audit.evidence import Original, gather_evidence
from minqwen.lab.audit.explain import Among
from minqwen.lab.audit.records import Record
from minqwen.lab.audit.stats import Units, block_sums, drawn, error_in_units

SURE = 0.99  # of the bootstrap's samples, in which the nearer side must be the nearer one


@dataclass
class Pair:
    """Both sides' audits, and what they say together.

    apart: the difference of the two sides, in units of the difference of two faithful engines.
    nearer: the side that is nearer the truth, or neither if that is chance. sure: in which share of
    the bootstrap's samples the trainer is nearer. ratio_mean, ratio_most: exp(trainer - rollout),
    its mean and its largest or smallest value, whichever is further from 1.
    """

    verdict: Literal["agree", "diverge"]
    sentence: str
    nearer: Literal["trainer", "rollout", "neither"]
    sure: float
    apart: Units
    ratio_mean: float
    ratio_most: float
    trainer: Report
    rollout: Report

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def audit_pair(
    original: Original,
    trainer: Sequence[Record],
    rollout: Sequence[Record],
    claimed: str = "bfloat16",
    *,
    among: Among = "all",
) -> Pair:
    """Judge both sides, and their difference. Raises MinqwenError unless they have one text."""
    trainer, rollout = in_common(trainer, rollout)
    reports = [audit(original, side, claimed, among=among) for side in (trainer, rollout)]
    for report in reports:
        if report.verdict == "refused":
            raise MinqwenError(report.sentence.removeprefix("refused: "))
    dtype = getattr(torch, claimed)
    a, b = (gather_evidence(original, list(side), dtype) for side in (trainer, rollout))
    unit = torch.cat((a.unit, b.unit)) * math.sqrt(2)
    apart = error_in_units(a.weighed(a.said - b.said), unit, a.blocks)
    sure = nearer_share(a.error, b.error, a.blocks)
    diverges = apart.too_large or any(report.verdict == "diverge" for report in reports)
    nearer: Literal["trainer", "rollout", "neither"] = "neither"
    if sure >= SURE:
        nearer = "trainer"
    elif sure <= 1 - SURE:
        nearer = "rollout"
    ratios = (a.said - b.said).exp()
    most = ratios[(a.said - b.said).abs().argmax()]
    pair = Pair(
        "diverge" if diverges else "agree",
        "",
        nearer,
        sure,
        apart,
        float(ratios.mean()),
        float(most),
        *reports,
    )
    pair.sentence = sentence_of(pair)
    return pair


def nearer_share(trainer: Tensor, rollout: Tensor, blocks: Tensor) -> float:
    """In which share of the bootstrap's samples the trainer's error is the smaller one.

    A tie counts half: two sides that say the same are equally near.
    """
    gain = drawn(block_sums(rollout.pow(2) - trainer.pow(2), blocks))
    return float(((gain > 0).double() + (gain == 0).double() / 2).mean())


def in_common(
    trainer: Sequence[Record], rollout: Sequence[Record]
) -> tuple[list[Record], list[Record]]:
    """The records with the entries that both sides have. Raises MinqwenError for other tokens."""
    if len(trainer) != len(rollout):
        raise MinqwenError(
            f"the trainer has {len(trainer)} records and the rollout {len(rollout)}, expected the "
            "same texts in the same order"
        )
    pairs = []
    for a, b in zip(trainer, rollout):
        if a.ids != b.ids:
            raise MinqwenError(f"{a.where} and {b.where}: other tokens, expected the same ones")
        pairs.append((only(a, b), only(b, a)))
    return [a for a, _ in pairs], [b for _, b in pairs]


def only(a: Record, b: Record) -> Record:
    """a with the entries that b has too, in order; without greedy margins."""
    both = {entry[:2] for entry in b.entries}
    kept = sorted(entry for entry in a.entries if entry[:2] in both)
    return dataclasses.replace(a, entries=tuple(kept), greedy=False)


def sentence_of(pair: Pair) -> str:
    sizes = (
        f"trainer {pair.trainer.units:.3g} units, rollout {pair.rollout.units:.3g} units, "
        f"{pair.apart.units:.3g} units apart"
    )
    if pair.verdict == "agree":
        return f"agree: {sizes}; the difference is rounding"
    if pair.nearer == "neither":
        return f"diverge: {sizes}; neither side is clearly nearer the truth"
    worse = pair.rollout if pair.nearer == "trainer" else pair.trainer
    text = f"diverge: {sizes}; the {pair.nearer} is nearer the truth"
    if worse.explained_by is None:
        return text
    other = "rollout" if pair.nearer == "trainer" else "trainer"
    return f"{text}, and the {other} is most like {worse.explained_by.name}"
