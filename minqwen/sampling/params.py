"""What a request may ask for: every field is checked when the params are made."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minqwen.checks import (
    boolean,
    is_finite,
    is_integer,
    number,
    refuse_unknown_fields,
    wrong,
)
from minqwen.config import GenerationDefaults
from minqwen.config.generation_config import LEAST_TEMPERATURE
from minqwen.errors import SamplingError, warn
from minqwen.files import quoted
from minqwen.sampling.structured import StructuredOutputs

MAX_SAMPLES = 16384  # vLLM's limit: a larger n would fill the memory before a step is made
NOT_TOGETHER = {
    "forced_ids": ("stop", "stop_token_ids", "structured_outputs"),
    "structured_outputs": ("min_tokens", "bad_words", "stop"),
}
NEED_TEXT = ("stop", "structured_outputs")  # what cannot be without detokenize

_NO_BEAMS = "there is no beam search; n draws several completions"
_STRUCTURED = "give structured_outputs=StructuredOutputs({}=...)"
# Fields of other engines, and what to do instead.
OF_OTHERS = {
    "best_of": "give n, and take those with the highest cumulative_logprob",
    "use_beam_search": _NO_BEAMS,
    "beam_width": _NO_BEAMS,
    "length_penalty": _NO_BEAMS,
    "early_stopping": _NO_BEAMS,
    "logits_processors": "use logit_bias, bad_words or structured_outputs",
    "allowed_token_ids": "use structured_outputs, or logit_bias",
    "truncate_prompt_tokens": "shorten the prompt's token ids",
    "output_kind": "LLM.stream gives a text piece by piece",
    "extra_args": "leave it out",
    "max_new_tokens": "use max_tokens",
    "do_sample": "use temperature; 0 is greedy",
    "num_return_sequences": "use n",
    "num_beams": _NO_BEAMS,
    "stop_strings": "use stop",
    "eos_token_id": "use stop_token_ids",
    **{
        f"guided_{kind}": _STRUCTURED.format(kind)
        for kind in ("json", "regex", "choice", "grammar", "json_object")
    },
}


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Raises SamplingError.

    Names and defaults are vLLM's, except that max_tokens is 256, not 16.
    top_k 0 or -1, top_p 1, min_p 0 and the neutral penalties switch a step off; temperature 0 is
    greedy. max_tokens None is the rest of the context, or of the checkpoint's max_length. logprobs
    N asks for the chosen token and the N likeliest (-1: all). stop, stop_token_ids, bad_words and
    forced_ids become tuples; None stands for no items. A stop string may name special tokens, which
    the text is shown without. forced_ids (teacher forcing) are emitted in
    order and end the request: they set max_tokens to their number, and ignore_eos. What could leave
    a grammar without a token, or end its text before it parses, cannot go with structured_outputs.
    skip_special_tokens False shows special tokens in the text; detokenize False leaves the text
    empty. spaces_between_special_tokens changes nothing: Qwen's special tokens have no spaces.
    guided_decoding is the older name of structured_outputs, and becomes it.
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
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    guided_decoding: StructuredOutputs | None = None

    def __new__(cls, *args: Any, **fields: Any) -> SamplingParams:
        """Refuses a name that is no field before the dataclass's __init__ raises a TypeError."""
        refuse_unknown_fields(cls, fields, OF_OTHERS, SamplingError)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            self._set(name, check(name, getattr(self, name)))
        if self.forced_ids is not None:
            self._set("max_tokens", len(self.forced_ids))
            self._set("ignore_eos", True)
        if self.guided_decoding is not None:
            self._take_guided_decoding()
        if not self.spaces_between_special_tokens:
            why = "spaces_between_special_tokens makes no difference here: there are no spaces"
            warn(why, stacklevel=3)
        self._check_together()

    def _take_guided_decoding(self) -> None:
        if self.structured_outputs is not None:
            raise SamplingError(
                "guided_decoding is the older name of structured_outputs: leave one of the two out"
            )
        self._set("structured_outputs", self.guided_decoding)
        self._set("guided_decoding", None)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # a frozen dataclass refuses self.name = value

    def _check_together(self) -> None:
        """Refuses fields that contradict each other."""
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(
                f"min_tokens is {quoted(self.min_tokens)}: "
                f"expected at most max_tokens, {quoted(self.max_tokens)}"
            )
        for name in NEED_TEXT:
            if getattr(self, name) and not self.detokenize:
                raise SamplingError(f"{name} needs the text: leave detokenize=False out")
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
        # The engine knows what max_length, prompt and output together, leaves for the output.
        if defaults.max_new_tokens is not None or defaults.max_length is not None:
            ours["max_tokens"] = defaults.max_new_tokens
        return cls(**{**ours, **explicit})

    @property
    def only_scores(self) -> bool:
        """Whether logprobs of given tokens are wanted, and at most one new token.

        The new token never goes through the model, so the prompt may fill the context.
        """
        given = self.prompt_logprobs is not None or self.forced_ids is not None
        return given and self.max_tokens == 1

    def check_ids(self, vocab_size: int) -> None:
        """Raises SamplingError if a field names a token beyond the model's vocab_size logits."""
        for name in ("stop_token_ids", "logit_bias", "forced_ids"):
            for i in getattr(self, name) or ():
                if i >= vocab_size:
                    raise SamplingError(
                        f"{name} names token {quoted(i)}: expected ids from 0 to {vocab_size - 1}"
                    )


def _signature() -> inspect.Signature:
    """What help() shall show: the fields, and not the arguments of __new__."""
    of_init = inspect.signature(SamplingParams.__init__, eval_str=True)
    fields = [parameter for name, parameter in of_init.parameters.items() if name != "self"]
    return inspect.Signature(fields)


# inspect looks for this attribute, of which the types of a class know nothing.
SamplingParams.__signature__ = _signature()  # type: ignore[attr-defined]


# ---- one check for each field -------------------------------------------------------------------
# Each takes a name for the error and a value, and returns what the field shall hold.


@dataclass(frozen=True)
class Numbers:
    """The numbers that a field may hold: finite, from low to high, both included."""

    expected: str  # what the error says
    low: float
    high: float = math.inf
    integer: bool = False
    optional: bool = False  # None is allowed too
    above_low: bool = False  # low itself is not allowed

    def check(self, name: str, value: Any) -> int | float | None:
        """The value as Python's own int or float."""
        if value is None and self.optional:
            return None
        if not (is_integer(value) if self.integer else is_finite(value)):
            raise _wrong(name, value, self.expected)
        found = int(value) if self.integer else float(value)
        if not self._contains(found):
            raise _wrong(name, value, self.expected)
        return found

    def _contains(self, found: int | float) -> bool:
        if self.above_low and found == self.low:
            return False
        return self.low <= found <= self.high


def _wrong(name: str, value: object, expected: str) -> Exception:
    return wrong(name, value, expected, error=SamplingError)


def _temperature(name: str, value: Any) -> float:
    if not is_finite(value) or not (value == 0 or value >= LEAST_TEMPERATURE):
        raise _wrong(name, value, f"0 (greedy) or a number >= {LEAST_TEMPERATURE:g}")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    return boolean(name, value, error=SamplingError)


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
    items = _items(name, value, "strings that are not empty")
    for item in items:
        if not isinstance(item, str) or not item:
            raise _wrong(f"an item of {name}", item, "a string that is not empty")
    return tuple(items)


def _stop(name: str, value: Any) -> tuple[str, ...]:
    return _strings(name, [value] if isinstance(value, str) else value)


def _bad_words(name: str, value: Any) -> tuple[str, ...]:
    words = _strings(name, value)
    for word in words:
        if not word.strip():
            raise _wrong(f"an item of {name}", word, "a string with more than white space")
    return words


def _token_id(name: str, value: Any) -> int:
    if not is_integer(value) or value < 0:
        raise _wrong(name, value, "a token id (an integer >= 0)")
    return int(value)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    items = _items(name, value, "a sequence of token ids (integers >= 0)")
    return tuple(_token_id(f"an item of {name}", item) for item in items)


def _forced_ids(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = _token_ids(name, value)
    if not ids:
        raise SamplingError(f"{name} is empty: expected None or at least one token id")
    return ids


def _logit_bias(name: str, value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "a dict of token id to bias")
    biases = {}
    for key, bias in value.items():
        i = _token_id(f"a key of {name}", key)
        where = f"{name}[{quoted(i)}]"
        biases[i] = number(where, bias, -100, 100, open_low=False, error=SamplingError)
    return biases


def _structured_outputs(name: str, value: Any) -> StructuredOutputs | None:
    if value is not None and not isinstance(value, StructuredOutputs):
        expected = "None or StructuredOutputs, for example StructuredOutputs(json=...)"
        raise _wrong(name, value, expected)
    return value


_PENALTY = Numbers("a number from -2 to 2 (0: off)", -2, 2)
_LOGPROBS = Numbers("None, an integer >= 0, or -1 (all)", -1, integer=True, optional=True)
_SEED = Numbers("None or an integer from 0 to 2**64 - 1", 0, 2**64 - 1, integer=True, optional=True)
_LENGTH = Numbers(
    "None (the rest of the context) or an integer >= 1", 1, integer=True, optional=True
)

CHECKS: dict[str, Callable[[str, Any], object]] = {
    "n": Numbers(f"an integer from 1 to {MAX_SAMPLES}", 1, MAX_SAMPLES, integer=True).check,
    "temperature": _temperature,
    "top_p": Numbers("a number above 0, at most 1 (1: off)", 0, 1, above_low=True).check,
    "top_k": Numbers("an integer >= 1, or 0 or -1 (off)", -1, integer=True).check,
    "min_p": Numbers("a number from 0 (off) to 1", 0, 1).check,
    "repetition_penalty": Numbers("a number above 0 (1: off)", 0, above_low=True).check,
    "presence_penalty": _PENALTY.check,
    "frequency_penalty": _PENALTY.check,
    "seed": _SEED.check,
    "stop": _stop,
    "include_stop_str_in_output": _flag,
    "stop_token_ids": _token_ids,
    "ignore_eos": _flag,
    "max_tokens": _LENGTH.check,
    "min_tokens": Numbers("an integer >= 0", 0, integer=True).check,
    "logprobs": _LOGPROBS.check,
    "prompt_logprobs": _LOGPROBS.check,
    "logit_bias": _logit_bias,
    "bad_words": _bad_words,
    "structured_outputs": _structured_outputs,
    "forced_ids": _forced_ids,
    "detokenize": _flag,
    "skip_special_tokens": _flag,
    "spaces_between_special_tokens": _flag,
    "guided_decoding": _structured_outputs,
}
