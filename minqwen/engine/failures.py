"""Errors of one request, which must not become errors of the whole step."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import torch

from minqwen.engine.outputs import RequestOutput
from minqwen.errors import MinqwenError, RequestError, told


def described(error: Exception) -> str:
    """An error in one line, with the place in the code that raised it unless it is a user's."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, MinqwenError) or not frames:
        return told(error)
    return f"{told(error)} ({frames[-1].filename}:{frames[-1].lineno})"


def lacks_memory(error: Exception) -> bool:
    """Whether there was too little memory: not one request's fault, and the step can be repeated.

    PyTorch says so on a CPU with a RuntimeError.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "memory" in str(error)


def raise_failures(outputs: Sequence[RequestOutput]) -> None:
    """Raise RequestError, with all outputs, if a request has failed."""
    failed = [output for output in outputs if output.error]
    if failed:
        more = f" ({len(failed) - 1} more failed)" if len(failed) > 1 else ""
        why = f"request {failed[0].request_id}: {failed[0].error}{more}"
        raise RequestError(why, outputs)
