"""What rank 0 tells all ranks before a step, as bytes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from minqwen.sampling.params import SamplingParams
from minqwen.sampling.structured import StructuredOutputs


@dataclass(frozen=True)
class Job:
    """One prompt for the engine."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    cache_salt: str | None = None


@dataclass(frozen=True)
class Orders:
    """Jobs to add and then requests to abort, in this order on every rank."""

    jobs: list[Job]
    aborts: list[str]

    def to_bytes(self) -> bytes:
        jobs = [
            [job.request_id, job.prompt_ids, fields_of(job.params), job.cache_salt]
            for job in self.jobs
        ]
        return json.dumps([jobs, self.aborts]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Orders:
        jobs, aborts = json.loads(data)
        return cls([Job(i, ids, params_of(fields), salt) for i, ids, fields, salt in jobs], aborts)


def fields_of(params: SamplingParams) -> dict[str, Any]:
    """The fields that are not the default, as JSON has them."""
    found = {}
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if value != field.default:
            found[field.name] = value
    if params.structured_outputs is not None:
        found["structured_outputs"] = dataclasses.asdict(params.structured_outputs)
    return found


def params_of(fields: dict[str, Any]) -> SamplingParams:
    """What `fields_of` was given."""
    if "logit_bias" in fields:  # JSON's keys are strings
        fields["logit_bias"] = {int(i): bias for i, bias in fields["logit_bias"].items()}
    if "structured_outputs" in fields:
        fields["structured_outputs"] = StructuredOutputs(**fields["structured_outputs"])
    return SamplingParams(**fields)
