"""The engine's core: add requests, make steps, abort. Every rank runs it; only tensors cross ranks.

A step is: the scheduler says who runs, the packed tokens go through the model once, and every
completion whose last id was computed gets the next token. Read `EngineCore.step`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from minqwen.engine.blocks import BlockPool
from minqwen.engine.outputs import Delta, TokenLogprobs
from minqwen.engine.request import Completion, Request
from minqwen.engine.runner import Runner
from minqwen.engine.scheduler import Scheduled, Scheduler
from minqwen.errors import MinqwenError
from minqwen.model.changes import Changes
from minqwen.parallel import Mesh
from minqwen.sampling.draw import sample
from minqwen.sampling.logprobs import logprobs_of, wide

Drawn = tuple[int, TokenLogprobs | None]


class EngineCore:
    """Requests in, deltas out, one forward pass at a time.

    decode_token: a token's text, for the entries of logprobs; None leaves them without.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        mesh: Mesh,
        decode_token: Callable[[int], str] | None = None,
    ):
        self.runner, self.scheduler, self.mesh = runner, scheduler, mesh
        self.decode_token = decode_token
        self.changes = Changes(runner.model)
        self.intervened = False  # whether the model has hooks, on any rank
        self.requests: dict[str, Request] = {}  # those that are not finished

    @property
    def pool(self) -> BlockPool:
        return self.scheduler.pool

    def add(self, request: Request) -> None:
        """Queue a request. Its completions after the first join when the prompt is computed."""
        self.requests[request.request_id] = request
        self.scheduler.add(request.completions[0])

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks. An unknown or finished id is no error."""
        request = self.requests.pop(request_id, None)
        if request is not None:
            self._end_all(request, "abort")

    def reset_prefix_cache(self) -> None:
        """Forget all keys and values; running requests are computed again from the beginning."""
        self.scheduler.start_over(self.scheduler.shares_prefixes)

    @torch.inference_mode()
    def step(self, undisturbed: bool = False) -> list[Delta]:
        """One forward pass, and all that follows from it.

        undisturbed: no caller's code has run since the last step. Then only hooks can have changed
        the model, and where there are none it is not looked at again.
        Nothing is changed before everything is done that may fail for want of memory, so a failed
        step can be made again.
        """
        if not self.requests:
            return []
        if not undisturbed or self._calls_hooks():
            self._notice_changes()
        step = self.scheduler.schedule()
        logits = self.runner.run(step)
        last = wide(logits.last())  # [B, V]
        finite = last.sum(-1).isfinite().tolist()  # a NaN or an infinity stays one in the sum
        wrong = dict(logits.failures)  # row -> why the request of this row cannot go on
        for i, item in enumerate(step):
            if not finite[i]:
                # A NaN anywhere before reaches the last token: nothing of this is kept.
                wrong.setdefault(i, f"logits are not finite at token {item.end - 1}")
        at_end = [i for i, item in enumerate(step) if i not in wrong and item.reaches_end]
        drawn = self._draw([step[i].completion for i in at_end], last, at_end)
        deltas: list[Delta] = []
        for i, item in enumerate(step):
            if item.completion.finished:  # its request failed earlier in this step
                continue
            if i in wrong:
                deltas += self._fail(item.completion.request, wrong[i])
                continue
            self._keep(item, logits.of(i))
            if i in drawn:
                deltas += self._append(item.completion, *drawn[i])
        return deltas

    # ---- the parts of a step --------------------------------------------------------------------

    def _calls_hooks(self) -> bool:
        return self.intervened or any(request.hooks for request in self.requests.values())

    def _notice_changes(self) -> None:
        """Keys and values of a model that was are forgotten; with hooks in it none are shared."""
        changed, intervened = self.changes.look(), self.changes.unreliable
        if self.mesh.size > 1:  # a change on one rank is a change for all
            flags = torch.tensor([changed, intervened], dtype=torch.float32)
            flags = self.mesh.all_reduce(flags.to(self.runner.model.device), "max")
            changed, intervened = map(bool, flags.tolist())
        self.intervened = intervened
        if changed:
            self.runner.renew_cache()
            self.scheduler.start_over(not intervened)

    def _draw(
        self, completions: list[Completion], logits: Tensor, at: list[int]
    ) -> dict[int, Drawn]:
        """The next token of each of `completions`, from the rows `at` of logits [B, V].

        Returns {row: (token, its logprobs where they were asked for)}.
        """
        if not completions:
            return {}
        for completion in completions:
            if completion.constraint is not None:
                completion.mask = completion.constraint.mask()
        rows = logits if len(at) == len(logits) else logits[at]
        tokens, logprobs = sample(rows, completions)
        if self.mesh.size > 1:
            # All ranks have the same logits; this makes it impossible that they disagree.
            device = self.runner.model.device
            tokens = self.mesh.broadcast(torch.tensor(tokens, device=device)).tolist()
        entries = logprobs or [None] * len(tokens)
        for entry in entries:
            self._spell(entry)
        return dict(zip(at, zip(tokens, entries)))

    def _spell(self, entry: TokenLogprobs | None) -> None:
        """Put each token's text beside its logprob."""
        if entry is not None and self.decode_token is not None:
            for token, logprob in entry.items():
                logprob.decoded_token = self.decode_token(token)

    def _keep(self, item: Scheduled, logits: Tensor) -> None:
        """The step's keys and values count now, and so do the prompt's logprobs it has given."""
        completion, request = item.completion, item.completion.request
        if completion.wants_prompt_logits and request.prompt_logprobs is not None:
            start = completion.computed + 1
            nexts = completion.ids[start : min(item.end + 1, completion.num_prompt)]
            wanted = request.params.prompt_logprobs or 0
            entries = logprobs_of(logits[: len(nexts)], nexts, wanted)
            request.prompt_logprobs[start : start + len(nexts)] = entries
        self.scheduler.computed(completion, item.count)

    def _append(
        self, completion: Completion, token: int, logprobs: TokenLogprobs | None
    ) -> list[Delta]:
        """One more token: extend the completion, fork or finish what is due."""
        request = completion.request
        if token < 0:
            return self._fail(request, "no token can be drawn: everything is forbidden")
        now = time.perf_counter()
        request.metrics.first_token = request.metrics.first_token or now
        if not request.forked:
            request.forked = True
            for child in request.completions[1:]:
                self.scheduler.fork(completion, child)
        try:
            delta = completion.append(token, logprobs)
        except MinqwenError as error:  # a grammar that cannot go on ends its own request only
            return self._fail(request, str(error))
        if completion.finished:
            self.scheduler.finish(completion)
        if request.finished:
            request.metrics.finished = now
            del self.requests[request.request_id]
        return [delta]

    def _fail(self, request: Request, why: str) -> list[Delta]:
        """End a request that cannot go on; the others do."""
        request.error = why
        self.requests.pop(request.request_id, None)
        deltas = [completion.delta() for completion in self._end_all(request, "error")]
        return [*(replace(delta, output=None) for delta in deltas[:-1]), deltas[-1]]

    def _end_all(self, request: Request, reason: str) -> list[Completion]:
        """Finish what is not finished of a request, and free its blocks."""
        ended = [completion for completion in request.completions if not completion.finished]
        for completion in ended:
            completion.end(reason)
            self.scheduler.finish(completion)
        return ended
