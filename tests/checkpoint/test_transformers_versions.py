"""What save_pretrained of older versions of transformers writes is read, and read back there.

tests/data/transformers_versions.json has their config.json and generation_config.json as they were
written; the weights here are random. The oracle is the transformers that is installed.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from support.paths import DATA
from transformers import AutoConfig, AutoModelForCausalLM

from minqwen import ModelConfig, Qwen2
from minqwen.config import GenerationDefaults

MODELS = json.loads((DATA / "transformers_versions.json").read_text())["models"]
IDS = torch.tensor([[5, 8, 1, 60, 3, 2, 9]])


@pytest.fixture(params=MODELS)
def written(request, tmp_path):
    """A directory as that version wrote it, with weights of the same names and shapes."""
    for name, content in MODELS[request.param].items():
        (tmp_path / name).write_text(json.dumps(content))
    config = AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    weights = {name: torch.randn_like(x) * 0.2 for name, x in hf.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return request.param, tmp_path


def strictly(path):
    """transformers' model of a directory in which nothing is missing and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model


def test_an_old_directory_is_read_and_read_back_in_transformers(written, tmp_path_factory):
    name, path = written
    model, theirs = Qwen2.from_pretrained(path), strictly(path)
    assert (
        model.dtype == theirs.dtype == (torch.bfloat16 if "tied" in name.split() else torch.float32)
    )
    with torch.no_grad():
        logits, seen = model.run_with_cache(IDS)
        expected = theirs(IDS, output_hidden_states=True)
    assert torch.equal(logits, expected.logits)
    for ours, hidden in zip(seen.hidden_states(), expected.hidden_states, strict=True):
        assert torch.equal(ours, hidden)
    saved = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(saved)
    with torch.no_grad():
        assert torch.equal(strictly(saved)(IDS).logits, logits)


@pytest.mark.parametrize("name", MODELS)
def test_old_generation_settings_are_read(name, tmp_path):
    for file, content in MODELS[name].items():
        (tmp_path / file).write_text(json.dumps(content))
    defaults = GenerationDefaults.from_dir(tmp_path, ModelConfig.from_json(tmp_path))
    sampled = "tied" in name.split()  # whose generation_config was set before it was written
    assert defaults.eos_token_ids == ((2, 3) if sampled else (2,))
    assert (defaults.temperature, defaults.top_k) == ((0.7, 20) if sampled else (0.0, 0))
    assert defaults.repetition_penalty == (1.05 if sampled else 1.0)
