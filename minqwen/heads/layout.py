"""Head extension: the same function with other numbers of query and key/value (KV) heads.

28 query heads cannot be split over 8 GPUs, 32 can. o_proj adds up what the heads give, so heads may
be added as long as nothing is added to that sum. In a model with H' query and K' KV heads, query
slot j reads KV slot j // (H' / K'). This alone decides which keys a head sees. New heads must
therefore go at the end of each group of heads that share a KV head, never at the end of the list.
A target computes the same function as its source if and only if, for every source head,

  1. each slot that holds it, with columns of o_proj that are not zero, reads a copy of its KV head;
  2. the o_proj columns of its slots add up to the source's;
  3. the bias of q goes with the rows of q, and the biases of k and v with copied KV heads;

and every slot that holds no source head has zero columns in o_proj. `Layout` is such an assignment
as data, and everything that moves weights reads one. docs/head-extension.md says what goes wrong
with other recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minqwen.checks import integer, number, one_of
from minqwen.config import ModelConfig
from minqwen.config.config_json import MAX_SIZES
from minqwen.errors import HeadsError
from minqwen.files import quoted

RECIPES = {
    "ghost": "new slots hold a copied q of their group; their o columns are zero",
    "zero": "new slots hold zero q rows; their o columns are zero",
    "random": "new slots hold seeded random q rows; their o columns are zero",
    "split": "new slots hold a copied q; the head's o columns are halved between the two",
    "weighted": "as split, with shares alpha and 1 - alpha",
}
ARCHS = ("qwen2", "llama")  # the model types a target may have
COPYING = ("ghost", "split", "weighted")  # recipes whose new slots hold a copied q
SPLITTING = ("split", "weighted")  # recipes whose new slots take a share of the o columns

Slots = tuple[int | None, ...]


@dataclass(frozen=True)
class Layout:
    """Which source head each slot of the target holds.

    heads[j]: the source query head whose q rows slot j has, or None (zero or random rows).
    shares[j]: the factor on that head's o_proj columns, 0 for a slot that adds nothing.
    kv[s]: the source KV head in KV slot s, or None (a dead group: zero k and v).
    intermediate: for each target channel of the MLP its source, or None for a zero channel;
    () leaves the MLP as it is.
    """

    source_heads: int
    source_kv_heads: int
    head_dim: int
    heads: Slots
    shares: tuple[float, ...]
    kv: Slots
    recipe: str = "ghost"
    seed: int = 0
    source_intermediate: int = 0
    intermediate: Slots = ()

    @property
    def group_size(self) -> int:
        """Query slots per KV slot."""
        return len(self.heads) // len(self.kv)

    def reads(self, slot: int) -> int | None:
        """The source KV head that query slot `slot` sees."""
        return self.kv[slot // self.group_size]

    def contributing_slots(self, head: int) -> list[int]:
        """The slots that give a part of source head `head` to o_proj's sum."""
        return [j for j, h in enumerate(self.heads) if h == head and self.shares[j]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Layout:
        """The inverse of `to_dict`. Raises HeadsError in one line if `d` describes no layout."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}
        try:
            found = cls(**values)
        except TypeError as error:  # a name that is missing, or one too many
            raise HeadsError(f"layout: {error}") from None
        _check_fields(found)
        return found

    def check(self) -> None:
        """Raise HeadsError, naming heads, unless the target computes the source's function."""
        self._check_keys()
        self._check_sums()
        self._check_empty_slots()

    def _check_keys(self) -> None:
        """Rule 1."""
        group = self.source_heads // self.source_kv_heads
        wrong = set()
        for slot, head in enumerate(self.heads):
            if head is not None and self.shares[slot] and self.reads(slot) != head // group:
                wrong.add(head)
        if wrong:
            raise HeadsError(
                f"query heads {sorted(wrong)} would read another head's keys and values: "
                "place new heads per group"
            )

    def _check_sums(self) -> None:
        """Rule 2."""
        for head in range(self.source_heads):
            total = sum(self.shares[slot] for slot in self.contributing_slots(head))
            if not abs(total - 1) <= 1e-12:
                raise HeadsError(
                    f"the o_proj shares of query head {head} add up to {total:g}, expected 1"
                )

    def _check_empty_slots(self) -> None:
        stray = [j for j, h in enumerate(self.heads) if h is None and self.shares[j]]
        if stray:
            raise HeadsError(f"slots {stray} hold no head but have a share in o_proj")


# ---- what a file may say -------------------------------------------------------------------------


def _check_fields(to: Layout) -> None:
    """Raise HeadsError for values from a file that no layout can have."""
    for name in ("source_heads", "source_kv_heads", "head_dim"):
        integer(f"layout.{name}", getattr(to, name), 1, error=HeadsError)
    for name in ("seed", "source_intermediate"):
        integer(f"layout.{name}", getattr(to, name), 0, error=HeadsError)
    one_of("layout.recipe", to.recipe, tuple(RECIPES), error=HeadsError)
    _check_slots("heads", to.heads, to.source_heads)
    _check_slots("kv", to.kv, to.source_kv_heads)
    if to.intermediate != ():
        _check_slots("intermediate", to.intermediate, to.source_intermediate)
    if to.source_heads % to.source_kv_heads or len(to.heads) % len(to.kv):
        raise HeadsError(
            f"layout: {to.source_heads} and {len(to.heads)} query heads are not multiples of "
            f"{to.source_kv_heads} and {len(to.kv)} KV heads"
        )
    if not isinstance(to.shares, tuple) or len(to.shares) != len(to.heads):
        raise HeadsError("layout.shares does not have one number for each of layout.heads")
    for share in to.shares:
        number("layout.shares", share, 0.0, 1.0, open_low=False, error=HeadsError)


def _check_slots(name: str, slots: object, count: int) -> None:
    """Raise HeadsError unless `slots` holds each of 0..count-1, and None or repeats beside them."""
    if not isinstance(slots, tuple) or len(slots) < count:
        raise HeadsError(
            f"layout.{name} is {quoted(slots, 100)}, expected a list of at least {count}"
        )
    for slot in slots:
        if slot is not None and (type(slot) is not int or not 0 <= slot < count):
            raise HeadsError(
                f"layout.{name} holds {quoted(slot, 100)}, expected null or 0 to {count - 1}"
            )
    if missing := set(range(count)) - set(slots):
        raise HeadsError(f"layout.{name} has no place for {min(missing)}")


# ---- placing heads -------------------------------------------------------------------------------


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

    KV head k becomes K' // K neighbouring copies. KV slots that are left over are dead groups at
    the end. The heads of a group fill its slots in order, spread evenly over the copies; the slots
    that remain are the new ones. intermediate_size: pad the MLP with zero channels, one after each
    `intermediate_block` real ones from the start, as far as they go. Raises HeadsError for counts
    that cannot work.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    slots = heads if num_attention_heads is None else num_attention_heads
    kv_slots = kv_heads if num_key_value_heads is None else num_key_value_heads
    _check_recipe(recipe, alpha)
    for name, count in (("num_attention_heads", slots), ("num_key_value_heads", kv_slots)):
        if count > MAX_SIZES[name]:
            raise HeadsError(f"{name} is {count}, expected at most {MAX_SIZES[name]}; choose fewer")
    _check_counts(heads, kv_heads, slots, kv_slots)
    copies = kv_slots // kv_heads
    placed, shares = _place_heads(config, slots, kv_slots, recipe, alpha)
    return Layout(
        source_heads=heads,
        source_kv_heads=kv_heads,
        head_dim=config.head_dim,
        heads=placed,
        shares=shares,
        kv=tuple(s // copies if s < kv_heads * copies else None for s in range(kv_slots)),
        recipe=recipe,
        seed=seed,
        source_intermediate=config.intermediate_size,
        intermediate=_pad_channels(config.intermediate_size, intermediate_size, intermediate_block),
    )


def _check_recipe(recipe: str, alpha: float) -> None:
    if recipe not in RECIPES:
        raise HeadsError(f"recipe is {recipe!r}, expected one of {', '.join(RECIPES)}")
    if recipe == "weighted" and not 0 < alpha < 1:
        raise HeadsError(f"alpha is {alpha}, expected a number between 0 and 1")


def _check_counts(heads: int, kv_heads: int, slots: int, kv_slots: int) -> None:
    """Raise HeadsError unless every group of the source finds room in its KV head's copies."""
    if kv_slots < kv_heads or kv_slots < 1:
        raise HeadsError(
            f"num_key_value_heads {kv_slots} is fewer than the source's {kv_heads}: "
            "KV heads can be copied, not merged"
        )
    if slots < 1 or slots % kv_slots:
        below = max(1, slots // kv_slots) * kv_slots
        above = (slots // kv_slots + 1) * kv_slots
        raise HeadsError(
            f"num_attention_heads {slots} is not a multiple of num_key_value_heads {kv_slots}: "
            f"the nearest that are: {below} and {above}"
        )
    group, copies = heads // kv_heads, kv_slots // kv_heads
    room = copies * (slots // kv_slots)
    if room < group:
        raise HeadsError(
            f"{slots} query heads over {kv_slots} KV heads leave {room} slots for each group of "
            f"{group} heads: at least {kv_slots * -(-group // copies)} query heads are needed"
        )


def _place_heads(
    config: ModelConfig, slots: int, kv_slots: int, recipe: str, alpha: float
) -> tuple[Slots, tuple[float, ...]]:
    """(heads, shares) of a Layout."""
    group, copies = config.group_size, kv_slots // config.num_key_value_heads
    heads: list[int | None] = [None] * slots
    shares = [0.0] * slots
    room = copies * (slots // kv_slots)  # slots of one group
    for g in range(config.num_key_value_heads):
        own, new = _group_slots(range(g * room, (g + 1) * room), group, copies)
        for i, slot in enumerate(own):
            heads[slot], shares[slot] = g * group + i, 1.0
        for n, slot in enumerate(new):
            twin = own[n % group]
            if recipe in COPYING:
                heads[slot] = heads[twin]
            if recipe in SPLITTING:  # the head's own slot gives a part of what it still has
                part = shares[twin] * (0.5 if recipe == "split" else 1 - alpha)
                shares[twin] -= part
                shares[slot] = part
    return tuple(heads), tuple(shares)


def _group_slots(slots: range, heads: int, copies: int) -> tuple[list[int], list[int]]:
    """The slots that one group's heads fill, in order, and the slots that remain.

    `slots` are the group's, an equal part for each of the `copies` of its KV head. Where `heads` do
    not divide evenly over the copies, the first copies take one more.
    """
    own: list[int] = []
    new: list[int] = []
    size = len(slots) // copies
    for copy in range(copies):
        count = heads // copies + (1 if copy < heads % copies else 0)
        part = slots[copy * size : (copy + 1) * size]
        own += part[:count]
        new += part[count:]
    return own, new


def _pad_channels(size: int, target: int | None, block: int) -> Slots:
    """A zero channel after each `block` real ones, until there are `target` channels.

    () if there is nothing to pad. Qwen's own padded 72B checkpoints are interleaved like this.
    """
    if target is None or target == size:
        return ()
    if block < 1:
        raise HeadsError(f"intermediate_block is {block}, expected at least 1")
    if target < size or (target - size) * block > size:
        raise HeadsError(
            f"intermediate_size {target} must be from {size} to {size + size // block}"
        )
    channels: list[int | None] = []
    for source in range(size):
        channels.append(source)
        blocks, rest = divmod(source + 1, block)
        if rest == 0 and blocks <= target - size:
            channels.append(None)
    return tuple(channels)


# ---- what follows --------------------------------------------------------------------------------


def extended_config(config: ModelConfig, to: Layout, arch: str = "qwen2") -> ModelConfig:
    """The target's config: the new counts, and head_dim written out.

    arch "llama" is the same function under the name LlamaForCausalLM with attention_bias, for
    engines whose Qwen2 class ignores head_dim.
    """
    if arch not in ARCHS:
        raise HeadsError(f"arch is {arch!r}, expected qwen2 or llama")
    return config.replace(
        num_attention_heads=len(to.heads),
        num_key_value_heads=len(to.kv),
        head_dim=to.head_dim,
        intermediate_size=len(to.intermediate) or config.intermediate_size,
        model_type=arch,
    )


def derived_head_dim(config: ModelConfig) -> int:
    """What an engine takes for head_dim if it divides hidden_size by the number of heads."""
    return config.hidden_size // config.num_attention_heads


def slot_map(to: Layout) -> str:
    """The layout as text: a line per KV slot, with the query slots that read it."""
    lines = [
        f"{to.source_heads} query and {to.source_kv_heads} KV heads of {to.head_dim} -> "
        f"{len(to.heads)} and {len(to.kv)}; "
        f"slot j reads KV slot j // {to.group_size}; recipe {to.recipe}"
    ]
    lines += [_kv_line(to, s) for s in range(len(to.kv))]
    lines.append(
        "  [h]: copied q rows, nothing in o_proj; [.]: zero or random q rows; "
        "h*x: x of head h's o columns"
    )
    if to.intermediate:
        lines.append(
            f"  MLP: {to.source_intermediate} channels in {len(to.intermediate)}, zeros between"
        )
    return "\n".join(lines)


def _kv_line(to: Layout, kv_slot: int) -> str:
    source = to.kv[kv_slot]
    holds = "dead" if source is None else f"head {source}"
    slots = range(kv_slot * to.group_size, (kv_slot + 1) * to.group_size)
    cells = " ".join(f"{_cell(to.heads[j], to.shares[j]):>5}" for j in slots)
    return f"  KV {kv_slot:2} = {holds:8} q {cells}"


def _cell(head: int | None, share: float) -> str:
    name = "." if head is None else str(head)
    if share == 0:
        return f"[{name}]"
    return name if share == 1 else f"{name}*{share:g}"
