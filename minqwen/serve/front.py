"""Between the loop that serves and the thread that steps: each request's jobs and what they tell.

Everything here runs in the event loop, except `Ticket.tell`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from minqwen.engine.outputs import Delta, RequestOutput
from minqwen.serve.errors import ApiError
from minqwen.serve.limits import Limits
from minqwen.serve.loop import EngineLoop
from minqwen.serve.orders import Job
from minqwen.serve.reports import Accepted, Begun, Event, Failed


class Ticket:
    """The jobs of one client's request, and what the engine tells of them."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs = list(jobs)
        self.unfinished = {job.request_id for job in jobs}
        self._place = {job.request_id: i for i, job in enumerate(jobs)}
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._early: list[Event] = []  # heard by `accepted`, not yet by `events`

    def tell(self, event: Event) -> None:
        """From the thread that steps. Whoever listened may have gone, with the event loop."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def place(self, event: Event) -> int:
        """The number of the job that an event is about."""
        return self._place[event.request_id]

    async def accepted(self) -> None:
        """Wait until the engine has taken every job. Raises ApiError for one that it refuses."""
        missing = set(self.unfinished)
        while missing:
            event = await self._next()
            if isinstance(event, Accepted):
                missing.discard(event.request_id)
            else:
                self._early.append(event)

    async def events(self) -> AsyncIterator[Begun | Delta]:
        """What comes of the jobs, until all are finished. Raises ApiError if one fails."""
        while self.unfinished:
            event = self._early.pop(0) if self._early else await self._next()
            if isinstance(event, Delta) and event.output is not None:
                self.unfinished.discard(event.request_id)
            if isinstance(event, (Begun, Delta)):
                yield event

    async def outputs(self) -> list[RequestOutput]:
        """What all jobs have come to, in their order."""
        outputs: dict[int, RequestOutput] = {}
        async for event in self.events():
            if isinstance(event, Delta) and event.output is not None:
                outputs[self.place(event)] = event.output
        return [outputs[i] for i in range(len(self.jobs))]

    async def _next(self) -> Event:
        event = await self._events.get()
        if isinstance(event, Failed):
            self.unfinished.discard(event.request_id)
            raise event.error
        return event


@dataclass
class Front:
    """Lets in as many jobs as the limits allow, and knows which requests are open."""

    loop: EngineLoop
    limits: Limits
    closing: bool = False
    open: set[Ticket] = field(default_factory=set)
    prompts: int = 0  # of the open requests

    def enter(self, jobs: Sequence[Job]) -> Ticket:
        """Hand the jobs to the engine. Raises ApiError if too many are open already."""
        if self.closing:
            raise ApiError(503, "the server is ending: ask another one", code="ending")
        if self.prompts + len(jobs) > self.limits.requests:
            raise ApiError(
                429,
                f"{self.prompts} prompts run or wait, and at most {self.limits.requests} may: "
                "come again later",
                code="too_many_requests",
            )
        ticket = Ticket(jobs)
        self.open.add(ticket)
        self.prompts += len(jobs)
        for job in jobs:
            self.loop.submit(job, ticket.tell)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """The client has its answer, or has gone: what is unfinished ends at the next step."""
        self.open.remove(ticket)
        self.prompts -= len(ticket.jobs)
        for request_id in ticket.unfinished:
            self.loop.abort(request_id)
        ticket.unfinished.clear()
