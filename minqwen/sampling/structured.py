"""Structured output: which tokens may come next, so that a text parses when it ends.

llguidance (the extra [json]) follows the grammar. Here are the checks of what a user asks for, made
when she asks, and the mask over the logits. The JSON grammar makes two promises. White space
between two marks is one space, or one line break and at most 16 spaces, so that a model cannot fill
its limit with blanks. And strings are spelled without \\uXXXX, so that a second spelling of a
property's name cannot get round the schema.
"""

from __future__ import annotations

import json as json_library
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minqwen.checks import refuse_unknown_fields, wrong
from minqwen.errors import SamplingError, TokenizerError
from minqwen.files import printable
from minqwen.sampling.json_schema import ROOT, at, every_part, for_grammar, read_schema
from minqwen.sampling.text_check import text_check
from minqwen.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

_ONE_WAY = "there is only one way here, leave it out"
# Fields of vLLM's class, and what to do instead.
OF_OTHERS = {
    "backend": "llguidance is the only one, leave it out",
    "disable_fallback": _ONE_WAY,
    "disable_any_whitespace": _ONE_WAY,
    "whitespace_pattern": _ONE_WAY,
    "disable_additional_properties": "write additionalProperties into the schema",
    "structural_tag": "write it as a grammar",
}


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

    def __new__(cls, *args: Any, **fields: Any) -> StructuredOutputs:
        """Refuses a name that is no field before the dataclass's __init__ raises a TypeError."""
        refuse_unknown_fields(cls, fields, OF_OTHERS, SamplingError)
        return super().__new__(cls)

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
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _wrong(where, value, "a string without half of a surrogate pair")
    return value


def _choices(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise _wrong(where, value, "a list of non-empty strings")
    return tuple(_text(f"an item of {where}", item) for item in value)


# What each field of StructuredOutputs must be: it is replaced by what its check returns.
CHECKS: dict[str, Callable[[str, Any], object]] = {
    "json": read_schema,
    "regex": _text,
    "choice": _choices,
    "grammar": _text,
    "json_object": _true,
}


STRING_WORDS = ("pattern", "format", "minLength", "maxLength")

# ---- grammars -----------------------------------------------------------------------------------


class _Vocabulary:
    """A tokenizer as llguidance wants it: a token for each logit, without bytes where none is."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_id: int):
        self.eos_token_id = eos_token_id
        known = min(size, tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(i) for i in range(known)] + [b""] * (size - known)
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < size)
        self.encode = tokenizer.encode
        special = set(self.special_token_ids)
        self.id_of = {token: i for i, token in enumerate(self.tokens) if token and i not in special}
        self.longest = max(map(len, self.id_of), default=0)

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that the grammar forces. They have exactly its bytes.

        The tokenizer may refuse a text, or change it (to Unicode's form NFC, or by a space before
        it), or use tokens that the model lacks. Then they are the longest tokens instead.
        """
        data = text.encode()
        try:
            ids = self.encode(text, allow_special=False, add_special_tokens=False)
        except TokenizerError:
            return self._longest_tokens(data)
        known = all(i < len(self.tokens) for i in ids)
        if known and b"".join(self.tokens[i] for i in ids) == data:
            return ids
        return self._longest_tokens(data)

    def _longest_tokens(self, data: bytes) -> list[int]:
        """From the left, the longest token each time; ends where there is none."""
        ids, at = list[int](), 0
        while at < len(data):
            ends = range(min(len(data), at + self.longest), at, -1)
            end = next((end for end in ends if data[at:end] in self.id_of), None)
            if end is None:
                break
            ids.append(self.id_of[data[at:end]])
            at = end
        return ids


class ConstraintCompiler:
    """Makes constraints for one tokenizer and model.

    Make one and keep it: at 150,000 tokens that takes some seconds. vocab_size: the logits' width;
    the tokenizer may have fewer tokens, or more, which are then never written. Raises SamplingError
    if the extra [json] is not installed, or if the model has no token that ends a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        try:
            import jsonschema  # noqa: F401  (text_check.py needs it when a constraint is made)
            import llguidance
        except ImportError as error:
            raise SamplingError(
                f'structured_outputs needs {error.name}: pip install "minqwen[json]"'
            ) from None
        self.eos_token_ids = tuple(i for i in eos_token_ids if i < vocab_size)
        if not self.eos_token_ids:
            raise SamplingError(
                "structured_outputs needs an end token that the model can write: set eos_token_id "
                f"in config.json to an id below {vocab_size}"
            )
        self.vocab_size = vocab_size
        vocabulary = _Vocabulary(tokenizer, vocab_size, self.eos_token_ids[0])
        wrapper = llguidance.TokenizerWrapper(vocabulary)
        self.tokenizer = llguidance.LLTokenizer(wrapper, eos_token=list(self.eos_token_ids))
        self.bytes = llguidance.LLTokenizer("byte")  # 256 tokens, one for each byte
        self.matcher_class = llguidance.LLMatcher

    def constraint(self, spec: StructuredOutputs, stop_token_ids: Sequence[int] = ()) -> Constraint:
        """A constraint at the beginning of a text. Raises SamplingError if the grammar is bad."""
        check = self._check(spec)
        where = f"structured_outputs.{'json' if spec.json_object else spec.kind}"
        try:
            matcher, why = self._matcher(self._grammar(spec))
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # llguidance's; it is no Exception
                raise
            matcher, why = None, f"llguidance fails: {error}"
        if matcher is None:
            raise SamplingError(f"{where}: {' '.join(why.split())[:300]}")
        constraint = Constraint(
            matcher, self.vocab_size, (*self.eos_token_ids, *stop_token_ids), check
        )
        if not constraint.allowed().any():
            raise SamplingError(f"{where}: no text fits, not even its first token can be written")
        return constraint

    def _matcher(self, grammar: str) -> tuple[LLMatcher | None, str]:
        """A matcher at the beginning of a text, or None and why there is none."""
        is_wrong, messages = self.matcher_class.validate_grammar_with_warnings(
            grammar, self.tokenizer
        )
        if is_wrong:
            return None, messages[0]
        matcher = self.matcher_class(self.tokenizer, grammar, log_level=0)
        return (None, matcher.get_error()) if matcher.is_error() else (matcher, "")

    def _check(self, spec: StructuredOutputs) -> Callable[[str], None]:
        """What a finished text must pass. Raises SamplingError for a schema that is wrong."""
        if isinstance(spec.json, dict):
            check = text_check(spec.json)
            self._check_patterns(spec.json)
            return check
        return text_check({"type": "object"}) if spec.json_object else lambda text: None

    def _check_patterns(self, schema: dict[str, Any]) -> None:
        """Refuses patterns of which nothing can be written: where they come, no token is left.

        A string cannot hold a control character, and a name that is declared is not one of
        patternProperties'. That this happens with names of another part of the schema is possible,
        because parts are merged.
        """
        places = list(every_part(schema, ROOT))
        taken = dict.fromkeys((name for _, part in places for name in _names(part)), False)
        for where, part in places:
            if not self._has_string(part):
                raise SamplingError(printable(f"{at(where, 'pattern')}: no string fits it"))
            for pattern in part.get("patternProperties", {}):
                if not self._has_name(pattern, taken):
                    where = at(where, "patternProperties", pattern)
                    why = "no name is left for it, beside those that are declared: leave it out"
                    raise SamplingError(printable(f"{where}: {why}"))

    def _has_string(self, schema: dict[str, Any]) -> bool:
        """Whether a string can be written that has the schema's pattern, if it has one."""
        words = {word: schema[word] for word in STRING_WORDS if word in schema}
        return "pattern" not in words or self._can_begin({"type": "string", **words}, '"')

    def _has_name(self, pattern: str, taken: dict[str, bool]) -> bool:
        """Whether a name can be written that has the pattern; taken: {name: False}."""
        words = {"patternProperties": {pattern: True}, "additionalProperties": False}
        return self._can_begin({"type": "object", "properties": taken, **words}, '{"')

    def _can_begin(self, schema: dict[str, Any], text: str) -> bool:
        """Whether a text that fits the schema can begin like this; True for a bad schema."""
        matcher = self.matcher_class(self.bytes, self._json_grammar(schema), log_level=0)
        ids = list(text.encode())
        return matcher.is_error() or matcher.try_consume_tokens(ids) == len(ids)

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
        return self._json_grammar({"type": "object"} if spec.json is None else spec.json)

    def _json_grammar(self, schema: str | dict[str, Any]) -> str:
        return self.matcher_class.grammar_from_json_schema(
            for_grammar(schema),
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


def _names(schema: dict[str, Any]) -> Iterator[str]:
    """The names of properties that a schema spells out."""
    yield from schema.get("properties", {})
    yield from schema.get("required", [])
    for value in (schema.get("const"), *schema.get("enum", [])):
        yield from value if isinstance(value, dict) else ()


class Constraint:
    """Where one text stands in its grammar.

    vocab_size: the logits' width, for which the matcher was made. end_ids: the tokens that end a
    text; they are allowed where it is complete. check: raises SamplingError for a finished text
    that the grammar has let through by mistake.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        end_ids: Sequence[int],
        check: Callable[[str], None],
    ):
        self.matcher, self.end_ids, self.check = matcher, sorted(set(end_ids)), check
        self.bits = np.zeros((vocab_size + 31) // 32, np.int32)
        self.vocab_size, self.ended = vocab_size, False

    @property
    def finished(self) -> bool:
        """The text is complete and nothing can follow: it ended, or the grammar has no more."""
        return self.ended or (self.matcher.is_stopped() and self.matcher.is_accepting())

    def mask(self) -> Tensor:
        """bool [V] on the CPU, True where a token may come next. SamplingError if none may."""
        allowed = self.allowed()
        if not allowed.any():
            why = self._reason()
            raise SamplingError(f"structured_outputs is at a dead end: no token can follow{why}")
        return torch.from_numpy(allowed)

    def allowed(self) -> NDArray[np.bool_]:
        """The same for numpy, and without the error."""
        allowed = np.zeros(self.vocab_size, bool)
        if not self.ended and not self.matcher.is_stopped():
            self.matcher.unsafe_compute_mask_ptr(self.bits.ctypes.data, self.bits.nbytes)
            bits = np.unpackbits(self.bits.view(np.uint8), count=self.vocab_size, bitorder="little")
            allowed = bits.view(bool)
        allowed[self.end_ids] = self.matcher.is_accepting()
        return allowed

    def accept(self, token: int) -> None:
        """Go on past a token. Raises SamplingError for one that the mask does not allow."""
        ends = token in self.end_ids
        if ends and self.matcher.is_accepting():
            self.ended = True
        elif ends or self.ended or not self.matcher.consume_token(token):
            raise SamplingError(f"token {token} does not fit structured_outputs{self._reason()}")

    def _reason(self) -> str:
        """llguidance's reason for refusing a token, in one line, if it gives one."""
        why = " ".join(self.matcher.get_error().partition("<state>")[0].split())[:200]
        return f": {why}" if why else ""
