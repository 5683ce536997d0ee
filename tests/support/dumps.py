"""A golden pack and another engine's dump in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minqwen.config import ModelConfig
from minqwen.model import Qwen2

# What hooks on modules can see: an engine's kernels do not show what is inside attention.
ENGINE = [
    "embed",
    "*.norm1",
    "*.attn.q",
    "*.attn.k",
    "*.attn.v",
    "*.attn.z",
    "*.attn.out",
    "*.norm2",
    "*.mlp.gate",
    "*.mlp.up",
    "*.mlp.act",
    "*.mlp.out",
    "*.resid_post",
    "final_norm",
    "logits",
]


@dataclass(frozen=True)
class MemoryPrompt:
    ids: list[int]
    text: str | None = None


@dataclass
class MemoryPack:
    """runs: {run: for each prompt {name: tensor}}."""

    config: ModelConfig
    prompts: list[MemoryPrompt]
    held: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)
    full_logits: bool = True

    @property
    def runs(self) -> Sequence[str]:
        return list(self.held)

    @property
    def names(self) -> Sequence[str]:
        return next((list(run[0]) for run in self.held.values()), [])

    def read(self, run: str, prompt: int, name: str) -> Tensor:
        return self.held[run][prompt][name]


@dataclass
class MemoryDump:
    """held: for each pass {name: tensor}."""

    dtype: torch.dtype
    held: list[dict[str, Tensor]]
    inputs: list[list[int] | None]
    places: list[list[int]] | None = None

    @property
    def passes(self) -> int:
        return len(self.held)

    def ids(self, n: int) -> list[int] | None:
        return self.inputs[n]

    def positions(self, n: int) -> list[int] | None:
        return self.places[n] if self.places else None

    def names(self, n: int) -> list[str]:
        return list(self.held[n])

    def read(self, n: int, name: str) -> Tensor:
        return self.held[n][name]


@torch.no_grad()
def traces(model: Qwen2, prompts: Sequence[Sequence[int]], names=None) -> list[dict[str, Tensor]]:
    """What passes the points, a dictionary for each prompt, without a batch dimension."""
    found = []
    for ids in prompts:
        _, seen = model.run_with_cache(torch.tensor([ids]), names)
        found.append({name: x[0] for name, x in seen.items()})
    return found


def dump_of(model: Qwen2, prompts: Sequence[Sequence[int]], names=None) -> MemoryDump:
    return MemoryDump(model.dtype, traces(model, prompts, names), [list(ids) for ids in prompts])
