"""What the tests of the model share."""

from __future__ import annotations

import pytest
import torch
from support.arithmetics import Ordered
from support.exact import STORAGE, Weights, build
from support.paths import EMBEDDED

from minqwen import Checkpoint, Qwen2


@pytest.fixture(autouse=True)
def quiet_torch():
    """No autograd and one thread, unless a test asks for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def embedded_weights() -> Weights:
    """The embedded model: its config and its tensors by name."""
    checkpoint = Checkpoint(EMBEDDED)
    return checkpoint.config, {name: checkpoint.read(name) for name in checkpoint.names}


@pytest.fixture(scope="session")
def models(embedded_weights) -> dict[tuple[str, torch.dtype], Qwen2]:
    """(arithmetic, dtype) -> the embedded model."""
    built = {
        (name, dtype): build(embedded_weights, name, dtype)
        for name in ("native", "exact")
        for dtype in STORAGE
    }
    return built | {("ordered", torch.float32): build(embedded_weights, Ordered())}
