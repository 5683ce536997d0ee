"""Fast: the same model over operations that this machine is fast at.

A faithful implementation, and so within 1.5 units of native's error (lab/compare.py), but not bit
for bit transformers': packed weights (packed.py), one product for q, k and v and one for gate and
up, and torch's fused attention. Whatever it has no faster way for, it does as native does.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqwen.config import ModelConfig
from minqwen.errors import ConfigError
from minqwen.model.arithmetic import Linear, Native, is_watched, version
from minqwen.model.attention import is_finite
from minqwen.model.packed import Form, Quantised, Whole, pack
from minqwen.model.trace import Tap
from minqwen.parallel import Mesh


class Joined:
    """The weights of linear layers with one input, as one weight in one form.

    It takes them out of the layers, all but those that another module needs too. The biases stay
    parameters, but lie side by side in one tensor.
    """

    def __init__(self, linears: Sequence[Linear], form: Form):
        self.form = form
        # Weak, so that the memory of a model that nobody holds is free at once.
        self.linears = [weakref.ref(linear) for linear in linears]
        self.sizes = [linear.out_features for linear in linears]
        self.bias = join_biases(linears)
        self.biases = [linear.bias for linear in linears]
        self.kept = [linear.weight if linear.shared else None for linear in linears]
        self.versions = [0 if weight is None else version(weight) for weight in self.kept]
        for linear in linears:
            if not linear.shared:
                del linear.weight
            linear.packed = self

    def holds(self, i: int) -> bool:
        """Whether layer i still has the weight and the bias that were joined here."""
        linear, kept = self.linears[i](), self.kept[i]
        if linear is None:
            return False
        own = linear._parameters
        return (
            own.get("weight") is kept
            and own.get("bias") is self.biases[i]
            and (kept is None or version(kept) == self.versions[i])
        )

    def serves(self, linears: Sequence[Linear]) -> bool:
        """Whether one product answers for these layers, with nobody watching a single one."""
        return (
            len(linears) == len(self.linears)
            and all(linear is own() for linear, own in zip(linears, self.linears))
            and not any(map(is_watched, linears))
            and all(map(self.holds, range(len(linears))))
        )

    def product(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all layers."""
        return split(self.form.product(x, self.bias), self.sizes, -1)

    def index(self, linear: Linear) -> int:
        return next(i for i, own in enumerate(self.linears) if own() is linear)

    def matrix(self, linear: Linear) -> Tensor:
        return split(self.form.weight(), self.sizes)[self.index(linear)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self) -> None:
        weights = split(self.form.weight(), self.sizes)
        for own, weight in zip(self.linears, weights):
            linear = own()
            if linear is None or linear.packed is not self:
                continue  # it is gone, or has got another weight meanwhile
            linear.packed = None
            if "weight" not in linear._parameters:
                linear.weight = nn.Parameter(weight.clone(), requires_grad=False)


def split(x: Tensor, sizes: list[int], dim: int = 0) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = x.split(sizes, dim)
    return parts


def join_biases(linears: Sequence[Linear]) -> Tensor | None:
    """One tensor of all biases, of which each layer's is then a part; None if there are none."""
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    if len(biases) < len(linears):
        return None
    joined = torch.cat(biases)
    for linear, part in zip(linears, split(joined, [len(bias) for bias in biases])):
        linear.bias = nn.Parameter(part, requires_grad=False)
    return joined


class Fast(Native):
    """pack: whether weights may be taken into another form; not where they come and go."""

    name = "fast"
    differentiable = False

    def __init__(self, pack: bool = True):
        self.pack = pack

    def form(self, weight: Tensor) -> Form | None:
        """The form in which a weight is kept; None: as it is."""
        return pack(weight)

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, linears: Sequence[Linear], mesh: Mesh) -> None:
        """Join and pack the weights. Those that are packed already have not changed."""
        if not self.pack or self.is_ready(linears):
            return
        weights: list[Tensor] = [linear.weight for linear in linears]
        form = self.form(weights[0] if len(weights) == 1 else torch.cat(weights))
        if form is None and len(weights) > 1 and weights[0].is_cuda:
            form = Whole(torch.cat(weights))  # fewer kernels are launched
        if form is not None:
            del weights
            Joined(linears, form)

    def is_ready(self, linears: Sequence[Linear]) -> bool:
        packed = linears[0].packed
        return isinstance(packed, Joined) and packed.serves(linears)

    def project(self, x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
        packed = getattr(linears[0], "packed", None)
        if isinstance(packed, Joined) and packed.serves(linears):
            return packed.product(x)
        return super().project(x, *linears)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        packed = linear.packed
        if isinstance(packed, Joined):
            i = packed.index(linear)
            if packed.holds(i):
                return packed.product(x)[i]
        return super().linear(x, linear)

    def product(self, x: Tensor, linear: Linear) -> Tensor:
        packed = linear.packed
        if isinstance(packed, Joined):
            i = packed.index(linear)
            if packed.holds(i):
                return split(packed.form.product(x, None), packed.sizes, -1)[i]
        return super().product(x, linear)

    def scores_held(self, q: Tensor) -> int:
        """Fused attention holds none, only a mask, and on a CPU it is faster for many rows.

        On a GPU so many rows as one score for each would allow have a mask of gigabytes.
        """
        return 1 if q.device.type == "cpu" else q.shape[1]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, tap: Tap
    ) -> Tensor:
        """By torch's fused attention, which never has all scores at a time.

        Where somebody wants to see scores or pattern, and where a NaN or infinity could pass from
        a key that a query must not see, it is native's.
        """
        if tap.sees("attn.scores") or tap.sees("attn.pattern"):
            return super().attend(q, k, v, hidden, scale, tap)
        seen = None
        if hidden is not None:
            seen = F.pad(~hidden, (k.shape[-2] - hidden.shape[-1], 0), value=True)
        # 16-bit products are slow on many CPUs, see `head_matmul`.
        wide = torch.float32 if q.element_size() == 2 and q.device.type == "cpu" else q.dtype
        z = F.scaled_dot_product_attention(
            q.to(wide), k.to(wide), v.to(wide), attn_mask=seen, scale=scale
        ).to(q.dtype)
        if hidden is None or is_finite(z):
            return z
        return super().attend(q, k, v, hidden, scale, tap)


class Int8(Fast):
    """Fast with weights and inputs of linear layers rounded to 8 bits: a mode of its own.

    It is not within rounding of the model. docs/speed.md has its error.
    """

    name = "int8"
    can_save = False

    def check(self, config: ModelConfig, dtype: torch.dtype, mesh: Mesh) -> None:
        if dtype == torch.float64 or not torch.backends.mkldnn.is_available():
            raise ConfigError(
                f"int8 arithmetic needs oneDNN and a dtype of at most 32 bits, and the dtype is "
                f"{str(dtype).removeprefix('torch.')}: use fast or native"
            )

    def form(self, weight: Tensor) -> Form | None:
        if weight.device.type != "cpu":
            raise ConfigError(f"int8 arithmetic is for CPUs, not for {weight.device}: use fast")
        return Quantised(weight) if weight.numel() else None
