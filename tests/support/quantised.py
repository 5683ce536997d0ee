"""Small AWQ and GPTQ checkpoints, and a dequantiser that shares no code with minqwen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from minqwen.config import ModelConfig

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
LINEARS = (*PROJECTIONS, "gate_proj", "up_proj", "down_proj")  # what official checkpoints quantise


def dequantise(parts: dict, quant: dict) -> torch.Tensor:
    """[out, in] in the dtype of the scales, by numpy's shifts on unsigned words."""
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
    H: int = 3,
    K: int = 1,
    d: int = 16,
    group: int = 16,
    hidden: int = 32,
    quant: dict = GPTQ,
    width: int = 24,
) -> ModelConfig:
    return ModelConfig.from_dict(
        dict(
            model_type="qwen2",
            architectures=["Qwen2ForCausalLM"],
            hidden_act="silu",
            max_position_embeddings=64,
            vocab_size=61,
            hidden_size=hidden,
            intermediate_size=width,
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


def checkpoint(
    path: Path, config: ModelConfig, files: int = 2, linears: tuple[str, ...] = PROJECTIONS
) -> dict[str, torch.Tensor]:
    """Write a random checkpoint in which these layers are quantised; its tensors."""
    quant, g = config.quantization_config, torch.Generator().manual_seed(1)
    tensors = {}
    for i, (name, shape) in enumerate(config.parameter_shapes().items()):
        stem, _, part = name.rpartition(".")
        if part == "weight" and stem.endswith(linears):
            parts = quantised(shape[1], shape[0], quant["group_size"], quant, i)
            tensors |= {f"{stem}.{p}": t for p, t in parts.items()}
        else:
            tensors[name] = (torch.randn(shape, generator=g) * 0.3 + ("norm" in name)).half()
    path.mkdir()
    write(path, config, tensors, files)
    return tensors


def write(path: Path, config: ModelConfig, tensors: dict[str, torch.Tensor], files: int) -> None:
    """config.json, what lies beside it, and the tensors in so many files."""
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    (path / "quantize_config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    names, weight_map = list(tensors), {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::files]}
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


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
