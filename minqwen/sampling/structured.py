"""Structured output: which tokens may come next, so that a text parses when it ends.

llguidance (the extra [json]) follows the grammar. Here are the checks of what a user asks for, made
when she asks, and the mask over the logits. The JSON grammar makes two promises. White space
between two marks is one space, or one line break and at most 16 spaces, so that a model cannot fill
its limit with blanks. And strings are spelled without \\uXXXX, so that a second spelling of a
property's name cannot get round the schema.
"""

from __future__ import annotations

import contextlib
import hashlib
import json as json_library
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minqwen.checks import refuse_unknown_fields, wrong
from minqwen.confined import Confined, Gone
from minqwen.errors import SamplingError, TokenizerError
from minqwen.files import printable
from minqwen.sampling import grammar_program
from minqwen.sampling.json_schema import ROOT, at, every_part, for_grammar, read_schema
from minqwen.sampling.text_check import text_check
from minqwen.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

MOST_CHARACTERS = 1 << 18  # of a schema, a regex, a grammar, or all choices
MOST_PAIRS = 100_000  # of a pattern for names and a name that is declared
MOST_CHOICES = 1000  # llguidance follows 2,000 alternatives at most
SECONDS = 2.0  # of processor time that a grammar may take to be compiled
MOST_COMPILED = 1000  # grammars of which it is remembered that they can be compiled
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
    _check_size(where, len(value))
    return value


def _check_size(where: str, characters: int) -> None:
    if characters > MOST_CHARACTERS:
        raise SamplingError(
            f"{where} has {characters:,} characters: expected at most {MOST_CHARACTERS:,}"
        )


def _choices(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise _wrong(where, value, "a list of non-empty strings")
    if len(value) > MOST_CHOICES:
        raise SamplingError(
            f"{where} has {len(value):,} strings: expected at most {MOST_CHOICES:,}; "
            "a regex may have more alternatives"
        )
    _check_size(where, sum(len(item) for item in value if isinstance(item, str)))
    return tuple(_text(f"an item of {where}", item) for item in value)


def _schema(where: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        _check_size(where, len(value))
    schema = read_schema(where, value)
    _check_size(where, len(json_library.dumps(schema, ensure_ascii=False)))
    return schema


# What each field of StructuredOutputs must be: it is replaced by what its check returns.
CHECKS: dict[str, Callable[[str, Any], object]] = {
    "json": _schema,
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

    Every grammar is first compiled in a process of its own, where it can do no harm, and here only
    if that went well: see `check`. Make one compiler and keep it: at 150,000 tokens that takes some
    seconds. vocab_size: the logits' width;
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
        self.confined = Confined(grammar_program.__file__, "compiled")
        with contextlib.suppress(Gone):  # then `check` says why
            self.confined.start()  # it imports llguidance while the vocabulary is read here
        self.compiled: dict[bytes, None] = {}  # digests of grammars that were; the newest last
        vocabulary = _Vocabulary(tokenizer, vocab_size, self.eos_token_ids[0])
        wrapper = llguidance.TokenizerWrapper(vocabulary)
        self.tokenizer = llguidance.LLTokenizer(wrapper, eos_token=list(self.eos_token_ids))
        self.special = {
            i: vocabulary.tokens[i].decode("latin-1") for i in vocabulary.special_token_ids
        }
        self.matcher_class = llguidance.LLMatcher
        self.limits = llguidance.LLParserLimits(**grammar_program.LIMITS)

    def constraint(self, spec: StructuredOutputs, stop_token_ids: Sequence[int] = ()) -> Constraint:
        """A constraint at the beginning of a text. Raises SamplingError if the grammar is bad."""
        self.check(spec)
        where = _where(spec)
        try:
            matcher = self.matcher_class(
                self.tokenizer, self._grammar(spec), log_level=0, limits=self.limits
            )
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # llguidance's; it is no Exception
                raise
            raise SamplingError(f"{where}: llguidance fails: {_in_short(str(error))}") from None
        if matcher.is_error():
            raise SamplingError(f"{where}: {_in_short(matcher.get_error())}")
        constraint = Constraint(
            matcher, self.vocab_size, (*self.eos_token_ids, *stop_token_ids), _text_check(spec)
        )
        if not constraint.allowed().any():
            raise SamplingError(f"{where}: no text fits, not even its first token can be written")
        return constraint

    def check(self, spec: StructuredOutputs, seconds: float = SECONDS) -> None:
        """Have a grammar compiled where it can do no harm, once. Raises SamplingError.

        It may take so many seconds of processor time there, and a gigabyte. Any thread may ask.
        """
        value = json_library.dumps([spec.kind, getattr(spec, spec.kind)])
        digest = hashlib.sha256(value.encode()).digest()
        if digest in self.compiled:
            return
        where = _where(spec)
        if isinstance(spec.json, dict):
            self._check_schema(where, spec.json, seconds)
        self._check_grammar(where, spec, seconds)
        self.compiled[digest] = None
        for old in list(self.compiled)[:-MOST_COMPILED]:
            self.compiled.pop(old, None)

    def _check_schema(self, where: str, schema: dict[str, Any], seconds: float) -> None:
        """Raise SamplingError for what is no JSON schema."""
        wrong = self._ask(where, {"schema": schema}, seconds)["wrong"]
        if wrong is not None:
            path, message = wrong
            raise SamplingError(printable(f"{at(ROOT, *path)}: {message}")[:300])

    def _check_grammar(self, where: str, spec: StructuredOutputs, seconds: float) -> None:
        """Raise SamplingError for a grammar that cannot be compiled, or that nothing fits."""
        parts = list(self._patterns(spec.json)) if isinstance(spec.json, dict) else []
        try:
            question = {
                "begins": [[self._json_grammar(part), text] for part, text, _ in parts],
                "grammar": self._grammar(spec),
                "size": self.vocab_size,
                "special": self.special,
                "ends": self.eos_token_ids,
            }
        except ValueError as error:  # an integer beyond 64 bits, in a word that only describes
            raise SamplingError(f"{where}: {_in_short(str(error))}") from None
        answer = self._ask(where, question, seconds)
        for (_, _, why), can_begin in zip(parts, answer["begins"]):
            if not can_begin:
                raise SamplingError(printable(why))
        if answer["wrong"] is not None:
            raise SamplingError(f"{where}: {_in_short(answer['wrong'])}")

    def _ask(self, where: str, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        try:
            return self.confined.ask(question, seconds)
        except Gone as gone:
            raise SamplingError(f"{where} cannot be compiled: {gone}; make it simpler") from None

    def _patterns(self, schema: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
        """What must be possible for each of the schema's patterns, or it cannot be written.

        A schema, how a text that fits it must be able to begin, and what is said if it cannot. A
        string cannot hold a control character, and a name that is declared is not one of
        patternProperties'. Where such a pattern comes no token is left. That this happens with
        names of another part of the schema is possible, because parts are merged.
        """
        places = list(every_part(schema, ROOT))
        taken = dict.fromkeys((name for _, part in places for name in _names(part)), False)
        open_names = sum(len(part.get("patternProperties", {})) for _, part in places)
        if open_names * len(taken) > MOST_PAIRS:
            raise SamplingError(
                f"{ROOT} has {open_names} patternProperties beside {len(taken)} names: give fewer"
            )
        for where, part in places:
            words = {word: part[word] for word in STRING_WORDS if word in part}
            if "pattern" in words:
                why = f"{at(where, 'pattern')}: no string fits it"
                yield {"type": "string", **words}, '"', why
            for pattern in part.get("patternProperties", {}):
                why = "no name is left for it, beside those that are declared: leave it out"
                why = f"{at(where, 'patternProperties', pattern)}: {why}"
                names = {"patternProperties": {pattern: True}, "additionalProperties": False}
                yield {"type": "object", "properties": taken, **names}, '{"', why

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


def _where(spec: StructuredOutputs) -> str:
    return f"structured_outputs.{'json' if spec.json_object else spec.kind}"


def _in_short(why: str) -> str:
    """llguidance's reason in one line, without what follows of its own state."""
    return " ".join(why.partition("<state>")[0].split())[:300]


def _text_check(spec: StructuredOutputs) -> Callable[[str], None]:
    """What a finished text must pass. The schema itself has been checked."""
    if isinstance(spec.json, dict):
        return text_check(spec.json, checked=True)
    if spec.json_object:
        return text_check({"type": "object"}, checked=True)
    return lambda text: None


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
        why = _in_short(self.matcher.get_error())[:200]
        return f": {why}" if why else ""
