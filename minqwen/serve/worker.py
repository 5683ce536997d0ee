"""One replica's engine, as each of its ranks runs it: orders in, a step, a report out.

Before each step rank 0 sends its new orders (jobs and aborts) to all ranks, and every rank, rank 0
too, carries out what was sent. What rank 0 decides by its clock, such as who has waited too long,
is an order as well. So all ranks of a replica do the same.

Several replicas make their steps at the same time, and the slowest one sets the pace. A job goes to
the replica that has the longest prefix of its prompt in its cache, and of several such to the one
with the fewest jobs; all ranks find out by the same numbers. After the step rank 0 gets a report
from each replica.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterable, Sequence

import torch

from minqwen.engine.llm import LLM
from minqwen.engine.outputs import Delta
from minqwen.engine.request import Request
from minqwen.errors import MinqwenError
from minqwen.sampling.params import SamplingParams
from minqwen.sampling.structured import StructuredOutputs
from minqwen.serve.errors import ApiError, of_failed_request
from minqwen.serve.orders import Job, Orders
from minqwen.serve.reports import Accepted, Begun, Event, Failed, Report, State, joined


class Worker:
    """An engine that does what rank 0 orders."""

    def __init__(self, llm: LLM):
        self.llm, self.mesh = llm, llm.mesh
        self._new: dict[str, Request] = {}  # of which no delta has come yet

    def share(self, data: bytes | None) -> bytes | None:
        """Rank 0's orders, on every rank; None at the end."""
        return self.mesh.world.broadcast_bytes(data)

    def turn(self, orders: Orders) -> list[Report]:
        """Carry out orders and make a step. Returns the replicas' reports, to rank 0."""
        events = self._carry_out(orders)
        events += self._told(self.llm.step())
        report = Report(events, self._waiting(), self._state())
        if self.mesh.replicas == 1:
            return [report]
        speaks = self.mesh.rank == 0
        return joined(self.mesh.world.all_gather_bytes(report.to_bytes() if speaks else b""))

    def drop_all(self) -> None:
        """Abort everything."""
        self._new.clear()
        for request_id in list(self.llm.core.requests):
            self.llm.abort(request_id)

    def _carry_out(self, orders: Orders) -> list[Event]:
        events: list[Event] = []
        for job in self._own(orders.jobs):
            prompt = {"prompt_token_ids": job.prompt_ids, "cache_salt": job.cache_salt}
            try:
                self.llm.add_request(prompt, job.params, request_id=job.request_id)
            except Exception as error:
                events.append(Failed(job.request_id, refusal(error)))
            else:
                events.append(Accepted(job.request_id))
                self._new[job.request_id] = self.llm.core.requests[job.request_id]
        for request_id in orders.aborts:
            self._new.pop(request_id, None)
            self.llm.abort(request_id)
        return events

    def _own(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """The jobs that this replica runs."""
        if self.mesh.replicas == 1 or not jobs:
            return jobs
        pool = self.llm.core.pool
        cached = [len(pool.match(job.prompt_ids, job.cache_salt)) for job in jobs]
        numbers = torch.tensor([len(self.llm.core.requests), *cached], device=self.mesh.device)
        rows = self.mesh.world.all_gather(numbers).view(self.mesh.world.size, -1)
        places = assigned(rows[:: self.mesh.size].tolist())
        return [job for job, place in zip(jobs, places) if place == self.mesh.replica]

    def _told(self, deltas: Iterable[Delta]) -> list[Event]:
        events: list[Event] = []
        for delta in deltas:
            request = self._new.pop(delta.request_id, None)
            if request is not None:
                cached = request.completions[0].num_cached
                events.append(Begun(delta.request_id, request.prompt_logprobs, cached))
            if delta.output is not None and delta.output.error is not None:
                events.append(Failed(delta.request_id, of_failed_request(delta.output.error)))
            else:
                events.append(delta)
        return events

    def _waiting(self) -> list[str]:
        """The jobs that no step has had yet."""
        return [
            completion.request.request_id
            for completion in self.llm.core.scheduler.waiting
            if completion.index == 0
            and completion.num_preemptions == 0
            and completion.request.request_id in self._new
        ]

    def _state(self) -> State:
        scheduler = self.llm.core.scheduler
        pool = scheduler.pool
        used = 1 - pool.num_free / pool.num_blocks
        counts = len(scheduler.running), len(scheduler.waiting)
        return State(*counts, used, scheduler.num_preemptions)


def follow(llm: LLM) -> None:
    """What the ranks other than 0 do, until rank 0 ends."""
    worker = Worker(llm)
    while (data := worker.share(None)) is not None:
        worker.turn(Orders.from_bytes(data))


def assigned(rows: Sequence[Sequence[int]]) -> list[int]:
    """The replica of each job. rows: each replica's number of jobs, then its cached blocks of each.

    A job that is given away counts for those after it.
    """
    loads = [row[0] for row in rows]
    places = []
    for cached in zip(*(row[1:] for row in rows)):
        place = min(range(len(rows)), key=lambda r: (-cached[r], loads[r], r))
        loads[place] += 1
        places.append(place)
    return places


def refusal(error: Exception) -> ApiError:
    """What a client is told of a job that the engine does not take."""
    if isinstance(error, MinqwenError):
        return ApiError(400, str(error))
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, "the request could not be added")


def warm_up(llm: LLM) -> None:
    """Read the vocabulary for grammars, which can take seconds, before anybody waits.

    All ranks call this. Without the extra [json] each request for a grammar is told so.
    """
    with contextlib.suppress(MinqwenError):
        grammar = StructuredOutputs(json_object=True)
        llm.abort(llm.add_request([0], SamplingParams(structured_outputs=grammar)))
