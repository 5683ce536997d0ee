"""LoRA adapters that follow an extension: merging and extending commute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tool import run_tool_here

from minqwen.checkpoint import write_checkpoint
from minqwen.config import ModelConfig
from minqwen.errors import HeadsError
from minqwen.heads.adapter import extend_adapter
from minqwen.heads.convert import extend
from minqwen.heads.layout import RECIPES, extended_config, layout
from minqwen.heads.tensors import extend_tensor
from minqwen.model import Qwen2


def heads_tool(*arguments: object) -> tuple[int, str, str]:
    """tools/heads.py in this process: (exit code, stdout, stderr)."""
    done = run_tool_here("heads.py", *arguments)
    return done.code, done.out, done.err


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
    [{"recipe": r, "alpha": 0.3} for r in RECIPES]
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


def test_the_adapter_command_and_peft_itself(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config, weights = model()
    write_checkpoint(tmp_path / "a", config, ((n, w.float()) for n, w in weights.items()))
    extend(tmp_path / "a", tmp_path / "b", layout(config, 16, 4, recipe="split"))
    adapter(tmp_path / "l", config, dtype=torch.float32)
    code, _, err = heads_tool(
        "extend-adapter", tmp_path / "l", tmp_path / "m", "--base", tmp_path / "b"
    )
    assert code == 0, err
    code, _, err = heads_tool(
        "extend-adapter", tmp_path / "l", tmp_path / "n", "--base", tmp_path / "a"
    )
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
