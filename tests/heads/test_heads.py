"""Head extension: right recipes change nothing, wrong ones are caught where they were predicted to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minqwen.lab.controls import CONTROLS
from minqwen.lab.heads import (
    HeadsError,
    Layout,
    extend_tensor,
    extended_config,
    layout,
    shrink_tensor,
)
from support.paths import ROOT
from support.torchrun import torchrun
from transformers import AutoModelForCausalLM

from minqwen import Checkpoint, ModelConfig, Qwen2
from minqwen.errors import MinqwenError
from minqwen.lab import heads
from minqwen.lab.verify import compare, inspect_layer, problems

IDS = torch.tensor([[5, 30, 17, 42, 90, 11, 7, 3, 60, 61]])
SHAPES = [
    (28, 4),
    (14, 2),
    (12, 2),
    (16, 2),
    (40, 8),
    (64, 8),
    (6, 3),
    (5, 1),
    (9, 9),
]  # the official ones and odd ones


def random_model(
    H: int, K: int, d: int = 8, seed: int = 0, dtype=torch.float32, inter: int = 48
) -> tuple[ModelConfig, dict]:
    config = ModelConfig(
        vocab_size=97,
        hidden_size=40,
        intermediate_size=inter,
        num_hidden_layers=2,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=d,
        dtype=str(dtype).removeprefix("torch."),
    )
    g = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.parameter_shapes().items():
        w = torch.randn(shape, generator=g) * (0.3 if len(shape) == 2 else 0.5)
        weights[name] = (w + 1 if "norm" in name else w).to(dtype)
    return config, weights


def build(config: ModelConfig, weights: dict, **options) -> Qwen2:
    return Qwen2.from_tensors(config, lambda name, shard: weights[name].clone(), **options)


def extended(config: ModelConfig, weights: dict, to: Layout) -> tuple[ModelConfig, dict]:
    to.check()
    return extended_config(config, to), {n: extend_tensor(n, w, to) for n, w in weights.items()}


def test_the_7bs_slot_map_and_cost_by_hand():
    config = ModelConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    )
    best = heads.plan(config, tensor_parallel_size=8)[0]
    assert best.layout.heads == (
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        0,
        7,
        8,
        9,
        10,
        11,
        12,
        13,
        7,
        14,
        15,
        16,
        17,
        18,
        19,
        20,
        14,
        21,
        22,
        23,
        24,
        25,
        26,
        27,
        21,
    )
    assert best.layout.shares == ((1.0,) * 7 + (0.0,)) * 4 and best.layout.kv == (0, 1, 2, 3)
    # 28 layers x 4 heads x 128 x (3,584 rows of q + 3,584 columns of o + 1 bias)
    assert best.cost.parameters == 28 * 4 * 128 * (3584 + 3584 + 1) == 102_774_784
    assert best.cost.kv_bytes == config.kv_bytes_per_token("bfloat16") == 57_344
    assert (
        best.config.num_attention_heads,
        best.config.num_key_value_heads,
        best.config.head_dim,
    ) == (32, 4, 128)
    assert 8 in best.degrees and heads.attention_macs(best.config, 10**9) / heads.attention_macs(
        config, 10**9
    ) == (pytest.approx(32 / 28, rel=1e-4))
    assert "112 instead of 128" in " ".join(best.notes)
    replicated = layout(config, 32, 8)
    assert replicated.kv == (0, 0, 1, 1, 2, 2, 3, 3) and replicated.heads[:8] == (
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        0,
    )
    for refused in ((30, None), (28, 3), (28, 8), (None, 2)):
        with pytest.raises(HeadsError):
            layout(config, *refused)
    with pytest.raises(HeadsError, match="two heads"):
        heads.plan(config.replace(head_dim=64), tensor_parallel_size=8, quant_group=128)


@pytest.mark.parametrize("H, K", SHAPES)
def test_right_recipes_in_float64_and_bitwise_under_exact(H, K):
    config, weights = random_model(H, K)
    truth = build(config, weights, dtype=torch.float64)(IDS)
    exact = build(config, weights, arithmetic="exact")(IDS)
    G = H // K
    targets = [
        (K * (G + 1), K),
        (K * (G + 1), 2 * K) if (G + 1) % 2 == 0 else (2 * K * G, 2 * K),
        (H, H),
        (K * (G + 3), K),
    ]
    for H2, K2 in targets:
        for recipe in heads.RECIPES:
            c, w = extended(
                config, weights, layout(config, H2, K2, recipe=recipe, alpha=0.3, seed=1)
            )
            out = build(c, w, dtype=torch.float64)(IDS)
            error = float((out - truth).abs().max() / truth.abs().max())
            # A weighted share of float32 weights is rounded to float32, but the two still add up to the original.
            assert error < 1e-13, (H2, K2, recipe, error)
            if recipe in ("ghost", "zero", "random"):
                assert torch.equal(build(c, w, arithmetic="exact")(IDS), exact), (H2, K2, recipe)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(0, 6),
    st.sampled_from(list(heads.RECIPES)),
    st.integers(0, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 9),
)
def test_extending_and_shrinking_gives_every_byte_back(
    K, G, copies, more, recipe, dead, dtype, pad
):
    config, weights = random_model(K * G, K, d=2, dtype=dtype, seed=G)
    K2 = K * copies + (dead if dead < K else 0)
    slots = -(-G // (K2 // K)) + more
    to = layout(
        config, K2 * slots, K2, recipe=recipe, alpha=0.7, seed=3, intermediate_size=48 + pad
    )
    c, w = extended(config, weights, to)
    assert {n: tuple(t.shape) for n, t in w.items()} == c.parameter_shapes()
    assert Layout.from_dict(json.loads(json.dumps(to.to_dict()))) == to
    for name, tensor in w.items():
        source, residuals = shrink_tensor(name, tensor, to)
        assert torch.equal(source, weights[name]) and source.dtype == dtype and not residuals, name


def test_padding_the_mlp_changes_nothing():
    config, weights = random_model(6, 3)
    to = layout(config, intermediate_size=56, intermediate_block=2)
    assert to.intermediate[:6] == (0, 1, None, 2, 3, None) and to.intermediate[-1] == 47
    c, w = extended(config, weights, to)
    assert torch.equal(
        build(c, w, arithmetic="exact")(IDS), build(config, weights, arithmetic="exact")(IDS)
    )


def test_every_control_is_caught_with_the_predicted_heads(embedded):
    source = Checkpoint(embedded)
    config, weights = source.config, {n: source.read(n) for n in source.names}
    late = [7, 14, 15, 21, 22, 23]  # j // 8 for the old slots 0..27 in four groups of eight
    ids = torch.arange(40, 72)[None]
    original, truth = build(config, weights), build(config, weights, dtype=torch.float64)
    predicted = {
        "append-zero": (late, "attention"),
        "append-copy": ([0, 1, 2, 3, *late], "attention"),
        "append-halved": ([0, 1, 2, 3, *late], "attention"),
        "no-split": ([], "o"),
        "forget-bias": ([], "q"),
    }
    for name, (wrong, stage) in predicted.items():
        c, w = CONTROLS[name](config, weights)
        maps = [
            inspect_layer(config, c, weights.__getitem__, w.__getitem__, i)
            for i in range(config.num_hidden_layers)
        ]
        assert all(m.wrong_kv == wrong for m in maps), name
        if name == "no-split":
            assert all(set(m.wrong_sum) == {0, 7, 14, 21} for m in maps)
            assert all(e == pytest.approx(1.0) for m in maps for e in m.wrong_sum.values())
        report = compare(original, build(c, w), truth, ids, maps, greedy_tokens=2)
        assert report.verdict == "different" and (report.first_layer, report.first_stage) == (
            0,
            stage,
        ), name
        assert report.units > 1000 and problems(maps)
    c, w = CONTROLS["article"](config, weights)
    with pytest.raises(AssertionError):  # 32 heads of q rows, a config that says 28
        build(c, w)
    c, w = CONTROLS["derive-head-dim"](config, weights)
    assert c.head_dim == 14 and {n: tuple(t.shape) for n, t in w.items()} == c.parameter_shapes()
    assert float((build(c, w)(ids) - original(ids)).abs().max()) > 0.1


def test_right_recipes_on_the_embedded_model_in_every_dtype(embedded):
    source = Checkpoint(embedded)
    config, weights = source.config, {n: source.read(n) for n in source.names}
    ids, truth = torch.arange(40, 72)[None], build(config, weights, dtype=torch.float64)
    originals = [
        build(config, weights, dtype=d) for d in (torch.float64, torch.float32, torch.bfloat16)
    ]
    for recipe in heads.RECIPES:
        c, w = extended(config, weights, layout(config, 32, 4, recipe=recipe, alpha=0.3))
        maps = [
            inspect_layer(config, c, weights.__getitem__, w.__getitem__, i)
            for i in range(config.num_hidden_layers)
        ]
        assert all(m.right for m in maps) and not problems(maps)
        for original in originals:
            report = compare(
                original, build(c, w, dtype=original.dtype), truth, ids, maps, greedy_tokens=2
            )
            assert report.same and report.units < 1.5 and report.first_stage is None, (
                recipe,
                report.dtype,
                report.units,
            )


def test_checkpoints_there_and_back_and_in_transformers(embedded, tmp_path, embedded_model):
    config = ModelConfig.from_json(embedded)
    ids = torch.arange(40, 60)[None]
    logits = embedded_model(ids)
    for arch, K2 in (("qwen2", 4), ("llama", 8)):
        dst, back = tmp_path / arch, tmp_path / f"{arch}-back"
        heads.extend(
            embedded,
            dst,
            layout(config, 32, K2, recipe="split"),
            arch=arch,
            max_shard_bytes=5 * 10**6,
        )
        assert (dst / "model.safetensors.index.json").exists() and (dst / "tokenizer.json").exists()
        written = json.loads((dst / "config.json").read_text())
        assert (written["head_dim"], written["num_attention_heads"], written["model_type"]) == (
            16,
            32,
            arch,
        )
        oracle, info = AutoModelForCausalLM.from_pretrained(
            dst, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert (
            type(oracle).__name__
            == {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[arch]
        )
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            torch.testing.assert_close(oracle(ids).logits, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            Qwen2.from_pretrained(dst, dtype="float32")(ids), logits, rtol=1e-4, atol=1e-4
        )
        with pytest.raises(HeadsError, match="extended already"):
            heads.extend(dst, tmp_path / "twice", layout(config, 32, K2))
        heads.shrink(dst, back)
        a, b = Checkpoint(embedded), Checkpoint(back)
        assert a.config == b.config and not (back / heads.MANIFEST).exists()
        assert all(torch.equal(a.read(n), b.read(n)) and a.dtype(n) == b.dtype(n) for n in a.names)


def test_a_killed_extension_goes_on_where_it_was(embedded, tmp_path, monkeypatch):
    to = layout(ModelConfig.from_json(embedded), 32)
    code = f"""
import os, signal
from minqwen.lab import heads
from minqwen import ModelConfig
real, calls = heads.extend_tensor, []
def mortal(*args):
    calls.append(1)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
heads.extend_tensor = mortal
heads.extend({str(embedded)!r}, {str(tmp_path / "wide")!r}, heads.layout(ModelConfig.from_json({str(embedded)!r}), 32))
"""
    killed = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert killed.returncode == -9 and not (tmp_path / "wide").exists()
    extended_again = []
    monkeypatch.setattr(
        heads, "extend_tensor", lambda n, *a: extended_again.append(n) or extend_tensor(n, *a)
    )
    heads.extend(embedded, tmp_path / "wide", to)
    heads.extend(embedded, tmp_path / "whole", to)
    total = len(Checkpoint(embedded).names)
    assert len(extended_again) == (total - 19) + total
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole", "wide"]
    for file in sorted(p.name for p in (tmp_path / "whole").iterdir()):
        assert (tmp_path / "wide" / file).read_bytes() == (
            tmp_path / "whole" / file
        ).read_bytes(), file


@pytest.mark.parametrize(
    "name, slot",
    [("q_proj.weight", 7), ("q_proj.bias", 15), ("o_proj.weight", 7), ("o_proj.weight", 31)],
)
def test_one_ulp_of_drift_is_refused(name, slot):
    config, weights = random_model(28, 4, d=2)
    to = layout(config, 32, recipe="split" if slot == 7 else "ghost")
    full = f"model.layers.0.self_attn.{name}"
    tensor = extend_tensor(full, weights[full], to)
    place = (
        tensor[slot * 2 : slot * 2 + 1]
        if name != "o_proj.weight"
        else tensor[:1, slot * 2 : slot * 2 + 1]
    )
    place.copy_(torch.nextafter(place, torch.tensor(9.0)))
    _, residuals = shrink_tensor(full, tensor, to)
    assert residuals and all(r < 1e-6 for r in residuals.values())


def test_mutations_are_seen():
    config, weights = random_model(28, 4)
    to = layout(config, 32, recipe="split")
    c, right = extended(config, weights, to)
    p = "model.layers.1.self_attn."

    def swapped(w, name, dim):
        blocks = w[p + name].unflatten(dim, (32, 8)).clone()
        index = list(range(32))
        index[3], index[12] = 12, 3
        return {**w, p + name: blocks.index_select(dim, torch.tensor(index)).flatten(dim, dim + 1)}

    mutations = {
        "a dropped k bias": {
            **right,
            p + "k_proj.bias": torch.zeros_like(right[p + "k_proj.bias"]),
        },
        "a dropped bias": {**right, p + "q_proj.bias": torch.zeros_like(right[p + "q_proj.bias"])},
        "two slots swapped": swapped(
            swapped(swapped(right, "q_proj.weight", 0), "q_proj.bias", 0), "o_proj.weight", 1
        ),
        "one column not split": {**right, p + "o_proj.weight": right[p + "o_proj.weight"].clone()},
    }
    mutations["one column not split"][p + "o_proj.weight"][:, 0:8] *= 2
    assert inspect_layer(config, c, weights.__getitem__, right.__getitem__, 1).right
    assert inspect_layer(
        config, c, weights.__getitem__, mutations["a dropped k bias"].__getitem__, 1
    ).wrong_kv_bias == [0, 1, 2, 3]
    for name, w in mutations.items():
        assert not inspect_layer(config, c, weights.__getitem__, w.__getitem__, 1).right, name
        assert inspect_layer(config, c, weights.__getitem__, w.__getitem__, 0).right


def test_training_on():
    """Ghosts' o columns receive gradient (they wake up), split twins receive equal ones, dead groups none."""
    config, weights = random_model(6, 3)

    def gradients(to: Layout) -> dict:
        c, w = extended(config, weights, to)
        model = build(c, w).requires_grad_(True)
        model(IDS).log_softmax(-1)[0, :-1].gather(-1, IDS[0, 1:, None]).mean().backward()
        return {n: t.grad for n, t in model.named_parameters()}

    p = "model.layers.0.self_attn."
    ghost = gradients(layout(config, 9, 3))
    assert ghost[p + "o_proj.weight"].unflatten(1, (9, 8))[:, 2].abs().max() > 1e-6
    assert (
        ghost[p + "q_proj.weight"].unflatten(0, (9, 8))[2].abs().max() == 0
    )  # until its o columns have moved
    split = gradients(layout(config, 9, 3, recipe="split"))
    q, o = (
        split[p + "q_proj.weight"].unflatten(0, (9, 8)),
        split[p + "o_proj.weight"].unflatten(1, (9, 8)),
    )
    torch.testing.assert_close(q[0], q[2], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(o[:, 0], o[:, 2], rtol=1e-5, atol=1e-8)
    dead = gradients(layout(config, 8, 4, recipe="zero"))
    assert (
        dead[p + "k_proj.weight"][24:].abs().max() == 0
        and dead[p + "v_proj.weight"][24:].abs().max() == 0
    )


def test_eight_ranks_say_what_one_says(embedded, tmp_path):
    config = ModelConfig.from_json(embedded)
    heads.extend(embedded, tmp_path / "wide", layout(config, 32))
    flags = [
        "--prompt",
        "In the beginning",
        "--max-tokens",
        "8",
        "--temperature",
        "0",
        "--dtype",
        "float32",
        "--no-stream",
    ]
    result = torchrun(8, ROOT / "tools" / "generate.py", ["--model", tmp_path / "wide", *flags])
    assert result.returncode == 0, result.stderr
    alone = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "generate.py"), *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.stdout == alone.stdout and alone.stdout.strip()


def test_the_command_line(embedded, tmp_path):
    def tool(*args, code: int = 0) -> str:
        result = subprocess.run(
            [sys.executable, str(ROOT / "tools" / "heads.py"), *map(str, args)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        assert result.returncode == code, result.stderr + result.stdout
        assert "Traceback" not in result.stderr
        return result.stdout + result.stderr

    assert "--num-attention-heads 32" in tool("plan", embedded, "--tp", 8)
    said = tool("extend", embedded, tmp_path / "wide", "--num-attention-heads", 32)
    assert "KV  3 = head 3" in said and "vLLM" in said
    page, facts = tmp_path / "page.html", tmp_path / "report.json"
    said = tool(
        "verify",
        embedded,
        tmp_path / "wide",
        "--arithmetic",
        "exact",
        "--html",
        page,
        "--json",
        facts,
    )
    assert (
        said.startswith("bitwise: error 1 times")
        and json.loads(facts.read_text())["verdict"] == "bitwise"
    )
    assert "bitwise" in page.read_text()
    assert "error: " in tool(
        "extend", embedded, tmp_path / "no", "--num-attention-heads", 30, code=2
    )
    assert not (tmp_path / "no").exists()
    assert "error: " in tool("shrink", embedded, tmp_path / "no", code=2)


def test_errors_are_mistakes_told_in_one_line():
    assert issubclass(HeadsError, MinqwenError)
