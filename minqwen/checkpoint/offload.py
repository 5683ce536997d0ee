"""Weights that live elsewhere: layers come to the device one by one, in every step.

For a device that is too small for the model. Embedding, final norm and head stay on it. Of the
layers there are at most LAYERS_HELD at a time: one that computes, one on its way, and one whose
memory is not yet free again.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minqwen.model import Qwen2

OFFLOADS = ("memory", "disk")
LAYERS_HELD = 3


def is_layer(name: str) -> bool:
    """Whether a parameter belongs to a layer, and so comes and goes."""
    return name.startswith("model.layers.")


class LayerWeights(NamedTuple):
    """A layer's weights, in the order of its parameters."""

    held: list[Tensor]  # in main memory
    weights: list[Tensor]  # on the device
    arrived: torch.cuda.Event | None  # when the copies to the device are complete; None: they are


class LayerStream:
    """Gives each layer of `model` its weights before it runs and takes them away after.

    fetch(name, out) returns this rank's slice of a parameter in main memory, in the model's dtype.
    It may write to `out`, a tensor that an earlier layer is done with, or None. It is called in a
    thread, for the layer after the one that runs. On a GPU what it returns is copied from pinned
    memory on a stream of its own, so that the copy and the computation overlap.

    hooked: every call of a layer brings its weights, pass after pass. False: there is one pass, and
    the caller says with `arrive` and `leave` when a layer's weights are needed.
    """

    def __init__(
        self,
        model: Qwen2,
        fetch: Callable[[str, Tensor | None], Tensor],
        device: torch.device | str,
        hooked: bool = True,
    ) -> None:
        self.model, self.fetch, self.device = model, fetch, torch.device(device)
        self.hooked = hooked
        self.layers = list(model.model.layers)
        self.names = [
            [f"model.layers.{i}.{name}" for name, _ in layer.named_parameters()]
            for i, layer in enumerate(self.layers)
        ]
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.worker = ThreadPoolExecutor(1, "layers")
        self.coming: tuple[int, Future[LayerWeights]] | None = None
        self.here: LayerWeights | None = None  # of the layer that runs
        # Of layers that have run. Their main memory is used again: memory that is freed and taken
        # anew, layer after layer, is not given back to the system and grows.
        self.free: list[LayerWeights] = []
        if hooked:
            self._hook()

    def _hook(self) -> None:
        for i, layer in enumerate(self.layers):
            arrive = layer.register_forward_pre_hook(partial(self.arrive, i))
            leave = layer.register_forward_hook(partial(self.leave, i), always_call=True)
            self.model.own_hooks |= {arrive.id, leave.id}

    @torch.no_grad()
    def _load(self, i: int) -> LayerWeights:
        """Layer i's weights, in main memory and on their way to the device. Runs in the worker."""
        buffers = self._buffers(len(self.names[i]))
        held = [self.fetch(name, out) for name, out in zip(self.names[i], buffers, strict=True)]
        if self.stream is None:
            return LayerWeights(held, held, None)
        held = [x if x.is_pinned() else x.pin_memory() for x in held]
        with torch.cuda.stream(self.stream):
            weights = [x.to(self.device, non_blocking=True) for x in held]
            return LayerWeights(held, weights, self.stream.record_event())

    def _buffers(self, count: int) -> list[Tensor | None]:
        """A former layer's tensors in main memory, to write into, or None for each."""
        if not self.free:
            return [None] * count
        old = self.free.pop()
        if old.arrived is not None:
            old.arrived.synchronize()  # the device may still be reading them
        return list(old.held)

    def arrive(self, i: int, *_: object) -> None:
        """Layer i is about to run: wait for its weights, and let the next layer's come."""
        self.here = self._take(i)
        self._wait(self.here)
        for name, x in zip(self.names[i], self.here.weights, strict=True):
            self.model.set_parameter(name, x)
        self.model.make_ready(self.layers[i])
        if self.hooked or i + 1 < len(self.layers):
            self._begin((i + 1) % len(self.layers))

    def leave(self, i: int, *_: object) -> None:
        """Layer i has run, or failed."""
        for name in self.names[i]:
            self.model.set_parameter(name, None)
        if self.here is not None:
            self.free.append(self.here)
            self.here = None

    def _begin(self, i: int) -> Future[LayerWeights]:
        future = self.worker.submit(self._load, i)
        self.coming = i, future
        return future

    def _take(self, i: int) -> LayerWeights:
        """Layer i's weights, which usually come already; after a failed pass another layer's do."""
        if self.coming is not None and self.coming[0] == i:
            future = self.coming[1]
        else:
            future = self._begin(i)
        self.coming = None
        return future.result()

    def _wait(self, layer: LayerWeights) -> None:
        """The device computes only when the copies are complete."""
        if layer.arrived is None:
            return
        now = torch.cuda.current_stream(self.device)
        now.wait_event(layer.arrived)
        for x in layer.weights:
            x.record_stream(now)  # its memory is not used again before this stream is done with it
