"""Compiled steps on a CPU: without a compiler, and with attention written out in its stead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minqwen import LLM, ModelConfig, Qwen2
from minqwen.engine import runner
from minqwen.engine.captured import CapturedModel
from minqwen.engine.graphs import Steps
from minqwen.lab.shapes import random_model
from minqwen.model import KVCache, steps
from minqwen.model.fast import Joined
from minqwen.model.packed import Whole
from minqwen.model.steps import Blocks, weights_of
from minqwen.parallel import SINGLE, Mesh

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=112,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=14,
    num_key_value_heads=2,
    head_dim=16,
)


def model_as_on_a_gpu(mesh: Mesh = SINGLE, config: ModelConfig = CONFIG) -> Qwen2:
    """A model of random weights that are joined as fast arithmetic joins them on a GPU."""
    model = random_model(config, dtype=torch.float32, device="cpu", arithmetic="fast", mesh=mesh)
    for layer in model.model.layers:
        for linears in layer.by_input():
            if len(linears) > 1:
                Joined(linears, Whole(torch.cat([linear.weight for linear in linears])))
    return model


def places_of(blocks: Blocks, i: int) -> Tensor:
    """All places in the blocks of sequence i."""
    own = blocks.tables[i, : blocks.counts[i]].long()
    return (own[:, None] * blocks.size + torch.arange(blocks.size)).flatten()


def attend_blocks(
    q: Tensor, keys: Tensor, values: Tensor, blocks: Blocks, scale: float, options: object
) -> Tensor:
    """What flex_attention computes: places not to be seen have the weight 0, even if NaN."""
    out = torch.empty_like(q)
    for i, rows in enumerate(q):
        assert blocks.tables[i, blocks.counts[i] - 1] == blocks.last[i]
        places = places_of(blocks, i)
        k, v = keys[places].transpose(0, 1), values[places].transpose(0, 1)  # [K, n, d]
        scores = rows @ k.transpose(1, 2) * scale
        scores[..., len(places) - blocks.size + int(blocks.filled[i]) :] = float("-inf")
        out[i] = torch.softmax(scores, -1) @ v
    return out


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: object,
    scale: float,
) -> Tensor:
    """What varlen_attn computes: the last query of a sequence sees its last key."""
    out, G = torch.empty_like(q), q.shape[1] // k.shape[1]
    ends = zip(starts.tolist(), starts.tolist()[1:], key_starts.tolist(), key_starts.tolist()[1:])
    for first, last, start, end in ends:
        own = (x[start:end].repeat_interleave(G, 1).transpose(0, 1) for x in (k, v))
        seen = torch.ones(last - first, end - start, dtype=torch.bool).tril(
            end - start - last + first
        )
        rows = q[first:last].transpose(0, 1)
        z = F.scaled_dot_product_attention(rows, *own, attn_mask=seen, scale=scale)
        out[first:last] = z.transpose(0, 1)
    return out


def compiled_steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let engines of this test run their steps as on a GPU; those that were made so far."""
    made: list[Any] = []  # Steps or CapturedModel

    def steps_of(
        model: Qwen2, cache: KVCache, length: int, sequences: int
    ) -> Steps | CapturedModel:
        own: Steps | CapturedModel
        if model.ops.order_free:
            own = CapturedModel(model, cache, length, sequences, capture=False)
        else:
            weights = weights_of(model)
            assert weights is not None
            own = Steps(model, cache, weights, length, sequences, capture=False, compile=False)
        made.append(own)
        return own

    monkeypatch.setattr(runner, "steps_of", steps_of)
    monkeypatch.setattr(steps, "attend_blocks", attend_blocks)
    monkeypatch.setattr(steps, "attend_packed", attend_packed)
    return made


def engine(model: Qwen2, *, eager: bool = False, **options: object) -> LLM:
    """A cache so small that requests are preempted, and steps so small that prompts are cut."""
    small = {"max_model_len": 160, "num_blocks": 10, "max_num_seqs": 4, "seed": 0}
    return LLM(model, **{**small, "max_num_batched_tokens": 24, "enforce_eager": eager, **options})
