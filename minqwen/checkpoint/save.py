"""A model in memory becomes a directory of weight files."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from minqwen.checkpoint.weight_files import MAX_FILE_BYTES
from minqwen.checkpoint.writer import Content, write_checkpoint
from minqwen.checks import dtype_name
from minqwen.errors import CheckpointError
from minqwen.model import Qwen2


def save_pretrained(
    model: Qwen2,
    path: str | os.PathLike[str],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    sources: str | os.PathLike[str] | None = None,
    extra_files: Mapping[str, Content] | None = None,
    omit: Collection[str] = (),
    overwrite: bool = False,
) -> None:
    """Write a model as a Hugging Face directory, atomically, in the dtype that it has in memory.

    The options are those of `write_checkpoint`. Raises CheckpointError for a model that does not
    hold the checkpoint's own weights, whole.
    """
    if not _holds_the_checkpoint(model):
        raise CheckpointError(
            f"{path}: not written, because this model holds a rank's slice, prepared weights or "
            f"not all of them (degree {model.mesh.size}, {model.ops.name} arithmetic, offload): "
            "load it whole on one rank to save it"
        )
    state = model.state_dict()
    config = model.config.replace(dtype=dtype_name("dtype", model.dtype))
    write_checkpoint(
        path,
        config,
        ((name, state[name]) for name in config.parameter_shapes()),
        max_file_bytes=max_file_bytes,
        sources=sources,
        extra_files=extra_files,
        omit=omit,
        overwrite=overwrite,
    )


def _holds_the_checkpoint(model: Qwen2) -> bool:
    """Whether this rank has every weight, whole and as the checkpoint has it."""
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    return model.mesh.size == 1 and model.ops.can_save and not offloaded
