"""Digests: of tensors, of files, and the one that every machine must reproduce.

The SHA-256 of exact logits on fixed token ids is the same for any batch, degree, number of threads,
library or device. `tools/golden.py fingerprint` prints it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minqwen.checkpoint import Checkpoint
from minqwen.errors import CheckpointError
from minqwen.files import opened
from minqwen.model import Qwen2

STARTS = (1, 1001, 2001)  # of the three prompts, in one sequence of numbers that look like noise
LENGTHS = (1, 33, 200)  # tokens of each prompt
KNUTH = 2654435761  # 2^32 / golden ratio (The Art of Computer Programming, volume 3, section 6.4)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers as wide as a number of n bytes


def prompts(vocab_size: int) -> list[Tensor]:
    """The fixed prompts: token ids [1, T] each, all below `vocab_size`."""
    return [
        torch.tensor([[_noise(i, vocab_size) for i in range(start, start + length)]])
        for start, length in zip(STARTS, LENGTHS)
    ]


def _noise(i: int, below: int) -> int:
    """A number from 0 to below - 1: the high bits of i times KNUTH, modulo 2^32."""
    return (i * KNUTH % 2**32 * below) >> 32


def digest(tensors: list[Tensor]) -> str:
    """SHA-256 of the tensors' values, row by row, little-endian. Every NaN is alike."""
    sha = hashlib.sha256()
    for x in tensors:
        x = x.cpu().contiguous()
        if x.is_floating_point():
            x = x.masked_fill(x.isnan(), torch.nan)
        bits = x.view(BITS[x.element_size()]).numpy()
        sha.update(bits.astype(bits.dtype.newbyteorder("<")).tobytes())
    return sha.hexdigest()


def file_digests(directory: Path) -> dict[str, str]:
    """{file name: SHA-256} of what makes the model: the digests that Hugging Face shows too."""
    weight_files = {stored.file for stored in Checkpoint(directory).tensors.values()}
    return {name: file_digest(directory / name) for name in ["config.json", *sorted(weight_files)]}


def file_digest(path: Path) -> str:
    sha = hashlib.sha256()
    with opened(path, CheckpointError) as (file, _):
        while piece := file.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()


@torch.inference_mode()
def fingerprint(
    model_dir: str | Path, dtype: str | torch.dtype, arithmetic: str = "exact", **options: Any
) -> str:
    """SHA-256 of the exact logits, in `dtype`, of every position of the fixed prompts.

    options: as `Qwen2.from_pretrained` takes them; device and mesh do not change the result. With
    another arithmetic they may: it is the control.
    """
    model = Qwen2.from_pretrained(model_dir, dtype=dtype, arithmetic=arithmetic, **options)
    return digest([model(ids.to(model.device)) for ids in prompts(model.config.vocab_size)])
