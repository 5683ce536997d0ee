"""Every intermediate by name: the table of points, and the taps that read or replace what passes them.

The forward pass calls `tap(name, x)` at each point and goes on with what comes back. `UNTRACED` hands x back;
`Tap` shows it to functions first. Names: "embed", "layers.3.attn.q", ...; patterns with * and ? match them, and
TransformerLens's names ("blocks.3.attn.hook_q") are the same points.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minqwen.errors import TraceError

if TYPE_CHECKING:
    from minqwen.model.qwen2 import Qwen2


@dataclass(frozen=True)
class Point:
    """name: within its layer if `layered`. shape: in the legend's letters, per sequence, with T new tokens and L
    tokens of context. axis: what tensor parallelism splits ("heads", "kv heads", "channels"), or None."""

    name: str
    shape: str
    alias: str | None  # TransformerLens's name
    what: str
    axis: str | None = None
    layered: bool = True


POINTS = [
    Point("embed", "T D", "hook_embed", "token embeddings", layered=False),
    Point("resid_pre", "T D", "hook_resid_pre", "residual stream into the layer"),
    Point("norm1", "T D", "ln1.hook_normalized", "input_layernorm's output, its weight applied"),
    Point("attn.q", "T H d", "attn.hook_q", "queries, bias added", "heads"),
    Point("attn.k", "T K d", "attn.hook_k", "keys, bias added", "kv heads"),
    Point("attn.v", "T K d", "attn.hook_v", "values, bias added", "kv heads"),
    Point("attn.rot_q", "T H d", "attn.hook_rot_q", "queries after RoPE", "heads"),
    Point("attn.rot_k", "T K d", "attn.hook_rot_k", "keys after RoPE", "kv heads"),
    Point(
        "attn.scores", "H T L", "attn.hook_attn_scores", "scaled scores, -inf where hidden", "heads"
    ),
    Point("attn.pattern", "H T L", "attn.hook_pattern", "softmax of the scores", "heads"),
    Point("attn.z", "T H d", "attn.hook_z", "each head's weighted values", "heads"),
    Point("attn.out", "T D", "hook_attn_out", "o_proj's output"),
    Point("resid_mid", "T D", "hook_resid_mid", "residual stream after attention"),
    Point(
        "norm2",
        "T D",
        "ln2.hook_normalized",
        "post_attention_layernorm's output, its weight applied",
    ),
    Point("mlp.gate", "T I", "mlp.hook_pre", "gate_proj's output", "channels"),
    Point("mlp.up", "T I", "mlp.hook_pre_linear", "up_proj's output", "channels"),
    Point("mlp.act", "T I", "mlp.hook_post", "silu(gate) times up", "channels"),
    Point("mlp.out", "T D", "hook_mlp_out", "down_proj's output"),
    Point("resid_post", "T D", "hook_resid_post", "residual stream out of the layer"),
    Point(
        "final_norm",
        "T D",
        "ln_final.hook_normalized",
        "the last residual after model.norm",
        layered=False,
    ),
    Point("logits", "T V", None, "logits", layered=False),
]
BY_NAME = {point.name: point for point in POINTS}


def point_names(num_layers: int) -> list[str]:
    """Every name of a model with so many layers, in the order of computation."""
    before, after = (
        [p.name for p in POINTS if not p.layered][:1],
        [p.name for p in POINTS if not p.layered][1:],
    )
    layers = [f"layers.{i}.{p.name}" for i in range(num_layers) for p in POINTS if p.layered]
    return before + layers + after


def point_of(name: str) -> Point:
    """The point a full name is of."""
    return BY_NAME[re.sub(r"^layers\.\d+\.", "", name)]


def alias_of(name: str) -> str | None:
    """TransformerLens's spelling of one of our names."""
    alias = point_of(name).alias
    return (
        alias and re.sub(r"^layers\.(\d+)\..*", lambda m: f"blocks.{m[1]}.{alias}", name)
        if "." in name
        else alias
    )


def select(names: str | list[str] | Callable[[str], bool] | None, num_layers: int) -> set[str]:
    """The points that `names` means: a name or pattern, a list of them, a predicate, or None for all.
    Raises TraceError if something in it matches nothing."""
    every = point_names(num_layers)
    if names is None:
        return set(every)
    if callable(names):
        return {name for name in every if names(name)}
    chosen: set[str] = set()
    for pattern in [names] if isinstance(names, str) else names:
        found = [
            n for n in every if fnmatchcase(n, pattern) or fnmatchcase(alias_of(n) or "", pattern)
        ]
        if not found:
            raise TraceError(
                f"no point is called {pattern!r} in a model of {num_layers} layers: "
                "`tools/trace.py points` lists them"
            )
        chosen.update(found)
    return chosen


class Untraced:
    """The tap that shows nothing to nobody: what an untraced forward pass pays for is these calls."""

    def __call__(self, name: str, x: Tensor) -> Tensor:
        return x

    def at(self, layer: int) -> Untraced:
        """The tap inside a layer."""
        return self

    def paged(self, first: int, count: int, row: int) -> Untraced:
        """The tap of attention over pages, for `count` sequences from `first`, from new token `row` of each."""
        return self

    tiles = True  # attention over pages may work on some rows at a time


UNTRACED = Untraced()


class Tap:
    """Shows what passes the points in `names` to `show(name, x, where)`, which returns None or a replacement.

    x is as the forward pass has it: packed [T, ...], or [N, heads, R, L] for scores and pattern, where `where` is
    (first sequence, count, first row), else None. Under tensor parallelism x is the rank's shard, or gathered
    from all ranks with `gather`, whose replacement is cut again.
    """

    tiles = False  # a tracer wants all of a pattern at once

    def __init__(self, model: Qwen2, names: set[str], show: Callable, gather: bool = True):
        self.model, self.names, self.show = model, names, show
        self.gather = gather and model.mesh.size > 1
        self.prefix, self.where = "", None

    def _copy(self, **changes) -> Tap:
        new = object.__new__(type(self))
        new.__dict__ = {**self.__dict__, **changes}
        return new

    def at(self, layer: int) -> Tap:
        return self._copy(prefix=f"layers.{layer}.")

    def paged(self, first: int, count: int, row: int) -> Tap:
        return self._copy(where=(first, count, row))

    def __call__(self, name: str, x: Tensor) -> Tensor:
        full = self.prefix + name
        if full not in self.names:
            return x
        point, grouped = BY_NAME[name], None
        if self.where is not None and name in ("attn.scores", "attn.pattern"):
            grouped = x.shape  # [N, K, G R, L] -> [N, H, R, L]
            heads = self.model.config.num_attention_heads // self.model.mesh.size
            x = x.reshape(x.shape[0], heads, -1, x.shape[-1])
        seen = gather(x, point, self.model) if self.gather and point.axis else x
        new = self.show(full, seen, self.where if grouped is not None else None)
        if new is not None:
            if not isinstance(new, Tensor) or new.shape != seen.shape:
                found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise TraceError(
                    f"the hook on {full} returned {found}, expected None or a tensor {tuple(seen.shape)}"
                )
            new = new.to(x.dtype)
            x = scatter(new, x, point, self.model) if self.gather and point.axis else new
        return x if grouped is None else x.reshape(grouped)


def shard_dim(point: Point) -> int:
    """The dimension of a packed tensor that tensor parallelism splits: heads and channels."""
    return 1


def gather(x: Tensor, point: Point, model: Qwen2) -> Tensor:
    """A shard of every rank as one tensor; replicated key/value heads once."""
    whole = model.mesh.all_gather(x.contiguous(), dim=shard_dim(point))
    copies = max(model.mesh.size // model.config.num_key_value_heads, 1)
    if point.axis == "kv heads" and copies > 1:
        whole = whole[:, ::copies]
    return whole


def scatter(whole: Tensor, shard: Tensor, point: Point, model: Qwen2) -> Tensor:
    """This rank's part of a gathered tensor."""
    size, rank = shard.shape[1], model.mesh.rank
    if point.axis == "kv heads":
        return whole.narrow(1, rank * whole.shape[1] // model.mesh.size, size)
    return whole.narrow(1, rank * size, size)


def run_with_cache(
    model: Qwen2,
    ids: Tensor,
    names: str | list[str] | Callable[[str], bool] | None = None,
    to: torch.device | str | None = None,
    per_query_head: bool = False,
    gather: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """model(ids) and what passed the points: (logits [B, T, V], {canonical name: tensor}).

    Tensors are [B, T, ...], scores and pattern [B, H, T, T]. to: the device to keep them on. per_query_head: keys
    and values as [B, T, H, d] views, each KV head once for every query head that reads it.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor, where) -> None:
        point = point_of(name)
        x = batched(x, point, ids)
        if per_query_head and point.axis == "kv heads":
            G = model.config.group_size
            x = x.unsqueeze(-2).expand(*x.shape[:-1], G, x.shape[-1]).flatten(-3, -2)
        x = x.detach() if to is None else x.detach().to(to)
        seen[name] = x

    tap = Tap(model, select(names, model.config.num_hidden_layers), keep, gather)
    return model(ids, tap=tap), Seen(seen)


def run_with_hooks(
    model: Qwen2, ids: Tensor, fwd_hooks: list[tuple], gather: bool = True
) -> Tensor:
    """model(ids) with `fn(tensor, name)` called at the points each (names, fn) means; what it returns, if not
    None, takes the tensor's place. Shapes as in `run_with_cache`. Returns logits [B, T, V]."""
    hooks = [(select(names, model.config.num_hidden_layers), fn) for names, fn in fwd_hooks]

    def show(name: str, x: Tensor, where) -> Tensor | None:
        point, new = point_of(name), None
        shaped = batched(x, point, ids)
        for names, fn in hooks:
            if name in names:
                answer = fn(shaped, name)
                if answer is not None:
                    if not isinstance(answer, Tensor) or answer.shape != shaped.shape:
                        found = (
                            tuple(answer.shape)
                            if isinstance(answer, Tensor)
                            else type(answer).__name__
                        )
                        raise TraceError(
                            f"the hook on {name} returned {found}, "
                            f"expected None or a tensor {tuple(shaped.shape)}"
                        )
                    shaped = new = answer
        return None if new is None else new.reshape(x.shape)

    every = set().union(*(names for names, _ in hooks)) if hooks else set()
    return model(ids, tap=Tap(model, every, show, gather))


def batched(x: Tensor, point: Point, ids: Tensor) -> Tensor:
    """[B T, ...] as [B, T, ...]; scores and pattern are [B, ...] already."""
    return x if point.shape.startswith("H T") else x.unflatten(0, ids.shape)


class Seen(dict):
    """{canonical name: tensor} that TransformerLens's names find too."""

    def __missing__(self, name: str) -> Tensor:
        for ours in self:
            if alias_of(ours) == name:
                return self[ours]
        raise KeyError(name)
