"""The settings of `generate`, put together as in transformers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minqwen.checks import is_integer, optional_integer
from minqwen.config import GenerationDefaults, ModelConfig
from minqwen.errors import ConfigError, MinqwenError, SamplingError, warn
from minqwen.files import read_json_object
from minqwen.lab.transformers.refused import IDLE_IN_GENERATE, OF_GENERATE, refuse
from minqwen.sampling.params import SamplingParams

OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@dataclass
class GenerationConfig:
    """transformers' settings of `generate`; None where nothing is said."""

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    num_return_sequences: int | None = None
    return_dict_in_generate: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    use_cache: bool | None = None

    @classmethod
    def from_model_config(cls, config: ModelConfig) -> GenerationConfig:
        """The token ids of config.json, for a model without generation_config.json."""
        ends = list(config.eos_token_id) or None
        return cls(
            bos_token_id=config.bos_token_id, eos_token_id=ends, pad_token_id=config.pad_token_id
        )

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str], config: ModelConfig) -> GenerationConfig:
        """generation_config.json of a directory. Raises ConfigError for what it must not say."""
        GenerationDefaults.from_dir(path, config)
        file = Path(path) / "generation_config.json"
        if not file.is_file():
            return cls.from_model_config(config)
        said = read_json_object(file, ConfigError)
        return cls(**{name: said.get(name) for name in NAMES})

    @property
    def shows_logits(self) -> bool:
        """Whether what `generate` returns has logits or scores."""
        wanted = self.output_logits or self.output_scores
        return bool(self.return_dict_in_generate and wanted)

    def said(self) -> dict[str, Any]:
        """What is not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


NAMES = tuple(field.name for field in dataclasses.fields(GenerationConfig))
# What transformers takes where nobody says anything.
DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 50, "num_return_sequences": 1}


def settled(own: GenerationConfig, given: object, options: Mapping[str, Any]) -> GenerationConfig:
    """options, before a `generation_config` that is given, before the model's own.

    Of the options None counts too, and switches something off. Raises MinqwenError for a setting
    that is not taken.
    """
    said = given_settings(given)
    known = (*NAMES, *IDLE_IN_GENERATE)
    for source in (said, options):
        others = {name: value for name, value in source.items() if name not in known}
        refuse("generate", others, OF_GENERATE, NAMES)
    chosen = {name: value for name, value in options.items() if name in NAMES}
    said = {name: value for name, value in said.items() if name in NAMES and value is not None}
    settings = GenerationConfig(**{**DEFAULTS, **own.said(), **said, **chosen})
    check(settings, chosen)
    return settings


def given_settings(given: object) -> dict[str, Any]:
    """A `generation_config`: ours, a dict, or transformers' own object."""
    if given is None:
        return {}
    if isinstance(given, GenerationConfig):
        return given.said()
    if isinstance(given, Mapping):
        return dict(given)
    if hasattr(given, "to_dict"):
        return dict(given.to_dict())
    raise MinqwenError(
        f"generation_config is a {type(given).__name__}, expected a GenerationConfig or a dict"
    )


def check(settings: GenerationConfig, chosen: Mapping[str, Any]) -> None:
    """Raise SamplingError for settings that contradict each other; warn of those without effect."""
    for name in ("max_new_tokens", "max_length", "min_new_tokens", "num_return_sequences"):
        optional_integer(name, getattr(settings, name), 1, error=SamplingError)
    if settings.do_sample:
        if settings.temperature == 0:
            raise SamplingError("temperature is 0: give do_sample=False for the likeliest tokens")
        return
    if settings.num_return_sequences not in (None, 1):
        raise SamplingError(
            f"num_return_sequences is {settings.num_return_sequences}, but do_sample is false: all "
            "would be the same"
        )
    idle = [name for name in OF_SAMPLING if chosen.get(name) not in (None, DEFAULTS.get(name))]
    if idle:
        warn(f"do_sample is false: {', '.join(idle)} changes nothing", stacklevel=5)


def end_ids(given: Any, vocab_size: int) -> list[int]:
    """The tokens that end a text: one, several or none. Those beyond the vocabulary never come."""
    if given is None:
        return []
    listed = given.tolist() if isinstance(given, Tensor) else given
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    for id in listed:
        if not is_integer(id):
            raise SamplingError(f"eos_token_id is {given!r}, expected an id, or a list of them")
    return [int(id) for id in listed if 0 <= id < vocab_size]


def sampling_params(
    settings: GenerationConfig, ends: list[int], length: int, config: ModelConfig
) -> SamplingParams:
    """The engine's. length: of the prompts with their padding, which max_length counts."""
    sampled = bool(settings.do_sample)
    return SamplingParams(
        temperature=(settings.temperature or 1.0) if sampled else 0.0,
        top_k=settings.top_k or 0,
        top_p=1.0 if settings.top_p is None else settings.top_p,
        min_p=settings.min_p or 0.0,
        repetition_penalty=settings.repetition_penalty or 1.0,
        max_tokens=new_tokens(settings, length, config),
        min_tokens=settings.min_new_tokens or 0,
        stop_token_ids=ends,
        ignore_eos=True,  # those of the model's own config: stop_token_ids has what counts
        detokenize=False,
    )


def new_tokens(settings: GenerationConfig, length: int, config: ModelConfig) -> int:
    """How many tokens may be new. Raises SamplingError if max_length leaves none."""
    if settings.max_new_tokens is not None:
        return settings.max_new_tokens
    most = settings.max_length
    if most is None:
        most = min(length + 20, config.max_position_embeddings)
    if most <= length:
        raise SamplingError(
            f"the prompts have {length} tokens with their padding, and max_length is {most}: give "
            "max_new_tokens"
        )
    return most - length
