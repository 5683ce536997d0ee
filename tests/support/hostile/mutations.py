"""Small changes of files: of their bytes, and of the values in their JSON."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**62, 2**63, 10**30),
    *(1.5, -0.0, 1e-300, 1e39, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "8", "\x1b[2J\n", "x" * 5000, "\u202e", "\ud800", "..", "\0"),
    *([], {}, [1], ["x"], {"a": 1}, [[[]]], [None], {"": None}),
]
PIECES = [
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\0", b"\n", b"\x1b[2J", b"\xff", b"\xef"),
    *(b"\\ud800", b"\\u202e", b"1e999", b"NaN", b"-1", b"null", b"true", b"9" * 4400, b"[" * 200),
    *(b"{{", b"}}", b"{%", b"%}", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"x" * 5000, b"0", b"1e400"),
]


def mutated(data: bytes, r: random.Random, is_json: bool) -> bytes:
    """The bytes after one to three changes. JSON is changed as text in every second case."""
    if is_json and data.strip() != b"{}" and r.random() < 0.5:
        return mutated_json(data, r)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        data = mutated_bytes(data, r)
    return data


def mutated_bytes(data: bytes, r: random.Random) -> bytes:
    start = r.randrange(len(data) + 1)
    stop = min(len(data), start + r.choice((1, 1, 2, 4, 16, 100)))
    part = data[start:stop]
    kind = r.randrange(7)
    if kind == 0 and part:
        part = bytes([part[0] ^ 1 << r.randrange(8)]) + part[1:]
    elif kind == 1:
        part = b""
    elif kind == 2:
        part += part
    elif kind == 3:
        part = r.choice(PIECES) + part
    elif kind == 4:
        part = r.choice(PIECES)
    elif kind == 5:
        other = r.randrange(len(data) + 1)
        part = data[other : other + len(part)]
    elif r.random() < 0.2:
        return data[:start]
    return data[:start] + part + data[stop:]


def mutated_json(data: bytes, r: random.Random) -> bytes:
    """One value, one key or one pair of the JSON is another."""
    content = json.loads(data)
    boxes = list(_boxes(content))
    for _ in range(r.choice((1, 1, 2))):
        _change(r.choice(boxes), boxes, r)
    text = json.dumps(content, ensure_ascii=r.random() < 0.5)
    if r.random() < 0.05:  # a key twice
        text = text.replace("{", '{"a": 1, "a": 2, ', 1)
    return text.encode("utf-8", "surrogatepass")


def _boxes(value: Any) -> Any:
    """Every object and list that holds something."""
    if isinstance(value, dict | list):
        if value:
            yield value
        for each in list(value.values()) if isinstance(value, dict) else value:
            yield from _boxes(each)


def _change(box: Any, boxes: list[Any], r: random.Random) -> None:
    if not box:
        return
    key = r.choice(list(box)) if isinstance(box, dict) else r.randrange(len(box))
    kind = r.randrange(6)
    if kind == 0:
        del box[key]
    elif kind == 1 and isinstance(box, dict):
        box[r.choice(("", "x", key + "s", key[:-1], "\x1b[2J", "a" * 600))] = box.pop(key)
    elif kind == 2:
        box[key] = _near(box[key], r)
    elif kind == 3:
        other = r.choice(boxes)
        box[key] = copy.deepcopy(other) if len(str(other)) < 9000 else None
    else:
        box[key] = copy.deepcopy(r.choice(VALUES))


def _near(value: Any, r: random.Random) -> Any:
    """A value of the same kind that is a little different."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return r.choice((value + 1, value - 1, value * 2, -value, float(value), str(value)))
    if isinstance(value, str):
        place = r.randrange(len(value) + 1)
        letter = r.choice(("", "x", "\n", "\x1b", "\ud800", "\u202e", "0", "/"))
        return value[:place] + letter + value[place + r.randrange(2) :]
    if isinstance(value, list):
        return value + value[:1] if r.random() < 0.5 else value[::-1]
    return {"a": value}
