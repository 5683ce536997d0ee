"""JSON schemas: what the grammar can follow of them.

llguidance turns a schema into a grammar. What it cannot follow is refused here, by name, when the
schema is given: keywords that it does not know, numbers that it rounds, patterns that leave a
grammar without a next token. What it follows wrongly is rewritten where another spelling says the
same: see `for_grammar`. text_check.py checks a finished text against the schema as it was given.
"""

from __future__ import annotations

import json as json_library
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from minqwen.checks import did_you_mean, wrong
from minqwen.errors import SamplingError
from minqwen.files import printable

# JSON Schema, draft 2020-12, as far as llguidance enforces it; then words that only describe.
KEYWORDS = frozenset(
    """type enum const anyOf allOf oneOf $ref $defs definitions
    properties patternProperties required additionalProperties minProperties maxProperties
    items prefixItems minItems maxItems minLength maxLength pattern format
    minimum maximum exclusiveMinimum exclusiveMaximum multipleOf
    $schema $id $comment title description default examples deprecated readOnly writeOnly""".split()
)
ONE_BY_ONE = ("anyOf", "allOf", "oneOf", "prefixItems")  # lists of schemas
BY_NAME = ("properties", "patternProperties", "$defs", "definitions")  # objects of schemas
SINGLE = ("items", "additionalProperties")  # one schema
# llguidance writes integers of 64 bits, and adds 1 to an exclusive bound: a double holds the sum up
# to 2^53. It reads m * 10^e exactly if m and 10^|e| are doubles; others may be off by one rounding.
LARGEST = {"exclusiveMinimum": 2**53, "exclusiveMaximum": 2**53, "minimum": 2**63, "maximum": 2**63}
LARGEST_EXPONENT = 22
DIGITS = 15  # that any double holds
ROOT = "structured_outputs.json#"
LETTERS = r"\p{L}\p{M}\p{N}\p{Pc}"  # no fewer than Python's \w
CLASSES_AND_ESCAPES = re.compile(
    r"\\.|\[(\^?)(\]?(?:\\.|[^\]\\])*)\]", re.DOTALL
)  # an escape, or a class
ESCAPES = re.compile(r"\\.|\[", re.DOTALL)
OUTSIDE = {r"\W": rf"[^{LETTERS}\x00]", r"\D": r"[^\p{Nd}\x00]"}
IN_CLASS = {**OUTSIDE, "[": r"\["}
IN_NEGATED = {r"\w": LETTERS, r"\d": r"\p{Nd}", "[": r"\["}
DEL = re.compile(r"\x7f|\\x7f|\\u007f", re.IGNORECASE)
POSSESSIVE = re.compile(r"[*+?}]\+")
MOST_SCHEMAS = 10_000  # of so many jsonschema's check takes about three seconds
MOST_LEVELS = 100  # of lists and objects inside each other; llguidance reads 128
TOO_DEEP = f"{{}} is nested too deeply: give it at most {MOST_LEVELS} levels"


def read_schema(where: str, value: Any) -> dict[str, Any]:
    """A schema as a dict, given as one or as JSON. Raises SamplingError."""
    try:
        schema = json_library.loads(value) if isinstance(value, str) else value
        # This finds what is no JSON: NaN, a set, a lone surrogate, a dict that contains itself.
        json_library.dumps(schema, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise SamplingError(TOO_DEEP.format(where)) from None
    except (TypeError, ValueError) as error:
        raise SamplingError(f"{where} is not JSON: {error}") from None
    if nesting(schema) > MOST_LEVELS:
        raise SamplingError(TOO_DEEP.format(where))
    if not isinstance(schema, dict):
        raise _wrong(where, schema, "a schema (an object)")
    try:
        _check_schema(schema, f"{where}#")
        _check_references(schema, f"{where}#")
    except RecursionError:
        raise SamplingError(TOO_DEEP.format(where)) from None
    return schema


def nesting(value: Any) -> int:
    """How many lists and objects are inside each other at most."""
    levels, inside = 0, [value]
    while inside := [item for item in inside if isinstance(item, (dict, list, tuple))]:
        levels += 1
        inside = [
            item for held in inside for item in (held.values() if isinstance(held, dict) else held)
        ]
        if levels > MOST_LEVELS:
            break
    return levels


def _wrong(where: str, value: object, expected: str) -> Exception:
    return wrong(where, value, expected, error=SamplingError)


# ---- what the grammar would not enforce ---------------------------------------------------------
# `where` is the place as a JSON pointer: "structured_outputs.json#/properties/age/minimum".


def at(where: str, *keys: object) -> str:
    """The place below `where` that these keys lead to."""
    spelled = (str(key).replace("~", "~0").replace("/", "~1") for key in keys)
    return "/".join([where, *spelled])


def _check_schema(schema: Any, where: str) -> None:
    """Refuses, by name, what the grammar would not enforce."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise _wrong(where, schema, "a schema (an object, true or false)")
    for word in schema:
        if word not in KEYWORDS:
            hint = did_you_mean(str(word), KEYWORDS)
            text = f"{where}: keyword {word!r} is not supported: leave it out{hint}"
            raise SamplingError(printable(text))
    _check_names(schema, where)
    _check_values(schema, where)
    _check_bounds(schema, where)
    _check_min_properties(schema, where)
    _check_patterns(schema, where)
    for part_where, part in parts(schema, where):
        _check_schema(part, part_where)


def _check_names(schema: dict[str, Any], where: str) -> None:
    """Lists of names hold texts: jsonschema compares other values each with each, to find two that
    are the same."""
    for word in ("type", "required"):
        names = schema.get(word)
        if isinstance(names, list) and not all(isinstance(name, str) for name in names):
            raise _wrong(at(where, word), names, "a list of texts")


def _check_values(schema: dict[str, Any], where: str) -> None:
    """What const and enum may hold: no character that JSON can only spell as \\uXXXX, and no
    number that a double or 64 bits would change."""
    for word in ("const", "enum"):
        text = json_library.dumps(schema.get(word), ensure_ascii=False)
        if re.search(r"(?<!\\)(\\\\)*\\u|\x7f", text):
            text = f"{at(where, word)}: holds a control character: not supported"
            raise SamplingError(printable(text))
        for number in _numbers(schema.get(word)):
            if not _is_held(number, 2**63):
                raise _wrong(f"a number in {at(where, word)}", number, _held_by(2**63))


def _numbers(value: Any) -> Iterator[float]:
    """All the numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _is_held(number: float, limit: int) -> bool:
    """Whether llguidance can hold a number: it is below the limit, and exactly what it reads."""
    if abs(number) >= limit or float(number) != number:
        return False
    if isinstance(number, int):
        return True
    _, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    significand = int("".join(map(str, digits)))
    return significand <= 2**53 and abs(int(exponent)) <= LARGEST_EXPONENT


def _held_by(limit: int) -> str:
    return f"a number of at most {DIGITS} digits, below 2**{limit.bit_length() - 1} in size"


def _check_bounds(schema: dict[str, Any], where: str) -> None:
    for word, limit in LARGEST.items():
        bound = schema.get(word, 0)
        if isinstance(bound, bool) or not isinstance(bound, (int, float)):  # draft 4: true
            raise _wrong(at(where, word), bound, "a number")
        if not _is_held(bound, limit):
            raise _wrong(at(where, word), bound, _held_by(limit))
    step = schema.get("multipleOf", 1)
    if not isinstance(step, int) or isinstance(step, bool):
        raise _wrong(at(where, "multipleOf"), step, "an integer")


def _check_min_properties(schema: dict[str, Any], where: str) -> None:
    """A name that the schema leaves open could come twice, and would be counted twice."""
    fewest, required = schema.get("minProperties", 0), schema.get("required")
    sure = len(required) if isinstance(required, list) else 0
    if isinstance(fewest, int) and fewest > max(1, sure):
        expected = "at most 1, or the number of required names (other names could repeat)"
        raise _wrong(at(where, "minProperties"), fewest, expected)


def _check_patterns(schema: dict[str, Any], where: str) -> None:
    """Refuses what is no regex, and what llguidance reads otherwise than Python.

    It writes no DEL, but leaves it out of a pattern. A possessive quantifier, which JSON Schema has
    not, repeats a repetition.
    """
    patterns = {at(where, "pattern"): schema.get("pattern", "")}
    for name in _named(at(where, "patternProperties"), schema.get("patternProperties", {})):
        patterns[at(where, "patternProperties", name)] = name
    for pattern_where, pattern in patterns.items():
        what = ""
        if not isinstance(pattern, str):
            raise _wrong(pattern_where, pattern, "a regex (a text)")
        if DEL.search(pattern):
            what = "DEL, which cannot be written"
        elif POSSESSIVE.search(CLASSES_AND_ESCAPES.sub("x", pattern)):
            what = "a possessive quantifier, which JSON Schema has not"
        if what:
            raise SamplingError(printable(f"{pattern_where}: holds {what}: leave it out"))


def parts(schema: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """The schemas inside a schema, with the place of each."""
    for word in BY_NAME:
        yield from _named_parts(at(where, word), schema.get(word, {}))
    for word in ONE_BY_ONE:
        yield from _listed_parts(at(where, word), schema.get(word, []))
    for word in SINGLE:
        yield at(where, word), schema.get(word, True)


def _named(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object of schemas")
    return value


def _named_parts(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    for name, part in _named(where, value).items():
        yield at(where, name), part


def _listed_parts(where: str, listed: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(listed, list):
        raise _wrong(where, listed, "a list of schemas")
    for i, part in enumerate(listed):
        yield at(where, i), part


def every_part(schema: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schema and all schemas inside it, with the place of each; true and false left out."""
    if isinstance(schema, dict):
        yield where, schema
        for part_where, part in parts(schema, where):
            yield from every_part(part, part_where)


# ---- references that lead nowhere ---------------------------------------------------------------


def _check_references(schema: dict[str, Any], root: str) -> None:
    """Refuses a $ref that comes back to itself before anything is written: nothing fits it."""
    places = dict(every_part(schema, root))
    if len(places) > MOST_SCHEMAS:
        raise SamplingError(f"{root} holds more than {MOST_SCHEMAS} schemas: give it fewer")
    done: set[str] = set()
    for place in places:
        _follow(place, places, root, [], done)


def _follow(
    place: str, places: dict[str, dict[str, Any]], root: str, path: list[str], done: set[str]
) -> None:
    if place in path:
        raise SamplingError(printable(f"{place}: its $ref leads back to itself: no text fits"))
    if place in done or place not in places:
        return
    for further in _same_text(places[place], place, root):
        _follow(further, places, root, [*path, place], done)
    done.add(place)


def _same_text(schema: dict[str, Any], where: str, root: str) -> Iterator[str]:
    """The places of the schemas that say something of the same text."""
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        yield root + reference[1:]
    for word in ("anyOf", "allOf", "oneOf"):
        yield from (place for place, _ in _listed_parts(at(where, word), schema.get(word, [])))


# ---- for the grammar ----------------------------------------------------------------------------


def for_grammar(schema: Any) -> Any:
    """The schema as llguidance shall have it. It writes a little less then, and nothing wrong.

    Of a number above 1 and at most 1.5 llguidance 1.9 accepts 1, and in the same way -1 of one
    below -1. Instead of "above 1" the grammar gets "at least 1.00000000000001", and instead of
    "above 0" "at least 1e-22". Patterns become what `narrowed` makes of them.
    """
    if not isinstance(schema, dict):
        return schema
    new = {word: _part_for_grammar(word, value) for word, value in schema.items()}
    above, below = new.get("exclusiveMinimum"), new.get("exclusiveMaximum")
    if above is not None and above >= 0 and above == int(above):
        del new["exclusiveMinimum"]
        new["minimum"] = max(new.get("minimum", 0), _next_above(int(above)))
    if below is not None and below <= 0 and below == int(below):
        del new["exclusiveMaximum"]
        new["maximum"] = min(new.get("maximum", 0), -_next_above(-int(below)))
    return new


def _part_for_grammar(word: str, value: Any) -> Any:
    if word == "pattern":
        return narrowed(value)
    if word == "patternProperties":
        return {narrowed(pattern): for_grammar(part) for pattern, part in value.items()}
    if word in BY_NAME:
        return {name: for_grammar(part) for name, part in value.items()}
    if word in ONE_BY_ONE:
        return [for_grammar(part) for part in value]
    return for_grammar(value) if word in SINGLE else value


def narrowed(pattern: str) -> str:
    """A regex that llguidance and Python's re read alike, or that matches a little less.

    In JSON Schema, and for llguidance, \\w and \\d are ASCII; in Python, and for jsonschema, they
    are not. So \\W, \\D, [^\\w] and [^\\d] match no letter or digit beyond ASCII any more. And no
    class has the character 0, which nobody can write in JSON: one with all 32 control characters is
    for llguidance one with quote and backslash too. In a class, "[" stands for itself.
    """
    return CLASSES_AND_ESCAPES.sub(_narrowed_piece, pattern)


def _narrowed_piece(piece: re.Match[str]) -> str:
    if piece[0][0] == "\\":
        return OUTSIDE.get(piece[0], piece[0])
    sign, members = piece.groups()
    spelled = IN_NEGATED if sign else IN_CLASS
    members = ESCAPES.sub(lambda found: spelled.get(found[0], found[0]), members)
    return f"[[{sign}{members}]--\\x00]"


def _next_above(number: int) -> float:
    """The next number above an integer >= 0 that llguidance reads exactly."""
    if number == 0:
        return 10.0**-LARGEST_EXPONENT
    step = Decimal(10) ** -max(DIGITS - len(str(number)), 0)
    return float(number + step)
