"""One number that says whether this machine computes what every other one does.

The SHA-256 of exact logits on fixed token ids is the same for any batch, degree, number of threads, library or
device. `tools/golden.py fingerprint` prints it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from minqwen.model import Qwen2

LENGTHS = (1, 33, 200)  # of the prompts


def prompts(vocab_size: int) -> list[Tensor]:
    """Token ids [1, T] that look like noise: multiples of Knuth's 2^32 / golden ratio, their high bits."""
    return [
        torch.tensor(
            [[(i * 2654435761 % 2**32 * vocab_size) >> 32 for i in range(start, start + length)]]
        )
        for start, length in zip((1, 1001, 2001), LENGTHS)
    ]


def digest(tensors: list[Tensor]) -> str:
    """SHA-256 of the tensors' values, row by row, little-endian."""
    sha = hashlib.sha256()
    for x in tensors:
        x = x.cpu().contiguous()
        bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).numpy()
        sha.update(bits.astype(bits.dtype.newbyteorder("<")).tobytes())
    return sha.hexdigest()


@torch.inference_mode()
def fingerprint(model_dir: str | Path, dtype: str | torch.dtype, **options) -> str:
    """SHA-256 of the exact logits, in `dtype`, of every position of the fixed prompts.

    options: as `Qwen2.from_pretrained` takes them; device and mesh cannot change the result.
    """
    model = Qwen2.from_pretrained(model_dir, dtype=dtype, arithmetic="exact", **options)
    return digest([model(ids.to(model.device)) for ids in prompts(model.config.vocab_size)])
