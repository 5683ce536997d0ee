"""Whole checkpoints: extend, and shrink back byte for byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from tqdm import tqdm

from minqwen.checkpoint import Checkpoint, write_checkpoint
from minqwen.config import ModelConfig
from minqwen.errors import HeadsError
from minqwen.heads.layout import Layout, extended_config
from minqwen.heads.tensors import extend_tensor, sha256, shrink_tensor

MANIFEST = "minqwen_heads.json"


def extend(
    src: str | Path,
    dst: str | Path,
    to: Layout,
    *,
    arch: str = "qwen2",
    max_shard_bytes: int = 4 * 10**9,
    progress: bool = False,
) -> None:
    """Write the checkpoint `src` in the layout `to`, one tensor in memory at a time, atomically. After a kill, an
    interrupt or a full disk, the same call goes on where it was.

    dst gets sharded safetensors, a config with explicit head_dim, the tokenizer's files and minqwen_heads.json:
    the layout, and a SHA-256 of every source tensor, from which `shrink` restores the source. Raises HeadsError
    or CheckpointError; dst is then as it was.
    """
    to.check()
    source = Checkpoint(src)
    source.check()
    if (Path(src) / MANIFEST).exists():
        raise HeadsError(
            f"{src}: has been extended already ({MANIFEST}): shrink it first, or extend its source"
        )
    config = extended_config(source.config, to, arch)
    digests: dict[str, str] = {}
    bar = tqdm(
        total=len(source.names),
        desc="extending",
        unit="tensor",
        leave=False,
        disable=None if progress else True,
    )

    def tensors(done: set[str]):
        bar.update(len(done))
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

    def manifest() -> str:  # written last, when the digests are known
        return (
            json.dumps(
                {
                    "format": 1,
                    "layout": to.to_dict(),
                    "arch": arch,
                    "source_config": source.config.to_dict(),
                    "source_sha256": digests,
                },
                indent=1,
            )
            + "\n"
        )

    with bar:
        dtypes = {name: source.dtype(name) for name in source.names}
        files = sorted(
            (f.name, f.stat().st_size, f.stat().st_mtime_ns)
            for f in Path(src).glob("*.safetensors")
        )
        content = json.dumps([to.to_dict(), arch, config.to_dict(), files, max_shard_bytes])
        write_checkpoint(
            dst,
            config,
            tensors,
            max_shard_bytes=max_shard_bytes,
            sources=src,
            extra_files={MANIFEST: manifest},
            dtypes=dtypes,
            resume=hashlib.sha256(content.encode()).hexdigest()[:16],
        )


def read_manifest(path: str | Path) -> dict | None:
    """What `extend` wrote beside the weights, or None if the checkpoint is nobody's extension."""
    file = Path(path) / MANIFEST
    if not file.exists():
        return None
    try:
        manifest = json.loads(file.read_text())
        manifest["layout"] = Layout.from_dict(manifest["layout"])
        return manifest
    except (ValueError, KeyError, TypeError) as e:
        raise HeadsError(f"{file}: is not a manifest of tools/heads.py ({e})") from None


def shrink(
    src: str | Path,
    dst: str | Path,
    *,
    tolerance: float = 0.0,
    max_shard_bytes: int = 4 * 10**9,
    progress: bool = False,
) -> None:
    """Undo `extend`: write the source's checkpoint again, byte for byte.

    Refuses, naming the tensor and the residual of each slot, if the weights are no longer what `extend` would
    write (they were trained on, say); `tolerance` is the largest residual that is let pass.
    """
    manifest = read_manifest(src)
    if manifest is None:
        raise HeadsError(
            f"{src}: has no {MANIFEST}, so what was added cannot be told from the rest"
        )
    to, target = manifest["layout"], Checkpoint(src)
    target.check()
    config = ModelConfig.from_dict(manifest["source_config"], source=f"{src}/{MANIFEST}")
    bar = tqdm(
        total=len(target.names),
        desc="shrinking",
        unit="tensor",
        leave=False,
        disable=None if progress else True,
    )

    def tensors():
        for name in config.parameter_shapes():
            tensor, residuals = shrink_tensor(name, target.read(name), to)
            drift = {
                slot: r for slot, r in residuals.items() if not r <= tolerance
            }  # a NaN is drift too
            if drift:
                slots = ", ".join(f"{slot}: {r:.3g}" for slot, r in list(drift.items())[:8])
                raise HeadsError(
                    f"{src}: {name} has drifted from its layout in {len(drift)} slots (largest difference "
                    f"per slot: {slots}): it is no longer an extension of its source"
                )
            yield name, tensor
            bar.update()

    with bar:
        dtypes = {name: target.dtype(name) for name in config.parameter_shapes()}
        write_checkpoint(
            dst,
            config,
            tensors(),
            max_shard_bytes=max_shard_bytes,
            sources=src,
            dtypes=dtypes,
            omit={MANIFEST},
        )
