"""A safetensors directory becomes a model, each rank reading only its slices."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from minqwen.checkpoint.offload import LayerStream, check_offload, is_layer
from minqwen.checkpoint.reader import Checkpoint
from minqwen.errors import ConfigError
from minqwen.model import Exact, Qwen2
from minqwen.parallel import SINGLE, Mesh, check_degree, shard

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def resolve_dtype(dtype: str | torch.dtype, config) -> torch.dtype:
    """ "auto" is the checkpoint's own; else a name or a torch dtype."""
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
    offload: str | None = None,
):
    """The model in `path`, a directory with config.json and safetensors files, on this rank.

    dtype: of weights, activations and logits; "auto" is config.json's. device: default the mesh's. arithmetic:
    see model/arithmetic.py. check_finite: scan all weights for NaN and infinity first. progress: a bar, on rank 0.
    offload: for a device that is too small, its layers' weights stay in main "memory" (pinned, for a GPU) or on
    "disk" and come when they are needed, in every step. At no time is more than this rank's weights and one tensor
    held. Raises CheckpointError, ConfigError, ParallelError, before any weight is read where that can be known before.
    """
    check_offload(offload)
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    check_degree(config, mesh.size)
    checkpoint.check()
    if check_finite:
        checkpoint.check_finite()
    dtype, device = resolve_dtype(dtype, config), device or mesh.device
    bar = tqdm(
        total=len(checkpoint.names),
        desc="loading",
        unit="tensor",
        leave=False,
        disable=None if progress and mesh.rank == 0 else True,
    )

    def read(name, mine):
        bar.update()
        return checkpoint.read(name, mine, dtype, device)

    options = {"dtype": dtype, "device": device, "mesh": mesh}
    with bar:
        if offload is None:
            return Qwen2.from_tensors(config, read, arithmetic=arithmetic, **options)
        ops = (
            Exact(widen=False) if arithmetic == "exact" else arithmetic
        )  # what comes and goes is kept narrow
        model = Qwen2.from_tensors(
            config, read, only=lambda name: not is_layer(name), arithmetic=ops, **options
        )

        def fetch(name, out=None):
            return checkpoint.read(name, shard(name, config, mesh.rank, mesh.size), dtype, out=out)

        if offload == "memory":
            held, pin = {}, torch.device(device).type == "cuda"
            for name in filter(is_layer, config.parameter_shapes()):
                bar.update()
                held[name] = fetch(name).pin_memory() if pin else fetch(name)

            def fetch(name, out=None):
                return held[name]

        LayerStream(model, fetch, device)
        return model
