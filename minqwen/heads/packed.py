"""Head extension of quantised checkpoints (AWQ, GPTQ), on the packed words, and of LoRA adapters.

A quantised Linear(in, out) of b bits holds 32/b numbers in each int32 word:

            qweight                    qzeros          scales     g_idx weight of input i and output c
    AWQ     [in, out/8], along out     [G, out/8]      [G, out]   -     (q - z) * s, both of group i // size
    GPTQ    [in*b/32, out], along in   [G, out*b/32]   [G, out]   [in]  the same, of group g_idx[i]

(AutoAWQ's gemm.py, AutoGPTQ's qlinear_cuda_old.py; "v1" GPTQ stores z - 1, "v2" stores z.) A head is a block
of head_dim outputs of q, k and v, and of head_dim inputs of o. Where its borders fall between words, and in o
between groups too, to move heads is to move whole words: nothing is unpacked, nothing rounds, and extending
commutes with dequantising bit for bit. What holds no weight is written as q = z = half the range at scale 0:
exactly zero, also for kernels that take the zero point of symmetric checkpoints for granted.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minqwen.checkpoint import reader, writer
from minqwen.checkpoint.quantization import REQUANTISE, PackedCheckpoint, Packing
from minqwen.config import ModelConfig
from minqwen.errors import HeadsError
from minqwen.heads.convert import MANIFEST, read_manifest
from minqwen.heads.layout import Layout, extended_config
from minqwen.heads.tensors import HEAD_TENSORS, extend_tensor, sha256, shrink_tensor, suffix

Slots = tuple[int | None, ...]


def check_movable(packing: Packing, to: Layout) -> None:
    """Raise HeadsError, with the reason, if `to` cannot be had by moving words."""
    d, old, new = (n * to.head_dim for n in (1, to.source_heads, len(to.heads) - to.source_heads))
    shares = sorted(set(to.shares) - {0.0, 1.0})
    if to.intermediate or to.recipe == "random":
        raise HeadsError(
            f"{'padding the MLP' if to.intermediate else 'recipe random'} is not done on "
            f"packed tensors, expected ghost, zero or split, and the MLP as it is: or "
            f"{REQUANTISE}"
        )
    if d % packing.pack:
        raise HeadsError(
            f"head_dim {d} is not a multiple of {packing.pack}, the {packing.bits}-bit numbers "
            f"in a word: a word would span two heads; {REQUANTISE}"
        )
    if _keeps_o(to):
        return
    if packing.group == -1 or (not packing.act_order and d % packing.group):
        raise HeadsError(
            f"head_dim {d} is not a multiple of the quantisation group {packing.group}: a "
            f"group of o_proj would span heads, so they cannot be moved as they are; "
            f"{REQUANTISE}"
        )
    if packing.act_order and (old % packing.group or new % packing.group):
        raise HeadsError(
            f"desc_act is true, and {old} old and {new} new inputs of o_proj are not "
            f"multiples of the quantisation group {packing.group}: choose another number of "
            f"heads, or {REQUANTISE}"
        )
    if packing.act_order and shares:
        raise HeadsError(
            f"recipe {to.recipe} scales some heads of o_proj, but desc_act is true and its "
            "groups span heads: use ghost or zero"
        )
    if odd := [share for share in shares if math.frexp(share)[0] != 0.5]:
        raise HeadsError(
            f"recipe {to.recipe} has the share {odd[0]:g} in o_proj, which would round, "
            "expected powers of two: use ghost, zero or split"
        )


def _keeps_o(to: Layout) -> bool:
    """Query heads as they were: only KV heads are copied."""
    return to.heads == tuple(range(to.source_heads)) and set(to.shares) == {1.0}


def _blocks(name: str, to: Layout, packing: Packing) -> tuple[int, int, Slots, int, int] | None:
    """(dimension, elements per head, slots, source's count, what empty slots hold) of a part that is made of
    heads; None for one that is not. An o slot without a share is empty, whichever head's q it holds."""
    projection, _, part = suffix(name).partition(".")
    if f"{projection}.weight" not in HEAD_TENSORS or part not in (
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
    ):
        return None
    d, words, middle = to.head_dim, to.head_dim // packing.pack, 1 << packing.bits - 1
    fill = {"qweight": packing.word(middle), "qzeros": packing.word(middle - packing.offset)}.get(
        part, 0
    )
    if projection == "o_proj":
        if _keeps_o(to):
            return None
        unit = {"qweight": d if packing.method == "awq" else words, "g_idx": d}.get(
            part, d // packing.group
        )
        return (
            0,
            unit,
            tuple(h if x else None for h, x in zip(to.heads, to.shares)),
            to.source_heads,
            fill,
        )
    if part == "g_idx":
        return None  # groups of inputs, in whatever order, do not concern the outputs
    unit = words if part == "qzeros" or (part == "qweight" and packing.method == "awq") else d
    slots, count = (
        (to.heads, to.source_heads) if projection == "q_proj" else (to.kv, to.source_kv_heads)
    )
    return 1, unit, slots, count, fill


def extend_part(name: str, tensor: Tensor, to: Layout, packing: Packing) -> Tensor:
    """One tensor of a quantised source as the target has it; `check_movable` has passed.

    name: as AutoAWQ and AutoGPTQ write it, ...self_attn.q_proj.qweight. Raises HeadsError, naming the tensor,
    for scales that cannot be halved exactly and for groups that are out of order where desc_act is false.
    """
    found = _blocks(name, to, packing)
    if found is None:
        return extend_tensor(name, tensor, to)  # biases, and projections that were left unquantised
    dim, unit, slots, count, fill = found
    part, o = name.rsplit(".", 1)[1], dim == 0
    if part == "g_idx" and not packing.act_order:
        if not torch.equal(tensor, _in_order(len(tensor), packing, tensor)):
            raise HeadsError(
                f"{name}: is not in order, expected input // {packing.group} since desc_act is "
                "false: if the checkpoint was made with desc_act, say so in config.json"
            )
        return _in_order(len(slots) * unit, packing, tensor)
    old, new = (
        n * to.head_dim // packing.group for n in (count, len(slots) - count)
    )  # groups of o
    if (
        o and packing.act_order and part in ("qzeros", "scales")
    ):  # groups stay; empty slots get new ones
        return torch.cat([tensor, tensor.new_full((new, tensor.shape[1]), fill)])
    placed = tensor.unflatten(dim, (-1, unit)).index_select(
        dim, torch.tensor([s or 0 for s in slots])
    )
    empty = torch.tensor([j for j, s in enumerate(slots) if s is None], dtype=torch.long)
    placed.index_fill_(dim, empty, fill)
    if part == "g_idx":
        placed[empty] = old + _in_order(len(empty) * unit, packing, tensor).view(-1, unit)
    elif o and part == "scales":
        wanted = (
            placed.double() * torch.tensor([x or 1.0 for x in to.shares]).double()[:, None, None]
        )
        placed = wanted.to(tensor.dtype)
        # Exact scales make exact weights: (q - z) * s rounds as its half does, or, where that would be
        # subnormal, s / 2 being a whole number of the smallest subnormals, neither rounds at all.
        if lost := int((placed != wanted).sum()):
            raise HeadsError(
                f"{name}: {lost} scales are too small to be split exactly in "
                f"{str(tensor.dtype).removeprefix('torch.')}: use ghost"
            )
    return placed.flatten(dim, dim + 1)


def _in_order(inputs: int, packing: Packing, like: Tensor) -> Tensor:
    return (torch.arange(inputs) // packing.group).to(like.dtype)


def shrink_part(name: str, tensor: Tensor, to: Layout, packing: Packing) -> Tensor:
    """The inverse. Raises HeadsError unless extending the result gives `tensor` again, bit for bit."""
    found = _blocks(name, to, packing)
    if found is None:
        source, _ = shrink_tensor(name, tensor, to)
    else:
        dim, unit, slots, count, _ = found
        part, first = name.rsplit(".", 1)[1], [slots.index(i) for i in range(count)]
        if dim == 0 and packing.act_order and part in ("qzeros", "scales"):
            source = tensor[: count * to.head_dim // packing.group].clone()
        elif part == "g_idx" and not packing.act_order:
            source = tensor[: count * unit].clone()
        else:
            blocks = tensor.unflatten(dim, (-1, unit))
            source = blocks.index_select(dim, torch.tensor(first)).flatten(dim, dim + 1)
            if dim == 0 and part == "scales":
                shares = (
                    torch.tensor([to.shares[j] for j in first]).double().repeat_interleave(unit)
                )
                source = (source.double() / shares[:, None]).to(tensor.dtype)
    if sha256(extend_part(name, source, to, packing)) != sha256(tensor):
        raise HeadsError(
            f"{name}: has changed since it was extended, so it is no longer an extension of "
            "its source"
        )
    return source


def extend_packed(
    src: str | Path,
    dst: str | Path,
    to: Layout,
    *,
    arch: str = "qwen2",
    max_shard_bytes: int = writer.MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """`heads.extend` for an AWQ (gemm) or GPTQ (4 or 8 bits) checkpoint: streaming, atomic, with a manifest.

    Recipes ghost, zero and split. The target dequantises to the extension of the dequantised source, bit for
    bit. Raises HeadsError where that cannot be (a group spans heads), or CheckpointError; dst is as it was.
    """
    to.check()
    source = PackedCheckpoint(src)
    check_movable(source.packing, to)
    source.check()
    if (source.path / MANIFEST).exists():
        raise HeadsError(
            f"{src}: has been extended already ({MANIFEST}): shrink it first, or extend its source"
        )
    config = extended_config(source.config, to, arch)
    biases = [
        n for n in config.parameter_shapes() if n.endswith("o_proj.bias") and n not in source.names
    ]
    digests: dict[str, str] = {}

    def moved(name: str) -> Tensor:
        if name in biases:  # only the llama layout has it
            return torch.zeros(config.hidden_size, dtype=getattr(torch, config.dtype))
        tensor = source.read(name)
        digests[name] = sha256(tensor)
        return extend_part(name, tensor, to, source.packing)

    def manifest() -> str:
        return (
            json.dumps(
                {
                    "format": 1,
                    "layout": to.to_dict(),
                    "arch": arch,
                    "source_config": source.config.raw,
                    "source_sha256": digests,
                },
                indent=1,
            )
            + "\n"
        )

    names = source.names + biases
    extra = {MANIFEST: manifest}
    _write(source, dst, config, config.to_dict(), names, moved, extra, max_shard_bytes, progress)


def shrink_packed(
    src: str | Path,
    dst: str | Path,
    *,
    max_shard_bytes: int = writer.MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Undo `extend_packed`: the source's tensors, byte for byte, or HeadsError naming what changed."""
    target, manifest = PackedCheckpoint(src), read_manifest(src)
    if manifest is None:
        raise HeadsError(
            f"{src}: has no {MANIFEST}, so what was added cannot be told from the rest"
        )
    target.check()
    digests, to, raw = manifest["source_sha256"], manifest["layout"], manifest["source_config"]
    if missing := [n for n in digests if n not in target.names]:
        raise HeadsError(
            f"{src}: tensor {missing[0]} is missing, expected all {len(digests)} that "
            f"{MANIFEST} lists"
        )

    def moved(name: str) -> Tensor:
        tensor = shrink_part(name, target.read(name), to, target.packing)
        if sha256(tensor) != digests[name]:
            raise HeadsError(
                f"{src}: {name} has changed since it was extended: its SHA-256 is not the source's"
            )
        return tensor

    config = ModelConfig.from_dict(raw, source=f"{src}/{MANIFEST}")
    _write(target, dst, config, raw, list(digests), moved, {}, max_shard_bytes, progress)


def _write(
    source: PackedCheckpoint,
    dst: str | Path,
    config: ModelConfig,
    raw: dict,
    names: list[str],
    moved: Callable[[str], Tensor],
    extra: dict[str, Callable[[], str]],
    max_shard_bytes: int,
    progress: bool,
) -> None:
    """moved(name) of each name to dst, one in memory at a time; shapes are known before, from `config`."""
    default, known = getattr(torch, config.dtype), set(source.names)
    outputs = {
        name: (
            source.dtype(name) if name in known else default,
            source.packing.shape(name, config) or source.shape(name),
        )
        for name in names
    }
    plan = _shards(outputs, max_shard_bytes)
    bar = tqdm(
        names, desc="moving heads", unit="tensor", leave=False, disable=None if progress else True
    )
    with _replacing(dst, source.path, {MANIFEST}) as tmp:
        (tmp / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        writer._write_weights(tmp, plan, ((name, moved(name)) for name in bar))
        for name, content in extra.items():
            (tmp / name).write_text(content())
        PackedCheckpoint(tmp).check()  # read back before anything is replaced


def _shards(outputs: dict[str, tuple[torch.dtype, tuple[int, ...]]], max_shard_bytes: int) -> dict:
    """`writer.plan_shards` for given tensors: {file: (header, size, {tensor: (place, dtype, shape)})}."""
    codes = {dtype: code for code, dtype in (reader.DTYPES | {"I32": torch.int32}).items()}
    sizes = {
        name: torch.Size(shape).numel() * dtype.itemsize for name, (dtype, shape) in outputs.items()
    }
    shards: list[list[str]] = [[]]
    for name in outputs:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    plan = {}
    for i, names in enumerate(shards, 1):
        header, ends, end = {"__metadata__": {"format": "pt"}}, {}, 0
        for name in sorted(
            names, key=lambda n: -outputs[n][0].itemsize
        ):  # widest first: all aligned
            dtype, shape = outputs[name]
            header[name] = {
                "dtype": codes[dtype],
                "shape": shape,
                "data_offsets": (end, end + sizes[name]),
            }
            ends[name], end = end, end + sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        file = (
            reader.SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        )
        places = {name: (start + ends[name], *outputs[name]) for name in names}
        plan[file] = len(text).to_bytes(8, "little") + text, start + end, places
    return plan


@contextmanager
def _replacing(
    dst: str | Path, sources: str | Path, omit: Iterable[str] = (), new: bool = False
) -> Iterator[Path]:
    """A temporary sibling of dst, with the companions of `sources` in it, that becomes dst at the end if all
    went well: `write_checkpoint`'s protocol. new: dst may not exist."""
    dst = Path(os.path.realpath(dst))
    tmp, lock = dst.parent / f".{dst.name}.tmp-{os.getpid()}", None
    try:
        if new and dst.exists():
            raise HeadsError(f"{dst}: exists; it is not replaced: choose another directory")
        writer._refuse_foreign(dst)
        dst.parent.mkdir(parents=True, exist_ok=True)
        writer._remove_stale(dst)
        tmp.mkdir()
        lock = os.open(tmp, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        writer._copy_companions(Path(sources), tmp, set(omit))
        if (
            Path(sources) / "quantize_config.json"
        ).is_file():  # AutoGPTQ's own; still true of the target
            shutil.copyfile(Path(sources) / "quantize_config.json", tmp / "quantize_config.json")
        yield tmp
        for path in (*tmp.iterdir(), tmp):
            writer._flush(path)
        writer._put_in_place(tmp, dst)
    except OSError as e:
        raise HeadsError(
            f"{dst}: could not be written: {e.strerror or e}; what was there is as it was"
        ) from None
    finally:
        if lock is not None:
            shutil.rmtree(tmp, ignore_errors=True)
            os.close(lock)
