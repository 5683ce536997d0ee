"""Whole checkpoints: extended, loaded by transformers, shrunk back; killed and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.paths import ROOT
from transformers import AutoModelForCausalLM

from minqwen import Checkpoint, ModelConfig, Qwen2
from minqwen.errors import HeadsError
from minqwen.heads.convert import extend, shrink
from minqwen.heads.layout import layout
from minqwen.heads.manifest import MANIFEST


@pytest.fixture(scope="module")
def wide(embedded, tmp_path_factory):
    """The embedded model with 32 heads. Do not write to it."""
    path = tmp_path_factory.mktemp("convert") / "wide"
    extend(embedded, path, layout(ModelConfig.from_json(embedded), 32))
    return path


def test_an_extended_checkpoint_is_the_same_model_and_shrinks_back(
    embedded, embedded_model, wide, tmp_path
):
    ids = torch.arange(40, 60)[None]
    logits = Qwen2.from_pretrained(wide, dtype="float32")(ids)
    torch.testing.assert_close(logits, embedded_model(ids), rtol=1e-4, atol=1e-4)
    shrink(wide, tmp_path / "back")
    a, b = Checkpoint(embedded), Checkpoint(tmp_path / "back")
    assert a.config == b.config and not (tmp_path / "back" / MANIFEST).exists()
    for name in a.names:
        assert torch.equal(a.read(name), b.read(name)) and a.dtype(name) == b.dtype(name), name


@pytest.mark.parametrize(
    "arch, kv_heads, oracle_class",
    [("qwen2", 4, "Qwen2ForCausalLM"), ("llama", 8, "LlamaForCausalLM")],
)
def test_transformers_loads_it_strictly_with_the_same_logits(
    embedded, embedded_model, tmp_path, arch, kv_heads, oracle_class
):
    ids, config = torch.arange(40, 60)[None], ModelConfig.from_json(embedded)
    logits = embedded_model(ids)
    dst, back = tmp_path / "wide", tmp_path / "back"
    to = layout(config, 32, kv_heads, recipe="split")
    extend(embedded, dst, to, arch=arch, max_file_bytes=5 * 10**6)
    assert (dst / "model.safetensors.index.json").exists() and (dst / "tokenizer.json").exists()
    written = json.loads((dst / "config.json").read_text())
    keys = ("head_dim", "num_attention_heads", "model_type")
    assert tuple(written[key] for key in keys) == (16, 32, arch)
    oracle, info = AutoModelForCausalLM.from_pretrained(
        dst, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(oracle).__name__ == oracle_class
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(oracle(ids).logits, logits, rtol=1e-4, atol=1e-4)
    ours = Qwen2.from_pretrained(dst, dtype="float32")(ids)
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)
    shrink(dst, back)
    a, b = Checkpoint(embedded), Checkpoint(back)
    assert a.config == b.config and not (back / MANIFEST).exists()
    assert all(torch.equal(a.read(n), b.read(n)) and a.dtype(n) == b.dtype(n) for n in a.names)


def test_an_extension_is_not_extended_again(wide, tmp_path):
    with pytest.raises(HeadsError, match="extended already"):
        extend(wide, tmp_path / "twice", layout(ModelConfig.from_json(wide), 64))
    assert not (tmp_path / "twice").exists()


def test_what_is_no_extension_is_not_shrunk(embedded, tmp_path):
    with pytest.raises(HeadsError, match=f"has no {MANIFEST}"):
        shrink(embedded, tmp_path / "back")


def test_weights_that_have_drifted_are_not_shrunk(wide, tmp_path):
    trained = tmp_path / "trained"
    trained.mkdir()
    for file in wide.iterdir():
        (trained / file.name).write_bytes(file.read_bytes())
    weights = load_file(trained / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name][:, 7 * 16] += 0.25  # slot 7 is a ghost: its columns are zero
    save_file(weights, trained / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HeadsError, match=rf"{name} has drifted .* in 1 slots .*7: 0.25"):
        shrink(trained, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    shrink(trained, tmp_path / "back", tolerance=0.25)


DIES_AT_THE_20TH_TENSOR = """
import os, signal, sys
from minqwen import ModelConfig
from minqwen.heads import convert, layout
real, calls = convert.extend_tensor, []
def mortal(*args):
    calls.append(1)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
convert.extend_tensor = mortal
src, dst = sys.argv[1:]
convert.extend(src, dst, layout.layout(ModelConfig.from_json(src), 32))
"""


def test_a_killed_extension_goes_on_where_it_was(embedded, wide, tmp_path):
    to = layout(ModelConfig.from_json(embedded), 32)
    killed = subprocess.run(
        [sys.executable, "-c", DIES_AT_THE_20TH_TENSOR, embedded, tmp_path / "resumed"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert killed.returncode == -9 and not (tmp_path / "resumed").exists()
    # One byte of the embedding, the first tensor, is changed in what was left. A tensor that is
    # written already must not be written again, so the change must still be there at the end.
    (left,) = tmp_path.glob(".resumed.tmp-*/model.safetensors")
    whole = (wide / "model.safetensors").read_bytes()
    begin = place_of("model.embed_tokens.weight", whole)
    with open(left, "r+b") as file:
        file.seek(begin)
        assert file.read(1) == whole[begin : begin + 1]
        file.seek(begin)
        file.write(bytes([whole[begin] ^ 1]))
    extend(embedded, tmp_path / "resumed", to)
    assert [path.name for path in tmp_path.iterdir()] == ["resumed"]
    assert sorted(p.name for p in (tmp_path / "resumed").iterdir()) == sorted(
        p.name for p in wide.iterdir()
    )
    for file in sorted(wide.iterdir()):
        expected, found = file.read_bytes(), (tmp_path / "resumed" / file.name).read_bytes()
        if file.name == "model.safetensors":
            assert found[begin] == expected[begin] ^ 1
            found = found[:begin] + expected[begin : begin + 1] + found[begin + 1 :]
        assert found == expected, file.name


def place_of(name: str, data: bytes) -> int:
    """Where a tensor begins in a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
