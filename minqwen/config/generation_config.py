"""What generation_config.json asks for, checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minqwen.checks import (
    MAX_TOKEN_ID,
    boolean,
    integer,
    mapping,
    number,
    optional_integer,
    token_ids,
    wrong,
)
from minqwen.config.model_config import ModelConfig
from minqwen.errors import ConfigError
from minqwen.files import read_json_object

# A lower temperature means greedy decoding, as in vLLM: the differences of scores, divided by it,
# are so large that almost always the largest score is drawn.
LEAST_TEMPERATURE = 1e-5
MOST = 1000.0  # of a temperature; files in use have at most 1.5
PENALTIES = (1e-4, 1e3)  # above the first and at most the second; files in use have 1 to 1.3
# Keys of generation_config.json that would change the text, with the values that change nothing.
NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "num_return_sequences": (1,),
    "force_words_ids": ([],),
    "constraints": ([],),
    "dola_layers": (),
    "token_healing": (False,),
    "watermarking_config": (),
    "max_time": (),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "sequence_bias": ([], {}),
    "stop_strings": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
}


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What generation_config.json asks for, used where the caller says nothing. Raises ConfigError.

    temperature 0 means greedy. It is what do_sample false or absent gives, as in transformers, and
    what a temperature below LEAST_TEMPERATURE gives. max_new_tokens counts the output alone,
    max_length prompt and output together; where the file has both, the first one counts. Left out,
    every other value is the one that changes nothing: top_p 1, top_k 0, min_p 0, repetition_penalty
    1 (transformers itself would apply a top_k of 50). eos_token_ids joins the stop tokens of
    generation_config.json and config.json.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str], config: ModelConfig) -> GenerationDefaults:
        """Reads path/generation_config.json. Without that file: greedy, config.json's token ids."""
        file = Path(path) / "generation_config.json"
        # lexists: a broken link is a mistake, not an absent file.
        d = read_json_object(file, ConfigError) if os.path.lexists(file) else {}
        return cls.from_dict(d, config, source=str(file))

    @classmethod
    def from_dict(
        cls, d: Mapping[str, Any], config: ModelConfig, source: str = "generation_config.json"
    ) -> GenerationDefaults:
        """Checks a generation_config.json that is already parsed. null counts as absent."""
        remedy = "fetch the file again or repair it"
        mapping(f"{source}: the top level", d, "a JSON object", remedy)
        given = {key: value for key, value in d.items() if value is not None}
        _check_implemented(source, given)
        do_sample = boolean(f"{source}: do_sample", given.get("do_sample", False))
        temperature = number(
            f"{source}: temperature", given.get("temperature", 1.0), high=MOST, open_low=False
        )
        stops = token_ids(f"{source}: eos_token_id", given.get("eos_token_id"))
        bos = given.get("bos_token_id", config.bos_token_id)
        pad = given.get("pad_token_id", config.pad_token_id)
        return cls(
            temperature=temperature if do_sample and temperature >= LEAST_TEMPERATURE else 0.0,
            do_sample=do_sample,
            eos_token_ids=tuple(dict.fromkeys(stops + config.eos_token_id)),
            bos_token_id=optional_integer(f"{source}: bos_token_id", bos, 0, MAX_TOKEN_ID),
            pad_token_id=optional_integer(f"{source}: pad_token_id", pad, 0, MAX_TOKEN_ID),
            **_lengths(source, given),
            **_filters(source, given),
        )


def _check_implemented(source: str, given: Mapping[str, Any]) -> None:
    for key, neutral in NOT_IMPLEMENTED.items():
        if key in given and given[key] not in neutral:
            expected = " or ".join([*map(repr, neutral), "no such key"])
            remedy = "it changes what is generated and is not implemented; remove it"
            raise wrong(f"{source}: {key}", given[key], expected, remedy)


def _lengths(source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that end the text, of which only one is not None."""
    names = ("max_new_tokens", "max_length")
    lengths = {
        name: optional_integer(f"{source}: {name}", given.get(name), 1, MAX_TOKEN_ID)
        for name in names
    }
    if lengths["max_new_tokens"] is not None:
        lengths["max_length"] = None
    return lengths


def _filters(source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that narrow the choice of the next token."""
    top_k = integer(f"{source}: top_k", given.get("top_k", 0), -1, MAX_TOKEN_ID)
    penalty = given.get("repetition_penalty", 1.0)
    min_p = given.get("min_p", 0.0)
    return {
        "top_p": number(f"{source}: top_p", given.get("top_p", 1.0), high=1.0),
        "top_k": max(0, top_k),  # some files write -1 for off
        "min_p": number(f"{source}: min_p", min_p, high=1.0, open_low=False),
        "repetition_penalty": number(f"{source}: repetition_penalty", penalty, *PENALTIES),
    }
