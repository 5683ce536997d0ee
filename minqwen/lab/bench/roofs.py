"""The machine's limits: how fast it reads memory and multiplies matrices, and what follows of them.

Each limit is the best of several operations, and of each operation the best time. No single one
would do: on a CPU a plain `sum` reads at less than half of what a product of packed weights does,
so that an engine could pass that "roof".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minqwen.config import ModelConfig
from minqwen.lab.bench.contestants import DTYPES, Contestant
from minqwen.lab.bench.jobs import Job
from minqwen.lab.planner import GB, Card, Planner

COLUMNS = 4096
READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}  # beyond any cache
SIDE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the products
MOST_RUNS = 20
Act = Callable[[], object]


@dataclass
class Roofs:
    """reads: bytes per second by operation. products: operations per second by dtype."""

    reads: dict[str, float] = field(default_factory=dict)
    products: dict[str, float] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        return max(self.reads.values())

    def product(self, contestant: Contestant) -> float:
        """The best that its weights allow. 16-bit ones may be multiplied as float32 too."""
        if contestant.arithmetic == "exact":
            return self.products["float64"]
        allowed = ["float32"]
        if contestant.weight_bits <= 16:
            allowed += ["bfloat16", "float16"]
        if contestant.weight_bits < 16:
            allowed.append("int8")
        return max(self.products.get(name, 0.0) for name in allowed)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_roofs(device: str, seconds: float = 20.0) -> Roofs:
    """seconds: about, in all. An operation that this machine lacks is left out."""
    found = Roofs()
    each = seconds / 16  # so many operations there are
    for name, work, act in reads(device):
        if rate := _best_rate(work, act, device, each):
            found.reads[name] = rate
    for name, work, act in products(device):
        if rate := _best_rate(work, act, device, each):
            found.products[name] = max(rate, found.products.get(name, 0.0))
    return found


def reads(device: str) -> Iterator[tuple[str, float, Act]]:
    """(name, bytes, operation). Products come first: they are what reads weights."""
    count = READ_BYTES[device] // 4
    x = torch.randn(count, device=device)
    matrix = x.view(-1, COLUMNS)
    row = torch.randn(1, COLUMNS, device=device)
    yield from _packed_products(matrix, row)
    yield "product with float32", x.nbytes, lambda: F.linear(row, matrix)
    narrow, narrow_row = matrix.bfloat16(), row.bfloat16()
    yield "product with bfloat16", narrow.nbytes, lambda: F.linear(narrow_row, narrow)
    yield "largest number", x.nbytes, x.amax
    yield "sum of rows", x.nbytes, lambda: matrix.sum(1)
    yield "sum", x.nbytes, x.sum
    yield "sum of integers", x.nbytes, x.view(torch.int64).sum
    target = torch.empty_like(x)
    yield "copy", 2 * x.nbytes, lambda: target.copy_(x)


def _packed_products(matrix: Tensor, row: Tensor) -> Iterator[tuple[str, float, Act]]:
    """FBGEMM's, of float16 weights, which x86 CPUs have."""
    if matrix.device.type != "cpu" or not torch.cpu._is_avx2_supported():
        return
    part = matrix[: len(matrix) // 2]
    packed = torch.ops.quantized.linear_prepack_fp16(part, None)
    multiply = torch.ops.quantized.linear_dynamic_fp16
    yield "product with packed float16", part.numel() * 2, lambda: multiply(row, packed)


def products(device: str) -> Iterator[tuple[str, float, Act]]:
    """(dtype, operations, product) of square matrices.

    float16 is multiplied on GPUs only: few CPUs have instructions for it, and the others take long.
    """
    n = SIDE[device]
    dtypes = ["float32", "float64", "bfloat16", *(["float16"] if device == "cuda" else [])]
    for name in dtypes:
        side = n // 2 if name == "float64" else n
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, name)) for _ in range(2))
        yield name, 2.0 * side**3, lambda a=a, b=b: torch.mm(a, b)  # type: ignore[misc]  # early binding
        yield name, 2.0 * side**3, lambda a=a, b=b: F.linear(a, b)  # type: ignore[misc]  # early binding
    whole = torch.randint(-99, 99, (n, n), dtype=torch.int8, device=device)
    yield "int8", 2.0 * n**3, lambda: torch._int_mm(whole, whole.t())


def _best_rate(work: float, act: Act, device: str, seconds: float) -> float:
    """work per second in the fastest run, with some `seconds` of runs; 0: it cannot be run."""
    best, until = float("inf"), time.perf_counter() + seconds
    try:
        act()
        for _ in range(MOST_RUNS):
            best = min(best, _seconds(act, device))
            if time.perf_counter() > until:
                break
    except (RuntimeError, NotImplementedError):
        return 0.0
    return work / best


def _seconds(act: Act, device: str) -> float:
    began = _now(device)
    act()
    return _now(device) - began


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def least_seconds(
    roofs: Roofs, contestant: Contestant, config: ModelConfig, job: Job
) -> float | None:
    """No run of the job is faster: weights and cache are read, or products are computed.

    A prefill: of the first token. A decode: of one step, when the context has its first new token.
    None for a mixed job, whose steps the schedulers choose. Weights are counted with the bits that
    the contestant reads: 64 under exact arithmetic, which keeps them widened where they fit.
    """
    if job.kind == "mixed":
        return None
    dtype = contestant.form if contestant.form in DTYPES else "float16"
    planner = Planner(
        config,
        contestant.degree,
        dtype=dtype,
        quantization="none",  # a packed checkpoint is dequantised at load
        device="cpu",
    )
    batch = -(-job.batch // contestant.replicas)
    estimate = planner.estimate(job.prompt, min(batch, planner.tokens))
    bits = 64 if contestant.arithmetic == "exact" else contestant.weight_bits
    weights = planner.weights_read * bits / (32 if dtype == "float32" else 16)
    cache = estimate.decode_bytes - planner.weights_read
    card = Card(0, roofs.bandwidth, roofs.product(contestant))
    if job.kind == "prefill":
        return max(weights / card.bandwidth, estimate.prefill_flops / card.flops)
    return max((weights + cache) / card.bandwidth, estimate.decode_flops / card.flops)


def described(roofs: Roofs) -> list[str]:
    """One line for what was measured of each kind, the best first."""
    by_rate = sorted(roofs.reads.items(), key=lambda item: -item[1])
    read = ", ".join(f"{name} {rate / GB:,.1f}" for name, rate in by_rate)
    product = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in roofs.products.items())
    return [f"reads, GB/s: {read}", f"products, GFLOP/s: {product}"]
