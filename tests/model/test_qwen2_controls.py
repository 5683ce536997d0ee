"""What the comparison with transformers is worth: each classic mistake makes it fail."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.qwen2 import cast, differences, oracle, ours, tokens

from minqwen.model import Native


class Sabotaged(Native):
    """Native with mistakes that have been made elsewhere, one by name."""

    def __init__(self, how):
        self.how = how

    def rotary_table(self, config, length, dtype, device="cpu"):
        if self.how == "unrounded rope":
            dtype = torch.float32
        cos, sin = super().rotary_table(config, length, dtype)
        if self.how == "1 ulp in cos":
            cos = cos.clone()
            cos[5, 0] = torch.nextafter(cos[5, 0], torch.tensor(2.0, dtype=dtype))
        if self.how == "positions from 1":
            cos, sin = super().rotary_table(config, length + 1, dtype)
            cos, sin = cos[1:], sin[1:]
        return cos, sin

    def linear(self, x, linear):
        if self.how == "no bias":
            return F.linear(x, linear.weight)
        if self.how == "bias after rounding" and linear.bias is not None:
            return F.linear(x, linear.weight) + linear.bias
        return super().linear(x, linear)

    def rms_norm(self, x, weight, eps):
        if self.how == "weight before the cast":
            return (F.rms_norm(x.float(), x.shape[-1:], eps=eps) * weight.float()).to(x.dtype)
        return super().rms_norm(x, weight, 0 if self.how == "no eps" else eps)

    def rotate(self, x, cos, sin):
        if self.how == "interleaved rope":
            pairs = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
            return (
                super().rotate(pairs, cos, sin).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
            )
        return super().rotate(x, cos, sin).to(x.dtype)

    def silu_mul(self, gate, up):
        if self.how == "silu unrounded":
            return (F.silu(gate.float()) * up.float()).to(gate.dtype)
        return super().silu_mul(gate, up)

    def attend(self, q, k, v, hidden, scale, tap):
        if self.how == "tiled heads":
            k, v = (x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2) for x in (k, v))
        if self.how == "sees the future":
            hidden = hidden & hidden.roll(1, 0)
        if self.how == "scaled queries":
            q, scale = q * scale, 1.0
        if self.how == "scores unrounded":
            pattern = (q.float() @ k.float().transpose(-1, -2) * scale).masked_fill(
                hidden, float("-inf")
            )
            return pattern.softmax(-1).to(v.dtype) @ v
        return super().attend(q, k, v, hidden, scale, tap)


WRONG = [
    "1 ulp in cos",
    "positions from 1",
    "no bias",
    "no eps",
    "interleaved rope",
    "tiled heads",
    "sees the future",
    "scaled queries",
]
WRONG_ROUNDING = [
    "unrounded rope",
    "bias after rounding",
    "weight before the cast",
    "silu unrounded",
    "scores unrounded",
]


@pytest.mark.parametrize("how", WRONG + WRONG_ROUNDING)
def test_the_comparison_sees(how):
    """What the bit comparison is worth: each classic mistake makes it fail."""
    original = oracle()
    for dtype in (torch.float32, torch.bfloat16):
        hf = cast(original, dtype)
        ids = tokens(hf, 2, 33)
        assert not differences(hf, ours(hf, arithmetic=Sabotaged("nothing")), ids)
        if dtype == torch.bfloat16 or how in WRONG:
            assert differences(hf, ours(hf, arithmetic=Sabotaged(how)), ids), dtype
