"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # the oracle, transformers, has nothing to ask the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors, and a process of tests for each core

import pytest
from support.paths import EMBEDDED

from minqwen import Qwen2, Tokenizer


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The directory of the embedded model."""
    return EMBEDDED


@pytest.fixture(scope="session")
def embedded_model() -> Qwen2:
    """The embedded model in float32, shared: do not change its weights."""
    return Qwen2.from_pretrained(EMBEDDED, dtype="float32")


@pytest.fixture(scope="session")
def embedded_tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(EMBEDDED)
