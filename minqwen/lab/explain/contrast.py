"""A model and the same model with one mistake in it, beside each other on one prompt.

Both run in native arithmetic on the whole text, where the catalogue's mistakes can be made. Up to
the mistake they compute the same bits. So the first point at which a bit differs is where it is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minqwen.lab.compare import rms
from minqwen.lab.explain.explain import (
    AFTER,
    BEFORE,
    IN_LAYER,
    NUMBERS,
    Explanation,
    Prediction,
    Run,
    Spell,
    code_of,
    likeliest,
    run,
    tell,
)
from minqwen.lab.explain.sources import Code, whole
from minqwen.lab.faults import Fault
from minqwen.model import Qwen2
from minqwen.model.trace import point_names, point_of


@dataclass(frozen=True)
class Difference:
    """How far the wrong model is from the right one at a point.

    size: the root mean square of the difference over that of the right numbers; 0 if every bit is
    the same, infinity if the shapes differ or only one side is a finite number somewhere.
    """

    point: str
    size: float


@dataclass(frozen=True)
class First:
    """The first point that differs, and its first numbers that do. at: where, as an index.

    token: the position of the token that these numbers belong to. code: of the right operation.
    """

    point: str
    what: str
    token: int
    at: str
    right: tuple[float, ...]
    wrong: tuple[float, ...]
    code: tuple[Code, ...]


@dataclass(frozen=True)
class Place:
    """What both say after one token of the prompt. same: in every bit.

    change: the largest change of a log probability.
    """

    position: int
    text: str
    right: Prediction
    wrong: Prediction
    same: bool
    change: float


@dataclass(frozen=True)
class Contrast:
    """code: how the mistake is made, and what is given to that code.

    first, points: empty where no point shows the mistake. places: empty where the prompts differ.
    """

    name: str
    kind: str
    symptom: str
    source: str
    silent: str
    code: tuple[Code, ...]
    given: tuple[str, ...]
    right: Explanation
    wrong: Explanation
    first: First | None
    points: tuple[Difference, ...]
    places: tuple[Place, ...]


def contrast(
    fault: Fault,
    right_model: Qwen2,
    wrong_model: Qwen2,
    right_ids: Sequence[int],
    wrong_ids: Sequence[int],
    spell: Spell,
    name: str,
) -> Contrast:
    """The two models side by side. The prompts differ only if the mistake is in the tokens."""
    right, wrong = run(right_model, right_ids, None), run(wrong_model, wrong_ids, None)
    said = [tell(it, spell, name) for it in (right, wrong)]
    code, given = code_of_mistake(fault)
    reported = fault.logprobs(wrong.logits.double(), torch.tensor(wrong.ids))
    points: tuple[Difference, ...] = ()
    places: tuple[Place, ...] = ()
    if right.ids == wrong.ids:
        points = tuple(differences(right, wrong))
        places = tuple(places_of(right.logits.double().log_softmax(-1), reported, right, spell))
    return Contrast(
        name=fault.name,
        kind=fault.kind,
        symptom=fault.symptom,
        source=fault.source,
        silent=fault.silent,
        code=code,
        given=given,
        right=said[0],
        wrong=replace(said[1], predictions=likeliest(reported[-1], spell)),
        first=first_of(right, wrong),
        points=points,
        places=places,
    )


# ---- numbers ------------------------------------------------------------------------------------


def differences(right: Run, wrong: Run) -> Iterator[Difference]:
    """How far the two are apart at every point, in the order of computation."""
    for name in point_names(right.model.config.num_hidden_layers):
        yield Difference(name, distance(right.seen[name], wrong.seen[name]))


def distance(right: Tensor, wrong: Tensor) -> float:
    """See `Difference.size`."""
    if right.shape != wrong.shape:
        return math.inf
    if torch.equal(right, wrong):
        return 0.0
    a, b = right.double(), wrong.double()
    same = a == b  # scores that both hide are -inf, and their difference would be NaN
    change = (b - a).masked_fill(same, 0)
    if not change.isfinite().all():
        return math.inf
    size = rms(a.masked_fill(a.isinf(), 0))
    return rms(change) / size if size else math.inf


def first_of(right: Run, wrong: Run) -> First | None:
    """The first point at which a bit differs; None if there is none."""
    for name in point_names(right.model.config.num_hidden_layers):
        x, y = right.seen[name][0], wrong.seen[name][0]
        if x.shape != y.shape or not torch.equal(x, y):
            return first_numbers(right, name, x, y)
    return None


def first_numbers(right: Run, name: str, x: Tensor, y: Tensor) -> First:
    """The first numbers of a point that differ, in the order of the tokens."""
    point = point_of(name)
    heads_first = point.shape.startswith("H T")
    if heads_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)  # [T, H, L]
    row, start = first_row(x, y)
    a, b = (tuple(z[row][start : start + NUMBERS].tolist()) for z in (x, y))
    shown = (*row[1:], row[0]) if heads_first else row
    at = ", ".join([*map(str, shown), f"{start}:{start + max(len(a), len(b))}"])
    return First(name, point.what, row[0], f"[{at}]", a, b, right_code(right, name))


def first_row(x: Tensor, y: Tensor) -> tuple[tuple[int, ...], int]:
    """Where the first number differs: the row's index, and the place in it. x, y [T, ..., n].

    Of two shapes, what both have is compared; if that is the same, the first row is it.
    """
    common = tuple(slice(min(a, b)) for a, b in zip(x.shape, y.shape))
    x, y = x[common], y[common]
    wrong = (x != y) & ~(x.isnan() & y.isnan())
    if not wrong.any():
        return (0,) * (x.dim() - 1), 0
    *row, start = wrong.nonzero()[0].tolist()
    return tuple(row), start


def right_code(right: Run, name: str) -> tuple[Code, ...]:
    """The right model's lines that compute a point."""
    point = name.removesuffix(".normalized")  # a norm before its weight is the same operation
    layer = int(point.split(".")[1]) if point.startswith("layers.") else None
    inner = point.split(".", 2)[2] if layer is not None else point
    for op in (BEFORE, *IN_LAYER, *AFTER):
        if op.point == inner:
            return code_of(right, op, layer)
    return ()


def places_of(right: Tensor, wrong: Tensor, it: Run, spell: Spell) -> Iterator[Place]:
    """What both say after each token. right, wrong: log probabilities [T, V]."""
    for position, (a, b) in enumerate(zip(right, wrong)):
        same = a == b
        yield Place(
            position=position,
            text=spell(it.ids[position]),
            right=likeliest(a, spell, 1)[0],
            wrong=likeliest(b, spell, 1)[0],
            same=bool(same.all()),
            change=float((b - a).masked_fill(same, 0).abs().max()),
        )


# ---- the mistake's own code ---------------------------------------------------------------------


def code_of_mistake(fault: Fault) -> tuple[tuple[Code, ...], tuple[str, ...]]:
    """The class or function that makes the mistake with what it calls beside it; what it is given.

    Given is, for example, "names = ('q_proj.bias',)" to a function that drops such tensors.
    """
    made: Any = fault.ops or fault.change or fault.rebuild or fault.report or fault.encode
    given: dict[str, Any] = {}
    if inspect.isfunction(made):
        given = dict(inspect.getclosurevars(made).nonlocals)
    functions = [value for value in given.values() if inspect.isfunction(value)]
    parts = [made, *filter(is_ours, functions)]
    parts += [helper for part in list(parts) for helper in helpers(part)]
    code = tuple(whole(part) for part in dict.fromkeys(parts))
    return code, tuple(f"{name} = {worded(value)}" for name, value in given.items())


def helpers(part: Any) -> list[Any]:
    """Functions and classes of its own file that a function, or a class's methods, refer to."""
    functions = [part] if inspect.isfunction(part) else list(vars(part).values())
    found = []
    for function in filter(inspect.isfunction, functions):
        named = inspect.getclosurevars(function).globals.values()
        found += [x for x in named if getattr(x, "__module__", "") == part.__module__]
    return [x for x in found if inspect.isfunction(x) or inspect.isclass(x)]


def is_ours(function: Callable[..., Any]) -> bool:
    return function.__module__.startswith("minqwen.")


def worded(value: Any) -> str:
    return str(value.__name__) if callable(value) else repr(value)
