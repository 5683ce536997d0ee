"""The few operations that the model is made of, and the linear layers that they work on.

`Native` is PyTorch in the model's own dtype, with Hugging Face's rounding points in Hugging Face's
order: its logits equal those of transformers' eager attention bit for bit. (The product of a single
float32 row can depend on where the weights lie. Here they begin at multiples of 64 bytes; those of
transformers must begin at multiples of 16.) With float64 weights the same lines compute in float64
throughout: the truth that errors are measured against. Another arithmetic is a subclass that
overrides some of these methods: `Exact` in exact.py, for example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from minqwen.config import ModelConfig
from minqwen.model.attention import dense_attention, paged_attention, weighted_values
from minqwen.model.batch import Batch
from minqwen.model.kv_cache import KVCache
from minqwen.model.rope import rotary_table, rotate_half
from minqwen.model.trace import Tap
from minqwen.parallel import SINGLE, Mesh


def version(weight: Tensor) -> int:
    """A number that changes when the weight is written to."""
    return 0 if weight.is_inference() else weight._version


class Packed(Protocol):
    """What holds the weights of linear layers in their place, in a form that is faster to read."""

    def matrix(self, linear: Linear) -> Tensor:
        """A copy of the layer's weight, every bit of it."""

    def restore(self) -> None:
        """Give all its layers their weights back, and let go of them."""


class Linear(nn.Module):
    """y = x W^T + b. weight [out, in], bias [out] or None; the arithmetic decides how.

    Fast arithmetic takes the weight away and keeps it `packed`. Whoever asks for it, by its name or
    by `parameters`, `state_dict`, `to` or `deepcopy` of a module, gets it back to stay; from then
    on it is multiplied as it is, until `Qwen2.prepare` packs it again.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    mesh = SINGLE  # the ranks that hold the other columns of this weight's rows
    # Set by exact arithmetic's `prepare`: which weight it has prepared, in which version; whether
    # its values are bfloat16's; powers of two by which its inputs' columns differ (None: by none);
    # and in a row-parallel layer which of its columns are not all zero (None: all).
    prepared: tuple[nn.Parameter, int] | None = None
    narrow = False
    scale: Tensor | None
    live: Tensor | None
    # Set by fast arithmetic's `prepare`: what holds the weight in its place.
    packed: Packed | None = None
    shared = False  # whether the parameter is another module's too: it stays beside its packed form

    def __init__(
        self,
        ops: Native,
        in_features: int,
        out_features: int,
        bias: bool = False,
        **factory: Any,
    ):
        super().__init__()
        self.ops = ops
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("live", None, persistent=False)
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features, **factory)
        self.weight = nn.Parameter(weight, requires_grad=False)
        zeros = torch.empty(out_features, **factory) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros, requires_grad=False)

    def extra_repr(self) -> str:
        bias = "" if self.bias is None else ", bias"
        return f"{self.in_features} -> {self.out_features}{bias}"

    @property
    def is_here(self) -> bool:
        """Whether the weight is a parameter with values: neither packed nor elsewhere."""
        weight = self._parameters.get("weight")
        return weight is not None and not weight.is_meta

    def matrix(self) -> Tensor:
        """The weight, for operations that are no product with it. Of a packed one it is a copy."""
        if self.packed is None or "weight" in self._parameters:
            return self.weight
        return self.packed.matrix(self)

    def forget_prepared(self) -> None:
        """Drop what was made of a weight that is no longer here."""
        self.prepared = self.scale = self.live = self.packed = None

    def restore(self) -> None:
        """Have the weight as a parameter again, if it is packed."""
        if self.packed is not None:
            self.packed.restore()

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.packed is not None and name not in self._parameters:
            self.packed.restore()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        self.restore()
        if self.prepared and self.prepared[1] != version(self.prepared[0]):
            return {**self.__dict__, "prepared": None}
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.prepared is not None:  # the weight of a copy counts its own writes
            self.prepared = self.weight, version(self.weight)

    def _apply(self, *args: Any, **options: Any) -> Linear:
        self.restore()
        super()._apply(*args, **options)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        self.restore()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self)


def is_watched(linear: Linear) -> bool:
    """Whether somebody has put a hook or a `forward` of his own on the layer."""
    own = vars(linear)
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or "forward" in own
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
    )


class RowParallelLinear(Linear):
    """The same with W's columns spread over the ranks of `mesh`; the partial results are summed."""

    def __init__(
        self,
        ops: Native,
        mesh: Mesh,
        in_features: int,
        out_features: int,
        bias: bool = False,
        **factory: Any,
    ):
        super().__init__(ops, in_features, out_features, bias, **factory)
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.row_parallel_linear(x, self, self.mesh)


class Native:
    """torch operations in the model's dtype, rounding where transformers rounds, in its order."""

    name = "native"
    order_free = False  # True: the order of a sum (batch, degree, kernel) changes no bit
    differentiable = True  # False: no gradient passes through it
    can_save = True  # False: the weights in memory are no longer those of the checkpoint

    def wide_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What a step's activations are computed in when they are stored in `dtype`."""
        return dtype

    def check(self, config: ModelConfig, dtype: torch.dtype, mesh: Mesh) -> None:
        """Raise ConfigError, before any weight is read, for a model that cannot be computed."""

    def prepare(self, linears: Sequence[Linear], mesh: Mesh) -> None:
        """Make the weights of linear layers with one input ready, once, at load.

        mesh: the ranks that hold the model.
        """

    def rotary_table(
        self,
        config: ModelConfig,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0..length-1, [length, d] each."""
        return rotary_table(config, length, dtype, device)

    def attention_scale(self, head_dim: int) -> float:
        """The factor of the scores."""
        return float(head_dim**-0.5)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """x W^T + b with one rounding. [T, in] -> [T, out]."""
        return F.linear(x, linear.weight, linear.bias)

    def product(self, x: Tensor, linear: Linear) -> Tensor:
        """x W^T with one rounding, without the bias. [T, in] -> [T, out]."""
        return F.linear(x, linear.weight)

    def row_parallel_linear(self, x: Tensor, linear: Linear, mesh: Mesh) -> Tensor:
        """The sum over ranks of x W^T, each rank with its columns of W. [T, in/size] -> [T, out].

        Partial sums of several ranks meet in float32 at least and are rounded once.
        """
        y = self.product(x, linear)
        y = mesh.all_reduce(y, dtype=torch.promote_types(y.dtype, torch.float32))
        return y if linear.bias is None else y + linear.bias

    def head_results(self, z: Tensor, linear: Linear, mesh: Mesh) -> Tensor:
        """What each head adds to o_proj's output: z W^T over the columns of that head, no bias.

        z [T, H, d] -> [T, H, D], each rank its own heads. Every share is rounded, so their sum is
        o_proj's output to rounding.
        """
        return torch.einsum("thd,ehd->the", z, linear.matrix().unflatten(1, z.shape[1:]))

    def sum_of_heads(self, results: Tensor, linear: Linear, mesh: Mesh) -> Tensor:
        """o_proj's output from all ranks' `head_results`, which may have been replaced.

        [T, H / size, D] -> [T, D], in float32 at least. The heads are added in their order, so the
        number of ranks changes no bit.
        """
        shares = mesh.all_gather(results, dim=1)
        shares = shares.to(torch.promote_types(shares.dtype, torch.float32))
        total = torch.zeros_like(shares[:, 0])
        for share in shares.unbind(1):
            total = total + share
        return total if linear.bias is None else total + linear.bias

    def project(self, x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
        """Several linear layers of one input: q, k and v, or gate and up.

        x [T, in] -> [T, out] each. They are called as modules, so that a forward hook on one of
        them works. An arithmetic that packs their weights into one matrix overrides this.
        """
        return tuple(linear(x) for linear in linears)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps), rounded, then times weight (arXiv:1910.07467).

        There is no bias and no "1 +" before the weight.
        """
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return wide.to(x.dtype).mul_(weight)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE in the model's dtype: three roundings. x [T, heads, d], cos and sin [T, 1, d]."""
        return x * cos + rotate_half(x) * sin

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """SwiGLU's elementwise half (arXiv:2002.05202): silu(gate), rounded, times up."""
        return F.silu(gate).mul_(up)

    def cached(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What of a key and a value [T, K, d] goes into the cache."""
        return k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, tap: Tap
    ) -> Tensor:
        """softmax(q k^T scale) v (arXiv:1706.03762), the softmax in float32 at least.

        q [N, heads, R, d]; k, v [N, heads, L, d] -> [N, heads, R, d]. hidden: bool, broadcast to
        [N, heads, R, n]: which of the last n keys a query must not see; None: it sees all of them.
        `tap` gets "attn.scores" and "attn.pattern" [N, heads, R, L].
        """
        scores = head_matmul(q, k.transpose(-1, -2)).mul_(scale)
        if hidden is not None:
            scores[..., -hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
        scores = tap("attn.scores", scores)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        pattern = tap("attn.pattern", torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype))
        return weighted_values(head_matmul, pattern, v, hidden)

    def scores_held(self, q: Tensor) -> int:
        """How many scores `attend` holds for each pair of a token of q [T, H, d] and a key."""
        return q.shape[1]

    def attend_dense(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, tap: Tap
    ) -> Tensor:
        """Causal attention of whole sequences. q [T, H, d]; k, v [T, K, d] -> [T, H, d]."""
        k, v = self.cached(k, v)  # what a cache would hold
        return dense_attention(self.attend, q, k, v, batch, scale, tap)

    def attend_paged(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        scale: float,
        tap: Tap,
        cache: KVCache,
        layer: int,
    ) -> Tensor:
        """The same for new tokens against their whole context, which the cache then holds."""
        cache.write(layer, batch.slots, *self.cached(k, v))
        scores_held = self.scores_held(q)
        return paged_attention(self.attend, q, batch, scale, tap, cache, layer, scores_held)

    # ---- from logits to a token

    def exp(self, x: Tensor) -> Tensor:
        """e^x of float64 x, which may be written to."""
        return x.exp_()

    def total(self, weights: Tensor) -> Tensor:
        """The sum over the last dimension of float64 numbers from 0 to 1. [..., n] -> [...]"""
        return weights.sum(-1)

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Logarithms of the probabilities, over the last dimension, in float32 or float64."""
        return logits.log_softmax(-1)


def head_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b for a [N, heads, R, m], b [N, heads, m, n], rounded once to their dtype.

    What comes out of the cache lies in memory token by token, each token with all its heads.
    torch.matmul would copy it if N is more than 1, so the heads are multiplied one by one. And on a
    CPU a 16-bit product has its kernel compiled for every new length of the context, so it is
    computed in float32 there.
    """
    by_tokens = 0 < b.stride(1) < max(b.stride()[2:])
    if not by_tokens:
        return torch.matmul(a, b)
    if a.element_size() == 2 and a.device.type == "cpu":
        wide = b.to(torch.float32, memory_format=torch.contiguous_format)
        return torch.matmul(a.float(), wide).to(a.dtype)
    if len(b) == 1:
        return torch.matmul(a, b)
    return torch.stack([torch.bmm(a[:, i], b[:, i]) for i in range(a.shape[1])], 1)
