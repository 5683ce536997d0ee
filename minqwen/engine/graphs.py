"""Steps on a GPU: compiled functions, and one CUDA graph for each number of sequences.

A step that brings one token of each sequence (decode) is captured once for each size of the ladder
1, 2, 4, ... and replayed over static buffers, so that no kernel waits for Python. A step that
brings more runs the compiled functions one by one. model/steps.py has what both compute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minqwen.engine.buffers import Buffers, Graph, announce, captured, sequences
from minqwen.engine.captured import CapturedModel
from minqwen.engine.scheduler import Scheduled
from minqwen.errors import MinqwenError
from minqwen.model import Batch, KVCache, Native, Qwen2
from minqwen.model import steps as functions
from minqwen.model.fast import Fast
from minqwen.model.qwen2 import look_up
from minqwen.model.rope import table_length
from minqwen.model.steps import FUSED_HEAD_DIMS, LayerWeights, ModelWeights, Shape, weights_of

# A result is compared with the model's own at first: both err by the rounding of 16 bits, which is
# under a twentieth of the logits in deep models. What is wrong differs by as much as they are.
MOST_APART = 0.2
# What the compiler may do for a step of one token a sequence: try how to cut each kernel's work.
TUNED = {"coordinate_descent_tuning": True}
# flex_attention's: tokens of the context that are loaded ahead.
ATTENTION = {"num_stages": 3}
KINDS = {torch.bfloat16, torch.float16}  # FlashAttention's dtypes
LEAST_BLOCK = 16  # tokens that flex_attention reads at a time, at least


class Steps:
    """Runs the steps of one model over one cache.

    capture: whether steps of one token a sequence are captured; else each function is called.
    compile: whether functions are compiled. Both are for GPUs; tests do without.
    """

    def __init__(
        self,
        model: Qwen2,
        cache: KVCache,
        weights: ModelWeights,
        max_model_len: int,
        max_num_seqs: int,
        *,
        capture: bool = True,
        compile: bool = True,
    ):
        self.model, self.cache, self.weights = model, cache, weights
        self.ops, self.shape = model.ops, functions.shape_of(model)
        self.rotary = model.ops.rotary_table(
            model.config, table_length(max_model_len), model.dtype, model.device
        )
        most_blocks = -(-max_model_len // cache.block_size)
        self.buffers = Buffers(max_num_seqs, most_blocks, cache.block_size, model.device)
        self.capture = capture
        self.checked: set[int] = set()  # sizes of `buffers`; 0 stands for several tokens
        self.graphs: dict[int, Graph] = {}
        self.one_token, self.heads = functions.one_token, functions.heads
        self.mlp, self.mlp_of_many, self.last = functions.mlp, functions.mlp, functions.last
        if compile:
            self._compile()

    def _compile(self) -> None:
        fixed: dict[str, Any] = {"dynamic": False, "fullgraph": True, "options": TUNED}
        self.one_token = torch.compile(functions.one_token, **fixed)
        self.mlp = torch.compile(functions.mlp, **fixed)
        self.last = torch.compile(functions.last, **fixed)
        self.heads = of_any_length(torch.compile(functions.heads, fullgraph=True))
        self.mlp_of_many = of_any_length(torch.compile(functions.mlp, fullgraph=True))

    def run(self, step: Sequence[Scheduled], pack: Callable[[], tuple[Tensor, Batch]]) -> Tensor:
        """Logits [N, V] of the tokens that the step's batch names; the next step overwrites them.

        pack: makes the step's ids and batch, where they are needed. Raises MinqwenError where the
        logits are not the model's own, when something is used first.
        """
        single = all(item.count == 1 for item in step)
        logits = self.decode(step) if single else self.prefill(*pack())
        kind = self.buffers.size_for(len(step)) if single else 0
        if kind not in self.checked:
            self.check(logits, self.model(*pack(), self.cache))
            self.checked.add(kind)
        return logits

    def check(self, logits: Tensor, own: Tensor) -> None:
        """Raise MinqwenError if finite logits are not near the model's own."""
        difference = (logits.float() - own.float()).norm()
        if difference.isfinite() and difference > MOST_APART * own.float().norm():
            raise MinqwenError(
                f"compiled logits differ from the model's own by {float(difference):.3g} in all, "
                f"and these are {float(own.float().norm()):.3g}"
            )

    # ---- one token of each sequence -------------------------------------------------------------

    def decode(self, step: Sequence[Scheduled]) -> Tensor:
        """Logits [B, V], which the next step overwrites."""
        count = self.buffers.size_for(len(step))
        self.buffers.fill(step, count)
        if not self.capture:
            return self._decode(count)[: len(step)]
        if count not in self.graphs:
            self.graphs[count] = self._captured(count)
        graph, logits = self.graphs[count]
        graph.replay()
        return logits[: len(step)]

    def _captured(self, count: int) -> Graph:
        announce(f"compiling the step of {sequences(count)}")
        with many_compilations():
            return captured(lambda: self._decode(count), self.model.device, self.graphs.values())

    def _decode(self, count: int) -> Tensor:
        ids, positions, slots, blocks = self.buffers.of(count)

        def attend(i: int, x: Tensor, delta: Tensor, rotary: list[Tensor]) -> tuple[Tensor, Tensor]:
            keys, values = self.cache.pool[i].flatten(1, 2)
            return self.one_token(
                *(self.ops, self.shape, x, delta, self.weights.layers[i], rotary),
                *(keys, values, slots, blocks, ATTENTION),
            )

        return self._logits(*self._layers(ids, positions, attend, self.mlp))

    # ---- several tokens -------------------------------------------------------------------------

    def prefill(self, ids: Tensor, batch: Batch) -> Tensor:
        """Logits [N, V] of the tokens that `batch.logits_at` names."""
        packed = PackedContext(batch, self.cache)

        def attend(i: int, x: Tensor, delta: Tensor, rotary: list[Tensor]) -> tuple[Tensor, Tensor]:
            layer = self.weights.layers[i]
            x, q, k, v = self.heads(self.ops, self.shape, x, delta, layer, rotary)
            self.cache.write(i, batch.slots, k, v)
            z = packed.attend(i, q, k, v, self.shape.scale)
            return x, functions.times(z.flatten(-2), layer.o)

        with many_compilations():
            x, delta = self._layers(ids, batch.positions, attend, self.mlp_of_many)
            if batch.logits_at is not None:
                x, delta = x[batch.logits_at], delta[batch.logits_at]
            return self._logits(x, delta, functions.last)

    # ---- what both share ------------------------------------------------------------------------

    def _layers(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Callable[[int, Tensor, Tensor, list[Tensor]], tuple[Tensor, Tensor]],
        mlp: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, and what the last layer adds to it. [T, D] each."""
        table = self.model.model.embed_tokens
        x = look_up(ids, table.weight, table.rows, self.model.mesh)
        delta = torch.zeros_like(x)
        rotary = [angles[positions][:, None] for angles in self.rotary]
        for i, layer in enumerate(self.weights.layers):
            x, delta = attend(i, x, delta, rotary)
            delta = self._sum(delta)
            x, delta = mlp(self.ops, self.shape, x, delta, layer)
            delta = self._sum(delta)
        return x, delta

    def _sum(self, partial: Tensor) -> Tensor:
        """Of all ranks, in float32, as `Native.row_parallel_linear` has it."""
        return self.model.mesh.all_reduce(partial, dtype=torch.float32)

    def _logits(
        self, x: Tensor, delta: Tensor, last: Callable[..., Tensor] | None = None
    ) -> Tensor:
        logits = (last or self.last)(
            *(self.ops, self.shape, x, delta, self.weights.norm, self.weights.head)
        )
        return self.model.gather_logits(logits)


class PackedContext:
    """The contexts of a step's sequences, one after another.

    Of prompts that begin in this step they are the new keys and values; else those in the cache are
    gathered.
    """

    def __init__(self, batch: Batch, cache: KVCache):
        self.cache = cache
        self.query_starts = batch.query_starts.int()
        self.key_starts, self.places = self.query_starts, None
        if batch.query_lens != batch.context_lens:
            lengths = batch.context_lengths
            self.key_starts = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
            self.places = places(batch, cache.block_size)
        self.longest = max(batch.query_lens), max(batch.context_lens)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T, H, d], k and v [T, K, d], which are in the cache -> [T, H, d]."""
        if self.places is not None:
            keys, values = self.cache.pool[layer].flatten(1, 2)  # [P S, K, d] each
            k, v = keys[self.places], values[self.places]
        return functions.attend_packed(
            q, k, v, self.query_starts, self.key_starts, self.longest, scale
        )


def places(batch: Batch, block_size: int) -> Tensor:
    """Where the tokens of all contexts are in the cache, sequence after sequence [tokens]."""
    total = sum(batch.context_lens)
    lengths = batch.context_lengths
    sequence = torch.repeat_interleave(
        torch.arange(len(lengths), device=lengths.device), lengths, output_size=total
    )
    starts = lengths.cumsum(0) - lengths
    position = torch.arange(total, device=lengths.device) - starts[sequence]
    blocks = batch.block_tables[sequence, position // block_size]
    return blocks * block_size + position % block_size


def steps_of(
    model: Qwen2, cache: KVCache, max_model_len: int, max_num_seqs: int
) -> Steps | CapturedModel:
    """What runs this model's steps on its GPU. Raises MinqwenError, with the reason, for none."""
    if model.device.type != "cuda":
        raise MinqwenError(f"that is for GPUs, and the model is on {model.device}")
    if model.ops.order_free:
        return CapturedModel(model, cache, max_model_len, max_num_seqs)
    if type(model.ops) is not Fast:
        raise MinqwenError(f"that is for fast and exact arithmetic, and this is {model.ops.name}")
    if model.dtype not in KINDS:
        raise MinqwenError(f"that is for bfloat16 and float16, and the model is in {model.dtype}")
    if type(cache) is not KVCache:
        raise MinqwenError("the cache holds 8 bits: use kv_cache_dtype='auto'")
    if cache.block_size < LEAST_BLOCK or cache.block_size & (cache.block_size - 1):
        raise MinqwenError(
            f"block_size is {cache.block_size}: use a power of two from {LEAST_BLOCK} on"
        )
    weights = weights_of(model)
    if weights is None:
        raise MinqwenError(
            "the weights are quantised, offloaded, hooked or changed since they were prepared, or "
            f"the heads have another size than {', '.join(map(str, FUSED_HEAD_DIMS))}"
        )
    return Steps(model, cache, weights, max_model_len, max_num_seqs)


def of_any_length(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function, compiled once for all numbers of tokens.

    They are the first dimension of its tensors, those of the weights apart.
    """

    def call(
        ops: Native,
        shape: Shape,
        x: Tensor,
        delta: Tensor,
        layer: LayerWeights,
        *rotary: list[Tensor],
    ) -> Any:
        for each in (x, delta, *(y for pair in rotary for y in pair)):
            torch._dynamo.mark_dynamic(each, 0)
        return compiled(ops, shape, x, delta, layer, *rotary)

    return call


@contextlib.contextmanager
def many_compilations() -> Iterator[None]:
    """A function is compiled for each size of the ladder: more often than torch expects."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
