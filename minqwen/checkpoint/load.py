"""A directory of weight files becomes a model, each rank reading only its slices."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from minqwen.agreement import agree, digests_of_files
from minqwen.checkpoint.offload import OFFLOADS, LayerStream, is_layer
from minqwen.checkpoint.quantised import PackedWeights
from minqwen.checkpoint.reader import Checkpoint
from minqwen.checkpoint.weight_files import DTYPES
from minqwen.checkpoint.words import Keeper
from minqwen.checks import did_you_mean, quoted, refuse_unknown_arguments
from minqwen.config import ModelConfig
from minqwen.errors import ConfigError
from minqwen.model import ARITHMETICS, Exact, Fast, Native, Qwen2
from minqwen.model.qwen2 import Layer, aligned
from minqwen.parallel import SINGLE, Mesh, Shard, check_degree, shard

# Keywords of `load_pretrained`.
OPTIONS = ("dtype", "device", "arithmetic", "mesh", "check_finite", "progress", "offload")


class Weights(Protocol):
    """What a model is loaded from: a `Checkpoint`, or a view of one (heads/view.py)."""

    config: ModelConfig

    @property
    def names(self) -> list[str]: ...

    @property
    def files(self) -> list[Path]: ...

    def check(self) -> None: ...

    def check_finite(self) -> None: ...

    def words_of(self, name: str) -> PackedWeights | str | None: ...

    def read(
        self,
        name: str,
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        out: Tensor | None = None,
    ) -> Tensor: ...


def load_pretrained(
    path: str | Path | Weights,
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str | None = None,
    arithmetic: str | Native = "native",
    mesh: Mesh = SINGLE,
    check_finite: bool = False,
    progress: bool = False,
    offload: str | None = None,
    **unknown: object,
) -> Qwen2:
    """The model in `path`, a directory with config.json and safetensors files, on this rank.

    Or the model of weights that were opened already, in whatever form they are read.

    dtype: of weights, activations and logits; "auto" is config.json's. device: default the mesh's.
    arithmetic: see model/arithmetic.py. check_finite: scan all weights for NaN and infinity first.
    progress: a bar, on rank 0. offload: for a device that is too small, the layers' weights stay in
    main "memory" (pinned, for a GPU) or on "disk" and come when they are needed, in every step.
    At no time is more than this rank's weights and one tensor held. Raises CheckpointError,
    ConfigError, ParallelError, before any weight is read where that can be known before.
    """
    refuse_unknown_arguments(unknown, OPTIONS)
    check_options(dtype=dtype, device=device, arithmetic=arithmetic, offload=offload)
    checkpoint = Checkpoint(path) if isinstance(path, (str, os.PathLike)) else path
    config = checkpoint.config
    check_degree(config, mesh.size)
    agree_on_weights(mesh, checkpoint, resolve_dtype(dtype, config), arithmetic, offload)
    checkpoint.check()
    if check_finite:
        checkpoint.check_finite()
    where = torch.device(mesh.device if device is None else device)
    reader = _RankReader(checkpoint, resolve_dtype(dtype, config), mesh, progress)
    with reader.bar:
        if offload is not None:
            return _load_offloaded(reader, where, arithmetic, offload)
        quantised = reader.names_in_words()
        if arithmetic != "fast":
            quantised = set()  # others compute with weights
        model = Qwen2.from_tensors(
            config,
            lambda name, mine: reader.read(name, mine, where),
            only=lambda name: name not in quantised,
            arithmetic=arithmetic,
            dtype=reader.dtype,
            device=where,
            mesh=mesh,
        )
        _keep_packed(model, reader, quantised)
        return model


def agree_on_weights(
    mesh: Mesh,
    weights: Weights,
    dtype: torch.dtype,
    arithmetic: str | Native,
    offload: str | None,
) -> None:
    """Raise ParallelError unless all ranks of the mesh load the same in the same way."""
    if mesh.size == 1:
        return
    config = weights.config
    fields = [field.name for field in dataclasses.fields(config) if field.compare]
    of_config = {f"config.json's {name}": getattr(config, name) for name in fields}
    kind = arithmetic if isinstance(arithmetic, str) else type(arithmetic).__name__.lower()
    options = {"dtype": dtype, "arithmetic": kind, "offload": offload}
    files = digests_of_files(mesh, weights.files)
    notes = {file.name: f" ({file.parent})" for file in weights.files}
    agree(mesh, {**of_config, **options, **files}, notes)


# ---- options ------------------------------------------------------------------------------------


def check_options(
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str | None = None,
    arithmetic: str | Native = "native",
    offload: str | None = None,
) -> None:
    """Raise ConfigError for a value that `load_pretrained` cannot take. Opens no file."""
    if not _is_auto(dtype):
        _dtype_named(dtype)
    if device is not None:
        _check_device(device)
    if not isinstance(arithmetic, Native):
        _check_choice("arithmetic", arithmetic, list(ARITHMETICS))
    if offload is not None:
        _check_choice("offload", offload, ["None", *OFFLOADS])


def resolve_dtype(dtype: str | torch.dtype, config: ModelConfig) -> torch.dtype:
    """ "auto" is the checkpoint's own; else a name or a torch dtype. Raises ConfigError."""
    return _dtype_named(config.dtype if _is_auto(dtype) else dtype)


def _is_auto(dtype: str | torch.dtype) -> bool:
    return isinstance(dtype, str) and dtype == "auto"


def _dtype_named(dtype: str | torch.dtype) -> torch.dtype:
    name = dtype if isinstance(dtype, str) else quoted(dtype)
    name = name.removeprefix("torch.")
    _check_choice("dtype", name, ["auto", *DTYPES])
    return DTYPES[name]


def _check_device(device: torch.device | str) -> None:
    """Refuse what torch does not know, and a GPU that this machine does not have."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        # "cpu" would be closest to "gpu" in spelling.
        shown = quoted(device, 100)
        gpu = shown.strip("'").lower().startswith("gpu")
        meant = "; did you mean 'cuda'?" if gpu else did_you_mean(shown, ["cpu", "cuda"])
        raise ConfigError(f"device is {shown}, expected 'cpu' or 'cuda'{meant}") from None
    if found.type != "cuda":
        return
    # torch keeps the index in 8 bits with a sign: that of "cuda:999" is negative.
    if not 0 <= (found.index or 0) < torch.cuda.device_count():
        raise ConfigError(
            f"device is {str(device)!r}, but this machine has {torch.cuda.device_count()} GPUs "
            "that torch can use, expected one of them or 'cpu'"
        )


def _check_choice(option: str, value: str, choices: list[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        names = " or ".join(map(repr, choices)).replace("'None'", "None")
        raise ConfigError(
            f"{option} is {quoted(value, 100)}, expected {names}{_meant(value, choices)}"
        )


def _meant(value: object, choices: list[str]) -> str:
    return did_you_mean(value, choices) if isinstance(value, str) else ""


# ---- reading ------------------------------------------------------------------------------------


class _RankReader:
    """Reads this rank's slices of a checkpoint in the model's dtype, and counts them on a bar."""

    def __init__(self, checkpoint: Weights, dtype: torch.dtype, mesh: Mesh, progress: bool) -> None:
        self.checkpoint, self.dtype, self.mesh = checkpoint, dtype, mesh
        self.config = checkpoint.config
        self.bar = tqdm(
            total=len(checkpoint.names),
            desc="loading",
            unit="tensor",
            leave=False,
            disable=None if progress and mesh.rank == 0 else True,
        )

    def read(self, name: str, mine: Shard | None, device: torch.device | str) -> Tensor:
        """A parameter's slice, on the device."""
        self.bar.update()
        return self.checkpoint.read(name, mine, self.dtype, device)

    def names_in_words(self) -> set[str]:
        """The weights that are quantised."""
        return {name for name in self.checkpoint.names if self.checkpoint.words_of(name)}

    def fetch(self, name: str, out: Tensor | None = None) -> Tensor:
        """A parameter's slice in main memory, in `out` if that is given."""
        mine = shard(name, self.config, self.mesh.rank, self.mesh.size)
        return self.checkpoint.read(name, mine, self.dtype, out=out)

    def fetch_layers(self, pin: bool) -> dict[str, Tensor]:
        """All layers' slices in main memory, pinned if a GPU is to copy them while it computes."""
        held = {}
        for name in filter(is_layer, self.config.parameter_shapes()):
            self.bar.update()
            held[name] = self.fetch(name).pin_memory() if pin else self.fetch(name)
        return held


def _keep_packed(model: Qwen2, reader: _RankReader, quantised: set[str]) -> None:
    """Give the linear layers that have no weight yet their words, or what these stand for."""
    keeper = Keeper(model, reader.checkpoint)
    for module in model.modules():
        if not isinstance(module, (Layer, Qwen2)):
            continue
        for linears in module.by_input():
            missing = [linear for linear in linears if keeper.names[linear] in quantised]
            if not missing or keeper.keep(linears):
                reader.bar.update(len(missing))
                continue
            for name in (keeper.names[linear] for linear in missing):
                mine = shard(name, model.config, model.mesh.rank, model.mesh.size)
                model.set_parameter(name, aligned(reader.read(name, mine, model.device)))
            model.ops.prepare(linears, model.mesh)
    model.quantised = keeper.report()


def _load_offloaded(
    reader: _RankReader, device: torch.device, arithmetic: str | Native, offload: str
) -> Qwen2:
    """The model with everything but its layers on the device; the layers stream in."""
    if arithmetic == "exact":
        arithmetic = Exact(widen=False)  # what comes and goes is kept narrow
    elif arithmetic == "fast":
        arithmetic = Fast(pack=False)
    elif arithmetic == "int8":
        raise ConfigError(
            f"offload is {offload!r}, but int8 arithmetic keeps all weights in memory, rounded: "
            "leave out offload, or use fast"
        )
    model = Qwen2.from_tensors(
        reader.config,
        lambda name, mine: reader.read(name, mine, device),
        only=lambda name: not is_layer(name),
        arithmetic=arithmetic,
        dtype=reader.dtype,
        device=device,
        mesh=reader.mesh,
    )
    quantised = reader.names_in_words()
    if quantised and isinstance(model.ops, Fast):
        model.quantised = f"0 of {len(quantised)} quantised weights stay packed: they come and go"
    if offload == "disk":
        LayerStream(model, reader.fetch, device)
        return model
    held = reader.fetch_layers(pin=device.type == "cuda")
    LayerStream(model, lambda name, out: held[name], device)
    return model
