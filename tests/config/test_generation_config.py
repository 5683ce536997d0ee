"""generation_config.json: what it asks for, as transformers reads it, and what is refused."""

from __future__ import annotations

import json
import math
import os

import pytest
import transformers
from support.configs import (
    BFLOAT16_7B,
    CONFIGS,
    PUBLISHED,
    assert_one_line,
)

from minqwen.config import GenerationDefaults, ModelConfig
from minqwen.errors import ConfigError
from minqwen.sampling.params import SamplingParams


def generation(tmp_path, d, config=BFLOAT16_7B):
    (tmp_path / "generation_config.json").write_text(json.dumps(d))
    return GenerationDefaults.from_dir(tmp_path, config)


def test_sampling_settings_and_stop_tokens_come_from_the_file(tmp_path):
    asked = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "eos_token_id": [151645, 151643]}
    defaults = generation(tmp_path, asked)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.7, 0.8, 0)
    assert defaults.eos_token_ids == (151645, 151643)


@pytest.mark.parametrize("name", PUBLISHED["models"])
def test_a_published_file_is_understood_as_transformers_does(name, tmp_path):
    d, config = PUBLISHED["models"][name]["generation_config"], ModelConfig.from_dict(CONFIGS[name])
    g = generation(tmp_path, d, config)
    hf = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (g.do_sample, g.repetition_penalty) == (bool(hf.do_sample), hf.repetition_penalty or 1.0)
    if "Instruct" in name:
        assert (
            (g.temperature, g.top_p, g.top_k)
            == (hf.temperature, hf.top_p, hf.top_k)
            == (0.7, 0.8, 20)
        )
        assert (
            g.eos_token_ids == (151645, 151643)
            and g.pad_token_id == 151643
            and g.max_new_tokens is None
        )
    else:
        assert (g.temperature, g.top_p, g.top_k, g.max_new_tokens) == (0.0, 1.0, 0, 2048)
        assert g.eos_token_ids == (151643,) and g.pad_token_id is None
    assert g.bos_token_id == 151643


def test_what_is_left_out_changes_nothing(tmp_path):
    config = BFLOAT16_7B.replace(eos_token_id=(5, 6), pad_token_id=9)
    absent = GenerationDefaults.from_dir(tmp_path, config)
    assert absent == GenerationDefaults(eos_token_ids=(5, 6), bos_token_id=151643, pad_token_id=9)
    assert absent.temperature == 0 and absent.repetition_penalty == 1
    assert generation(tmp_path, {}, config) == absent
    nulls = dict.fromkeys(["do_sample", "top_p", "eos_token_id", "num_beams"])
    assert generation(tmp_path, nulls, config) == absent
    g = generation(
        tmp_path,
        {
            "eos_token_id": [7, 5],
            "do_sample": True,
            "top_k": -1,
            "min_p": 0.05,
            "max_new_tokens": 3,
            "num_beams": 1,
            "pad_token_id": 2,
            "bos_token_id": 1,
        },
        config,
    )
    assert g.eos_token_ids == (7, 5, 6)
    assert (g.temperature, g.top_k, g.min_p, g.max_new_tokens) == (1.0, 0, 0.05, 3)
    assert (g.bos_token_id, g.pad_token_id) == (1, 2)
    assert generation(tmp_path, {"eos_token_id": 6, "temperature": 0.5}, config).eos_token_ids == (
        6,
        5,
    )
    assert generation(tmp_path, {"temperature": 0.5}).temperature == 0  # do_sample absent: greedy
    assert generation(tmp_path, {"do_sample": True, "temperature": 0}).temperature == 0


def test_what_loads_can_be_sampled_with(tmp_path):
    """Also at the ends of what a file may say; a temperature that is next to greedy is greedy."""
    smallest, largest = 5e-324, 1000
    ends = {
        "temperature": (0, smallest, 1e-6, 9.9e-6, 1e-5, largest),
        "top_p": (smallest, 1),
        "top_k": (-1, 0, 1, 2**31 - 1),
        "min_p": (0, smallest, 1),
        "repetition_penalty": (1e-3, largest),
        "max_new_tokens": (1, 2**31 - 1),
        "max_length": (1, 2**31 - 1),
    }
    for key, values in ends.items():
        for value in values:
            defaults = generation(tmp_path, {"do_sample": True, key: value})
            params = SamplingParams.from_defaults(defaults)
            if key == "temperature":
                assert params.temperature == (value if value >= 1e-5 else 0)


def test_a_length_of_prompt_and_output_together_leaves_the_number_of_new_tokens_open(tmp_path):
    defaults = generation(tmp_path, {"max_length": 12})
    assert defaults.max_length == 12
    assert SamplingParams.from_defaults(defaults).max_tokens is None
    assert SamplingParams.from_defaults(defaults, max_tokens=3).max_tokens == 3
    both = generation(tmp_path, {"max_length": 12, "max_new_tokens": 30})
    assert both.max_length is None  # as in transformers, max_new_tokens wins
    assert SamplingParams.from_defaults(both).max_tokens == 30


BAD_GENERATION = {
    "temperature": (-0.1, "1", True, math.nan, math.inf, 1e39),
    "top_p": (0, 1.1, -1, "0.8", True),
    "top_k": (-2, 2.0, True, "20"),
    "min_p": (-0.1, 1.5, "0"),
    "do_sample": (1, "true"),
    "repetition_penalty": (0, -1, "1.1", math.nan),
    "max_new_tokens": (0, -1, 2.5, True),
    "max_length": (0, -1, 2.5, True),
    "eos_token_id": (-1, "x", [1, None], 1.5, {}),
    "bos_token_id": ([1], -1),
    "pad_token_id": ("a", -1),
    "num_beams": (4,),
    "num_beam_groups": (2,),
    "diversity_penalty": (0.5,),
    "num_return_sequences": (2,),
    "force_words_ids": ([[1]],),
    "constraints": ([{}],),
    "dola_layers": ("low",),
    "token_healing": (True,),
    "watermarking_config": ({},),
    "max_time": (2.5,),
    "stop_strings": (["x"],),
    "no_repeat_ngram_size": (3,),
    "suppress_tokens": ([1],),
    "forced_eos_token_id": (5,),
}


@pytest.mark.parametrize(
    "key, value", [(k, v) for k, values in BAD_GENERATION.items() for v in values]
)
def test_a_wrong_value_or_what_is_not_implemented_is_refused(key, value, tmp_path):
    with pytest.raises(ConfigError) as error:
        generation(tmp_path, {key: value})
    assert_one_line(error, str(tmp_path / "generation_config.json"), key)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text("{,}")
    with pytest.raises(ConfigError, match="generation_config.json: is not valid JSON"):
        GenerationDefaults.from_dir(tmp_path, BFLOAT16_7B)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").symlink_to("gone")  # a broken link is not an absent file
    with pytest.raises(ConfigError, match="cannot be read"):
        GenerationDefaults.from_dir(tmp_path, BFLOAT16_7B)
    (tmp_path / "generation_config.json").unlink()
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(ConfigError, match="is not a regular file"):
        GenerationDefaults.from_dir(tmp_path, BFLOAT16_7B)
    with pytest.raises(ConfigError, match="top level"):
        GenerationDefaults.from_dict([], BFLOAT16_7B)
