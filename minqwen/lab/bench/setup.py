"""What a contestant is told before its first turn, and what each of them is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from minqwen.config import ModelConfig
from minqwen.errors import MinqwenError
from minqwen.lab.bench.contestants import Contestant
from minqwen.lab.bench.jobs import Ask
from minqwen.lab.bench.timing import Run
from minqwen.lab.shapes import official_config


class NotInstalled(MinqwenError):
    """A peer's package is missing: its contestant is left out, with this reason."""


@dataclass(frozen=True)
class Setup:
    """model: a checkpoint's directory; None: random weights of `size` are made on the device.

    layers: how many of the shape's layers; None: all. longest: tokens of the longest request.
    batch: the most requests of a step. step_tokens: the most tokens of a step.
    """

    contestant: Contestant
    model: str | None
    size: str | None
    layers: int | None
    device: str
    threads: int
    longest: int
    batch: int
    step_tokens: int

    def config(self) -> ModelConfig:
        """The shape, of a checkpoint or an official size."""
        if self.model is not None:
            return ModelConfig.from_json(self.model)
        assert self.size is not None
        return cut(official_config(self.size), self.layers)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Setup:
        return cls(**{**fields, "contestant": Contestant(**fields["contestant"])})


def with_heads(config: ModelConfig, heads: int | None) -> ModelConfig:
    """The config with that many query heads of the same size; None: as it is."""
    if heads is None:
        return config
    return config.replace(num_attention_heads=heads, head_dim=config.head_dim)


def cut(config: ModelConfig, layers: int | None) -> ModelConfig:
    """The config with fewer layers."""
    if layers is None:
        return config
    if not 1 <= layers <= config.num_hidden_layers:
        raise MinqwenError(
            f"--layers {layers}: expected 1 to {config.num_hidden_layers}, the shape's own number"
        )
    return config.replace(num_hidden_layers=layers)


class Engine(Protocol):
    """A contestant with its weights in memory."""

    vocab_size: int

    def run(self, asks: list[Ask]) -> Run:
        """Complete all requests greedily, whatever tokens come, and mark every step."""
        ...
