"""Chats: where templates come from, which one is used, and what is handed to it.

continuation.py is for a last message that is not finished. chat_template.py renders the templates,
in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minqwen.checks import boolean, did_you_mean, wrong
from minqwen.errors import TokenizerError
from minqwen.files import quoted, read_text
from minqwen.tokenizer.continuation import with_reasoning

Message = dict[str, Any]
# The keywords of a chat, which are also names that its template reads.
KEYWORDS = (
    *("messages", "tools", "documents", "system", "chat_template", "chat_template_kwargs"),
    *("add_generation_prompt", "continue_final_message", "allow_special", "tokenize"),
)
# Keywords of transformers, with what does the same here.
INSTEAD = {
    "conversation": "messages is its name here",
    "sanitize_control_tokens": "encode_chat(..., allow_special=False) does this",
    **dict.fromkeys(
        ("return_tensors", "return_dict"), "encode_chat gives the token ids, as a list"
    ),
    "tokenize": "encode_chat gives the token ids",
}


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
    if not isinstance(wanted, (str, type(None))):
        raise wrong("chat_template", wanted, "a template or the name of one", error=TokenizerError)
    if wanted is None:
        has_tools = tools is not None and "tool_use" in templates
        wanted = "tool_use" if has_tools else "default"
    source = templates.get(wanted, wanted if "{" in wanted else "")
    if not source:
        raise TokenizerError(
            f"{where}: there is no chat template {wanted!r}, only {sorted(templates)}; "
            "pass chat_template or a finished prompt"
        )
    return source


def check_messages(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages to render: with `system` in front, and without keys whose value is None.

    Reasoning under an older name gets the names that templates read, as in transformers 5.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TokenizerError(
            "messages must be a list of at least one {'role': ..., 'content': ...}"
        )
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TokenizerError(
                f"messages[{n}] must be an object with a 'role' string, not {quoted(message, 80)}"
            )
    if system is not None:
        messages = [_system_message(system, messages), *messages]
    return [with_reasoning(_without_none(message)) for message in messages]


def _system_message(text: str, messages: Sequence[Message]) -> Message:
    if messages[0]["role"] == "system":
        raise TokenizerError(
            "messages[0] is a system message already; leave out the other system text"
        )
    return {"role": "system", "content": text}


def _without_none(message: Message) -> Message:
    return {key: value for key, value in message.items() if value is not None}


# ---- keywords -----------------------------------------------------------------------------------


def check_objects(where: str, value: Any) -> None:
    """TokenizerError unless it is a list of objects, or None: tools and documents are."""
    if value is None:
        return
    if not isinstance(value, (list, tuple)):
        raise wrong(where, value, "a list of objects, or None", error=TokenizerError)
    for n, item in enumerate(value):
        if not isinstance(item, dict):
            kind = "a JSON schema" if where == "tools" else "{'title': ..., 'text': ...}"
            raise wrong(f"{where}[{n}]", item, f"an object, {kind}", error=TokenizerError)


def check_variables(variables: Any) -> dict[str, Any]:
    """chat_template_kwargs: what a template reads besides the keywords of a chat."""
    if variables is None:
        return {}
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        expected = "a mapping from names to values"
        raise wrong("chat_template_kwargs", variables, expected, error=TokenizerError)
    for name in variables:
        if name in KEYWORDS:
            raise TokenizerError(
                f"chat_template_kwargs has {name!r}, which is a keyword of its own; "
                f"pass {name}=... beside it"
            )
    return dict(variables)


def generation_prompt(add: bool | None, continued: bool | str) -> bool:
    """Whether the prompt opens the assistant's next turn; None means: unless one is continued."""
    if not isinstance(continued, (bool, str)):
        expected = "true, false or the name of a message's field"
        raise wrong("continue_final_message", continued, expected, error=TokenizerError)
    if add is None:
        return not continued
    if boolean("add_generation_prompt", add, error=TokenizerError) and continued:
        raise TokenizerError(
            "add_generation_prompt begins a new message and continue_final_message goes on with "
            "the last one, expected not both; leave one out"
        )
    return add


def refuse_unknown(unknown: Iterable[str], also: Sequence[str] = ()) -> None:
    """TokenizerError for a keyword that nobody knows. also: names that may be meant, besides."""
    for name in unknown:
        hint = did_you_mean(name, [*KEYWORDS, *also]) or (
            f"; what a template reads goes into chat_template_kwargs={{{quoted(name)}: ...}}"
        )
        hint = f"; {INSTEAD[name]}" if name in INSTEAD else hint
        raise TokenizerError(f"a chat has no keyword {quoted(name)}{hint}")
