"""Every intermediate by name: the table of points, and the taps that show or replace what passes.

The forward pass calls `tap(name, x)` at each point and goes on with what comes back. `UNTRACED`
gives x back; a `TracingTap` shows it to a function first. Names are "embed", "layers.3.attn.q" and
so on; patterns with * and ? match them, and TransformerLens's names ("blocks.3.attn.hook_q") mean
the same points.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol, TypeVar, overload

from torch import Tensor

from minqwen.checks import LONGEST_WORD, did_you_mean, quoted
from minqwen.config import ModelConfig
from minqwen.errors import TraceError, a_kind
from minqwen.parallel import Mesh, kv_heads_per_rank


@dataclass(frozen=True)
class Point:
    """A place in the forward pass where a tensor can be seen and replaced.

    name: within its layer if `layered`. shape: in the legend's letters, for one sequence of T new
    tokens with L tokens of context. axis: what tensor parallelism splits there ("heads",
    "kv heads" or "channels"), or None. costly: computed only to be shown, and H times as large as
    the residual stream, so that "*" does not mean it: see `select`.
    """

    name: str
    shape: str
    alias: str | None  # TransformerLens's name
    what: str
    axis: str | None = None
    layered: bool = True
    costly: bool = False


POINTS = [
    Point("embed", "T D", "hook_embed", "token embeddings", layered=False),
    Point("resid_pre", "T D", "hook_resid_pre", "residual stream into the layer"),
    Point("norm1.normalized", "T D", "ln1.hook_normalized", "norm1 before its weight"),
    Point("norm1", "T D", None, "input_layernorm's output, its weight applied"),
    Point("attn.q", "T H d", "attn.hook_q", "queries, bias added", "heads"),
    Point("attn.k", "T K d", "attn.hook_k", "keys, bias added", "kv heads"),
    Point("attn.v", "T K d", "attn.hook_v", "values, bias added", "kv heads"),
    Point("attn.rot_q", "T H d", "attn.hook_rot_q", "queries after RoPE", "heads"),
    Point("attn.rot_k", "T K d", "attn.hook_rot_k", "keys after RoPE", "kv heads"),
    Point("attn.scores", "H T L", "attn.hook_attn_scores", "scaled; -inf where hidden", "heads"),
    Point("attn.pattern", "H T L", "attn.hook_pattern", "softmax of the scores", "heads"),
    Point("attn.z", "T H d", "attn.hook_z", "each head's weighted values", "heads"),
    Point(
        "attn.result",
        "T H D",
        "attn.hook_result",
        "each head's share of attn.out; only where its name is asked for",
        "heads",
        costly=True,
    ),
    Point("attn.out", "T D", "hook_attn_out", "o_proj's output"),
    Point("resid_mid", "T D", "hook_resid_mid", "residual stream after attention"),
    Point("norm2.normalized", "T D", "ln2.hook_normalized", "norm2 before its weight"),
    Point("norm2", "T D", None, "post_attention_layernorm's output, its weight applied"),
    Point("mlp.gate", "T I", "mlp.hook_pre", "gate_proj's output", "channels"),
    Point("mlp.up", "T I", "mlp.hook_pre_linear", "up_proj's output", "channels"),
    Point("mlp.act", "T I", "mlp.hook_post", "silu(gate) times up", "channels"),
    Point("mlp.out", "T D", "hook_mlp_out", "down_proj's output"),
    Point("resid_post", "T D", "hook_resid_post", "residual stream out of the layer"),
    Point(
        "final_norm.normalized",
        "T D",
        "ln_final.hook_normalized",
        "final_norm before its weight",
        layered=False,
    ),
    Point("final_norm", "T D", None, "model.norm's output, its weight applied", layered=False),
    Point("logits", "T V", None, "logits", layered=False),
]
BY_NAME = {point.name: point for point in POINTS}
BY_ALIAS = {point.alias: point for point in POINTS if point.alias}

Names = str | Iterable[str] | Callable[[str], bool] | None  # what `select` understands


class Rows(NamedTuple):
    """Which rows of a step a tensor of paged attention has.

    `sequences` of them from the sequence `first`, each from its new token `row` on.
    """

    first: int
    sequences: int
    row: int


# Called with (full name, tensor, rows of paged scores and patterns or None); returns None or what
# takes the tensor's place.
Show = Callable[[str, Tensor, Rows | None], Tensor | None]
Hook = Callable[[Tensor, str], Tensor | None]


class Traceable(Protocol):
    """What tracing needs of a model: `Qwen2` has it."""

    config: ModelConfig
    mesh: Mesh

    @property
    def differentiable(self) -> bool: ...

    def __call__(self, ids: Tensor, *, tap: Tap) -> Tensor: ...


# ---- names --------------------------------------------------------------------------------------


def every_name(num_layers: int) -> list[str]:
    """Every name of a model with so many layers, in the order of computation."""
    before, *after = [p.name for p in POINTS if not p.layered]
    layered = [p.name for p in POINTS if p.layered]
    return [before, *(f"layers.{i}.{name}" for i in range(num_layers) for name in layered), *after]


def point_names(num_layers: int) -> list[str]:
    """The names that "*" means: all but those of costly points."""
    return [name for name in every_name(num_layers) if not point_of(name).costly]


def hidden_state_names(num_layers: int) -> list[str]:
    """Where transformers' `output_hidden_states` are: num_layers + 1 names, in its order.

    hidden_states[0] is the embedding and hidden_states[i] is layer i - 1's output, but the last
    one is that of the final norm: the last layer's own output is not among them.
    """
    outputs = [f"layers.{i}.resid_post" for i in range(num_layers - 1)]
    return ["embed", *outputs, "final_norm"]


def point_of(name: str) -> Point:
    """The point that a full name means."""
    return BY_NAME[re.sub(r"^layers\.\d+\.", "", name)]


def alias_of(name: str) -> str | None:
    """TransformerLens's spelling of one of our names; None where it has no such point."""
    alias = point_of(name).alias
    layer = re.match(r"layers\.(\d+)\.", name)
    return f"blocks.{layer[1]}.{alias}" if alias and layer else alias


def canonical(name: str) -> str:
    """Our spelling of a point that TransformerLens's name means; any other name as it is."""
    layer = re.fullmatch(r"blocks\.(\d+)\.(.*)", name)
    point = BY_ALIAS.get(layer[2] if layer else name)
    if point is None or point.layered != bool(layer):
        return name
    return f"layers.{layer[1]}.{point.name}" if layer else point.name


def select(names: Names, num_layers: int) -> set[str]:
    """The points that `names` means: a name or pattern, a list of them, a predicate; None is "*".

    A pattern means a costly point only if it ends in that point's last word: "*.attn.result" does,
    "*" and "layers.0.*" do not. A predicate is asked about costly points too, and about both
    spellings of each name, ours and TransformerLens's; one yes is enough. Raises TraceError if a
    name, a pattern, a predicate or the whole list means nothing.
    """
    every = every_name(num_layers)
    if names is None:
        return set(point_names(num_layers))
    if callable(names):
        return _chosen_by(names, every, num_layers)
    chosen: set[str] = set()
    for pattern in _patterns(names):
        short = len(pattern) <= LONGEST_WORD  # comparing a megabyte takes seconds
        found = [name for name in every if short and _matches(name, pattern)]
        if not found:
            raise TraceError(
                f"no point is called {quoted(pattern, 100)} in a model of {num_layers} layers: "
                f"`tools/trace.py points` lists them{did_you_mean(pattern, _spellings(every))}"
            )
        chosen.update(found)
    if not chosen:
        raise TraceError("the list of names is empty: name a point, or give None for all of them")
    return chosen


def _patterns(names: object) -> list[str]:
    """A name or pattern, or a collection of them, as a list. Raises TraceError for another type."""
    listed: list[Any] = [names]
    if isinstance(names, Iterable) and not isinstance(names, (str, bytes)):
        try:
            listed = list(names)
        except TypeError:  # an array that holds one number
            listed = [names]
    for name in listed:
        if not isinstance(name, str):
            raise TraceError(
                f"names holds {quoted(name, 100)}, "
                "expected a name, a pattern, a list of them, or a predicate"
            )
    return listed


def _chosen_by(predicate: Callable[[str], bool], every: list[str], num_layers: int) -> set[str]:
    chosen = set()
    for name in every:
        alias = alias_of(name)
        if predicate(name) or (alias is not None and predicate(alias)):
            chosen.add(name)
    if not chosen:
        raise TraceError(
            f"the predicate is true for no point of a model of {num_layers} layers: it is asked "
            "about both names of each, such as 'layers.0.attn.z' and 'blocks.0.attn.hook_z'; "
            "`tools/trace.py points` lists them"
        )
    return chosen


def _matches(name: str, pattern: str) -> bool:
    point = point_of(name)
    if point.costly and not pattern.endswith(point.name.rpartition(".")[2]):
        return False
    return fnmatchcase(name, pattern) or fnmatchcase(alias_of(name) or "", pattern)


def _spellings(every: list[str]) -> list[str]:
    """All that could have been meant by a pattern that matches nothing."""
    patterns = [f"*.{name}" for point in POINTS for name in (point.name, point.alias) if name]
    return [*every, *(alias for name in every if (alias := alias_of(name))), *patterns]


def select_hooks(hooks: object, num_layers: int) -> list[tuple[set[str], Hook]]:
    """The points of each hook, with its function. Raises TraceError unless they are pairs."""
    listed: list[Any] = list(hooks) if isinstance(hooks, (list, tuple)) else [hooks]
    for hook in listed:
        if not isinstance(hook, (list, tuple)) or len(hook) != 2 or not callable(hook[1]):
            raise TraceError(
                f"hooks holds {quoted(hook, 100)}: "
                "expected a list of pairs (names of points, function)"
            )
    return [(select(names, num_layers), function) for names, function in listed]


# ---- taps ---------------------------------------------------------------------------------------


class Tap:
    """The tap that shows nothing: these calls are all that an untraced forward pass pays."""

    tiles = True  # attention over a cache may work on some rows at a time

    def sees(self, name: str) -> bool:
        """Whether the point is watched, for what is computed only to be shown."""
        return False

    def __call__(self, name: str, x: Tensor) -> Tensor:
        return x

    def at(self, layer: int) -> Tap:
        """The tap inside a layer."""
        return self

    def paged(self, first: int, count: int, row: int) -> Tap:
        """The tap inside paged attention, for these `Rows`."""
        return self


UNTRACED = Tap()


class TracingTap(Tap):
    """Shows what passes the points in `names` to `show`, which may return a replacement.

    Tensors are as the forward pass has them: packed [T, ...], or [N, heads, R, L] for scores and
    pattern. Under tensor parallelism they are the rank's shard, or, with `gather`, put together
    from all ranks; a replacement is then cut into shards again.
    """

    tiles = False  # whoever traces wants all rows of a pattern at once

    def __init__(
        self, model: Traceable, names: set[str], show: Show, gather: bool = True, prefix: str = ""
    ):
        self.model, self.names, self.show, self.prefix = model, names, show, prefix
        self.gather = gather and model.mesh.size > 1
        self.rows: Rows | None = None

    def at(self, layer: int) -> TracingTap:
        prefix = f"layers.{layer}."
        return TracingTap(self.model, self.names, self.show, self.gather, prefix)

    def paged(self, first: int, count: int, row: int) -> TracingTap:
        tap = TracingTap(self.model, self.names, self.show, self.gather, self.prefix)
        tap.rows = Rows(first, count, row)
        return tap

    def sees(self, name: str) -> bool:
        return self.prefix + name in self.names

    def __call__(self, name: str, x: Tensor) -> Tensor:
        full = self.prefix + name
        if full not in self.names:
            return x
        if self.rows is None or name not in ("attn.scores", "attn.pattern"):
            return self._pass(full, x, None)
        heads = self.model.config.num_attention_heads // self.model.mesh.size
        by_head = x.reshape(x.shape[0], heads, -1, x.shape[-1])  # [N, K, G R, L] -> [N, H, R, L]
        return self._pass(full, by_head, self.rows).reshape(x.shape)

    def _pass(self, name: str, x: Tensor, rows: Rows | None) -> Tensor:
        """Show x, gathered if that is wanted, and return it or what takes its place."""
        point = point_of(name)
        gathers = self.gather and point.axis is not None
        seen = gather(x, point, self.model) if gathers else x
        before = written(seen)
        new = self.show(name, seen, rows)
        if new is None and gathers and written(seen) != before:
            new = seen  # a hook has written into it, and it is a copy
        if new is None:
            return x
        check_replacement(name, new, seen)
        new = new.to(x.dtype)
        return scatter(new, x, point, self.model) if gathers else new


def written(x: Tensor) -> object:
    """What changes when x is written to; in inference mode, where nobody counts, at every call."""
    return object() if x.is_inference() else x._version


def check_replacement(name: str, new: object, seen: Tensor) -> None:
    """Raise TraceError unless `new`, a hook's answer, can take the place of `seen`."""
    if isinstance(new, Tensor) and new.shape == seen.shape:
        return
    found = tuple(new.shape) if isinstance(new, Tensor) else a_kind(new)
    raise TraceError(
        f"the hook on {name} returned {found}, expected None or a tensor {tuple(seen.shape)}"
    )


def gather(x: Tensor, point: Point, model: Traceable) -> Tensor:
    """The shards of all ranks as one tensor; KV heads that several ranks hold are in it once.

    Heads and channels are always dimension 1 of a packed tensor.
    """
    whole = model.mesh.all_gather(x.contiguous(), dim=1)
    if point.axis == "kv heads":
        held = kv_heads_per_rank(model.config, model.mesh.size) * model.mesh.size
        whole = whole[:, :: held // model.config.num_key_value_heads]
    return whole


def scatter(whole: Tensor, shard: Tensor, point: Point, model: Traceable) -> Tensor:
    """This rank's part, of the shape of `shard`, of a gathered tensor."""
    size, rank = shard.shape[1], model.mesh.rank
    first = rank * size
    if point.axis == "kv heads":  # neighbours may hold the same one
        first = rank * whole.shape[1] // model.mesh.size
    return whole.narrow(1, first, size)


# ---- what callers use ---------------------------------------------------------------------------


Value = TypeVar("Value")
Default = TypeVar("Default")


class Seen(dict[str, Value]):
    """{canonical name: tensor}, in which TransformerLens's names mean the same entries.

    Iteration gives the canonical names, in the order of computation.
    """

    def __missing__(self, name: str) -> Value:
        ours = canonical(name)
        if ours == name:
            near = did_you_mean(str(name), _spellings(list(self)))
            raise KeyError(f"{name!r} was not traced{near}")
        return self[ours]

    def __setitem__(self, name: str, value: Value) -> None:
        super().__setitem__(canonical(name), value)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(canonical(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(canonical(name))

    @overload
    def get(self, name: str, default: None = None, /) -> Value | None: ...

    @overload
    def get(self, name: str, default: Value, /) -> Value: ...

    @overload
    def get(self, name: str, default: Default, /) -> Value | Default: ...

    def get(self, name: str, default: object = None, /) -> object:
        return super().get(canonical(name), default)

    def pop(self, name: str, *default: Any) -> Any:
        return super().pop(canonical(name), *default)

    def __repr__(self) -> str:
        """Names, dtypes and shapes: nobody reads a million numbers."""
        lines = [f"  {name}: {_described(value)}" for name, value in self.items()]
        return "\n".join([f"{len(self)} points traced", *lines])


def _described(value: object) -> str:
    """A traced tensor, or the list of tensors of an engine's steps, in a few words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, list) and value:
        return f"{len(value)} steps, the first {_described(value[0])}"
    return repr(value)


def run_with_hooks(
    model: Traceable, ids: Tensor, fwd_hooks: Sequence[tuple[Names, Hook]], gather: bool = True
) -> Tensor:
    """model(ids) with `fn(tensor, name)` called at the points that each (names, fn) means.

    What fn returns, if not None, takes the tensor's place. Shapes as in `run_with_cache`. attn.out
    is the sum of what takes the place of attn.result, in the order of the heads; so it is with
    gradients too, and may then differ in its last bits. With
    gradients, `tensor.retain_grad()` in fn keeps the point's gradient. Returns logits [B, T, V].
    Raises TraceError for a name that matches nothing and for a return value that does not fit.
    """
    hooks = select_hooks(fwd_hooks, model.config.num_hidden_layers)

    def show(name: str, x: Tensor, rows: Rows | None) -> Tensor | None:
        shaped = seen = batched(x, point_of(name), ids)
        for names, fn in hooks:
            answer = fn(shaped, name) if name in names else None
            if answer is not None:
                check_replacement(name, answer, shaped)
                shaped = answer
        return handed_on(model, name, x, seen, shaped)

    every = set().union(*(names for names, _ in hooks))
    return model(ids, tap=TracingTap(model, every, show, gather))


def handed_on(
    model: Traceable, name: str, x: Tensor, seen: Tensor, shaped: Tensor
) -> Tensor | None:
    """What a tap returns for x, whose view `seen` hooks have turned into `shaped`.

    With gradients the rest is computed from the very tensor that the hooks saw, not from x, which
    it is a view of: then `retain_grad` and `requires_grad_` in a hook do what they say. Raises
    TraceError if a hook asks for gradients of an arithmetic that has none.
    """
    if shaped.requires_grad and not model.differentiable:
        raise TraceError(
            f"the hook on {name} asks for gradients, which this arithmetic has none of: load "
            "the model with arithmetic='native'"
        )
    unchanged = shaped is seen and not shaped.requires_grad
    return None if unchanged else shaped.reshape(x.shape)


def batched(x: Tensor, point: Point, ids: Tensor) -> Tensor:
    """[B T, ...] as [B, T, ...]; scores and pattern are [B, ...] already."""
    return x if point.shape.startswith("H T") else x.unflatten(0, ids.shape)
