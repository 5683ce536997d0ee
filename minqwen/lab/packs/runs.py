"""One model in several arithmetics and dtypes over several prompts, every point kept by name.

A run's name is "float64", the truth, or an arithmetic and a dtype: "native-bfloat16",
"exact-float32".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minqwen.checkpoint import load_pretrained
from minqwen.checks import did_you_mean
from minqwen.errors import PackError
from minqwen.files import quoted
from minqwen.lab.packs.streaming import StreamedModel
from minqwen.model import Native, Qwen2
from minqwen.model.trace import Rows, TracingTap, point_of

Tensors = dict[str, Tensor]  # {point: tensor without a batch dimension}, in order of computation


@dataclass(frozen=True)
class Run:
    """How a model is computed. arithmetic: a name, or the object itself."""

    name: str
    dtype: str
    arithmetic: str | Native

    @property
    def exact(self) -> bool:
        """Whether every machine must give the same bits."""
        return self.arithmetic == "exact"


TRUTH = "float64"
RUNS = {
    run.name: run
    for run in [
        Run(TRUTH, "float64", "native"),
        *(
            Run(f"{arithmetic}-{dtype}", dtype, arithmetic)
            for arithmetic in ("native", "exact")
            for dtype in ("float32", "bfloat16", "float16")
        ),
    ]
}


def find_run(name: object) -> Run:
    """The run of that name. Raises PackError."""
    if not isinstance(name, str) or name not in RUNS:
        raise PackError(
            f"there is no run {quoted(name)}, expected one of {', '.join(RUNS)}"
            f"{did_you_mean(str(name), RUNS)}"
        )
    return RUNS[name]


def compute(
    model_dir: Path, run: Run, prompts: list[list[int]], names: set[str], streamed: bool
) -> Iterator[Tensors]:
    """What passes the points in `names`, of one prompt after another; each prompt runs alone.

    [T, D], [T, H, d], scores and patterns [H, T, T], logits [T, V], in the run's dtypes. streamed:
    the model is read layer by layer, and then all prompts are in memory together.
    """
    if streamed:
        model = StreamedModel(model_dir, run.dtype, run.arithmetic)
        yield from record_streamed(model, prompts, names)
        return
    whole = load_pretrained(model_dir, dtype=run.dtype, arithmetic=run.arithmetic, device="cpu")
    for ids in prompts:
        yield record(whole, ids, names)


@torch.no_grad()
def record(model: Qwen2, ids: list[int], names: set[str]) -> Tensors:
    """What passes the points in `names` of one prompt."""
    recorder = Recorder()
    model(torch.tensor([ids]), tap=TracingTap(model, names, recorder))
    return recorder.seen


def record_streamed(
    streamed: StreamedModel, prompts: list[list[int]], names: set[str]
) -> list[Tensors]:
    """The same of several prompts, layer by layer."""
    recorders = [Recorder() for _ in prompts]
    model = streamed.model
    streamed.run(prompts, lambda n: TracingTap(model, names, recorders[n]))
    return [recorder.seen for recorder in recorders]


class Recorder:
    """Keeps a copy of all that a tap shows of one prompt."""

    def __init__(self) -> None:
        self.seen: Tensors = {}

    def __call__(self, name: str, x: Tensor, rows: Rows | None) -> None:
        if point_of(name).shape.startswith("H T"):
            x = x[0]  # [1, H, T, T]: scores and patterns have a batch dimension
        self.seen[name] = x.detach().clone(memory_format=torch.contiguous_format)
