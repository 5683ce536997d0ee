"""Which mistake explains what another engine computed.

Every entry of the catalogue that a model can have is put into it. The one whose model turns the
candidate's own inputs into the candidate's outputs, at every point and up to rounding, is the
mistake. Most are ruled out at the first wrong point, where only what comes before it is computed.

Some mistakes round coarsely inside (a softmax in bfloat16, a cache in int8). Two right
implementations of such a mistake differ much in the few numbers that lie between two steps, and
nowhere else. So the largest errors of each, `TRIMMED` of all, are left out here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minqwen.checkpoint import Checkpoint
from minqwen.checks import dtype_name
from minqwen.config import ModelConfig
from minqwen.errors import MinqwenError, TokenizerError, TraceError
from minqwen.lab.compare import Measure, measure, pooled
from minqwen.lab.diff.diff import (
    OPERATIONS,
    Candidate,
    Explanation,
    First,
    Golden,
    Pair,
    Reference,
    Report,
    Tensors,
    Text,
    compare,
    layer_of,
    limit,
    operation_at,
    read_texts,
    right_pair,
)
from minqwen.lab.faults import FAULTS, Fault, Weights, hypotheses
from minqwen.model.trace import point_names, point_of
from minqwen.tokenizer import Tokenizer
from minqwen.tokenizer.chat import Message

TRIMMED = 0.05


@dataclass(frozen=True)
class Suspect:
    """A mistake, and the model that makes it."""

    fault: Fault
    pair: Pair


def suspects(config: ModelConfig, weights: Weights, dtype: torch.dtype) -> Iterator[Suspect]:
    """Every mistake that the model can have, one after another: each model is built when needed."""
    for fault in hypotheses(config):
        with contextlib.suppress(MinqwenError):  # no model can be built of some wrong tensors
            truth = fault.model(config, weights, dtype=torch.float64)
            native = truth
            if dtype != torch.float64:
                native = fault.model(config, weights, dtype=dtype)
            yield Suspect(fault, Pair(native, truth))


@torch.inference_mode()
def diagnose(report: Report, right: Pair, texts: Sequence[Text], among: Iterable[Suspect]) -> None:
    """Name in `report`, which diverges, the mistake that explains the candidate, if one does.

    among: usually all `suspects`.
    """
    if report.first is None:
        return
    names, first = [point.point for point in report.points], report.first
    found: list[tuple[bool, float, Fault]] = []
    for suspect in among:
        units = explained_to(suspect.pair, right, texts, names, first.point)
        if units is not None:
            found.append((seen_at(suspect.fault, names) != first.point, units, suspect.fault))
    if first.point == "logits":
        found += reported_so(right, texts)
    found.sort(key=lambda entry: entry[:2])
    if not found:
        return
    report.explained_by, *report.also = (Explanation(f.name, u, f.symptom) for _, u, f in found)
    report.first = blamed(first, found[0][2], names)


def blamed(first: First, fault: Fault, names: Sequence[str]) -> First:
    """`first`, its operation told more precisely by the mistake where points were not dumped."""
    if fault.first and operation_at(first.point, names) != OPERATIONS[point_of(first.point).name]:
        return dataclasses.replace(first, operation=OPERATIONS[point_of(fault.first).name])
    return first


def seen_at(fault: Fault, names: Sequence[str]) -> str | None:
    """The first of the dumped points that shows the mistake."""
    order = point_names(1 + max((layer_of(name) or 0 for name in names), default=0))
    after = order[order.index(fault.first) :] if fault.first in order else []
    return next((name for name in after if name in names), None)


def explained_to(
    wrong: Pair, right: Pair, texts: Sequence[Text], names: Sequence[str], first: str
) -> float | None:
    """The largest units at any point if the wrong model explains every one of them, or else None.

    first: the point where most wrong models are ruled out.
    """
    until = names[: names.index(first) + 1]
    try:
        if explained(wrong, right, texts, until, [first]) is None:
            return None
        return explained(wrong, right, texts, names, names)
    except TraceError:  # the wrong model has other shapes: it cannot have computed this
        return None


def explained(
    wrong: Pair, right: Pair, texts: Sequence[Text], names: Sequence[str], at: Sequence[str]
) -> float | None:
    """The largest units at the points `at`, or None if at one of them they are beyond rounding.

    names: the points that are replaced by the candidate's.
    """
    computed = [inputs_and_outputs(wrong, right, text, names) for text in texts]
    largest = 0.0
    for name in at:
        found: list[Measure] = []
        for text, native, truth in computed:
            if name in native:
                trimmed = without_largest(text.seen[name], native[name], truth[name])
                found.append(measure(*trimmed))
        largest = max(largest, pooled(found))
        if not pooled(found) <= limit(name):
            return None
    return largest


def inputs_and_outputs(
    wrong: Pair, right: Pair, text: Text, names: Sequence[str]
) -> tuple[Text, Tensors, Tensors]:
    """What the wrong model makes of the candidate's inputs: faithfully, and in float64.

    In float64 it is one model, and the error is the one that the right model makes.
    """
    here = [name for name in names if name in text.seen]
    if wrong.native is not wrong.truth:
        return text, *wrong.recomputed(text, here)
    _, truth = wrong.recomputed(text, here)
    a, t = right.recomputed(text, here)
    return text, {name: truth[name] + (a[name] - t[name]) for name in here}, truth


def without_largest(candidate: Tensor, right: Tensor, truth: Tensor) -> tuple[Tensor, ...]:
    """The three without the numbers in which one of the errors is among the largest."""
    three = [x.flatten() for x in (candidate, right, truth)]
    b, a, t = (x.double() for x in three)
    count = int(TRIMMED * b.numel())
    if not count:
        return tuple(three)
    kept = torch.ones_like(b, dtype=torch.bool)
    for errors in ((b - t).abs(), (a - t).abs()):
        finite = errors.nan_to_num(0, 0, 0)  # what is infinite is no rounding
        kept[finite.topk(count).indices] = False
    return tuple(x[kept] for x in three)


def reported_so(pair: Pair, texts: Sequence[Text]) -> Iterator[tuple[bool, float, Fault]]:
    """Mistakes in what is reported of the logits. They have log probabilities, normed or not."""
    with_logits = [text for text in texts if "logits" in text.seen]
    computed = [pair.recomputed(text, list(text.seen)) for text in with_logits]
    for fault in FAULTS.values():
        if fault.report is None:
            continue
        found = []
        for text, (native, truth) in zip(with_logits, computed):
            x = text.seen["logits"]
            ids = text.ids[-len(x) :]
            wanted = [fault.logprobs(run["logits"], ids) for run in (native, truth)]
            ways = [measure(given, *wanted) for given in (x, x.log_softmax(-1))]
            found.append(min(ways, key=lambda way: way.units))
        units = pooled(found)
        if units <= limit("logits"):
            yield False, units, fault


# ---- the prompt's tokens -------------------------------------------------------------------------


def named_tokens(golden: Golden, ids: list[int], tokenizer: Tokenizer) -> Report | None:
    """The report on ids that are no prompt of the pack, if a mistake makes them of one."""
    for prompt in golden.prompts:
        messages = messages_of(list(prompt.ids), tokenizer)
        for fault in FAULTS.values():
            if messages and fault.encode is not None and fault.ids(tokenizer, messages) == ids:
                first = First(None, "the prompt's tokens", "input_ids", math.inf)
                named = Explanation(fault.name, 0.0, fault.symptom)
                return Report("diverge", "", first=first, explained_by=named)
    return None


def messages_of(ids: list[int], tokenizer: Tokenizer) -> list[Message]:
    """The chat that a prompt was made of; an empty list if it is none."""
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", tokenizer.decode(ids), re.DOTALL)
    messages: list[Message] = [{"role": role, "content": text} for role, text in turns]
    with contextlib.suppress(TokenizerError):  # its template refuses such a chat
        if messages and tokenizer.encode_chat(messages) == ids:
            return messages
    return []


# ---- all together --------------------------------------------------------------------------------


def examine(golden: Golden, candidate: Candidate, model: Checkpoint) -> Report:
    """Compare the candidate with the pack, and look for the mistake if it diverges.

    model: the pack's. Raises MinqwenError if they cannot be compared.
    """
    texts = read_texts(golden, candidate)
    model.check()
    weights = {name: model.read(name) for name in model.names}
    right = right_pair(golden.config, weights, candidate.dtype)
    dtype = dtype_name("the dump's dtype", candidate.dtype)
    report = compare(Reference(golden, right), texts, dtype)
    if report.verdict == "diverge":
        diagnose(report, right, texts, suspects(golden.config, weights, candidate.dtype))
    return report
