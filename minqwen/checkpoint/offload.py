"""Weights that live elsewhere: layers come to the device one by one, each while the one before is computing.

For a device that is too small for the model. Embedding, final norm and head stay on it; of the layers there are at
most LAYERS_HELD at a time: one that computes, one on its way, and one whose memory is not yet free again.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from minqwen.errors import ConfigError
from minqwen.model import Qwen2

OFFLOADS = ("memory", "disk")
LAYERS_HELD = 3


def check_offload(offload: str | None) -> None:
    if offload not in (None, *OFFLOADS):
        raise ConfigError(
            f"offload is {offload!r}, expected None, {' or '.join(map(repr, OFFLOADS))}"
        )


def is_layer(name: str) -> bool:
    """Whether a parameter belongs to a layer, and so is streamed."""
    return name.startswith("model.layers.")


class LayerStream:
    """Gives each layer of `model` its weights before it runs and takes them away after.

    fetch(name, out) returns a parameter's slice of this rank in main memory, in the model's dtype, if it likes in
    `out`, which earlier layers are done with (or None); it is called in a thread, for the layer after the one that
    runs. On a GPU what it returns is copied from pinned memory on a stream of its own, so that the copy and the
    computation overlap.
    """

    def __init__(
        self,
        model: Qwen2,
        fetch: Callable[[str, Tensor | None], Tensor],
        device: torch.device | str,
    ):
        self.model, self.fetch, self.device = model, fetch, torch.device(device)
        self.names = [
            [f"model.layers.{i}.{name}" for name, _ in layer.named_parameters()]
            for i, layer in enumerate(model.model.layers)
        ]
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.worker = ThreadPoolExecutor(1, "layers")
        self.coming: tuple[int, Future] | None = None
        self.here: list[
            tuple[list[Tensor], torch.cuda.Event | None]
        ] = []  # in main memory, of the layer that runs
        self.free: list[
            tuple[list[Tensor], torch.cuda.Event | None]
        ] = []  # and of those before: to be used again,
        # because memory that is freed and taken anew, layer after layer, is not given back and grows
        for i, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(lambda *_, i=i: self.arrive(i))
            layer.register_forward_hook(lambda *_, i=i: self.leave(i), always_call=True)

    @torch.no_grad()
    def load(self, i: int) -> tuple[list[Tensor], list[Tensor], torch.cuda.Event | None]:
        """Layer i's weights in main memory, on their way to the device, and the event that says they are there."""
        old, copied = self.free.pop() if self.free else ([None] * len(self.names[i]), None)
        if copied is not None:
            copied.synchronize()
        held = [self.fetch(name, out) for name, out in zip(self.names[i], old)]
        if self.stream is None:
            return held, held, None
        held = [x if x.is_pinned() else x.pin_memory() for x in held]
        with torch.cuda.stream(self.stream):
            return (
                held,
                [x.to(self.device, non_blocking=True) for x in held],
                self.stream.record_event(),
            )

    def arrive(self, i: int) -> None:
        if self.coming is None or self.coming[0] != i:
            self.coming = i, self.worker.submit(self.load, i)
        future, self.coming = self.coming[1], None
        held, weights, event = future.result()
        if event is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(event)
            for x in weights:
                x.record_stream(
                    now
                )  # its memory is not to be used again before this stream is done with it
        self.here.append((held, event))
        for name, x in zip(self.names[i], weights):
            self.model.set_parameter(name, x)
        self.model.prepare(self.model.model.layers[i])
        following = (i + 1) % len(self.names)
        self.coming = following, self.worker.submit(self.load, following)

    def leave(self, i: int) -> None:
        for name in self.names[i]:
            self.model.set_parameter(name, None)
        self.free += self.here
        self.here = []
