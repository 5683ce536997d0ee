"""The weights under TransformerLens' names and in its shapes, as views of the model's own.

`model.blocks[3].attn.W_Q` is [H, D, d], `model.W_Q` those of all layers, [L, H, D, d]; a value
written into the former is written into the model, the latter is a copy. W_K and W_V have each KV
head once for every query head that reads it, and so are copies too; `_W_K` and `_W_V` are [K, D, d]
and no copies. Biases that the model has not are zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minqwen.lab.transformer_lens.hook_points import HookPoint
from minqwen.model.arithmetic import Linear
from minqwen.model.qwen2 import Layer, Qwen2, RMSNorm

Hooks = Mapping[str, HookPoint]


class Part:
    """A component. Its hook points are attributes, by the last word of their names."""

    def __init__(self, hooks: Hooks, prefix: str):
        self.hooks, self.prefix = hooks, prefix

    def __getattr__(self, name: str) -> HookPoint:
        if name.startswith("hook_") and self.prefix + name in self.hooks:
            return self.hooks[self.prefix + name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}")


class Norm(Part):
    """An RMSNorm. `model.ln_final(x)` norms a residual stream [..., D]."""

    def __init__(self, hooks: Hooks, prefix: str, norm: RMSNorm):
        super().__init__(hooks, prefix)
        self.norm = norm

    @property
    def w(self) -> Tensor:
        return self.norm.weight

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.reshape(-1, x.shape[-1]))
        return y.reshape(x.shape)


class Attention(Part):
    def __init__(self, hooks: Hooks, prefix: str, model: Qwen2, layer: Layer):
        super().__init__(hooks, prefix)
        self.attention, self.head_dim = layer.self_attn, model.config.head_dim
        self.group = model.config.group_size

    def _weight(self, linear: Linear) -> Tensor:
        """[heads d, D] -> [heads, D, d]"""
        by_head: Tensor = linear.weight.unflatten(0, (-1, self.head_dim))
        return by_head.transpose(1, 2)

    def _bias(self, linear: Linear) -> Tensor:
        """[heads d] -> [heads, d]"""
        assert linear.bias is not None
        by_head: Tensor = linear.bias.unflatten(0, (-1, self.head_dim))
        return by_head

    @property
    def W_Q(self) -> Tensor:
        return self._weight(self.attention.q_proj)

    @property
    def _W_K(self) -> Tensor:
        return self._weight(self.attention.k_proj)

    @property
    def _W_V(self) -> Tensor:
        return self._weight(self.attention.v_proj)

    @property
    def W_K(self) -> Tensor:
        return self._W_K.repeat_interleave(self.group, 0)

    @property
    def W_V(self) -> Tensor:
        return self._W_V.repeat_interleave(self.group, 0)

    @property
    def W_O(self) -> Tensor:
        """[D, H d] -> [H, d, D]"""
        by_head: Tensor = self.attention.o_proj.weight.unflatten(1, (-1, self.head_dim))
        return by_head.permute(1, 2, 0)

    @property
    def b_Q(self) -> Tensor:
        return self._bias(self.attention.q_proj)

    @property
    def b_K(self) -> Tensor:
        return self._bias(self.attention.k_proj).repeat_interleave(self.group, 0)

    @property
    def b_V(self) -> Tensor:
        return self._bias(self.attention.v_proj).repeat_interleave(self.group, 0)

    @property
    def b_O(self) -> Tensor:
        o = self.attention.o_proj
        return o.weight.new_zeros(o.out_features) if o.bias is None else o.bias


class MLP(Part):
    def __init__(self, hooks: Hooks, prefix: str, layer: Layer):
        super().__init__(hooks, prefix)
        self.mlp = layer.mlp

    @property
    def W_gate(self) -> Tensor:
        return self.mlp.gate_proj.weight.T

    @property
    def W_in(self) -> Tensor:
        return self.mlp.up_proj.weight.T

    @property
    def W_out(self) -> Tensor:
        return self.mlp.down_proj.weight.T

    @property
    def b_in(self) -> Tensor:
        return self.mlp.up_proj.weight.new_zeros(self.mlp.up_proj.out_features)

    @property
    def b_out(self) -> Tensor:
        return self.mlp.down_proj.weight.new_zeros(self.mlp.down_proj.out_features)


class Block(Part):
    def __init__(self, hooks: Hooks, model: Qwen2, i: int):
        prefix = f"blocks.{i}."
        super().__init__(hooks, prefix)
        layer = model.model.layers[i]
        assert isinstance(layer, Layer)
        self.attn = Attention(hooks, prefix + "attn.", model, layer)
        self.mlp = MLP(hooks, prefix + "mlp.", layer)
        self.ln1 = Norm(hooks, prefix + "ln1.", layer.input_layernorm)
        self.ln2 = Norm(hooks, prefix + "ln2.", layer.post_attention_layernorm)


class Embed:
    """`model.embed(tokens)`: ids [B, T] -> [B, T, D]."""

    def __init__(self, model: Qwen2):
        self.model = model

    @property
    def W_E(self) -> Tensor:
        return self.model.model.embed_tokens.weight

    def __call__(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.model.model.embed_tokens(tokens)
        return x


class Unembed:
    """`model.unembed(x)`: a stream [..., D] that ln_final has normed -> logits [..., V]."""

    def __init__(self, model: Qwen2):
        self.model = model

    @property
    def W_U(self) -> Tensor:
        return self.model.lm_head.weight.T

    @property
    def b_U(self) -> Tensor:
        return self.W_U.new_zeros(self.W_U.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(x.reshape(-1, x.shape[-1]))
        return logits.reshape(*x.shape[:-1], -1)


def stacked(part: str, name: str) -> Any:
    """A property: that weight of every layer, [L, ...]."""

    def of_all_layers(self: Any) -> Tensor:
        return torch.stack([getattr(getattr(block, part), name) for block in self.blocks])

    return property(of_all_layers)


class Weights:
    """What `HookedTransformer` has of weights."""

    blocks: list[Block]
    embed: Embed
    unembed: Unembed
    ln_final: Norm

    W_Q, W_K = stacked("attn", "W_Q"), stacked("attn", "W_K")  # [L, H, D, d]
    W_V, W_O = stacked("attn", "W_V"), stacked("attn", "W_O")  # W_O [L, H, d, D]
    b_Q, b_K, b_V = stacked("attn", "b_Q"), stacked("attn", "b_K"), stacked("attn", "b_V")
    b_O = stacked("attn", "b_O")  # [L, D]
    W_in, W_gate = stacked("mlp", "W_in"), stacked("mlp", "W_gate")  # [L, D, I]
    W_out = stacked("mlp", "W_out")  # [L, I, D]
    b_in, b_out = stacked("mlp", "b_in"), stacked("mlp", "b_out")

    def make_parts(self, model: Qwen2, hooks: Hooks) -> None:
        self.blocks = [Block(hooks, model, i) for i in range(model.config.num_hidden_layers)]
        self.embed, self.unembed = Embed(model), Unembed(model)
        self.ln_final = Norm(hooks, "ln_final.", model.model.norm)

    @property
    def W_E(self) -> Tensor:
        """[V, D]"""
        return self.embed.W_E

    @property
    def W_U(self) -> Tensor:
        """[D, V]"""
        return self.unembed.W_U

    @property
    def b_U(self) -> Tensor:
        return self.unembed.b_U

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Tensor:
        """The sum of all b_O and b_out before a layer's input, or its MLP's, [D]."""
        before: Tensor = self.b_O[:layer].sum(0)
        if include_mlp_biases:
            before = before + self.b_out[:layer].sum(0)
        return before + self.b_O[layer] if mlp_input else before
