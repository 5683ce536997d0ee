"""Added tokens: the strings, such as <|im_end|>, that are matched in a text before anything else.

A chat template writes them, and a user may type the same characters. Where the user is not trusted,
her strings are marked before the template is rendered: every added token in them stands between the
characters OPEN and CLOSE, and is then encoded as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Unicode's noncharacters, which are in no text.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


def finder(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern, with one group, that finds added tokens and the marks around them.

    It finds the leftmost one, and the longest of those that begin at the same place.
    """
    longest_first = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    any_token = longest_first or "(?!)"  # a pattern that matches nothing
    return re.compile(f"({OPEN}?(?:{any_token}){CLOSE}?)")


def without_marks(text: str) -> str:
    """The text as its author wrote it."""
    return text.replace(OPEN, "").replace(CLOSE, "")


def mark(value: Any, find: re.Pattern[str]) -> Any:
    """The JSON value with OPEN and CLOSE around every added token in its strings."""
    if isinstance(value, str):
        return find.sub(lambda match: OPEN + match[0] + CLOSE, without_marks(value))
    if isinstance(value, dict):
        return {mark(key, find): mark(item, find) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mark(item, find) for item in value]
    return value


def encode_between(
    text: str,
    find: re.Pattern[str],
    added: Mapping[str, int],
    encode_plain: Callable[[str], list[int]],
) -> list[int]:
    """Ids of a text that may hold marks.

    An added token becomes its id, unless a mark touches it: then it stays text. All the text
    between two ids is encoded in one piece, without its marks.
    """
    ids: list[int] = []
    pending = ""
    # re.split with one group gives text, token, text, token, ..., text.
    for n, piece in enumerate(find.split(text)):
        is_token = n % 2 == 1
        if is_token and piece[0] != OPEN and piece[-1] != CLOSE:
            ids += [*encode_plain(pending), added[piece]]
            pending = ""
        else:
            pending += without_marks(piece)
    return ids + encode_plain(pending)
