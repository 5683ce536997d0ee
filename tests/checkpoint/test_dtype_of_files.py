"""A config.json that names no dtype: the weight files say it, as in transformers 5."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import FILE, rewrite, tiny, write
from transformers import AutoModelForCausalLM

from minqwen import LLM, SamplingParams
from minqwen.checkpoint import Checkpoint, load_pretrained, save_pretrained

GREEDY = SamplingParams(temperature=0, max_tokens=4)


def without_dtype(path, null=False):
    """Take the dtype out of config.json."""
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (path / "config.json").write_text(json.dumps(config | ({"torch_dtype": None} if null else {})))
    return path


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_model_has_the_dtype_of_its_files(tmp_path, dtype, null):
    write(tmp_path / "c", tiny(dtype=dtype))
    path = without_dtype(tmp_path / "c", null)
    theirs = AutoModelForCausalLM.from_pretrained(path).dtype
    assert load_pretrained(path).dtype == theirs == getattr(torch, dtype)
    assert Checkpoint(path).config.dtype == dtype
    assert load_pretrained(path, dtype="float64").dtype == torch.float64


def test_so_have_the_engine_and_what_is_saved(tmp_path):
    write(tmp_path / "c", tiny(dtype="bfloat16"))
    model = load_pretrained(without_dtype(tmp_path / "c"))
    assert LLM(model, num_blocks=4).generate([[1]], GREEDY, use_tqdm=False)[0].outputs
    save_pretrained(model, tmp_path / "d")
    assert json.loads((tmp_path / "d" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("first", ["lm_head", "model.embed_tokens"])
def test_of_mixed_files_the_first_tensor_decides_as_in_transformers(tmp_path, first):
    write(tmp_path / "c", tiny(dtype="bfloat16"))

    def widen(tensors):
        for name in tensors:
            if name.startswith(first):
                tensors[name] = tensors[name].float()

    rewrite(without_dtype(tmp_path / "c"), widen)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "c").dtype
    assert load_pretrained(tmp_path / "c").dtype == theirs


def test_of_several_files_the_first_decides(tmp_path):
    write(tmp_path / "c", tiny(dtype="bfloat16"), max_file_bytes=9000)
    files = sorted((without_dtype(tmp_path / "c")).glob("*.safetensors"))
    for file in files[1:]:
        tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    assert len(files) > 2 and not (tmp_path / "c" / FILE).exists()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "c").dtype
    assert load_pretrained(tmp_path / "c").dtype == theirs == torch.bfloat16
