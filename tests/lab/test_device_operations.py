"""Exact arithmetic is made of operations that mean the same on every device.

A GPU divides by a plain number by way of its reciprocal. Some devices fuse a multiply-add, as a CPU
with vector instructions does, others do not. Each has libraries of its own for exp, sqrt and the
like. Here the CPU takes the other way each time, and no bit may change.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minqwen.lab.device import compute, difference, inputs_of
from minqwen.lab.device_checks import QUICK, Check, checks

CHECKS = {
    f"{check.family}: {check.name}": check
    for check in checks(QUICK)
    # A draw adds up its few last numbers one by one, on the CPU, whatever the device.
    if check.family != "conversions" and check.name != "drawn tokens"
}
# Elementwise operations that IEEE 754 defines to the last bit, or that do not round.
DEFINED = {
    *("abs", "add", "clamp", "clamp_min", "div", "maximum", "minimum", "mul", "neg"),
    *("reciprocal", "rsub", "sub", "ceil", "floor", "round", "trunc", "sign"),
    *("eq", "ge", "gt", "le", "lt", "ne", "isfinite", "isnan", "isinf", "logical_not"),
    *("bitwise_and", "bitwise_not", "bitwise_or", "bitwise_left_shift", "bitwise_right_shift"),
    *("__and__", "__lshift__", "__or__", "__rshift__", "remainder", "where", "masked_fill"),
    *("equal", "logical_and", "logical_or", "nan_to_num", "copysign"),
    *("_to_copy", "clone", "copy", "fill", "zero", "lift_fresh", "alias", "detach"),
}
# Sums whose order or division is a device's own affair, and mixtures of several steps.
UNDEFINED = {"mean", "var", "std", "norm", "cumsum", "logsumexp", "_softmax", "_log_softmax"}


class AnotherDevice(TorchDispatchMode):
    """Computes what is left open in the other way; refuses what a library would compute."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        name = name if name.startswith("__") else name.removesuffix("_")
        if name in UNDEFINED or (torch.Tag.pointwise in func.tags and name not in DEFINED):
            raise AssertionError(f"{func} is not the same on every device")
        if name == "div" and not isinstance(args[1], torch.Tensor):
            multiply = torch.Tensor.mul_ if "div_" in str(func) else torch.mul
            return multiply(args[0], 1 / args[1], *args[2:], **kwargs)
        if isinstance(kwargs.get("alpha"), float):
            product = args[1] * kwargs.pop("alpha")  # rounded
            return func(args[0], product, **kwargs)
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", CHECKS)
def test_what_a_device_may_choose_changes_no_bit(name):
    check = CHECKS[name]
    inputs = inputs_of(check)
    expected = compute(check.function, inputs)
    with AnotherDevice():
        got = compute(check.function, inputs)
    assert difference(expected, got, inputs) == ""


def rows(r):
    return (r.spread(-3, 3, 100, 3),)


@pytest.mark.parametrize(
    "function",
    [lambda x: x / 3, lambda x: x.clone().div_(3), lambda x: x.add(x.flip(0), alpha=1 / 3)],
    ids=["quotient", "quotient in place", "multiply-add"],
)
def test_the_other_way_is_seen_where_it_matters(function):
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this CPU does not fuse a multiply-add either")
    check = Check("here", "a choice", function, rows)
    inputs = inputs_of(check)
    expected = compute(function, inputs)
    with AnotherDevice():
        got = compute(function, inputs)
    assert difference(expected, got, inputs)


@pytest.mark.parametrize(
    "function",
    [torch.exp, torch.sqrt, torch.nn.functional.silu, lambda x: x**2.5, lambda x: x.softmax(-1)],
)
def test_a_librarys_function_is_refused(function):
    with AnotherDevice(), pytest.raises(AssertionError, match="not the same on every device"):
        compute(function, (torch.ones(3),))
