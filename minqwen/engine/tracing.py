"""What traced and hooked requests see of a step, and replace in it: their own rows only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from minqwen.engine.failures import described
from minqwen.engine.scheduler import Scheduled
from minqwen.model.trace import POINTS, Hook, Rows, check_replacement, point_of

# Computed only for the tokens whose logits are wanted: what comes after the layers.
AT_LAST_TOKEN = {p.name for p in POINTS if not p.layered} - {"embed"}


class StepTrace:
    """Calls the requests' hooks and collects into `completion.trace`.

    `show` is called by the taps of the forward pass. starts, ends: which rows of the logits each
    completion of the step has. `failures`: the first mistake of each completion's hooks, by its
    place in the step. Such a mistake ends its own request, not the step.
    """

    def __init__(self, step: list[Scheduled], starts: Sequence[int], ends: Sequence[int]):
        self.step, self.logits_starts, self.logits_ends = step, starts, ends
        self.token_ends = list(accumulate(item.count for item in step))
        self.failures: dict[int, str] = {}
        self.names: set[str] = set()
        for item in step:
            request = item.completion.request
            self.names |= request.trace.union(*(names for names, _ in request.hooks))

    def show(self, name: str, x: Tensor, rows: Rows | None) -> Tensor | None:
        """Let every completion that asked for the point see its rows; x with what hooks changed."""
        replaced = None
        for i, item in enumerate(self.step):
            for names, hook in item.completion.request.hooks:
                if name not in names or i in self.failures:
                    continue
                own = self._rows_of(i, name, x if replaced is None else replaced, rows)
                new = None if own is None else self._call(i, hook, own, name)
                if new is None:
                    continue
                if replaced is None:
                    replaced = x.clone()
                place = self._rows_of(i, name, replaced, rows)
                assert place is not None
                place.copy_(new)
            self._keep(i, name, x if replaced is None else replaced, rows)
        return replaced

    def _call(self, i: int, hook: Hook, own: Tensor, name: str) -> Tensor | None:
        """What a hook makes of a completion's rows, None if it failed.

        It sees a batch of one, [1, ...], and may write into it instead of returning another.
        """
        seen = own if point_of(name).shape.startswith("H T") else own[None]
        shown = seen.clone()
        try:
            answer = hook(shown, name)
            new = shown if answer is None else answer
            check_replacement(name, new, seen)
            return torch.empty_like(seen).copy_(new).reshape(own.shape)
        except Exception as error:  # whatever a user's function may raise, or hand back
            self.failures[i] = f"the hook on {name} failed: {described(error)}"
            return None

    def _keep(self, i: int, name: str, x: Tensor, rows: Rows | None) -> None:
        """Put completion i's rows into its trace, if it wants them."""
        completion = self.step[i].completion
        if name not in completion.request.trace:
            return
        own = self._rows_of(i, name, x, rows)
        at_last = name in AT_LAST_TOKEN
        if own is None or (at_last and not self.step[i].reaches_end):
            return
        kept = completion.trace.setdefault(name, [])
        if completion.computed == 0 and not at_last:
            kept.clear()  # after a preemption all is computed again
        if rows is not None:
            own = own[0]
        elif at_last:
            own = own[-1:]
        kept.append(own.to("cpu", copy=True))

    def _rows_of(self, i: int, name: str, x: Tensor, rows: Rows | None) -> Tensor | None:
        """The part of x that belongs to completion i of the step; None: it has no part in it.

        A view: what is written to it is written to x.
        """
        item = self.step[i]
        if rows is not None:  # scores and pattern of some sequences, [N, H, T, L]
            if not rows.first <= i < rows.first + rows.sequences:
                return None
            return x[i - rows.first : i - rows.first + 1, :, :, : item.end]
        if name in AT_LAST_TOKEN:
            start, end = self.logits_starts[i], self.logits_ends[i]
            return x[start:end] if item.reaches_end or end - start > 1 else None
        end = self.token_ends[i]
        return x[end - item.count : end]
