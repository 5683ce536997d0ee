"""One check for each kind of value that a file or a caller can get wrong; each raises ConfigError in one line."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

from minqwen.errors import ConfigError


def config_error(text: str) -> ConfigError:
    """ConfigError of one line, whatever control characters a file or its name contains."""
    return ConfigError("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def wrong(where: str, found: Any, expected: str, remedy: str) -> ConfigError:
    """The one shape of every error here: where, what was found, what was expected, what to do; one line."""
    shown = repr(found)
    shown = shown if len(shown) <= 100 else shown[:97] + "..."
    return config_error(f"{where} is {shown}, expected {expected}; {remedy}")


def integer(where: str, value: Any, minimum: int, optional: bool = False) -> int | None:
    if optional and value is None:
        return None
    if (
        type(value) is not int or not minimum <= value < 2**63
    ):  # `type`, not isinstance: True is no size
        wanted = f"an integer of at least {minimum}" + (" or null" if optional else "")
        raise wrong(where, value, wanted, "correct it")
    return value


def number(
    where: str, value: Any, low: float = 0.0, high: float = math.inf, open_low: bool = True
) -> float:
    """A finite number in (low, high], or [low, high] when open_low is False; JSON integers are welcome."""
    if type(value) in (int, float) and abs(value) < 1e300:  # false for NaN and infinity too
        if (low < value or (not open_low and low == value)) and value <= high:
            return float(value)
    wanted = f"a finite number {'above' if open_low else 'of at least'} {low:g}"
    raise wrong(
        where, value, wanted + ("" if high == math.inf else f" and at most {high:g}"), "correct it"
    )


def boolean(where: str, value: Any) -> bool:
    if type(value) is not bool:
        raise wrong(where, value, "true or false", "correct it")
    return value


def token_ids(where: str, value: Any) -> tuple[int, ...]:
    """A token id, a list of them, or null, as a tuple without repeats."""
    values = () if value is None else value if isinstance(value, (list, tuple)) else (value,)
    for v in values:
        if type(v) is not int or v < 0:
            raise wrong(where, value, "a token id, a list of token ids, or null", "correct it")
    return tuple(dict.fromkeys(values))


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """ "; did you mean 'exact'?" where one of the choices is close to the word, else ""."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
