"""Values that nobody should give, one of each kind, by the name that a test has for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch


class NoText:
    """What cannot be shown."""

    def __repr__(self) -> str:
        raise KeyError("no text")


class Unprintable(NoText):
    """What cannot be shown, compared or counted."""

    def __eq__(self, other: object) -> bool:
        raise KeyError("no comparison")

    __hash__ = object.__hash__

    def __len__(self) -> int:
        raise KeyError("no length")

    def __bool__(self) -> bool:
        raise KeyError("no truth")


NUMBERS: dict[str, Any] = {
    "0": 0,
    "-1": -1,
    "1": 1,
    "1.5": 1.5,
    "-0.0": -0.0,
    "5e-324": 5e-324,
    "1e39": 1e39,
    "-1e39": -1e39,
    "2^31": 2**31,
    "2^62": 2**62,
    "2^63": 2**63,
    "2^64": 2**64,
    "-2^63": -(2**63),
    "10^400": 10**400,
    "10^5000": 10**5000,
    "NaN": math.nan,
    "Inf": math.inf,
    "-Inf": -math.inf,
    "True": True,
    "1j": 1j,
    "numpy NaN": np.float32("nan"),
    "numpy 3": np.int64(3),
    "numpy True": np.bool_(True),
    "Decimal sNaN": Decimal("sNaN"),
    "1/3": Fraction(1, 3),
}
OTHERS: dict[str, Any] = {
    "None": None,
    "text 1": "1",
    "empty text": "",
    "half a pair": "\ud800",
    "escapes": "a\nb\x1b[2J",
    "long text": "x" * 10**6,
    "bytes": b"1",
    "object": object(),
    "unprintable": Unprintable(),
    "its class": Unprintable,
    "function": lambda *args: None,
}
HOLDERS: dict[str, Any] = {
    "[]": [],
    "()": (),
    "{}": {},
    "set": {1},
    "iterator": iter([1]),
    "[1]": [1],
    "[[]]": [[]],
    "[None]": [None],
    "[NaN]": [math.nan],
    "['']": [""],
    "[2^63]": [2**63],
    "[True]": [True],
    "[1.5]": [1.5],
    "['1']": ["1"],
    "[unprintable]": [Unprintable()],
    "many": [1] * 30_000,
    "{1: 1}": {1: 1},
    "{'1': 1}": {"1": 1},
    "{1: NaN}": {1: math.nan},
    "{2^63: 1}": {2**63: 1},
    "{unprintable: 1}": {NoText(): 1},
    "{'a': None}": {"a": None},
    "array": np.array([1, 2]),
    "array of text": np.array(["a"]),
    "array of one": np.array(1),
    "tensor": torch.tensor([1, 2]),
    "tensor of one": torch.tensor(1.5),
    "tensor of rows": torch.tensor([[1, 2]]),
}
VALUES: dict[str, Any] = {**NUMBERS, **OTHERS, **HOLDERS}


def refusal(call: Callable[[], object], error: type[Exception]) -> str | None:
    """The line of a refusal; None if the call is taken. Any other exception is raised."""
    try:
        call()
    except error as refused:
        line = str(refused)
        assert line and line.isprintable() and len(line) <= 500, line
        return line
    return None
