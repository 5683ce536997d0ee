"""What a model says of the tokens that an engine chose: the same tokens are forced on it.

The truth is the model in float64. The unit of error comes from faithful implementations in the
dtype that the engine claims. One of them would scatter too much, so there are three: native
arithmetic, native with every sum reversed, and PyTorch's fused attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minqwen.lab.audit.records import Record
from minqwen.lab.compare import ReversedSums
from minqwen.model import Native, Qwen2
from minqwen.model.attention import causal_mask
from minqwen.model.trace import Tap

# (logits [T, V], ids [T]) to the log probabilities [T, V] of the next tokens, as `Fault.logprobs`.
Report = Callable[[Tensor, Tensor], Tensor]

FLOOR = -60.0  # nats; what is less probable counts as this, so that -inf is a finite error
LEAST_SPREAD = 0.03  # a token of probability 1 has rounding errors too, of the softmax itself


class FusedAttention(Native):
    """Native with `scaled_dot_product_attention`, which adds in other places than native does."""

    name = "native, fused attention"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, tap: Tap
    ) -> Tensor:
        seen = None if hidden is None else ~causal_mask(q.shape[-2], q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


FAITHFUL: tuple[type[Native], ...] = (Native, ReversedSums, FusedAttention)


@dataclass(frozen=True)
class Rows:
    """The logits [T, V] of one record, on the CPU, in float32 at least."""

    record: Record
    logits: Tensor


@dataclass(frozen=True)
class Forced:
    """values [n]: a log probability for each entry of all records, in their order, float64."""

    values: Tensor
    # For each greedy token: how far the largest logit is above the chosen token's, and above the
    # second largest's. [g] each.
    gaps: Tensor
    leads: Tensor


def rows_of(model: Qwen2, records: Sequence[Record]) -> Iterator[Rows]:
    """One forward pass for each record."""
    for record in records:
        with torch.inference_mode():
            logits: Tensor = model(torch.tensor([record.ids], device=model.device))[0]
            yield Rows(record, widened(logits).cpu())


def widened(logits: Tensor) -> Tensor:
    """In float32 at least: where engines take the logarithm of the softmax."""
    return logits if logits.dtype == torch.float64 else logits.float()


def forced(rows: Iterable[Rows], report: Report | None = None) -> Forced:
    """What a model says, of its logits. report: what an engine makes of them; None: log_softmax."""
    values, gaps, leads = [], [], []
    for each in rows:
        values.append(entries_of(each, logprobs_of(each, report)))
        if each.record.greedy:
            prompt = each.record.prompt
            chosen = torch.tensor(each.record.ids[prompt:])
            logits = each.logits[prompt - 1 : -1].double()
            top = logits.topk(2, dim=-1).values
            gaps.append(top[:, 0] - logits.gather(-1, chosen[:, None])[:, 0])
            leads.append(top[:, 0] - top[:, 1])
    return Forced(joined(values), joined(gaps), joined(leads))


def joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.float64), *parts])


def logprobs_of(rows: Rows, report: Report | None) -> Tensor:
    """[T, V]"""
    if report is None:
        return rows.logits.log_softmax(-1)
    return report(rows.logits, torch.tensor(rows.record.ids))


def entries_of(rows: Rows, table: Tensor) -> Tensor:
    """The numbers of a table [T, V] about the record's entries. [n], float64, at least FLOOR."""
    before = [entry.position - 1 for entry in rows.record.entries]
    tokens = [entry.token for entry in rows.record.entries]
    if not before:
        return torch.empty(0, dtype=torch.float64)
    return table[before, tokens].double().clamp_min(FLOOR)


def spreads(rows: Sequence[Rows]) -> Tensor:
    """How much a log probability moves where each logit moves by 1 at random. [n]

    log p_y = z_y - log sum exp z, so the derivative by z_k is (k = y) - p_k, and the root of the
    sum of squares is sqrt(1 - 2 p_y + sum p_k^2): near 1 for an unlikely token, 0 for a sure one.
    """
    parts = []
    for each in rows:
        p = each.logits.softmax(-1)
        squares = p.pow(2).sum(-1, keepdim=True)
        parts.append(entries_of(each, (1 - 2 * p + squares).clamp_min(0).sqrt()))
    return joined(parts).clamp_min(LEAST_SPREAD)


def said(records: Sequence[Record]) -> Tensor:
    """The engine's numbers, as `Forced.values` has a model's."""
    numbers = [entry.logprob for record in records for entry in record.entries]
    return torch.tensor(numbers, dtype=torch.float64).clamp_min(FLOOR)


def blocks_of(records: Sequence[Record], size: int) -> Tensor:
    """Which block of neighbouring places each entry belongs to. [n] int64

    Errors of neighbours are alike, and those of several tokens at one place are too.
    """
    labels = [
        (number, entry.position // size)
        for number, record in enumerate(records)
        for entry in record.entries
    ]
    known = {label: i for i, label in enumerate(sorted(set(labels)))}
    return torch.tensor([known[label] for label in labels], dtype=torch.int64)
