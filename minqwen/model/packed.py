"""Weights in the forms that a machine multiplies fastest, each exactly what it was made of.

`pack` chooses the form from the weight's dtype, its values and the CPU's instructions, never from a
clock: the same checkpoint is computed the same way in every run on one machine.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minqwen.errors import ConfigError

HALF_MAX = torch.finfo(torch.float16).max
ROWS_AT_ONCE = 1024  # of a matrix that is examined: its float32 copy would take twice its memory
# oneDNN's bfloat16 products read the weights faster for so many rows of x than for fewer of them
# (docs/speed.md has by how much).
FEWEST_ROWS = 4


class Form(Protocol):
    """A weight W [out, in] that is held in another form than as a tensor of its rows."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b in the dtype of x, which is W's. [T, in] -> [T, out]."""

    def weight(self) -> Tensor:
        """W again, every bit."""


def pack(weight: Tensor) -> Form | None:
    """The weight [out, in] in the best form for it; None: it is multiplied best as it is.

    On a CPU with bfloat16 products, bfloat16 is laid out for oneDNN. On others 16-bit weights are
    kept as float16 for FBGEMM, which multiplies them in float32; a matrix with weights that have no
    float16 value is kept in float32. float32 itself stays as it is: packed it is up to twice as
    fast, but the packed products err 1.6 to 2.2 times as much as MKL's.
    """
    if weight.device.type != "cpu" or not weight.numel() or weight.element_size() != 2:
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    if weight.dtype == torch.bfloat16 and multiplies_bfloat16():
        return Blocked(weight)
    if not multiplies_half():
        return None
    scale = half_scale(weight)
    return Widened(weight) if scale is None else Half(weight, scale)


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def multiplies_half() -> bool:
    """Whether FBGEMM is here: float32 products with float16 weights."""
    engines = torch.backends.quantized.supported_engines
    return "fbgemm" in engines and torch.cpu._is_avx2_supported()


def half_scale(weight: Tensor) -> float | None:
    """A power of two by which 16-bit weights become float16 exactly; None: there is none.

    bfloat16 has float32's range. float16 ends at 65,504, and below 2^-14 it loses bits. Ordinary
    weights are small, and fit when the largest of them is brought close to the end.
    """
    if weight.dtype == torch.float16:
        return 1.0 if bool(weight.isfinite().all()) else None
    top = float(weight.abs().max())
    if top == 0:
        return 1.0
    if not top < float("inf"):  # NaN too
        return None
    scale = 2.0 ** min(math.floor(math.log2(HALF_MAX / top)), 100)
    for rows in weight.split(ROWS_AT_ONCE):
        wide = rows.float().mul_(scale)
        if not torch.equal(wide.half().float(), wide):
            return None
    return scale


class Blocked:
    """Laid out in blocks by oneDNN, in the weight's own dtype."""

    def __init__(self, weight: Tensor):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if len(x) >= FEWEST_ROWS:
            return blocked_product(x, self.packed, bias)
        padded = F.pad(x, (0, 0, 0, FEWEST_ROWS - len(x)))
        return blocked_product(padded, self.packed, bias)[: len(x)]

    def weight(self) -> Tensor:
        dense: Tensor = self.packed.to_dense()
        return dense


class Widened:
    """16-bit weights that no 16-bit form holds, in float32, laid out in blocks by oneDNN."""

    def __init__(self, weight: Tensor):
        self.dtype = weight.dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.float())

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        wide = None if bias is None else bias.float()
        return blocked_product(x.float(), self.packed, wide).to(x.dtype)

    def weight(self) -> Tensor:
        dense: Tensor = self.packed.to_dense()
        return dense.to(self.dtype)


def blocked_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


class Half:
    """scale W in float16, laid out by FBGEMM, which widens it and multiplies in float32."""

    def __init__(self, weight: Tensor, scale: float):
        self.dtype = weight.dtype
        self.packed: Any = torch.ops.quantized.linear_prepack_fp16(weight.float().mul_(scale), None)
        self.scale = scale
        self.unscale = torch.tensor([1 / scale])  # one element: its dtype counts in a product

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        # Powers of two: neither the input nor the weight is rounded by them.
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x * self.unscale, self.packed)
        if bias is not None:
            y = y.add_(bias)
        return y.to(x.dtype)

    def weight(self) -> Tensor:
        scaled: Tensor = torch.ops.quantized.linear_unpack_fp16(self.packed)[0]
        return (scaled / self.scale).to(self.dtype)


class Quantised:
    """Rounded to 8 bits, a scale for each row, for oneDNN: another model, near to W's.

    The input is rounded too, a scale for each token, so a token's result does not depend on the
    others in its step.
    """

    def __init__(self, weight: Tensor):
        wide = weight.float()
        self.scales = wide.abs().amax(1).clamp_(min=1e-30).div_(127)
        if not bool(self.scales.isfinite().all()):
            raise ConfigError(
                "int8 arithmetic cannot hold a weight that is NaN or infinite: use native, or "
                "check_finite=True to be told which it is"
            )
        rounded = wide.div_(self.scales[:, None]).round_().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        # Without VNNI, two products of 8 and 8 bits together do not fit the instructions' 16 bits.
        self.most = 127 if torch.cpu._is_vnni_supported() else 63

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, torch.inf, -1, keepdim=True)
        scale = scale.clamp_(min=1e-30).div_(self.most)
        zero = self.most + 1
        rounded = (wide / scale).add_(zero).round_().to(torch.uint8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(rounded, 1.0, zero, self.packed, self.scales, self.zeros, None),
            *(1.0, 0, torch.float32, "none", [], ""),  # no output scale, no operation after it
        )
        y = y.mul_(scale)
        if bias is not None:
            y = y.add_(bias)
        return y.to(x.dtype)

    def weight(self) -> Tensor:
        raise ConfigError(
            "int8 arithmetic has rounded the weights and does not keep them as they were: to save, "
            "copy or change the model, or to see attn.result, load it with arithmetic='native'"
        )


class Whole:
    """As it is: one matrix instead of several."""

    def __init__(self, weight: Tensor):
        self.packed = weight

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.packed, bias)

    def weight(self) -> Tensor:
        return self.packed
