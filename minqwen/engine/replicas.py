"""Several replicas of one model complete the prompts of one call.

Replica r of R takes the prompts r, r + R, r + 2 R, ... and makes its own steps. When a prompt is
finished, the first rank of its replica posts the output (`Mesh.post`), and rank 0 fetches it. An
output travels as JSON and, for its traces, as safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from minqwen.engine.outputs import CompletionOutput, Metrics, RequestOutput, TokenLogprobs
from minqwen.parallel import Mesh
from minqwen.sampling.logprobs import Logprob

PAUSE = 0.005  # seconds between two looks for outputs, while rank 0 has nothing else to do


class Relay:
    """Brings the outputs of one call to rank 0.

    call: the number of the call, the same on all ranks.
    """

    def __init__(self, mesh: Mesh, call: int) -> None:
        self.mesh, self.call = mesh, call
        self.counts = [0] * mesh.replicas  # of each replica: how many outputs were sent or received

    @property
    def receives(self) -> bool:
        return self.mesh.world.rank == 0

    def send(self, index: int, output: RequestOutput) -> None:
        """From the first rank of its replica; the other ranks have the same output."""
        if self.mesh.rank == 0:
            self.mesh.world.post(self._next(self.mesh.replica), to_bytes([(index, output)]))

    def received(self) -> list[tuple[int, RequestOutput]]:
        """What has come since the last call: the numbers of prompts, and their outputs."""
        found = []
        for replica in range(1, self.mesh.replicas):
            while data := self.mesh.world.fetch(self._name(replica)):
                self.counts[replica] += 1
                found += from_bytes(data, self.mesh.device)
        return found

    def wait(self, missing: int) -> Iterator[list[tuple[int, RequestOutput]]]:
        """All ranks call this when their own replica has finished.

        On rank 0 it yields the `missing` outputs of the other replicas, as they come.
        """
        if self.receives:
            self.mesh.world.join_early()
            while missing:
                found = self.received()
                missing -= len(found)
                yield found
                time.sleep(0 if found else PAUSE)
        self.mesh.world.barrier()

    def share(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """Rank 0's outputs, on every rank."""
        mine = to_bytes(list(enumerate(outputs))) if self.receives else b""
        data = self.mesh.world.broadcast_bytes(mine) or b""
        return outputs if self.receives else [o for _, o in from_bytes(data, self.mesh.device)]

    def _name(self, replica: int) -> str:
        return f"{self.call}/{replica}/{self.counts[replica]}"

    def _next(self, replica: int) -> str:
        name = self._name(replica)
        self.counts[replica] += 1
        return name


# ---- outputs as bytes ---------------------------------------------------------------------------


def to_bytes(outputs: list[tuple[int, RequestOutput]]) -> bytes:
    """The length of a JSON text, 8 bytes; the text; and a safetensors file with the traces."""
    tensors: dict[str, Tensor] = {}
    document = [[index, _plain(output, tensors)] for index, output in outputs]
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + safetensors.torch.save(tensors)


def from_bytes(data: bytes, device: torch.device) -> list[tuple[int, RequestOutput]]:
    """What `to_bytes` was given. device: of traces that were not on a CPU."""
    end = 8 + int.from_bytes(data[:8], "little")
    tensors = safetensors.torch.load(data[end:])
    return [(index, _output(plain, tensors, device)) for index, plain in json.loads(data[8:end])]


def _plain(output: RequestOutput, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The output as JSON has it. Its traces go into `tensors`."""
    fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    fields["metrics"] = dataclasses.asdict(output.metrics)
    fields["prompt_logprobs"] = plain_logprobs(output.prompt_logprobs)
    fields["outputs"] = [_plain_completion(one, tensors) for one in output.outputs]
    return fields


def _plain_completion(one: CompletionOutput, tensors: dict[str, Tensor]) -> dict[str, Any]:
    fields = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    fields["logprobs"] = plain_logprobs(one.logprobs)
    fields["trace"] = {name: _references(value, tensors) for name, value in one.trace.items()}
    return fields


def _references(value: Tensor | list[Tensor], tensors: dict[str, Tensor]) -> Any:
    """The name in `tensors` and the kind of device; a list of these for a list."""
    if isinstance(value, list):
        return [_references(one, tensors) for one in value]
    name = str(len(tensors))
    tensors[name] = value.detach().cpu().contiguous().clone()  # no two may share memory
    return {"tensor": name, "device": value.device.type}


def plain_logprobs(rows: Any) -> Any:
    """Logprobs of tokens as JSON has them; None stays None."""
    if rows is None:
        return None
    return [
        None if row is None else [[i, *dataclasses.astuple(row[i])] for i in row] for row in rows
    ]


def _output(
    fields: dict[str, Any], tensors: dict[str, Tensor], device: torch.device
) -> RequestOutput:
    fields["metrics"] = Metrics(**fields["metrics"])
    fields["prompt_logprobs"] = logprobs_of_plain(fields["prompt_logprobs"])
    for one in fields["outputs"]:
        one["logprobs"] = logprobs_of_plain(one["logprobs"])
        one["trace"] = {name: _tensors(v, tensors, device) for name, v in one["trace"].items()}
    fields["outputs"] = [CompletionOutput(**one) for one in fields["outputs"]]
    return RequestOutput(**fields)


def _tensors(value: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if isinstance(value, list):
        return [_tensors(one, tensors, device) for one in value]
    tensor = tensors[value["tensor"]]
    return tensor if value["device"] == "cpu" else tensor.to(device)


def logprobs_of_plain(rows: Any) -> Any:
    """What `plain_logprobs` was given."""
    if rows is None:
        return None
    return [None if row is None else _row(row) for row in rows]


def _row(row: list[list[Any]]) -> TokenLogprobs:
    return {i: Logprob(*fields) for i, *fields in row}
