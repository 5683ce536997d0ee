"""Quantised weights that a model keeps as they lie in their files, in a form for products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch

from minqwen.checkpoint.quantised import PackedWeights
from minqwen.checkpoint.quantization import PackedWeight
from minqwen.model import Qwen2
from minqwen.model.arithmetic import Linear
from minqwen.model.fast import Joined
from minqwen.model.grouped import OUTPUTS, Grouped, Groups, Numbers, outputs_in_block
from minqwen.parallel import shard


class Words(Protocol):
    """What is needed of a checkpoint or of a view of one."""

    def words_of(self, name: str) -> PackedWeights | str | None:
        """What has a weight's words; why it has none, if it is quantised; else None."""


def why_not(model: Qwen2) -> str | None:
    """Why no weight of this model can stay packed; None: it may."""
    dtype = str(model.dtype).removeprefix("torch.")
    if model.device.type != "cpu":
        return f"torch's packed product is used on CPUs, and the device is {model.device.type}"
    if model.dtype != torch.bfloat16:
        return f"the dtype is {dtype}, and torch's packed product is for bfloat16"
    if outputs_in_block() is None:
        return "torch has no fast packed product for this CPU"
    return None


class Keeper:
    """Gives the linear layers of a model their quantised weights, packed where that is possible."""

    def __init__(self, model: Qwen2, checkpoint: Words):
        self.model, self.checkpoint = model, checkpoint
        self.names = {module: f"{name}.weight" for name, module in model.named_modules()}
        self.kept = 0
        self.reasons: Counter[str] = Counter()

    def keep(self, linears: Sequence[Linear]) -> bool:
        """Whether these layers, which have one input, have got their weights, packed."""
        found = why_not(self.model) or self._forms(linears)
        if isinstance(found, str):
            self.reasons[found] += sum(self._is_quantised(linear) for linear in linears)
            return False
        for some, form in found:
            Joined(some, form)
        self.kept += len(linears)
        return True

    def _is_quantised(self, linear: Linear) -> bool:
        return self.checkpoint.words_of(self.names[linear]) is not None

    def _forms(self, linears: Sequence[Linear]) -> list[tuple[list[Linear], Grouped]] | str:
        """The forms of all these layers, each with the layers it is for; or why there is one not.

        One form if the layers' inputs have one order, else one for each.
        """
        weights = []
        for linear in linears:
            weight = self._numbers(linear)
            if isinstance(weight, str):
                return weight
            weights.append(weight)
        dtype = self.model.dtype
        if all(weight.groups.same_as(weights[0].groups) for weight in weights):
            return [(list(linears), Grouped(weights, dtype))]
        return [([linear], Grouped([weight], dtype)) for linear, weight in zip(linears, weights)]

    def _numbers(self, linear: Linear) -> Numbers | str:
        name, mesh = self.names[linear], self.model.mesh
        words = self.checkpoint.words_of(name)
        if not isinstance(words, PackedWeights):
            return words or "a layer with the same input is not quantised"
        if linear.out_features % OUTPUTS:
            return f"the number of outputs is no multiple of {OUTPUTS}"
        weight = words.read(name, shard(name, self.model.config, mesh.rank, mesh.size))
        groups = Groups.of(weight.group)
        if groups is None:
            return "the inputs do not fall into whole groups of 32, 64, 128 or 256"
        numbers = numbers_of(weight, groups)
        return Numbers(words.packing.bits, groups, numbers, weight.scales, weight.zeros().byte())

    def report(self) -> str:
        """How many stay packed, and why the others do not; "" if there are none."""
        total = self.kept + sum(self.reasons.values())
        if not total:
            return ""
        line = f"{self.kept} of {total} quantised weights stay packed"
        return "; ".join([line, *(f"{n} do not: {why}" for why, n in self.reasons.items())])


def numbers_of(weight: PackedWeight, groups: Groups) -> torch.Tensor:
    """q, uint8 [inputs, outputs], sorted by group."""
    outputs, inputs = weight.shape
    numbers = torch.empty(inputs, outputs, dtype=torch.uint8)
    for start in range(0, inputs, 256):
        stop = min(inputs, start + 256)
        numbers[start:stop] = weight.numbers(start, stop)
    return numbers if groups.order is None else numbers[groups.order]
