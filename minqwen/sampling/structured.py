"""Structured output: which tokens may come next, so that a text parses when it ends.

llguidance (the extra [json]) follows the grammar; here are what may be asked, checked when it is asked, and
the mask over the logits. Two promises shape the JSON grammar. White space between two marks is one space, or
one line break and at most 16 spaces, so a model cannot fill its limit with blanks. And strings are spelled
without \\uXXXX, so that a second spelling of a property's name cannot slip past the schema.
"""

from __future__ import annotations

import json as json_library
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minqwen.errors import SamplingError

JSON_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"\x20|\x0A\x20{0,16}",
    "item_separator": ",",
    "key_separator": ":",
    "json_allowed_escapes": 'nrbtf\\"',
    "json_allow_general_unicode_escapes": False,
    "lenient": False,
    "coerce_one_of": False,
}
# JSON Schema, draft 2020-12, as far as llguidance enforces it; then words that only describe.
KEYWORDS = set(
    """type enum const anyOf allOf oneOf $ref $defs definitions
    properties patternProperties required additionalProperties minProperties maxProperties
    items prefixItems minItems maxItems minLength maxLength pattern format
    minimum maximum exclusiveMinimum exclusiveMaximum multipleOf
    $schema $id $comment title description default examples deprecated readOnly writeOnly""".split()
)


@dataclass(frozen=True)
class StructuredOutputs:
    """What the text must be: exactly one of the fields (vLLM's names). Raises SamplingError.

    json: a JSON schema, as a dict or a string. regex: the whole text matches it (no look-around). choice: one
    of these strings. grammar: in llguidance's Lark dialect. json_object: True for any JSON object.
    """

    json: str | dict | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [
            name for name, value in vars(self).items() if value is not None and value is not False
        ]
        if len(given) != 1:
            raise SamplingError(
                f"structured_outputs has {' and '.join(given) or 'no field'}: "
                "expected exactly one of json, regex, choice, grammar, json_object"
            )
        name, value = given[0], getattr(self, given[0])
        if name == "json":
            if isinstance(value, str):
                try:
                    value = json_library.loads(value)
                except ValueError as error:
                    raise SamplingError(f"structured_outputs.json is not JSON: {error}") from None
            if not isinstance(value, dict):
                raise SamplingError(
                    f"structured_outputs.json is {value!r}: expected a schema (an object)"
                )
            try:  # a lone surrogate is no text, NaN no JSON
                json_library.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            except (TypeError, ValueError, RecursionError) as error:
                raise SamplingError(f"structured_outputs.json is not JSON: {error}") from None
            _check_schema(value, "structured_outputs.json")
            object.__setattr__(self, "json", value)
        elif name == "choice":
            strings = isinstance(value, (list, tuple)) and all(
                isinstance(c, str) and c for c in value
            )
            if not strings or not value:
                raise SamplingError(
                    f"structured_outputs.choice is {value!r}: expected non-empty strings"
                )
            object.__setattr__(self, "choice", tuple(value))
        elif not isinstance(value, bool if name == "json_object" else str) or not value:
            expected = "True" if name == "json_object" else "a non-empty string"
            raise SamplingError(f"structured_outputs.{name} is {value!r}: expected {expected}")


def _check_schema(schema: Any, at: str) -> None:
    """Refuses, by name, what the grammar would not enforce."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise SamplingError(f"{at} is {schema!r}: expected a schema (an object, true or false)")
    for word in schema:
        if word not in KEYWORDS:
            raise SamplingError(f"{at}: keyword {word!r} is not supported: leave it out")
    values = json_library.dumps([schema.get("const"), schema.get("enum")], ensure_ascii=False)
    if re.search(r"(?<!\\)(\\\\)*\\u|\x7f", values):  # no spelling but \uXXXX
        raise SamplingError(f"{at}: const or enum holds a control character: not supported")
    for word in ("exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
        value = schema.get(word, 1)
        if isinstance(value, bool) or (word == "multipleOf" and not isinstance(value, int)):
            expected = "an integer" if word == "multipleOf" else "a number"
            raise SamplingError(f"{at}.{word} is {value!r}: expected {expected}")
    fewest = schema.get("minProperties", 0)
    if isinstance(fewest, int) and fewest > max(1, len(schema.get("required", ()))):
        raise SamplingError(
            f"{at}.minProperties is {fewest}: expected at most 1, or the number of required "
            "names (names that the schema leaves open could repeat)"
        )
    for word in ("properties", "patternProperties", "$defs", "definitions"):
        if not isinstance(schema.get(word, {}), dict):
            raise SamplingError(f"{at}.{word} is {schema[word]!r}: expected an object of schemas")
        for name, part in schema.get(word, {}).items():
            _check_schema(part, f"{at}.{word}.{name}")
    for word in ("anyOf", "allOf", "oneOf", "prefixItems"):
        if not isinstance(schema.get(word, []), list):
            raise SamplingError(f"{at}.{word} is {schema[word]!r}: expected a list of schemas")
        for i, part in enumerate(schema.get(word, [])):
            _check_schema(part, f"{at}.{word}[{i}]")
    for word in ("items", "additionalProperties"):
        _check_schema(schema.get(word, True), f"{at}.{word}")


class ConstraintCompiler:
    """Makes constraints for one tokenizer and model. At 150,000 tokens it takes some seconds to make: once.

    vocab_size: the logits' width. Raises SamplingError when llguidance is not installed.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]):
        try:
            import llguidance
        except ImportError:
            raise SamplingError(
                'structured_outputs needs llguidance: pip install "minqwen[json]"'
            ) from None
        self.vocab_size, self.eos_token_ids = vocab_size, tuple(eos_token_ids)
        if not self.eos_token_ids:
            raise SamplingError(
                "structured_outputs needs an end token: set eos_token_id in config.json"
            )

        class Vocabulary:
            eos_token_id, bos_token_id = self.eos_token_ids[0], None
            tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
            special_token_ids = sorted(tokenizer.special_ids)

            def __call__(self, text: str) -> list[int]:
                return tokenizer.encode(text, allow_special=False, add_special_tokens=False)

        wrapper = llguidance.TokenizerWrapper(Vocabulary())
        self.tokenizer = llguidance.LLTokenizer(wrapper, eos_token=list(self.eos_token_ids))
        self.matcher_class = llguidance.LLMatcher

    def constraint(self, spec: StructuredOutputs, stop_token_ids: Sequence[int] = ()) -> Constraint:
        """A constraint at the beginning of a text. Raises SamplingError for a grammar that is no good."""
        make = self.matcher_class
        if spec.json is not None or spec.json_object:
            schema = {"type": "object"} if spec.json is None else spec.json
            kind, grammar = "json", make.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
        elif spec.regex is not None:
            kind, grammar = "regex", make.grammar_from_regex(spec.regex)
        elif spec.choice is not None:
            strings = " | ".join(map(json_library.dumps, spec.choice))
            kind, grammar = "choice", make.grammar_from_lark(f"start: {strings}")
        else:
            kind, grammar = "grammar", make.grammar_from_lark(spec.grammar)
        wrong, messages = make.validate_grammar_with_warnings(grammar, self.tokenizer)
        matcher = make(self.tokenizer, grammar, log_level=0)
        if wrong or matcher.is_error():
            why = " ".join((messages[0] if wrong else matcher.get_error()).split())
            raise SamplingError(f"structured_outputs.{kind}: {why[:300]}")
        end_ids = (*self.eos_token_ids, *stop_token_ids)
        return Constraint(matcher, self.tokenizer.vocab_size, self.vocab_size, end_ids)


class Constraint:
    """Where one text stands in its grammar. end_ids: tokens that end it, allowed where it is complete."""

    def __init__(self, matcher: Any, num_tokens: int, vocab_size: int, end_ids: Sequence[int]):
        self.matcher, self.num_tokens, self.end_ids = matcher, num_tokens, sorted(set(end_ids))
        self.bits = np.zeros((num_tokens + 31) // 32, np.int32)
        self.vocab_size, self.ended = vocab_size, False

    @property
    def finished(self) -> bool:
        """The text is complete and nothing can follow: it ended, or the grammar has no more."""
        return self.ended or (self.matcher.is_stopped() and self.matcher.is_accepting())

    def mask(self) -> Tensor:
        """bool [V] on the CPU, True where a token may come next."""
        out = np.zeros(self.vocab_size, bool)
        if not self.ended and not self.matcher.is_stopped():
            self.matcher.unsafe_compute_mask_ptr(self.bits.ctypes.data, self.bits.nbytes)
            bits = np.unpackbits(self.bits.view(np.uint8), count=self.num_tokens, bitorder="little")
            out[: self.num_tokens] = bits.view(bool)
        out[self.end_ids] = self.matcher.is_accepting()
        return torch.from_numpy(out)

    def accept(self, token: int) -> None:
        """Go on past a token. SamplingError for one that the mask does not allow."""
        if token in self.end_ids and self.matcher.is_accepting():
            self.ended = True
        elif self.ended or token in self.end_ids or not self.matcher.consume_token(token):
            why = " ".join(self.matcher.get_error().split())[:200]
            raise SamplingError(
                f"token {token} does not fit structured_outputs{': ' + why if why else ''}"
            )
