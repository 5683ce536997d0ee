"""The few operations the model is made of, in the meanings of "right" that minqwen offers.

`Native` is PyTorch in the model's own dtype with Hugging Face's rounding points: bit for bit transformers'
eager attention. With float64 weights the same lines are float64 throughout: the truth that errors are
measured against.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqwen.config import ModelConfig
from minqwen.model.rope import rotary_table, rotate_half
from minqwen.parallel import Mesh


class Native:
    """torch operations in the model's dtype, rounding where transformers rounds, in its order."""

    name = "native"

    def check(self, config: ModelConfig, dtype: torch.dtype, mesh: Mesh) -> None:
        """Raise ConfigError, before any weight is read, for a model that this arithmetic cannot compute."""

    def prepare(self, linear: nn.Module, mesh: Mesh) -> None:
        """Make a weight ready, once, at load. `linear` has `weight` [out, in] and `bias` [out] or None; `mesh`
        are the ranks that hold the other columns of the same rows."""

    def rotary_table(
        self, config: ModelConfig, length: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return rotary_table(config, length, dtype)

    def linear(self, x: Tensor, linear: nn.Module) -> Tensor:
        """x W^T + b with one rounding. [T, in] -> [T, out]."""
        return F.linear(x, linear.weight, linear.bias)

    def row_parallel_linear(self, x: Tensor, linear: nn.Module, mesh: Mesh) -> Tensor:
        """The sum over ranks of x W^T, each rank with its columns of W. [T, in/size] -> [T, out]."""
        y = F.linear(x, linear.weight)
        if mesh.size > 1:  # partial sums meet in float32 at least, and are rounded once
            y = mesh.all_reduce(y, dtype=torch.promote_types(y.dtype, torch.float32))
        return y if linear.bias is None else y + linear.bias

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps), rounded, then times weight (arXiv:1910.07467; no bias, no "1 +")."""
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
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, tap: Callable
    ) -> Tensor:
        """softmax(q k^T scale) v (arXiv:1706.03762), the softmax in float32 at least.

        q [N, heads, R, d]; k, v [N, heads, L, d]. hidden: bool, broadcast to [N, heads, R, n], which of the last n
        keys a query must not see; None: it sees all. Returns z [N, heads, R, d]. `tap(name, x)` shows
        "attn.scores" and "attn.pattern" [N, heads, R, L].
        """
        scores = head_matmul(q, k.transpose(-1, -2)).mul_(scale)
        if hidden is not None:
            scores[..., -hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
        scores = tap("attn.scores", scores)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        pattern = tap("attn.pattern", torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype))
        return head_matmul(pattern, v)


def head_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b for a [N, heads, R, m], b [N, heads, m, n], rounded once to their dtype.

    What comes from pages lies in memory token by token, each with all its heads. torch.matmul would copy that, if N
    is more than 1: heads are multiplied one by one. And on a CPU a 16-bit product has its kernel compiled for every
    new length of the context: it is computed in float32 there.
    """
    by_tokens = 0 < b.stride(1) < max(b.stride()[2:])
    if not by_tokens:
        return torch.matmul(a, b)
    if a.element_size() == 2 and a.device.type == "cpu":
        return torch.matmul(
            a.float(), b.to(torch.float32, memory_format=torch.contiguous_format)
        ).to(a.dtype)
    if len(b) == 1:
        return torch.matmul(a, b)
    return torch.stack([torch.bmm(a[:, i], b[:, i]) for i in range(a.shape[1])], 1)
