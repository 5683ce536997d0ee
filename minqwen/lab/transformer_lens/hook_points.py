"""Hook points: TransformerLens' name of a point, and the functions that are called there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from minqwen.checks import did_you_mean
from minqwen.errors import TraceError, a_kind
from minqwen.model.trace import alias_of, every_name

# Called as fn(tensor, hook=point). What it returns, if not None, takes the tensor's place.
HookFunction = Callable[..., Any]
Direction = Literal["fwd", "bwd", "both"]
# Points of TransformerLens that this forward pass has not, and what to hook instead.
NOT_HERE = {
    "hook_tokens": "change the tokens that you give",
    "hook_pos_embed": "positions are in hook_rot_q and hook_rot_k",
    "attn.hook_rot_scores": "hook attn.hook_attn_scores",
    "hook_attn_in": "hook ln1.hook_normalized",
    "hook_q_input": "hook attn.hook_q",
    "hook_k_input": "hook attn.hook_k",
    "hook_v_input": "hook attn.hook_v",
    "hook_mlp_in": "hook ln2.hook_normalized",
}


@dataclass(frozen=True)
class Handle:
    """A function that was added to a point. level: of the `hooks` context that added it."""

    function: HookFunction
    is_permanent: bool
    level: int | None


class HookPoint:
    """One point of the forward pass. ctx is the hook functions' own, until it is cleared."""

    def __init__(self, name: str):
        self.name = name
        self.ctx: dict[Any, Any] = {}
        self.fwd_hooks: list[Handle] = []
        self.bwd_hooks: list[Handle] = []

    def __repr__(self) -> str:
        return f"HookPoint({self.name!r})"

    @property
    def is_result(self) -> bool:
        """Whether it is the heads' results, which are computed only if the model is told to."""
        return self.name.endswith(".hook_result")

    @property
    def is_scale(self) -> bool:
        """Whether it is a norm's denominator, which can be seen but not replaced."""
        return self.name.endswith(".hook_scale")

    def layer(self) -> int:
        """The layer's number. Raises TraceError for a point that is in no layer."""
        if not self.name.startswith("blocks."):
            raise TraceError(f"{self.name} is in no layer")
        return int(self.name.split(".")[1])

    def add_hook(
        self,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Have `hook(tensor, hook=self)` called in each forward pass, or for each gradient."""
        if not callable(hook):
            raise TraceError(f"the hook on {self.name} is {hook!r}, expected a function")
        if dir == "bwd" and self.is_scale:
            raise TraceError(f"{self.name} is no part of the way back: hook hook_normalized")
        added = self._hooks(dir)
        added.insert(0 if prepend else len(added), Handle(hook, is_permanent, level))

    def add_perma_hook(self, hook: HookFunction, dir: Direction = "fwd") -> None:
        self.add_hook(hook, dir, is_permanent=True)

    def remove_hooks(
        self,
        dir: Direction = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove those of one level, or of all; permanent ones only if that is said."""

        def stays(handle: Handle) -> bool:
            of_level = level is None or handle.level == level
            return not (including_permanent or (of_level and not handle.is_permanent))

        for direction in ("fwd", "bwd") if dir == "both" else (dir,):
            hooks = self._hooks(direction)
            hooks[:] = [handle for handle in hooks if stays(handle)]

    def clear_context(self) -> None:
        self.ctx = {}

    def _hooks(self, dir: str) -> list[Handle]:
        if dir not in ("fwd", "bwd"):
            raise TraceError(f"dir is {dir!r}, expected 'fwd' or 'bwd'")
        return self.fwd_hooks if dir == "fwd" else self.bwd_hooks

    def called(self, tensor: Tensor) -> Tensor:
        """What the forward hooks make of a tensor. Raises TraceError for a wrong answer."""
        for handle in list(self.fwd_hooks):
            answer = handle.function(tensor, hook=self)
            if answer is not None and self.is_scale:
                raise TraceError(f"{self.name} can be seen but not replaced: hook hook_normalized")
            if answer is not None:
                tensor = self._checked(answer, tensor)
        return tensor

    def _checked(self, answer: object, tensor: Tensor) -> Tensor:
        if isinstance(answer, Tensor) and answer.shape == tensor.shape:
            return answer
        found = tuple(answer.shape) if isinstance(answer, Tensor) else a_kind(answer)
        raise TraceError(
            f"the hook on {self.name} returned {found}, expected None or a tensor "
            f"{tuple(tensor.shape)}"
        )

    def watch_gradient(self, tensor: Tensor) -> None:
        """Have the backward hooks called with the gradient of a tensor, if it has one."""
        if not tensor.requires_grad:
            return
        for handle in list(self.bwd_hooks):

            def on_gradient(gradient: Tensor, handle: Handle = handle) -> Tensor | None:
                answer = handle.function(gradient, hook=self)
                changed: Tensor | None = answer[0] if isinstance(answer, tuple) else answer
                return changed

            tensor.register_hook(on_gradient)


def hook_names(num_layers: int) -> list[str]:
    """TransformerLens' names of all points, in the order of computation."""
    names = []
    for name in every_name(num_layers):
        alias = alias_of(name)
        if alias and alias.endswith(".hook_normalized"):
            names.append(scale_of(alias))
        if alias:
            names.append(alias)
    return names


def scale_of(normalized: str) -> str:
    """The name of the denominator of a norm whose hook_normalized has this name."""
    return normalized.removesuffix("normalized") + "scale"


def unknown_point(name: str, known: list[str]) -> TraceError:
    """That there is no such point, and what there is instead."""
    inside = ".".join(name.split(".")[2:]) if name.startswith("blocks.") else name
    remedy = did_you_mean(name, known)
    if inside in NOT_HERE:
        remedy = f": {NOT_HERE[inside]}"
    return TraceError(f"there is no hook point {name!r}{remedy}")
