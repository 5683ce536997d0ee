"""How fast flex_attention reads keys and values where they lie in blocks, on a GPU or a CPU.

  python benchmarks/block_attention.py --device cuda

One decode step's attention of a 7B's layer (28 heads, 4 key/value heads of 128), captured as a CUDA
graph, against sizes of blocks and the kernel's options. GB/s counts keys and values once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from minqwen.engine.graphs import many_compilations
from minqwen.model.steps import Blocks, attend_blocks

HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128
LAYERS = 4  # taken in turns, so that a small cache is not read from the GPU's own cache
ROUNDS = 20


def main(args: Sequence[str] | None = None) -> None:
    options = parse(args)
    found: list[dict[str, Any]] = []
    for size, stages, warps in itertools.product(options.block_size, options.stages, options.warps):
        for sequences, context in options.load:
            kernel = {"num_stages": stages, "num_warps": warps}
            try:
                row: dict[str, Any] = measure(options.device, size, sequences, context, kernel)
            except Exception as error:  # a kernel that does not fit the GPU: the others may
                row = {"failed": f"{type(error).__name__}: {error}".partition("\n")[0][:200]}
            row = {"block_size": size, "sequences": sequences, "context": context, **kernel, **row}
            found.append(row)
            print(json.dumps(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--block-size", type=numbers, default=[16, 64, 128], metavar="N,N")
    parser.add_argument("--stages", type=numbers, default=[1, 3], metavar="N,N")
    parser.add_argument("--warps", type=numbers, default=[2, 4], metavar="N,N")
    parser.add_argument("--load", type=loads, default=loads("1x1024,1x131072,256x1024"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(args)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def loads(text: str) -> list[tuple[int, int]]:
    """SEQUENCESxCONTEXT, several with commas between them."""
    found = []
    for word in text.split(","):
        sequences, context = word.split("x")
        found.append((int(sequences), int(context)))
    return found


@torch.inference_mode()
def measure(
    device: str, size: int, sequences: int, context: int, kernel: dict[str, Any]
) -> dict[str, Any]:
    """Microseconds of a layer, bytes a second, the largest error against float64."""
    g = torch.Generator(device).manual_seed(0)
    pool = sequences * -(-context // size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device).bfloat16()

    caches = [normal(2, pool * size, KV_HEADS, HEAD_DIM) for _ in range(LAYERS)]
    q = normal(sequences, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    blocks = scattered(pool, sequences, context, size, g, device)
    compiled = torch.compile(attend_blocks, dynamic=False, fullgraph=True)

    def step() -> list[Tensor]:
        return [
            compiled(q, keys, values, blocks, HEAD_DIM**-0.5, kernel) for keys, values in caches
        ]

    start = time.perf_counter()
    with many_compilations():
        z = step()[0][0]
    compiling = time.perf_counter() - start
    seconds = median(times(captured(step) if device == "cuda" else step, device)) / LAYERS
    own = blocks.tables[0, : blocks.counts[0]].long()
    places = (own[:, None] * size + torch.arange(size, device=device)).flatten()
    k, v = (x[places[:context]].double().transpose(0, 1) for x in caches[0])
    pattern = torch.softmax(q[0].double() @ k.transpose(1, 2) * HEAD_DIM**-0.5, -1)
    read = 2 * sequences * context * KV_HEADS * HEAD_DIM * 2
    return {
        "us": round(seconds * 1e6, 2),
        "GB/s": round(read / seconds / 1e9, 1),
        "error": float((z - pattern @ v).abs().max()),
        "compiling_s": round(compiling, 1),
    }


def scattered(
    pool: int, sequences: int, context: int, size: int, g: torch.Generator, device: str
) -> Blocks:
    """The sequences' blocks, in a random order. CPUs want tables as wide as the pool."""
    tables = torch.zeros(sequences, pool, dtype=torch.int32, device=device)
    order = torch.randperm(pool, generator=g, device=device).view(sequences, -1)
    tables[:, : order.shape[1]] = order

    def each(number: int) -> Tensor:
        return torch.full((sequences,), number, dtype=torch.int32, device=device)

    last, offset = divmod(context - 1, size)
    return Blocks(tables, each(last + 1), tables[:, last].contiguous(), each(offset + 1), size)


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def times(step: Callable[[], Any], device: str) -> list[float]:
    """Seconds of each of ROUNDS runs, after one that does not count."""
    found = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found[1:]


if __name__ == "__main__":
    main()
