"""Packs a step and runs it: completions in, the logits of their last tokens out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from minqwen.engine.captured import CapturedModel
from minqwen.engine.graphs import Steps, steps_of
from minqwen.engine.scheduler import Scheduled
from minqwen.engine.tracing import StepTrace
from minqwen.errors import one_line, told, warn
from minqwen.model import Batch, KVCache, Qwen2
from minqwen.model.kv_cache import Int8KVCache
from minqwen.model.trace import UNTRACED, TracingTap


@dataclass(frozen=True)
class StepLogits:
    """Logits [N, V] of a step: for each of its completions the rows `starts[i]` to `ends[i]`."""

    logits: Tensor
    starts: Sequence[int]
    ends: Sequence[int]
    failures: Mapping[int, str]  # completions whose hooks failed, and why

    def of(self, i: int) -> Tensor:
        """All rows of completion i [n, V]: several only where the prompt's logits are wanted."""
        return self.logits[self.starts[i] : self.ends[i]]

    def last(self) -> Tensor:
        """The row of each completion's last token [B, V]."""
        if len(self.ends) == len(self.logits):
            return self.logits
        return self.logits[[end - 1 for end in self.ends]]


def joined(steps: Sequence[StepLogits | str]) -> StepLogits:
    """The logits of steps of one completion each as those of one step.

    Of a step that failed there is the reason; its completion has a row of zeros. Not all failed.
    """
    done = next(one for one in steps if isinstance(one, StepLogits))
    logits: list[Tensor] = []
    ends: list[int] = []
    failures: dict[int, str] = {}
    for i, one in enumerate(steps):
        if isinstance(one, str):
            failures[i] = one
            logits.append(torch.zeros_like(done.logits[:1]))
        else:
            failures.update((i, why) for why in one.failures.values())
            logits.append(one.logits)
        ends.append(len(logits[-1]) + (ends[-1] if ends else 0))
    starts = [end - len(rows) for end, rows in zip(ends, logits)]
    return StepLogits(torch.cat(logits), starts, ends, failures)


class Runner:
    """Runs steps on one model and its cache. It is the only caller of the forward pass here.

    max_model_len, max_num_seqs: the longest sequence and the most of them that come. enforce_eager:
    nothing is compiled or captured on a GPU.
    """

    def __init__(
        self,
        model: Qwen2,
        cache: KVCache,
        max_model_len: int,
        max_num_seqs: int,
        enforce_eager: bool = False,
    ):
        self.model, self.cache = model, cache
        self.max_model_len, self.max_num_seqs = max_model_len, max_num_seqs
        self.enforce_eager = enforce_eager
        self.steps: Steps | CapturedModel | None = None
        self.why_eager = ""  # why there are none, if they were asked for

    def renew(self) -> None:
        """Begin anew with a model that has changed.

        If it has another dtype now, or is on another device, it needs another cache.
        """
        self._renew_cache()
        # Before there are others, so that their memory is free.
        self.steps, self.why_eager = None, ""
        if not self.enforce_eager:
            try:
                self.steps = steps_of(self.model, self.cache, self.max_model_len, self.max_num_seqs)
            except Exception as error:
                self._give_up(error)

    def _renew_cache(self) -> None:
        cache, model = self.cache, self.model
        if (cache.dtype, cache.pool.device) != (model.dtype, model.device):
            kv_dtype = "int8" if isinstance(cache, Int8KVCache) else "auto"
            self.cache = model.new_cache(cache.num_blocks, cache.block_size, kv_dtype)

    @torch.inference_mode()
    def run(self, step: list[Scheduled], eager: bool = False) -> StepLogits:
        """One forward pass: writes the new ids' keys and values, and returns logits.

        eager: through the modules, because of hooks, or for logits that outlast the next step.
        """
        num_logits = [item.count if item.completion.wants_prompt_logits else 1 for item in step]
        ends = list(accumulate(num_logits))
        starts = [end - n for end, n in zip(ends, num_logits)]
        trace = StepTrace(step, starts, ends)
        packed = partial(pack, step, num_logits, self.cache.block_size, self.model.device)
        if self.steps is not None:
            self.cache.clear(new_last_blocks(step, self.cache.block_size))
            if not eager and not trace.names:
                compiled = self._run_compiled(self.steps, step, packed)
                if compiled is not None:
                    return StepLogits(compiled, starts, ends, trace.failures)
        ids, batch = packed()
        tap = TracingTap(self.model, trace.names, trace.show) if trace.names else UNTRACED
        logits: Tensor = self.model(ids, batch, self.cache, tap)
        return StepLogits(logits, starts, ends, trace.failures)

    def _run_compiled(
        self,
        steps: Steps | CapturedModel,
        step: list[Scheduled],
        packed: Callable[[], tuple[Tensor, Batch]],
    ) -> Tensor | None:
        """Logits; None, and no step is compiled from then on, where that does not work."""
        try:
            return steps.run(step, packed)
        except Exception as error:
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        """Go on without compiled steps, and say why.

        Where memory is lacking too: captured steps take more of it than others.
        """
        self.steps, self.why_eager = None, one_line(told(error))
        warn(f"steps are not compiled or captured from now on: {self.why_eager}", stacklevel=2)


def new_last_blocks(step: Sequence[Scheduled], block_size: int) -> list[int]:
    """The blocks that this step begins to fill and does not fill to their ends."""
    return [
        item.completion.blocks[item.end // block_size]
        for item in step
        if item.end % block_size and item.end // block_size * block_size >= item.completion.computed
    ]


def pack(
    step: list[Scheduled], num_logits: Sequence[int], block_size: int, device: torch.device
) -> tuple[Tensor, Batch]:
    """The step's new ids in one row [T], and the batch that says where they belong."""
    ids: list[int] = []
    for item in step:
        ids += item.completion.ids[item.completion.computed : item.end]
    batch = Batch.paged(
        query_lens=[item.count for item in step],
        context_lens=[item.end for item in step],
        blocks=[item.completion.blocks for item in step],
        block_size=block_size,
        num_logits=num_logits,
        device=device,
    )
    return torch.tensor(ids).to(device, non_blocking=True), batch
