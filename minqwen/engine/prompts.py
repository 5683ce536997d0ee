"""The forms that a prompt may have, vLLM's dicts among them, and what each of them says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypedDict

from minqwen.checks import did_you_mean
from minqwen.errors import SamplingError
from minqwen.files import quoted


class _Optional(TypedDict, total=False):
    cache_salt: str | None


class TextPrompt(_Optional):
    """{"prompt": "..."}. cache_salt: as in `LLM.add_request`, for this prompt alone."""

    prompt: str


class _OptionalText(_Optional, total=False):
    prompt: str | None


class TokensPrompt(_OptionalText):
    """{"prompt_token_ids": [...]}. "prompt" is then only what the output has as its prompt."""

    prompt_token_ids: Sequence[int]


# Any is an array or a tensor of token ids, which has `tolist`.
Prompt = str | Sequence[int] | TextPrompt | TokensPrompt | Any

KEYS = ("prompt", "prompt_token_ids", "cache_salt")
# Keys of vLLM's dicts that may be None; anything else in them would change the result.
_TEXT_ONLY = "prompts are text or token ids"
OF_VLLM = {
    "multi_modal_data": _TEXT_ONLY,
    "multi_modal_uuids": _TEXT_ONLY,
    "mm_processor_kwargs": _TEXT_ONLY,
    "prompt_embeds": _TEXT_ONLY,
    "token_type_ids": "Qwen2 has no token types",
    "encoder_prompt": "Qwen2 has no encoder",
    "decoder_prompt": 'Qwen2 has no encoder: use {"prompt": ...}',
}


class Read(NamedTuple):
    """What a prompt says."""

    text: str | None  # for the output, and to be encoded where there are no ids
    ids: Any  # as they were given, unchecked; None: encode the text
    salt: Any


def read_prompt(prompt: Prompt) -> Read:
    """A prompt in any form. Raises SamplingError for a dict that is none."""
    if isinstance(prompt, str):
        return Read(prompt, None, None)
    if not isinstance(prompt, Mapping):
        return Read(None, prompt, None)
    _check_keys(prompt)
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and ids is None:
        raise SamplingError(
            'the prompt is a dict without "prompt" and "prompt_token_ids": give one'
        )
    if not isinstance(text, (str, type(None))):
        raise SamplingError(f'the prompt\'s "prompt" is {quoted(text, 100)}, expected text')
    return Read(text, ids, prompt.get("cache_salt"))


def _check_keys(prompt: Mapping[Any, Any]) -> None:
    for key, value in prompt.items():
        if key in OF_VLLM and value is not None:
            raise SamplingError(f"the prompt has {quoted(key)}: {OF_VLLM[key]}; leave it out")
        if key not in OF_VLLM and key not in KEYS:
            shown = quoted(key, 100)
            raise SamplingError(
                f"the prompt has the key {shown}, expected one of {', '.join(KEYS)}"
                f"{did_you_mean(shown, KEYS)}"
            )


def is_prompt(x: Any) -> bool:
    """One prompt, rather than several of them. An empty list is no prompts."""
    if hasattr(x, "ndim"):  # an array, a tensor
        return bool(x.ndim < 2)
    if isinstance(x, (str, bytes, Mapping)) or not isinstance(x, Iterable):
        return True
    return isinstance(x, (list, tuple)) and bool(x) and isinstance(x[0], Integral)
