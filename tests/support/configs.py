"""Published configs, and what tests of configs share."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from minqwen.config import ModelConfig
from support.paths import DATA

transformers.utils.logging.set_verbosity_error()
PUBLISHED = json.loads((DATA / "configs.json").read_text())
CONFIGS = {name: entry["config"] for name, entry in PUBLISHED["models"].items()}
CONFIGS |= {
    name: CONFIGS[entry["base"]] | entry["changes"]
    for name, entry in PUBLISHED["relatives"].items()
}
PARAMETERS = {
    name: e["parameters"] for part in ("models", "relatives") for name, e in PUBLISHED[part].items()
}
TENSORS = {
    name: e["tensors"] for part in ("models", "relatives") for name, e in PUBLISHED[part].items()
}
B7 = CONFIGS["Qwen/Qwen2.5-7B"]
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
BFLOAT16_7B = ModelConfig.from_dict(B7)
TINY = dict(
    vocab_size=80,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def changed(
    base: Mapping[str, Any] = B7, without: tuple[str, ...] = (), **changes: Any
) -> dict[str, Any]:
    """A copy of a config.json with keys removed and set."""
    return {k: copy.deepcopy(v) for k, v in {**base, **changes}.items() if k not in without}


def assert_same_as_transformers(config: ModelConfig, hf: Any) -> None:
    """Every field that transformers knows has transformers' value."""
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "bos_token_id",
        "pad_token_id",
        "model_type",
    ):
        assert getattr(config, name) == getattr(hf, name), name
    assert config.head_dim == (
        getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    )
    eos = hf.eos_token_id if isinstance(hf.eos_token_id, list) else [hf.eos_token_id]
    assert config.eos_token_id == tuple(i for i in eos if i is not None)
    assert config.dtype == str(hf.dtype or torch.float32).removeprefix("torch.")
    rope = hf.rope_parameters
    assert config.rope_theta == rope["rope_theta"]
    if config.rope_scaling is None:
        assert rope["rope_type"] == "default"
    else:
        assert rope["rope_type"] == "yarn"
        for name in (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
        ):
            assert getattr(config.rope_scaling, name) == rope.get(name), name
        assert config.rope_scaling.beta_fast == (rope.get("beta_fast") or 32)
        assert config.rope_scaling.beta_slow == (rope.get("beta_slow") or 1)
        assert config.rope_scaling.truncate == rope.get("truncate", True)
    assert all(kind == "full_attention" for kind in getattr(hf, "layer_types", None) or [])


def load_with_transformers(config: ModelConfig, directory: Path) -> Any:
    """What transformers reads from the config.json that `config` writes."""
    config.save(directory)
    return AutoConfig.from_pretrained(directory)


def assert_one_line(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    """The error is one line in the shape of all errors, and has these parts."""
    text = str(error.value)
    assert text.isprintable() and len(text.splitlines()) == 1, text
    assert "expected" in text and "; " in text, text
    for part in parts:
        assert part in text, (part, text)
