"""One parameter at a time: the source's tensor as the target has it, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minqwen.heads.layout import Layout, Slots

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
    """The last two parts of a parameter's name: "q_proj.weight"."""
    return ".".join(name.rsplit(".", 2)[-2:])


@dataclass(frozen=True)
class Blocks:
    """A parameter as a row of blocks, `unit` elements each along `dim`.

    The source has `count` of them; the target has one for each of `slots`, which says whose it is.
    """

    dim: int
    unit: int
    slots: Slots
    count: int


def blocks_of(name: str, to: Layout) -> Blocks | None:
    """How `to` moves the parameter `name` (Hugging Face's), or None if it stays as it is."""
    kind = suffix(name)
    if kind in CHANNEL_TENSORS and to.intermediate:
        return Blocks(CHANNEL_TENSORS[kind], 1, to.intermediate, to.source_intermediate)
    if kind not in HEAD_TENSORS:
        return None
    dim, which = HEAD_TENSORS[kind]
    if which == "kv":
        return Blocks(dim, to.head_dim, to.kv, to.source_kv_heads)
    return Blocks(dim, to.head_dim, to.heads, to.source_heads)


def extend_tensor(name: str, tensor: Tensor, to: Layout) -> Tensor:
    """One parameter of the source as the target has it. Any dtype; only weighted shares round.

    name: Hugging Face's. A tensor that the layout does not touch comes back itself.
    """
    blocks = blocks_of(name, to)
    if blocks is None:
        return tensor
    kind = suffix(name)
    if kind == "o_proj.weight":
        return _share_columns(tensor, to)
    placed = place(tensor, blocks)
    if kind.startswith("q_proj") and to.recipe == "random":
        _fill_with_noise(name, tensor, placed, to)
    return placed


def needs_whole(name: str, to: Layout) -> bool:
    """Whether every slot of a parameter depends on the whole source tensor.

    The noise of recipe random has the spread of all of q.
    """
    return to.recipe == "random" and suffix(name).startswith("q_proj")


def extend_slots(
    name: str, to: Layout, slots: range, read: Callable[[list[int]], Tensor]
) -> Tensor:
    """These slots of what `extend_tensor` makes of a parameter, bit for bit.

    For a parameter that `blocks_of` moves and of which not the whole is needed (`needs_whole`).
    read(numbers): the source's blocks with these numbers, ascending, side by side. It is called
    once, for the blocks that the slots need.
    """
    blocks = blocks_of(name, to)
    assert blocks is not None and not needs_whole(name, to), name
    if suffix(name) == "o_proj.weight":
        return _share_some_columns(to, slots, read)
    mine = blocks.slots[slots.start : slots.stop]
    held = sorted({block for block in mine if block is not None})
    source = read(held)
    if not held:
        shape = list(source.shape)
        shape[blocks.dim] = len(slots) * blocks.unit
        return source.new_zeros(shape)
    index = {block: i for i, block in enumerate(held)}
    moved = tuple(None if block is None else index[block] for block in mine)
    return place(source, replace(blocks, slots=moved, count=len(held)))


def shrink_tensor(name: str, tensor: Tensor, to: Layout) -> tuple[Tensor, dict[int, float]]:
    """The inverse: the source's parameter out of the target's, and what does not fit.

    Returns (tensor, residuals). residuals[slot] is the largest absolute difference between that
    slot's weights and what `extend_tensor` would write there from the result. It is empty when
    nothing has drifted.
    """
    blocks = blocks_of(name, to)
    if blocks is None:
        return tensor, {}
    target = tensor.unflatten(blocks.dim, (len(blocks.slots), blocks.unit))
    first = torch.tensor([blocks.slots.index(i) for i in range(blocks.count)], device=tensor.device)
    source = target.index_select(blocks.dim, first)
    if suffix(name) == "o_proj.weight":
        for head in range(blocks.count):
            source[:, head] = _sum_columns(target, to.contributing_slots(head))
    source = source.flatten(blocks.dim, blocks.dim + 1)
    return source, _residuals(name, source, target, to, blocks)


def _residuals(
    name: str, source: Tensor, target: Tensor, to: Layout, blocks: Blocks
) -> dict[int, float]:
    again = extend_tensor(name, source, to).unflatten(blocks.dim, (len(blocks.slots), blocks.unit))
    found = {}
    for slot in range(len(blocks.slots)):
        got, expected = target.select(blocks.dim, slot), again.select(blocks.dim, slot)
        if not torch.equal(got, expected):
            found[slot] = float((got.double() - expected.double()).abs().max())
    return found


def _share_columns(weight: Tensor, to: Layout) -> Tensor:
    """o_proj: each head's columns in shares over its slots. [D, H d] -> [D, H' d].

    The first slot gets what the others leave, which is exact: the columns of a head's slots add up
    to the source's bit for bit.
    """
    source: Tensor = weight.unflatten(1, (to.source_heads, to.head_dim))  # [D, H, d]
    columns = source.new_zeros(len(source), len(to.heads), to.head_dim)
    for head in range(to.source_heads):
        first, *others = to.contributing_slots(head)
        rest = source[:, head].double() if others else source[:, head]
        for slot in others:
            part = source[:, head].double() * to.shares[slot]
            if to.recipe == "weighted":
                part = on_grid_of(source[:, head], part)
            columns[:, slot] = part
            rest = rest - part
        columns[:, first] = rest
    return columns.flatten(1)


def _share_some_columns(to: Layout, slots: range, read: Callable[[list[int]], Tensor]) -> Tensor:
    """`_share_columns`, of these slots alone.

    A head's first slot gets what its others leave. So all slots of each head are made, and those
    that nobody asked for are dropped.
    """
    held = sorted({h for j in slots if to.shares[j] and (h := to.heads[j]) is not None})
    shared = {slot for head in held for slot in to.contributing_slots(head)}
    made = sorted(shared.union(slots))
    index = {head: i for i, head in enumerate(held)}
    part = replace(
        to,
        source_heads=len(held),
        heads=tuple(_numbered(to.heads[slot], index) for slot in made),
        shares=tuple(to.shares[slot] for slot in made),
    )
    columns: Tensor = _share_columns(read(held), part).unflatten(1, (len(made), to.head_dim))
    wanted = torch.tensor([made.index(slot) for slot in slots], dtype=torch.long)
    return columns.index_select(1, wanted).flatten(1)


def _numbered(head: int | None, index: dict[int, int]) -> int | None:
    return None if head is None else index.get(head)


def _sum_columns(columns: Tensor, slots: list[int]) -> Tensor:
    """A head's o_proj columns [D, d] out of [D, H', d]: the shares add up without rounding."""
    total = columns[:, slots[0]]
    for slot in slots[1:]:
        total = total.double() + columns[:, slot].double()
    return total


def on_grid_of(x: Tensor, part: Tensor) -> Tensor:
    """`part`, float64, rounded to units in the last place of x.

    x - part is then exact in x's dtype as well.
    """
    info = torch.finfo(x.dtype)
    _, exponent = torch.frexp(x.double())
    ulp = torch.ldexp(torch.full_like(part, info.eps / 2), exponent).clamp_min(info.tiny * info.eps)
    return (part / ulp).round() * ulp


def place(tensor: Tensor, blocks: Blocks, empty: int = 0) -> Tensor:
    """Slot by slot the source's block, or `empty` in all its elements."""
    source: Tensor = tensor.unflatten(blocks.dim, (-1, blocks.unit))
    index = torch.tensor([slot or 0 for slot in blocks.slots], device=tensor.device)
    placed = source.index_select(blocks.dim, index)
    for j, slot in enumerate(blocks.slots):
        if slot is None:
            placed.select(blocks.dim, j).fill_(empty)
    return placed.flatten(blocks.dim, blocks.dim + 1)


def _fill_with_noise(name: str, source: Tensor, placed: Tensor, to: Layout) -> None:
    """Normal noise of the source's spread in q's slots without a head, keyed by (seed, name)."""
    key = hashlib.sha256(f"{to.seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    slots = placed.unflatten(0, (len(to.heads), to.head_dim))  # a view of `placed`
    spread = float(source.float().std())
    for slot, head in zip(slots, to.heads):
        if head is None:
            slot.copy_(torch.randn(slot.shape, generator=generator) * spread)


def sha256(tensor: Tensor) -> str:
    """Of a tensor's bytes, little-endian, row by row, as 64 hexadecimal digits."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
