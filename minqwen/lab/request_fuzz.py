"""Bodies of requests that nobody should send, made from sound ones, and what a server says of them.

Every body follows from its number alone. `Outcome.wrong` is what no client may ever get: an answer
of 5xx that is not meant, an error without OpenAI's shape, an exception, or none at all in time.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Asgi = Callable[[Any, Any, Any], Awaitable[None]]

SECONDS = 120.0  # without an answer: it hangs
MEANT = (503,)  # the server ends, or no step was free in time
MUTATIONS = (1, 1, 1, 1, 2, 4)  # of one body: most of what has several is refused for the first
# A chat template that shows the tools, which the embedded model's does not.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}<|im_start|>"
    "{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AROUND = ("temperature", "max_tokens", "n", "seed", "stop", "logprobs", "stream", "logit_bias")
SAMPLED: dict[str, Any] = {
    "max_tokens": 3,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.01,
    "seed": 1,
    "n": 1,
    "stop": ["x", "\n"],
    "stop_token_ids": [5],
    "logit_bias": {"7": 1.5},
    "bad_words": ["bad"],
    "min_tokens": 1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "prompt_logprobs": 1,
    "stream": False,
    "user": "u",
    "cache_salt": "s",
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0}, "b": {"enum": ["x", "y"]}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
USER = {"role": "user", "content": "hi"}
SOUND: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "In the", **SAMPLED, "logprobs": 2, "echo": True}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 2, "stream": True}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "[0-9]{2}"}}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["yes", "no"]}}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"grammar": 'start: "a" | "b"'}}),
    ("/v1/chat/completions", {"messages": [USER], **SAMPLED, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"messages": [USER], "max_tokens": 4, "tools": [TOOL]}),
    (
        "/v1/chat/completions",
        {"messages": [USER], "max_tokens": 4, "tools": [TOOL], "tool_choice": "required"},
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [USER],
            "max_tokens": 4,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA},
            },
        },
    ),
    ("/v1/chat/completions", {"messages": [USER], "stream": True, "max_tokens": 3}),
    ("/tokenize", {"prompt": "In the beginning", "return_token_strs": True}),
    ("/tokenize", {"messages": [USER], "add_generation_prompt": True}),
    ("/detokenize", {"tokens": [1, 2, 3], "return_token_bytes": True}),
]
NUMBERS: list[Any] = [
    *(0, -1, 1, 2, 1.5, -0.0, 1e39, -1e39, 5e-324, 2**31, 2**53, 2**62, 2**63, 2**64, -(2**63)),
    *(10**400, 10**4000, math.nan, math.inf, -math.inf, 2047, 2048, 99999),
]
TEXTS: list[Any] = [
    *(
        "",
        "1",
        "x",
        "\ud800",
        "\x00",
        "\x1b[2J\n",
        "\u202e",
        "<|im_end|>",
        "</tool_call>",
        "#/$defs",
    ),
    *(
        "x" * 5000,
        "a " * 3000,
        "(a{1000}){1000}",
        "(a+)+$",
        "[",
        "\\",
        "start: start",
        "\U0001f600",
    ),
]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [None], {"": 0}, [1] * 3000, ["x"] * 3000]


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"items": value}
    return value


def odd_value(r: random.Random) -> Any:
    if r.random() < 0.02:
        return nested(r.choice([50, 120, 400]))
    return copy.deepcopy(r.choice(r.choice([NUMBERS, TEXTS, OTHERS])))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every dict and list inside a value, with each of its keys or places."""
    if isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))[:50]
        for key in keys:
            yield value, key
            yield from places(value[key])


def mutate(body: dict[str, Any], r: random.Random) -> None:
    """Change one thing somewhere in a body."""
    holder, key = r.choice(list(places(body)) or [(body, "prompt")])
    kind = r.randrange(6)
    if kind == 0 and isinstance(holder, dict):
        holder.pop(key, None)
    elif kind == 1:
        body[r.choice([*SAMPLED, *AROUND, "tools", "tool_choice", "echo", "x"])] = odd_value(r)
    elif kind == 2:
        holder[key] = [holder.get(key)] if isinstance(holder, dict) else [holder[key]]
    elif kind == 3 and isinstance(holder, dict):
        holder[odd_key(r)] = odd_value(r)
    elif kind == 4 and isinstance(holder, list):
        holder.extend(holder[: r.choice([1, 50])])
    else:
        holder[key] = odd_value(r)


def odd_key(r: random.Random) -> str:
    words = [
        "$ref",
        "pattern",
        "minItems",
        "maxItems",
        "anyOf",
        "allOf",
        "type",
        "-1",
        "2048",
        "1.5",
    ]
    return str(r.choice([*words, *TEXTS[:9]]))


def damaged(data: bytes, r: random.Random) -> bytes:
    """The text of a body with some bytes changed, left out, doubled or cut."""
    changed = bytearray(data)
    for _ in range(r.randint(1, 3)):
        at = r.randrange(len(changed) or 1)
        kind = r.randrange(4)
        if kind == 0:
            changed[at : at + 1] = bytes([r.randrange(256)])
        elif kind == 1:
            del changed[at : at + r.randint(1, 5)]
        elif kind == 2:
            changed[at:at] = changed[at : at + 20]
        else:
            del changed[at + r.randrange(40) :]
    return bytes(changed)


def request(number: int) -> tuple[str, bytes]:
    """The address and the body of request `number`."""
    r = random.Random(number)
    path, sound = r.choice(SOUND)
    if r.random() < 0.03:
        path = r.choice(SOUND)[0]
    body = copy.deepcopy(sound)
    for _ in range(r.choice(MUTATIONS)):
        mutate(body, r)
    data = json.dumps(body).encode()
    return path, damaged(data, r) if r.random() < 0.15 else data


# ---- asking -------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of some requests: how often each status, and by number what was wrong, and how many
    seconds a refusal took."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: dict[int, str] = field(default_factory=dict)
    refused: dict[int, float] = field(default_factory=dict)

    def add(self, other: Outcome) -> None:
        """Count what came of other requests, too."""
        self.statuses += other.statuses
        self.wrong |= other.wrong
        self.refused |= other.refused


async def ask(app: Asgi, path: str, data: bytes) -> tuple[int, bytes]:
    """Send a body to an application in this process, and read its whole answer."""
    sent = False
    status, answer = 0, b""

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # the client stays
        sent = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status, answer
        status = message.get("status", status)
        answer += message.get("body", b"")

    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
    }
    await app(scope, receive, send)
    return status, answer


def complaint(status: int, answer: bytes) -> str | None:
    """What is wrong with an answer; None for one that a client may get."""
    if status < 400:
        return None
    if status >= 500 and status not in MEANT:
        return f"{status}: {answer[:300]!r}"
    try:
        error = json.loads(answer)["error"]
        line = error["message"]
    except (ValueError, KeyError, TypeError):
        return f"{status} without an error: {answer[:300]!r}"
    if not line or not line.isprintable() or len(line) > 1000:
        return f"{status} with a line that is none: {line!r}"
    return None


async def fuzz(app: Asgi, numbers: range, at_once: int = 16) -> Outcome:
    """Send the requests of these numbers, so many at a time."""
    outcome, waiting = Outcome(), iter(numbers)

    async def client() -> None:
        for number in waiting:
            start = time.perf_counter()
            try:
                status, answer = await asyncio.wait_for(ask(app, *request(number)), SECONDS)
            except Exception as error:
                outcome.wrong[number] = f"{type(error).__name__}: {error}"
                continue
            outcome.statuses[status] += 1
            if 400 <= status < 500:
                outcome.refused[number] = time.perf_counter() - start
            found = complaint(status, answer)
            if found is not None:
                outcome.wrong[number] = found

    await asyncio.gather(*(client() for _ in range(at_once)))
    return outcome
