"""The ways to use a number of GPUs: how many replicas of the model, each on how many GPUs.

Every figure is the planner's (`lab/planner.py`), for one replica. Here they are put together: the
sequences are shared out among the replicas, and the replicas' tokens per second are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from minqwen.checks import integer
from minqwen.config import ModelConfig
from minqwen.errors import ConfigError, HeadsError
from minqwen.heads.proposals import MAX_DEGREE, propose
from minqwen.lab.planner import Card, Planner, yarn_for
from minqwen.parallel import kv_heads_per_rank, valid_degrees


@dataclass(frozen=True)
class Speed:
    """How fast a choice can be at best on one card. Collectives are not counted.

    No time is shorter: first_token_seconds is the prefill of one prompt, token_seconds a decode
    step of one sequence alone, step_seconds that of the fullest replica. No rate is higher:
    tokens_per_second is of all GPUs together, full_tokens_per_second the same with as many
    sequences as the memory holds.
    """

    first_token_seconds: float
    token_seconds: float
    step_seconds: float
    tokens_per_second: float
    full_tokens_per_second: float


@dataclass(frozen=True)
class Assessment:
    """What one choice gives under one load; bytes are those on the fullest GPU.

    kv_copies: how often a replica holds each of the checkpoint's KV heads. fits: whether the load
    does. longest_in_memory: tokens that each sequence of the load may have, as far as the memory
    goes; largest_context: as far as the model goes too. most_sequences: of the load's context, in
    all replicas together. extra_weights: bytes that a replica holds beyond one copy of the
    checkpoint's weights. extra_flops: of a decode step, relative to the checkpoint's own.
    all_reduces: in the forward pass of a step, under native arithmetic.
    """

    tensor_parallel_size: int
    replicas: int
    heads: int
    kv_heads: int
    intermediate_size: int
    own_heads: bool
    heads_per_gpu: int
    kv_heads_per_gpu: int
    kv_copies: int
    weights: int
    kv_cache: int
    activations: int
    total: int
    fits: bool
    longest_in_memory: int
    largest_context: int
    most_sequences: int
    extra_weights: int
    extra_flops: float
    all_reduces: int
    speeds: dict[str, Speed]  # by the card's name

    @property
    def name(self) -> str:
        return (
            f"TP {self.tensor_parallel_size} x {self.replicas} "
            f"with {self.heads}/{self.kv_heads} heads"
        )

    def equals_on_each_gpu(self, other: Assessment) -> bool:
        """Whether they differ at most in who makes the copies of KV heads."""
        return replace(self, kv_heads=0) == replace(other, kv_heads=0)


@dataclass(frozen=True)
class Choice:
    """`replicas` copies of a model, each on as many GPUs as `planner` shares it among.

    checkpoint: the planner of the model with the heads that it has on disk, on one GPU.
    """

    checkpoint: Planner
    planner: Planner
    replicas: int

    def shares(self, batch: int) -> list[int]:
        """How many of `batch` sequences each replica gets, the fullest first."""
        each, rest = divmod(batch, self.replicas)
        return [each + 1] * rest + [each] * (self.replicas - rest)

    @property
    def kv_copies(self) -> int:
        """How often a replica holds each of the checkpoint's KV heads."""
        return self.planner.size * self.planner.kv_per_token // self.checkpoint.kv_per_token

    @property
    def all_reduces(self) -> int:
        """Of a step: one for the embedding, and in every layer those of o_proj and down_proj."""
        return 0 if self.planner.size == 1 else 1 + 2 * self.planner.config.num_hidden_layers

    def extra_flops(self, context: int) -> float:
        """What new heads, and keys and values computed on several GPUs, add to a decode step."""
        together = self.planner.size * self.planner.estimate(context).decode_flops
        return together / self.checkpoint.estimate(context).decode_flops - 1

    def tokens_per_second(self, card: Card, context: int, batch: int) -> float:
        """At most, of all replicas together; each makes its own steps."""
        seconds = {
            share: self.planner.estimate(context, share).decode_seconds(card)
            for share in set(self.shares(batch))
            if share
        }
        return sum(share / seconds[share] for share in self.shares(batch) if share)

    def speed(self, card: Card, context: int, batch: int, most: int) -> Speed:
        """`most`: sequences that the memory holds."""
        alone = self.planner.estimate(context)
        fullest = self.planner.estimate(context, self.shares(batch)[0])
        return Speed(
            first_token_seconds=alone.prefill_seconds(card),
            token_seconds=alone.decode_seconds(card),
            step_seconds=fullest.decode_seconds(card),
            tokens_per_second=self.tokens_per_second(card, context, batch),
            full_tokens_per_second=self.tokens_per_second(card, context, most),
        )

    def assess(self, context: int, batch: int, limit: int, cards: Mapping[str, Card]) -> Assessment:
        """For `batch` sequences of `context` tokens in all, within `limit` bytes on each GPU.

        Raises ConfigError for what the engine would refuse.
        """
        planner, config = self.planner, self.planner.config
        estimate = planner.estimate(context, self.shares(batch)[0])
        fit = planner.fit(estimate, limit)
        most = self.replicas * fit.largest_batch
        return Assessment(
            tensor_parallel_size=planner.size,
            replicas=self.replicas,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            intermediate_size=config.intermediate_size,
            own_heads=config == self.checkpoint.config,
            heads_per_gpu=config.num_attention_heads // planner.size,
            kv_heads_per_gpu=kv_heads_per_rank(config, planner.size),
            kv_copies=self.kv_copies,
            weights=estimate.weights,
            kv_cache=estimate.kv_cache,
            activations=estimate.activations,
            total=estimate.total,
            fits=fit.fits,
            longest_in_memory=planner.largest_context(limit, estimate.batch),
            largest_context=fit.largest_context,
            most_sequences=most,
            extra_weights=planner.weights_of_all_ranks - self.checkpoint.weights,
            extra_flops=self.extra_flops(context),
            all_reduces=self.all_reduces,
            speeds={name: self.speed(card, context, batch, most) for name, card in cards.items()},
        )


def choices(config: ModelConfig, gpus: int, **options: Any) -> list[Choice]:
    """Every way to put replicas on all of `gpus` GPUs, the smallest degree first.

    A degree that the config's heads allow is a choice with these heads. Another one is a choice for
    each number of KV heads with which more query heads allow it: the config's own, which ranks then
    share, and as many as there are ranks, copied in the checkpoint. options: of `Planner`.
    Raises ConfigError for values that make no sense.
    """
    integer("gpus", gpus, 1)
    checkpoint = Planner(config, **options)
    return [
        Choice(checkpoint, Planner(target, size, **options), gpus // size)
        for size in range(1, min(gpus, MAX_DEGREE) + 1)
        if gpus % size == 0
        for target in _models_for(config, size)
    ]


def _models_for(config: ModelConfig, size: int) -> Iterator[ModelConfig]:
    """The configs with which `size` ranks can share the model; none if nothing helps."""
    if size in valid_degrees(config, size):
        yield config
        return
    kv_heads = config.num_key_value_heads
    try:
        proposals = propose(config, tensor_parallel_size=size)
    except HeadsError:
        return
    for proposal in proposals:
        if proposal.config.num_key_value_heads in (kv_heads, math.lcm(kv_heads, size)):
            yield proposal.config


def best(found: list[Assessment], value: Callable[[Assessment], float]) -> list[Assessment]:
    """Those with the largest value: one, or several that are equal; none of none."""
    most = max(map(value, found), default=0)
    return [each for each in found if value(each) == most]


@dataclass(frozen=True)
class Best:
    """Which choices are best for what on one card. A list is empty where no choice can do it.

    alone: one sequence, the least time a token. together: the load, the most tokens per second.
    full: as many sequences as the memory holds, the most tokens per second.
    """

    alone: list[Assessment]
    together: list[Assessment]
    full: list[Assessment]

    @classmethod
    def of(cls, found: list[Assessment], card: str) -> Best:
        """card: the name of one of the cards for which the choices were assessed."""
        able = [each for each in found if each.most_sequences]
        fitting = [each for each in found if each.fits]
        return cls(
            alone=best(able, lambda each: -each.speeds[card].token_seconds),
            together=best(fitting, lambda each: each.speeds[card].tokens_per_second),
            full=best(able, lambda each: each.speeds[card].full_tokens_per_second),
        )

    def names(self) -> dict[str, list[str]]:
        return {
            "alone": [each.name for each in self.alone],
            "together": [each.name for each in self.together],
            "full": [each.name for each in self.full],
        }


@dataclass(frozen=True)
class Comparison:
    """The choices side by side. batch: sequences of `context` tokens, of all replicas together."""

    checkpoint: Planner  # the model as it is on disk, on one GPU
    context: int
    batch: int
    limit: int  # bytes that may be used on each GPU
    found: list[Assessment]
    best: dict[str, Best]  # by the card's name

    @classmethod
    def of(
        cls,
        possible: list[Choice],
        *,
        context: int,
        batch: int,
        limit: int,
        cards: Mapping[str, Card],
    ) -> Comparison:
        """cards: those whose speeds are told, by name. Raises ConfigError for a batch too large."""
        integer("batch", batch, 1)
        checkpoint = possible[0].checkpoint
        most = min(choice.replicas for choice in possible) * checkpoint.tokens
        if batch > most:
            raise ConfigError(
                f"batch is {batch}, expected 1 to {most}: a step of a replica has room for "
                f"max_num_batched_tokens ({checkpoint.tokens}), one token of each sequence"
            )
        found = [choice.assess(context, batch, limit, cards) for choice in possible]
        best = {card: Best.of(found, card) for card in cards}
        return cls(checkpoint, context, batch, limit, found, best)

    def as_json(self) -> dict[str, object]:
        return {
            "context": self.context,
            "batch": self.batch,
            "limit": self.limit,
            "dtype": self.checkpoint.dtype,
            "quantization": self.checkpoint.quantization,
            "yarn": yarn_for(self.checkpoint.config, self.context),
            "choices": [{"name": each.name, **asdict(each)} for each in self.found],
            "best": {card: best.names() for card, best in self.best.items()},
        }
