"""Heads moved in quantised words and in LoRA factors: as if the weights they stand for were moved.

The dequantiser here is its own, number by number out of the words, and is itself held to golden vectors that
AutoAWQ's and AutoGPTQ's code computed (data/quant_golden.safetensors: in 256, out 64, group 128).
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from minqwen.lab.heads import HeadsError, extend_tensor, extended_config, layout
from minqwen.lab.packed_heads import (
    Packing,
    extend_adapter,
    extend_packed,
    extend_part,
    shrink_packed,
    shrink_part,
)
from safetensors.torch import load_file, save_file
from support.paths import ROOT

from minqwen import ModelConfig, Qwen2
from minqwen.errors import MinqwenError
from minqwen.lab import heads

AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": True}
GPTQ8, V2, ACT = GPTQ | {"bits": 8}, {"checkpoint_format": "gptq_v2"}, GPTQ | {"desc_act": True}
KINDS = {
    "awq": AWQ,
    "gptq4": GPTQ,
    "gptq8": GPTQ8,
    "gptq4_v2": GPTQ | V2,
    "gptq8_v2": GPTQ8 | V2,
    "gptq4_act": ACT,
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def dequantise(parts: dict, quant: dict) -> torch.Tensor:
    """[out, in] in the scales' dtype. numpy's shifts on unsigned words; no code in common with minqwen."""
    bits = quant["bits"]

    def numbers(words: torch.Tensor, axis: int, order: list[int]) -> np.ndarray:
        w = words.numpy().view(np.uint32)
        fields = np.stack(
            [(w >> np.uint32(bits * i)) & np.uint32(2**bits - 1) for i in order], axis=axis + 1
        )
        shape = [n * (len(order) if a == axis else 1) for a, n in enumerate(w.shape)]
        return fields.reshape(shape).astype(np.int64)

    straight = list(range(32 // bits))
    if quant["quant_method"] == "awq":
        q, z = (numbers(parts[p], 1, [0, 4, 1, 5, 2, 6, 3, 7]) for p in ("qweight", "qzeros"))
    else:
        q, z = numbers(parts["qweight"], 0, straight), numbers(parts["qzeros"], 1, straight)
        z = (z + (quant.get("checkpoint_format", "gptq") == "gptq")) % 2**bits
    group = (
        np.arange(len(q)) // (len(q) // len(z)) if "g_idx" not in parts else parts["g_idx"].numpy()
    )
    w = (
        torch.from_numpy(q - z[group]).to(parts["scales"].dtype)
        * parts["scales"][torch.from_numpy(group)]
    )
    return w.T.contiguous()


def quantised(
    inputs: int, outputs: int, group: int, quant: dict, seed: int
) -> dict[str, torch.Tensor]:
    """Any words and any positive scales are a quantised linear."""
    g, pack, groups = torch.Generator().manual_seed(seed), 32 // quant["bits"], inputs // group
    words = lambda *shape: torch.randint(-(2**31), 2**31, shape, generator=g).int()
    awq = quant["quant_method"] == "awq"
    parts = {
        "qweight": words(inputs, outputs // pack) if awq else words(inputs // pack, outputs),
        "qzeros": words(groups, outputs // pack),
        "scales": (torch.rand(groups, outputs, generator=g) * 0.03 + 1e-3).half(),
    }
    if not awq:
        order = torch.randperm(inputs, generator=g) if quant["desc_act"] else torch.arange(inputs)
        parts["g_idx"] = (order // group).int()
    return parts


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.view(torch.int16), b.view(torch.int16))
    )


def tiny(
    H: int = 3, K: int = 1, d: int = 16, group: int = 16, hidden: int = 32, quant: dict = GPTQ
) -> ModelConfig:
    return ModelConfig.from_dict(
        dict(
            model_type="qwen2",
            architectures=["Qwen2ForCausalLM"],
            hidden_act="silu",
            max_position_embeddings=64,
            vocab_size=61,
            hidden_size=hidden,
            intermediate_size=24,
            eos_token_id=0,
            num_hidden_layers=2,
            num_attention_heads=H,
            num_key_value_heads=K,
            head_dim=d,
            torch_dtype="float16",
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            tie_word_embeddings=False,
            quantization_config=quant | {"group_size": group},
        )
    )


def checkpoint(path: Path, config: ModelConfig, shards: int = 2) -> dict[str, torch.Tensor]:
    quant, g = config.quantization_config, torch.Generator().manual_seed(1)
    tensors = {}
    for i, (name, shape) in enumerate(config.parameter_shapes().items()):
        stem, _, part = name.rpartition(".")
        if part == "weight" and stem.endswith(PROJECTIONS):
            parts = quantised(shape[1], shape[0], quant["group_size"], quant, i)
            tensors |= {f"{stem}.{p}": t for p, t in parts.items()}
        else:
            tensors[name] = (torch.randn(shape, generator=g) * 0.3 + ("norm" in name)).half()
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    (path / "quantize_config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return tensors


def read(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(path.glob("*.safetensors")) for n, t in load_file(f).items()}


def plain(tensors: dict, quant: dict) -> dict[str, torch.Tensor]:
    """The unquantised checkpoint that a quantised one stands for."""
    out = {n: t for n, t in tensors.items() if n.rpartition(".")[2] in ("weight", "bias")}
    for name in tensors:
        if name.endswith(".qweight"):
            stem = name.removesuffix(".qweight")
            parts = {
                p: tensors.get(f"{stem}.{p}") for p in ("qweight", "qzeros", "scales", "g_idx")
            }
            parts = {p: t for p, t in parts.items() if t is not None}
            out[stem + ".weight"] = dequantise(parts, quant)
    return out


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
    golden = load_file(ROOT / "tests/data/quant_golden.safetensors")
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
    packing.check(to)
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
    extend_packed(src, dst, to, max_shard_bytes=6000)
    extend_packed(src, dst, to, max_shard_bytes=6000)  # what is there, a checkpoint, is replaced
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
    assert heads.read_manifest(dst)["layout"] == to
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
    assert not (back / heads.MANIFEST).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]
    file = dst / index["model.layers.1.self_attn.o_proj.scales"]
    changed = load_file(file)
    changed["model.layers.1.self_attn.o_proj.scales"][-1, 0] += (
        1  # a slot that adds nothing no longer does
    )
    save_file(changed, file)
    with pytest.raises(HeadsError, match="layers.1.self_attn.o_proj.scales: has changed"):
        shrink_packed(dst, back)
    assert read(back).keys() == tensors.keys()


def test_the_command_and_the_llama_layout(tool, tmp_path):
    config = tiny(quant=AWQ)
    checkpoint(tmp_path / "a", config, shards=1)
    arguments = ["extend", tmp_path / "a", tmp_path / "b", "--num-attention-heads", 4]
    code, out, err = tool(*arguments, "--arch", "llama")
    assert code == 0 and "recipe ghost" in out, err
    tensors, written = read(tmp_path / "b"), json.loads((tmp_path / "b/config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"] and written["attention_bias"] is True
    assert torch.equal(tensors["model.layers.1.self_attn.o_proj.bias"], torch.zeros(32).half())
    assert tool("shrink", tmp_path / "b", tmp_path / "c")[0] == 0
    assert read(tmp_path / "c").keys() == read(tmp_path / "a").keys()
    code, _, err = tool(*arguments, "--recipe", "random")
    assert code == 2 and err.startswith("error: recipe random") and err.count("\n") == 1


@pytest.fixture
def tool(monkeypatch, capsys):
    """tools/heads.py in this process: arguments -> (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["heads.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / "tools/heads.py"), run_name="__main__")
        return done.value.code or 0, *capsys.readouterr()

    return run


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
        ({"quant": AWQ | {"version": "gemv"}}, {}, "'awq' 'gemv' with 4 bits"),
        ({"quant": GPTQ | {"bits": 3}}, {}, "with 3 bits"),
        ({"quant": {"quant_method": "compressed-tensors"}}, {}, "compressed-tensors"),
        ({"quant": GPTQ, "group": "128"}, {}, "group_size is '128'"),
    ],
)
def test_what_cannot_be_moved_exactly_is_refused(change, options, said):
    config = tiny(**change)
    with pytest.raises(HeadsError) as error:
        to = layout(config, **({"num_attention_heads": 4} | options))
        Packing.read(config.quantization_config).check(to)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_half_billion_models_keep_o_where_only_kv_heads_are_copied():
    config = tiny(14, 2, 64, 128, 896)
    packing = Packing.read(config.quantization_config)
    with pytest.raises(
        HeadsError, match="head_dim 64 is not a multiple of the quantisation group 128"
    ):
        packing.check(layout(config, 16))
    packing.check(layout(config, 14, 14))  # o is untouched


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


# ---- LoRA --------------------------------------------------------------------------------------------------

TARGETS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


def adapter(path: Path, config: ModelConfig, rank: int = 3, dtype=torch.float64, **changes) -> dict:
    g, tensors, shapes = torch.Generator().manual_seed(5), {}, config.parameter_shapes()
    for layer in range(config.num_hidden_layers):
        for target, block in TARGETS.items():
            name = f"model.layers.{layer}.{block}.{target}"
            out, inputs = shapes[name + ".weight"]
            for side, shape in (("A", (rank, inputs)), ("B", (out, rank))):
                factor = torch.randn(shape, generator=g, dtype=dtype) * 0.2
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = factor
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(
        json.dumps(
            dict(
                peft_type="LORA",
                task_type="CAUSAL_LM",
                base_model_name_or_path="a",
                r=rank,
                lora_alpha=6,
                target_modules=sorted(TARGETS),
                modules_to_save=None,
                lora_dropout=0.0,
                use_dora=False,
                init_lora_weights=True,
                bias="none",
            )
            | changes
        )
    )
    return tensors


def merged(weights: dict, tensors: dict, scale: float = 2.0) -> dict[str, torch.Tensor]:
    out = dict(weights)
    for name, a in tensors.items():
        if ".lora_A." in name:
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            out[weight] = weights[weight] + scale * tensors[name.replace("lora_A", "lora_B")] @ a
    return out


def model(H: int = 6, K: int = 2) -> tuple[ModelConfig, dict]:
    config = ModelConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=8,
        dtype="float32",
        tie_word_embeddings=False,
    )
    g = torch.Generator().manual_seed(2)
    shapes = config.parameter_shapes()
    return config, {
        n: torch.randn(s, generator=g, dtype=torch.float64) * 0.3 for n, s in shapes.items()
    }


@pytest.mark.parametrize(
    "options",
    [{"recipe": r, "alpha": 0.3} for r in heads.RECIPES]
    + [
        {"num_key_value_heads": 4, "num_attention_heads": 16},
        {"num_key_value_heads": 3, "num_attention_heads": 12, "recipe": "split"},
        {"intermediate_size": 48, "intermediate_block": 4},
    ],
)
def test_merging_an_adapter_commutes_with_extending(options, tmp_path):
    config, weights = model()
    to = layout(config, **({"num_attention_heads": 8} | options))
    tensors = adapter(tmp_path / "l", config)
    extend_adapter(tmp_path / "l", tmp_path / "m", to, base="wide")
    moved = load_file(tmp_path / "m/adapter_model.safetensors")
    assert moved.keys() == tensors.keys() and all(t.dtype == torch.float64 for t in moved.values())
    extended = {n: extend_tensor(n, w, to) for n, w in weights.items()}
    one = {n: extend_tensor(n, w, to) for n, w in merged(weights, tensors).items()}
    other = merged(extended, moved)
    for name in one:
        rows = slice(None)
        if to.recipe == "random" and "q_proj.weight" in name:  # noise has the spread of its weights
            rows = torch.tensor([h is not None for h in to.heads]).repeat_interleave(to.head_dim)
        assert (one[name][rows] - other[name][rows]).abs().max() <= 1e-12, name

    def run(c: ModelConfig, w: dict) -> torch.Tensor:
        return Qwen2.from_tensors(c, lambda n, _: w[n], dtype=torch.float64)(torch.arange(9)[None])

    expected, got = run(config, merged(weights, tensors)), run(extended_config(config, to), other)
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    before, after = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in "lm")
    assert before | {"base_model_name_or_path": "wide"} == after


def test_the_adapter_command_and_peft_itself(tool, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from minqwen.checkpoint import write_checkpoint

    config, weights = model()
    write_checkpoint(tmp_path / "a", config, ((n, w.float()) for n, w in weights.items()))
    heads.extend(tmp_path / "a", tmp_path / "b", layout(config, 16, 4, recipe="split"))
    adapter(tmp_path / "l", config, dtype=torch.float32)
    code, _, err = tool("extend-adapter", tmp_path / "l", tmp_path / "m", "--base", tmp_path / "b")
    assert code == 0, err
    code, _, err = tool("extend-adapter", tmp_path / "l", tmp_path / "n", "--base", tmp_path / "a")
    assert code == 2 and "minqwen_heads.json" in err and err.count("\n") == 1
    ids, logits = torch.arange(9)[None], []
    for base, lora in (("a", "l"), ("b", "m")):
        net = AutoModelForCausalLM.from_pretrained(
            tmp_path / base, attn_implementation="eager"
        ).double()
        bare = net(ids).logits
        net = peft.PeftModel.from_pretrained(
            net, tmp_path / lora, autocast_adapter_dtype=False
        ).double()
        logits.append(net(ids).logits)
        assert (logits[-1] - bare).abs().max() > 0.1  # the adapter does something
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[
        0
    ].abs().max()  # its norms are in float32


def test_adapters_that_are_no_plain_lora_are_refused(tmp_path):
    config, _ = model()
    to = layout(config, 8)
    cases = [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "LORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ]
    for i, (change, said) in enumerate(cases):
        adapter(tmp_path / f"l{i}", config, **change)
        with pytest.raises(HeadsError) as error:
            extend_adapter(tmp_path / f"l{i}", tmp_path / "m", to)
        assert (
            said in str(error.value)
            and "\n" not in str(error.value)
            and not (tmp_path / "m").exists()
        )
    tensors = adapter(tmp_path / "ok", config)
    extend_adapter(tmp_path / "ok", tmp_path / "m", to)
    with pytest.raises(
        HeadsError, match="o_proj.lora_A.weight has shape .* expected 48 along dimension 1"
    ):
        extend_adapter(tmp_path / "m", tmp_path / "n", to)
    with pytest.raises(HeadsError, match="exists"):
        extend_adapter(tmp_path / "ok", tmp_path / "m", to)
    tensors["base_model.model.lm_head.weight"] = torch.ones(1)
    save_file(tensors, tmp_path / "ok/adapter_model.safetensors")
    with pytest.raises(HeadsError, match="lm_head.weight is no part of a plain LoRA"):
        extend_adapter(tmp_path / "ok", tmp_path / "n", to)
    with pytest.raises(HeadsError, match="adapter_config.json"):
        extend_adapter(tmp_path, tmp_path / "n", to)
