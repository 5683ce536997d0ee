"""Whether a model still computes what it did: keys and values of a model that was are no use."""

from __future__ import annotations

from typing import Any

from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as nn_module

from minqwen.model.arithmetic import version
from minqwen.model.qwen2 import Qwen2


class Changes:
    """Notices what changes a model's numbers between two calls of `look`.

    It sees parameters and buffers that were written to or replaced, other modules, another `ops`,
    `eps` or `head_dim` of a module, other forward hooks on any module, a `forward` that was
    replaced on one module, and `Qwen2.prepare`. PyTorch does not count writes through `.data` or
    through numpy, so nobody can see these: call `prepare` after them.
    """

    def __init__(self, model: Qwen2):
        self.model = model
        self.interventions: list[Any] = []
        self.parts: list[Any] = []
        self.weights: list[int] = []
        self.uncounted = False  # whether there are tensors whose writes PyTorch does not count
        # An address may be used again. It means the same tensor only while that one's storage
        # lives. Weak references do not keep it alive.
        self.storages: list[StorageWeakRef] = []
        self.handles: list[int] = []  # theirs: to ask them one by one takes five times as long

    def look(self) -> bool:
        """Whether something has changed since the last call; the first call says yes."""
        parts: list[Any] = [self.model.config, self.model.preparations]
        interventions: list[Any] = [
            *nn_module._global_forward_hooks,
            *nn_module._global_forward_pre_hooks,
        ]
        tensors: list[Tensor | None] = []
        # nn.Module.modules takes five times as long, because it refuses to go twice.
        stack: list[nn.Module | None] = [self.model]
        while stack:
            module = stack.pop()
            if module is None:
                continue
            own = vars(module)
            parts += module.__class__, own.get("ops"), own.get("eps"), own.get("head_dim")
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
                interventions += _interventions(own, self.model.own_hooks)
            tensors += own["_parameters"].values()
            if own["_buffers"]:
                tensors += own["_buffers"].values()
            if own["_modules"]:
                stack += own["_modules"].values()
        return self._remember(interventions, parts, [x for x in tensors if x is not None])

    def _remember(self, interventions: list[Any], parts: list[Any], tensors: list[Tensor]) -> bool:
        """Whether this differs from what is remembered, which it then replaces."""
        weights = _places_and_versions(tensors)
        if (
            weights == self.weights
            and parts == self.parts
            and interventions == self.interventions
            and not any(map(UntypedStorage._expired, self.handles))
        ):
            return False
        self.interventions, self.parts, self.weights = interventions, parts, weights
        self.uncounted = any(x.is_inference() for x in tensors)
        self.storages = [
            StorageWeakRef(x.untyped_storage())
            for x in tensors
            if not x.is_meta  # what has no value yet cannot change
        ]
        self.handles = [storage.cdata for storage in self.storages]
        return True

    @property
    def unreliable(self) -> bool:
        """Whether what the model computes may change at any time without being noticed.

        Hooks and a replaced `forward` may do something else at every call.
        """
        return bool(self.interventions) or self.uncounted


def _places_and_versions(tensors: list[Tensor]) -> list[int]:
    """Where the tensors' values are, and how often they were written to."""
    places = [x.data_ptr() for x in tensors]
    try:
        return places + [x._version for x in tensors]
    except RuntimeError:  # some were made in inference mode
        return places + [version(x) for x in tensors]


def _interventions(module: dict[str, Any], own_hooks: set[int]) -> list[Any]:
    """The hooks of a module, except our own, and the `forward` that was put in front of its own."""
    found: list[Any] = []
    for hooks in (module["_forward_hooks"], module["_forward_pre_hooks"]):
        found += sorted(hooks.keys() - own_hooks)  # numbers that never come twice
    if "forward" in module:
        found.append(module["forward"])
    return found
