"""Which mistake of the catalogue explains an engine, by what it said of the tokens.

Each mistake is made in our own model, and the engine's tokens are forced on it. A mistake explains
the engine if the engine is as far from the mistaken model as a faithful implementation of the
mistaken model would be: the mistake's own rounding is the unit, because some mistakes make a model
that amplifies rounding. And it must be there: by least squares, about the whole of its effect must
be in the engine's error, and not by chance. The second test finds mistakes that are smaller than
rounding, such as int8 weights in bfloat16: over some hundreds of tokens rounding averages out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from minqwen.errors import MinqwenError
from minqwen.lab.audit.evidence import TIE, Evidence, Original
from minqwen.lab.audit.forced import Forced, Report, forced, rows_of
from minqwen.lab.audit.records import Record
from minqwen.lab.audit.shape import shapes
from minqwen.lab.audit.stats import Units, error_in_units, ratio, share_of
from minqwen.lab.compare import rms
from minqwen.lab.faults import FAULTS, Fault
from minqwen.model import Native, Qwen2
from minqwen.tokenizer import Tokenizer

NEAREST = 8  # mistakes whose own rounding is measured: it takes another forward pass
# Which mistakes are tried: all, those in the prompt's tokens, or none.
Among = Literal["all", "prompts", "none"]
# A mistake that changes less than this share of a faithful error is not told from rounding: an
# engine in a wider dtype than it claims may have the very rounding of our model in that dtype.
LEAST = 0.1
ESTIMATED = ("logprobs-of-temperature", "logprobs-of-top-k", "logprobs-of-top-p")


@dataclass(frozen=True)
class Tried:
    """One mistake that was tried.

    units: how far the engine is from it, in units of its own rounding. distance: the same without a
    unit, root mean square, by which mistakes are ranked. share: of its effect, in the engine's
    error; 1 is all of it. explains: whether it may be what the engine does.
    """

    name: str
    distance: float
    share: float
    significance: float
    units: float | None = None
    explains: bool = False
    what: str = ""


@dataclass
class Hypothesis:
    """A mistake, and how to get what it makes of the tokens: in a wide dtype and in the claimed."""

    name: str
    wide: Callable[[], Forced]
    claimed: Callable[[], Forced]
    what: str = ""
    of_logits: bool = False  # it changes what is reported, and not which token is largest


def explanations(original: Original, seen: Evidence, among: Among = "all") -> list[Tried]:
    """All mistakes that were tried, the nearest first. The first that explains is the answer."""
    tried = []
    for hypothesis in hypotheses_for(original, seen, among):
        try:
            tried.append((attempt(hypothesis, hypothesis.wide(), seen), hypothesis))
        except MinqwenError:
            continue  # no model can be built of it, so no engine runs it
    tried.sort(key=lambda pair: pair[0].distance)
    return [
        measured(result, hypothesis, seen) if i < NEAREST and result.significance > 0 else result
        for i, (result, hypothesis) in enumerate(tried)
    ]


def hypotheses_for(original: Original, seen: Evidence, among: Among) -> Iterator[Hypothesis]:
    """Those in the prompt's tokens need to know which chat it was made of."""
    faults = [f for f in FAULTS.values() if not f.silent and f.applies(original.config)]
    if among == "all":
        yield from shape_hypotheses(original, seen)
        for fault in faults:
            if fault.in_model:
                yield model_hypothesis(fault, original, seen)
            elif fault.report is not None and fault.name not in ESTIMATED:
                yield report_hypothesis(fault, original, seen)
    if among != "none" and original.tokenizer is not None and any(r.messages for r in seen.records):
        for fault in faults:
            if fault.encode is not None:
                yield prompt_hypothesis(fault, original, seen)


def wide_dtype(seen: Evidence) -> torch.dtype:
    """In which a mistake's rounding does not count, beside that of the claimed dtype."""
    return torch.float64 if seen.dtype == torch.float32 else torch.float32


def model_hypothesis(fault: Fault, original: Original, seen: Evidence) -> Hypothesis:
    def at(dtype: torch.dtype) -> Forced:
        return original.remembered(
            (fault.name, dtype),
            seen.records,
            lambda: forced(rows_of(original.wrong(fault, dtype), seen.records)),
        )

    return Hypothesis(fault.name, lambda: at(wide_dtype(seen)), lambda: at(seen.dtype))


def report_hypothesis(fault: Fault, original: Original, seen: Evidence) -> Hypothesis:
    def known(dtype: torch.dtype, compute: Callable[[], Forced]) -> Callable[[], Forced]:
        return lambda: original.remembered((fault.name, dtype), seen.records, compute)

    wide = known(torch.float64, lambda: forced(seen.rows, fault.logprobs))
    claimed = known(seen.dtype, lambda: reported(original, seen, fault.logprobs))
    return Hypothesis(fault.name, wide, claimed, of_logits=True)


def reported(original: Original, seen: Evidence, report: Report) -> Forced:
    """What a faithful implementation in the claimed dtype would report so."""
    return forced(rows_of(original.right(seen.dtype, Native()), seen.records), report)


def shape_hypotheses(original: Original, seen: Evidence) -> Iterator[Hypothesis]:
    if not len(seen.said):
        return
    for shape in shapes(seen.rows, seen.said, seen.spread):
        values = Forced(shape.values, seen.truth.gaps, seen.truth.leads)
        yield Hypothesis(
            shape.fault,
            partial(same, values),
            partial(reported, original, seen, shape.report),
            shape.what,
            of_logits=True,
        )


def same(values: Forced) -> Forced:
    return values


def prompt_hypothesis(fault: Fault, original: Original, seen: Evidence) -> Hypothesis:
    """The mistake is in the prompt's tokens. What was said of the prompt itself stays right."""
    tokenizer = original.tokenizer
    assert tokenizer is not None

    def at(dtype: torch.dtype) -> Forced:
        model = original.right(dtype, Native())
        parts = [answers(model, fault, tokenizer, record) for record in seen.records]
        return Forced(*(torch.cat([each[i] for each in parts]) for i in range(3)))

    return Hypothesis(fault.name, lambda: at(torch.float64), lambda: at(seen.dtype))


def answers(
    model: Qwen2, fault: Fault, tokenizer: Tokenizer, record: Record
) -> tuple[Tensor, Tensor, Tensor]:
    """values, gaps and leads of one record, its answer after the mistaken prompt."""
    right = forced(rows_of(model, [record]))
    if not record.messages:
        return right.values, right.gaps, right.leads
    moved = record.with_prompt(fault.ids(tokenizer, record.messages))
    wrong = forced(rows_of(model, [moved]))
    values = right.values.clone()
    values[[i for i, e in enumerate(record.entries) if e.position >= record.prompt]] = wrong.values
    return values, wrong.gaps, wrong.leads


def attempt(hypothesis: Hypothesis, wrong: Forced, seen: Evidence) -> Tried:
    """How near the engine is to a mistaken model, `wrong`, computed in a wide dtype."""
    if not len(seen.said):
        return by_margins(hypothesis, wrong, seen)
    effect = seen.weighed(wrong.values - seen.truth.values)
    error = seen.weighed(seen.said - seen.truth.values)
    share = share_of(effect, error, seen.blocks)
    matters = rms(effect) > LEAST * rms(seen.unit)
    significance = share.significance if share.significant and matters else 0.0
    distance = rms(error - effect)
    return Tried(hypothesis.name, distance, share.share, significance, what=hypothesis.what)


def by_margins(hypothesis: Hypothesis, wrong: Forced, seen: Evidence) -> Tried:
    """The same where the engine gave tokens only: they should be the mistaken model's choice."""
    if hypothesis.of_logits:
        return Tried(hypothesis.name, rms(seen.truth.gaps), 0.0, 0.0)
    kept = (wrong.gaps <= seen.tie).double().mean()
    before = (seen.truth.gaps <= seen.tie).double().mean()
    return Tried(hypothesis.name, rms(wrong.gaps), float(kept), float(kept - before))


def measured(result: Tried, hypothesis: Hypothesis, seen: Evidence) -> Tried:
    """The same with units: the mistaken model in the claimed dtype has an error too."""
    wide, claimed = hypothesis.wide(), hypothesis.claimed()
    if not len(seen.said):
        noise = max(rms(claimed.leads - wide.leads), seen.tie / TIE)
        units = ratio(float(wide.gaps.max()), noise)
        return with_units(result, units, units <= TIE)
    found = distance_in_units(seen, wide.values, claimed.values)
    return with_units(result, found.units, not found.too_large)


def with_units(result: Tried, units: float, explains: bool) -> Tried:
    return Tried(
        result.name,
        result.distance,
        result.share,
        result.significance,
        units,
        explains,
        result.what,
    )


def distance_in_units(seen: Evidence, wide: Tensor, claimed: Tensor) -> Units:
    """How far the engine is from the mistaken model; the unit is at least the right model's."""
    own = seen.weighed(claimed - wide)[None]
    unit = own if rms(own) > rms(seen.unit) else seen.unit
    return error_in_units(seen.weighed(seen.said - wide), unit, seen.blocks)
