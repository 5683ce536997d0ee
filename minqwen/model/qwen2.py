"""Qwen2.5's forward pass, top to bottom (Qwen2.5 Technical Report, arXiv:2412.15115).

Read it from the end: `Qwen2.forward` embeds, runs the layers, norms and projects to logits. The operations
(`ops`) are those of `arithmetic.py`; attention is in `attention.py`. Parameter names are Hugging Face's. Under
tensor parallelism each rank holds `H / size` query heads, its key/value heads, and its slice of the MLP and of
the vocabulary (`parallel.py` has the plan); the code below is the same at every degree.

Shapes: T tokens of this step, B sequences, D hidden, H query heads, K key/value heads, d head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqwen.config import ModelConfig
from minqwen.model.arithmetic import Native
from minqwen.model.attention import dense_attention, paged_attention
from minqwen.model.batch import Batch
from minqwen.model.exact import Exact
from minqwen.model.kv_cache import KVCache
from minqwen.model.trace import UNTRACED, run_with_cache, run_with_hooks
from minqwen.parallel import SINGLE, Mesh, shard

ARITHMETICS: dict[str, type[Native]] = {"native": Native, "exact": Exact}


class Linear(nn.Module):
    """y = x W^T + b. weight [out, in], bias [out]; the arithmetic decides how."""

    mesh = SINGLE  # the ranks that hold the other columns of this weight's rows

    def __init__(
        self, ops: Native, in_features: int, out_features: int, bias: bool = False, **factory
    ):
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, **factory), requires_grad=False
        )
        self.bias = (
            nn.Parameter(torch.empty(out_features, **factory), requires_grad=False)
            if bias
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self)


class RowParallelLinear(Linear):
    """The same with W's columns spread over the ranks; the partial results are summed."""

    def __init__(
        self,
        ops: Native,
        mesh: Mesh,
        in_features: int,
        out_features: int,
        bias: bool = False,
        **factory,
    ):
        super().__init__(ops, in_features, out_features, bias, **factory)
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.row_parallel_linear(x, self, self.mesh)


class RMSNorm(nn.Module):
    def __init__(self, ops: Native, size: int, eps: float, **factory):
        super().__init__()
        self.ops, self.eps = ops, eps
        self.weight = nn.Parameter(torch.empty(size, **factory), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class Embedding(nn.Module):
    """Rows of a vocabulary-parallel table: each rank looks up the ids it holds, zeros elsewhere, and sums."""

    def __init__(self, mesh: Mesh, rows: range, size: int, **factory):
        super().__init__()
        self.mesh, self.rows = mesh, rows
        self.weight = nn.Parameter(torch.empty(len(rows), size, **factory), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        if self.mesh.size == 1:
            return F.embedding(ids, self.weight)
        mine = (ids >= self.rows.start) & (ids < self.rows.stop)
        if len(self.rows):
            x = F.embedding((ids - self.rows.start).where(mine, 0), self.weight)
        else:  # a small vocabulary on many ranks may leave the last ones without a row
            x = self.weight.new_zeros(*ids.shape, self.weight.shape[1])
        return self.mesh.all_reduce(
            x.masked_fill(~mine[..., None], 0)
        )  # one term is not zero: no rounding


class Attention(nn.Module):
    def __init__(self, ops: Native, config: ModelConfig, mesh: Mesh, layer: int, **factory):
        super().__init__()
        self.ops, self.layer, self.head_dim = ops, layer, config.head_dim
        q_size = config.q_size // mesh.size
        kv_size = max(
            config.kv_size // mesh.size, config.head_dim
        )  # at least one head: replicated beyond K ranks
        self.q_proj = Linear(ops, config.hidden_size, q_size, bias=True, **factory)
        self.k_proj = Linear(ops, config.hidden_size, kv_size, bias=True, **factory)
        self.v_proj = Linear(ops, config.hidden_size, kv_size, bias=True, **factory)
        o_bias = config.model_type == "llama"  # a zero bias that only that layout has
        self.o_proj = RowParallelLinear(
            ops, mesh, q_size, config.hidden_size, bias=o_bias, **factory
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: KVCache | None, tap
    ) -> Tensor:
        heads = (-1, self.head_dim)
        q = tap("attn.q", self.q_proj(x).unflatten(-1, heads))  # [T, H, d]
        k = tap("attn.k", self.k_proj(x).unflatten(-1, heads))  # [T, K, d]
        v = tap("attn.v", self.v_proj(x).unflatten(-1, heads))  # [T, K, d]
        q = tap("attn.rot_q", self.ops.rotate(q, cos, sin))
        k = tap("attn.rot_k", self.ops.rotate(k, cos, sin))
        scale = self.head_dim**-0.5
        if cache is None:
            z = dense_attention(self.ops, q, k, v, batch, scale, tap)
        else:
            z = paged_attention(self.ops, q, k, v, batch, scale, tap, cache, self.layer)
        z = tap("attn.z", z)  # [T, H, d]
        return self.o_proj(z.flatten(-2))  # [T, D]


class MLP(nn.Module):
    def __init__(self, ops: Native, config: ModelConfig, mesh: Mesh, **factory):
        super().__init__()
        self.ops = ops
        size = config.intermediate_size // mesh.size
        self.gate_proj = Linear(ops, config.hidden_size, size, **factory)
        self.up_proj = Linear(ops, config.hidden_size, size, **factory)
        self.down_proj = RowParallelLinear(ops, mesh, size, config.hidden_size, **factory)

    def forward(self, x: Tensor, tap) -> Tensor:
        gate = tap("mlp.gate", self.gate_proj(x))
        up = tap("mlp.up", self.up_proj(x))
        return self.down_proj(tap("mlp.act", self.ops.silu_mul(gate, up)))


class Layer(nn.Module):
    def __init__(self, ops: Native, config: ModelConfig, mesh: Mesh, layer: int, **factory):
        super().__init__()
        self.input_layernorm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps, **factory)
        self.self_attn = Attention(ops, config, mesh, layer, **factory)
        self.post_attention_layernorm = RMSNorm(
            ops, config.hidden_size, config.rms_norm_eps, **factory
        )
        self.mlp = MLP(ops, config, mesh, **factory)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: KVCache | None, tap
    ) -> Tensor:
        x = tap("resid_pre", x)
        normed = tap("norm1", self.input_layernorm(x))
        x = x + tap("attn.out", self.self_attn(normed, cos, sin, batch, cache, tap))
        x = tap("resid_mid", x)
        normed = tap("norm2", self.post_attention_layernorm(x))
        x = x + tap("mlp.out", self.mlp(normed, tap))
        return tap("resid_post", x)


class Decoder(nn.Module):
    """Everything below the head; the `model.` of Hugging Face's names."""

    def __init__(self, ops: Native, config: ModelConfig, mesh: Mesh, **factory):
        super().__init__()
        mine = shard("model.embed_tokens.weight", config, mesh.rank, mesh.size)
        rows = range(mine.start, mine.stop) if mine else range(config.vocab_size)
        self.embed_tokens = Embedding(mesh, rows, config.hidden_size, **factory)
        layers = (Layer(ops, config, mesh, i, **factory) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps, **factory)


class Qwen2(nn.Module):
    """The causal language model.

    `Qwen2(config)` has uninitialised weights (load_state_dict fills them, strictly); `from_pretrained` reads a
    checkpoint, `from_tensors` anything that can be asked for tensors by name. Weights do not require gradients
    until `requires_grad_()` says so.
    """

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
        self.ops = ARITHMETICS[arithmetic]() if isinstance(arithmetic, str) else arithmetic
        self.ops.check(config, dtype, mesh)
        factory = {"dtype": dtype, "device": device}
        self.model = Decoder(self.ops, config, mesh, **factory)
        rows = len(self.model.embed_tokens.rows)
        self.lm_head = Linear(self.ops, config.hidden_size, rows, **factory)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._rotary: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_pretrained(cls, path: str | Path, **options) -> Qwen2:
        """A safetensors directory as a model on this rank: `checkpoint.load_pretrained`, which says the options."""
        from minqwen.checkpoint import load_pretrained  # the model itself never opens a file

        return load_pretrained(path, **options)

    @classmethod
    def from_tensors(
        cls,
        config: ModelConfig,
        read: Callable[[str, object], Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        mesh: Mesh = SINGLE,
        only: Callable[[str], bool] = lambda name: True,
        **options,
    ) -> Qwen2:
        """Build from `read(name, shard) -> Tensor`, one parameter at a time: nothing is held twice. Parameters that
        `only` refuses have no value yet."""
        model = cls(config, dtype=dtype, device="meta", mesh=mesh, **options)
        for name in filter(only, config.parameter_shapes()):
            value = read(name, shard(name, config, mesh.rank, mesh.size))
            model.set_parameter(name, value.to(device=device, dtype=dtype))
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.prepare()

    def save_pretrained(self, path: str | Path, **options) -> None:
        """Write a Hugging Face directory, atomically: `checkpoint.write_checkpoint`, which says the options."""
        from minqwen.checkpoint import write_checkpoint
        from minqwen.errors import CheckpointError

        if (
            self.mesh.size > 1
            or self.ops.name != "native"
            or any(x.is_meta for x in self.parameters())
        ):
            raise CheckpointError(
                f"{path}: not written, because this model holds a rank's slice, prepared weights or not all of them "
                f"(degree {self.mesh.size}, {self.ops.name} arithmetic, offload): load it whole on one rank to save it"
            )
        state = self.state_dict()
        names = self.config.parameter_shapes()
        config = self.config.replace(dtype=str(self.dtype).removeprefix("torch."))
        write_checkpoint(path, config, ((name, state[name]) for name in names), **options)

    def set_parameter(self, name: str, value: Tensor | None) -> None:
        """Put `value` in a parameter's place, of the same shape; None: the parameter has no value any more."""
        module, leaf = self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        shape = getattr(module, leaf).shape
        value = torch.empty(shape, dtype=self.dtype, device="meta") if value is None else value
        assert value.shape == shape, (name, value.shape)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    def prepare(self, part: nn.Module | None = None) -> Qwen2:
        """Let the arithmetic make the weights, or those of `part`, ready: when they are in place or were changed."""
        for module in (part or self).modules():
            if isinstance(module, Linear) and not module.weight.is_meta:
                self.ops.prepare(module, module.mesh)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def new_cache(self, pages: int, page_size: int) -> KVCache:
        """Room for `pages * page_size` tokens of this rank's keys and values."""
        c = self.config
        kv_heads = max(c.num_key_value_heads // self.mesh.size, 1)
        return KVCache(
            c.num_hidden_layers, pages, page_size, kv_heads, c.head_dim, self.dtype, self.device
        )

    def rotary(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, d] of the batch's positions, from a table that grows when it must."""
        length = max(batch.context_lens)
        table = None if self._rotary is None else self._rotary[0]
        if (
            table is None
            or len(table) < length
            or (table.dtype, table.device) != (self.dtype, self.device)
        ):
            length = 1 << (length - 1).bit_length()
            tables = self.ops.rotary_table(self.config, length, self.dtype)
            self._rotary = tuple(table.to(self.device) for table in tables)
        return tuple(table[batch.positions][:, None] for table in self._rotary)

    run_with_cache = run_with_cache  # (logits, {name: tensor}); model/trace.py
    run_with_hooks = run_with_hooks

    def forward(
        self, ids: Tensor, batch: Batch | None = None, cache: KVCache | None = None, tap=UNTRACED
    ) -> Tensor:
        """Logits of the next token.

        Without a batch: ids [B, T] -> logits [B, T, V] in the model's dtype, no cache: the oracle. With one:
        ids [T], packed -> logits [N, V] of the tokens that `batch.logits_at` names (all T if None).
        """
        if batch is None:
            if ids.dim() != 2:
                raise ValueError(
                    f"ids have shape {tuple(ids.shape)}, expected [B, T] (or a Batch for packed tokens)"
                )
            batch = Batch.dense(*ids.shape, device=ids.device)
            logits = self(ids.flatten(), batch, cache, tap)
            return logits.unflatten(0, ids.shape)
        cos, sin = self.rotary(batch)
        x = tap("embed", self.model.embed_tokens(ids))  # [T, D]
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, batch, cache, tap.at(i))
        if batch.logits_at is not None:
            x = x[batch.logits_at]  # [N, D]
        x = tap("final_norm", self.model.norm(x))
        logits = self.lm_head(x)  # [N, V / size]
        if self.mesh.size > 1:
            rows = -(-self.config.vocab_size // self.mesh.size)  # the last rank may hold fewer
            logits = self.mesh.all_gather(F.pad(logits, (0, rows - logits.shape[-1])), dim=-1)
            logits = logits[..., : self.config.vocab_size]
        return tap("logits", logits)
