"""Head extension: the same function with other numbers of query and key/value heads.

28 query heads cannot be split over 8 GPUs; 32 can. Attention heads that share a key/value head (a KV group) are
summed by o_proj, so heads may be added as long as nothing is added to the sum. Query slot j of a model with H'
query and K' key/value heads reads KV slot j // (H'/K'): that, and nothing else, decides which keys a head sees,
so new heads must go at the end of *each group*, never at the end of the list. A target computes the same
function as its source if and only if, for every source head,

  1. each slot that holds it, with columns of o_proj that are not zero, reads a copy of its own KV head;
  2. the o_proj columns of its slots add up to the source's;
  3. q's bias goes with q's rows, and the biases of k and v with replicated KV heads;

and every slot that holds no source head has zero columns in o_proj. `Layout` is such an assignment as data;
everything here that moves weights reads one. See docs/head-extension.md for what goes wrong elsewhere.
"""
from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minqwen.checkpoint import Checkpoint, write_checkpoint
from minqwen.config import ModelConfig
from minqwen.errors import MinqwenError
from minqwen.parallel import valid_degrees

RECIPES = {
    "ghost": "new slots hold a copied q of their group; their o columns are zero",
    "zero": "new slots hold zero q rows; their o columns are zero",
    "random": "new slots hold seeded random q rows; their o columns are zero",
    "split": "new slots hold a copied q; the head's o columns are halved between the two",
    "weighted": "as split, with shares alpha and 1 - alpha",
}


class HeadsError(MinqwenError):
    """A head count, recipe or checkpoint that head extension must refuse."""


@dataclass(frozen=True)
class Layout:
    """Which source head each slot of the target holds.

    heads[j]: the source query head whose q rows slot j has, or None (zero or random rows). shares[j]: the factor
    on that head's o_proj columns, 0 for a slot that adds nothing. kv[s]: the source KV head in KV slot s, or
    None (a dead group: zero k and v). intermediate: for each target channel of the MLP its source, or None for
    a zero one; () leaves the MLP alone.
    """

    source_heads: int
    source_kv_heads: int
    head_dim: int
    heads: tuple[int | None, ...]
    shares: tuple[float, ...]
    kv: tuple[int | None, ...]
    recipe: str = "ghost"
    seed: int = 0
    source_intermediate: int = 0
    intermediate: tuple[int | None, ...] = ()

    @property
    def group_size(self) -> int:
        return len(self.heads) // len(self.kv)

    def reads(self, slot: int) -> int | None:
        """The source KV head that query slot `slot` sees."""
        return self.kv[slot // self.group_size]

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict) -> Layout:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in d.items()})

    def check(self) -> None:
        """Raise HeadsError, naming heads, unless the target computes the source's function."""
        G = self.source_heads // self.source_kv_heads
        wrong = sorted({h for j, h in enumerate(self.heads) if h is not None and self.shares[j] and self.reads(j) != h // G})
        if wrong:
            raise HeadsError(f"query heads {wrong} would read another head's keys and values: place new heads per group")
        for head in range(self.source_heads):
            total = sum(share for h, share in zip(self.heads, self.shares) if h == head)
            if abs(total - 1) > 1e-12:
                raise HeadsError(f"the o_proj shares of query head {head} add up to {total:g}, expected 1")
        stray = [j for j, h in enumerate(self.heads) if h is None and self.shares[j]]
        if stray:
            raise HeadsError(f"slots {stray} hold no head but have a share in o_proj")


def layout(
    config: ModelConfig,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    *,
    recipe: str = "ghost",
    alpha: float = 0.5,
    seed: int = 0,
    intermediate_size: int | None = None,
    intermediate_block: int = 1,
) -> Layout:
    """Place the source's heads in `num_attention_heads` slots over `num_key_value_heads` KV slots.

    KV head k becomes K' // K neighbouring copies; KV slots that are left over are dead groups at the end. The
    heads of a group fill its slots in order, spread evenly over the copies; the slots that remain are the new
    ones. intermediate_size: pad the MLP with zero channels, one after each `intermediate_block` real ones from
    the start, as far as they go. Raises HeadsError for counts that cannot work.
    """
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    H2 = H if num_attention_heads is None else num_attention_heads
    K2 = K if num_key_value_heads is None else num_key_value_heads
    if recipe not in RECIPES:
        raise HeadsError(f"recipe is {recipe!r}, expected one of {', '.join(RECIPES)}")
    if recipe == "weighted" and not 0 < alpha < 1:
        raise HeadsError(f"alpha is {alpha}, expected a number between 0 and 1")
    if K2 < K or K2 < 1:
        raise HeadsError(f"num_key_value_heads {K2} is fewer than the source's {K}: KV heads can be copied, not merged")
    if H2 < 1 or H2 % K2:
        raise HeadsError(f"num_attention_heads {H2} is not a multiple of num_key_value_heads {K2}: "
                         f"the nearest that are: {max(1, H2 // K2) * K2} and {(H2 // K2 + 1) * K2}")
    G, G2, copies = H // K, H2 // K2, K2 // K
    if copies * G2 < G:
        raise HeadsError(f"{H2} query heads over {K2} KV heads leave {copies * G2} slots for each group of {G} heads: "
                         f"at least {K2 * -(-G // copies)} query heads are needed")
    heads: list[int | None] = [None] * H2
    shares = [0.0] * H2
    kv = [k // copies if k < K * copies else None for k in range(K2)]
    own: dict[int, int] = {}  # each head's first slot
    for group in range(K):
        members = list(range(group * G, group * G + G))
        fresh: list[int] = []
        for copy in range(copies):  # heads spread evenly: the first copies take one more where G does not divide
            count = G // copies + (copy < G % copies)
            first = (group * copies + copy) * G2
            for i in range(G2):
                if i < count:
                    own[members[0]] = first + i
                    heads[first + i], shares[first + i] = members.pop(0), 1.0
                else:
                    fresh.append(first + i)
        for n, j in enumerate(fresh):
            head = group * G + n % G
            if recipe in ("ghost", "split", "weighted"):
                heads[j] = head
            if recipe in ("split", "weighted"):  # the head's own slot gives part of what it still has
                part = shares[own[head]] * (0.5 if recipe == "split" else 1 - alpha)
                shares[own[head]], shares[j] = shares[own[head]] - part, part
    channels = _pad_channels(config.intermediate_size, intermediate_size, intermediate_block)
    return Layout(H, K, d, tuple(heads), tuple(shares), tuple(kv), recipe, seed, config.intermediate_size, channels)


def _pad_channels(size: int, target: int | None, block: int) -> tuple[int | None, ...]:
    """Zero channels interleaved with the first real ones, `block` real ones then one zero, as Qwen's own padded
    72B checkpoints have them; () if there is nothing to pad."""
    if target is None or target == size:
        return ()
    if target < size or (target - size) * block > size:
        raise HeadsError(f"intermediate_size {target} must be from {size} to {size + size // block}")
    channels: list[int | None] = []
    for source in range(size):
        channels.append(source)
        if (source + 1) % block == 0 and (source + 1) // block <= target - size:
            channels.append(None)
    return tuple(channels)


# ---- moving weights ------------------------------------------------------------------------------------------

HEAD_TENSORS = {  # suffix -> (dimension that is made of heads, "q" or "kv")
    "q_proj.weight": (0, "q"), "q_proj.bias": (0, "q"), "o_proj.weight": (1, "q"),
    "k_proj.weight": (0, "kv"), "k_proj.bias": (0, "kv"), "v_proj.weight": (0, "kv"), "v_proj.bias": (0, "kv"),
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
            columns[:, first] = rest  # exact: the columns of a head's slots add up to the source's, bit for bit
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
    if kind == "o_proj.weight":  # a head's columns are the sum of its slots'; halves add up without rounding
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


# ---- whole checkpoints ---------------------------------------------------------------------------------------

MANIFEST = "minqwen_heads.json"


def extended_config(config: ModelConfig, to: Layout, arch: str = "qwen2") -> ModelConfig:
    """The target's config: the new counts, head_dim written out. arch "llama" is the same function under the name
    LlamaForCausalLM with attention_bias, for engines whose Qwen2 class ignores head_dim."""
    if arch not in ("qwen2", "llama"):
        raise HeadsError(f"arch is {arch!r}, expected qwen2 or llama")
    return config.replace(
        num_attention_heads=len(to.heads), num_key_value_heads=len(to.kv), head_dim=to.head_dim,
        intermediate_size=len(to.intermediate) or config.intermediate_size, model_type=arch,
    )


def extend(src: str | Path, dst: str | Path, to: Layout, *, arch: str = "qwen2", max_shard_bytes: int = 4 * 10**9,
           progress: bool = False) -> None:
    """Write the checkpoint `src` in the layout `to`, one tensor in memory at a time, atomically. After a kill, an
    interrupt or a full disk, the same call goes on where it was.

    dst gets sharded safetensors, a config with explicit head_dim, the tokenizer's files and minqwen_heads.json:
    the layout, and a SHA-256 of every source tensor, from which `shrink` restores the source. Raises HeadsError
    or CheckpointError; dst is then as it was.
    """
    to.check()
    source = Checkpoint(src)
    source.check()
    if (Path(src) / MANIFEST).exists():
        raise HeadsError(f"{src}: has been extended already ({MANIFEST}): shrink it first, or extend its source")
    config = extended_config(source.config, to, arch)
    digests: dict[str, str] = {}
    bar = tqdm(total=len(source.names), desc="extending", unit="tensor", leave=False,
               disable=None if progress else True)

    def tensors(done: set[str]):
        bar.update(len(done))
        for name in config.parameter_shapes():
            if name.endswith("o_proj.bias"):  # only the llama layout has it
                if name not in done:
                    dtype = source.dtype(name.replace(".bias", ".weight"))
                    yield name, torch.zeros(config.hidden_size, dtype=dtype)
                continue
            tensor = source.read(name)
            digests[name] = sha256(tensor)
            if name not in done:
                yield name, extend_tensor(name, tensor, to)
                bar.update()

    def manifest() -> str:  # written last, when the digests are known
        return json.dumps({"format": 1, "layout": to.to_dict(), "arch": arch, "source_config": source.config.to_dict(),
                           "source_sha256": digests}, indent=1) + "\n"

    with bar:
        dtypes = {name: source.dtype(name) for name in source.names}
        files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in Path(src).glob("*.safetensors"))
        content = json.dumps([to.to_dict(), arch, config.to_dict(), files, max_shard_bytes])
        write_checkpoint(dst, config, tensors, max_shard_bytes=max_shard_bytes, sources=src,
                         extra_files={MANIFEST: manifest}, dtypes=dtypes,
                         resume=hashlib.sha256(content.encode()).hexdigest()[:16])


def read_manifest(path: str | Path) -> dict | None:
    """What `extend` wrote beside the weights, or None if the checkpoint is nobody's extension."""
    file = Path(path) / MANIFEST
    if not file.exists():
        return None
    try:
        manifest = json.loads(file.read_text())
        manifest["layout"] = Layout.from_dict(manifest["layout"])
        return manifest
    except (ValueError, KeyError, TypeError) as e:
        raise HeadsError(f"{file}: is not a manifest of tools/heads.py ({e})") from None


def shrink(src: str | Path, dst: str | Path, *, tolerance: float = 0.0, max_shard_bytes: int = 4 * 10**9,
           progress: bool = False) -> None:
    """Undo `extend`: write the source's checkpoint again, byte for byte.

    Refuses, naming the tensor and the residual of each slot, if the weights are no longer what `extend` would
    write (they were trained on, say); `tolerance` is the largest residual that is let pass.
    """
    manifest = read_manifest(src)
    if manifest is None:
        raise HeadsError(f"{src}: has no {MANIFEST}, so what was added cannot be told from the rest")
    to, target = manifest["layout"], Checkpoint(src)
    target.check()
    config = ModelConfig.from_dict(manifest["source_config"], source=f"{src}/{MANIFEST}")
    bar = tqdm(total=len(target.names), desc="shrinking", unit="tensor", leave=False, disable=None if progress else True)

    def tensors():
        for name in config.parameter_shapes():
            tensor, residuals = shrink_tensor(name, target.read(name), to)
            drift = {slot: r for slot, r in residuals.items() if not r <= tolerance}  # a NaN is drift too
            if drift:
                slots = ", ".join(f"{slot}: {r:.3g}" for slot, r in list(drift.items())[:8])
                raise HeadsError(f"{src}: {name} has drifted from its layout in {len(drift)} slots (largest difference "
                                 f"per slot: {slots}): it is no longer an extension of its source")
            yield name, tensor
            bar.update()

    with bar:
        dtypes = {name: target.dtype(name) for name in config.parameter_shapes()}
        write_checkpoint(dst, config, tensors(), max_shard_bytes=max_shard_bytes, sources=src, dtypes=dtypes,
                         omit={MANIFEST})


def sha256(tensor: Tensor) -> str:
    """Of a tensor's bytes, little-endian, row by row."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


# ---- what to do, and what it costs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a layout adds. parameters: how many more; kv_bytes: per token, all ranks together, at 2 bytes an
    element; attention_macs: multiply-adds of a token's attention (projections, scores, values) per context,
    relative to the source's."""

    parameters: int
    kv_bytes: int
    attention_macs: dict[int, float]


@dataclass(frozen=True)
class Plan:
    layout: Layout
    config: ModelConfig
    cost: Cost
    degrees: list[int]
    notes: list[str]


def attention_macs(config: ModelConfig, context: int) -> int:
    """Multiply-adds of one token in one layer's attention: q and o, k and v, scores and weighted values."""
    q, kv = config.q_size, config.kv_size
    return 2 * config.hidden_size * (q + kv) + 2 * q * context


def cost(config: ModelConfig, target: ModelConfig, contexts: tuple[int, ...] = (1024, 8192, 32768, 131072)) -> Cost:
    return Cost(
        target.num_parameters() - config.num_parameters(),
        target.kv_bytes_per_token("bfloat16"),
        {n: attention_macs(target, n) / attention_macs(config, n) for n in contexts},
    )


def plan(
    config: ModelConfig,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    tensor_parallel_size: int | None = None,
    quant_group: int | None = None,
    recipe: str = "ghost",
) -> list[Plan]:
    """How to run this model with these counts, or at this degree: the cheapest first, then alternatives.

    With `tensor_parallel_size` alone, the fewest query heads (and the least padding of the MLP) that the degree
    can split, KV heads as they are or replicated in the checkpoint. quant_group: the quantisation group size,
    whose boundaries a rank's slices must not cut. Raises HeadsError when nothing can work.
    """
    H, K, size = config.num_attention_heads, config.num_key_value_heads, tensor_parallel_size or 1
    if size < 1:
        raise HeadsError(f"tensor_parallel_size is {size}, expected at least 1")
    if quant_group is not None and config.head_dim % quant_group:
        raise HeadsError(f"head_dim {config.head_dim} is not a multiple of the quantisation group {quant_group}: a group "
                         "would span two heads, so heads cannot be moved without quantising again")
    kv_counts = [num_key_value_heads] if num_key_value_heads else sorted({K, K * size // math.gcd(K, size), H})
    unit = size * (quant_group or 1)
    width = -(-config.intermediate_size // unit) * unit
    plans, refusal = [], None
    for K2 in kv_counts:
        if K2 < K or (K2 % size and size % K2):
            continue
        step = math.lcm(K2, size)
        H2, to = num_attention_heads or -(-max(H, K2) // step) * step, None
        while to is None and H2 <= max(64 * H, num_attention_heads or 0):
            try:
                pad = width if width != config.intermediate_size else None
                to = layout(config, H2, K2, recipe=recipe, intermediate_size=pad)
            except HeadsError as error:
                refusal = error
                if num_attention_heads:
                    break
                H2 += step
        if to is None:
            continue
        target = extended_config(config, to)
        degrees = valid_degrees(target, 64)
        if size not in degrees:
            continue
        plans.append(Plan(to, target, cost(config, target), degrees, _notes(config, target, size)))
    if not plans and refusal is not None:
        raise refusal
    if not plans:
        raise HeadsError(f"nothing of these counts runs at degree {size}: {H} query and {K} key/value heads asked for as "
                         f"{num_attention_heads or 'any'} and {num_key_value_heads or 'any'}")
    return sorted(plans, key=lambda p: (p.cost.parameters, p.cost.kv_bytes))


def _notes(config: ModelConfig, target: ModelConfig, size: int) -> list[str]:
    notes = []
    if target.num_attention_heads != config.num_attention_heads:
        notes.append("more heads make nothing faster by themselves: they only let the work be split further")
    if size > target.num_key_value_heads:
        notes.append(f"at degree {size} each KV head is held by {size // target.num_key_value_heads} ranks: "
                     "the cache per rank does not shrink further")
    if target.num_key_value_heads > config.num_key_value_heads:
        notes.append(f"KV heads are stored {target.num_key_value_heads // config.num_key_value_heads} times: "
                     "that much more cache in all")
    if target.intermediate_size != config.intermediate_size:
        notes.append(f"the MLP is padded from {config.intermediate_size} to {target.intermediate_size} channels")
    if target.hidden_size // target.num_attention_heads != target.head_dim:
        notes.append(f"engines that derive head_dim (vLLM's Qwen2) would read "
                     f"{target.hidden_size // target.num_attention_heads} instead of {target.head_dim}, load without "
                     "error and drop rows: give them --arch llama")
    return notes


def explain(to: Layout) -> str:
    """The slot map as text: a line per KV slot, the query heads that read it, and what the new ones hold."""
    lines = [f"{to.source_heads} query and {to.source_kv_heads} KV heads of {to.head_dim} -> "
             f"{len(to.heads)} and {len(to.kv)}; slot j reads KV slot j // {to.group_size}; recipe {to.recipe}"]
    for s, source in enumerate(to.kv):
        cells = []
        for j in range(s * to.group_size, (s + 1) * to.group_size):
            head, share = to.heads[j], to.shares[j]
            name = "." if head is None else str(head)
            cells.append(f"[{name}]" if share == 0 else name if share == 1 else f"{name}*{share:g}")
        lines.append(f"  KV {s:2} = {'dead' if source is None else f'head {source}':8} q " + " ".join(f"{c:>5}" for c in cells))
    lines.append("  [h]: copied q rows, nothing in o_proj; [.]: zero or random q rows; h*x: x of head h's o columns")
    if to.intermediate:
        lines.append(f"  MLP: {to.source_intermediate} channels in {len(to.intermediate)}, zeros between")
    return "\n".join(lines)
