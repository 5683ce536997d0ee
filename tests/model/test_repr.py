"""A model is printed with its sizes, and without its numbers."""

from __future__ import annotations

import pytest
import torch
from support.qwen2 import oracle, ours


@pytest.mark.parametrize("arithmetic", ["native", "exact"])
def test_a_model_is_printed_with_its_sizes(arithmetic):
    model = ours(oracle(), torch.bfloat16, arithmetic=arithmetic)
    lines = [line.strip() for line in repr(model).splitlines()]
    assert lines[0] == "Qwen2("
    assert lines[1] == (
        f"{sum(p.numel() for p in ours(oracle()).parameters()):,} parameters, "
        f"bfloat16 on cpu, {arithmetic} arithmetic"
    )
    for line in (
        "(embed_tokens): Embedding(61, 24)",
        "(0-1): 2 x Layer(",
        "(input_layernorm): RMSNorm(24, eps=1e-06)",
        "heads=6, kv_heads=2, head_dim=10",
        "(q_proj): Linear(24 -> 60, bias)",
        "(k_proj): Linear(24 -> 20, bias)",
        "(o_proj): RowParallelLinear(60 -> 24)",
        "(up_proj): Linear(24 -> 40)",
        "(lm_head): Linear(24 -> 61)",
    ):
        assert line in lines, repr(model)
    assert len(lines) < 30
