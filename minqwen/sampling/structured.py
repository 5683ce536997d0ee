"""Structured output: which tokens may come next, so that a text parses when it ends.

llguidance (the extra [json]) follows the grammar. Here are the checks of what a user asks for, made
when she asks, and the mask over the logits. The JSON grammar makes two promises. White space
between two marks is one space, or one line break and at most 16 spaces, so that a model cannot fill
its limit with blanks. And strings are spelled without \\uXXXX, so that a second spelling of a
property's name cannot get round the schema.
"""

from __future__ import annotations

import json as json_library
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from minqwen.checks import did_you_mean, wrong
from minqwen.errors import SamplingError
from minqwen.files import printable
from minqwen.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

# JSON Schema, draft 2020-12, as far as llguidance enforces it; then words that only describe.
KEYWORDS = frozenset(
    """type enum const anyOf allOf oneOf $ref $defs definitions
    properties patternProperties required additionalProperties minProperties maxProperties
    items prefixItems minItems maxItems minLength maxLength pattern format
    minimum maximum exclusiveMinimum exclusiveMaximum multipleOf
    $schema $id $comment title description default examples deprecated readOnly writeOnly""".split()
)


@dataclass(frozen=True)
class StructuredOutputs:
    """What the text must be: exactly one of the fields (vLLM's names). Raises SamplingError.

    json: a JSON schema, as a dict or a string. regex: the whole text matches it (no look-around).
    choice: one of these strings. grammar: in llguidance's Lark dialect. json_object: True for any
    JSON object.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @property
    def kind(self) -> str:
        """The name of the one field that is given."""
        given = [name for name, value in vars(self).items() if not _is_absent(value)]
        if len(given) != 1:
            raise SamplingError(
                f"structured_outputs has {' and '.join(given) or 'no field'}: "
                "expected exactly one of json, regex, choice, grammar, json_object"
            )
        return given[0]

    def __post_init__(self) -> None:
        kind = self.kind
        where, value = f"structured_outputs.{kind}", getattr(self, kind)
        object.__setattr__(self, kind, CHECKS[kind](where, value))


def _wrong(where: str, value: object, expected: str) -> Exception:
    return wrong(where, value, expected, error=SamplingError)


def _is_absent(value: object) -> bool:
    return value is None or value is False  # but not 0 or "", which are mistakes


def _true(where: str, value: Any) -> bool:
    if value is not True:
        raise _wrong(where, value, "True")
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(where, value, "a non-empty string")
    return value


def _choices(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise _wrong(where, value, "a list of non-empty strings")
    return tuple(_text(f"an item of {where}", item) for item in value)


# ---- JSON schemas -------------------------------------------------------------------------------


def _schema(where: str, value: Any) -> dict[str, Any]:
    """The schema as a dict, given as one or as JSON."""
    try:
        schema = json_library.loads(value) if isinstance(value, str) else value
        # This finds what is no JSON: NaN, a set, a lone surrogate, a dict that contains itself.
        json_library.dumps(schema, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise SamplingError(f"{where} is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise _wrong(where, schema, "a schema (an object)")
    _check_schema(schema, where)
    return schema


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
    _check_values(schema, where)
    _check_numbers(schema, where)
    for part_where, part in _parts(schema, where):
        _check_schema(part, part_where)


def _check_values(schema: dict[str, Any], where: str) -> None:
    """const and enum may not hold a character that JSON can only spell as \\uXXXX."""
    values = json_library.dumps([schema.get("const"), schema.get("enum")], ensure_ascii=False)
    if re.search(r"(?<!\\)(\\\\)*\\u|\x7f", values):
        text = f"{where}: const or enum holds a control character: not supported"
        raise SamplingError(printable(text))


def _check_numbers(schema: dict[str, Any], where: str) -> None:
    for word in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(schema.get(word), bool):  # as in draft 4
            raise _wrong(f"{where}.{word}", schema[word], "a number")
    step = schema.get("multipleOf", 1)
    if not isinstance(step, int) or isinstance(step, bool):
        raise _wrong(f"{where}.multipleOf", step, "an integer")
    _check_min_properties(schema, where)


def _check_min_properties(schema: dict[str, Any], where: str) -> None:
    """A name that the schema leaves open could come twice, and would be counted twice."""
    fewest, required = schema.get("minProperties", 0), schema.get("required")
    sure = len(required) if isinstance(required, list) else 0
    if isinstance(fewest, int) and fewest > max(1, sure):
        expected = "at most 1, or the number of required names (other names could repeat)"
        raise _wrong(f"{where}.minProperties", fewest, expected)


def _parts(schema: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """The schemas inside a schema, with the place of each."""
    for word in ("properties", "patternProperties", "$defs", "definitions"):
        yield from _named_parts(f"{where}.{word}", schema.get(word, {}))
    for word in ("anyOf", "allOf", "oneOf", "prefixItems"):
        yield from _listed_parts(f"{where}.{word}", schema.get(word, []))
    for word in ("items", "additionalProperties"):
        yield f"{where}.{word}", schema.get(word, True)


def _named_parts(where: str, parts: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(parts, dict):
        raise _wrong(where, parts, "an object of schemas")
    for name, part in parts.items():
        yield f"{where}.{name}", part


def _listed_parts(where: str, parts: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(parts, list):
        raise _wrong(where, parts, "a list of schemas")
    for i, part in enumerate(parts):
        yield f"{where}[{i}]", part


# What each field of StructuredOutputs must be: it is replaced by what its check returns.
CHECKS: dict[str, Callable[[str, Any], object]] = {
    "json": _schema,
    "regex": _text,
    "choice": _choices,
    "grammar": _text,
    "json_object": _true,
}


# ---- grammars -----------------------------------------------------------------------------------


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int):
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self.encode(text, allow_special=False, add_special_tokens=False)


class ConstraintCompiler:
    """Makes constraints for one tokenizer and model.

    Make one and keep it: at 150,000 tokens that takes some seconds. vocab_size: the logits' width.
    Raises SamplingError if llguidance is not installed, or if no token ends a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        try:
            import llguidance
        except ImportError:
            raise SamplingError(
                'structured_outputs needs llguidance: pip install "minqwen[json]"'
            ) from None
        if not eos_token_ids:
            raise SamplingError(
                "structured_outputs needs an end token: set eos_token_id in config.json"
            )
        self.vocab_size, self.eos_token_ids = vocab_size, tuple(eos_token_ids)
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, self.eos_token_ids[0]))
        self.tokenizer = llguidance.LLTokenizer(wrapper, eos_token=list(self.eos_token_ids))
        self.matcher_class = llguidance.LLMatcher

    def constraint(self, spec: StructuredOutputs, stop_token_ids: Sequence[int] = ()) -> Constraint:
        """A constraint at the beginning of a text. Raises SamplingError if the grammar is bad."""
        grammar = self._grammar(spec)
        is_wrong, messages = self.matcher_class.validate_grammar_with_warnings(
            grammar, self.tokenizer
        )
        matcher = self.matcher_class(self.tokenizer, grammar, log_level=0)
        if is_wrong or matcher.is_error():
            why = " ".join((messages[0] if is_wrong else matcher.get_error()).split())
            kind = "json" if spec.json_object else spec.kind
            raise SamplingError(f"structured_outputs.{kind}: {why[:300]}")
        end_ids = (*self.eos_token_ids, *stop_token_ids)
        return Constraint(matcher, self.tokenizer.vocab_size, self.vocab_size, end_ids)

    def _grammar(self, spec: StructuredOutputs) -> str:
        """In llguidance's own language."""
        make = self.matcher_class
        if spec.regex is not None:
            return make.grammar_from_regex(spec.regex)
        if spec.choice is not None:
            strings = " | ".join(map(json_library.dumps, spec.choice))
            return make.grammar_from_lark(f"start: {strings}")
        if spec.grammar is not None:
            return make.grammar_from_lark(spec.grammar)
        return make.grammar_from_json_schema(
            {"type": "object"} if spec.json is None else spec.json,
            overrides={
                "whitespace_flexible": True,
                "whitespace_pattern": r"\x20|\x0A\x20{0,16}",
                "item_separator": ",",
                "key_separator": ":",
                "json_allowed_escapes": 'nrbtf\\"',
                "json_allow_general_unicode_escapes": False,
                "lenient": False,
                "coerce_one_of": False,
            },
        )


class Constraint:
    """Where one text stands in its grammar.

    num_tokens: how many tokens the tokenizer has. vocab_size: the logits' width. end_ids: the
    tokens that end a text; they are allowed where it is complete.
    """

    def __init__(
        self, matcher: LLMatcher, num_tokens: int, vocab_size: int, end_ids: Sequence[int]
    ):
        self.matcher, self.num_tokens, self.end_ids = matcher, num_tokens, sorted(set(end_ids))
        self.bits = np.zeros((num_tokens + 31) // 32, np.int32)
        self.vocab_size, self.ended = vocab_size, False

    @property
    def finished(self) -> bool:
        """The text is complete and nothing can follow: it ended, or the grammar has no more."""
        return self.ended or (self.matcher.is_stopped() and self.matcher.is_accepting())

    def mask(self) -> Tensor:
        """bool [V] on the CPU, True where a token may come next."""
        allowed = np.zeros(self.vocab_size, bool)
        if not self.ended and not self.matcher.is_stopped():
            self.matcher.unsafe_compute_mask_ptr(self.bits.ctypes.data, self.bits.nbytes)
            bits = np.unpackbits(self.bits.view(np.uint8), count=self.num_tokens, bitorder="little")
            allowed[: self.num_tokens] = bits.view(bool)
        allowed[self.end_ids] = self.matcher.is_accepting()
        return torch.from_numpy(allowed)

    def accept(self, token: int) -> None:
        """Go on past a token. Raises SamplingError for one that the mask does not allow."""
        ends = token in self.end_ids
        if ends and self.matcher.is_accepting():
            self.ended = True
        elif ends or self.ended or not self.matcher.consume_token(token):
            raise SamplingError(f"token {token} does not fit structured_outputs{self._reason()}")

    def _reason(self) -> str:
        """llguidance's reason for refusing a token, in one line, if it gives one."""
        why = " ".join(self.matcher.get_error().split())[:200]
        return f": {why}" if why else ""
