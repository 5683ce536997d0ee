"""Run a model and keep its intermediates, and what can be read off them afterwards.

`run_with_cache` returns the logits and an `Activations`: a tensor for each name of trace.py, and

    hidden_states()         transformers' `output_hidden_states`
    logits_after(name)      the logits that a residual stream has already (logit lens)
    logit_lens()            the likeliest tokens after each layer
    head_contributions(id)  how much each head, MLP and the embedding add to one logit

Prompts of unequal lengths are a list: they are packed, and each has logits and a cache of its own.
docs/traces.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from minqwen.config import ModelConfig
from minqwen.errors import MinqwenError, TraceError
from minqwen.model.batch import Batch
from minqwen.model.inputs import check_ids
from minqwen.model.kv_cache import KVCache
from minqwen.model.trace import (
    Names,
    Point,
    Rows,
    Seen,
    Tap,
    TracingTap,
    batched,
    canonical,
    hidden_state_names,
    point_of,
    select,
)
from minqwen.parallel import Mesh

# What `Activations.head_contributions` needs, for `run_with_cache`.
CONTRIBUTORS = ["embed", "*.attn.result", "*.attn.out", "*.mlp.out", "*.resid_post"]
RESIDUALS = ("embed", "resid_pre", "resid_mid", "resid_post")
BLOCK_SIZE = 16  # of the cache in which prompts of unequal lengths attend

Prompts = Sequence[Tensor | Sequence[int]]


class Model(Protocol):
    """What is asked of a model here: `Qwen2` has it."""

    config: ModelConfig
    mesh: Mesh

    @property
    def device(self) -> torch.device: ...

    @property
    def differentiable(self) -> bool: ...

    def __call__(
        self, ids: Tensor, batch: Batch | None = None, cache: KVCache | None = None, *, tap: Tap
    ) -> Tensor: ...

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache: ...

    def unembed(self, x: Tensor) -> Tensor: ...

    def logit_directions(self, ids: Tensor) -> Tensor: ...


class Lens(NamedTuple):
    """The likeliest tokens after each layer, the likeliest first; of equal ones the lower id."""

    names: list[str]  # N residual streams, in the order of computation
    ids: Tensor  # [N, B, T, top]
    logits: Tensor  # [N, B, T, top]


class Contributions(NamedTuple):
    """How much each part of the model adds to one logit of each sequence, in float64."""

    embed: Tensor  # [B]
    heads: Tensor  # [B, layers, H]
    # [B, layers]: what o_proj adds besides its heads. That is its bias, which checkpoints have not
    # or as zeros, and what the rounding of the shares left out.
    rest: Tensor
    mlps: Tensor  # [B, layers]

    def total(self) -> Tensor:
        """The sum of all parts: the logit, to rounding. [B]"""
        return self.embed + self.heads.sum((1, 2)) + self.rest.sum(1) + self.mlps.sum(1)


class Activations(Seen[Tensor]):
    """{name: tensor [B, T, ...]} of a forward pass, and what follows from it.

    The methods use the model's final norm and head as they are when they are called. Under tensor
    parallelism every rank calls them, with the same arguments. They have no gradients.
    """

    def __init__(self, model: Model):
        super().__init__()
        self._model = model

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled or copied cache is its tensors, without the model."""
        return Seen, (dict(self),)

    def hidden_states(self) -> tuple[Tensor, ...]:
        """transformers' `hidden_states`, layers + 1 tensors [B, T, D].

        Raises TraceError if one of trace.py's `hidden_state_names` was not traced.
        """
        names = hidden_state_names(self._model.config.num_hidden_layers)
        return tuple(self._traced(name) for name in names)

    @torch.no_grad()
    def logits_after(self, name: str, position: int | None = None) -> Tensor:
        """The logits [B, T, V] that a residual stream gives by the final norm and the head.

        It is normed by its own mean square. After the last layer these are the model's logits.
        position: only of this token, [B, 1, V]; -1 is the last one. Raises TraceError for a point
        that is no residual stream.
        """
        x = self._traced(name)
        if last_word(canonical(name)) not in RESIDUALS:
            raise TraceError(f"{name} is no residual stream: expected {', '.join(RESIDUALS)}")
        if position is not None:
            at = place(position, x)
            x = x[:, at : at + 1]
        logits: Tensor = self._model.unembed(x.flatten(0, 1).to(self._model.device))
        logits = logits.unflatten(0, x.shape[:2])
        return logits.to(x.device)

    def logit_lens(self, top: int = 5, position: int | None = None) -> Lens:
        """The `top` likeliest tokens after the embedding and after each layer (the logit lens).

        That is of embed and every resid_post, if they were traced. position: of this token only.
        Raises TraceError if none of them was traced.
        """
        names = [name for name in self if last_word(name) in ("embed", "resid_post")]
        if not names:
            raise TraceError("no residual stream was traced: give names=['embed', '*.resid_post']")
        if top < 1:
            raise TraceError(f"top is {top}, expected at least 1")
        ids, logits = [], []
        for name in names:
            after = self.logits_after(name, position)
            values, order = after.sort(dim=-1, descending=True, stable=True)
            ids.append(order[..., :top].clone())  # not a view that keeps the whole rows alive
            logits.append(values[..., :top].clone())
        return Lens(names, torch.stack(ids), torch.stack(logits))

    @torch.no_grad()
    def head_contributions(self, token: int | Tensor, position: int = -1) -> Contributions:
        """How much each head adds directly to the logit of `token`, at one position.

        A part c of the final residual stream x adds c . (w * norm.weight) / sqrt(mean(x^2) + eps),
        w the head's row of the token. This is linear in c, so all parts add up to the logit.
        token: an id, or one for each sequence, [B]. Raises TraceError if one of `CONTRIBUTORS` was
        not traced.
        """
        config = self._model.config
        layers = range(config.num_hidden_layers)
        last = f"layers.{layers[-1]}.resid_post"
        at = place(position, self._traced(last))
        x = self._part(last, at)
        direction = self._model.logit_directions(self._tokens(token, len(x))).to(x.device)
        direction = direction / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

        def added(suffix: str) -> Tensor:
            """What that part of each layer adds, [B, layers, ...]."""
            parts = [self._part(f"layers.{i}.{suffix}", at) for i in layers]
            return torch.stack([torch.einsum("b...d,bd->b...", c, direction) for c in parts], 1)

        heads = added("attn.result")
        if heads.shape[-1] != config.num_attention_heads:
            raise TraceError("attn.result has one rank's heads only: trace it with gather=True")
        rest = added("attn.out") - heads.sum(-1)
        embed = (self._part("embed", at) * direction).sum(-1)
        return Contributions(embed, heads, rest, added("mlp.out"))

    def _tokens(self, token: int | Tensor, count: int) -> Tensor:
        """`token` as one id for each sequence, [B]. Raises MinqwenError if it is not."""
        tokens = torch.as_tensor(token, device=self._model.device).reshape(-1, 1)
        if len(tokens) not in (1, count):
            raise TraceError(f"token has {len(tokens)} ids, expected one, or one of each sequence")
        check_ids(tokens, self._model.config)
        return tokens[:, 0].expand(count)

    def _part(self, name: str, at: int) -> Tensor:
        """The token `at` of a point, in float64. [B, ...]"""
        return self._traced(name)[:, at].double()

    def _traced(self, name: str) -> Tensor:
        """The tensor of that name. Raises TraceError if there is none."""
        x = self.get(name)
        if x is None:
            raise TraceError(f"{name} was not traced: add it to the names of run_with_cache")
        return x


def last_word(name: str) -> str:
    """ "resid_post" of "layers.3.resid_post"."""
    return name.rpartition(".")[2]


def place(position: int, x: Tensor) -> int:
    """`position` in x [B, T, ...] counted from the first token. Raises TraceError if T is less."""
    length = x.shape[1]
    if not -length <= position < length:
        raise TraceError(f"position is {position}, expected {-length} to {length - 1}")
    return position % length


# ---- running ------------------------------------------------------------------------------------


@overload
def run_with_cache(
    model: Model,
    ids: Tensor,
    names: Names = None,
    to: torch.device | str | None = None,
    per_query_head: bool = False,
    gather: bool = True,
) -> tuple[Tensor, Activations]: ...


@overload
def run_with_cache(
    model: Model,
    ids: Prompts,
    names: Names = None,
    to: torch.device | str | None = None,
    per_query_head: bool = False,
    gather: bool = True,
) -> tuple[list[Tensor], list[Activations]]: ...


def run_with_cache(
    model: Model,
    ids: Tensor | Prompts,
    names: Names = None,
    to: torch.device | str | None = None,
    per_query_head: bool = False,
    gather: bool = True,
) -> tuple[Tensor, Activations] | tuple[list[Tensor], list[Activations]]:
    """model(ids) and what passed the points: (logits [B, T, V], {canonical name: tensor}).

    Tensors are [B, T, ...], scores and pattern [B, H, T, T]; each is contiguous and has memory of
    its own, as safetensors' `save_file` wants it. ids: [B, T], or a list of prompts of any lengths
    (ids or tensors [T]). They are packed into one forward pass. The answer is then two lists, with
    logits [1, T, V] and a cache for each prompt, as if it were alone, and without gradients.
    to: the device to keep tensors on. per_query_head: keys and values as [B, T, H, d], each KV head
    once for every query head that reads it. Raises TraceError for a name that matches nothing.
    """
    keep = Keep(model.config.group_size, to, per_query_head)
    chosen = select(names, model.config.num_hidden_layers)
    if not isinstance(ids, Tensor) and is_prompts(ids):
        return run_packed(model, ids, chosen, keep, gather)
    check_ids(ids, model.config)
    assert isinstance(ids, Tensor)
    seen = Activations(model)
    memory: set[int] = set()  # where the tensors lie

    def show(name: str, x: Tensor, rows: Rows | None) -> None:
        point = point_of(name)
        x = keep(batched(x, point, ids), point).contiguous()
        if x.untyped_storage().data_ptr() in memory:
            x = x.clone()  # one layer's resid_post is the next one's resid_pre
        memory.add(x.untyped_storage().data_ptr())
        seen[name] = x

    return model(ids, tap=TracingTap(model, chosen, show, gather)), seen


@dataclass(frozen=True)
class Keep:
    """What `run_with_cache` keeps of a tensor [B, T, ...]: its options."""

    group_size: int
    to: torch.device | str | None
    per_query_head: bool

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        if self.per_query_head and point.axis == "kv heads":
            G = self.group_size
            x = x.unsqueeze(-2).expand(*x.shape[:-1], G, x.shape[-1]).flatten(-3, -2)
        return x.detach() if self.to is None else x.detach().to(self.to)


def is_prompts(ids: object) -> bool:
    """Whether these are several prompts: a list of tensors or of lists."""
    if not isinstance(ids, (list, tuple)) or not ids:
        return False
    return all(isinstance(row, (Tensor, list, tuple)) for row in ids)


@torch.no_grad()
def run_packed(
    model: Model, prompts: Prompts, names: set[str], keep: Keep, gather: bool
) -> tuple[list[Tensor], list[Activations]]:
    """`run_with_cache` of prompts of any lengths, which attend through a cache of keys and values.

    Raises MinqwenError for a prompt that is empty or no row of ids.
    """
    rows = [prompt_row(prompt, model) for prompt in prompts]
    lengths = [row.shape[1] for row in rows]
    caches = [Activations(model) for _ in rows]

    def show(name: str, x: Tensor, of: Rows | None) -> None:
        point = point_of(name)
        first = 0 if of is None else of.first
        # Scores and patterns [N, H, T, T] come from N prompts of one length at a time.
        parts = [part[None] for part in x.split(lengths)] if of is None else x.split(1)
        for cache, part in zip(caches[first:], parts):
            cache[name] = keep(part, point).clone(memory_format=torch.contiguous_format)

    needed = [-(-length // BLOCK_SIZE) for length in lengths]
    blocks = [range(end - count, end) for count, end in zip(needed, accumulate(needed))]
    batch = Batch.paged(lengths, lengths, blocks, BLOCK_SIZE, device=model.device)
    cache = model.new_cache(sum(needed), BLOCK_SIZE)
    packed = torch.cat([row[0] for row in rows])
    logits = model(packed, batch, cache, tap=TracingTap(model, names, show, gather))
    return [part[None] for part in logits.split(lengths)], caches


def prompt_row(prompt: Tensor | Sequence[int], model: Model) -> Tensor:
    """A prompt's ids as [1, T]. Raises MinqwenError if it is empty or no row of ids."""
    try:
        row = torch.as_tensor(prompt, device=model.device)[None]
    except (TypeError, ValueError, RuntimeError):  # it holds something else than numbers
        row = torch.empty(0)
    if row.dim() != 2:
        found = tuple(prompt.shape) if isinstance(prompt, Tensor) else repr(prompt)[:60]
        raise MinqwenError(f"a prompt is {found}, expected token ids, or a tensor [T] of them")
    check_ids(row, model.config)
    return row
