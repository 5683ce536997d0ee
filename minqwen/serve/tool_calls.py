"""Tools: what the chat template gets of them, and calls in Qwen's format in the text that comes.

Qwen2.5 writes a call as

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

and its chat template says so to the model, and writes earlier calls in this way.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minqwen.errors import MinqwenError
from minqwen.sampling.json_schema import for_grammar, read_schema
from minqwen.sampling.structured import StructuredOutputs
from minqwen.serve.errors import ApiError
from minqwen.serve.requests import ChatRequest, NamedTool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# The start of a call up to its arguments, if they come last, as Qwen writes them.
NAME_FIRST = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class CallPiece:
    """What is new of a call. The first piece of a call has its id and its name."""

    index: int
    arguments: str  # JSON, or a part of it
    id: str | None = None
    name: str | None = None

    def as_delta(self) -> dict[str, Any]:
        """As a chunk of a stream has it."""
        if self.id is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


Piece = str | CallPiece  # text that is no call, or a part of one


class CallParser:
    """Text in pieces, out come content and calls, each as soon as it is certain.

    What is joined does not depend on where the text was cut. What begins like a call and is none
    comes out as text.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._held = ""  # text of which it is not known yet what it is
        self._inside = False  # after OPEN
        self._arguments: _Arguments | None = None  # of the call whose name is told
        self._after_call = False
        self._gap = ""  # line breaks before OPEN

    def push(self, text: str, final: bool = False) -> list[Piece]:
        """What is certain now. final: no more text will come."""
        self._held += text
        pieces: list[Piece] = []
        while self._go_on(pieces):
            pass
        if final and self._arguments is None:
            self._show((self._gap + OPEN if self._inside else "") + self._held, pieces)
        return _joined(pieces)

    def _go_on(self, pieces: list[Piece]) -> bool:
        """Take one step through the text that is held; whether another one may follow."""
        if not self._inside:
            return self._outside(pieces)
        if self._arguments is None:
            return self._begin(pieces)
        return self._go_through(self._arguments, pieces)

    def _outside(self, pieces: list[Piece]) -> bool:
        at = self._held.find(OPEN)
        found = at >= 0
        end = at if found else len(self._held) - _overlap(self._held, OPEN)
        text = self._held[:end].rstrip("\n")  # a line break before a call is no content
        self._gap = self._held[len(text) : end]
        self._held = self._held[end + len(OPEN) if found else len(text) :]
        self._inside = found
        self._show(text, pieces)
        return found

    def _show(self, text: str, pieces: list[Piece]) -> None:
        """Text that is no call. White space after a call is no content either."""
        if self._after_call:
            text = text.lstrip()
        if text:
            pieces.append(text)
            self._after_call = False

    def _begin(self, pieces: list[Piece]) -> bool:
        """The call's name, once its arguments begin; or the whole call, where they come first."""
        start = NAME_FIRST.match(self._held)
        if start is not None:
            name = _text_of(start[1])
            if name is not None:
                pieces.append(self._new_call(name, ""))
                self._arguments = _Arguments()
                self._held = self._held[start.end() :]
                return True
        at = self._held.find(CLOSE)
        if at < 0:
            return False
        whole, self._held = self._held[:at], self._held[at + len(CLOSE) :]
        self._inside = False
        call = _whole_call(whole)
        if call is None:
            self._show(self._gap + OPEN + whole + CLOSE, pieces)
        else:
            pieces.append(self._new_call(*call))
            self._after_call = True
        return True

    def _go_through(self, arguments: _Arguments, pieces: list[Piece]) -> bool:
        """The rest of a call whose name is told: its arguments as they are written, then its end.

        What stands between the arguments and CLOSE is a brace.
        """
        if not arguments.ended:
            end = arguments.take(self._held)
            if end:
                pieces.append(CallPiece(self.calls - 1, self._held[:end]))
                self._held = self._held[end:]
            return arguments.ended
        at = self._held.find(CLOSE)
        if at < 0:
            return False
        self._held = self._held[at + len(CLOSE) :]
        self._inside, self._arguments, self._after_call = False, None, True
        return True

    def _new_call(self, name: str, arguments: str) -> CallPiece:
        self.calls += 1
        id = f"call_{secrets.token_hex(12)}"
        return CallPiece(self.calls - 1, arguments, id, name)


class _Arguments:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self.depth, self.in_string, self.escaped, self.ended = 0, False, False, False

    def take(self, text: str) -> int:
        """How many characters of the text belong to the object."""
        for i, character in enumerate(text):
            self._step(character)
            if self.ended:
                return i + 1
        return len(text)

    def _step(self, character: str) -> None:
        if self.in_string:
            if self.escaped:
                self.escaped = False
            elif character == "\\":
                self.escaped = True
            elif character == '"':
                self.in_string = False
        elif character == '"':
            self.in_string = True
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1
            self.ended = self.depth == 0


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of a text may be the beginning of the mark."""
    for count in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:count]):
            return count
    return 0


def _text_of(quoted: str) -> str | None:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return None


def _whole_call(text: str) -> tuple[str, str] | None:
    """The name and the arguments, as JSON, of a call; None for what is none."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours that are both text, or both of the same call, as one."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, str) and isinstance(last, str):
            joined[-1] = last + piece
        elif isinstance(piece, CallPiece) and isinstance(last, CallPiece) and piece.name is None:
            joined[-1] = CallPiece(last.index, last.arguments + piece.arguments, last.id, last.name)
        else:
            joined.append(piece)
    return joined


# ---- what the template gets ---------------------------------------------------------------------


def tools_for_template(body: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the model is told of: none where it may not call any."""
    if not body.tools or body.tool_choice == "none":
        return None
    return body.tools


def message_for_template(message: dict[str, Any]) -> dict[str, Any]:
    """A client's message as Qwen's chat templates read it.

    Parts of content become one text. The arguments of calls, which clients give as text, become
    objects. OpenAI's newer name of a system message is "developer".
    """
    found = dict(message)
    if found["role"] == "developer":
        found["role"] = "system"
    if isinstance(found.get("content"), list):
        found["content"] = "\n".join(part["text"] for part in found["content"])
    calls = found.get("tool_calls")
    if calls is not None:
        found["tool_calls"] = [_call_for_template(call) for call in calls]
        if not calls:
            del found["tool_calls"]
    return found


def _call_for_template(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function["arguments"], str):
        try:
            parsed = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise ApiError(400, "the arguments of a tool call are no JSON object", param="messages")
        function["arguments"] = parsed
    return {**call, "function": function}


# ---- a call that must come ----------------------------------------------------------------------


def forced_calls(body: ChatRequest) -> StructuredOutputs | None:
    """The grammar of a text that is one call, or several; None where the model may choose.

    Raises ApiError for a choice that names no tool, and for parameters that no grammar can follow.
    """
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return None
    tools = [tool["function"] for tool in body.tools or ()]
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool["name"] == choice.function.name]
    if not tools:
        what = "tools has no function of this name" if body.tools else "there are no tools"
        raise ApiError(400, f"tool_choice: {what}", param="tool_choice")
    several = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    one = " | ".join(f"call_{i}" for i in range(len(tools)))
    rules = [
        'start: call ("\\n" call)*' if several else "start: call",
        f'call: "{OPEN}\\n" ({one}) "\\n{CLOSE}"',
        *(f"call_{i}: %json {_schema_of_call(tool)}" for i, tool in enumerate(tools)),
    ]
    return StructuredOutputs(grammar="\n".join(rules))


def _schema_of_call(tool: dict[str, Any]) -> str:
    """The JSON schema of a call, in which the references of the parameters still lead home."""
    parameters = tool.get("parameters") or {"type": "object"}
    try:
        checked = for_grammar(read_schema(f"tools: {tool['name']}.parameters", parameters))
    except MinqwenError as error:
        raise ApiError(400, str(error), param="tools") from None
    arguments = {"type": "object", **_moved(checked)}
    schema = {
        "type": "object",
        "properties": {"name": {"const": tool["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
        "x-guidance": {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False},
    }
    return json.dumps(schema)


def _moved(schema: Any) -> Any:
    """A schema whose root is two levels deeper: "#/$defs/x" is "#/properties/arguments/$defs/x"."""
    if isinstance(schema, list):
        return [_moved(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {word: _moved(part) for word, part in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = f"#/properties/arguments{reference[1:]}"
    return moved
