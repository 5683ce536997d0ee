"""Gradients at the points: a hook that asks for them gets them, at every point."""

from __future__ import annotations

import pytest
import torch
from support.qwen2 import oracle, ours, tokens

from minqwen.model.trace import point_names


@pytest.fixture
def with_gradients():
    with torch.enable_grad():
        yield


def test_retain_grad_in_a_hook_gives_a_gradient_at_every_point(with_gradients):
    with torch.no_grad():
        model = ours(oracle())
    model.requires_grad_()
    ids, kept = tokens(model, 2, 5), {}

    def keep(x, name):
        x.retain_grad()
        kept[name] = x

    logits = model.run_with_hooks(ids, [("*", keep)])
    assert torch.equal(logits, model(ids))
    logits.pow(2).sum().backward()
    assert list(kept) == point_names(2)
    for name, x in kept.items():
        assert x.grad is not None and x.grad.shape == x.shape and x.grad.abs().max() > 0, name


def test_the_gradient_at_a_point_is_what_a_small_step_there_does(with_gradients):
    with torch.no_grad():
        model = ours(oracle(), dtype=torch.float64)
    model.requires_grad_()
    ids = tokens(model, 1, 4)
    direction = torch.ones(())

    def loss(names, change):
        return model.run_with_hooks(ids, [(names, change)]).pow(2).mean()

    for name in point_names(2):
        kept = []

        def keep(x, name, kept=kept):
            x.retain_grad()
            kept.append(x)

        loss(name, keep).backward()
        direction = torch.randn_like(kept[0])
        expected = (kept[0].grad * direction).sum()
        with torch.no_grad():
            up, down = (
                loss(name, lambda x, name, s=s, d=direction: x + s * 1e-6 * d) for s in (1, -1)
            )
        torch.testing.assert_close((up - down) / 2e-6, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_weights_and_a_point_that_requires_a_gradient(with_gradients):
    """Attribution patching: the gradient of one activation, without any of the weights."""
    with torch.no_grad():
        model = ours(oracle())
    ids, kept = tokens(model, 1, 4), {}

    def watch(x, name):
        kept[name] = x.requires_grad_()

    model.run_with_hooks(ids, [("layers.0.resid_pre", watch)]).sum().backward()
    assert kept["layers.0.resid_pre"].grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters())
