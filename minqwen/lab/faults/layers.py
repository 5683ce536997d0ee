"""Mistakes in the norms, the MLP and the residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqwen.lab.faults.fault import Mistaken
from minqwen.model import Qwen2
from minqwen.model.batch import Batch
from minqwen.model.kv_cache import KVCache
from minqwen.model.qwen2 import Layer, RMSNorm
from minqwen.model.trace import UNTRACED, Tap


def widened(x: Tensor) -> Tensor:
    """In float32 at least, as a norm computes."""
    return x if x.dtype == torch.float64 else x.float()


class EpsOutsideRoot(Mistaken):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = widened(x)
        root = wide.pow(2).mean(-1, keepdim=True).sqrt()
        return (wide / (root + eps)).to(x.dtype) * weight


class MeanSubtracted(Mistaken):
    """LayerNorm without a bias."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = widened(x)
        return super().rms_norm((wide - wide.mean(-1, keepdim=True)).to(x.dtype), weight, eps)


class ReducedInBfloat16(Mistaken):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = x.bfloat16().pow(2).mean(-1, keepdim=True).to(widened(x).dtype)
        return (widened(x) * torch.rsqrt(square + eps)).to(x.dtype) * weight


class Gelu(Mistaken):
    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate) * up


# ---- modules in the place of others -------------------------------------------------------------


class OtherNorm(RMSNorm):
    """In the place of a norm, with its weight."""

    def __init__(self, norm: RMSNorm):
        super().__init__(norm.ops, len(norm.weight), norm.eps, device="meta")
        self.weight = norm.weight


class LateCast(OtherNorm):
    """The weight is multiplied before the result is rounded to the model's dtype."""

    def forward(self, x: Tensor, tap: Tap = UNTRACED, point: str = "") -> Tensor:
        wide = widened(x)
        normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (tap(point, normalized) * self.weight).to(x.dtype)


class NoNorm(OtherNorm):
    def forward(self, x: Tensor, tap: Tap = UNTRACED, point: str = "") -> Tensor:
        return tap(point, x)


class NormTwice(OtherNorm):
    def forward(self, x: Tensor, tap: Tap = UNTRACED, point: str = "") -> Tensor:
        once = super().forward(x, tap, point)
        return super().forward(once)


class ResidualAfterNorm(Layer):
    """What is added to attention's and the MLP's outputs is their input, behind the norm."""

    def __init__(self, layer: Layer):
        nn.Module.__init__(self)
        self.input_layernorm = layer.input_layernorm
        self.self_attn = layer.self_attn
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.mlp = layer.mlp

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: KVCache | None, tap: Tap
    ) -> Tensor:
        x = tap("resid_pre", x)
        x = tap("norm1", self.input_layernorm(x, tap, "norm1.normalized"))
        x = x + tap("attn.out", self.self_attn(x, cos, sin, batch, cache, tap))
        x = tap("resid_mid", x)
        x = tap("norm2", self.post_attention_layernorm(x, tap, "norm2.normalized"))
        x = x + tap("mlp.out", self.mlp(x, tap))
        return tap("resid_post", x)


def cast_late(model: Qwen2) -> None:
    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        layer.input_layernorm = LateCast(layer.input_layernorm)
        layer.post_attention_layernorm = LateCast(layer.post_attention_layernorm)
    model.model.norm = LateCast(model.model.norm)


def drop_final_norm(model: Qwen2) -> None:
    model.model.norm = NoNorm(model.model.norm)


def repeat_final_norm(model: Qwen2) -> None:
    model.model.norm = NormTwice(model.model.norm)


def add_after_norm(model: Qwen2) -> None:
    layers = model.model.layers
    for i, layer in enumerate(layers):
        assert isinstance(layer, Layer)
        layers[i] = ResidualAfterNorm(layer)
