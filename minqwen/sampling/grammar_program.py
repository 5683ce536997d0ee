"""What the process does that compiles grammars first: `confined.py` runs this file.

llguidance compiles a grammar in a millisecond, or in an hour: some take gigabytes, and some end the
process that compiles them (20,000 rules that lead to each other overflow its stack). Here all that
does no harm. As in every such process, nothing of the package is there.

There are two questions. {"schema": a JSON schema}; the answer is {"wrong": null, or [path, message]
of what is wrong in it}. And {"begins": [[grammar, text], ...], "grammar": str, "size": width of the
logits, "special": {id: special token}, "ends": ids of the tokens that end a text}, all grammars in
llguidance's own language. The answer is {"begins": for each grammar there, whether one of its texts
begins like this (true for a bad one), "wrong": what is wrong with the other grammar, or null}.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

# Half of what a thread of the asker has: what would overflow there overflows here.
STACK_BYTES = 4 << 20
# What llguidance may spend, in its own units: about a tenth of a second in a step of the engine.
# Unlike seconds these are the same on every rank.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 50_000,
}
DEAD_END = "NoExtension"  # that nothing may follow is told when it comes to that
STEPS = 8  # along one text: some grammars have too many branches after their first character
DRAFTS = ("3", "4", "6", "7", "201909", "202012")


class Vocabulary:
    """A token for each byte, and the special tokens that a grammar may name, in their places.

    A grammar has the same states for any vocabulary, and those of a byte are soon made.
    """

    bos_token_id = None

    def __init__(self, size: int, special: dict[str, str], ends: list[int]):
        self.eos_token_id = ends[0]
        self.tokens = [b""] * size
        for name, text in special.items():
            self.tokens[int(name)] = text.encode("latin-1")
        self.special_token_ids = sorted({*map(int, special), *ends})
        taken = set(self.special_token_ids)
        free = [id for id in range(size) if id not in taken][:256]
        self.id_of = {bytes([byte]): id for byte, id in enumerate(free)}
        for token, id in self.id_of.items():
            self.tokens[id] = token

    def __call__(self, text: str) -> list[int]:
        return [self.id_of[bytes([b])] for b in text.encode() if bytes([b]) in self.id_of]


def prepare() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function that answers, with all imported and read that it may need."""
    import jsonschema
    import llguidance

    for draft in DRAFTS:  # each reads the draft's own schema from a file, once
        getattr(jsonschema, f"Draft{draft}Validator").check_schema({"type": "string"})
    plain = llguidance.LLTokenizer("byte")  # 256 tokens
    limits = llguidance.LLParserLimits(**LIMITS)
    matcher_class = llguidance.LLMatcher

    @functools.lru_cache(maxsize=4)
    def tokenizer(size: int, special: str, ends: tuple[int, ...]) -> llguidance.LLTokenizer:
        vocabulary = Vocabulary(size, json.loads(special), list(ends))
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary), eos_token=list(ends))

    def wrong_in(schema: Any) -> list[Any] | None:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            return [list(error.absolute_path), error.message[:500]]
        return None

    def can_begin(grammar: str, text: str) -> bool:
        matcher, ids = (
            matcher_class(plain, grammar, log_level=0, limits=limits),
            list(text.encode()),
        )
        return bool(matcher.is_error() or matcher.try_consume_tokens(ids) == len(ids))

    def why_not(grammar: str, tokens: llguidance.LLTokenizer) -> str | None:
        matcher = matcher_class(tokens, grammar, log_level=0, limits=limits)
        for _ in range(STEPS):
            bits = (
                0 if matcher.is_stopped() else int.from_bytes(matcher.compute_bitmask(), "little")
            )
            if bits and not matcher.is_stopped():  # the mask may have found that this is the end
                matcher.consume_token((bits & -bits).bit_length() - 1)  # the lowest that may come
        why = str(matcher.get_error())
        return None if not why or why.startswith(DEAD_END) else why

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        if "schema" in question:
            return {"wrong": wrong_in(question["schema"])}
        begins = [can_begin(grammar, text) for grammar, text in question["begins"]]
        special = json.dumps(question["special"])
        tokens = tokenizer(question["size"], special, tuple(question["ends"]))
        return {"begins": begins, "wrong": why_not(question["grammar"], tokens)}

    return answer
