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

from dataclasses import asdict, dataclass

from minqwen.config import ModelConfig
from minqwen.errors import HeadsError

RECIPES = {
    "ghost": "new slots hold a copied q of their group; their o columns are zero",
    "zero": "new slots hold zero q rows; their o columns are zero",
    "random": "new slots hold seeded random q rows; their o columns are zero",
    "split": "new slots hold a copied q; the head's o columns are halved between the two",
    "weighted": "as split, with shares alpha and 1 - alpha",
}


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
        wrong = sorted(
            {
                h
                for j, h in enumerate(self.heads)
                if h is not None and self.shares[j] and self.reads(j) != h // G
            }
        )
        if wrong:
            raise HeadsError(
                f"query heads {wrong} would read another head's keys and values: place new heads per group"
            )
        for head in range(self.source_heads):
            total = sum(share for h, share in zip(self.heads, self.shares) if h == head)
            if abs(total - 1) > 1e-12:
                raise HeadsError(
                    f"the o_proj shares of query head {head} add up to {total:g}, expected 1"
                )
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
        raise HeadsError(
            f"num_key_value_heads {K2} is fewer than the source's {K}: KV heads can be copied, not merged"
        )
    if H2 < 1 or H2 % K2:
        raise HeadsError(
            f"num_attention_heads {H2} is not a multiple of num_key_value_heads {K2}: "
            f"the nearest that are: {max(1, H2 // K2) * K2} and {(H2 // K2 + 1) * K2}"
        )
    G, G2, copies = H // K, H2 // K2, K2 // K
    if copies * G2 < G:
        raise HeadsError(
            f"{H2} query heads over {K2} KV heads leave {copies * G2} slots for each group of {G} heads: "
            f"at least {K2 * -(-G // copies)} query heads are needed"
        )
    heads: list[int | None] = [None] * H2
    shares = [0.0] * H2
    kv = [k // copies if k < K * copies else None for k in range(K2)]
    own: dict[int, int] = {}  # each head's first slot
    for group in range(K):
        members = list(range(group * G, group * G + G))
        fresh: list[int] = []
        for copy in range(
            copies
        ):  # heads spread evenly: the first copies take one more where G does not divide
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
            if recipe in (
                "split",
                "weighted",
            ):  # the head's own slot gives part of what it still has
                part = shares[own[head]] * (0.5 if recipe == "split" else 1 - alpha)
                shares[own[head]], shares[j] = shares[own[head]] - part, part
    channels = _pad_channels(config.intermediate_size, intermediate_size, intermediate_block)
    return Layout(
        H,
        K,
        d,
        tuple(heads),
        tuple(shares),
        tuple(kv),
        recipe,
        seed,
        config.intermediate_size,
        channels,
    )


def _pad_channels(size: int, target: int | None, block: int) -> tuple[int | None, ...]:
    """Zero channels interleaved with the first real ones, `block` real ones then one zero, as Qwen's own padded
    72B checkpoints have them; () if there is nothing to pad."""
    if target is None or target == size:
        return ()
    if target < size or (target - size) * block > size:
        raise HeadsError(
            f"intermediate_size {target} must be from {size} to {size + size // block}"
        )
    channels: list[int | None] = []
    for source in range(size):
        channels.append(source)
        if (source + 1) % block == 0 and (source + 1) // block <= target - size:
            channels.append(None)
    return tuple(channels)


def extended_config(config: ModelConfig, to: Layout, arch: str = "qwen2") -> ModelConfig:
    """The target's config: the new counts, head_dim written out. arch "llama" is the same function under the name
    LlamaForCausalLM with attention_bias, for engines whose Qwen2 class ignores head_dim."""
    if arch not in ("qwen2", "llama"):
        raise HeadsError(f"arch is {arch!r}, expected qwen2 or llama")
    return config.replace(
        num_attention_heads=len(to.heads),
        num_key_value_heads=len(to.kv),
        head_dim=to.head_dim,
        intermediate_size=len(to.intermediate) or config.intermediate_size,
        model_type=arch,
    )


def explain(to: Layout) -> str:
    """The slot map as text: a line per KV slot, the query heads that read it, and what the new ones hold."""
    lines = [
        f"{to.source_heads} query and {to.source_kv_heads} KV heads of {to.head_dim} -> "
        f"{len(to.heads)} and {len(to.kv)}; slot j reads KV slot j // {to.group_size}; recipe {to.recipe}"
    ]
    for s, source in enumerate(to.kv):
        cells = []
        for j in range(s * to.group_size, (s + 1) * to.group_size):
            head, share = to.heads[j], to.shares[j]
            name = "." if head is None else str(head)
            cells.append(f"[{name}]" if share == 0 else name if share == 1 else f"{name}*{share:g}")
        lines.append(
            f"  KV {s:2} = {'dead' if source is None else f'head {source}':8} q "
            + " ".join(f"{c:>5}" for c in cells)
        )
    lines.append(
        "  [h]: copied q rows, nothing in o_proj; [.]: zero or random q rows; h*x: x of head h's o columns"
    )
    if to.intermediate:
        lines.append(
            f"  MLP: {to.source_intermediate} channels in {len(to.intermediate)}, zeros between"
        )
    return "\n".join(lines)
