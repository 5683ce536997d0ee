#!/usr/bin/env python3
"""How far exact arithmetic is from float64, over how far native float32 is, on random weights.

  python benchmarks/exact_accuracy.py [--quick]

Below 1: exact is nearer to the truth. Storage is float32 in both, errors are root mean squares.
"rescaled": one channel in sixteen of each norm's weight is 4,096 times larger and the columns that
read it as much smaller, which is the same function.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from minqwen.config import ModelConfig
from minqwen.model import Exact, Native, Qwen2
from minqwen.model.arithmetic import Linear
from minqwen.model.trace import UNTRACED
from minqwen.parallel import SINGLE

SHAPES = {
    "embedded model's": dict(hidden_size=224, intermediate_size=304, heads=28, head_dim=8),
    "0.5B's": dict(hidden_size=896, intermediate_size=4864, heads=14, head_dim=64),
    "7B's": dict(hidden_size=3584, intermediate_size=18944, heads=28, head_dim=128),
}
KV_HEADS = {28: 4, 14: 2}
RESCALE = 4096.0


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rms(x: Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


def weights(config: ModelConfig, bfloat16: bool, rescaled: bool) -> dict[str, Tensor]:
    """Random weights of one kind; k has a bias of the size that Qwen2.5's have."""
    g, out = generator(), {}
    for name, shape in config.parameter_shapes().items():
        x = torch.randn(shape, generator=g)
        if "norm" in name:
            x = 1 + x / 5
        elif name.endswith("weight") and "embed" not in name:
            x /= shape[1] ** 0.5
        elif "k_proj" in name:
            x *= 30
        x = x.bfloat16().float() if bfloat16 else x
        if rescaled and "norm" in name:
            x[::16] *= RESCALE
        elif rescaled and any(part in name for part in ("q_", "k_", "v_", "gate", "up", "lm_head")):
            if name.endswith("weight"):
                x[:, ::16] /= RESCALE
        out[name] = x
    return out


def model_ratio(shape: dict[str, int], bfloat16: bool, rescaled: bool, tokens: int) -> float:
    """Of the logits of a model of one layer."""
    heads = shape["heads"]
    config = ModelConfig(
        vocab_size=1024,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=KV_HEADS[heads],
        head_dim=shape["head_dim"],
    )
    tensors = weights(config, bfloat16, rescaled)
    ids = torch.randint(0, 1024, (1, tokens), generator=generator())

    def logits(arithmetic: Native, dtype: torch.dtype) -> Tensor:
        model = Qwen2.from_tensors(
            config, lambda name, shard: tensors[name], dtype=dtype, arithmetic=arithmetic
        )
        found: Tensor = model(ids)
        return found

    truth = logits(Native(), torch.float64)
    native = rms(logits(Native(), torch.float32) - truth)
    return rms(logits(Exact(), torch.float32) - truth) / native


def linear_ratio(n: int, bfloat16: bool) -> float:
    """Of one linear layer with n inputs."""
    g = generator()
    x = torch.randn(64, n, generator=g)
    weight = torch.randn(96, n, generator=g) / n**0.5
    weight = weight.bfloat16().float() if bfloat16 else weight
    truth = x.double() @ weight.double().T
    linear = Linear(Exact(), n, 96)
    linear.weight.copy_(weight)
    linear.ops.prepare([linear], SINGLE)
    return rms(linear(x) - truth) / rms(x @ weight.T - truth)


def attention_ratio(keys: int, sharpness: float) -> float:
    """Of one head's attention over many keys. sharpness: the scale of the queries."""
    g = generator()
    q = torch.randn(1, 1, 7, 128, generator=g) * sharpness
    k, v = (torch.randn(keys, 1, 128, generator=g) for _ in range(2))

    def attend(ops: Native, dtype: torch.dtype) -> Tensor:
        cached = ops.cached(k.to(dtype), v.to(dtype))
        keys, values = (x.transpose(0, 1)[None] for x in cached)
        return ops.attend(q.to(dtype), keys, values, None, 128**-0.5, UNTRACED)

    truth = attend(Native(), torch.float64)
    native = rms(attend(Native(), torch.float32) - truth)
    return rms(attend(Exact(), torch.float32) - truth) / native


def rows(quick: bool) -> Iterator[tuple[str, float]]:
    kinds = [(True, False), (False, False), (True, True), (False, True)]
    for name, shape in SHAPES.items():
        if quick and name == "7B's":
            continue
        for bfloat16, rescaled in kinds:
            what = f"one layer of the {name} shape, {'bfloat16' if bfloat16 else 'float32'} weights"
            ratio = model_ratio(shape, bfloat16, rescaled, 16 if name == "7B's" else 64)
            yield what + (", rescaled" if rescaled else ""), ratio
    for n in (896, 3584, 18944):
        for bfloat16 in (True, False):
            kind = "bfloat16" if bfloat16 else "float32"
            yield f"a linear layer of {n} inputs, {kind} weights", linear_ratio(n, bfloat16)
    for keys in (3, 1000, 131072):
        for sharpness in (0.01, 1.0, 10.0):
            yield (
                f"attention over {keys} keys, queries times {sharpness}",
                attention_ratio(keys, sharpness),
            )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out the 7B's shape")
    args = parser.parse_args()
    for what, ratio in rows(args.quick):
        print(f"{ratio:6.2f}  {what}", flush=True)


if __name__ == "__main__":
    main()
