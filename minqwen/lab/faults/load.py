"""A checkpoint with a mistake in it: `load_pretrained`'s options, and a fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minqwen.checkpoint.load import check_options, resolve_dtype
from minqwen.errors import ConfigError
from minqwen.heads.view import open_weights
from minqwen.lab.faults.fault import Fault
from minqwen.model import Qwen2
from minqwen.parallel import SINGLE, Mesh


def load_mistaken(
    fault: Fault,
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str | None = None,
    arithmetic: str = "native",
    offload: str | None = None,
    check_finite: bool = False,
    mesh: Mesh = SINGLE,
    **heads: Any,
) -> Qwen2:
    """The model in `path` with the mistake in it: native arithmetic, one process, in memory.

    The options are those of `Qwen2.from_pretrained`, heads those of `open_weights`. All tensors are
    in memory twice for a while. Raises ConfigError for options that are not possible here, and what
    `Fault.model` raises.
    """
    check_options(dtype=dtype, device=device, arithmetic=arithmetic, offload=offload)
    if arithmetic != "native" or offload is not None or mesh.size > 1:
        raise ConfigError(
            f"the mistake {fault.name!r} is made in native arithmetic, in one process and without "
            "offload: leave out arithmetic and offload, and start it without torchrun"
        )
    source = open_weights(path, **heads)
    fault.check(source.config)
    source.check()
    if check_finite:
        source.check_finite()
    weights = {name: source.read(name) for name in source.names}
    return fault.model(
        source.config,
        weights,
        dtype=resolve_dtype(dtype, source.config),
        device=mesh.device if device is None else device,
    )
