"""How large the engine is: its options, checked early, and the cache that fits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from minqwen.checkpoint.offload import LAYERS_HELD
from minqwen.checks import (
    boolean,
    dtype_name,
    integer,
    number,
    one_of,
    optional_integer,
    refuse_unknown_arguments,
)
from minqwen.config import ModelConfig
from minqwen.engine.arguments import OF_VLLM, without_vllm
from minqwen.errors import ConfigError
from minqwen.model import Qwen2
from minqwen.model.kv_cache import KV_DTYPES
from minqwen.model.memory import block_bytes, blocks_that_fit, memory_of
from minqwen.model.qwen2 import check_kv_dtype

MAX_BLOCK_SIZE = 256
CPU_SHARE = 5  # on a CPU the cache takes a fifth of the memory that is free


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """vLLM's names. Raises ConfigError, when it is made, for a value that no engine can have.

    max_model_len: most tokens of prompt and output together; None: the model's context, or what the
    cache holds. block_size: tokens of a block of the cache. num_blocks, or kv_cache_bytes per rank,
    or gpu_memory_utilization of the device (weights and the fullest step included) give the cache's
    size. max_num_seqs and max_num_batched_tokens bound a step. enable_prefix_caching: keys and
    values that earlier requests computed are used again. kv_cache_dtype: "auto" is the model's,
    "int8" takes half of 16 bits and is less exact. enforce_eager: nothing is compiled; False:
    on a GPU, fast arithmetic runs compiled functions and CUDA graphs, and exact arithmetic graphs.
    """

    max_model_len: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    kv_cache_dtype: str = "auto"
    enforce_eager: bool = True

    def __post_init__(self) -> None:
        optional_integer("max_model_len", self.max_model_len, 2)
        integer("block_size", self.block_size, 1)
        for name in ("num_blocks", "kv_cache_bytes"):
            optional_integer(name, getattr(self, name), 1)
        number("gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0)
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            integer(name, getattr(self, name), 1)
        boolean("enable_prefix_caching", self.enable_prefix_caching)
        boolean("enforce_eager", self.enforce_eager)
        one_of("kv_cache_dtype", self.kv_cache_dtype, KV_DTYPES, "'auto' is the model's dtype")
        if self.block_size > MAX_BLOCK_SIZE:
            raise ConfigError(f"block_size is {self.block_size}, expected 1 to {MAX_BLOCK_SIZE}")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs is {self.max_num_seqs} and max_num_batched_tokens "
                f"{self.max_num_batched_tokens}: a step must have room for one token of every "
                "sequence; lower the one or raise the other"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any], others: Sequence[str] = ()) -> EngineOptions:
        """From keyword arguments, vLLM's too; an unknown one is refused with what to use instead.

        others: names that the caller takes besides these.
        """
        known = [*(field.name for field in fields(cls)), *others]
        own = without_vllm(options)
        refuse_unknown_arguments(own, known, OF_VLLM)
        return cls(**own)

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError if the model cannot have so long a context."""
        longest = config.context_length
        if self.max_model_len is not None and self.max_model_len > longest:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}, expected 2 to {longest}, "
                "the model's context: lower it, or give the model's config.json the rope_scaling "
                "(YaRN) of a longer one"
            )

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


def size_cache(model: Qwen2, options: EngineOptions, room: int | None = None) -> tuple[int, int]:
    """(max_model_len, number of blocks) that fit; the same on every rank.

    room: bytes for the cache and for what a step holds; None: what this machine has. Raises
    ConfigError where the cache has no room for the context that was asked for.
    """
    options.check(model.config)
    check_kv_dtype(options.kv_cache_dtype, model.ops)
    bytes_of_block = _block_bytes(model.config, options, model.dtype, model.mesh.size)
    num_blocks = _blocks_asked_for(options, bytes_of_block)
    if num_blocks is not None:
        _check_memory(num_blocks * bytes_of_block, options, model.device)
    else:
        num_blocks = _blocks_of_rank(model, options, bytes_of_block, room)
    num_blocks = fewest_of_all_ranks(model, num_blocks)
    return _context_in(num_blocks, options, model.config, bytes_of_block), num_blocks


def check_cache_asked_for(
    options: EngineOptions, config: ModelConfig, dtype: torch.dtype, size: int
) -> None:
    """Raise ConfigError, before a weight is read, if the cache that was asked for is too small.

    dtype: the model's. size: how many ranks share it.
    """
    bytes_of_block = _block_bytes(config, options, dtype, size)
    num_blocks = _blocks_asked_for(options, bytes_of_block)
    if num_blocks is not None:
        _context_in(num_blocks, options, config, bytes_of_block)


def _context_in(
    num_blocks: int, options: EngineOptions, config: ModelConfig, bytes_of_block: int
) -> int:
    """The longest context that so many blocks hold, at most the one that is wanted.

    Raises ConfigError if they do not hold the context that was asked for.
    """
    context = options.max_model_len or config.context_length
    tokens = num_blocks * options.block_size
    if tokens >= context:
        return context
    if options.max_model_len is None and tokens >= 2:
        return tokens
    needed = options.blocks_for(context)
    megabytes = needed * bytes_of_block / 1e6
    raise ConfigError(
        f"max_model_len {context} needs {needed} blocks of {options.block_size} tokens "
        f"({megabytes:.1f} MB per rank), but the cache has {num_blocks}: lower max_model_len, or "
        "give more num_blocks, kv_cache_bytes or gpu_memory_utilization"
    )


def _blocks_asked_for(options: EngineOptions, bytes_of_block: int) -> int | None:
    """The blocks that the options name, by number or by bytes; None: what memory leaves."""
    if options.num_blocks is not None:
        return options.num_blocks
    if options.kv_cache_bytes is not None:
        return options.kv_cache_bytes // bytes_of_block
    return None


def _check_memory(size: int, options: EngineOptions, device: torch.device) -> None:
    """Raise ConfigError for a cache of `size` bytes that was asked for, and no memory holds."""
    most = memory_of(device)
    if size > most:
        name = "kv_cache_bytes" if options.num_blocks is None else "num_blocks"
        raise ConfigError(
            f"{name} is {getattr(options, name)}: the cache would have {size / 1e9:.1f} GB, and "
            f"this machine's {device.type} memory has {most / 1e9:.1f}; lower it"
        )


def _blocks_of_rank(
    model: Qwen2, options: EngineOptions, bytes_of_block: int, room: int | None
) -> int:
    """The blocks that this rank's memory has room for, and that could be used."""
    context = options.max_model_len or model.config.context_length
    if room is None:
        room = room_for_cache(model, options.gpu_memory_utilization)
    fit = blocks_that_fit(
        model.config,
        room,
        bytes_of_block,
        block_size=options.block_size,
        max_model_len=context,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        dtype=dtype_name("dtype", model.ops.wide_dtype(model.dtype)),
        size=model.mesh.size,
        device=model.device.type,
        kv_dtype=options.kv_cache_dtype,
    )
    return min(fit, options.max_num_seqs * options.blocks_for(context))  # more could not be used


def _block_bytes(config: ModelConfig, options: EngineOptions, dtype: torch.dtype, size: int) -> int:
    name = dtype_name("dtype", dtype)
    return block_bytes(config, size, options.block_size, name, options.kv_cache_dtype)


def fewest_of_all_ranks(model: Qwen2, count: int) -> int:
    """The smallest `count` of all ranks, those of other replicas too: they must agree."""
    most = model.mesh.world.all_reduce(torch.tensor([-float(count)], device=model.device), "max")
    return -int(most)


def room_for_cache(model: Qwen2, utilization: float) -> int:
    """Bytes for the cache and for what a step holds besides the weights."""
    if model.device.type != "cuda":
        return available_memory() // CPU_SHARE // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free, total = torch.cuda.mem_get_info(model.device)
    # With offload the layers' weights are not there yet; so many of them will be at a time.
    layer = model.model.layers[0]
    coming = sum(x.numel() * x.element_size() for x in layer.parameters() if x.is_meta)
    return max(0, int(free - (1 - utilization) * total) - LAYERS_HELD * coming)


def available_memory() -> int:
    """Bytes of main memory that could be had now without swapping."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return memory_of(torch.device("cpu")) // 2
