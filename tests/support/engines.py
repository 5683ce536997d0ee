"""Qwen2 with the module structure of vLLM and SGLang, small and slow: those engines are not here.

As there, q, k and v are one linear layer and gate and up another, linear layers return (output,
bias), a norm adds the residual stream and writes over both, rotary embedding writes over queries
and keys and is one module for all layers, and ranks hold parts.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from minqwen.parallel import SINGLE


class Linear(nn.Module):
    def __init__(self, weight, bias=None, mesh=None):
        super().__init__()
        self.weight, self.bias, self.mesh = weight, bias, mesh

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        return (self.mesh.all_reduce(out) if self.mesh is not None else out), None


class RMSNorm(nn.Module):
    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x, residual=None):
        if residual is not None:
            residual += x
            x.copy_(residual)
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        if residual is None:
            return normed * self.weight
        return x.copy_(normed * self.weight), residual


class Rotary(nn.Module):
    def __init__(self, d, theta):
        super().__init__()
        self.d, self.frequencies = d, theta ** -(torch.arange(0, d, 2) / d)

    def forward(self, positions, q, k):
        angles = positions[:, None, None] * self.frequencies
        for x in (q, k):
            a, b = x.unflatten(-1, (-1, self.d)).chunk(2, -1)
            turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
            x.copy_(torch.cat(turned, -1).flatten(1))
        return q, k


class Attend(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.d = d

    def forward(self, q, k, v, *batch):
        q, k, v = (x.unflatten(-1, (-1, self.d)).transpose(0, 1)[None] for x in (q, k, v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return z[0].transpose(0, 1).flatten(1)


class Attention(nn.Module):
    def __init__(self, w, config, rotary, mesh):
        super().__init__()
        d, ranks = config.head_dim, mesh.size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_size = heads // ranks * d
        self.kv_size = max(1, kv_heads // ranks) * d
        first = mesh.rank * kv_heads // ranks * d if kv_heads < ranks else mesh.rank * self.kv_size

        def fused(end):
            q = w[f"q_proj.{end}"].chunk(ranks)[mesh.rank]
            parts = [w[f"{x}_proj.{end}"][first : first + self.kv_size] for x in "kv"]
            return torch.cat((q, *parts))

        self.qkv_proj = Linear(fused("weight"), fused("bias"))
        self.o_proj = Linear(w["o_proj.weight"].chunk(ranks, 1)[mesh.rank], mesh=mesh)
        self.o_proj.tp_rank, self.o_proj.tp_size = mesh.rank, mesh.size
        self.rotary_emb, self.attn = rotary, Attend(d)

    def forward(self, positions, hidden_states, *batch):
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], -1)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v, *batch))[0]


class MLP(nn.Module):
    def __init__(self, w, mesh):
        super().__init__()
        gate, up = (w[f"{x}_proj.weight"].chunk(mesh.size)[mesh.rank] for x in ("gate", "up"))
        self.gate_up_proj = Linear(torch.cat((gate, up)))
        self.down_proj = Linear(w["down_proj.weight"].chunk(mesh.size, 1)[mesh.rank], mesh=mesh)

    def forward(self, x):
        gate, up = self.gate_up_proj(x)[0].chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)[0]


class Layer(nn.Module):
    def __init__(self, w, config, rotary, mesh):
        super().__init__()
        self.self_attn = Attention(inside(w, "self_attn."), config, rotary, mesh)
        self.mlp = MLP(inside(w, "mlp."), mesh)
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(self, name, RMSNorm(w[f"{name}.weight"], config.rms_norm_eps))

    def forward(self, positions, hidden_states, residual, *batch):
        if residual is None:
            residual, x = hidden_states, self.input_layernorm(hidden_states)
        else:
            x, residual = self.input_layernorm(hidden_states, residual)
        x = self.self_attn(positions, x, *batch)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    def __init__(self, w, config, mesh):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(w["embed_tokens.weight"])
        rotary = Rotary(config.head_dim, config.rope_parameters["rope_theta"])
        self.layers = nn.ModuleList(
            Layer(inside(w, f"layers.{i}."), config, rotary, mesh)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(w["norm.weight"], config.rms_norm_eps)

    def forward(self, input_ids, positions, *batch):
        x, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            x, residual = layer(positions, x, residual, *batch)
        return self.norm(x, residual)[0]


class Head(nn.Module):
    """Its weight is read by the logits processor; it is not called."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


class LogitsProcessor(nn.Module):
    """vLLM's."""

    def forward(self, lm_head, hidden_states):
        return F.linear(hidden_states, lm_head.weight)


class VLLM(nn.Module):
    """The forward pass gives hidden states, and `compute_logits` those that are asked for."""

    def __init__(self, hf, mesh=SINGLE):
        super().__init__()
        w = {name: x.detach().clone() for name, x in hf.state_dict().items()}
        self.config = hf.config
        self.model = Decoder(inside(w, "model."), hf.config, mesh)
        self.lm_head = Head(w["lm_head.weight"])
        self.logits_processor = LogitsProcessor()

    def forward(self, input_ids, positions):
        return self.model(input_ids, positions)

    def compute_logits(self, hidden_states):
        return self.logits_processor(self.lm_head, hidden_states)


class LastLogits(nn.Module):
    """SGLang's logits processor: of the last token only."""

    def forward(self, input_ids, hidden_states, lm_head, batch):
        logits = F.linear(hidden_states[-1:], lm_head.weight)
        return SimpleNamespace(next_token_logits=logits)


class SGLang(VLLM):
    def __init__(self, hf, mesh=SINGLE):
        super().__init__(hf, mesh)
        self.logits_processor = LastLogits()

    def forward(self, input_ids, positions):
        batch = SimpleNamespace()
        hidden = self.model(input_ids, positions, batch)
        return self.logits_processor(input_ids, hidden, self.lm_head, batch)


def inside(w, prefix):
    """The tensors below a module, under their names there."""
    return {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}
