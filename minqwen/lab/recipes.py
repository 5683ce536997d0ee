"""Every recipe of head extension, right and wrong, tried on one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minqwen.config import ModelConfig
from minqwen.errors import MinqwenError
from minqwen.heads.layout import RECIPES, Layout, extended_config, layout
from minqwen.heads.tensors import extend_tensor
from minqwen.lab.faults import HEAD_FAULTS, Variant, Weights, build
from minqwen.lab.verify import LayerMap, Report, compare_models, inspect_layers, problems
from minqwen.model import Qwen2

KINDS = (  # (dtype, arithmetic) in which every recipe is tried
    (torch.float32, "native"),
    (torch.bfloat16, "native"),
    (torch.float32, "exact"),
)
GREEDY_TOKENS = 8  # compared in float32 only: greedy text takes most of the time
ALPHA = 0.3  # of recipe weighted


@dataclass(frozen=True)
class Trial:
    """What became of one recipe: a report for each of KINDS, or the error of one that cannot run.

    problems: the rules that are broken, in words. first_wrong: "LAYER STAGE" of the first
    difference in float32, or None.
    """

    name: str
    is_right: bool  # whether it should give the same model
    reports: list[Report]
    problems: list[str]
    first_wrong: str | None
    error: str | None = None

    @property
    def as_expected(self) -> bool:
        """Whether a right recipe was found right, and a wrong one wrong."""
        found_right = not self.error and not self.problems and all(r.same for r in self.reports)
        return found_right == self.is_right


def right_recipes(config: ModelConfig) -> dict[str, Layout]:
    """Layouts that must all give the same model, by a name such as "ghost 32/4"."""
    H, K = config.num_attention_heads, config.num_key_value_heads
    wide = -(-H // (2 * K)) * 2 * K
    found = {
        f"{recipe} {wide}/{K}": layout(config, wide, recipe=recipe, alpha=ALPHA)
        for recipe in RECIPES
    }
    found[f"ghost {wide}/{2 * K}"] = layout(config, wide, 2 * K)
    found[f"split {2 * H}/{K}"] = layout(config, 2 * H, recipe="split")
    found[f"full MHA {H}/{H}"] = layout(config, None, H)
    return found


def try_recipes(config: ModelConfig, weights: Weights, ids: Tensor) -> Iterator[Trial]:
    """A trial of each right recipe and of each fault, on ids [B, T]; one model at a time."""
    trials = _Trials(config, weights, ids)
    for name, to in right_recipes(config).items():
        to.check()
        wide = {tensor: extend_tensor(tensor, w, to) for tensor, w in weights.items()}
        yield trials.run(name, True, (extended_config(config, to), wide))
    for name, fault in HEAD_FAULTS.items():
        yield trials.run(name, False, fault.apply(config, weights))


class _Trials:
    """The original in every kind, beside which each variant is put."""

    def __init__(self, config: ModelConfig, weights: Weights, ids: Tensor):
        self.config, self.weights, self.ids = config, weights, ids
        self.truth = build(config, weights, dtype=torch.float64)
        self.originals = [build(config, weights, d, arithmetic) for d, arithmetic in KINDS]

    def run(self, name: str, is_right: bool, variant: Variant) -> Trial:
        config, wide = variant
        try:
            models = [build(config, wide, dtype, arithmetic) for dtype, arithmetic in KINDS]
        except MinqwenError as error:
            return Trial(name, is_right, [], [], None, str(error))
        if config.head_dim == self.config.head_dim:
            maps = inspect_layers(self.config, config, self.weights.__getitem__, wide.__getitem__)
            reports = self._compare(models, maps)
            first = reports[0]
            stage = f"{first.first_layer} {first.first_stage}" if first.first_stage else None
            return Trial(name, is_right, reports, problems(maps), stage)
        said = (
            f"head_dim {config.head_dim} instead of {self.config.head_dim}: "
            "rows of every head are dropped"
        )
        return Trial(name, is_right, self._compare(models, []), [said], "0 q")

    def _compare(self, models: list[Qwen2], maps: list[LayerMap]) -> list[Report]:
        return [
            compare_models(a, b, self.truth, self.ids, maps, 0 if i else GREEDY_TOKENS)
            for i, (a, b) in enumerate(zip(self.originals, models))
        ]
