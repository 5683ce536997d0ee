"""Head extension of quantised checkpoints (AWQ, GPTQ), on the packed words.

A head is head_dim outputs of q, k and v, and head_dim inputs of o (`Packing` says how those lie in
words). Where its borders fall between words, and in o between groups too, heads are moved by moving
whole words. Nothing is unpacked and nothing rounds, so extending commutes with dequantising bit for
bit. What holds no weight is written as q = z = half the range at scale 0. That is exactly zero,
also for kernels that assume the zero point of symmetric checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minqwen.checkpoint.packed import PackedCheckpoint
from minqwen.checkpoint.quantised import PARTS
from minqwen.checkpoint.quantization import PROJECTIONS, REQUANTISE, Packing
from minqwen.checkpoint.weight_files import DTYPES, MAX_FILE_BYTES, TensorSpec
from minqwen.checkpoint.writer import write_directory
from minqwen.config import ModelConfig
from minqwen.errors import HeadsError
from minqwen.heads.layout import Layout, extended_config
from minqwen.heads.manifest import (
    MANIFEST,
    Manifest,
    check_written,
    refuse_extended,
    require_manifest,
)
from minqwen.heads.tensors import Blocks, extend_tensor, place, sha256, shrink_tensor, suffix

PER_GROUP = ("qzeros", "scales")  # parts that have a row for each group of inputs


# ---- what can be moved --------------------------------------------------------------------------


def check_movable(packing: Packing, to: Layout) -> None:
    """Raise HeadsError, with the reason, if `to` cannot be had by moving words."""
    if to.intermediate:
        raise _not_done("padding the MLP")
    if to.recipe == "random":
        raise _not_done("recipe random")
    if to.head_dim % packing.pack:
        raise HeadsError(
            f"head_dim {to.head_dim} is not a multiple of {packing.pack}, the {packing.bits}-bit "
            f"numbers in a word: a word would span two heads; {REQUANTISE}"
        )
    if not _keeps_o(to):
        _check_groups(packing, to)
        _check_shares(packing, to)


def _not_done(what: str) -> HeadsError:
    return HeadsError(
        f"{what} is not done on packed tensors, expected ghost, zero or split, and the MLP as it "
        f"is: or {REQUANTISE}"
    )


def _check_groups(packing: Packing, to: Layout) -> None:
    """The inputs of o that are moved must be whole groups."""
    d, group = to.head_dim, packing.group
    if group == -1 or (not packing.act_order and d % group):
        raise HeadsError(
            f"head_dim {d} is not a multiple of the quantisation group {group}: a group of o_proj "
            f"would span heads, so they cannot be moved as they are; {REQUANTISE}"
        )
    old, new = d * to.source_heads, d * (len(to.heads) - to.source_heads)
    if packing.act_order and (old % group or new % group):
        raise HeadsError(
            f"desc_act is true, and {old} old and {new} new inputs of o_proj are not multiples of "
            f"the quantisation group {group}: choose another number of heads, or {REQUANTISE}"
        )


def _check_shares(packing: Packing, to: Layout) -> None:
    """A share of o is a factor on the scales: of whole groups, and exact."""
    shares = sorted(set(to.shares) - {0.0, 1.0})
    if packing.act_order and shares:
        raise HeadsError(
            f"recipe {to.recipe} scales some heads of o_proj, but desc_act is true and its groups "
            "span heads: use ghost or zero"
        )
    inexact = [share for share in shares if math.frexp(share)[0] != 0.5]
    if inexact:
        raise HeadsError(
            f"recipe {to.recipe} has the share {inexact[0]:g} in o_proj, which would round, "
            "expected powers of two: use ghost, zero or split"
        )


def _keeps_o(to: Layout) -> bool:
    """Query heads as they were: only KV heads are copied."""
    return to.heads == tuple(range(to.source_heads)) and set(to.shares) == {1.0}


# ---- one tensor ---------------------------------------------------------------------------------


def extend_part(name: str, tensor: Tensor, to: Layout, packing: Packing) -> Tensor:
    """One tensor of a quantised source as the target has it; `check_movable` has passed.

    name: as AutoAWQ and AutoGPTQ write it, ...self_attn.q_proj.qweight. Raises HeadsError, naming
    the tensor, for scales that cannot be halved exactly and for groups that are out of order where
    desc_act is false.
    """
    blocks = _blocks_of(name, to, packing)
    if blocks is None:
        return extend_tensor(name, tensor, to)  # biases, and projections left unquantised
    part = name.rpartition(".")[2]
    if part == "g_idx":
        return _extend_g_idx(name, tensor, blocks, packing)
    if _groups_stay(part, blocks, packing):
        groups = _new_inputs(blocks, to) // packing.group
        added = tensor.new_full((groups, tensor.shape[1]), _empty(part, packing))
        return torch.cat([tensor, added])
    placed = place(tensor, blocks, _empty(part, packing))
    if blocks.dim == 0 and part == "scales":
        return _share_scales(name, placed, to)
    return placed


def shrink_part(name: str, tensor: Tensor, to: Layout, packing: Packing) -> Tensor:
    """The inverse. HeadsError unless extending the result gives `tensor` again, bit for bit."""
    blocks = _blocks_of(name, to, packing)
    if blocks is None:
        source, _ = shrink_tensor(name, tensor, to)
    else:
        source = _source_of(name.rpartition(".")[2], tensor, blocks, to, packing)
    if sha256(extend_part(name, source, to, packing)) != sha256(tensor):
        raise HeadsError(
            f"{name}: has changed since it was extended, so it is no longer an extension of its "
            "source"
        )
    return source


def _blocks_of(name: str, to: Layout, packing: Packing) -> Blocks | None:
    """How `to` moves a part of a quantised projection, or None if the part stays as it is."""
    projection, _, part = suffix(name).partition(".")
    if projection not in PROJECTIONS or part not in PARTS:
        return None
    if projection == "o_proj":
        return None if _keeps_o(to) else _input_blocks(part, to, packing)
    if part == "g_idx":
        return None  # groups of inputs, in whatever order, do not concern the outputs
    return _output_blocks(projection, part, to, packing)


def _input_blocks(part: str, to: Layout, packing: Packing) -> Blocks:
    """A part of o. A slot without a share is empty, whichever head's q it holds."""
    unit = to.head_dim
    if part in PER_GROUP:
        unit //= packing.group
    elif part == "qweight" and packing.method == "gptq":
        unit //= packing.pack
    slots = tuple(head if share else None for head, share in zip(to.heads, to.shares, strict=True))
    return Blocks(0, unit, slots, to.source_heads)


def _output_blocks(projection: str, part: str, to: Layout, packing: Packing) -> Blocks:
    """A part of q, k or v."""
    unit = to.head_dim
    if part == "qzeros" or (part == "qweight" and packing.method == "awq"):
        unit //= packing.pack
    if projection == "q_proj":
        return Blocks(1, unit, to.heads, to.source_heads)
    return Blocks(1, unit, to.kv, to.source_kv_heads)


def _empty(part: str, packing: Packing) -> int:
    """What a slot without a head holds: q = z = half the range, at scale 0."""
    middle = 1 << (packing.bits - 1)
    if part == "qweight":
        return packing.word(middle)
    if part == "qzeros":
        return packing.word(middle - packing.offset)
    return 0


def _groups_stay(part: str, blocks: Blocks, packing: Packing) -> bool:
    """With act_order a group of o spans heads: it stays, and empty slots get their own groups."""
    return blocks.dim == 0 and packing.act_order and part in PER_GROUP


def _new_inputs(blocks: Blocks, to: Layout) -> int:
    return (len(blocks.slots) - blocks.count) * to.head_dim


def _extend_g_idx(name: str, g_idx: Tensor, blocks: Blocks, packing: Packing) -> Tensor:
    """The group of each input of o."""
    if packing.act_order:
        inputs = place(g_idx, blocks).unflatten(0, (-1, blocks.unit))
        empty = torch.tensor([slot is None for slot in blocks.slots])
        old = blocks.count * blocks.unit // packing.group
        fresh = _in_order(int(empty.sum()) * blocks.unit, packing, g_idx)
        inputs[empty] = old + fresh.view(-1, blocks.unit)
        extended: Tensor = inputs.flatten()
        return extended
    if not torch.equal(g_idx, _in_order(len(g_idx), packing, g_idx)):
        raise HeadsError(
            f"{name}: is not in order, expected input // {packing.group} since desc_act is false: "
            "if the checkpoint was made with desc_act, say so in config.json"
        )
    return _in_order(len(blocks.slots) * blocks.unit, packing, g_idx)


def _in_order(inputs: int, packing: Packing, like: Tensor) -> Tensor:
    return (torch.arange(inputs) // packing.group).to(like.dtype)


def _share_scales(name: str, scales: Tensor, to: Layout) -> Tensor:
    """The scales of o times the slots' shares, or HeadsError if that would round.

    Exact scales make exact weights: (q - z) * s rounds as its half does. Where the half would be
    subnormal, s / 2 is a whole number of the smallest subnormals, and neither rounds at all.
    """
    wanted = scales.double() * _per_row([share or 1.0 for share in to.shares], scales)
    shared = wanted.to(scales.dtype)
    lost = int((shared != wanted).sum())
    if lost:
        raise HeadsError(
            f"{name}: {lost} scales are too small to be split exactly in "
            f"{str(scales.dtype).removeprefix('torch.')}: use ghost"
        )
    return shared


def _per_row(shares: Sequence[float], rows: Tensor) -> Tensor:
    """float64 [rows, 1]: each head's share for every row of that head."""
    factors = torch.tensor(shares).double()
    return factors.repeat_interleave(len(rows) // len(shares))[:, None]


def _source_of(part: str, tensor: Tensor, blocks: Blocks, to: Layout, packing: Packing) -> Tensor:
    """The source's part, if `tensor` is an extension of it."""
    if _groups_stay(part, blocks, packing):
        return tensor[: blocks.count * to.head_dim // packing.group].clone()
    if part == "g_idx" and not packing.act_order:
        return tensor[: blocks.count * blocks.unit].clone()
    first = [blocks.slots.index(head) for head in range(blocks.count)]
    source = _select(tensor, blocks, first)
    if blocks.dim == 0 and part == "scales":
        whole = source.double() / _per_row([to.shares[slot] for slot in first], source)
        return whole.to(tensor.dtype)
    return source


def _select(tensor: Tensor, blocks: Blocks, slots: list[int]) -> Tensor:
    """What these slots of the target hold."""
    heads: Tensor = tensor.unflatten(blocks.dim, (-1, blocks.unit))
    chosen = heads.index_select(blocks.dim, torch.tensor(slots))
    return chosen.flatten(blocks.dim, blocks.dim + 1)


# ---- whole checkpoints --------------------------------------------------------------------------


def extend_packed(
    src: str | Path,
    dst: str | Path,
    to: Layout,
    *,
    arch: str = "qwen2",
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: bool = False,
    overwrite: bool = False,
) -> None:
    """`extend` for an AWQ (gemm) or GPTQ (4 or 8 bits) checkpoint, atomic and with a manifest.

    One tensor is in memory at a time. Recipes ghost, zero and split. The target dequantises to the
    extension of the dequantised source, bit for bit. Raises HeadsError where that cannot be (a
    group spans heads), or CheckpointError; dst is as it was.
    """
    to.check()
    source = PackedCheckpoint(src)
    check_movable(source.packing, to)
    source.check()
    refuse_extended(src)
    config = extended_config(source.config, to, arch)
    specs = _specs(source, list(source.tensors), config)
    for name, shape in config.parameter_shapes().items():
        if name.endswith("o_proj.bias") and name not in specs:  # only the llama layout has it
            specs[name] = TensorSpec(DTYPES[config.dtype], tuple(shape))
    digests: dict[str, str] = {}
    write_directory(
        dst,
        config.to_dict(),
        specs,
        _extended(source, specs, to, digests, progress),
        check=_check_packed,
        max_file_bytes=max_file_bytes,
        sources=source.path,
        extra_files={
            MANIFEST: lambda: Manifest(to, arch, dict(source.config.raw), digests).to_json()
        },
        omit={MANIFEST},
        overwrite=overwrite,
    )


def shrink_packed(
    src: str | Path,
    dst: str | Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: bool = False,
    overwrite: bool = False,
) -> None:
    """Undo `extend_packed`: the source's tensors, byte for byte.

    Every tensor must have the SHA-256 that was recorded, in memory and, before dst appears, in the
    files. Raises HeadsError, naming what has changed since it was extended, or CheckpointError; dst
    is as it was.
    """
    manifest = require_manifest(src)
    target = PackedCheckpoint(src)
    target.check()
    manifest.check_fits(target.config, src)
    names = list(manifest.source_sha256)
    missing = [name for name in names if name not in target.tensors]
    if missing:
        raise HeadsError(
            f"{src}: tensor {missing[0]} is missing, expected all {len(names)} that {MANIFEST} "
            "lists"
        )
    unlisted = [n for n in target.tensors if n not in names and not n.endswith("o_proj.bias")]
    if unlisted:  # the source had it too: extending adds no tensor but o_proj's bias
        raise HeadsError(
            f"{src}: tensor {unlisted[0]} is not in {MANIFEST}, expected every tensor of the "
            "source; extend the source again"
        )
    _check_dropped(target, names)

    def check(directory: Path) -> None:
        _check_packed(directory)
        check_written(PackedCheckpoint(directory), manifest.source_sha256)

    write_directory(
        dst,
        manifest.source_config,
        _specs(target, names, manifest.config(src)),
        _shrunk(target, manifest, progress),
        check=check,
        max_file_bytes=max_file_bytes,
        sources=target.path,
        omit={MANIFEST},
        overwrite=overwrite,
    )


def _check_dropped(target: PackedCheckpoint, names: Sequence[str]) -> None:
    """What extending has added must still be what it was: biases of zero."""
    for name in target.tensors:
        if name not in names and target.read(name).any():
            raise HeadsError(
                f"{target.file(name)}: {name} is not zero, as it was when it was added: it is no "
                "longer an extension of its source"
            )


def _extended(
    source: PackedCheckpoint,
    specs: dict[str, TensorSpec],
    to: Layout,
    digests: dict[str, str],
    progress: bool,
) -> Iterator[tuple[str, Tensor]]:
    """The target's tensors; the digests of the source's are taken on the way."""
    for name in _shown(list(specs), progress):
        if name in source.tensors:
            tensor = source.read(name)
            digests[name] = sha256(tensor)
            with _in_file(source, name):
                part = extend_part(name, tensor, to, source.packing)
            yield name, part
        else:
            yield name, torch.zeros(specs[name].shape, dtype=specs[name].dtype)


def _shrunk(
    target: PackedCheckpoint, manifest: Manifest, progress: bool
) -> Iterator[tuple[str, Tensor]]:
    """The source's tensors, each with the digest that it had."""
    for name in _shown(list(manifest.source_sha256), progress):
        with _in_file(target, name):
            tensor = shrink_part(name, target.read(name), manifest.layout, target.packing)
        manifest.check_source_tensor(name, sha256(tensor), target.path)
        yield name, tensor


@contextmanager
def _in_file(source: PackedCheckpoint, name: str) -> Iterator[None]:
    """An error about a tensor begins with the file that holds it."""
    try:
        yield
    except HeadsError as error:
        raise HeadsError(f"{source.file(name)}: {error}") from None


def _specs(
    source: PackedCheckpoint, names: Sequence[str], config: ModelConfig
) -> dict[str, TensorSpec]:
    """Dtypes as they are; shapes as `config` gives them to the attention, else as they are."""
    specs = {}
    for name in names:
        shape = source.packing.shape(name, config) or source.shape(name)
        specs[name] = TensorSpec(source.dtype(name), shape)
    return specs


def _check_packed(directory: Path) -> None:
    PackedCheckpoint(directory).check()


def _shown(names: list[str], progress: bool) -> Iterator[str]:
    """The names, with a bar; disable=None: none where stderr is not a terminal."""
    disable = None if progress else True
    yield from tqdm(names, desc="moving heads", unit="tensor", leave=False, disable=disable)
