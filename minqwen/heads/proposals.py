"""How to run a model with other head counts, or at a degree, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minqwen.config import ModelConfig
from minqwen.errors import HeadsError
from minqwen.heads.layout import Layout, extended_config, layout
from minqwen.parallel import valid_degrees


@dataclass(frozen=True)
class Cost:
    """What a layout adds. parameters: how many more; kv_bytes: per token, all ranks together, at 2 bytes an
    element; attention_macs: multiply-adds of a token's attention (projections, scores, values) per context,
    relative to the source's."""

    parameters: int
    kv_bytes: int
    attention_macs: dict[int, float]


@dataclass(frozen=True)
class Plan:
    layout: Layout
    config: ModelConfig
    cost: Cost
    degrees: list[int]
    notes: list[str]


def attention_macs(config: ModelConfig, context: int) -> int:
    """Multiply-adds of one token in one layer's attention: q and o, k and v, scores and weighted values."""
    q, kv = config.q_size, config.kv_size
    return 2 * config.hidden_size * (q + kv) + 2 * q * context


def cost(
    config: ModelConfig,
    target: ModelConfig,
    contexts: tuple[int, ...] = (1024, 8192, 32768, 131072),
) -> Cost:
    return Cost(
        target.num_parameters() - config.num_parameters(),
        target.kv_bytes_per_token("bfloat16"),
        {n: attention_macs(target, n) / attention_macs(config, n) for n in contexts},
    )


def plan(
    config: ModelConfig,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    tensor_parallel_size: int | None = None,
    quant_group: int | None = None,
    recipe: str = "ghost",
) -> list[Plan]:
    """How to run this model with these counts, or at this degree: the cheapest first, then alternatives.

    With `tensor_parallel_size` alone, the fewest query heads (and the least padding of the MLP) that the degree
    can split, KV heads as they are or replicated in the checkpoint. quant_group: the quantisation group size,
    whose boundaries a rank's slices must not cut. Raises HeadsError when nothing can work.
    """
    H, K, size = config.num_attention_heads, config.num_key_value_heads, tensor_parallel_size or 1
    if size < 1:
        raise HeadsError(f"tensor_parallel_size is {size}, expected at least 1")
    if quant_group is not None and config.head_dim % quant_group:
        raise HeadsError(
            f"head_dim {config.head_dim} is not a multiple of the quantisation group {quant_group}: a group "
            "would span two heads, so heads cannot be moved without quantising again"
        )
    kv_counts = (
        [num_key_value_heads]
        if num_key_value_heads
        else sorted({K, K * size // math.gcd(K, size), H})
    )
    unit = size * (quant_group or 1)
    width = -(-config.intermediate_size // unit) * unit
    plans, refusal = [], None
    for K2 in kv_counts:
        if K2 < K or (K2 % size and size % K2):
            continue
        step = math.lcm(K2, size)
        H2, to = num_attention_heads or -(-max(H, K2) // step) * step, None
        while to is None and H2 <= max(64 * H, num_attention_heads or 0):
            try:
                pad = width if width != config.intermediate_size else None
                to = layout(config, H2, K2, recipe=recipe, intermediate_size=pad)
            except HeadsError as error:
                refusal = error
                if num_attention_heads:
                    break
                H2 += step
        if to is None:
            continue
        target = extended_config(config, to)
        degrees = valid_degrees(target, 64)
        if size not in degrees:
            continue
        plans.append(Plan(to, target, cost(config, target), degrees, _notes(config, target, size)))
    if not plans and refusal is not None:
        raise refusal
    if not plans:
        raise HeadsError(
            f"nothing of these counts runs at degree {size}: {H} query and {K} key/value heads asked for as "
            f"{num_attention_heads or 'any'} and {num_key_value_heads or 'any'}"
        )
    return sorted(plans, key=lambda p: (p.cost.parameters, p.cost.kv_bytes))


def _notes(config: ModelConfig, target: ModelConfig, size: int) -> list[str]:
    notes = []
    if target.num_attention_heads != config.num_attention_heads:
        notes.append(
            "more heads make nothing faster by themselves: they only let the work be split further"
        )
    if size > target.num_key_value_heads:
        notes.append(
            f"at degree {size} each KV head is held by {size // target.num_key_value_heads} ranks: "
            "the cache per rank does not shrink further"
        )
    if target.num_key_value_heads > config.num_key_value_heads:
        notes.append(
            f"KV heads are stored {target.num_key_value_heads // config.num_key_value_heads} times: "
            "that much more cache in all"
        )
    if target.intermediate_size != config.intermediate_size:
        notes.append(
            f"the MLP is padded from {config.intermediate_size} to {target.intermediate_size} channels"
        )
    if target.hidden_size // target.num_attention_heads != target.head_dim:
        notes.append(
            f"engines that derive head_dim (vLLM's Qwen2) would read "
            f"{target.hidden_size // target.num_attention_heads} instead of {target.head_dim}, load without "
            "error and drop rows: give them --arch llama"
        )
    return notes
