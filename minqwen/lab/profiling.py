"""Where the time of an engine's step goes, by torch.profiler.

The model's text holds no labels. While a profile is taken, methods of its arithmetic, its mesh and
its scheduler are wrapped in `record_function`, on these objects only. Every operation belongs to
the nearest label around it; a softmax is taken out by its own name. Times are exclusive, so the
categories add up to the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from minqwen.engine.llm import LLM
from minqwen.lab.bench.jobs import Job
from minqwen.sampling.params import SamplingParams

STEP = "the step"
FORWARD = "the forward pass"
GEMMS, ATTENTION, SOFTMAX = "matrix products", "attention", "softmax"
NORMS, ROTARY, ELEMENTWISE = "norms", "rotary", "elementwise"
COPIES, SAMPLING, SCHEDULING = "copies", "sampling", "scheduling and text"
COMMUNICATION, IDLE = "communication", "the device waits"
CATEGORIES = (
    *(GEMMS, ATTENTION, SOFTMAX, NORMS, ROTARY, ELEMENTWISE),
    *(COPIES, SAMPLING, SCHEDULING, COMMUNICATION, IDLE),
)
OF_ARITHMETIC = {  # methods whose time is a category; what else a method calls has its own
    "linear": GEMMS,
    "row_parallel_linear": GEMMS,
    "project": GEMMS,
    "attend_paged": ATTENTION,
    "rms_norm": NORMS,
    "rotate": ROTARY,
    "silu_mul": ELEMENTWISE,
}
OF_MESH = dict.fromkeys(("all_reduce", "all_gather", "broadcast"), COMMUNICATION)
COPIES_BY_NAME = {
    f"aten::{name}" for name in ("copy_", "clone", "contiguous", "to", "_to_copy", "cat")
}
Act = Callable[..., Any]


@dataclass(frozen=True)
class Profile:
    """seconds: of each category, in all steps together. whole: of the steps, seen from outside.

    unwatched: seconds of as many steps without the profiler. fused: attention is one operation,
    whose softmax cannot be seen apart.
    """

    kind: str  # "prefill" or "decode"
    steps: int
    seconds: dict[str, float]
    whole: float
    unwatched: float
    fused: bool

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def lines(self) -> list[str]:
        """The table, the largest first, and how well it adds up."""
        found = [f"{self.kind}: {self.whole / self.steps * 1e3:,.2f} ms a step, {self.steps} steps"]
        for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            found.append(
                f"  {name:22}{seconds / self.steps * 1e3:10,.3f} ms{seconds / self.whole:8.1%}"
            )
        found.append(
            f"  together{self.total / self.whole:38.1%} of the step; without the profiler it takes "
            f"{self.unwatched / self.steps * 1e3:,.2f} ms"
        )
        if self.fused:
            found.append("  attention is one operation: its softmax is a part of it")
        return found

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


def profile_job(llm: LLM, job: Job, trace: str | None = None) -> Profile:
    """Of a prefill, or of the decode steps in which all take part.

    trace: where a Chrome trace goes. The job runs three times: to warm up, without the profiler,
    and with it.
    """
    device = llm.model.device.type
    times = [_steps(llm, job, turn) for turn in range(2)]
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with labels(llm), profile(activities=activities) as watch:
        whole, steps = _steps(llm, job, 2, watched=True)
    if trace:
        watch.export_chrome_trace(trace)
    events = list(watch.events() or [])
    seconds = by_category(events, device)
    if device == "cuda":
        seconds[IDLE] = max(0.0, whole - sum(seconds.values()))
    fused = any("scaled_dot_product" in event.name for event in events)
    return Profile(job.kind, steps, seconds, whole, times[1][0], fused)


def _steps(llm: LLM, job: Job, seed: int, watched: bool = False) -> tuple[float, int]:
    """(seconds, number) of the steps that count: the prefill's, or those that follow it."""
    params = SamplingParams(temperature=0, max_tokens=job.new, ignore_eos=True)
    for ask in job.asks(llm.config.vocab_size, seed):
        llm.add_request(ask.prompt, params)
    whole, steps, started = 0.0, 0, set[str]()
    while llm.has_unfinished_requests:
        counts = _counts(llm, job, len(started))
        began = _now(llm)
        with record_function(STEP) if watched and counts else nullcontext():
            deltas = llm.step()
        ended = _now(llm)
        started |= {delta.request_id for delta in deltas if delta.token_ids}
        if counts:
            whole, steps = whole + ended - began, steps + 1
    return whole, steps


def _counts(llm: LLM, job: Job, started: int) -> bool:
    """Whether the next step is one of the prefill, or one in which every request gets a token."""
    if job.kind == "prefill":
        return started < job.batch
    return started == job.batch == len(llm.core.requests)


def _now(llm: LLM) -> float:
    if llm.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- labels -------------------------------------------------------------------------------------


@contextmanager
def labels(llm: LLM) -> Iterator[None]:
    """Within it, the parts of a step run under the labels of their categories."""
    ops = llm.model.model.norm.ops
    with ExitStack() as stack:
        wrapped: list[tuple[Any, dict[str, str]]] = [
            (ops, OF_ARITHMETIC),
            (llm.model.mesh, OF_MESH),
            (llm.core.runner, {"run": FORWARD}),
            (llm.core.scheduler, {"schedule": SCHEDULING}),
        ]
        for owner, names in wrapped:
            for name, label in names.items():
                stack.enter_context(mock.patch.object(owner, name, labelled(owner, name, label)))
        yield


def labelled(owner: object, name: str, label: str) -> Act:
    function: Act = getattr(owner, name)

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        with record_function(label):
            return function(*args, **options)

    return run


# ---- times --------------------------------------------------------------------------------------


def by_category(events: Iterable[FunctionEvent], device: str) -> dict[str, float]:
    """Seconds of all operations inside labelled steps, each in one category."""
    found = dict.fromkeys(CATEGORIES, 0.0)
    for event in events:
        around = list(_around(event))
        if STEP not in around:
            continue
        self_time = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        found[category(event.name, around)] += self_time / 1e6
    return {name: seconds for name, seconds in found.items() if seconds}


def _around(event: FunctionEvent) -> Iterator[str]:
    """The names of the event and of what it is in, from the inside out."""
    at: FunctionEvent | None = event
    while at is not None:
        yield at.name
        at = at.cpu_parent


def category(name: str, around: list[str]) -> str:
    """That of an operation inside labels. around: names from the inside out, its own the first."""
    if any("::" in each and "softmax" in each for each in around):  # an operation of that name
        return SOFTMAX
    label = next(each for each in around if each in (*CATEGORIES, FORWARD, STEP))
    if label in CATEGORIES:
        return label
    if name in COPIES_BY_NAME:
        return COPIES
    if label == FORWARD:
        return ELEMENTWISE
    return SCHEDULING if name == STEP else SAMPLING
