"""The check of a finished text against its JSON schema, by jsonschema.

It is a net under the grammar, and it may not cost more than the text is worth: a regex of Python
can take years, and a schema can make jsonschema look at the same text again and again. So its work
is counted. Counts, unlike a clock, are the same on every rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from minqwen.errors import SamplingError, kind_and_words
from minqwen.files import printable
from minqwen.sampling.json_schema import CLASSES_AND_ESCAPES, ROOT, TOO_DEEP, at

FORMATS = ("date", "email", "ipv4", "ipv6", "uuid")  # that jsonschema checks by itself
MOST_KEYWORDS = 300_000  # looked at in one check: about two seconds
MOST_STEPS = 10**8  # of one regex in one string
QUANTIFIER = r"(?:[*+?]|\{\d*,\d*\})"
GROUP = re.compile(rf"\(([^()]*)\)({QUANTIFIER}|\{{\d+\}})?")  # one without a group inside
GROUP_PREFIX = re.compile(r"\(\?(?:P?<\w+>|[a-z-]*:)")
MATCHING = ("pattern", "patternProperties", "additionalProperties")  # keywords that use a regex

Keyword = Callable[[Any, Any, Any, Any], Iterator[Any] | None]


class Work:
    """How many keywords a check has looked at."""

    count = 0

    def add(self) -> None:
        self.count += 1
        if self.count > MOST_KEYWORDS:
            raise SamplingError(f"more than {MOST_KEYWORDS} keywords to look at")


def affordable(pattern: str, text: str) -> bool:
    """Whether Python surely finds out soon if a regex matches somewhere in a text.

    A regex with k quantifiers, none of them in a group that is repeated, takes no more than about
    len(text)^(k + 1) steps.
    """
    bare = GROUP_PREFIX.sub("(", CLASSES_AND_ESCAPES.sub("x", pattern))
    steps: int = max(len(text), 2) ** (len(re.findall(QUANTIFIER, bare)) + 1)
    return steps <= MOST_STEPS and not _repeats_choices(bare)


def _repeats_choices(bare: str) -> bool:
    """Whether a group is repeated that has quantifiers or alternatives: that can be exponential."""
    while group := GROUP.search(bare):
        inside, quantifier = group[1], group[2] or ""
        chooses = "|" in inside or re.search(QUANTIFIER, inside) is not None
        if chooses and quantifier not in ("", "?"):
            return True
        bare = bare[: group.start()] + ("|" if chooses else "x") + quantifier + bare[group.end() :]
    return False


def text_check(schema: dict[str, Any], checked: bool = False) -> Callable[[str], None]:
    """A function that raises SamplingError if a text does not fit the schema.

    Raises SamplingError itself if the schema is wrong, unless that was `checked` before, and
    ImportError without jsonschema. Nothing is fetched: a schema can refer to its own parts only.
    Where a regex could take too long, its keyword is left to the grammar.
    """
    import jsonschema
    from referencing import Registry

    validators = jsonschema.validators
    kind = validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        if not checked:
            kind.check_schema(schema)
    except RecursionError:
        raise SamplingError(TOO_DEEP.format(ROOT)) from None
    except jsonschema.SchemaError as error:
        where = at(ROOT, *error.absolute_path)
        raise SamplingError(printable(f"{where}: {error.message}")[:300]) from None
    formats = jsonschema.FormatChecker(FORMATS)

    def check(text: str) -> None:
        keywords, work = kind.VALIDATORS.items(), Work()
        counted = {word: _counted(word, keyword, work) for word, keyword in keywords}
        validator = validators.extend(kind, counted)(
            schema, registry=Registry(), format_checker=formats
        )
        try:
            found = next(validator.iter_errors(json.loads(text)), None)
        except Exception as error:  # too deep, too many digits, too much work
            raise SamplingError(
                f"the finished text cannot be checked: {kind_and_words(error)}"
            ) from None
        if found is not None:
            text = f"the finished text does not fit its schema at {found.json_path}"
            raise SamplingError(printable(f"{text}: {found.message}")[:300])

    return check


def _counted(word: str, keyword: Keyword, work: Work) -> Keyword:
    """jsonschema's function for a keyword, counted, and left out where a regex costs too much."""

    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        work.add()
        if word not in MATCHING or _can_afford(word, value, instance, schema):
            yield from keyword(validator, value, instance, schema) or ()

    return counted


def _can_afford(word: str, value: Any, instance: Any, schema: Any) -> bool:
    patterns = [value] if word == "pattern" else schema.get("patternProperties", {})
    texts = [instance] if isinstance(instance, str) else instance
    if not isinstance(texts, (list, dict)):
        return True  # neither keyword looks at it
    return all(
        affordable(pattern, text) for pattern in patterns for text in texts if isinstance(text, str)
    )
