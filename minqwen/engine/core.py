"""The engine's core: add requests, make steps, abort. Every rank runs it; only tensors cross ranks.

A step is: the scheduler says who runs, the packed tokens go through the model once, and every
completion whose last id was computed gets the next token. Read `EngineCore.step`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from minqwen.engine.blocks import BlockPool
from minqwen.engine.failures import described, lacks_memory
from minqwen.engine.outputs import Delta, TokenLogprobs
from minqwen.engine.request import Completion, Request
from minqwen.engine.runner import Runner, StepLogits, joined
from minqwen.engine.scheduler import Scheduled, Scheduler
from minqwen.errors import MinqwenError
from minqwen.model.changes import Changes
from minqwen.parallel import Mesh
from minqwen.sampling.draw import sample
from minqwen.sampling.logprobs import logprobs_of, wide

Drawn = tuple[int, TokenLogprobs | None]

MOST_RESTARTS = 20  # in a row, without a token: then no request would ever end


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
        self.outdated = False  # whether the keys and values are of a model that was
        self.restarts = 0  # steps in a row that began anew because of it, and drew no token
        self.stepping = False
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
        """Forget all keys and values before the next step, which computes running requests again.

        Not at once: a hook may ask for it in the midst of a step.
        """
        self.outdated = True

    def step(self, undisturbed: bool = False) -> list[Delta]:
        """One forward pass, and all that follows from it.

        undisturbed: no caller's code has run since the last step. Then only hooks can have changed
        the model, and where there are none it is not looked at again.
        Nothing is changed before everything is done that may fail for want of memory, so a failed
        step can be made again. Anything else that fails for one request ends that request alone.
        """
        if self.stepping:
            raise MinqwenError("a hook cannot make steps: the step that calls it is not done")
        if not self.requests:
            return []
        self.stepping = True
        try:
            if not undisturbed or self._calls_hooks():
                self._notice_changes()
            deltas = self._step(self.scheduler.schedule())
            self.restarts = 0 if deltas else self.restarts
            return deltas
        finally:
            self.stepping = False

    # ---- the parts of a step --------------------------------------------------------------------

    @torch.inference_mode()
    def _step(self, step: list[Scheduled]) -> list[Delta]:
        logits = self._run(step)
        last = wide(logits.last())  # [B, V]
        wrong = self._failures_of_all_ranks(step, logits.failures)
        finite = last.sum(-1).isfinite().tolist()  # a NaN or an infinity stays one in the sum
        for i, item in enumerate(step):
            if not finite[i]:
                # A NaN anywhere before reaches the last token: nothing of this is kept.
                wrong.setdefault(i, f"logits are not finite at token {item.end - 1}")
        drawn = self._draw(step, last, wrong)
        deltas: list[Delta] = []
        for i, item in enumerate(step):
            # Its request failed earlier in this step, or a hook has aborted it.
            if item.completion.finished:
                continue
            try:
                deltas += self._go_on(item, logits.of(i), wrong.get(i), drawn.get(i))
            except Exception as error:  # whatever it is, the others do not suffer from it
                deltas += self._fail(item.completion.request, described(error))
        return deltas

    def _run(self, step: list[Scheduled]) -> StepLogits:
        """The forward pass. If it fails each completion is asked for its own, and those fail alone.

        If all of them do, or there is one only, it is nobody's fault but ours, and this raises. So
        it does for want of memory, and on several ranks, where the others may not have failed.
        """
        try:
            return self.runner.run(step, eager=self.intervened)
        except Exception as error:
            if lacks_memory(error) or self.mesh.size > 1 or len(step) == 1:
                raise
            alone: list[StepLogits | str] = []
            for item in step:
                try:
                    alone.append(self.runner.run([item], eager=True))
                except Exception as own:
                    alone.append(described(own))
            if all(isinstance(one, str) for one in alone):
                raise
            return joined(alone)

    def _calls_hooks(self) -> bool:
        return (
            self.intervened
            or self.outdated
            or any(request.hooks for request in self.requests.values())
        )

    def _notice_changes(self) -> None:
        """Keys and values of a model that was are forgotten; with hooks in it none are shared."""
        changed, intervened = self.changes.look(), self.changes.unreliable
        self.outdated |= changed
        if self.mesh.size > 1:  # a change on one rank is a change for all
            flags = torch.tensor([self.outdated, intervened], dtype=torch.float32)
            flags = self.mesh.all_reduce(flags.to(self.runner.model.device), "max")
            self.outdated, intervened = map(bool, flags.tolist())
        self.intervened = intervened
        if self.outdated:
            self.runner.renew()
            self.scheduler.start_over(not intervened)
            self.outdated = False
            self.restarts += 1
            if self.restarts > MOST_RESTARTS:
                self.restarts = 0
                raise MinqwenError(
                    f"the model has changed before each of {MOST_RESTARTS} steps, and no prompt "
                    "could be computed to its end: change it between requests, or raise "
                    "max_num_batched_tokens above the longest prompt"
                )
        else:
            self.restarts = 0

    def _failures_of_all_ranks(
        self, step: list[Scheduled], own: Mapping[int, str]
    ) -> dict[int, str]:
        """Why some of the step's requests cannot go on: a hook that failed on one rank has failed.

        Maps the place in the step to the reason.
        """
        failures = dict(own)
        if self.mesh.size > 1 and any(item.completion.request.hooks for item in step):
            flags = torch.tensor([float(i in failures) for i in range(len(step))])
            flags = self.mesh.all_reduce(flags.to(self.runner.model.device), "max")
            for i in flags.nonzero()[:, 0].tolist():
                failures.setdefault(i, "a hook failed on another rank")
        return failures

    def _draw(
        self, step: list[Scheduled], logits: Tensor, wrong: dict[int, str]
    ) -> dict[int, Drawn]:
        """The next token of those whose last id was computed, from logits [B, V].

        Returns {row: (token, its logprobs where they were asked for)}. Adds to `wrong`.
        """
        at_end = [i for i, item in enumerate(step) if i not in wrong and item.reaches_end]
        rows = [i for i in at_end if self._succeeds(i, wrong, step[i].completion.take_mask)]
        drawn = self._sample(rows, [step[i].completion for i in rows], logits, wrong)
        for i, (_, entry) in drawn.items():
            self._succeeds(i, wrong, partial(self._spell, entry))
        return drawn

    def _succeeds(self, row: int, wrong: dict[int, str], function: Callable[[], None]) -> bool:
        """Whether something works that concerns one row only; else `wrong` has the reason."""
        try:
            function()
        except Exception as error:
            wrong[row] = described(error)
        return row not in wrong

    def _sample(
        self, at: list[int], completions: list[Completion], logits: Tensor, wrong: dict[int, str]
    ) -> dict[int, Drawn]:
        """A token for each of `completions`, from the rows `at` of logits [B, V].

        If that fails they are asked one by one. What a row draws does not depend on the others.
        """
        if not at:
            return {}
        rows = logits if len(at) == len(logits) else logits[at]
        try:
            tokens, entries = sample(rows, completions, self.runner.model.ops)
        except Exception as error:
            if lacks_memory(error):
                raise
            if len(at) == 1:
                wrong[at[0]] = described(error)
                return {}
            drawn: dict[int, Drawn] = {}
            for i, completion in zip(at, completions):
                drawn |= self._sample([i], [completion], logits, wrong)
            return drawn
        if self.mesh.size > 1:
            # All ranks have the same logits; this makes it impossible that they disagree.
            device = self.runner.model.device
            tokens = self.mesh.broadcast(torch.tensor(tokens, device=device)).tolist()
        return dict(zip(at, zip(tokens, entries or [None] * len(tokens))))

    def _spell(self, entry: TokenLogprobs | None) -> None:
        """Put each token's text beside its logprob."""
        if entry is not None and self.decode_token is not None:
            for token, logprob in entry.items():
                logprob.decoded_token = self.decode_token(token)

    def _go_on(
        self, item: Scheduled, logits: Tensor, wrong: str | None, drawn: Drawn | None
    ) -> list[Delta]:
        """What one completion makes of the step. logits [n, V]: all its rows."""
        if wrong is not None:
            return self._fail(item.completion.request, wrong)
        self._keep(item, logits)
        return [] if drawn is None else self._append(item.completion, *drawn)

    def _keep(self, item: Scheduled, logits: Tensor) -> None:
        """The step's keys and values count now, and so do the prompt's logprobs it has given."""
        completion, request = item.completion, item.completion.request
        if completion.wants_prompt_logits and request.prompt_logprobs is not None:
            start = completion.computed + 1
            nexts = completion.ids[start : min(item.end + 1, completion.num_prompt)]
            wanted = request.params.prompt_logprobs or 0
            entries = logprobs_of(logits[: len(nexts)], nexts, wanted, self.runner.model.ops)
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
        completion.append(token, logprobs)
        if completion.finished:
            self.scheduler.finish(completion)
        if request.finished:
            request.metrics.finished = now
            del self.requests[request.request_id]
        return [completion.delta()]

    def _fail(self, request: Request, why: str) -> list[Delta]:
        """End a request that cannot go on; the others do."""
        request.error = why
        self.requests.pop(request.request_id, None)
        self._end_all(request, "error")
        deltas = [self._last_delta(one) for one in request.completions if not one.told_end]
        return [*(replace(delta, output=None) for delta in deltas[:-1]), deltas[-1]]

    def _last_delta(self, completion: Completion) -> Delta:
        """The end of a completion that has failed, perhaps because no delta could be made of it.

        Then it is told without what was traced: there may be no room to join that.
        """
        try:
            return completion.delta()
        except Exception:  # `error` has the first reason
            return completion.rest(completion.request.output(traced=False))

    def _end_all(self, request: Request, reason: str) -> None:
        """Finish what is not finished of a request, and free its blocks."""
        for completion in request.completions:
            if not completion.finished:
                completion.end(reason)
                self.scheduler.finish(completion)
