"""What a request may ask for: every field is checked when the params are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minqwen.checks import did_you_mean, is_finite, is_integer, wrong
from minqwen.errors import SamplingError
from minqwen.generation_config import GenerationDefaults
from minqwen.sampling.structured import StructuredOutputs

INF = math.inf
LOWEST_TEMPERATURE = 1e-5  # below it float32 logits would overflow; 0 is greedy


@dataclass(frozen=True)
class Numbers:
    """The numbers that a field may hold: finite, from low to high, both included."""

    expected: str  # what the error says
    low: float
    high: float = INF
    integer: bool = False
    optional: bool = False  # None is allowed too
    above_low: bool = False  # low itself is not allowed

    def check(self, name: str, value: Any) -> int | float | None:
        """The value as Python's own int or float. Raises SamplingError."""
        if value is None and self.optional:
            return None
        if not (is_integer(value) if self.integer else is_finite(value)):
            raise _wrong(name, value, self.expected)
        number = int(value) if self.integer else float(value)
        if not self._contains(number):
            raise _wrong(name, value, self.expected)
        return number

    def _contains(self, number: int | float) -> bool:
        if self.above_low and number == self.low:
            return False
        return self.low <= number <= self.high


NUMBERS = {
    "n": Numbers("an integer >= 1", 1, integer=True),
    "temperature": Numbers("0 (greedy) or a number >= 1e-05", 0),
    "top_p": Numbers("a number above 0, at most 1 (1: off)", 0, 1, above_low=True),
    "top_k": Numbers("an integer >= 1, or 0 or -1 (off)", -1, integer=True),
    "min_p": Numbers("a number from 0 (off) to 1", 0, 1),
    "repetition_penalty": Numbers("a number above 0 (1: off)", 0, above_low=True),
    "presence_penalty": Numbers("a number from -2 to 2 (0: off)", -2, 2),
    "frequency_penalty": Numbers("a number from -2 to 2 (0: off)", -2, 2),
    "seed": Numbers("None or an integer from 0 to 2**64 - 1", 0, 2**64 - 1, True, True),
    "max_tokens": Numbers("None (the rest of the context) or an integer >= 1", 1, INF, True, True),
    "min_tokens": Numbers("an integer >= 0", 0, integer=True),
    "logprobs": Numbers("None, an integer >= 0, or -1 (all)", -1, INF, True, True),
    "prompt_logprobs": Numbers("None, an integer >= 0, or -1 (all)", -1, INF, True, True),
}
BIAS = Numbers("a number from -100 to 100", -100, 100)
TOKEN_ID, TOKEN_IDS = "a token id (an integer >= 0)", "a sequence of token ids (integers >= 0)"
NOT_TOGETHER = {
    "forced_ids": ("stop", "stop_token_ids", "structured_outputs"),
    "structured_outputs": ("min_tokens", "bad_words", "stop"),
}


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled: vLLM's fields, names and defaults. Raises SamplingError.

    top_k 0 or -1, top_p 1, min_p 0 and the neutral penalties switch a step off; temperature 0 is
    greedy. max_tokens None is the rest of the context. logprobs N asks for the chosen token and the
    N likeliest (-1: all). stop, stop_token_ids, bad_words and forced_ids become tuples; None stands
    for no items. forced_ids (teacher forcing) are emitted in order and end the request: they set
    max_tokens to their number, and ignore_eos. What could leave a grammar without a token, or end
    its text before it parses, cannot go with structured_outputs.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 256
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] = ()
    structured_outputs: StructuredOutputs | None = None
    forced_ids: Sequence[int] | None = None

    def __new__(cls, *args: Any, **fields: Any) -> SamplingParams:
        """Refuses a name that is no field before the dataclass's __init__ raises a TypeError."""
        for name in fields:
            if name not in cls.__dataclass_fields__:
                known = ", ".join(cls.__dataclass_fields__)
                hint = did_you_mean(name, cls.__dataclass_fields__) or f": expected one of {known}"
                raise SamplingError(f"SamplingParams has no field {name!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, allowed in NUMBERS.items():
            self._set(name, allowed.check(name, getattr(self, name)))
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise _wrong("temperature", self.temperature, NUMBERS["temperature"].expected)
        for name in ("include_stop_str_in_output", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        self._set(
            "stop", _strings("stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        )
        self._set("bad_words", _strings("bad_words", self.bad_words))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.logit_bias is not None:
            self._set("logit_bias", _biases(self.logit_bias))
        if not isinstance(self.structured_outputs, (StructuredOutputs, type(None))):
            expected = "None or StructuredOutputs, for example StructuredOutputs(json=...)"
            raise _wrong("structured_outputs", self.structured_outputs, expected)
        if self.forced_ids is not None:
            self._set("forced_ids", _token_ids("forced_ids", self.forced_ids))
            self._end_with_forced_ids(self.forced_ids)
        self._check_together()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # a frozen dataclass refuses self.name = value

    def _end_with_forced_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise SamplingError("forced_ids is empty: expected None or at least one token id")
        self._set("max_tokens", len(ids))
        self._set("ignore_eos", True)

    def _check_together(self) -> None:
        """Refuses fields that contradict each other."""
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(
                f"min_tokens is {self.min_tokens}: expected at most max_tokens, {self.max_tokens}"
            )
        for one, others in NOT_TOGETHER.items():
            for other in others:
                if getattr(self, one) and getattr(self, other):
                    raise SamplingError(
                        f"{other} cannot be combined with {one}: leave one of the two out"
                    )

    @classmethod
    def from_defaults(cls, defaults: GenerationDefaults, **explicit: Any) -> SamplingParams:
        """The checkpoint's generation_config.json, except for the fields given here."""
        ours = {
            name: getattr(defaults, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        }
        if defaults.max_new_tokens is not None:
            ours["max_tokens"] = defaults.max_new_tokens
        return cls(**{**ours, **explicit})

    def check_ids(self, vocab_size: int) -> None:
        """Raises SamplingError if a field names a token beyond the model's vocab_size logits."""
        for name in ("stop_token_ids", "logit_bias", "forced_ids"):
            for i in getattr(self, name) or ():
                if i >= vocab_size:
                    raise SamplingError(
                        f"{name} names token {i}: expected ids from 0 to {vocab_size - 1}"
                    )


def _wrong(name: str, value: object, expected: str) -> Exception:
    return wrong(name, value, expected, error=SamplingError)


def _items(name: str, value: Any, expected: str) -> list[Any]:
    """The items of a list, a tuple, a tensor or an array; none for None."""
    if value is None:
        return []
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise _wrong(name, value, expected)
    return list(value)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    """Strings that are not empty; those of bad_words hold more than blanks."""
    items = _items(name, value, "strings that are not empty")
    for item in items:
        if not isinstance(item, str) or not (item.strip() if name == "bad_words" else item):
            raise _wrong(f"an item of {name}", item, "a string that is not empty")
    return tuple(items)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    items = _items(name, value, TOKEN_IDS)
    for item in items:
        if not is_integer(item) or item < 0:
            raise _wrong(f"an item of {name}", item, TOKEN_ID)
    return tuple(int(item) for item in items)


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _wrong("logit_bias", value, "a dict of token id to bias")
    for i in value:
        if not is_integer(i) or i < 0:
            raise _wrong("a key of logit_bias", i, TOKEN_ID)
    return {int(i): float(BIAS.check(f"logit_bias[{i}]", b) or 0) for i, b in value.items()}
