"""CPU against device, bit by bit: right code passes every check, a fault of each kind is found."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minqwen.lab.device import compute, difference, examine, examine_cpu, inputs_of
from minqwen.lab.device_checks import QUICK, Check, checks
from minqwen.lab.device_numbers import Numbers, full_budget
from minqwen.model import Exact, exact
from minqwen.model.rope import rotate_half

CHECKS = {f"{check.family}: {check.name}": check for check in checks(QUICK)}


def test_this_cpu_passes_every_check():
    outcomes = list(examine_cpu(QUICK))
    assert [o for o in outcomes if not o.holds] == []
    assert len(outcomes) == len(CHECKS) > 70
    assert all("scalar code" in o.against for o in outcomes)
    assert sum("the truth" in o.against for o in outcomes) > 15


class Fault(TorchDispatchMode):
    """A device on which one operation has another meaning."""

    def __init__(self, name, replacement):
        super().__init__()
        self.name, self.replacement = name, replacement

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == self.name:
            return self.replacement(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def truncated(convert, x, **kwargs):
    """A conversion that rounds towards zero."""
    y = convert(x, **kwargs)
    if x.dtype == torch.float64 and y.dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = torch.where(y.double().abs() > x.abs(), y.nextafter(torch.zeros_like(y)), y)
    return y


def truncated_copy(copy, out, x, *args):
    """The same where a tensor is written into another."""
    return copy(out, truncated(torch.Tensor.to, x, dtype=out.dtype), *args)


def by_reciprocal(divide, a, b, out=None):
    """CUDA's division by a plain number, used for every division."""
    inverse = b.reciprocal() if isinstance(b, torch.Tensor) else 1 / b
    return torch.mul(a, inverse, out=out)


def of_20_bits(multiply, *operands):
    """A product whose operands lose their last bits, as they may in an emulation of float64."""
    lost = (1 << 52 - 20) - 1
    return multiply(*((x.view(torch.int64) & ~lost).view(torch.float64) for x in operands))


def in_float32(add_up, x, *args, **kwargs):
    """A sum in a narrower type."""
    return add_up(x.float(), *args, **kwargs).to(x.dtype)


def contracted(self, x, cos, sin):
    """RoPE by one fused multiply-add: the first product is not rounded."""
    return (x.double() * cos.double() + (rotate_half(x) * sin).double()).to(x.dtype)


def mean_by_division(self, x, weight, eps):
    """The mean as a division by a plain number."""
    wide = x.double()
    mean = (wide * wide).sum(-1, keepdim=True) / x.shape[-1]
    return weight * (wide * exact.sqrt(mean + eps).reciprocal()).to(x.dtype)


PLANTED = [
    ("functions: quotient", Fault("div", by_reciprocal)),
    ("functions: exp", mock.patch.object(exact, "exp", torch.exp)),
    ("float32: rms_norm of a row whose mean shows the divisor", ("rms_norm", mean_by_division)),
    ("float32: rotate", ("rotate", contracted)),
    ("float32: silu_mul", mock.patch.object(exact, "exp", torch.expm1)),
    ("bfloat16: silu_mul", Fault("copy_", truncated_copy)),
    ("conversions: float64 to float32", Fault("_to_copy", truncated)),
    ("conversions: float64 to float16", Fault("_to_copy", truncated)),
    ("conversions: float64 to bfloat16", Fault("_to_copy", truncated)),
    ("sums: product [1, 896] of 27 + 26 bits", Fault("mm", of_20_bits)),
    ("sums: product [3, 64] of 28 + 25 bits", Fault("mm", of_20_bits)),
    ("sums: scores of heads, 28 + 25 bits", Fault("bmm", of_20_bits)),
    ("attention: float32, 7 of 33 tokens", Fault("bmm", of_20_bits)),
    ("models: in pieces of 7 tokens over a cache", Fault("mm", of_20_bits)),
    ("models: 28 heads padded to 32", ("rotate", contracted)),
    ("sampling: log_softmax", Fault("sum", in_float32)),
    ("sampling: total of the weights", Fault("sum", in_float32)),
    (
        "models: 28 heads in bfloat16, float32 weights kept in float64",
        Fault("_to_copy", truncated),
    ),
]


@pytest.mark.parametrize("name, fault", PLANTED, ids=[name for name, _ in PLANTED])
def test_a_planted_fault_is_found(name, fault):
    if isinstance(fault, tuple):
        fault = mock.patch.object(Exact, *fault)
    check = checks_with(fault, name)
    inputs = inputs_of(CHECKS[name])
    expected = compute(CHECKS[name].function, inputs)
    with fault:
        got = compute(check.function, inputs)
    assert "instead of" in difference(expected, got, inputs)


def checks_with(fault, name):
    """The check as a faulty process makes it; its function may be taken when it is made."""
    with fault if hasattr(fault, "attribute") else contextlib.nullcontext():
        found = {f"{check.family}: {check.name}": check for check in checks(QUICK)}
    return found[name]


def test_a_fault_of_this_process_is_a_difference_from_scalar_code():
    with mock.patch.object(Exact, "rotate", contracted):
        failed = {f"{o.family}: {o.name}" for o in examine_cpu(QUICK) if not o.holds}
    assert "float32: rotate" in failed and "models: 28 heads padded to 32" in failed
    assert "functions: exp" not in failed and "attention: float32, 7 of 33 tokens" not in failed


def test_the_truth_finds_a_fault_that_all_devices_share():
    with Fault("_to_copy", truncated):
        outcome, _ = examine(CHECKS["conversions: float64 to float32"])
    assert outcome.against == ["the truth"] and not outcome.holds


def test_a_difference_names_how_many_and_the_first_input():
    x = torch.tensor([1.0, 2.0, 3.0])
    check = Check("here", "x + 1", lambda x: x + 1, lambda r: (x,))
    expected = compute(check.function, (x,))
    got = [torch.tensor([2.0, 3.5, 4.5])]
    assert difference(expected, expected, (x,)) == ""
    assert difference(expected, got, (x,)) == (
        "2 of 3, first 0x1.c000000000000p+1 instead of 0x1.8000000000000p+1 of 0x1.0000000000000p+1"
    )


def test_signs_of_zeros_count_and_every_nan_is_alike():
    x = torch.tensor([0.0])
    zeros = [compute(function, (x,)) for function in (torch.abs, torch.neg)]
    nans = [compute(function, (x,)) for function in (lambda x: x / x, lambda x: -(x / x))]
    assert difference(*zeros, (x,)) and not difference(*nans, (x,))


def test_what_cannot_run_is_a_difference_and_not_the_end():
    check = Check("here", "never", lambda x: x, lambda r: (torch.ones(3),))
    outcome, _ = examine(check, "fpga")
    assert len(outcome.differences) == 1 and "raises" in outcome.differences[0]


def test_another_device_is_compared_with_the_cpu():
    calls = iter((1.0, 1.5))
    check = Check("here", "x times", lambda x: x * next(calls), lambda r: (torch.ones(3),))
    outcome, _ = examine(check, "cpu:0")  # to the list of checks a device of its own
    assert outcome.against == ["cpu:0"]
    assert outcome.differences[0].startswith("cpu:0: 3 of 3, first 0x1.8")


def test_a_cpu_that_cannot_run_a_check_is_told_too():
    outcome, sha = examine(Check("here", "never", lambda x: x + "1", lambda r: (torch.ones(3),)))
    assert "the CPU: raises TypeError" in outcome.differences[0] and sha == ""


def test_a_process_of_scalar_code_that_ends_is_a_difference_in_every_check(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    outcomes = list(examine_cpu(QUICK))
    assert len(outcomes) == len(CHECKS)
    assert all("the process ended before it" in o.differences[0] for o in outcomes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_lie_half_way(dtype):
    x = Numbers("ties").ties(dtype, torch.float64, 20000)
    near = x.to(dtype).double()
    step = (near - x).abs()
    here = x.isfinite() & near.isfinite() & (near.abs() > 1e-3)
    half = near.abs() * torch.finfo(dtype).eps / 2  # of the exponent's unit, at most twice that
    assert ((step / half)[here] > 0.24).all() and ((step / half)[here] < 1.01).all()
    exact_tie = x.view(torch.int64) & 0xFFFF == 0
    assert 0.05 < exact_tie.double().mean() < 0.5


@pytest.mark.parametrize("n", [64, 896, 32768])
def test_a_full_budget_comes_close_to_2_to_the_53_and_not_beyond(n):
    r = Numbers("budget")
    x, w = full_budget(r, 8, n, 27).long(), full_budget(r, 8, n, 26).long()
    sums = x @ w.T
    assert sums.max() <= 1 << 53 and sums.min() > 0.999 * 2**53
    assert (sums % 2 == 1).any()
