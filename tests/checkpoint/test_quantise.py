"""Checkpoints that are quantised here: the layout is the published one, the numbers are the best.

The decoder is that of support/quantised.py, which is compared with AutoAWQ's and AutoGPTQ's own
results; the method is computed again here, in numpy, from its description.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.checkpoints import tiny, weights, write
from support.quantised import bits_equal, checkpoint, dequantise, plain, read
from support.quantised import tiny as tiny_quantised
from support.tool import run_tool_here
from transformers import AutoConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from minqwen import LLM, SamplingParams
from minqwen.checkpoint import Checkpoint, write_checkpoint
from minqwen.checkpoint.quantise import (
    FACTORS,
    packing_for,
    quantise,
    quantise_weight,
    quantization_config,
)
from minqwen.errors import CheckpointError
from minqwen.lab.compare import logit_difference, rms
from minqwen.lab.quantisation import by_kind, measure_loss
from minqwen.model import Qwen2

KINDS = [("gptq", 4), ("gptq", 8), ("awq", 4)]
CONFIG = tiny(hidden_size=32, intermediate_size=48, head_dim=16, num_attention_heads=2,
              num_key_value_heads=1, dtype="bfloat16", tie_word_embeddings=True)  # fmt: skip


def errors_by_hand(weight: np.ndarray, layout: str, bits: int, group: int) -> np.ndarray:
    """The smallest sum of squared errors of each group of each output, by the description."""
    w = weight.reshape(len(weight), -1, group).astype(np.float32)
    least, most = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
    last, found = 2**bits - 1, []
    for c in FACTORS:
        spread = 2 * np.maximum(-least, most) if layout == "gptq" else most - least
        s = (np.float32(c) * spread / last).astype(np.float16).astype(np.float32)
        if layout == "gptq":
            z = np.full_like(s, 2 ** (bits - 1))
        else:
            z = np.clip(np.round(-np.float32(c) * least / s), 0, last)
        q = np.clip(np.round(w / s[..., None]) + z[..., None], 0, last)
        found.append((((q - z[..., None]) * s[..., None] - w) ** 2).sum(-1))
    return np.min(found, axis=0)


@pytest.mark.parametrize("layout, bits", KINDS)
def test_each_group_has_the_factor_with_the_smallest_error(layout, bits, monkeypatch):
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    packing = packing_for(bits, layout, 16)
    parts, error = quantise_weight(weight, packing)
    got = dequantise(parts, quantization_config(packing)).float()
    moved = (got - weight).unflatten(1, (-1, 16)).square().sum(-1).numpy()
    best = errors_by_hand(weight.numpy(), layout, bits, 16)
    # The weights themselves are rounded to float16, by 2^-11 at most.
    slack = 2 * np.sqrt(best * 16) * 2**-11 * float(weight.abs().max()) + 1e-9
    assert np.all(np.abs(moved - best) <= slack + 1e-5 * best)
    assert error == pytest.approx(np.sqrt(best.sum() / weight.square().sum().item()), rel=1e-5)
    if layout == "gptq":  # the zero point that kernels for symmetric checkpoints take for granted
        assert set(parts["qzeros"].flatten().tolist()) == {packing.word(2 ** (bits - 1) - 1)}
    monkeypatch.setattr("minqwen.checkpoint.quantise.PIECE", 100)  # some outputs at a time
    again, _ = quantise_weight(weight, packing)
    assert all(torch.equal(again[part], parts[part]) for part in parts)


@pytest.mark.parametrize("layout, bits", KINDS)
def test_zeros_stay_zeros_and_the_smallest_weights_are_kept(layout, bits):
    weight = torch.zeros(8, 32)
    weight[0, 3], weight[1, 20], weight[2, 0] = 2.0**-24, -1e-30, 3.0
    packing = packing_for(bits, layout, 16)
    parts, _ = quantise_weight(weight, packing)
    got = dequantise(parts, quantization_config(packing)).float()
    assert got[0, 3] == 2.0**-24 and abs(got[2, 0] / 3 - 1) < 0.1
    assert not got[weight.abs() < 1e-20].any()


@pytest.mark.parametrize("layout, bits", KINDS)
def test_a_quantised_checkpoint_is_read_as_others_read_it(tmp_path, layout, bits):
    tensors = write(tmp_path / "a", CONFIG)
    errors = quantise(tmp_path / "a", tmp_path / "b", bits=bits, layout=layout, group_size=16)
    said = json.loads((tmp_path / "b/config.json").read_text())
    quant = said["quantization_config"]
    expected = plain(read(tmp_path / "b"), quant)
    opened = Checkpoint(tmp_path / "b")
    assert said["torch_dtype"] == "float16" and set(opened.names) == set(tensors) == set(expected)
    for name, weight in expected.items():
        assert bits_equal(opened.read(name), weight)
        if name in errors:
            moved = rms(weight.double() - tensors[name].double()) / rms(tensors[name].double())
            # The last rounding, to float16, moves no weight by more than 2^-11 of it.
            assert abs(moved - errors[name]) < 2**-11 and 0 < moved < 0.12
        else:
            assert bits_equal(weight, tensors[name].half())
    assert len(errors) == 14


def test_transformers_knows_what_the_config_says(tmp_path):
    write(tmp_path / "a", CONFIG)
    for layout, bits in KINDS:
        quantise(tmp_path / "a", tmp_path / "b", bits=bits, layout=layout, group_size=16,
                 overwrite=True)  # fmt: skip
        config = AutoConfig.from_pretrained(tmp_path / "b")
        known = AutoQuantizationConfig.from_dict(config.quantization_config)
        assert (known.quant_method.value, known.bits, known.group_size) == (layout, bits, 16)
        if layout == "gptq":
            assert (known.sym, known.desc_act) == (True, False)


def test_awq_has_the_keys_of_the_official_checkpoints(tmp_path):
    official = {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    assert quantization_config(packing_for(4, "awq")) == official


# ---- what is refused ----------------------------------------------------------------------------


def refused(call, *says: str) -> None:
    with pytest.raises(CheckpointError) as error:
        call()
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in says), str(error.value)


def test_what_cannot_be_quantised_is_refused_and_nothing_is_written(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, CONFIG)
    refused(lambda: quantise(a, b), "inputs", "group size 128", "--group-size 16")
    refused(lambda: quantise(a, b, bits=8, layout="awq"), "bits is 8 with layout awq")
    refused(lambda: quantise(a, b, bits=3), "bits is 3")
    refused(lambda: quantise(a, b, layout="gguf"), "layout", "'gguf'")
    refused(lambda: quantise(a, b, group_size=0), "group_size is 0")
    checkpoint(tmp_path / "q", tiny_quantised())
    refused(lambda: quantise(tmp_path / "q", b), "is quantised already", "gptq 4-bit")
    write(tmp_path / "odd", CONFIG.replace(intermediate_size=20))
    refused(lambda: quantise(tmp_path / "odd", b, group_size=4), "20 outputs", "multiples of 8")
    assert not b.exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [1e30, float("nan")])
def test_values_that_float16_does_not_hold_are_refused(tmp_path, name, value):
    tensors = weights(CONFIG)
    tensors[name].flatten()[5] = value
    write_checkpoint(tmp_path / "a", CONFIG, tensors.items())
    refused(lambda: quantise(tmp_path / "a", tmp_path / "b", group_size=16), name, "float16")
    assert not (tmp_path / "b").exists()


# ---- what it costs ------------------------------------------------------------------------------


@torch.no_grad()
def test_the_loss_is_that_of_the_logits(tmp_path):
    write(tmp_path / "a", CONFIG)
    quantise(tmp_path / "a", tmp_path / "b", group_size=16)
    ids = [5, 3, 60, 1, 1, 8]
    loss = measure_loss(tmp_path / "a", tmp_path / "b", ids)

    def logits(path: str, dtype: str) -> torch.Tensor:
        return Qwen2.from_pretrained(tmp_path / path, dtype=dtype)(torch.tensor([ids])).double()

    truth, got = logits("a", "float64"), logits("b", "float64")
    assert loss.difference == logit_difference(truth, got, torch.tensor([ids]))
    assert loss.unit == rms(logits("a", "bfloat16") - truth)
    assert loss.units == rms(got - truth) / loss.unit
    assert (loss.tokens, loss.dtype) == (6, "bfloat16") and loss.difference.kl > 0


def test_errors_of_one_kind_are_put_together():
    errors = {"model.layers.0.mlp.up_proj.weight": 3.0, "model.layers.1.mlp.up_proj.weight": 4.0}
    assert by_kind(errors) == {"up_proj": pytest.approx(12.5**0.5)}


def test_the_embedded_model_in_8_bits_loses_less_than_in_4_and_speaks(embedded, tmp_path):
    text = tmp_path / "text"
    text.write_text("In the beginning God created the heaven and the earth.")
    lost = []
    for bits in (4, 8):
        done = run_tool_here(
            "quantize.py", embedded, tmp_path / str(bits), "--bits", bits, "--group-size", 64,
            "--report", "--text", text, "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        lost.append(json.loads(done.out)["loss"])
    assert lost[0]["difference"]["kl"] > 20 * lost[1]["difference"]["kl"] > 0
    assert lost[0]["units"] > 5 * lost[1]["units"]
    llm = LLM(tmp_path / "8", dtype="float32", num_attention_heads=32)
    params = SamplingParams(max_tokens=3, temperature=0)
    assert llm.generate("And God", params)[0].outputs[0].text


def test_a_mistake_at_the_command_line_is_one_line(embedded, tmp_path):
    for arguments, says in {
        ("--bits", 4): "choose --group-size 64",
        ("--bits", 8, "--layout", "awq"): "bits is 8 with layout awq",
        ("--bits", 4, "--text", "x"): "--text is the text of --report",
        ("--bits", 4, "--report", "--text", tmp_path / "none"): "cannot be read",
        ("--bits", 4, "--layuot"): "did you mean '--layout'",
    }.items():
        done = run_tool_here("quantize.py", embedded, tmp_path / "b", *arguments)
        assert done.code == 2 and done.err.count("\n") == 1 and says in done.err, done.err
    assert not (tmp_path / "b").exists()
