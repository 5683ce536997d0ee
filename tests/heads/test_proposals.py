"""What is proposed for a tensor-parallel degree, and what it costs."""

from __future__ import annotations

import pytest
from support.heads import QWEN_7B

from minqwen.errors import HeadsError
from minqwen.heads.proposals import attention_macs, propose


def test_eight_ranks_for_the_7b_are_32_heads_by_hand():
    best = propose(QWEN_7B, tensor_parallel_size=8)[0]
    own = [list(range(first, first + 7)) for first in (0, 7, 14, 21)]
    assert best.layout.heads == tuple(head for group in own for head in [*group, group[0]])
    assert best.layout.shares == ((1.0,) * 7 + (0.0,)) * 4
    assert best.layout.kv == (0, 1, 2, 3)
    target = best.config
    assert (target.num_attention_heads, target.num_key_value_heads, target.head_dim) == (32, 4, 128)
    assert 8 in best.degrees
    assert "112 instead of 128" in " ".join(best.notes)


def test_its_cost_by_hand():
    best = propose(QWEN_7B, tensor_parallel_size=8)[0]
    # 28 layers x 4 heads x 128 x (3,584 rows of q + 3,584 columns of o + 1 bias)
    assert best.cost.parameters == 28 * 4 * 128 * (3584 + 3584 + 1) == 102_774_784
    assert best.cost.kv_bytes == QWEN_7B.kv_bytes_per_token("bfloat16") == 57_344
    ratio = attention_macs(best.config, 10**9) / attention_macs(QWEN_7B, 10**9)
    assert ratio == pytest.approx(32 / 28, rel=1e-4)


def test_alternatives_are_dearer_and_all_of_them_run_at_the_degree():
    proposals = propose(QWEN_7B, tensor_parallel_size=8)
    costs = [(p.cost.parameters, p.cost.kv_bytes) for p in proposals]
    assert len(proposals) > 1 and costs == sorted(costs)
    assert all(8 in p.degrees for p in proposals)
    assert "KV heads are stored 2 times" in " ".join(proposals[1].notes)


def test_a_degree_that_the_mlp_does_not_divide_by_pads_it():
    best = propose(QWEN_7B, tensor_parallel_size=28)[0]
    assert best.config.intermediate_size == 18_956  # the next multiple of 28
    assert "the MLP is padded from 18944 to 18956 channels" in best.notes


def test_what_cannot_work_is_refused_with_the_reason():
    with pytest.raises(HeadsError, match="two heads"):
        propose(QWEN_7B.replace(head_dim=64), tensor_parallel_size=8, quant_group=128)
    with pytest.raises(HeadsError, match="expected at least 1"):
        propose(QWEN_7B, tensor_parallel_size=-8)
    with pytest.raises(HeadsError, match="nothing of these counts runs at degree 8"):
        propose(QWEN_7B, 28, 4, tensor_parallel_size=8)
    with pytest.raises(HeadsError, match="not a multiple"):
        propose(QWEN_7B, 30, tensor_parallel_size=2)
