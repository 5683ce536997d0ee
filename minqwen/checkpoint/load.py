"""A safetensors directory becomes a model, each rank reading only its slices."""
from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from minqwen.checkpoint.reader import Checkpoint
from minqwen.errors import ConfigError
from minqwen.parallel import SINGLE, Mesh, check_degree

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def resolve_dtype(dtype: str | torch.dtype, config) -> torch.dtype:
    """"auto" is the checkpoint's own; else a name or a torch dtype."""
    name = config.dtype if dtype == "auto" else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_pretrained(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str | None = None,
    arithmetic: str = "native",
    mesh: Mesh = SINGLE,
    check_finite: bool = False,
    progress: bool = False,
):
    """The model in `path`, a directory with config.json and safetensors files, on this rank.

    dtype: of weights, activations and logits; "auto" is config.json's. device: default the mesh's. arithmetic:
    see model/arithmetic.py. check_finite: scan all weights for NaN and infinity first. progress: a bar, on rank 0.
    At no time is more than this rank's weights and one tensor held. Raises CheckpointError, ConfigError,
    ParallelError, before any weight is read where that can be known before.
    """
    from minqwen.model.qwen2 import Qwen2  # checkpoint/ and model/ know each other only here

    checkpoint = Checkpoint(path)
    config = checkpoint.config
    check_degree(config, mesh.size)
    checkpoint.check()
    if check_finite:
        checkpoint.check_finite()
    dtype, device = resolve_dtype(dtype, config), device or mesh.device
    bar = tqdm(total=len(checkpoint.names), desc="loading", unit="tensor", leave=False,
               disable=None if progress and mesh.rank == 0 else True)

    def read(name, mine):
        bar.update()
        return checkpoint.read(name, mine, dtype, device)

    with bar:
        return Qwen2.from_tensors(config, read, dtype=dtype, device=device, mesh=mesh, arithmetic=arithmetic)
