"""One name for the weights and the arithmetic: what an answer depends on besides its request."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from minqwen.checkpoint import Checkpoint
from minqwen.heads.tensors import sha256

LENGTH = 32  # characters, 128 bits


def weights_digest(path: str | Path) -> str:
    """SHA-256 of the names and values of a checkpoint's tensors, however its files are cut."""
    checkpoint, sha = Checkpoint(path), hashlib.sha256()
    for name in sorted(checkpoint.names):
        sha.update(f"{name} {checkpoint.dtype(name)} {sha256(checkpoint.read(name))}\n".encode())
    return sha.hexdigest()


def system_fingerprint(weights: str, config: object, arithmetic: str, dtype: object) -> str:
    """Of weights (`weights_digest`), the config that runs them, the arithmetic and its dtype.

    Under exact arithmetic the same fingerprint, request and seed give the same answer, whoever else
    is served, on any number of ranks. Under native arithmetic the last bits may differ. What makes
    no config another one, such as the directory that it was read from, does not count.
    """
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    counting = {field.name for field in dataclasses.fields(config) if field.compare}
    values = {name: v for name, v in dataclasses.asdict(config).items() if name in counting}
    fields = json.dumps(values, sort_keys=True, default=str)
    text = "\n".join([weights, fields, arithmetic, str(dtype)])
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:LENGTH]
