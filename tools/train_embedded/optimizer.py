"""How the weights are changed: Muon for the matrices in the layers, AdamW for all others."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minqwen import Qwen2


@dataclass(frozen=True)
class Rates:
    """Learning rates: of the matrices in the layers, the embedding, lm_head, norms and biases."""

    muon: float
    embed: float
    head: float
    vector: float


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by five Newton-Schulz steps (Keller Jordan, 2024).

    torch.optim.Muon does the same in bfloat16, one matrix after another. On a CPU without AMX
    bfloat16 is three times slower than float32, so that there this one computes in float32, and
    threads of `pool` share the matrices. A GPU gets all matrices of one shape at once, in bfloat16.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        pool: Executor,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.pool = pool

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody has a closure
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            parts = together(group["params"])
            done = [self.pool.submit(self.update, part, lr, momentum, decay) for part in parts]
            for one in done:
                one.result()

    @torch.no_grad()
    def update(
        self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        """One step for matrices of one shape."""
        ahead = []
        for p in params:
            assert p.grad is not None
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            buffer: Tensor = self.state[p]["momentum"]
            buffer.lerp_(p.grad, 1 - momentum)
            ahead.append(p.grad.lerp(buffer, momentum))  # Nesterov's momentum
        wide, tall = params[0].shape[1], params[0].shape[0]
        rate = lr * max(1.0, tall / wide) ** 0.5
        for p, update in zip(params, orthogonal(torch.stack(ahead))):
            p.mul_(1 - lr * weight_decay)
            p.add_(update, alpha=-rate)


def together(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """On a CPU each matrix alone, on a GPU all of one shape."""
    if not params[0].is_cuda:
        return [[p] for p in params]
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)
    return list(by_shape.values())


def orthogonal(x: Tensor) -> Tensor:
    """x [N, m, n], each with its singular values brought near 1; its singular vectors stay."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT  # the products below are smaller for a wide matrix
    wide = x
    if x.is_cuda:
        x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315) @ x
    return x.to(wide.dtype)


def make_optimizers(
    model: Qwen2, rates: Rates, weight_decay: float, pool: Executor
) -> list[torch.optim.Optimizer]:
    """The two optimisers, which together have every parameter of the model once."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    others = [
        {"params": [model.model.embed_tokens.weight], "lr": rates.embed},
        {"params": [model.lm_head.weight], "lr": rates.head},
        {"params": vectors, "lr": rates.vector, "weight_decay": 0.0},
    ]
    return [
        Muon(matrices, pool, lr=rates.muon, weight_decay=weight_decay),
        torch.optim.AdamW(others, betas=(0.9, 0.95), eps=1e-10, weight_decay=weight_decay),
    ]
