"""The shapes of the official Qwen2.5 models, and random weights for a model of any shape."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from minqwen.checkpoint.load import resolve_dtype
from minqwen.config import ModelConfig
from minqwen.model import Native, Qwen2
from minqwen.parallel import SINGLE, Mesh, Shard

# Qwen/Qwen2.5-*-Instruct: hidden size, intermediate size, layers, query heads, key/value heads,
# vocabulary rows, whether the head is tied to the embedding.
SIZES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}

# Of quantised checkpoints, where it is another: Qwen padded this MLP with zeros, from 231 groups
# of 128 to 232, of which 8 GPUs get whole ones. All other official checkpoints are as they were.
QUANTISED_INTERMEDIATE = {"72B": 29696}

PERIOD = 16_777_213  # numbers that are drawn, after which they repeat: a prime
STD = 0.02  # initializer_range of the official configs


def official_config(size: str, quantised: bool = False) -> ModelConfig:
    """The config.json of an official Instruct size, e.g. "7B".

    quantised: with the sizes of its AWQ and GPTQ checkpoints; the rest is the unquantised one's.
    """
    D, I, L, H, K, V, tied = SIZES[size]
    if quantised:
        I = QUANTISED_INTERMEDIATE.get(size, I)
    return ModelConfig.from_dict(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_act": "silu",
            "hidden_size": D,
            "initializer_range": STD,
            "intermediate_size": I,
            "max_position_embeddings": 32768,
            "max_window_layers": L,
            "model_type": "qwen2",
            "num_attention_heads": H,
            "num_hidden_layers": L,
            "num_key_value_heads": K,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": tied,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": V,
        },
        source=f"--size {size}",
    )


def random_tensors(
    config: ModelConfig, seed: int, period: int = PERIOD
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in module order and config.dtype; each depends on seed, name and shape alone.

    Matrices, embeddings and biases are drawn from N(0, STD^2). Norm weights are 1. o_proj.bias is
    0: only a Llama config lists it, and Qwen2 computes without one.
    """
    dtype = resolve_dtype("auto", config)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.empty(period).normal_(0, STD, generator=generator).to(dtype)
    for name, shape in config.parameter_shapes().items():
        tensor = torch.empty(shape, dtype=dtype)
        if name.endswith("norm.weight"):
            tensor.fill_(1)
        elif name.endswith("o_proj.bias"):
            tensor.zero_()
        else:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            _repeat(numbers, int.from_bytes(digest[:8], "little") % period, tensor.view(-1))
        yield name, tensor


def _repeat(numbers: Tensor, start: int, out: Tensor) -> None:
    """Fill `out` with `numbers` from `start` on, again from 0 after the last one."""
    done = 0
    while done < len(out):
        count = min(len(numbers) - start, len(out) - done)
        out[done : done + count] = numbers[start : start + count]
        done, start = done + count, 0


def random_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    arithmetic: str | Native = "native",
    mesh: Mesh = SINGLE,
) -> Qwen2:
    """A model of random weights that are made on the device, so that a large one is there soon.

    The numbers are as in `random_tensors`, but other ones, which depend on the device. Every rank
    draws whole tensors, one at a time, and keeps its slice.
    """
    shapes = config.parameter_shapes()
    generator = torch.Generator(device).manual_seed(0)

    def read(name: str, shard: Shard | None) -> Tensor:
        tensor = torch.empty(shapes[name], dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            tensor.fill_(1)
        elif name.endswith("o_proj.bias"):
            tensor.zero_()
        else:
            tensor.normal_(0, STD, generator=generator)
        if shard is None:
            return tensor
        return tensor.narrow(shard.dim, shard.start, shard.stop - shard.start).clone()

    return Qwen2.from_tensors(
        config, read, dtype=dtype, device=device, arithmetic=arithmetic, mesh=mesh
    )
