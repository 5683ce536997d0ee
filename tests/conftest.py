"""What several test files share."""
from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the oracle, transformers, has nothing to ask the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors, and a process of tests for each core

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "weights" / "embedded"


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The directory of the embedded model."""
    return EMBEDDED


@pytest.fixture(scope="session")
def embedded_model():
    """The embedded model in float32, shared: do not change its weights."""
    from minqwen import Qwen2

    return Qwen2.from_pretrained(EMBEDDED, dtype="float32")


@pytest.fixture(scope="session")
def embedded_tokenizer():
    from minqwen import Tokenizer

    return Tokenizer.from_dir(EMBEDDED)


def greedy(model, ids: list[int], count: int) -> list[int]:
    """The naive loop: the whole text through the model for every token, no cache. The engine's oracle."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]
