"""Whole checkpoints: extended by streaming, and shrunk back byte for byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from minqwen.checkpoint import Checkpoint, write_checkpoint
from minqwen.checkpoint.weight_files import MAX_FILE_BYTES
from minqwen.checks import number
from minqwen.config import ModelConfig
from minqwen.errors import HeadsError
from minqwen.heads.layout import Layout, extended_config
from minqwen.heads.manifest import (
    MANIFEST,
    Manifest,
    check_written,
    refuse_extended,
    require_manifest,
)
from minqwen.heads.tensors import extend_tensor, sha256, shrink_tensor


def extend(
    src: str | Path,
    dst: str | Path,
    to: Layout,
    *,
    arch: str = "qwen2",
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the checkpoint `src` in the layout `to`, atomically, one tensor in memory at a time.

    After a kill, an interrupt or a full disk, the same call goes on where it was. dst gets weight
    files, a config with an explicit head_dim, the tokenizer's files and minqwen_heads.json: the
    layout and a SHA-256 of every source tensor, from which `shrink` restores the source. Raises
    HeadsError or CheckpointError; dst is then as it was.
    """
    to.check()
    source = Checkpoint(src)
    if source.packed is not None:
        raise HeadsError(
            f"{src}: is quantised ({source.packed.packing}), expected an unquantised checkpoint; "
            "heads.packed.extend_packed moves the words"
        )
    source.check()
    refuse_extended(src)
    config = extended_config(source.config, to, arch)
    digests: dict[str, str] = {}
    with _bar("extending", len(source.names), progress) as bar:

        def tensors(done: set[str]) -> Iterator[tuple[str, Tensor]]:
            bar.update(len(done))
            return _extended(source, config, to, done, digests, bar)

        def manifest() -> str:  # written last, when the digests are known
            return Manifest(to, arch, source.config.to_dict(), digests).to_json()

        write_checkpoint(
            dst,
            config,
            tensors,
            max_file_bytes=max_file_bytes,
            sources=src,
            extra_files={MANIFEST: manifest},
            dtypes={name: source.dtype(name) for name in source.names},
            resume=_content_name(source, to, arch, config, max_file_bytes),
            overwrite=overwrite,
        )


def _extended(
    source: Checkpoint,
    config: ModelConfig,
    to: Layout,
    done: set[str],
    digests: dict[str, str],
    bar: tqdm[NoReturn],
) -> Iterator[tuple[str, Tensor]]:
    """The target's tensors, except those in `done`; the digests of all are taken on the way."""
    for name in config.parameter_shapes():
        if name.endswith("o_proj.bias"):  # only the llama layout has it
            if name not in done:
                dtype = source.dtype(name.replace(".bias", ".weight"))
                yield name, torch.zeros(config.hidden_size, dtype=dtype)
            continue
        tensor = source.read(name)
        digests[name] = sha256(tensor)
        if name not in done:
            yield name, extend_tensor(name, tensor, to)
            bar.update()


def _content_name(
    source: Checkpoint, to: Layout, arch: str, config: ModelConfig, max_file_bytes: int
) -> str:
    """A name for exactly what is to be written: a killed extension of the same content goes on."""
    files = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in source.path.glob("*.safetensors")
    )
    content = json.dumps([to.to_dict(), arch, config.to_dict(), files, max_file_bytes])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def shrink(
    src: str | Path,
    dst: str | Path,
    *,
    tolerance: float = 0.0,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Undo `extend`: write the source's checkpoint again, byte for byte.

    Refuses, naming the tensor and the residual of each slot, if the weights are no longer what
    `extend` would write (they were trained on, say). Every tensor must also have the SHA-256 that
    was recorded, in memory and, before dst appears, in the files. `tolerance` is the largest
    residual that is accepted. Where it is above 0, tensors may differ from the source's, and their
    names are returned; the files must then hold what was computed. Raises HeadsError or
    CheckpointError; dst is then as it was.
    """
    number("tolerance", tolerance, 0.0, open_low=False, error=HeadsError)
    manifest = require_manifest(src)
    target = Checkpoint(src)
    target.check()
    manifest.check_fits(target.config, src)
    config = manifest.config(src)
    names = list(config.parameter_shapes())
    # extend takes no digest of o_proj.bias, which only the llama layout has and which is zero.
    manifest.check_names({name for name in names if not name.endswith("o_proj.bias")}, src)
    digests: dict[str, str] = {}
    with _bar("shrinking", len(names), progress) as bar:
        write_checkpoint(
            dst,
            config,
            _shrunk(target, names, manifest, tolerance, digests, bar),
            max_file_bytes=max_file_bytes,
            sources=src,
            dtypes={name: target.dtype(name) for name in names},
            omit={MANIFEST},
            overwrite=overwrite,
            check=lambda written: check_written(written, digests),
        )
    return [name for name in names if not manifest.is_source_tensor(name, digests[name])]


def _shrunk(
    target: Checkpoint,
    names: list[str],
    manifest: Manifest,
    tolerance: float,
    digests: dict[str, str],
    bar: tqdm[NoReturn],
) -> Iterator[tuple[str, Tensor]]:
    """The source's tensors; their digests are taken on the way."""
    for name in names:
        tensor, residuals = shrink_tensor(name, target.read(name), manifest.layout)
        # "not <=", because a NaN is drift too.
        drift = {slot: r for slot, r in residuals.items() if not r <= tolerance}
        if drift:
            slots = ", ".join(f"{slot}: {r:.3g}" for slot, r in list(drift.items())[:8])
            raise HeadsError(
                f"{target.path}: {name} has drifted from its layout in {len(drift)} slots (largest "
                f"difference per slot: {slots}): it is no longer an extension of its source"
            )
        digests[name] = sha256(tensor)
        if not tolerance:
            manifest.check_source_tensor(name, digests[name], target.path)
        yield name, tensor
        bar.update()


def _bar(what: str, total: int, shown: bool) -> tqdm[NoReturn]:
    # disable=None: tqdm shows nothing where stderr is not a terminal.
    return tqdm(total=total, desc=what, unit="tensor", leave=False, disable=None if shown else True)
