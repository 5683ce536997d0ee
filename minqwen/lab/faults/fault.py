"""What one mistake is, and the model that makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minqwen.config import ModelConfig
from minqwen.errors import CheckpointError, ConfigError
from minqwen.model import Native, Qwen2
from minqwen.parallel import Shard
from minqwen.tokenizer import Tokenizer
from minqwen.tokenizer.chat import Message

Weights = dict[str, Tensor]
Variant = tuple[ModelConfig, Weights]
Messages = Sequence[Message]

Kind = Literal["config", "weights", "operation", "cache", "logits", "tokens"]


class Mistaken(Native):
    """Native with a mistake in some operations. Everything else is Native's, bit for bit."""

    def __init__(self, config: ModelConfig):
        self.config = config


@dataclass(frozen=True)
class Need:
    """What a model must have for a mistake to be possible. what: it in words."""

    what: str
    has: Callable[[ModelConfig], bool]


@dataclass(frozen=True)
class Fault:
    """One mistake, as a small variant of a right model.

    name: in kebab-case. kind: where the mistake is made: in what is read from config.json, in the
    weights, in an operation, in the keys and values of earlier tokens, in what is reported of the
    logits, or in the tokens of the prompt. first: the first point (model/trace.py) at which a trace
    of the wrong model leaves that of the right one; "" if none does. symptom: what the mistake is,
    and what one sees of it. source: where it was seen. silent: why the logits do not move beyond
    rounding, where they do not.

    The others say how it is made; most faults have one of them. change: (config, tensors by name)
    of the right model to those of the wrong one. ops: the arithmetic. rebuild: changes modules of
    the model that was built. report: (logits [T, V], ids [T]) to the log probabilities [T, V] that
    are reported of the next tokens. encode: (tokenizer, messages) to the ids of the prompt.
    """

    name: str
    kind: Kind
    first: str
    symptom: str
    source: str
    change: Callable[[ModelConfig, Weights], Variant] | None = None
    ops: Callable[[ModelConfig], Native] | None = None
    rebuild: Callable[[Qwen2], None] | None = None
    report: Callable[[Tensor, Tensor], Tensor] | None = None
    encode: Callable[[Tokenizer, Messages], list[int]] | None = None
    needs: Need | None = None
    silent: str = ""

    @property
    def in_model(self) -> bool:
        """Whether the model is wrong. If not, the logits or the tokens are."""
        return self.report is None and self.encode is None

    def applies(self, config: ModelConfig) -> bool:
        """Whether a model with this config can have the mistake."""
        return self.needs is None or self.needs.has(config)

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError unless a model with this config can have the mistake."""
        if self.needs is not None and not self.needs.has(config):
            raise ConfigError(
                f"the mistake {self.name!r} needs a model with {self.needs.what}, which "
                f"{config.source} does not describe"
            )

    def apply(self, config: ModelConfig, weights: Weights) -> Variant:
        """The wrong model's config and tensors by name. The right ones are not changed."""
        return (config, weights) if self.change is None else self.change(config, weights)

    def model(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Qwen2:
        """The model that makes the mistake, of the right model's config and tensors by name.

        It is the right model where the mistake is in the logits (see `logprobs`) or in the tokens
        (see `ids`). Mistakes in attention work on whole texts, as in `model(ids)`; with a cache
        they raise MinqwenError. Raises ConfigError for a config that cannot have the mistake,
        CheckpointError if no model can be built of the wrong tensors.
        """
        self.check(config)
        wrong, tensors = self.apply(config, weights)
        ops = Native() if self.ops is None else self.ops(wrong)
        if self.in_model:
            ops.name = f"native, with the mistake {self.name},"
        model = build(wrong, tensors, dtype, ops, device)
        if self.rebuild is not None:
            self.rebuild(model)
        return model

    def logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        """What is reported of logits [T, V] of ids [T]: log probabilities of the next tokens."""
        return logits.log_softmax(-1) if self.report is None else self.report(logits, ids)

    def ids(self, tokenizer: Tokenizer, messages: Messages) -> list[int]:
        """The prompt's ids. messages: a chat, as `Tokenizer.encode_chat` takes it."""
        if self.encode is None:
            return tokenizer.encode_chat(messages)
        return self.encode(tokenizer, messages)


def build(
    config: ModelConfig,
    weights: Weights,
    dtype: torch.dtype,
    arithmetic: str | Native = "native",
    device: torch.device | str = "cpu",
) -> Qwen2:
    """A model of tensors by name. Raises CheckpointError for a shape that does not fit `config`."""
    shapes = config.parameter_shapes()

    def read(name: str, shard: Shard | None) -> Tensor:
        tensor = weights[name]
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise CheckpointError(
                f"{name.removeprefix('model.')} has shape {list(tensor.shape)}, its config says "
                f"{list(shapes[name])}"
            )
        return tensor

    return Qwen2.from_tensors(config, read, dtype=dtype, arithmetic=arithmetic, device=device)
