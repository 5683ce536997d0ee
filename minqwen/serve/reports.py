"""What a replica tells rank 0 after a step: what came of its jobs, and how full it is; as bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import torch

from minqwen.engine.outputs import Delta, TokenLogprobs
from minqwen.engine.replicas import from_bytes, logprobs_of_plain, plain_logprobs, to_bytes
from minqwen.serve.errors import ApiError


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


@dataclass(frozen=True)
class State:
    """Completions that run and that wait, the share of blocks in use, preemptions so far."""

    running: int = 0
    waiting: int = 0
    blocks_used: float = 0.0
    preemptions: int = 0


@dataclass(frozen=True)
class Report:
    """waiting: the jobs that no step has had yet."""

    events: list[Event] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    state: State = field(default_factory=State)

    def to_bytes(self) -> bytes:
        """The length of a JSON text, 8 bytes; the text; and the finished outputs."""
        outputs = [event.output for event in self.events if isinstance(event, Delta)]
        finished = [(i, output) for i, output in enumerate(outputs) if output is not None]
        plain = [[_plain(event) for event in self.events], self.waiting, astuple(self.state)]
        text = json.dumps(plain).encode()
        return len(text).to_bytes(8, "little") + text + to_bytes(finished)

    @classmethod
    def from_bytes(cls, data: bytes) -> Report:
        """What `to_bytes` was given."""
        end = 8 + int.from_bytes(data[:8], "little")
        events, waiting, state = json.loads(data[8:end])
        outputs = dict(from_bytes(data[end:], torch.device("cpu")))
        deltas = 0
        found: list[Event] = []
        for kind, fields in events:
            if kind == "delta":
                fields["output"] = outputs.get(deltas)
                deltas += 1
            found.append(_event(kind, fields))
        return cls(found, waiting, State(*state))


def _plain(event: Event) -> tuple[str, dict[str, Any]]:
    if isinstance(event, Failed):
        error = event.error
        told = {"message": error.message, "param": error.param, "code": error.code}
        return "failed", {"request_id": event.request_id, "status": error.status, **told}
    if isinstance(event, Accepted):
        return "accepted", asdict(event)
    fields = dict(vars(event))
    if isinstance(event, Begun):
        fields["prompt_logprobs"] = plain_logprobs(event.prompt_logprobs)
        return "begun", fields
    fields["logprobs"] = plain_logprobs(event.logprobs)
    del fields["output"]
    return "delta", fields


def _event(kind: str, fields: dict[str, Any]) -> Event:
    if kind == "failed":
        return Failed(fields.pop("request_id"), ApiError(**fields))
    if kind == "accepted":
        return Accepted(**fields)
    if kind == "begun":
        fields["prompt_logprobs"] = logprobs_of_plain(fields["prompt_logprobs"])
        return Begun(**fields)
    fields["logprobs"] = logprobs_of_plain(fields["logprobs"])
    return Delta(**fields)


def joined(reports: Sequence[bytes]) -> list[Report]:
    """The reports of those who have sent one."""
    return [Report.from_bytes(data) for data in reports if data]
