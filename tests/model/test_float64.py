"""In float64 the same lines compute the truth: a second implementation in numpy agrees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import numpy_qwen2
from support.paged import random_chunks, run_paged
from support.qwen2 import CONFIGURATIONS, cast, error, oracle, ours, tokens, yarn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.mark.parametrize(
    "changes, B, T", [c[1:] for c in CONFIGURATIONS[::6]], ids=[c[0] for c in CONFIGURATIONS[::6]]
)
def test_float64_is_the_truth(changes, B, T):
    # Larger weights would only magnify the roundings.
    hf = oracle(seed=T, **changes | dict(initializer_range=0.05))
    ids = tokens(hf, B, T)
    weights = {name: p.double().numpy() for name, p in hf.state_dict().items()}
    truth = np.stack([numpy_qwen2.qwen2(hf.config.to_dict(), weights, row) for row in ids.numpy()])
    truth = torch.from_numpy(truth)
    mine = ours(hf, torch.float64)(ids)
    assert mine.dtype == torch.float64 and error(mine, truth) < 1e-12
    # What the narrower types lose: rounding, and no more than a few dozen of their units.
    assert 1e-9 < error(ours(hf)(ids), truth) < 32 * torch.finfo(torch.float32).eps
    hf = cast(hf, torch.bfloat16)  # rounding the weights too is another function
    truth = ours(hf, torch.float64)(ids)
    assert 1e-5 < error(ours(hf)(ids), truth) < 6 * torch.finfo(torch.bfloat16).eps


class Spy(TorchDispatchMode):
    """Collects the floating-point dtypes of every tensor that any operation takes or gives."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.seen.add(x.dtype)
        return out


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_nothing_in_a_float64_forward_is_narrower(paged):
    hf = oracle(rope_parameters=yarn(4.0))
    narrow = torch.bfloat16  # where the spy has to see float32 too
    for dtype, expected in ((torch.float64, {torch.float64}), (narrow, {narrow, torch.float32})):
        model = ours(hf, dtype)
        with Spy() as spy:
            if paged:
                run_paged(model, [tokens(model, 9)], 4, random_chunks(0))
            else:
                model(tokens(model, 2, 9))
        assert spy.seen == expected
