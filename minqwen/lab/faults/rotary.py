"""Mistakes in rotary position embedding and in YaRN."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from minqwen.config import ModelConfig, RopeScaling
from minqwen.lab.faults.fault import Mistaken, Need, Variant, Weights
from minqwen.model.rope import inverse_frequencies, yarn_attention_factor

CHUNK = 16  # tokens that are computed together, in the mistakes at the edges of chunks

YARN = Need("YaRN", lambda config: config.rope_scaling is not None)


class Interleaved(Mistaken):
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = first_half(cos), first_half(sin)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


class TableInterleaved(Mistaken):
    """The angles of pairs 0, 0, 1, 1, ... for dimensions that are paired i with i + d/2."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (first_half(table).repeat_interleave(2, -1) for table in (cos, sin))
        return super().rotate(x, cos, sin)


class Backwards(Mistaken):
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return super().rotate(x, cos, -sin)


class QueriesOneAhead(Mistaken):
    """Queries are turned by one position more than the keys of the same tokens."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = super().rotate(x, cos, sin)
        if x.shape[-2] != self.config.num_attention_heads:  # keys
            return turned
        frequencies, _ = inverse_frequencies(self.config, torch.float64)
        angle = torch.cat((frequencies, frequencies)).to(x.device)
        return super().rotate(turned, angle.cos().to(x.dtype), angle.sin().to(x.dtype))


class Placed(Mistaken):
    """Tokens at other positions than theirs."""

    def place(self, positions: Tensor) -> Tensor:
        """The wrong position of each right one, [length] int64."""
        raise NotImplementedError

    def rotary_table(
        self,
        config: ModelConfig,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        rows = self.place(torch.arange(length, device="cpu")).to(device)
        cos, sin = super().rotary_table(config, int(rows.max()) + 1, dtype, device)
        return cos[rows], sin[rows]


class FromOne(Placed):
    def place(self, positions: Tensor) -> Tensor:
        return positions + 1


class Restarted(Placed):
    def place(self, positions: Tensor) -> Tensor:
        return positions % CHUNK


class OneSkipped(Placed):
    def place(self, positions: Tensor) -> Tensor:
        return positions + positions // CHUNK


class OtherFrequencies(Mistaken):
    """Tables of other frequencies or of another factor."""

    def frequencies(self, config: ModelConfig) -> tuple[Tensor, float]:
        """Radians per position [d/2], float32 or float64, and the factor on cos and sin."""
        raise NotImplementedError

    def rotary_table(
        self,
        config: ModelConfig,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        frequencies, factor = self.frequencies(config)
        positions = torch.arange(length, device="cpu").to(wide)
        angles = positions[:, None] * frequencies.to(wide)
        angles = torch.cat((angles, angles), -1).to(device)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


class FrequenciesInBfloat16(OtherFrequencies):
    def frequencies(self, config: ModelConfig) -> tuple[Tensor, float]:
        right, factor = inverse_frequencies(config)
        return right.bfloat16(), factor


class LinearScaling(OtherFrequencies):
    """Every frequency divided by the factor (position interpolation, arXiv:2306.15595)."""

    def frequencies(self, config: ModelConfig) -> tuple[Tensor, float]:
        right, _ = inverse_frequencies(config.replace(rope_scaling=None), torch.float64)
        return right / scaling_of(config).factor, 1.0


def first_half(table: Tensor) -> Tensor:
    """cos or sin of each pair once, [T, 1, d/2]: the table has both halves alike."""
    return table[..., : table.shape[-1] // 2]


# ---- config.json --------------------------------------------------------------------------------


def scaling_of(config: ModelConfig) -> RopeScaling:
    assert config.rope_scaling is not None, "the fault needs YaRN"
    return config.rope_scaling


def theta_of_llama(config: ModelConfig, weights: Weights) -> Variant:
    return config.replace(rope_theta=1e4), weights


def no_yarn(config: ModelConfig, weights: Weights) -> Variant:
    return config.replace(rope_scaling=None), weights


def no_attention_factor(config: ModelConfig, weights: Weights) -> Variant:
    return with_attention_factor(config, 1.0), weights


def attention_factor_twice(config: ModelConfig, weights: Weights) -> Variant:
    factor = yarn_attention_factor(scaling_of(config))
    return with_attention_factor(config, factor * factor), weights


def attention_factor_in_half(config: ModelConfig, weights: Weights) -> Variant:
    factor = torch.tensor(yarn_attention_factor(scaling_of(config)), dtype=torch.float16)
    return with_attention_factor(config, factor.item()), weights


def with_attention_factor(config: ModelConfig, factor: float) -> ModelConfig:
    scaling = dataclasses.replace(scaling_of(config), attention_factor=factor)
    return config.replace(rope_scaling=scaling)
