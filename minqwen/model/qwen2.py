"""Qwen2.5's forward pass, top to bottom (Qwen2.5 Technical Report, arXiv:2412.15115).

Read it from the end: `Qwen2.forward` embeds, runs the layers, norms and projects to logits. The
operations (`ops`) and the linear layers are in arithmetic.py, attention is in attention.py.
Parameter names are Hugging Face's. Under tensor parallelism each rank holds H / size query heads,
their key/value heads, and its slice of the MLP and of the vocabulary (parallel.py has the plan);
the code below is the same at every degree.

Shapes: T tokens of this step, B sequences, D hidden, H query heads, K key/value heads, d head_dim,
V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqwen.checks import did_you_mean
from minqwen.config import ModelConfig
from minqwen.errors import ConfigError, MinqwenError, warn
from minqwen.model.activations import run_with_cache
from minqwen.model.arithmetic import Linear, Native, RowParallelLinear
from minqwen.model.batch import Batch
from minqwen.model.exact import Exact
from minqwen.model.fast import Fast, Int8
from minqwen.model.inputs import check_batch, check_ids, check_mask, context_warning
from minqwen.model.kv_cache import Int8KVCache, KVCache
from minqwen.model.rope import table_length
from minqwen.model.trace import UNTRACED, Tap, run_with_hooks
from minqwen.parallel import (
    SINGLE,
    Mesh,
    Shard,
    goes_on,
    kv_heads_per_rank,
    shard,
    vocab_rows_per_rank,
)

ARITHMETICS: dict[str, type[Native]] = {
    "native": Native,
    "fast": Fast,
    "int8": Int8,
    "exact": Exact,
}


def make_arithmetic(arithmetic: str | Native) -> Native:
    """The arithmetic of that name, or the object itself. Raises ConfigError for an unknown name."""
    if isinstance(arithmetic, Native):
        return arithmetic
    if arithmetic not in ARITHMETICS:
        raise ConfigError(
            f"arithmetic is {arithmetic!r}, expected {' or '.join(map(repr, ARITHMETICS))}"
            f"{did_you_mean(arithmetic, ARITHMETICS)}"
        )
    return ARITHMETICS[arithmetic]()


class RMSNorm(nn.Module):
    def __init__(self, ops: Native, size: int, eps: float, **factory: Any):
        super().__init__()
        self.ops, self.eps = ops, eps
        self.weight = nn.Parameter(torch.empty(size, **factory), requires_grad=False)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps:g}"

    def forward(self, x: Tensor, tap: Tap = UNTRACED, point: str = "") -> Tensor:
        """x normed, [T, D]. point: the tap's name of what the weight is multiplied with."""
        if not tap.sees(point):
            return self.ops.rms_norm(x, self.weight, self.eps)
        # Any arithmetic rounds before it multiplies by the weight, so this gives the same bits.
        normalized = self.ops.rms_norm(x, torch.ones_like(self.weight), self.eps)
        return tap(point, normalized) * self.weight


class Embedding(nn.Module):
    """The table's `rows`; each rank looks up the ids it holds, takes zeros elsewhere, and sums."""

    def __init__(self, mesh: Mesh, rows: range, size: int, **factory: Any):
        super().__init__()
        self.mesh, self.rows = mesh, rows
        self.weight = nn.Parameter(torch.empty(len(rows), size, **factory), requires_grad=False)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"

    def forward(self, ids: Tensor) -> Tensor:
        return look_up(ids, self.weight, self.rows, self.mesh)


def look_up(ids: Tensor, weight: Tensor, rows: range, mesh: Mesh) -> Tensor:
    """The table's rows [..., D] of `ids`. weight: the table's `rows`, which this rank holds."""
    if mesh.size == 1:
        return F.embedding(ids, weight)
    mine = (ids >= rows.start) & (ids < rows.stop)
    if len(rows):
        x = F.embedding((ids - rows.start).where(mine, 0), weight)
    else:  # a small vocabulary on many ranks may leave the last ones without a row
        x = weight.new_zeros(*ids.shape, weight.shape[1])
    # One term of the sum is not zero, so nothing rounds.
    return mesh.all_reduce(x.masked_fill(~mine[..., None], 0))


class Attention(nn.Module):
    def __init__(self, ops: Native, config: ModelConfig, mesh: Mesh, layer: int, **factory: Any):
        super().__init__()
        self.ops, self.layer, self.head_dim = ops, layer, config.head_dim
        D = config.hidden_size
        q_size = config.q_size // mesh.size
        kv_size = kv_heads_per_rank(config, mesh.size) * config.head_dim
        self.q_proj = Linear(ops, D, q_size, bias=True, **factory)
        self.k_proj = Linear(ops, D, kv_size, bias=True, **factory)
        self.v_proj = Linear(ops, D, kv_size, bias=True, **factory)
        o_bias = config.model_type == "llama"  # a zero bias that only that layout has
        self.o_proj = RowParallelLinear(ops, mesh, q_size, D, bias=o_bias, **factory)

    def extra_repr(self) -> str:
        """The heads that this rank holds."""
        heads, kv_heads = (p.out_features // self.head_dim for p in (self.q_proj, self.k_proj))
        return f"heads={heads}, kv_heads={kv_heads}, head_dim={self.head_dim}"

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: KVCache | None, tap: Tap
    ) -> Tensor:
        # No name for the three together: it would keep q and k alive after their rotation.
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim))
            for y in self.ops.project(x, self.q_proj, self.k_proj, self.v_proj)
        )
        q = tap("attn.q", q)  # [T, H, d]
        k = tap("attn.k", k)  # [T, K, d]
        v = tap("attn.v", v)  # [T, K, d]
        q = tap("attn.rot_q", self.ops.rotate(q, cos, sin))
        k = tap("attn.rot_k", self.ops.rotate(k, cos, sin))
        scale = self.ops.attention_scale(self.head_dim)
        if cache is None:
            z = self.ops.attend_dense(q, k, v, batch, scale, tap)
        else:
            z = self.ops.attend_paged(q, k, v, batch, scale, tap, cache, self.layer)
        z = tap("attn.z", z)  # [T, H, d]
        out: Tensor = self.o_proj(z.flatten(-2))  # [T, D]
        return self.shown_by_head(z, out, tap) if tap.sees("attn.result") else out

    def shown_by_head(self, z: Tensor, out: Tensor, tap: Tap) -> Tensor:
        """Show each head's share of `out`; `out`, or the sum of what takes the shares' place."""
        results = self.ops.head_results(z, self.o_proj, self.o_proj.mesh)
        before = results.detach().clone()  # a hook may write into what it is shown
        shown = tap("attn.result", results)  # [T, H, D]
        if shown is results and torch.allclose(results, before, 0.0, 0.0, equal_nan=True):
            return out
        return self.ops.sum_of_heads(shown, self.o_proj, self.o_proj.mesh).to(out.dtype)


class MLP(nn.Module):
    def __init__(self, ops: Native, config: ModelConfig, mesh: Mesh, **factory: Any):
        super().__init__()
        self.ops = ops
        size = config.intermediate_size // mesh.size
        self.gate_proj = Linear(ops, config.hidden_size, size, **factory)
        self.up_proj = Linear(ops, config.hidden_size, size, **factory)
        self.down_proj = RowParallelLinear(ops, mesh, size, config.hidden_size, **factory)

    def forward(self, x: Tensor, tap: Tap) -> Tensor:
        gate, up = self.ops.project(x, self.gate_proj, self.up_proj)
        gate, up = tap("mlp.gate", gate), tap("mlp.up", up)
        out: Tensor = self.down_proj(tap("mlp.act", self.ops.silu_mul(gate, up)))
        return out


class Layer(nn.Module):
    def __init__(self, ops: Native, config: ModelConfig, mesh: Mesh, layer: int, **factory: Any):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(ops, D, eps, **factory)
        self.self_attn = Attention(ops, config, mesh, layer, **factory)
        self.post_attention_layernorm = RMSNorm(ops, D, eps, **factory)
        self.mlp = MLP(ops, config, mesh, **factory)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: KVCache | None, tap: Tap
    ) -> Tensor:
        x = tap("resid_pre", x)
        normed = tap("norm1", self.input_layernorm(x, tap, "norm1.normalized"))
        x = x + tap("attn.out", self.self_attn(normed, cos, sin, batch, cache, tap))
        x = tap("resid_mid", x)
        normed = tap("norm2", self.post_attention_layernorm(x, tap, "norm2.normalized"))
        x = x + tap("mlp.out", self.mlp(normed, tap))
        return tap("resid_post", x)

    def by_input(self) -> list[list[Linear]]:
        """The linear layers; those with one input together."""
        a, m = self.self_attn, self.mlp
        return [[a.q_proj, a.k_proj, a.v_proj], [a.o_proj], [m.gate_proj, m.up_proj], [m.down_proj]]


class Decoder(nn.Module):
    """Everything below the head; the `model.` of Hugging Face's names."""

    def __init__(self, ops: Native, config: ModelConfig, mesh: Mesh, **factory: Any):
        super().__init__()
        mine = shard("model.embed_tokens.weight", config, mesh.rank, mesh.size)
        rows = range(mine.start, mine.stop) if mine else range(config.vocab_size)
        self.embed_tokens = Embedding(mesh, rows, config.hidden_size, **factory)
        layers = (Layer(ops, config, mesh, i, **factory) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps, **factory)


def check_kv_dtype(kv_dtype: str, ops: Native) -> None:
    """Raise ConfigError where the arithmetic cannot read such a cache."""
    if kv_dtype == "int8" and ops.order_free:
        raise ConfigError(
            f"kv_cache_dtype is 'int8', but {ops.name} arithmetic takes keys and values as they "
            "are: leave it out, or use fast or native"
        )


def aligned(value: Tensor) -> Tensor:
    """At a multiple of 64 bytes: where a weight lies can decide how one row's product rounds."""
    return value.clone() if value.device.type == "cpu" and value.data_ptr() % 64 else value


class Qwen2(nn.Module):
    """The causal language model.

    `Qwen2(config)` has weights without values (load_state_dict fills them, strictly);
    `from_pretrained` reads a checkpoint, `from_tensors` anything that can be asked for tensors by
    name. Weights do not require gradients until `requires_grad_()` says so.
    """

    # Not in inference mode: what is made there does not count how often it was written to.
    @torch.inference_mode(False)
    def __init__(
        self,
        config: ModelConfig,
        *,
        arithmetic: str | Native = "native",
        mesh: Mesh = SINGLE,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.config, self.mesh = config, mesh
        self.ops = make_arithmetic(arithmetic)
        self.ops.check(config, dtype, mesh)
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.model = Decoder(self.ops, config, mesh, **factory)
        rows = len(self.model.embed_tokens.rows)
        self.lm_head = Linear(self.ops, config.hidden_size, rows, **factory)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
            self.lm_head.shared = True
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._warned = False  # of too long a context
        self.quantised = ""  # how many quantised weights stay packed, and why the others do not
        # For `changes.Changes`: how often the whole model was prepared, and hooks of our own that
        # change no value.
        self.preparations = 0
        self.own_hooks: set[int] = set()

    def extra_repr(self) -> str:
        rank = f", rank {self.mesh.rank} of {self.mesh.size}" if self.mesh.size > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.config.num_parameters():,} parameters, {dtype} on {self.device}, "
            f"{self.ops.name} arithmetic{rank}{self.quantised and ', '}{self.quantised}"
        )

    # The model itself never opens a file: these two are the only lines that look up, to heads and
    # to checkpoint.

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Qwen2:
        """The model in a safetensors directory. options: those of `heads.view.load_pretrained`."""
        from minqwen.heads.view import load_pretrained

        model: Qwen2 = load_pretrained(path, **options)
        return model

    def save_pretrained(self, path: str | Path, **options: Any) -> None:
        """Write a Hugging Face directory. options: those of `checkpoint.save_pretrained`."""
        from minqwen.checkpoint import save_pretrained

        save_pretrained(self, path, **options)

    @classmethod
    @torch.inference_mode(False)
    def from_tensors(
        cls,
        config: ModelConfig,
        read: Callable[[str, Shard | None], Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        mesh: Mesh = SINGLE,
        arithmetic: str | Native = "native",
        only: Callable[[str], bool] = lambda name: True,
    ) -> Qwen2:
        """Build from `read(name, shard) -> Tensor`, one parameter at a time: nothing is held twice.

        Parameters that `only` refuses have no value yet.
        """
        model = cls(config, arithmetic=arithmetic, dtype=dtype, device="meta", mesh=mesh)
        for name in filter(only, config.parameter_shapes()):
            value = read(name, shard(name, config, mesh.rank, mesh.size))
            model.set_parameter(name, aligned(value.to(device=device, dtype=dtype)))
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.prepare()

    def set_parameter(self, name: str, value: Tensor | None) -> None:
        """Put `value` in a parameter's place, of the same shape; None takes its value away."""
        module, leaf = self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        shape = module.get_parameter(leaf).shape
        if value is None:
            value = torch.empty(shape, dtype=self.dtype, device="meta")
            if isinstance(module, Linear):
                module.forget_prepared()
        assert value.shape == shape, (name, value.shape)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    def prepare(self, part: nn.Module | None = None) -> Qwen2:
        """Let the arithmetic make the weights ready, or those of `part`.

        Called when they are in place, and to be called again whenever they were changed. Engines
        then forget the keys and values of the old weights.
        """
        self.preparations += 1
        return self.make_ready(part)

    def make_ready(self, part: nn.Module | None = None) -> Qwen2:
        """`prepare` for weights that are the same as before and have only been brought back."""
        for module in (part or self).modules():
            if isinstance(module, (Layer, Qwen2)):
                for linears in module.by_input():
                    if all(linear.is_here for linear in linears):
                        self.ops.prepare(linears, self.mesh)
                        goes_on()
        return self

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of nn.Module; weights that are packed come back for it."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.restore()
        return super().named_parameters(*args, **options)

    def by_input(self) -> list[list[Linear]]:
        """The linear layers that are in no layer: the head."""
        return [[self.lm_head]]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def differentiable(self) -> bool:
        """Whether the arithmetic has gradients."""
        return self.ops.differentiable

    def new_cache(self, num_blocks: int, block_size: int, kv_dtype: str = "auto") -> KVCache:
        """Room for `num_blocks * block_size` tokens of this rank's keys and values.

        kv_dtype: one of kv_cache.KV_DTYPES; "auto" is the model's dtype. Raises ConfigError for
        int8 under exact arithmetic.
        """
        check_kv_dtype(kv_dtype, self.ops)
        kind = Int8KVCache if kv_dtype == "int8" else KVCache
        c, kv_heads = self.config, kv_heads_per_rank(self.config, self.mesh.size)
        layers, d = c.num_hidden_layers, c.head_dim
        return kind(layers, num_blocks, block_size, kv_heads, d, self.dtype, self.device)

    def rotary(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, d] of the batch's positions, from a table that grows when it must."""
        length = max(batch.context_lens)
        if self._rotary is None or not self._fits(self._rotary[0], length):
            length = table_length(length)
            self._rotary = self.ops.rotary_table(self.config, length, self.dtype, self.device)
        cos, sin = self._rotary
        return cos[batch.positions][:, None], sin[batch.positions][:, None]

    def _fits(self, table: Tensor, length: int) -> bool:
        here = table.dtype == self.dtype and table.device == self.device
        return here and len(table) >= length

    # Every intermediate by name, to keep or to replace. trace.py has the names.
    run_with_cache = run_with_cache
    run_with_hooks = run_with_hooks

    def forward(
        self,
        ids: Tensor,
        batch: Batch | None = None,
        cache: KVCache | None = None,
        tap: Tap = UNTRACED,
        *,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token, in the model's dtype.

        Without a batch: ids [B, T] -> logits [B, T, V], no cache: the oracle. With one: ids [T],
        packed -> logits [N, V] of the tokens that `batch.logits_at` names (of all T if None).
        attention_mask: all ones, or None. There is no padding. Raises MinqwenError for ids, a mask
        or a batch that cannot be computed; warns once of more tokens than the model was made for.
        """
        check_mask(attention_mask)
        if torch.is_grad_enabled() and not self.ops.differentiable:
            self._refuse_gradients()
        packed = ids
        dense = batch is None
        if batch is None:
            check_ids(ids, self.config)
            batch, packed = Batch.dense(ids.shape[0], ids.shape[1], ids.device), ids.flatten()
            if cache is not None:
                raise MinqwenError("a cache needs a Batch that says where its tokens go")
        check_batch(packed, batch, cache is not None)
        self._watch_length(max(batch.context_lens))
        logits = self._logits(packed, batch, cache, tap)
        return logits.unflatten(0, ids.shape) if dense else logits

    def _refuse_gradients(self) -> None:
        here = super().named_parameters()  # what is packed needs no gradient
        if any(parameter.requires_grad for _, parameter in here):
            raise ConfigError(
                f"{self.ops.name} arithmetic has no gradients: call requires_grad_(False), or load "
                "the model with arithmetic='native'"
            )

    def _watch_length(self, length: int) -> None:
        """Warn once of more tokens than the model was made for."""
        if length > self.config.context_length and not self._warned:
            self._warned = True
            warn(context_warning(length, self.config), stacklevel=5)

    def _logits(self, ids: Tensor, batch: Batch, cache: KVCache | None, tap: Tap) -> Tensor:
        cos, sin = self.rotary(batch)
        x = tap("embed", self.model.embed_tokens(ids))  # [T, D]
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, batch, cache, tap.at(i))
        if batch.logits_at is not None:
            x = x[batch.logits_at]  # [N, D]
        return self.unembed(x, tap)

    def unembed(self, x: Tensor, tap: Tap = UNTRACED) -> Tensor:
        """Logits [N, V] of a residual stream [N, D]: the final norm, then the head."""
        x = tap("final_norm", self.model.norm(x, tap, "final_norm.normalized"))
        logits: Tensor = self.lm_head(x)  # [N, V / size]
        return tap("logits", self.gather_logits(logits))

    def gather_logits(self, logits: Tensor) -> Tensor:
        """Those of all ranks, from each rank's [N, its rows of the vocabulary] -> [N, V]."""
        if self.mesh.size == 1:
            return logits
        rows = vocab_rows_per_rank(self.config, self.mesh.size)  # the last rank may hold fewer
        logits = self.mesh.all_gather(F.pad(logits, (0, rows - logits.shape[-1])), dim=-1)
        return logits[..., : self.config.vocab_size]

    def logit_directions(self, ids: Tensor) -> Tensor:
        """What a residual stream meets on its way to these tokens' logits, [N, D] in float64.

        The logit is the product with it, divided by the root of the stream's mean square + eps: the
        head's rows times the final norm's weight.
        """
        rows = look_up(ids, self.lm_head.matrix(), self.model.embed_tokens.rows, self.mesh)
        return rows.double() * self.model.norm.weight.double()
