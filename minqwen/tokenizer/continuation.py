"""A chat whose last message is not finished: its prompt ends where that message ends.

The rules are those of transformers 5 (utils/chat_template_utils.py): a tag is put at the end of the
last message, the template is rendered, and the prompt is cut where the tag stands.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from minqwen.checks import wrong
from minqwen.errors import TokenizerError

# transformers' own: a template that changes it is refused there and here. The space at its end
# shows whether the template has stripped the message.
TAG = "CONTINUE_FINAL_MESSAGE_TAG "
# Names under which a message carries its reasoning; templates of today read the first.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning, if it has one, under both names that templates read."""
    given = [message[key] for key in REASONING_FIELDS if message.get(key) is not None]
    if not given:
        return message
    return {"thinking": given[0], **message, "reasoning_content": given[0]}


class Tagged(NamedTuple):
    """Messages of which the last one ends with TAG."""

    messages: list[dict[str, Any]]
    final_text: str  # what the last one said before

    def cut(self, rendered: str) -> str:
        """The rendered chat up to the end of the last message. TokenizerError if it is not in."""
        if self.final_text.strip() not in rendered or TAG.strip() not in rendered:
            raise TokenizerError(
                "continue_final_message: the template does not show the whole final message, so "
                "it cannot be continued; correct the message or the template"
            )
        end = rendered.rindex(TAG.strip())
        if rendered[end:].startswith(TAG):
            return rendered[:end]
        return rendered[:end].rstrip()  # the template strips messages


def tag_final_message(messages: list[dict[str, Any]], wanted: bool | str, template: str) -> Tagged:
    """The messages with TAG at the end of the last one's field `wanted`; True is "content"."""
    field = wanted if isinstance(wanted, str) else "content"
    last = dict(messages[-1])
    value = last.get(field)
    if value is None:
        raise TokenizerError(
            f"continue_final_message: the final message has no {field!r}, expected one of "
            f"{sorted(last)}; name another field"
        )
    fields = _copies_of(field, last)
    if not any(name in template for name in fields):
        raise TokenizerError(
            f"continue_final_message: the template does not read {field!r} of a message; "
            "name another field"
        )
    if isinstance(value, (list, tuple)):
        last[field], text = _tagged_blocks(field, value)
    else:
        text = _checked_text(field, value)
        last.update(dict.fromkeys(fields, text + TAG))
    return Tagged([*messages[:-1], last], text)


def _copies_of(field: str, message: dict[str, Any]) -> list[str]:
    """The field, or all the names under which `with_reasoning` has put the same reasoning."""
    if field not in REASONING_FIELDS:
        return [field]
    return [name for name in REASONING_FIELDS if message.get(name) == message[field]]


def _tagged_blocks(field: str, blocks: list[Any] | tuple[Any, ...]) -> tuple[list[Any], str]:
    """Content in blocks, [{"type": "text", "text": ...}, ...]: the last text is continued."""
    for n in reversed(range(len(blocks))):
        if isinstance(blocks[n], dict) and "text" in blocks[n]:
            text = _checked_text(f"{field}[{n}]['text']", blocks[n]["text"])
            return [*blocks[:n], {**blocks[n], "text": text + TAG}, *blocks[n + 1 :]], text
    raise TokenizerError(
        f"continue_final_message: the final message has no text in {field!r}, expected a block "
        "{'type': 'text', 'text': ...}; add one"
    )


def _checked_text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(f"{where} of the final message", value, "text", error=TokenizerError)
    return value
