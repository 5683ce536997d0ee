"""What generation_config.json asks for, checked."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minqwen.checks import boolean, integer, number, optional_integer, token_ids, wrong
from minqwen.config import ModelConfig
from minqwen.errors import ConfigError
from minqwen.files import read_json_object

# Keys of generation_config.json that would change the text, with the values that do nothing.
NOT_IMPLEMENTED = {
    "num_beams": (1,),
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
    """What generation_config.json asks for, to be used where the caller says nothing; raises ConfigError.

    temperature 0 means greedy, and is what do_sample false or absent gives, as in transformers. Left out,
    every other value is the one that does nothing: top_p 1, top_k 0, min_p 0, repetition_penalty 1
    (transformers itself would apply a top_k of 50). eos_token_ids joins the stop tokens of
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

    @classmethod
    def from_dir(cls, path: str | os.PathLike, config: ModelConfig) -> "GenerationDefaults":
        """Reads path/generation_config.json; without that file, greedy with config.json's token ids."""
        file = Path(path) / "generation_config.json"
        d = read_json_object(file, ConfigError) if os.path.lexists(file) else {}
        return cls.from_dict(d, config, source=str(file))

    @classmethod
    def from_dict(
        cls, d: Mapping[str, Any], config: ModelConfig, source: str = "generation_config.json"
    ) -> "GenerationDefaults":
        """Checks a generation_config.json already parsed. null counts as absent."""
        if not isinstance(d, Mapping):
            raise wrong(
                f"{source}: the top level", d, "a JSON object", "fetch the file again or repair it"
            )
        d = {k: v for k, v in d.items() if v is not None}
        at = lambda name: f"{source}: {name}"  # noqa: E731
        for key, neutral in NOT_IMPLEMENTED.items():
            if key in d and d[key] not in neutral:
                raise wrong(
                    at(key),
                    d[key],
                    " or ".join(map(repr, neutral)) + " or no such key",
                    "it changes what is generated and is not implemented; remove it",
                )
        do_sample = boolean(at("do_sample"), d.get("do_sample", False))
        temperature = number(at("temperature"), d.get("temperature", 1.0), open_low=False)
        stops = token_ids(at("eos_token_id"), d.get("eos_token_id")) + config.eos_token_id
        bos, pad = (
            d.get("bos_token_id", config.bos_token_id),
            d.get("pad_token_id", config.pad_token_id),
        )
        return cls(
            temperature=temperature if do_sample else 0.0,
            top_p=number(at("top_p"), d.get("top_p", 1.0), high=1.0),
            top_k=max(
                0, integer(at("top_k"), d.get("top_k", 0), -1)
            ),  # some files write -1 for off
            min_p=number(at("min_p"), d.get("min_p", 0.0), high=1.0, open_low=False),
            repetition_penalty=number(at("repetition_penalty"), d.get("repetition_penalty", 1.0)),
            do_sample=do_sample,
            eos_token_ids=tuple(dict.fromkeys(stops)),
            bos_token_id=optional_integer(at("bos_token_id"), bos, 0),
            pad_token_id=optional_integer(at("pad_token_id"), pad, 0),
            max_new_tokens=optional_integer(at("max_new_tokens"), d.get("max_new_tokens"), 1),
        )
