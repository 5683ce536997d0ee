"""The naive way to generate, which the engine is tested against."""

from __future__ import annotations

import torch

from minqwen import Qwen2


def greedy(model: Qwen2, ids: list[int], count: int) -> list[int]:
    """The `count` tokens after `ids`. For each one the model reads all of the text; no cache."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]
