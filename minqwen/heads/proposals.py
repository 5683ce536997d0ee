"""How to run a model with other head counts or at a tensor-parallel degree, and the costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minqwen.checks import one_of, optional_integer
from minqwen.config import ModelConfig
from minqwen.errors import HeadsError
from minqwen.heads.layout import RECIPES, Layout, derived_head_dim, extended_config, layout
from minqwen.parallel import valid_degrees

MAX_GROWTH = 64  # proposals have at most so many times the source's query heads
MAX_DEGREE = 64  # the largest tensor-parallel degree that is looked at


@dataclass(frozen=True)
class Cost:
    """What a layout adds.

    parameters: how many more. kv_bytes: bytes of cache per token, all ranks together, at 2 bytes an
    element. attention_macs: {tokens of context: multiply-adds of a token's attention (projections,
    scores, values), relative to the source's}.
    """

    parameters: int
    kv_bytes: int
    attention_macs: dict[int, float]


@dataclass(frozen=True)
class Proposal:
    """One way to run the model. degrees: the tensor-parallel degrees that then work."""

    layout: Layout
    config: ModelConfig
    cost: Cost
    degrees: list[int]
    notes: list[str]


def attention_macs(config: ModelConfig, context: int) -> int:
    """Multiply-adds of one token in one layer's attention.

    q and o, k and v, then the scores and the weighted values over `context` tokens.
    """
    q, kv = config.q_size, config.kv_size
    return 2 * config.hidden_size * (q + kv) + 2 * q * context


def cost(
    config: ModelConfig,
    target: ModelConfig,
    contexts: tuple[int, ...] = (1024, 8192, 32768, 131072),
) -> Cost:
    """What `target` costs beyond its source `config`."""
    return Cost(
        target.num_parameters() - config.num_parameters(),
        target.kv_bytes_per_token("bfloat16"),
        {n: attention_macs(target, n) / attention_macs(config, n) for n in contexts},
    )


def asks_for_heads(
    num_attention_heads: int | None, num_key_value_heads: int | None, recipe: str = "ghost"
) -> bool:
    """Whether a user named a number of heads. Raises HeadsError for values that make no sense."""
    optional_integer("num_attention_heads", num_attention_heads, 1, error=HeadsError)
    optional_integer("num_key_value_heads", num_key_value_heads, 1, error=HeadsError)
    one_of("head_recipe", recipe, tuple(RECIPES), error=HeadsError)
    if num_attention_heads is not None or num_key_value_heads is not None:
        return True
    if recipe != "ghost":
        raise HeadsError(
            f"head_recipe is {recipe!r}, but no number of heads was given: give "
            "num_attention_heads too, or leave head_recipe out"
        )
    return False


def asked_layout(
    config: ModelConfig,
    num_attention_heads: int | None,
    num_key_value_heads: int | None,
    recipe: str = "ghost",
) -> Layout:
    """`layout`, whose refusal of two numbers ends with numbers that work."""
    try:
        return layout(config, num_attention_heads, num_key_value_heads, recipe=recipe)
    except HeadsError as error:
        wanted = num_key_value_heads or config.num_key_value_heads
        kv_heads = max(wanted, config.num_key_value_heads)
        some = ", ".join(map(str, working_counts(config, kv_heads)))
        raise HeadsError(
            f"{error}; with {kv_heads} key/value heads these work: {some}, ... query heads"
        ) from None


def working_counts(config: ModelConfig, kv_heads: int, how_many: int = 4) -> list[int]:
    """The smallest numbers of query heads with which `layout` takes `kv_heads` KV heads."""
    copies = kv_heads // config.num_key_value_heads
    per_slot = -(-config.group_size // copies)  # query slots that each KV slot needs
    return [kv_heads * (per_slot + i) for i in range(how_many)]


def propose(
    config: ModelConfig,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    tensor_parallel_size: int | None = None,
    quant_group: int | None = None,
    recipe: str = "ghost",
) -> list[Proposal]:
    """How to run this model with these counts, or at this degree: the cheapest way first.

    With `tensor_parallel_size` alone, each proposal has the fewest query heads (and the least
    padding of the MLP) that the degree can split, with KV heads as they are or copied in the
    checkpoint. quant_group: the quantisation group size, whose boundaries a rank's slices must not
    cut. Raises HeadsError when nothing can work.
    """
    size = 1 if tensor_parallel_size is None else tensor_parallel_size
    _check_request(config, size, quant_group)
    proposals: list[Proposal] = []
    refusal = HeadsError(
        f"nothing of these counts runs at degree {size}: {config.num_attention_heads} query and "
        f"{config.num_key_value_heads} key/value heads asked for as "
        f"{_or_any(num_attention_heads)} and {_or_any(num_key_value_heads)}"
    )
    for kv_heads in _kv_counts(config, num_key_value_heads, size):
        try:
            to = _first_layout(
                config,
                _head_counts(config, num_attention_heads, kv_heads, size),
                kv_heads,
                recipe,
                _padded_width(config, size, quant_group),
            )
        except HeadsError as error:
            refusal = error
            continue
        proposal = to and _proposal(config, to, size)
        if proposal:
            proposals.append(proposal)
    if not proposals:
        raise refusal
    return sorted(proposals, key=lambda p: (p.cost.parameters, p.cost.kv_bytes))


def _or_any(count: int | None) -> str:
    return "any" if count is None else str(count)


def _check_request(config: ModelConfig, size: int, quant_group: int | None) -> None:
    if size < 1:
        raise HeadsError(f"tensor_parallel_size is {size}, expected at least 1")
    if quant_group is None:
        return
    if quant_group < 1:
        raise HeadsError(f"quant_group is {quant_group}, expected at least 1")
    if config.head_dim % quant_group:
        raise HeadsError(
            f"head_dim {config.head_dim} is not a multiple of the quantisation group "
            f"{quant_group}: a group would span two heads, so heads cannot be moved without "
            "quantising again"
        )


def _kv_counts(config: ModelConfig, wanted: int | None, size: int) -> list[int]:
    """Numbers of KV heads to try: at least the source's, and such that `size` ranks share them."""
    kv_heads = config.num_key_value_heads
    if wanted is not None:
        counts = [wanted]
    else:
        counts = sorted({kv_heads, math.lcm(kv_heads, size), config.num_attention_heads})
    return [n for n in counts if n >= kv_heads and (n % size == 0 or size % n == 0)]


def _head_counts(config: ModelConfig, wanted: int | None, kv_heads: int, size: int) -> range:
    """Numbers of query heads to try, ascending: multiples of `kv_heads` and of `size`."""
    if wanted is not None:
        return range(wanted, wanted + 1)
    step = math.lcm(kv_heads, size)
    heads = config.num_attention_heads
    first = -(-max(heads, kv_heads) // step) * step
    return range(first, MAX_GROWTH * heads + 1, step)


def _padded_width(config: ModelConfig, size: int, quant_group: int | None) -> int | None:
    """The next size of the MLP that `size` ranks can split between quantisation groups.

    None if that is the size it has.
    """
    unit = size * (quant_group or 1)
    width = -(-config.intermediate_size // unit) * unit
    return None if width == config.intermediate_size else width


def _first_layout(
    config: ModelConfig, head_counts: range, kv_heads: int, recipe: str, width: int | None
) -> Layout | None:
    """The layout with the first of `head_counts` that works; None if there are no counts.

    Raises the last one's HeadsError if none works.
    """
    refusal: HeadsError | None = None
    for heads in head_counts:
        try:
            return layout(config, heads, kv_heads, recipe=recipe, intermediate_size=width)
        except HeadsError as error:
            refusal = error
    if refusal is not None:
        raise refusal
    return None


def _proposal(config: ModelConfig, to: Layout, size: int) -> Proposal | None:
    """None if the layout does not run at degree `size`."""
    target = extended_config(config, to)
    degrees = valid_degrees(target, MAX_DEGREE)
    if size not in degrees:
        return None
    return Proposal(to, target, cost(config, target), degrees, _notes(config, target, size))


def _notes(config: ModelConfig, target: ModelConfig, size: int) -> list[str]:
    """What the user should know about running `target` at degree `size`."""
    notes = []
    if target.num_attention_heads != config.num_attention_heads:
        notes.append(
            "more heads make nothing faster by themselves: they only let the work be split further"
        )
    if size > target.num_key_value_heads:
        notes.append(
            f"at degree {size} each KV head is held by {size // target.num_key_value_heads} ranks: "
            "the cache per rank does not shrink further"
        )
    if target.num_key_value_heads > config.num_key_value_heads:
        copies = target.num_key_value_heads // config.num_key_value_heads
        notes.append(f"KV heads are stored {copies} times: that much more cache in all")
    if target.intermediate_size != config.intermediate_size:
        notes.append(
            f"the MLP is padded from {config.intermediate_size} to {target.intermediate_size} "
            "channels"
        )
    if derived_head_dim(target) != target.head_dim:
        notes.append(
            f"engines that derive head_dim (vLLM's Qwen2) would read {derived_head_dim(target)} "
            f"instead of {target.head_dim}, load without error and drop rows: give them "
            "--arch llama"
        )
    return notes
