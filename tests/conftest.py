"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

# The oracle, transformers, has nothing to ask the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tensors are small, and there is a process of tests for each core, and one more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test of several threads finds the cores taken. A thread that waits for another sleeps: it would
# spin for as long as the other is not let run.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from hypothesis import HealthCheck, settings
from support.paths import EMBEDDED

from minqwen import Qwen2, Tokenizer

# hypothesis looks at the clock, and a loaded machine may be slow.
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")

# Each takes half a minute or more, and some of them would be among the last.
LONGEST = (
    *("test_readme.py", "test_two_nodes.py", "test_watch.py", "test_replicas.py"),
    *("test_doctor.py", "test_exact_machines.py", "test_interventions.py", "test_tour.py"),
)


def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores: many tests wait, for processes that they start."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that none is still running alone when all else has ended."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


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
