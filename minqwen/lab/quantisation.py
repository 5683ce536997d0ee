"""What quantising a checkpoint costs: the logits of both models on one text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minqwen.checkpoint import Checkpoint, load_pretrained
from minqwen.lab.compare import Compared, LogitDifference, logit_difference


@dataclass(frozen=True)
class Loss:
    """How far a quantised model is from its source.

    difference: of the logits of both in float64, so that it is the weights' alone. dtype: the
    source's own (float32, if that is float64). unit: the source's error in that dtype. units: the
    quantised model's error, in these (lab/compare.py).
    """

    tokens: int
    dtype: str
    unit: float
    units: float
    difference: LogitDifference


def measure_loss(source: str | Path, quantised: str | Path, ids: Sequence[int]) -> Loss:
    """Run both checkpoints over one text, at least 2 ids.

    The layers come from the disk one by one, so that no model is in memory as a whole.
    """
    text = torch.tensor([list(ids)])
    dtype = Checkpoint(source).config.dtype
    if dtype == "float64":
        dtype = "float32"  # float64 has no truth above it
    truth = logits(source, text, "float64")
    candidate = logits(quantised, text, "float64")
    compared = Compared(truth, candidate, logits(source, text, dtype), truth)
    return Loss(
        tokens=len(ids),
        dtype=dtype,
        unit=compared.unit,
        units=compared.units,
        difference=logit_difference(truth, candidate, text),
    )


@torch.no_grad()
def logits(path: str | Path, ids: Tensor, dtype: str) -> Tensor:
    """Of a checkpoint, computed in `dtype`; [1, T, V] in float64."""
    model = load_pretrained(path, dtype=dtype, device="cpu", offload="disk")
    found: Tensor = model(ids)
    return found.double()


def by_kind(errors: Mapping[str, float]) -> dict[str, float]:
    """{"q_proj": the root mean square of the errors of all q_proj, ...}."""
    kinds: dict[str, list[float]] = {}
    for name, error in errors.items():
        kinds.setdefault(name.split(".")[-2], []).append(error)
    return {
        kind: math.sqrt(sum(error**2 for error in found) / len(found))
        for kind, found in kinds.items()
    }
