"""Chats: where templates come from, which one is used, and what messages look like.

chat_template.py renders the templates, in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minqwen.errors import TokenizerError
from minqwen.files import read_text

Message = dict[str, Any]


def read_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; the only one of a checkpoint is called "default".

    They are the *.jinja files of the directory if there are any, otherwise what its
    tokenizer_config.json (`config`) has: one template, or several with names.
    """
    files = {}
    if os.path.lexists(path / "chat_template.jinja"):
        files["default"] = path / "chat_template.jinja"
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        files[file.stem] = file
    if files:
        return {name: read_text(file, TokenizerError) for name, file in files.items()}
    templates = _templates_by_name(config.get("chat_template") or {})
    if templates is None:
        raise TokenizerError(
            f"{path / 'tokenizer_config.json'}: chat_template must be a string or a list of "
            "{'name': ..., 'template': ...}"
        )
    return templates


def _templates_by_name(found: Any) -> dict[str, str] | None:
    """{name: template} of a string, an object or a list of named ones; None for anything else."""
    if isinstance(found, str):
        return {"default": found}
    try:
        named = found if isinstance(found, dict) else {e["name"]: e["template"] for e in found}
    except (TypeError, KeyError):
        return None
    return named if all(isinstance(template, str) for template in named.values()) else None


def select_template(
    where: Path,
    templates: Mapping[str, str],
    wanted: str | None,
    tools: Sequence[Message] | None,
) -> str:
    """The Jinja source to render: that of the name `wanted`, or `wanted` itself if it is source.

    Without `wanted`, it is the template "tool_use" if there are tools and such a template, and
    "default" otherwise, as in transformers.
    """
    if wanted is None:
        has_tools = tools is not None and "tool_use" in templates
        wanted = "tool_use" if has_tools else "default"
    source = templates.get(wanted, wanted)
    if "{" not in source:
        raise TokenizerError(
            f"{where}: there is no chat template {wanted!r}, only {sorted(templates)}; "
            "pass chat_template or a finished prompt"
        )
    return source


def check_messages(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages to render: with `system` in front, and without keys whose value is None."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TokenizerError(
            "messages must be a list of at least one {'role': ..., 'content': ...}"
        )
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TokenizerError(
                f"messages[{n}] must be an object with a 'role' string, not {str(message)[:80]!r}"
            )
    if system is not None:
        messages = [_system_message(system, messages), *messages]
    return [_without_none(message) for message in messages]


def _system_message(text: str, messages: Sequence[Message]) -> Message:
    if messages[0]["role"] == "system":
        raise TokenizerError(
            "messages[0] is a system message already; leave out the other system text"
        )
    return {"role": "system", "content": text}


def _without_none(message: Message) -> Message:
    return {key: value for key, value in message.items() if value is not None}


def check_tools(tools: Any) -> None:
    """TokenizerError unless it is a list or None."""
    if not isinstance(tools, (list, tuple, type(None))):
        raise TokenizerError(f"tools must be a list of JSON schemas, not {type(tools).__name__}")
