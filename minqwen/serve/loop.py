"""The thread that steps: it alone touches the engine, and tells listeners what comes of each job.

On rank 0 it also decides what all ranks do: see `worker.py`.
"""

from __future__ import annotations

import itertools
import queue
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from minqwen.engine.llm import LLM
from minqwen.engine.outputs import Delta
from minqwen.serve.errors import ApiError
from minqwen.serve.metrics import Metrics
from minqwen.serve.orders import Job, Orders
from minqwen.serve.reports import Event, Failed, Report
from minqwen.serve.worker import Worker

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

    queue_seconds: how long a job may wait for its first step. seed: of the first job that has none
    of its own, counted on from there; None draws one.
    """

    def __init__(
        self,
        llm: LLM,
        metrics: Metrics | None = None,
        queue_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ):
        self.llm, self.metrics = llm, metrics or Metrics()
        self.queue_seconds, self.clock = queue_seconds, clock
        self.ended = False
        self._worker = Worker(llm)
        self._seeds = itertools.count(secrets.randbits(62) if seed is None else seed)
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}  # of the jobs that have not ended
        self._arrived: dict[str, float] = {}  # when they came
        self._waiting: list[str] = []  # those that no step has had yet

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
        shared = self._worker.share(data)
        if shared is None:
            return False
        try:
            reports = self._worker.turn(Orders.from_bytes(shared))
        except Exception as error:
            if self.llm.mesh.world.size > 1:
                raise  # the other ranks may not have failed: all must end
            self._step_has_failed(error)
            return True
        self._take_reports(reports)
        return True

    def _collect(self) -> Orders | None:
        """What has come in since the last turn; None at the end. Waits while nothing runs."""
        orders = Orders([], [])
        wait = not self._listeners
        if wait:  # the other ranks wait with this one, however long it takes
            self.llm.mesh.world.join_early()
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
            if message.request_id in self._listeners:
                self.metrics.aborted()
            orders.aborts.append(message.request_id)
            self._drop([message.request_id], message.error)
        elif message is not None:
            job, listener = message
            self._listeners[job.request_id] = listener
            self._arrived[job.request_id] = self.clock()
            if job.params.seed is None:
                job = replace(job, params=replace(job.params, seed=next(self._seeds)))
            orders.jobs.append(job)

    def _abort_what_waits_too_long(self, orders: Orders) -> None:
        if self.queue_seconds is None:
            return
        before = self.clock() - self.queue_seconds
        why = f"no step was free for this request within {self.queue_seconds:g} s"
        for request_id in self._waiting:
            if self._arrived.get(request_id, before) < before:
                error = ApiError(503, f"{why}: come again later", code="queue_timeout")
                orders.aborts.append(request_id)
                self._drop([request_id], error)

    def _take_reports(self, reports: Sequence[Report]) -> None:
        """Count, and tell the listeners, who may look at the numbers at once.

        The reports are in the order of the replicas.
        """
        self._waiting = [request_id for report in reports for request_id in report.waiting]
        for place, report in enumerate(reports):
            self.metrics.after_step(place, report.state)
            for event in report.events:
                self._hear(event)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Failed):
            self.metrics.failed()
            self._drop([event.request_id], event.error)
            return
        listener = self._listeners.get(event.request_id)
        if isinstance(event, Delta) and event.output is not None:
            self.metrics.finished(event.output)
            self._drop([event.request_id], None)
        if listener is not None:
            listener(event)

    def _drop(self, request_ids: Iterable[str], error: ApiError | None) -> None:
        """Forget jobs; their listeners hear the error."""
        for request_id in request_ids:
            self._arrived.pop(request_id, None)
            listener = self._listeners.pop(request_id, None)
            if listener is not None and error is not None:
                listener(Failed(request_id, error))

    def _step_has_failed(self, error: Exception) -> None:
        """All requests end: whose fault it is is not known. Later ones are served."""
        traceback.print_exception(error, file=sys.stderr)
        self._worker.drop_all()
        self._drop(list(self._listeners), ApiError(500, "the engine's step has failed"))

    def _refuse_the_rest(self) -> None:
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, tuple):
                job, listener = message
                listener(Failed(job.request_id, ApiError(503, "the server has ended")))
