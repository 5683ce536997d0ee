"""What traced requests see of a step: their own rows of every tensor, kept on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from minqwen.engine.scheduler import Scheduled
from minqwen.model.trace import Rows

AT_LAST_TOKEN = ("final_norm", "logits")  # computed only for the tokens whose logits are wanted


class StepTrace:
    """Collects into `completion.trace`; `show` is called by the taps of the forward pass.

    ends: for each completion of the step, the row after its last one among the logits.
    """

    def __init__(self, step: list[Scheduled], ends: Sequence[int]):
        self.step, self.logits_ends = step, ends
        self.token_ends = list(accumulate(item.count for item in step))
        self.names: set[str] = set()
        for item in step:
            self.names |= item.completion.request.trace

    def show(self, name: str, x: Tensor, rows: Rows | None) -> None:
        for i, item in enumerate(self.step):
            completion = item.completion
            if name not in completion.request.trace:
                continue
            own = self._rows_of(i, name, x, rows)
            if own is None:
                continue
            kept = completion.trace.setdefault(name, [])
            if completion.computed == 0 and name not in AT_LAST_TOKEN:
                kept.clear()  # after a preemption all is computed again
            kept.append(own.to("cpu", copy=True))

    def _rows_of(self, i: int, name: str, x: Tensor, rows: Rows | None) -> Tensor | None:
        """The part of x that belongs to completion i of the step; None: it has no part in it."""
        item = self.step[i]
        if rows is not None:  # scores and pattern of some sequences, [N, H, T, L]
            if not rows.first <= i < rows.first + rows.sequences:
                return None
            return x[i - rows.first, :, :, : item.end]
        if name in AT_LAST_TOKEN:
            end = self.logits_ends[i]
            return x[end - 1 : end] if item.reaches_end else None
        end = self.token_ends[i]
        return x[end - item.count : end]
