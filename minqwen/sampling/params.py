"""What a request may ask for: every field is checked when the params are made, in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from minqwen.errors import SamplingError
from minqwen.generation_config import GenerationDefaults
from minqwen.sampling.structured import StructuredOutputs

INF = math.inf

# field: (integer?, lowest, highest, None allowed?, what the error says was expected)
NUMBERS = {
    "n": (True, 1, INF, False, "an integer >= 1"),
    "temperature": (False, 0, INF, False, "0 (greedy) or a number >= 1e-05"),
    "top_p": (False, 0, 1, False, "a number above 0, at most 1 (1: off)"),
    "top_k": (True, -1, INF, False, "an integer >= 1, or 0 or -1 (off)"),
    "min_p": (False, 0, 1, False, "a number from 0 (off) to 1"),
    "repetition_penalty": (False, 0, INF, False, "a number above 0 (1: off)"),
    "presence_penalty": (False, -2, 2, False, "a number from -2 to 2 (0: off)"),
    "frequency_penalty": (False, -2, 2, False, "a number from -2 to 2 (0: off)"),
    "seed": (True, 0, 2**64 - 1, True, "None or an integer from 0 to 2**64 - 1"),
    "max_tokens": (True, 1, INF, True, "None (the rest of the context) or an integer >= 1"),
    "min_tokens": (True, 0, INF, False, "an integer >= 0"),
    "logprobs": (True, -1, INF, True, "None, an integer >= 0, or -1 (all)"),
    "prompt_logprobs": (True, -1, INF, True, "None, an integer >= 0, or -1 (all)"),
}
ABOVE_LOWEST = ("top_p", "repetition_penalty")
TOKEN_IDS = "a sequence of token ids (integers >= 0)"


def _number(
    name: str, value: Any, integer: bool, low: float, high: float, expected: str
) -> int | float:
    kind = Integral if integer else Real
    if (
        isinstance(value, bool)
        or not isinstance(value, kind)
        or not (low <= value <= high and value != INF)
    ):
        raise SamplingError(f"{name} is {value!r}: expected {expected}")
    return int(value) if integer else float(value)


def _items(name: str, value: Any, expected: str) -> list:
    if value is None:
        return []
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise SamplingError(f"{name} is {value!r}: expected {expected}")
    return list(value)


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled: vLLM's fields, names and defaults. Raises SamplingError.

    top_k 0 or -1, top_p 1, min_p 0 and the neutral penalties switch a step off; temperature 0 is greedy.
    max_tokens None is the rest of the context. logprobs N asks for the chosen token and the N likeliest
    (-1: all). stop, stop_token_ids, bad_words and forced_ids become tuples. forced_ids (teacher forcing) are
    emitted in order and end the request: they set max_tokens to their number, and ignore_eos. What could
    leave a grammar no token, or end its text before it parses, cannot go with structured_outputs.
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
    stop: str | Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 256
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    forced_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (frozen)
        for name, (integer, low, high, optional, expected) in NUMBERS.items():
            value = getattr(self, name)
            if not (optional and value is None):
                put(name, _number(name, value, integer, low, high, expected))
                if (name in ABOVE_LOWEST and value == low) or (
                    name == "temperature" and 0 < value < 1e-5
                ):
                    raise SamplingError(f"{name} is {value!r}: expected {expected}")
        for name in ("include_stop_str_in_output", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingError(f"{name} is {getattr(self, name)!r}: expected True or False")
        if isinstance(self.stop, str):
            put("stop", (self.stop,))
        for name in ("stop", "bad_words"):
            put(name, tuple(_items(name, getattr(self, name), "strings")))
            for item in getattr(self, name):
                if not isinstance(item, str) or not (item if name == "stop" else item.strip()):
                    raise SamplingError(
                        f"{name} holds {item!r}: expected strings that are not empty"
                    )
        for name in ("stop_token_ids", "forced_ids"):
            if name == "stop_token_ids" or self.forced_ids is not None:
                items = _items(name, getattr(self, name), TOKEN_IDS)
                put(name, tuple(_number(name, i, True, 0, INF, TOKEN_IDS) for i in items))
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise SamplingError(
                    f"logit_bias is {self.logit_bias!r}: expected a dict of token id to bias"
                )
            put(
                "logit_bias",
                {
                    _number(
                        "logit_bias key", i, True, 0, INF, "a token id (an integer >= 0)"
                    ): _number(f"logit_bias[{i}]", b, False, -100, 100, "a number from -100 to 100")
                    for i, b in self.logit_bias.items()
                },
            )
        if not isinstance(self.structured_outputs, (StructuredOutputs, type(None))):
            raise SamplingError(
                f"structured_outputs is {self.structured_outputs!r}: "
                "expected None or StructuredOutputs(json=...), say"
            )
        if self.forced_ids is not None:
            if not self.forced_ids:
                raise SamplingError("forced_ids is empty: expected None or at least one token id")
            put("max_tokens", len(self.forced_ids))
            put("ignore_eos", True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(
                f"min_tokens is {self.min_tokens}: expected at most max_tokens, {self.max_tokens}"
            )
        for one, others in {
            "forced_ids": ("stop", "stop_token_ids", "structured_outputs"),
            "structured_outputs": ("min_tokens", "bad_words", "stop"),
        }.items():
            for other in others:
                if getattr(self, one) and getattr(self, other):
                    raise SamplingError(
                        f"{other} cannot be combined with {one}: leave one of the two out"
                    )

    @classmethod
    def from_defaults(cls, defaults: GenerationDefaults, **explicit: Any) -> SamplingParams:
        """The checkpoint's generation_config.json where the caller says nothing; every keyword given wins."""
        ours = {
            name: getattr(defaults, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        }
        if defaults.max_new_tokens is not None:
            ours["max_tokens"] = defaults.max_new_tokens
        return cls(**{**ours, **explicit})

    def check_ids(self, vocab_size: int) -> None:
        """SamplingError if a field names a token that the model, with vocab_size logits, does not have."""
        for name in ("stop_token_ids", "logit_bias", "forced_ids"):
            for i in getattr(self, name) or ():
                if i >= vocab_size:
                    raise SamplingError(
                        f"{name} names token {i}: expected ids from 0 to {vocab_size - 1}"
                    )
