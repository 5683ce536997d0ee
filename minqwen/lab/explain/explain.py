"""One forward pass on one prompt, told step by step: what a page or a terminal shows, as data.

`explain` runs the model and gives an `Explanation`: each operation with its formula, its lines of
code, its shape and some numbers; the blocks of the KV cache; what each head attends to and what it
adds to the predicted token; the likeliest tokens after each layer. All numbers are of the last
token, which predicts. `lab/explain/contrast.py` puts a model with a mistake beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minqwen.checks import dtype_name
from minqwen.config import ModelConfig
from minqwen.engine.blocks import BlockPool
from minqwen.lab.explain.sources import Code, Source, between, statement
from minqwen.model import Batch, Qwen2
from minqwen.model.activations import CONTRIBUTORS, Activations
from minqwen.model.attention import paged_attention
from minqwen.model.inputs import check_ids
from minqwen.model.memory import block_bytes
from minqwen.model.qwen2 import look_up
from minqwen.model.trace import Rows, TracingTap, batched, point_of, select

NUMBERS = 4  # of each tensor that are shown
TOP = 5  # tokens that are shown of a prediction
BLOCK_SIZE = 4  # so that a short prompt has several blocks; engines have 16

Spell = Callable[[int], str]


@dataclass(frozen=True)
class Operation:
    """One line of the story: a point of the forward pass, and where its code is.

    formula: in the legend's letters. part: whose code calls the operation, see `part_of`. calls:
    what the calling statement holds, see `sources.statement`. method:
    the arithmetic's method that computes it; after, until: which part of that, see
    `sources.between`.
    """

    point: str
    formula: str
    part: str
    calls: str
    method: str = ""
    after: str = ""
    until: str = ""


BEFORE = Operation("embed", "x = E[id], the token's row of the embedding table", "model", "embed")
IN_LAYER = (
    Operation("norm1", "n = x / sqrt(mean(x^2) + eps) * w", "layer", "norm1", "rms_norm"),
    Operation("attn.q", "q = n Wq^T + bq, cut into H heads of d", "attention", "q_proj", "linear"),
    Operation("attn.k", "k = n Wk^T + bk, cut into K heads of d", "attention", "k_proj", "linear"),
    Operation("attn.v", "v = n Wv^T + bv, cut into K heads of d", "attention", "v_proj", "linear"),
    Operation(
        "attn.rot_q",
        "dimensions i and i + d/2 of q are turned by the angle position * f(i), where f(i) is "
        "theta^(-2i/d), or YaRN's",
        "attention",
        "attn.rot_q",
        "rotate",
    ),
    Operation("attn.rot_k", "the same for k", "attention", "attn.rot_k", "rotate"),
    Operation(
        "attn.scores",
        "scores = q k^T / sqrt(d), -inf for later tokens; query head h reads KV head h // G",
        "attention",
        "attend_paged",
        "attend",
        until="attn.scores",
    ),
    Operation(
        "attn.pattern",
        "pattern = softmax(scores): how much of each token a head reads; adds up to 1",
        "attention",
        "attend_paged",
        "attend",
        after="attn.scores",
        until="attn.pattern",
    ),
    Operation(
        "attn.z",
        "z = pattern v: the values, weighted",
        "attention",
        "attend_paged",
        "attend",
        after="attn.pattern",
    ),
    Operation(
        "attn.out",
        "out = (all heads' z side by side) Wo^T",
        "attention",
        "o_proj",
        "row_parallel_linear",
    ),
    Operation("resid_mid", "x = x + out", "layer", "attn.out"),
    Operation("norm2", "n = x / sqrt(mean(x^2) + eps) * w", "layer", "norm2", "rms_norm"),
    Operation("mlp.gate", "gate = n Wg^T", "mlp", "gate_proj", "linear"),
    Operation("mlp.up", "up = n Wu^T", "mlp", "up_proj", "linear"),
    Operation("mlp.act", "act = silu(gate) * up", "mlp", "mlp.act", "silu_mul"),
    Operation("mlp.out", "out = act Wd^T", "mlp", "down_proj", "row_parallel_linear"),
    Operation("resid_post", "x = x + out", "layer", "mlp.out"),
)
AFTER = (
    Operation(
        "final_norm", "n = x / sqrt(mean(x^2) + eps) * w", "unembed", "final_norm", "rms_norm"
    ),
    Operation(
        "logits", "logits = n W^T: one number for each token", "unembed", "lm_head", "linear"
    ),
)


@dataclass(frozen=True)
class Step:
    """An operation as it was computed. sizes: of `shape`'s letters. at: where `numbers` stand."""

    point: str
    what: str
    formula: str
    shape: str
    sizes: tuple[int, ...]
    code: tuple[Code, ...]
    at: str
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """One token that may come next."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Lens:
    """What would come next if the layers ended at `point`. rank: of the model's own choice."""

    point: str
    predictions: tuple[Prediction, ...]
    rank: int
    probability: float  # of the model's own choice


@dataclass(frozen=True)
class Head:
    """What one head reads for the last token, and what it adds to the predicted token's logit.

    pattern: the share of each token. strongest: the position of the largest share. block: of the
    KV cache, in which that token's key lies; None without a cache.
    """

    head: int
    kv_head: int
    pattern: tuple[float, ...]
    strongest: int
    block: int | None
    adds: float


@dataclass(frozen=True)
class LayerStory:
    steps: tuple[Step, ...]
    heads: tuple[Head, ...]
    mlp_adds: float  # to the predicted token's logit
    rest_adds: float  # what o_proj adds besides its heads: a bias, and the shares' rounding
    lens: Lens


@dataclass(frozen=True)
class Blocks:
    """Where the keys and values of the prompt lie in the cache.

    table: the block of tokens 0 to size - 1, that of the next ones, and so on. Every layer writes
    its keys and values to these blocks of its own part of the pool, and reads all of them.
    """

    size: int
    table: tuple[int, ...]
    token_bytes: int  # keys and values of one token in all layers
    write: Code
    read: Code

    @property
    def total_bytes(self) -> int:
        return len(self.table) * self.size * self.token_bytes

    def of(self, position: int) -> int:
        return self.table[position // self.size]


@dataclass(frozen=True)
class Token:
    id: int
    text: str


@dataclass(frozen=True)
class Explanation:
    """embed_adds and the layers' `adds` are the parts of `logit`, that of predictions[0]."""

    model: str
    dtype: str
    arithmetic: str
    letters: dict[str, int]
    tokens: tuple[Token, ...]
    blocks: Blocks | None
    embed: Step
    embed_lens: Lens
    embed_adds: float
    layers: tuple[LayerStory, ...]
    after: tuple[Step, ...]
    predictions: tuple[Prediction, ...]
    logit: float


# ---- running ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A forward pass on one prompt, all points kept. table: the blocks of the cache, or None.

    seen: tensors [1, T, ...]. last: what `head_contributions` needs, of the last token.
    """

    model: Qwen2
    ids: list[int]
    logits: Tensor  # [T, V]
    seen: Activations
    last: Activations
    block_size: int
    table: tuple[int, ...] | None


@torch.inference_mode()
def run(model: Qwen2, ids: Sequence[int], block_size: int | None) -> Run:
    """A forward pass on `ids`, with every point kept on the CPU.

    block_size: attend through a cache with blocks of so many tokens; None: on the whole text,
    without a cache. Under tensor parallelism every rank calls it.
    """
    row = torch.tensor([list(ids)], device=model.device)
    check_ids(row, model.config)
    seen, last = Activations(model), Activations(model)

    def show(name: str, x: Tensor, rows: Rows | None) -> None:
        x = batched(x, point_of(name), row).to("cpu", copy=True)
        if not point_of(name).costly:
            seen[name] = x
        if name in needed:
            last[name] = x[:, -1:].clone()

    layers = model.config.num_hidden_layers
    needed = select(CONTRIBUTORS, layers)
    tap = TracingTap(model, select(["*", *CONTRIBUTORS], layers), show)
    if block_size is None:
        logits = model(row, tap=tap)[0]
        return Run(model, list(ids), logits.cpu(), seen, last, 0, None)
    count = len(ids)
    pool = BlockPool(-(-count // block_size), block_size)
    table = pool.allocate(pool.blocks_for(count))
    assert table is not None
    batch = Batch.paged([count], [count], [table], block_size, device=model.device)
    cache = model.new_cache(pool.num_blocks, block_size)
    logits = model(row[0], batch, cache, tap=tap)
    return Run(model, list(ids), logits.cpu(), seen, last, block_size, tuple(table))


def explain(
    model: Qwen2, ids: Sequence[int], spell: Spell, name: str, block_size: int = BLOCK_SIZE
) -> Explanation:
    """The story of one forward pass on `ids`. spell: an id's text. name: what to call the model.

    Under tensor parallelism every rank calls it. Raises MinqwenError for ids that are no prompt.
    """
    return tell(run(model, ids, block_size), spell, name)


# ---- telling ------------------------------------------------------------------------------------


@torch.inference_mode()
def tell(it: Run, spell: Spell, name: str) -> Explanation:
    """The story of a forward pass."""
    config = it.model.config
    predictions = likeliest(it.logits[-1].double().log_softmax(-1), spell)
    chosen = predictions[0].id
    parts = it.last.head_contributions(chosen)
    blocks = None if it.table is None else blocks_of(it)
    layers = []
    for i in range(config.num_hidden_layers):
        layers.append(
            LayerStory(
                steps=tuple(step_of(it, op, i) for op in IN_LAYER),
                heads=heads_of(it, i, parts.heads[0, i], blocks),
                mlp_adds=float(parts.mlps[0, i]),
                rest_adds=float(parts.rest[0, i]),
                lens=lens_of(it, f"layers.{i}.resid_post", chosen, spell),
            )
        )
    return Explanation(
        model=name,
        dtype=dtype_name("the model's dtype", it.model.dtype),
        arithmetic=it.model.ops.name,
        letters=letters_of(config, it),
        tokens=tuple(Token(id, spell(id)) for id in it.ids),
        blocks=blocks,
        embed=step_of(it, BEFORE),
        embed_lens=lens_of(it, "embed", chosen, spell),
        embed_adds=float(parts.embed[0]),
        layers=tuple(layers),
        after=tuple(step_of(it, op) for op in AFTER),
        predictions=predictions,
        logit=float(it.logits[-1, chosen]),
    )


def likeliest(logprobs: Tensor, spell: Spell, top: int = TOP) -> tuple[Prediction, ...]:
    """The `top` likeliest tokens of log probabilities [V]; of equal ones the lower id first."""
    values, ids = logprobs.double().sort(descending=True, stable=True)
    pairs = zip(ids[:top].tolist(), values[:top].exp().tolist())
    return tuple(Prediction(id, spell(id), p) for id, p in pairs)


def lens_of(it: Run, point: str, chosen: int, spell: Spell) -> Lens:
    """The likeliest tokens after `point`, by the final norm and the head, for the last token."""
    logits = it.seen.logits_after(point, position=-1)[0, 0]
    logprobs = logits.double().log_softmax(-1)
    order = logits.argsort(descending=True, stable=True)
    rank = 1 + int((order == chosen).nonzero())
    return Lens(point, likeliest(logprobs, spell), rank, float(logprobs[chosen].exp()))


def letters_of(config: ModelConfig, it: Run) -> dict[str, int]:
    """The legend's letters, and what they are here."""
    letters = {
        "T": len(it.ids),
        "L": len(it.ids),
        "D": config.hidden_size,
        "H": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "G": config.group_size,
        "d": config.head_dim,
        "I": config.intermediate_size,
        "V": config.vocab_size,
    }
    return letters if it.table is None else letters | {"P": len(it.table), "S": it.block_size}


def heads_of(it: Run, layer: int, adds: Tensor, blocks: Blocks | None) -> tuple[Head, ...]:
    """adds [H]: each head's part of the predicted token's logit."""
    pattern = it.seen[f"layers.{layer}.attn.pattern"][0, :, -1].double()  # [H, L]
    heads = []
    for h, row in enumerate(pattern):
        strongest = int(row.argmax())
        block = None if blocks is None else blocks.of(strongest)
        kv_head = h // it.model.config.group_size
        heads.append(Head(h, kv_head, tuple(row.tolist()), strongest, block, float(adds[h])))
    return tuple(heads)


def blocks_of(it: Run) -> Blocks:
    assert it.table is not None
    model = it.model
    bytes_of_one = block_bytes(model.config, 1, 1, dtype_name("dtype", model.dtype))
    write = statement(type(model.ops).attend_paged, "write")
    read = statement(paged_attention, "read")
    return Blocks(it.block_size, it.table, bytes_of_one, write, read)


# ---- one operation ------------------------------------------------------------------------------


def step_of(it: Run, op: Operation, layer: int | None = None) -> Step:
    name = op.point if layer is None else f"layers.{layer}.{op.point}"
    point, x = point_of(name), it.seen[name][0]
    numbers, at = shown_numbers(x, point.shape)
    return Step(
        point=name,
        what=point.what,
        formula=op.formula,
        shape=point.shape,
        sizes=tuple(x.shape),
        code=code_of(it, op, layer),
        at=at,
        numbers=numbers,
    )


def shown_numbers(x: Tensor, shape: str) -> tuple[tuple[float, ...], str]:
    """The first numbers of the last token, of head 0, and where they stand. x: of that shape."""
    if shape.startswith("H T"):
        row, at = x[0, -1], "[0, -1]"
    elif x.dim() == 3:
        row, at = x[-1, 0], "[-1, 0]"
    else:
        row, at = x[-1], "[-1]"
    return tuple(row[:NUMBERS].tolist()), f"{at[:-1]}, :{min(NUMBERS, len(row))}]"


def code_of(it: Run, op: Operation, layer: int | None) -> tuple[Code, ...]:
    """The statement that calls the operation, then the operation itself."""
    calls = op.calls
    if calls == "attend_paged" and it.table is None:
        calls = "attend_dense"
    called = statement(part_of(it.model, op.part, layer), calls)
    if op is BEFORE:
        return called, statement(look_up, "embedding")
    if not op.method:
        return (called,)
    ops = type(it.model.ops)
    computes = between(getattr(ops, op.method), op.after, op.until)
    if "self.product(" in computes.text:  # the sum over ranks is one matter, the product another
        return called, computes, between(ops.product)
    return called, computes


def part_of(model: Qwen2, part: str, layer: int | None) -> Source:
    """The code that calls an operation."""
    if layer is None:
        return type(model).unembed if part == "unembed" else type(model)
    module = model.model.layers[layer]
    inner = {"attention": "self_attn", "mlp": "mlp"}.get(part)
    return type(getattr(module, inner) if inner else module).forward
