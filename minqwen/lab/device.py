"""A device against the CPU, and the CPU against scalar code, bit by bit.

"Exact logits are the same on every device" is an argument until it was run. Here it is run: every
check of device_checks.py is computed on the CPU and compared with what else there is. That is the
truth, where integers or numpy can tell it; the same functions in a process without vector
instructions; a GPU. `tools/doctor.py` prints the outcome.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minqwen.errors import kind_and_words
from minqwen.lab.device_checks import Check, Size, Tensors, checks
from minqwen.lab.device_numbers import Numbers
from minqwen.lab.golden import BITS, digest

# No vector instructions, and the oldest code of the libraries for products.
SCALAR = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Outcome:
    """What came of one check. differences: one sentence for each comparison that failed."""

    family: str
    name: str
    numbers: int = 0  # that were compared
    seconds: float = 0.0
    against: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    note: str = ""  # what else there is to say, for example why nothing was compared
    figures: dict[str, float] = field(default_factory=dict)  # of a note, for a program

    @property
    def holds(self) -> bool:
        return not self.differences


# ---- one check ----------------------------------------------------------------------------------


def inputs_of(check: Check) -> Tensors:
    """The check's inputs, on the CPU; always the same."""
    return check.inputs(Numbers(f"{check.family}: {check.name}"))


@torch.no_grad()
def compute(
    function: Callable[..., Tensor | Tensors], inputs: Tensors, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """The function's results from inputs on `device`, brought to the CPU. Every NaN is alike."""
    out = function(*(x.to(device) for x in inputs))
    results = [out] if isinstance(out, Tensor) else list(out)
    return [x.cpu().masked_fill(x.cpu().isnan(), torch.nan) for x in results]


def difference(expected: Sequence[Tensor], got: Sequence[Tensor], inputs: Tensors) -> str:
    """How many numbers differ in any bit, and the first that does; "" if none."""
    wrong = [_bits(a) != _bits(b) for a, b in zip(expected, got, strict=True)]
    count = sum(int(w.sum()) for w in wrong)
    if not count:
        return ""
    first = next(i for i, w in enumerate(wrong) if w.any())
    at = int(wrong[first].flatten().nonzero()[0])
    a, b = (float(some[first].flatten()[at]).hex() for some in (expected, got))
    total = sum(w.numel() for w in wrong)
    shape = tuple(expected[first].shape)
    return f"{count:,} of {total:,}, first {b} instead of {a} {_place(shape, at, inputs)}"


def _bits(x: Tensor) -> Tensor:
    """The numbers' bits as integers. A difference of shapes is no difference of numbers."""
    return x.contiguous().view(BITS[x.element_size()])


def _place(shape: tuple[int, ...], at: int, inputs: Tensors) -> str:
    """The inputs that made a result where every result has its own, else its index."""
    if inputs and all(x.shape == shape for x in inputs):
        return "of " + ", ".join(float(x.flatten()[at]).hex() for x in inputs)
    index = torch.unravel_index(torch.tensor(at), shape)
    return f"at {[int(i) for i in index]}"


def examine(check: Check, device: torch.device | str = "cpu") -> tuple[Outcome, str]:
    """Compute a check on the CPU, compare it with the truth or a GPU; also the CPU's digest.

    What raises is a difference too: one step that cannot run must not hide the others.
    """
    began = time.perf_counter()
    outcome = Outcome(check.family, check.name)
    try:
        inputs = inputs_of(check)
        expected = compute(check.function, inputs)
    except Exception as error:
        outcome.differences.append(f"the CPU: {_raises(error)}")
        return outcome, ""
    outcome.numbers = sum(x.numel() for x in expected)
    if str(device) != "cpu":
        _compare(outcome, str(device), (expected, inputs), check.function, device)
    elif check.truth is not None:
        _compare(outcome, "the truth", (expected, inputs), check.truth, device)
    outcome.seconds = time.perf_counter() - began
    return outcome, digest(expected)


def _compare(
    outcome: Outcome,
    what: str,
    cpu: tuple[list[Tensor], Tensors],
    function: Callable[..., Tensor | Tensors],
    device: torch.device | str,
) -> None:
    """Note whether `function` on `device` gives what the CPU gave. cpu: its results, the inputs."""
    expected, inputs = cpu
    outcome.against.append(what)
    try:
        found = difference(expected, compute(function, inputs, device), inputs)
    except Exception as error:
        found = _raises(error)
    if found:
        outcome.differences.append(f"{what}: {found}")


def _raises(error: Exception) -> str:
    return f"raises {kind_and_words(error)}"


# ---- all checks ---------------------------------------------------------------------------------


def examine_cpu(size: Size) -> Iterator[Outcome]:
    """Every check on this CPU against the truth, and against a process without vector code."""
    with scalar_digests(size) as others:
        for check in checks(size):
            outcome, here = examine(check)
            outcome.against.append("scalar code")
            other = next(others, "the process ended before it")
            if other != here:
                outcome.differences.append(f"scalar code: {other}, not {here}")
            yield outcome


def examine_device(size: Size, device: torch.device | str) -> Iterator[Outcome]:
    """Every check on the CPU against another device."""
    for check in checks(size):
        yield examine(check, device)[0]


@contextmanager
def scalar_digests(size: Size) -> Iterator[Iterator[str]]:
    """The digests of the checks' results, in order, from a process that runs beside this one."""
    code = "import sys; from minqwen.lab.device import print_digests; print_digests(sys.argv[1])"
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    child = subprocess.Popen(
        [sys.executable, "-c", code, size.as_json()],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **SCALAR, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert child.stdout is not None
    try:
        yield (line.strip() for line in child.stdout)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def print_digests(size: str) -> None:
    """What the process beside prints: one digest for each check. size: a Size as JSON."""
    torch.set_num_threads(1)
    for check in checks(Size.from_json(size)):
        print(examine(check._replace(truth=None))[1], flush=True)
