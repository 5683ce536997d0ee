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

    torch.optim.Muon does the same in bfloat16, which a CPU without AMX multiplies three times
    slower than float32. This one is float32, and threads of `pool` share the matrices.
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
            done = [self.pool.submit(self.update, p, lr, momentum, decay) for p in group["params"]]
            for one in done:
                one.result()

    @torch.no_grad()
    def update(self, p: nn.Parameter, lr: float, momentum: float, weight_decay: float) -> None:
        """One step for one matrix."""
        assert p.grad is not None
        if "momentum" not in self.state[p]:
            self.state[p]["momentum"] = torch.zeros_like(p)
        buffer: Tensor = self.state[p]["momentum"]
        buffer.lerp_(p.grad, 1 - momentum)
        update = orthogonal(p.grad.lerp(buffer, momentum))  # Nesterov's momentum
        p.mul_(1 - lr * weight_decay)
        p.add_(update, alpha=-lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(x: Tensor) -> Tensor:
    """x [m, n] with all its singular values brought near 1; its singular vectors stay."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.mT).mT  # the products below are smaller for a wide matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + torch.addmm(square, square, square, beta=-4.775, alpha=2.0315) @ x
    return x


def make_optimizers(model: Qwen2, rates: Rates, pool: Executor) -> list[torch.optim.Optimizer]:
    """The two optimisers, which together have every parameter of the model once."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    others = [
        {"params": [model.model.embed_tokens.weight], "lr": rates.embed},
        {"params": [model.lm_head.weight], "lr": rates.head},
        {"params": vectors, "lr": rates.vector},
    ]
    return [
        Muon(matrices, pool, lr=rates.muon, weight_decay=0.1),
        torch.optim.AdamW(others, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0),
    ]
