"""What must mean the same on every device: how a device treats a plain number plays no part."""

from __future__ import annotations

import math

import pytest
import torch

from minqwen.config import ModelConfig
from minqwen.model import Exact, Native

HEX = float.fromhex


def norm_of(row: list[float], eps: float) -> list[float]:
    """RMSNorm with weight 1 as single IEEE operations; the squares are exact, and need no snap."""
    unit = 2.0 ** (math.ceil(math.log2(max(x * x for x in row))) - 38)
    mean = sum(round(x * x / unit) * unit for x in row) * (1 / len(row)) + eps
    root = 1 / math.sqrt(mean)
    return [torch.tensor(x * root, dtype=torch.float64).float().item() for x in row]


def test_a_mean_is_a_product_with_the_reciprocal():
    """CUDA divides by a plain number in this way, a CPU does not: this row shows the difference."""
    row = [HEX("0x1.6c81d8p-1"), HEX("0x1.28e52cp-1"), HEX("0x1.e1b25ep-47")]
    got = Exact().rms_norm(torch.tensor([row]), torch.ones(3), 1e-6)
    assert got[0].tolist() == norm_of(row, 1e-6)


@pytest.mark.parametrize("ops", [Native(), Exact()], ids=["native", "exact"])
def test_the_rotary_table_does_not_depend_on_the_default_device(ops):
    config = ModelConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=8,
    )
    expected = ops.rotary_table(config, 40, torch.float32)
    with torch.device("meta"):
        got = ops.rotary_table(config, 40, torch.float32)
    assert all(table.device.type == "cpu" for table in got)
    assert all(map(torch.equal, got, expected))
