"""Is the engine that we can only ask the model that it says it is?

`audit` forces the engine's tokens on the model in float64, the truth, and on faithful
implementations in the dtype that the engine claims. The engine's error in units of theirs says
whether it is rounding (lab/audit/stats.py). If it is not, the catalogue of mistakes is tried
(lab/audit/explain.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from minqwen.errors import MinqwenError
from minqwen.files import printable
from minqwen.lab.audit.evidence import Evidence, Original, gather_evidence
from minqwen.lab.audit.explain import Among, Tried, explanations
from minqwen.lab.audit.forced import (
    FAITHFUL,
    FLOOR,
    forced,
    rows_of,
)
from minqwen.lab.audit.printed import precision_of
from minqwen.lab.audit.records import Record, check_record
from minqwen.lab.audit.stats import Units, error_in_units
from minqwen.lab.compare import rms

Verdict = Literal["agree", "diverge", "refused"]
FEWEST = 30  # numbers, or greedy tokens: with less than that nothing can be said
BLOCK = 8  # places whose errors are taken to be alike
WORST = 10  # tokens that the report shows
CLAIMS = ("bfloat16", "float16", "float32")
EXACT = 0.25  # units below which the engine is more exact than its dtype


@dataclass(frozen=True)
class Token:
    """One token of the report. error: nats, the engine's less the truth's."""

    record: int
    position: int
    text: str
    said: float
    truth: float
    units: float  # its error over the faithful error of a token as sure as it

    @property
    def error(self) -> float:
        return self.said - self.truth


@dataclass(frozen=True)
class Flip:
    """A greedy token that is not the most probable one of the truth.

    margin: how far its logit is below the largest. tie: whether rounding can do that.
    """

    record: int
    position: int
    text: str
    margin: float
    tie: bool


@dataclass
class Report:
    """What an audit found. docs/audit.md explains the fields."""

    verdict: Verdict
    sentence: str
    dtype: str
    records: int
    numbers: int
    units: float | None = None
    low: float | None = None
    high: float | None = None
    rms_error: float | None = None
    impossible: int = 0
    printed: str = ""
    reported: str = "unknown"
    greedy_tokens: int = 0
    tie_margin: float | None = None
    flips: list[Flip] = field(default_factory=list)
    explained_by: Tried | None = None
    runner_up: Tried | None = None
    tried: list[Tried] = field(default_factory=list)
    worst: list[Token] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    offered: str = ""
    requests: int = 0

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def refused(reason: str, dtype: str = "", notes: Sequence[str] = ()) -> Report:
    return Report("refused", f"refused: {reason}", dtype, 0, 0, notes=list(notes))


def audit(
    original: Original,
    records: Sequence[Record],
    claimed: str = "bfloat16",
    *,
    among: Among = "all",
    notes: Sequence[str] = (),
    prompts_differ: bool = False,
) -> Report:
    """Judge what an engine said of `records`.

    claimed: the dtype that the engine says it computes in, one of CLAIMS. among: which mistakes are
    tried; with "none" nothing is explained, and mistakes smaller than rounding are not found.
    notes: what is already known. prompts_differ: whether the engine makes other tokens of a text
    or of a chat. Raises MinqwenError for records that the model cannot have.
    """
    if claimed not in CLAIMS:
        raise MinqwenError(f"the claimed dtype is {claimed!r}, expected {', '.join(CLAIMS)}")
    for record in records:
        check_record(record, original.config)
    numbers = sum(len(record.entries) for record in records)
    greedy = sum(len(record.ids) - record.prompt for record in records if record.greedy)
    if max(numbers, greedy) < FEWEST:
        return refused(
            f"{numbers} log probabilities and {greedy} greedy tokens are too few, expected "
            f"{FEWEST} of one kind at least",
            claimed,
            notes,
        )
    seen = gather_evidence(original, list(records), getattr(torch, claimed), numbers >= FEWEST)
    return judged(original, seen, claimed, among, list(notes), prompts_differ)


def judged(
    original: Original,
    seen: Evidence,
    claimed: str,
    among: Among,
    notes: list[str],
    prompts_differ: bool,
) -> Report:
    report = Report(
        verdict="agree",
        sentence="",
        dtype=claimed,
        records=len(seen.records),
        numbers=len(seen.said),
        greedy_tokens=len(seen.truth.gaps),
        tie_margin=seen.tie if len(seen.truth.gaps) else None,
        flips=flips_of(original, seen),
        tried=explanations(original, seen, among),
        notes=notes,
    )
    wrong = any(not flip.tie for flip in report.flips)
    if len(seen.said):
        measured = units_of(seen)
        add_numbers(report, original, seen, measured)
        wrong = wrong or measured.too_large
    accepted = [each for each in report.tried if each.explains]
    if wrong or accepted or prompts_differ:
        report.verdict = "diverge"
        add_explanation(report, accepted)
    if len(seen.said):
        report.reported = reported_as(report.explained_by, wrong)
        if wrong and not accepted:
            notes += other_dtypes(original, seen, claimed)
    report.sentence = sentence_of(report, prompts_differ)
    return report


def add_explanation(report: Report, accepted: list[Tried]) -> None:
    """The nearest mistake that explains the engine, and the next one."""
    report.explained_by = accepted[0] if accepted else None
    others = [each for each in accepted[1:] + report.tried if each is not report.explained_by]
    report.runner_up = others[0] if others else None


def units_of(seen: Evidence) -> Units:
    return error_in_units(seen.error, seen.unit, seen.blocks)


def add_numbers(report: Report, original: Original, seen: Evidence, measured: Units) -> None:
    error = seen.said - seen.truth.values
    report.units, report.low, report.high = measured.units, measured.low, measured.high
    report.rms_error = rms(error)
    report.impossible = int(((seen.said <= FLOOR) & (seen.truth.values > FLOOR)).sum())
    report.printed = precision_of(seen.said).what
    report.tokens = tokens_of(original, seen)
    report.worst = sorted(report.tokens, key=lambda token: -token.units)[:WORST]
    if measured.units < EXACT:
        report.notes.append(
            f"the engine is far more exact than {report.dtype}: its dtype is another one"
        )


def tokens_of(original: Original, seen: Evidence) -> list[Token]:
    sizes = seen.error.abs() / max(rms(seen.unit), 1e-300)
    tokens, i = [], 0
    for number, record in enumerate(seen.records):
        for entry in record.entries:
            text = text_of(original, [entry.token])
            numbers = (float(seen.said[i]), float(seen.truth.values[i]), float(sizes[i]))
            tokens.append(Token(number, entry.position, text, *numbers))
            i += 1
    return tokens


def text_of(original: Original, ids: list[int]) -> str:
    """Tokens as text, or as numbers where there is no tokenizer or no text."""
    numbers = " ".join(map(str, ids))
    if original.tokenizer is None:
        return numbers
    try:
        return printable(original.tokenizer.decode(ids)) or numbers
    except MinqwenError:
        return numbers  # a row of the vocabulary that no token has


def flips_of(original: Original, seen: Evidence) -> list[Flip]:
    flips, gaps = [], iter(seen.truth.gaps.tolist())
    for number, record in enumerate(seen.records):
        if record.greedy:
            those = [next(gaps) for _ in record.ids[record.prompt :]]
            flips += flips_of_record(original, seen, number, those)
    return flips


def flips_of_record(
    original: Original, seen: Evidence, number: int, gaps: Sequence[float]
) -> list[Flip]:
    record, flips = seen.records[number], []
    for position, gap in enumerate(gaps, record.prompt):
        if gap > 0:
            if spelled_alike(original, seen, number, position):
                break  # from here on the engine had other tokens than ours of the same text
            text = text_of(original, [record.ids[position]])
            flips.append(Flip(number, position, text, gap, gap <= seen.tie))
    return flips


def spelled_alike(original: Original, seen: Evidence, number: int, position: int) -> bool:
    """Whether the truth would have begun the same text, with another token.

    An engine's text without its tokens says no more.
    """
    record = seen.records[number]
    if not record.from_text or original.tokenizer is None:
        return False
    best = int(seen.rows[number].logits[position - 1].argmax())
    written = b"".join(original.tokenizer.token_bytes(id) for id in record.ids[position:])
    return written.startswith(original.tokenizer.token_bytes(best))


def reported_as(found: Tried | None, wrong: bool) -> str:
    if found is not None and found.what:
        return found.what
    if found is not None and found.name.startswith("logprobs-of-"):
        return f"after the sampler ({found.name})"
    return "unknown" if wrong and found is None else "raw"


def other_dtypes(original: Original, seen: Evidence, claimed: str) -> list[str]:
    """Whether the engine's error is that of another dtype than the claimed one."""
    notes = []
    for name in CLAIMS:
        if name == claimed:
            continue
        model = original.right(getattr(torch, name), FAITHFUL[0]())
        own = seen.weighed(forced(rows_of(model, seen.records)).values - seen.truth.values)
        units = rms(seen.error) / max(rms(own), 1e-300)
        if 0.5 < units < 1.5:
            notes.append(f"the error has the size of {name}'s rounding ({units:.2f} units of it)")
    return notes


def sentence_of(report: Report, prompts_differ: bool) -> str:
    """The answer in one sentence."""
    size = f"{len(report.flips)} of {report.greedy_tokens} greedy tokens differ"
    if report.units is not None:
        size = f"{report.units:.3g} units ({report.low:.3g} to {report.high:.3g})"
    if report.verdict == "agree":
        return f"agrees: {size}, {report.dtype} rounding"
    found, runner_up = report.explained_by, report.runner_up
    if found is None and prompts_differ:
        return f"diverges: the prompt's tokens differ; {size}"
    if found is None and not report.tried:
        return f"diverges: {size}; mistakes were not tried"
    if found is None:
        return f"diverges: {size}; none of the mistakes in the catalogue explains it"
    detail = f", {found.what}" if found.what else ""
    text = (
        f"diverges: {size}; most like {found.name}{detail} (explains it to {found.units:.3g} units)"
    )
    if runner_up is None:
        return text
    if runner_up.explains:
        return f"{text}; {runner_up.name} explains it too ({runner_up.units:.3g} units)"
    return f"{text}; next is {runner_up.name}, which does not explain it"
