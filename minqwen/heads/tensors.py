"""One parameter at a time: the source's tensors as the target has them, and back."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from minqwen.heads.layout import Layout

HEAD_TENSORS = {  # suffix -> (dimension that is made of heads, "q" or "kv")
    "q_proj.weight": (0, "q"),
    "q_proj.bias": (0, "q"),
    "o_proj.weight": (1, "q"),
    "k_proj.weight": (0, "kv"),
    "k_proj.bias": (0, "kv"),
    "v_proj.weight": (0, "kv"),
    "v_proj.bias": (0, "kv"),
}


CHANNEL_TENSORS = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}


def suffix(name: str) -> str:
    return ".".join(name.rsplit(".", 2)[-2:])


def extend_tensor(name: str, tensor: Tensor, to: Layout) -> Tensor:
    """One parameter of the source as the target has it. Any dtype; only weighted shares round.

    name: Hugging Face's. Tensors that no layout touches come back as they are.
    """
    kind = suffix(name)
    if kind in CHANNEL_TENSORS and to.intermediate:
        return _place(tensor, CHANNEL_TENSORS[kind], to.intermediate, 1)
    if kind not in HEAD_TENSORS:
        return tensor
    dim, which = HEAD_TENSORS[kind]
    if which == "kv":
        return _place(tensor, dim, to.kv, to.head_dim)
    if kind == "o_proj.weight":
        source = tensor.unflatten(1, (to.source_heads, to.head_dim))
        columns = source.new_zeros(len(source), len(to.heads), to.head_dim)
        for head in range(to.source_heads):
            first, *others = [j for j, h in enumerate(to.heads) if h == head and to.shares[j]]
            rest = source[:, head].double() if others else source[:, head]
            for j in others:
                part = source[:, head].double() * to.shares[j]
                if to.recipe == "weighted":
                    part = on_grid_of(source[:, head], part)
                columns[:, j] = part
                rest = rest - part
            columns[:, first] = (
                rest  # exact: the columns of a head's slots add up to the source's, bit for bit
            )
        return columns.flatten(1)
    rows = _place(tensor, dim, to.heads, to.head_dim)
    if to.recipe == "random" and None in to.heads:
        rows = _random_rows(name, tensor, rows, to)
    return rows


def shrink_tensor(name: str, tensor: Tensor, to: Layout) -> tuple[Tensor, dict[int, float]]:
    """The inverse: the source's parameter out of the target's, and what does not fit.

    Returns (tensor, residuals): residuals[slot] is the largest absolute difference between that slot's weights
    and what `extend_tensor` would write there from the result: empty when nothing has drifted.
    """
    kind = suffix(name)
    if kind in CHANNEL_TENSORS and to.intermediate:
        dim, unit, slots, count = CHANNEL_TENSORS[kind], 1, to.intermediate, to.source_intermediate
    elif kind in HEAD_TENSORS:
        dim, which = HEAD_TENSORS[kind]
        slots, count = (to.heads, to.source_heads) if which == "q" else (to.kv, to.source_kv_heads)
        unit = to.head_dim
    else:
        return tensor, {}
    blocks = tensor.unflatten(dim, (len(slots), unit))
    first = [slots.index(i) for i in range(count)]
    source = blocks.index_select(dim, torch.tensor(first, device=tensor.device))
    if (
        kind == "o_proj.weight"
    ):  # a head's columns are the sum of its slots'; halves add up without rounding
        for head in range(count):
            parts = [blocks[:, j] for j, h in enumerate(slots) if h == head and to.shares[j]]
            source[:, head] = parts[0] if len(parts) == 1 else sum(part.double() for part in parts)
    source = source.flatten(dim, dim + 1)
    again = extend_tensor(name, source, to).unflatten(dim, (len(slots), unit))
    residuals = {}
    for j in range(len(slots)):
        got, expected = blocks.select(dim, j), again.select(dim, j)
        if not torch.equal(got, expected):
            residuals[j] = float((got.double() - expected.double()).abs().max())
    return source, residuals


def on_grid_of(x: Tensor, part: Tensor) -> Tensor:
    """`part`, float64, rounded to units in the last place of x: then x - part is exact in x's dtype as well."""
    info = torch.finfo(x.dtype)
    _, exponent = torch.frexp(x.double())
    ulp = torch.ldexp(torch.full_like(part, info.eps / 2), exponent).clamp_min(info.tiny * info.eps)
    return (part / ulp).round() * ulp


def _place(tensor: Tensor, dim: int, slots: tuple[int | None, ...], unit: int) -> Tensor:
    """Blocks of `unit` along `dim`, slot by slot: the source's block, or zeros."""
    blocks = tensor.unflatten(dim, (-1, unit))
    index = torch.tensor([0 if s is None else s for s in slots], device=tensor.device)
    placed = blocks.index_select(dim, index)
    for j, s in enumerate(slots):
        if s is None:
            placed.select(dim, j).zero_()
    return placed.flatten(dim, dim + 1)


def _random_rows(name: str, source: Tensor, rows: Tensor, to: Layout) -> Tensor:
    """Fill the slots without a head with normal noise of the source's spread, keyed by (seed, name)."""
    key = hashlib.sha256(f"{to.seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    blocks = rows.unflatten(0, (len(to.heads), to.head_dim))
    spread = float(source.float().std())
    for j, head in enumerate(to.heads):
        if head is None:
            noise = torch.randn(blocks[j].shape, generator=generator) * spread
            blocks[j] = noise.to(source.dtype)
    return blocks.flatten(0, 1)


def sha256(tensor: Tensor) -> str:
    """Of a tensor's bytes, little-endian, row by row."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
