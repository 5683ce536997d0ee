"""A model in memory becomes a directory of weight files."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from minqwen.checkpoint.companions import HEADS_MANIFEST
from minqwen.checkpoint.weight_files import MAX_FILE_BYTES
from minqwen.checkpoint.writer import Content, write_checkpoint
from minqwen.checks import dtype_name
from minqwen.config import ModelConfig
from minqwen.errors import CheckpointError
from minqwen.files import read_small
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

    The options are those of `write_checkpoint`. A path that is replaced keeps its tokenizer and the
    like, unless `sources` is another directory; it keeps the manifest of an extension too, if the
    model has the sizes that it describes. Raises CheckpointError for a model that does not
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
    if sources is None or _is_same_directory(sources, path):
        sources, extra_files = None, _manifest_of(Path(path), config) | dict(extra_files or {})
    write_checkpoint(
        path,
        config,
        ((name, state[name]) for name in config.parameter_shapes()),
        max_file_bytes=max_file_bytes,
        sources=sources,
        extra_files=extra_files,
        omit=omit,
        overwrite=overwrite,
        keep=True,
    )


def _is_same_directory(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def _manifest_of(path: Path, config: ModelConfig) -> dict[str, Content]:
    """The manifest of the extension in `path`, if that has the sizes of `config`."""
    if not (path / HEADS_MANIFEST).is_file():
        return {}
    if ModelConfig.from_json(path).parameter_shapes() != config.parameter_shapes():
        return {}
    return {HEADS_MANIFEST: read_small(path / HEADS_MANIFEST, CheckpointError)}


def _holds_the_checkpoint(model: Qwen2) -> bool:
    """Whether this rank has every weight, whole and as the checkpoint has it."""
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    return model.mesh.size == 1 and model.ops.can_save and not offloaded
