"""Heads moved in quantised words: as if the weights that they stand for were moved.

The dequantiser (support/quantised.py) takes the numbers out of the words one by one. It is itself
compared with golden vectors that AutoAWQ's and AutoGPTQ's code computed
(data/quant_golden.safetensors: 256 inputs, 64 outputs, groups of 128).
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.paths import DATA
from support.quantised import (
    ACT,
    AWQ,
    GPTQ,
    GPTQ8,
    KINDS,
    PROJECTIONS,
    bits_equal,
    checkpoint,
    dequantise,
    plain,
    quantised,
    read,
    tiny,
)
from support.tool import run_tool_here

from minqwen.checkpoint.quantization import Packing
from minqwen.config import ModelConfig
from minqwen.errors import HeadsError, MinqwenError
from minqwen.heads.layout import extended_config, layout
from minqwen.heads.manifest import MANIFEST, read_manifest
from minqwen.heads.packed import (
    check_movable,
    extend_packed,
    extend_part,
    shrink_packed,
    shrink_part,
)
from minqwen.heads.tensors import extend_tensor
from minqwen.model import Qwen2


def heads_tool(*arguments: object) -> tuple[int, str, str]:
    """tools/heads.py in this process: (exit code, stdout, stderr)."""
    done = run_tool_here("heads.py", *arguments)
    return done.code, done.out, done.err


@pytest.mark.parametrize(
    "case, quant",
    [
        ("awq", AWQ),
        ("gptq4_sym", GPTQ),
        ("gptq8_sym", GPTQ8),
        ("gptq4_asym", GPTQ),
        ("gptq4_sym_desc_act", ACT),
    ],
)
def test_golden_vectors_dequantise_and_extend(case, quant):
    golden = load_file(DATA / "quant_golden.safetensors")
    parts = {n.removeprefix(case + "."): t for n, t in golden.items() if n.startswith(case + ".")}
    weight = parts.pop("expected_weight")
    assert bits_equal(dequantise(parts, quant), weight)
    # as o of two heads of 128 and as q of four heads of 16
    o, q = tiny(2, 1, 128, 128, 64, quant), tiny(4, 1, 16, 128, 256, quant)
    for name, config in (("layers.0.self_attn.o_proj", o), ("layers.0.self_attn.q_proj", q)):
        packing, to = (
            Packing.read(config.quantization_config),
            layout(config, config.num_attention_heads + 1),
        )
        moved = {p: extend_part(f"{name}.{p}", t, to, packing) for p, t in parts.items()}
        assert bits_equal(dequantise(moved, quant), extend_tensor(name + ".weight", weight, to))
        for p, t in parts.items():
            assert torch.equal(shrink_part(f"{name}.{p}", moved[p], to, packing), t)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "H, K, H2, K2, recipe",
    [
        (7, 1, 8, 1, "ghost"),
        (7, 1, 8, 1, "zero"),
        (7, 1, 8, 1, "split"),
        (6, 2, 16, 4, "ghost"),
        (2, 1, 6, 1, "split"),
        (3, 3, 8, 4, "zero"),
        (3, 3, 8, 4, "ghost"),
        (6, 2, 6, 6, "ghost"),
    ],
)
def test_extending_commutes_with_dequantising(kind, H, K, H2, K2, recipe):
    quant, d, group, hidden = KINDS[kind], 16, 8, 24
    if recipe == "split" and quant.get("desc_act"):
        return
    config = tiny(H, K, d, group, hidden, quant)
    packing, to = Packing.read(config.quantization_config), layout(config, H2, K2, recipe=recipe)
    to.check()
    check_movable(packing, to)
    shapes = dict(
        zip(PROJECTIONS, ((hidden, H * d), (hidden, K * d), (hidden, K * d), (H * d, hidden)))
    )
    for seed, (projection, (inputs, outputs)) in enumerate(shapes.items()):
        name, parts = (
            f"model.layers.0.self_attn.{projection}",
            quantised(inputs, outputs, group, quant, seed),
        )
        moved = {p: extend_part(f"{name}.{p}", t, to, packing) for p, t in parts.items()}
        weight = dequantise(moved, quant)
        assert bits_equal(weight, extend_tensor(name + ".weight", dequantise(parts, quant), to))
        if projection == "o_proj":
            columns = weight.unflatten(1, (H2, d)).view(torch.int16)
            assert not any(columns[:, j].any() for j in range(H2) if not to.shares[j])
            if to.shares != (1.0,) * H:
                if "g_idx" in moved:  # every group is full, as kernels expect
                    assert torch.equal(
                        moved["g_idx"].bincount(), torch.full((H2 * d // group,), group)
                    )
                assert bool((moved["scales"] == 0).any()) == (0.0 in to.shares)
        for p, t in parts.items():
            assert torch.equal(shrink_part(f"{name}.{p}", moved[p], to, packing), t)
        assert all(moved[p].dtype == parts[p].dtype for p in parts)


def test_split_is_exact_down_to_the_subnormals_and_refused_below():
    config = tiny(2, 1, 8, 8, 8)
    packing, to = Packing.read(config.quantization_config), layout(config, 4, recipe="split")
    name = "l.self_attn.o_proj"
    parts = quantised(16, 8, 8, GPTQ, 0)
    for units in (2, 6, 1022, 2046, 2048, 2050, 4094):  # of 2**-24, fp16's smallest; all even
        parts["scales"] = torch.full((2, 8), units * 2.0**-24).half()
        moved = {p: extend_part(f"{name}.{p}", t, to, packing) for p, t in parts.items()}
        expected = extend_tensor(name + ".weight", dequantise(parts, GPTQ), to)
        assert torch.equal(dequantise(moved, GPTQ), expected)
    parts["scales"][1, 3] = 3 * 2.0**-24
    with pytest.raises(HeadsError, match="l.self_attn.o_proj.scales: 2 scales .* use ghost"):
        extend_part(name + ".scales", parts["scales"], to, packing)


@pytest.mark.parametrize("kind", ["awq", "gptq4", "gptq8", "gptq4_act"])
def test_a_checkpoint_there_and_back_is_the_same_model(kind, tmp_path):
    quant = KINDS[kind]
    config = tiny(quant=quant)
    tensors, (src, dst, back) = checkpoint(tmp_path / "a", config), (tmp_path / n for n in "abc")
    to = layout(config, 8, 2)
    extend_packed(src, dst, to, max_file_bytes=6000)
    extend_packed(src, dst, to, max_file_bytes=6000, overwrite=True)
    written = json.loads((dst / "config.json").read_text())
    assert (
        written["num_attention_heads"],
        written["num_key_value_heads"],
        written["head_dim"],
    ) == (8, 2, 16)
    assert written["quantization_config"] == config.quantization_config
    index = json.loads((dst / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert all(index[n] == f.name for f in dst.glob("*.safetensors") for n in load_file(f))
    assert (dst / "quantize_config.json").exists() and (dst / "tokenizer.json").exists()
    assert read_manifest(dst).layout == to
    moved = plain(read(dst), quant)
    for name, tensor in plain(tensors, quant).items():
        assert bits_equal(moved[name], extend_tensor(name, tensor, to)), name
    unquantised = config.replace(quantization_config=None)

    def run(c: ModelConfig, w: dict) -> torch.Tensor:
        net = Qwen2.from_tensors(c, lambda n, _: w[n], dtype=torch.float32, arithmetic="exact")
        return net(torch.arange(9)[None])

    assert torch.equal(
        run(unquantised, plain(tensors, quant)), run(extended_config(unquantised, to), moved)
    )
    shrink_packed(dst, back)
    again = read(back)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in tensors.items())
    assert json.loads((back / "config.json").read_text()) == json.loads(
        (src / "config.json").read_text()
    )
    assert not (back / MANIFEST).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]
    file = dst / index["model.layers.1.self_attn.o_proj.scales"]
    changed = load_file(file)
    changed["model.layers.1.self_attn.o_proj.scales"][-1, 0] += (
        1  # a slot that adds nothing no longer does
    )
    save_file(changed, file)
    with pytest.raises(HeadsError, match="layers.1.self_attn.o_proj.scales: has changed"):
        shrink_packed(dst, back, overwrite=True)
    assert read(back).keys() == tensors.keys()


def test_the_command_and_the_llama_layout(tmp_path):
    config = tiny(quant=AWQ)
    checkpoint(tmp_path / "a", config, files=1)
    arguments = ["extend", tmp_path / "a", tmp_path / "b", "--num-attention-heads", 4]
    code, out, err = heads_tool(*arguments, "--arch", "llama")
    assert code == 0 and "recipe ghost" in out, err
    tensors, written = read(tmp_path / "b"), json.loads((tmp_path / "b/config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"] and written["attention_bias"] is True
    assert torch.equal(tensors["model.layers.1.self_attn.o_proj.bias"], torch.zeros(32).half())
    assert heads_tool("shrink", tmp_path / "b", tmp_path / "c")[0] == 0
    assert read(tmp_path / "c").keys() == read(tmp_path / "a").keys()
    code, _, err = heads_tool(*arguments, "--recipe", "random")
    assert code == 2 and err.startswith("error: recipe random") and err.count("\n") == 1


@pytest.mark.parametrize(
    "change, options, said",
    [
        ({"group": 32}, {}, "head_dim 16 is not a multiple of the quantisation group 32"),
        ({"group": -1}, {}, "quantisation group -1"),
        (
            {"d": 12, "group": 12},
            {},
            "head_dim 12 is not a multiple of 8, the 4-bit numbers in a word",
        ),
        (
            {"d": 12, "group": 24, "quant": ACT | {"bits": 8}},
            {},
            "36 old and 12 new inputs of o_proj",
        ),
        (
            {"H": 2, "d": 8, "group": 32, "quant": ACT},
            {"num_attention_heads": 6},
            "16 old and 32 new inputs",
        ),
        ({"quant": ACT}, {"recipe": "split"}, "recipe split scales some heads"),
        ({}, {"recipe": "weighted", "alpha": 0.3}, "recipe weighted has the share 0.3"),
        ({}, {"recipe": "random"}, "recipe random"),
        ({}, {"intermediate_size": 32}, "padding the MLP"),
    ],
)
def test_what_cannot_be_moved_exactly_is_refused(change, options, said):
    config = tiny(**change)
    with pytest.raises(HeadsError) as error:
        to = layout(config, **({"num_attention_heads": 4} | options))
        check_movable(Packing.read(config.quantization_config), to)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_half_billion_models_keep_o_where_only_kv_heads_are_copied():
    config = tiny(14, 2, 64, 128, 896)
    packing = Packing.read(config.quantization_config)
    with pytest.raises(
        HeadsError, match="head_dim 64 is not a multiple of the quantisation group 128"
    ):
        check_movable(packing, layout(config, 16))
    check_movable(packing, layout(config, 14, 14))  # o is untouched


def test_a_damaged_source_is_refused_and_nothing_written(tmp_path):
    config = tiny()
    tensors, to, prefix = (
        checkpoint(tmp_path / "a", config),
        layout(config, 4),
        "model.layers.1.self_attn.",
    )

    def refused(said: str, drop: str = "", **changes: torch.Tensor) -> None:
        for file in (tmp_path / "a").glob("*.safetensors"):
            file.unlink()
        (tmp_path / "a/model.safetensors.index.json").unlink(missing_ok=True)
        kept = tensors | {prefix + n.replace("__", "."): t for n, t in changes.items()}
        kept.pop(prefix + drop, None)
        save_file(kept, tmp_path / "a/model.safetensors")
        with pytest.raises(MinqwenError) as error:
            extend_packed(tmp_path / "a", tmp_path / "b", to)
        assert said in str(error.value) and "\n" not in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ["a"]

    refused("q_proj.scales is missing", drop="q_proj.scales")
    refused("k_proj.bias is missing", drop="k_proj.bias")
    refused(
        "v_proj.qweight has shape (4, 8), expected (4, 16)",
        v_proj__qweight=torch.zeros(4, 8, dtype=torch.int32),
    )
    refused("q_proj.weight_scale has shape", q_proj__weight_scale=torch.ones(1))
    refused(
        "o_proj.g_idx: is not in order, expected input // 16 since desc_act is false",
        o_proj__g_idx=torch.arange(48).flip(0).int() // 16,
    )
    refused("dtype I64", o_proj__g_idx=torch.arange(48) // 16)
    save_file(tensors, tmp_path / "a/model.safetensors")
    with pytest.raises(HeadsError, match="no minqwen_heads.json"):
        shrink_packed(tmp_path / "a", tmp_path / "b")
    extend_packed(tmp_path / "a", tmp_path / "b", to)
    with pytest.raises(HeadsError, match="extended already"):
        extend_packed(tmp_path / "b", tmp_path / "c", layout(tiny(4, 1), 5))
