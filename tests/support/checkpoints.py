"""Small random checkpoints, and how to damage and compare them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minqwen.checkpoint import Checkpoint, write_checkpoint
from minqwen.config import ModelConfig
from minqwen.errors import MinqwenError

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q0 = "model.layers.0.self_attn.q_proj.weight"


def tiny(**changes) -> ModelConfig:
    return ModelConfig(
        **dict(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
        | changes
    )


def weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(s, generator=g).to(getattr(torch, config.dtype)) * 0.02
        for n, s in config.parameter_shapes().items()
    }


def write(
    path: Path, config: ModelConfig | None = None, seed: int = 0, **options
) -> dict[str, torch.Tensor]:
    config = config or tiny()
    tensors = weights(config, seed)
    write_checkpoint(path, config, tensors.items(), **options)
    return tensors


def assert_holds(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    c = Checkpoint(path)
    c.check()
    assert set(c.names) == set(tensors)
    for name, t in tensors.items():
        got = c.read(name)
        assert got.dtype == t.dtype == c.dtype(name) and tuple(got.shape) == c.shape(name)
        assert torch.equal(got.view(torch.uint8), t.view(torch.uint8)), name


def refusal(act, *words: str) -> str:
    with pytest.raises(MinqwenError) as e:
        act()
    line = str(e.value)
    assert "\n" not in line and len(line) < 800, line
    for word in words:
        assert word in line, f"{word!r} is not in: {line}"
    return line


def rewrite(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
