"""The thread that steps: it alone touches the engine, and tells listeners what comes of each job.

Under torchrun every rank runs the same engine on the same requests. So before each step rank 0
sends its new orders (jobs and aborts) to all ranks, and every rank, rank 0 too, carries out what
was sent. What rank 0 decides by its clock, such as who has waited too long, is an order as well.
"""

from __future__ import annotations

import queue
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from minqwen.engine.llm import LLM
from minqwen.engine.outputs import Delta, TokenLogprobs
from minqwen.engine.request import Request
from minqwen.errors import MinqwenError
from minqwen.serve.errors import ApiError, of_failed_request
from minqwen.serve.metrics import Metrics
from minqwen.serve.orders import Job, Orders


@dataclass(frozen=True)
class Accepted:
    """The engine has taken the job: nothing in it is wrong."""

    request_id: str


@dataclass(frozen=True)
class Begun:
    """The job's prompt is computed; this comes before its first delta."""

    request_id: str
    prompt_logprobs: list[TokenLogprobs | None] | None
    num_cached_tokens: int


@dataclass(frozen=True)
class Failed:
    """The job has ended without an answer."""

    request_id: str
    error: ApiError


Event = Accepted | Begun | Delta | Failed
Listener = Callable[[Event], None]  # called in the thread that steps


@dataclass(frozen=True)
class Abort:
    request_id: str
    error: ApiError | None = None  # what the job's listener is told, if it still listens


@dataclass(frozen=True)
class AbortAll:
    error: ApiError


@dataclass(frozen=True)
class Ping:
    answer: Callable[[], None]


Message = tuple[Job, Listener] | Abort | AbortAll | Ping | None  # None: the end


class EngineLoop:
    """`run` makes steps until `end`; the other methods may be called from any thread.

    queue_seconds: how long a job may wait for its first step. clock: seconds, as those of the
    requests' metrics.
    """

    def __init__(
        self,
        llm: LLM,
        metrics: Metrics | None = None,
        queue_seconds: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.llm, self.metrics = llm, metrics or Metrics()
        self.queue_seconds, self.clock = queue_seconds, clock
        self.ended = False
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}
        self._requests: dict[str, Request] = {}  # those of which no delta has come yet

    def submit(self, job: Job, listener: Listener) -> None:
        """Queue a job. The listener hears Accepted and then deltas, or Failed."""
        self._inbox.put((job, listener))

    def abort(self, request_id: str, error: ApiError | None = None) -> None:
        """Drop a job at the next step; its listener is told the error, or nothing."""
        self._inbox.put(Abort(request_id, error))

    def abort_all(self, error: ApiError) -> None:
        """Drop all jobs at the next step; their listeners are told the error."""
        self._inbox.put(AbortAll(error))

    def ping(self, answer: Callable[[], None]) -> None:
        """Have `answer` called before the next step."""
        self._inbox.put(Ping(answer))

    def end(self) -> None:
        """Let `run` return, after the step that it makes now. Jobs that are left fail."""
        self._inbox.put(None)

    def run(self) -> None:
        """Make steps, on rank 0, until `end`."""
        try:
            while self._turn():
                pass
        finally:
            self.ended = True
            self._drop(list(self._listeners), ApiError(503, "the server has ended"))
            self._refuse_the_rest()

    # ---- one turn -------------------------------------------------------------------------------

    def _turn(self) -> bool:
        """Take what came in, and make one step. Returns whether there will be another turn."""
        orders = self._collect()
        data = None if orders is None else orders.to_bytes()
        shared = self.llm.mesh.world.broadcast_bytes(data, patient=is_idle(self.llm))
        if shared is None:
            return False
        self._carry_out(Orders.from_bytes(shared))
        try:
            deltas = self.llm.step()
        except Exception as error:
            if self.llm.mesh.world.size > 1:
                raise  # the other ranks may not have failed: all must end
            self._step_has_failed(error)
            deltas = []
        self._tell(deltas)
        self.metrics.after_step(self.llm.core.scheduler)
        return True

    def _collect(self) -> Orders | None:
        """What has come in since the last turn; None at the end. Waits while nothing runs."""
        orders = Orders([], [])
        wait = is_idle(self.llm)
        while True:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                break
            if message is None:
                return None
            wait = False
            self._take(message, orders)
        self._abort_what_waits_too_long(orders)
        return orders

    def _take(self, message: Message, orders: Orders) -> None:
        if isinstance(message, Ping):
            message.answer()
        elif isinstance(message, AbortAll):
            orders.aborts.extend(self._listeners)
            self._drop(list(self._listeners), message.error)
        elif isinstance(message, Abort):
            orders.aborts.append(message.request_id)
            self._drop([message.request_id], message.error)
        elif message is not None:
            job, listener = message
            self._listeners[job.request_id] = listener
            orders.jobs.append(job)

    def _abort_what_waits_too_long(self, orders: Orders) -> None:
        if self.queue_seconds is None:
            return
        before = self.clock() - self.queue_seconds
        for completion in self.llm.core.scheduler.waiting:
            request = completion.request
            is_new = completion.index == 0 and completion.num_preemptions == 0
            if is_new and request.request_id in self._requests and request.metrics.arrival < before:
                why = f"no step was free for this request within {self.queue_seconds:g} s"
                error = ApiError(503, f"{why}: come again later", code="queue_timeout")
                orders.aborts.append(request.request_id)
                self._drop([request.request_id], error)

    def _carry_out(self, orders: Orders) -> None:
        refused = carry_out(self.llm, orders)
        for job in orders.jobs:
            error = refused.get(job.request_id)
            if error is not None:
                self._drop([job.request_id], refusal(error))
            elif job.request_id in self.llm.core.requests:  # no abort came with it
                self._requests[job.request_id] = self.llm.core.requests[job.request_id]
                self._hear(Accepted(job.request_id))

    def _tell(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            request = self._requests.pop(delta.request_id, None)
            if request is not None:
                cached = request.completions[0].num_cached
                self._hear(Begun(delta.request_id, request.prompt_logprobs, cached))
            if delta.output is None:
                self._hear(delta)
            elif delta.output.error is not None:
                self.metrics.failed()
                self._drop([delta.request_id], of_failed_request(delta.output.error))
            else:
                self.metrics.finished(delta.output)
                self._hear(delta)
                self._listeners.pop(delta.request_id, None)

    def _hear(self, event: Accepted | Begun | Delta) -> None:
        listener = self._listeners.get(event.request_id)
        if listener is not None:
            listener(event)

    def _drop(self, request_ids: Iterable[str], error: ApiError | None) -> None:
        """Forget jobs; their listeners hear the error."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)
            listener = self._listeners.pop(request_id, None)
            if listener is not None and error is not None:
                listener(Failed(request_id, error))

    def _step_has_failed(self, error: Exception) -> None:
        """All requests end: whose fault it is is not known. Later ones are served."""
        traceback.print_exception(error, file=sys.stderr)
        for request_id in list(self.llm.core.requests):
            self.llm.abort(request_id)
        self._drop(list(self._listeners), ApiError(500, "the engine's step has failed"))

    def _refuse_the_rest(self) -> None:
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, tuple):
                job, listener = message
                listener(Failed(job.request_id, ApiError(503, "the server has ended")))


def follow(llm: LLM) -> None:
    """What the ranks other than 0 do: the same steps as rank 0, until it ends."""
    world = llm.mesh.world
    while (data := world.broadcast_bytes(None, patient=is_idle(llm))) is not None:
        carry_out(llm, Orders.from_bytes(data))
        llm.step()


def is_idle(llm: LLM) -> bool:
    """Whether there is nothing to do; all ranks of an engine say the same."""
    return not llm.has_unfinished_requests


def carry_out(llm: LLM, orders: Orders) -> dict[str, Exception]:
    """Add and abort, as every rank does it. Returns the jobs that cannot be served, and why."""
    refused: dict[str, Exception] = {}
    for job in orders.jobs:
        prompt = {"prompt_token_ids": job.prompt_ids, "cache_salt": job.cache_salt}
        try:
            llm.add_request(prompt, job.params, request_id=job.request_id)
        except Exception as error:
            refused[job.request_id] = error
    for request_id in orders.aborts:
        llm.abort(request_id)
    return refused


def refusal(error: Exception) -> ApiError:
    """What a client is told of a job that the engine does not take."""
    if isinstance(error, MinqwenError):
        return ApiError(400, str(error))
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, "the request could not be added")
