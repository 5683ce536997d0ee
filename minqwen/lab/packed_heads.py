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
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from minqwen.checkpoint import Checkpoint, reader, writer
from minqwen.config import ModelConfig
from minqwen.lab.heads import (CHANNEL_TENSORS, HEAD_TENSORS, MANIFEST, HeadsError, Layout, extend_tensor,
                               extended_config, read_manifest, sha256, shrink_tensor, suffix)

Slots = tuple[int | None, ...]


REQUANTISE = "extend the unquantised checkpoint and quantise that"


@dataclass(frozen=True)
class Packing:
    """How numbers lie in words. offset: what GPTQ v1 subtracts from a zero point before it stores it.
    act_order (desc_act): inputs belong to groups in any order, so that a group of o spans heads."""

    method: str
    bits: int
    group: int
    offset: int
    act_order: bool

    @classmethod
    def read(cls, found: dict, source: object = "config.json") -> Packing:
        """From config.json's quantization_config. Raises HeadsError for what is not AWQ gemm or GPTQ."""
        method, bits, group = found.get("quant_method"), found.get("bits"), found.get("group_size")
        gptq = method == "gptq"
        form = str(found.get("checkpoint_format", "gptq") if gptq else found.get("version", "gemm")).lower()
        known = {"awq": ["gemm 4"], "gptq": ["gptq 4", "gptq 8", "gptq_v2 4", "gptq_v2 8"]}
        if f"{form} {bits!r}" not in known.get(str(method), ()):
            raise HeadsError(f"{source}: quantization_config is {method!r} {form!r} with {bits!r} bits, "
                             f"expected awq gemm with 4, or gptq or gptq_v2 with 4 or 8: {REQUANTISE}")
        if type(group) is not int or group < 1 and group != -1:
            raise HeadsError(f"{source}: quantization_config.group_size is {group!r}, expected a number of "
                             "inputs, or -1; correct it")
        return cls(method, bits, group, int(gptq and form == "gptq"), gptq and found.get("desc_act") is True)

    @property
    def pack(self) -> int:
        return 32 // self.bits

    def word(self, value: int) -> int:
        """One int32 that holds `value` everywhere."""
        word = sum(value << shift for shift in range(0, 32, self.bits))
        return word - (1 << 32) if word >> 31 else word

    def shape(self, name: str, config: ModelConfig) -> tuple[int, ...] | None:
        """What a tensor of the attention must have under `config`; None for other tensors."""
        projection, _, part = suffix(name).partition(".")
        if f"{projection}.weight" not in HEAD_TENSORS:
            return None
        outputs = {"q_proj": config.q_size, "o_proj": config.hidden_size}.get(projection, config.kv_size)
        inputs = config.q_size if projection == "o_proj" else config.hidden_size
        groups = 1 if self.group == -1 else -(-inputs // self.group)
        words = (inputs, outputs // self.pack) if self.method == "awq" else (inputs // self.pack, outputs)
        shapes = {"qweight": words, "qzeros": (groups, outputs // self.pack), "scales": (groups, outputs),
                  "g_idx": (inputs,), "bias": (outputs,), "weight": (outputs, inputs)}
        return shapes.get(part, ())

    def check(self, to: Layout) -> None:
        """Raise HeadsError, with the reason, if `to` cannot be had by moving words."""
        d, old, new = (n * to.head_dim for n in (1, to.source_heads, len(to.heads) - to.source_heads))
        shares = sorted(set(to.shares) - {0.0, 1.0})
        if to.intermediate or to.recipe == "random":
            raise HeadsError(f"{'padding the MLP' if to.intermediate else 'recipe random'} is not done on "
                             f"packed tensors, expected ghost, zero or split, and the MLP as it is: or "
                             f"{REQUANTISE}")
        if d % self.pack:
            raise HeadsError(f"head_dim {d} is not a multiple of {self.pack}, the {self.bits}-bit numbers "
                             f"in a word: a word would span two heads; {REQUANTISE}")
        if _keeps_o(to):
            return
        if self.group == -1 or (not self.act_order and d % self.group):
            raise HeadsError(f"head_dim {d} is not a multiple of the quantisation group {self.group}: a "
                             f"group of o_proj would span heads, so they cannot be moved as they are; "
                             f"{REQUANTISE}")
        if self.act_order and (old % self.group or new % self.group):
            raise HeadsError(f"desc_act is true, and {old} old and {new} new inputs of o_proj are not "
                             f"multiples of the quantisation group {self.group}: choose another number of "
                             f"heads, or {REQUANTISE}")
        if self.act_order and shares:
            raise HeadsError(f"recipe {to.recipe} scales some heads of o_proj, but desc_act is true and its "
                             "groups span heads: use ghost or zero")
        if odd := [share for share in shares if math.frexp(share)[0] != 0.5]:
            raise HeadsError(f"recipe {to.recipe} has the share {odd[0]:g} in o_proj, which would round, "
                             "expected powers of two: use ghost, zero or split")


def _keeps_o(to: Layout) -> bool:
    """Query heads as they were: only KV heads are copied."""
    return to.heads == tuple(range(to.source_heads)) and set(to.shares) == {1.0}


def _blocks(name: str, to: Layout, packing: Packing) -> tuple[int, int, Slots, int, int] | None:
    """(dimension, elements per head, slots, source's count, what empty slots hold) of a part that is made of
    heads; None for one that is not. An o slot without a share is empty, whichever head's q it holds."""
    projection, _, part = suffix(name).partition(".")
    if f"{projection}.weight" not in HEAD_TENSORS or part not in ("qweight", "qzeros", "scales", "g_idx"):
        return None
    d, words, middle = to.head_dim, to.head_dim // packing.pack, 1 << packing.bits - 1
    fill = {"qweight": packing.word(middle), "qzeros": packing.word(middle - packing.offset)}.get(part, 0)
    if projection == "o_proj":
        if _keeps_o(to):
            return None
        unit = {"qweight": d if packing.method == "awq" else words, "g_idx": d}.get(part, d // packing.group)
        return 0, unit, tuple(h if x else None for h, x in zip(to.heads, to.shares)), to.source_heads, fill
    if part == "g_idx":
        return None  # groups of inputs, in whatever order, do not concern the outputs
    unit = words if part == "qzeros" or (part == "qweight" and packing.method == "awq") else d
    slots, count = (to.heads, to.source_heads) if projection == "q_proj" else (to.kv, to.source_kv_heads)
    return 1, unit, slots, count, fill


def extend_part(name: str, tensor: Tensor, to: Layout, packing: Packing) -> Tensor:
    """One tensor of a quantised source as the target has it; `packing.check(to)` has passed.

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
            raise HeadsError(f"{name}: is not in order, expected input // {packing.group} since desc_act is "
                             "false: if the checkpoint was made with desc_act, say so in config.json")
        return _in_order(len(slots) * unit, packing, tensor)
    old, new = (n * to.head_dim // packing.group for n in (count, len(slots) - count))  # groups of o
    if o and packing.act_order and part in ("qzeros", "scales"):  # groups stay; empty slots get new ones
        return torch.cat([tensor, tensor.new_full((new, tensor.shape[1]), fill)])
    placed = tensor.unflatten(dim, (-1, unit)).index_select(dim, torch.tensor([s or 0 for s in slots]))
    empty = torch.tensor([j for j, s in enumerate(slots) if s is None], dtype=torch.long)
    placed.index_fill_(dim, empty, fill)
    if part == "g_idx":
        placed[empty] = old + _in_order(len(empty) * unit, packing, tensor).view(-1, unit)
    elif o and part == "scales":
        wanted = placed.double() * torch.tensor([x or 1.0 for x in to.shares]).double()[:, None, None]
        placed = wanted.to(tensor.dtype)
        # Exact scales make exact weights: (q - z) * s rounds as its half does, or, where that would be
        # subnormal, s / 2 being a whole number of the smallest subnormals, neither rounds at all.
        if lost := int((placed != wanted).sum()):
            raise HeadsError(f"{name}: {lost} scales are too small to be split exactly in "
                             f"{str(tensor.dtype).removeprefix('torch.')}: use ghost")
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
                shares = torch.tensor([to.shares[j] for j in first]).double().repeat_interleave(unit)
                source = (source.double() / shares[:, None]).to(tensor.dtype)
    if sha256(extend_part(name, source, to, packing)) != sha256(tensor):
        raise HeadsError(f"{name}: has changed since it was extended, so it is no longer an extension of "
                         "its source")
    return source


# ---- whole checkpoints -------------------------------------------------------------------------------------


class PackedCheckpoint(Checkpoint):
    """A quantised checkpoint under the names in its files; reads as `Checkpoint` does, in bounded memory."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files = self._find_files()
        reader.require_regular(self.path / "config.json")
        self.config = ModelConfig.from_json(self.path)
        if self.config.quantization_config is None:
            raise HeadsError(f"{path}: has no quantization_config, expected an AWQ or GPTQ checkpoint")
        self.packing = Packing.read(self.config.quantization_config, self.path / "config.json")
        self._stamps = {file: reader.require_regular(self.path / file) for file in files}
        self._tensors = {}
        for file, listed in files.items():
            self._read_header(file, listed)
        self.names = list(self._tensors)

    def _read_header(self, file: str, listed: set[str] | None) -> None:
        types = reader.DTYPES | {"I32": torch.int32}
        with self._opened(file) as f:
            found = {name: f.get_slice(name) for name in f.keys()}
            if listed is not None and listed != set(found):
                raise HeadsError(f"{self.path / file}: holds other tensors than {reader.INDEX} says, "
                                 "expected exactly those; fetch both again")
            for name, at in found.items():
                if at.get_dtype() not in types or not at.get_shape():
                    raise HeadsError(f"{self.path / file}: tensor {name} has dtype {at.get_dtype()} and "
                                     f"shape {at.get_shape()}, expected a vector or matrix of "
                                     f"{', '.join(types)}")
                self._tensors[name] = reader._Stored(file, name, types[at.get_dtype()], tuple(at.get_shape()))

    def check(self) -> None:
        """Every part of every attention is there, of the shape that config.json and the packing give."""
        for name in self.names:
            if (expected := self.packing.shape(name, self.config)) not in (None, self.shape(name)):
                raise HeadsError(f"{self.file(name)}: tensor {name} has shape {self.shape(name)}, expected "
                                 f"{expected or 'no such tensor'} from config.json; fix the one or the other")
        packed = ("qweight", "qzeros", "scales", *(["g_idx"] if self.packing.act_order else []))
        for name in self.config.parameter_shapes():
            stem, _, part = name.rpartition(".")
            if ".self_attn." not in name or name in self._tensors:
                continue
            missing = [f"{stem}.{p}" for p in (packed if part == "weight" else (part,))]
            if missing := [n for n in missing if n not in self._tensors]:
                raise HeadsError(f"{self.path}: tensor {missing[0]} is missing, expected every part of "
                                 f"{stem}; fetch the checkpoint again")


def extend_packed(src: str | Path, dst: str | Path, to: Layout, *, arch: str = "qwen2",
                  max_shard_bytes: int = writer.MAX_SHARD_BYTES, progress: bool = False) -> None:
    """`heads.extend` for an AWQ (gemm) or GPTQ (4 or 8 bits) checkpoint: streaming, atomic, with a manifest.

    Recipes ghost, zero and split. The target dequantises to the extension of the dequantised source, bit for
    bit. Raises HeadsError where that cannot be (a group spans heads), or CheckpointError; dst is as it was.
    """
    to.check()
    source = PackedCheckpoint(src)
    source.packing.check(to)
    source.check()
    if (source.path / MANIFEST).exists():
        raise HeadsError(f"{src}: has been extended already ({MANIFEST}): shrink it first, or extend its "
                         "source")
    config = extended_config(source.config, to, arch)
    biases = [n for n in config.parameter_shapes() if n.endswith("o_proj.bias") and n not in source.names]
    digests: dict[str, str] = {}

    def moved(name: str) -> Tensor:
        if name in biases:  # only the llama layout has it
            return torch.zeros(config.hidden_size, dtype=getattr(torch, config.dtype))
        tensor = source.read(name)
        digests[name] = sha256(tensor)
        return extend_part(name, tensor, to, source.packing)

    def manifest() -> str:
        return json.dumps({"format": 1, "layout": to.to_dict(), "arch": arch,
                           "source_config": source.config.raw, "source_sha256": digests}, indent=1) + "\n"

    names = source.names + biases
    extra = {MANIFEST: manifest}
    _write(source, dst, config, config.to_dict(), names, moved, extra, max_shard_bytes, progress)


def shrink_packed(src: str | Path, dst: str | Path, *, max_shard_bytes: int = writer.MAX_SHARD_BYTES,
                  progress: bool = False) -> None:
    """Undo `extend_packed`: the source's tensors, byte for byte, or HeadsError naming what changed."""
    target, manifest = PackedCheckpoint(src), read_manifest(src)
    if manifest is None:
        raise HeadsError(f"{src}: has no {MANIFEST}, so what was added cannot be told from the rest")
    target.check()
    digests, to, raw = manifest["source_sha256"], manifest["layout"], manifest["source_config"]
    if missing := [n for n in digests if n not in target.names]:
        raise HeadsError(f"{src}: tensor {missing[0]} is missing, expected all {len(digests)} that "
                         f"{MANIFEST} lists")

    def moved(name: str) -> Tensor:
        tensor = shrink_part(name, target.read(name), to, target.packing)
        if sha256(tensor) != digests[name]:
            raise HeadsError(f"{src}: {name} has changed since it was extended: its SHA-256 is not the "
                             "source's")
        return tensor

    config = ModelConfig.from_dict(raw, source=f"{src}/{MANIFEST}")
    _write(target, dst, config, raw, list(digests), moved, {}, max_shard_bytes, progress)


def _write(source: PackedCheckpoint, dst: str | Path, config: ModelConfig, raw: dict, names: list[str],
           moved: Callable[[str], Tensor], extra: dict[str, Callable[[], str]], max_shard_bytes: int,
           progress: bool) -> None:
    """moved(name) of each name to dst, one in memory at a time; shapes are known before, from `config`."""
    default, known = getattr(torch, config.dtype), set(source.names)
    outputs = {name: (source.dtype(name) if name in known else default,
                      source.packing.shape(name, config) or source.shape(name)) for name in names}
    plan = _shards(outputs, max_shard_bytes)
    bar = tqdm(names, desc="moving heads", unit="tensor", leave=False, disable=None if progress else True)
    with _replacing(dst, source.path, {MANIFEST}) as tmp:
        (tmp / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        writer._write_weights(tmp, plan, ((name, moved(name)) for name in bar))
        for name, content in extra.items():
            (tmp / name).write_text(content())
        PackedCheckpoint(tmp).check()  # read back before anything is replaced


def _shards(outputs: dict[str, tuple[torch.dtype, tuple[int, ...]]], max_shard_bytes: int) -> dict:
    """`writer.plan_shards` for given tensors: {file: (header, size, {tensor: (place, dtype, shape)})}."""
    codes = {dtype: code for code, dtype in (reader.DTYPES | {"I32": torch.int32}).items()}
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (dtype, shape) in outputs.items()}
    shards: list[list[str]] = [[]]
    for name in outputs:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    plan = {}
    for i, names in enumerate(shards, 1):
        header, ends, end = {"__metadata__": {"format": "pt"}}, {}, 0
        for name in sorted(names, key=lambda n: -outputs[n][0].itemsize):  # widest first: all aligned
            dtype, shape = outputs[name]
            header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": (end, end + sizes[name])}
            ends[name], end = end, end + sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        file = reader.SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        places = {name: (start + ends[name], *outputs[name]) for name in names}
        plan[file] = len(text).to_bytes(8, "little") + text, start + end, places
    return plan


@contextmanager
def _replacing(dst: str | Path, sources: str | Path, omit: Iterable[str] = (),
               new: bool = False) -> Iterator[Path]:
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
        if (Path(sources) / "quantize_config.json").is_file():  # AutoGPTQ's own; still true of the target
            shutil.copyfile(Path(sources) / "quantize_config.json", tmp / "quantize_config.json")
        yield tmp
        for path in (*tmp.iterdir(), tmp):
            writer._flush(path)
        writer._put_in_place(tmp, dst)
    except OSError as e:
        raise HeadsError(f"{dst}: could not be written: {e.strerror or e}; what was there is as "
                         "it was") from None
    finally:
        if lock is not None:
            shutil.rmtree(tmp, ignore_errors=True)
            os.close(lock)


# ---- LoRA adapters -----------------------------------------------------------------------------------------

ADAPTER = "adapter_model.safetensors"
_SAFE_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "loftq")  # others alter the base


def extend_adapter_tensor(name: str, tensor: Tensor, to: Layout) -> Tensor:
    """lora_A [r, in] or lora_B [out, r] for the target: W + B A moves as W does if B's rows (q, k, v) or A's
    columns (o) do, since a slot's rows of B A are its rows of B. To `random` noise nothing is added."""
    match = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name)
    if match is None:
        if re.fullmatch(r".*\.lora_embedding_[AB]", name):
            return tensor
        raise HeadsError(f"{ADAPTER}: tensor {name} is no part of a plain LoRA, expected names that end in "
                         "lora_A.weight or lora_B.weight: merge the adapter and extend the result")
    weight = match[1] + ".weight"
    kind, side = suffix(weight), "BA".index(match[2])  # W's dimension 0 is B's, its 1 is A's
    if kind in HEAD_TENSORS and HEAD_TENSORS[kind][0] == side:
        size = (to.source_heads if HEAD_TENSORS[kind][1] == "q" else to.source_kv_heads) * to.head_dim
    elif CHANNEL_TENSORS.get(kind) == side and to.intermediate:
        size = to.source_intermediate
    else:
        return tensor
    if tensor.dim() != 2 or tensor.shape[side] != size:
        raise HeadsError(f"{ADAPTER}: {name} has shape {list(tensor.shape)}, expected {size} along "
                         f"dimension {side}: this adapter is not for the source of this extension, or has "
                         "been extended already")
    return extend_tensor(weight, tensor, replace(to, recipe="zero") if to.recipe == "random" else to)


def extend_adapter(src: str | Path, dst: str | Path, to: Layout, base: str | Path | None = None) -> None:
    """Write the PEFT LoRA adapter `src` for the extension `to` of its base: merging and extending commute.

    Rank, alpha and targets stay. base: the extended model, for base_model_name_or_path. Refuses DoRA, trained
    biases, modules_to_save and initialisations that alter the base. dst must not exist. Raises HeadsError.
    """
    src = Path(src)
    try:
        config = json.loads((src / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(src / ADAPTER)
    except (OSError, ValueError, SafetensorError) as e:
        raise HeadsError(f"{src}: cannot be read as a PEFT adapter ({' '.join(str(e).split())[:200]}), "
                         f"expected adapter_config.json and {ADAPTER}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise HeadsError(f"{src}/adapter_config.json: is not that of a LoRA, expected peft_type LORA")
    refused = ("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "use_qalora",
               "trainable_token_indices", "target_parameters")
    other = {key: config[key] for key in refused if config.get(key)}
    other |= {"bias": config["bias"]} if config.get("bias", "none") != "none" else {}
    init = config.get("init_lora_weights")
    other |= {"init_lora_weights": init} if init not in _SAFE_INITS else {}
    if other:
        key, value = next(iter(other.items()))
        raise HeadsError(f"{src}/adapter_config.json: {key} is {value!r}, expected a plain LoRA: merge the "
                         "adapter into the base and extend the result")
    to.check()
    tensors = {name: extend_adapter_tensor(name, tensor, to).contiguous() for name, tensor in tensors.items()}
    with _replacing(dst, src, new=True) as tmp:
        config |= {"base_model_name_or_path": str(base)} if base is not None else {}
        (tmp / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, tmp / ADAPTER, metadata={"format": "pt"})
