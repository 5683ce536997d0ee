"""How fast this machine is and how much memory a model takes here, as notes for the doctor.

Nothing here can be wrong, so no outcome has anything to be compared with. Each function yields its
outcomes one after the other, with `figures` for whoever reads the report with a program.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from minqwen.config import ModelConfig
from minqwen.errors import kind_and_words
from minqwen.lab.bench.contestants import Contestant, read_contestant
from minqwen.lab.bench.jobs import Job, decode_job
from minqwen.lab.bench.ours import load
from minqwen.lab.bench.roofs import Roofs, least_seconds, measure_roofs
from minqwen.lab.bench.setup import Setup
from minqwen.lab.bench.timing import Run, Spread
from minqwen.lab.bench.turns import Turns
from minqwen.lab.device import Outcome
from minqwen.lab.peak_memory import TIED, measure
from minqwen.lab.peak_memory import Job as MemoryJob
from minqwen.lab.planner import GB, Planner
from minqwen.model.memory import memory_of
from minqwen.parallel import Mesh

STEP_TOKENS = 2048
MOST_RUNS = 5  # after the first, which warms up
SMALL_JOBS = [Job("prefill", 1, 128, 1), decode_job(1, 64, 8, STEP_TOKENS)]
FULL_JOBS = [
    Job("prefill", 1, 2048, 1),
    decode_job(1, 1024, 16, STEP_TOKENS),
    decode_job(32, 1024, 16, STEP_TOKENS),
]
CPU_JOBS = [Job("prefill", 1, 128, 1), decode_job(1, 64, 4, STEP_TOKENS)]  # of a full shape


def roofs_of(device: str, seconds: float, into: Roofs) -> Iterator[Outcome]:
    """The limits, which are also written to `into` for the sections that come later."""
    began = time.perf_counter()
    found = measure_roofs(device, seconds)
    into.reads, into.products = found.reads, found.products
    best = max(found.reads, key=lambda name: found.reads[name])
    note = (
        f"{found.bandwidth / GB:,.1f} GB/s by {best!r}, the best of {len(found.reads)} operations"
    )
    yield Outcome("roof", "reading memory", note=note, figures=found.reads)
    note = ", ".join(f"{name} {rate / 1e12:,.2f}" for name, rate in found.products.items())
    seconds = time.perf_counter() - began
    yield Outcome("roof", "products, TFLOP/s", seconds=seconds, note=note, figures=found.products)


def setup_for(model: str | None, size: str | None, device: str, jobs: list[Job]) -> Setup:
    """Of the checkpoint, or of random weights of an official size; the contestant comes later."""
    return Setup(
        contestant=read_contestant("native", "bfloat16"),
        model=model,
        size=size,
        layers=None,
        device=device,
        threads=torch.get_num_threads(),
        longest=max(job.longest for job in jobs),
        batch=max(job.batch for job in jobs),
        step_tokens=STEP_TOKENS,
    )


def speeds(setup: Setup, who: list[str], jobs: list[Job], roofs: Roofs) -> Iterator[Outcome]:
    """One note for each contestant and job, and on a GPU one for its memory."""
    family = f"speed of {setup.size or 'the model'}"
    lacking = lacks_memory(setup)
    if lacking:
        yield Outcome(family, "all", note=f"skipped: {lacking}")
        return
    for text in who:
        contestant = read_contestant(text, "bfloat16")
        try:
            yield from _speeds_of(replace(setup, contestant=contestant), jobs, roofs, family)
        except Exception as error:  # one arithmetic that cannot run must not hide the others
            yield Outcome(family, contestant.name, note=f"skipped: {kind_and_words(error)}")


def _speeds_of(setup: Setup, jobs: list[Job], roofs: Roofs, family: str) -> Iterator[Outcome]:
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    engine = load(setup, Mesh())
    for job in jobs:
        began = time.perf_counter()
        runs = [engine.run(job.asks(engine.vocab_size, turn)) for turn in range(MOST_RUNS + 1)][1:]
        outcome = described(setup.contestant, setup.config(), job, runs, roofs)
        outcome.family, outcome.seconds = family, time.perf_counter() - began
        yield outcome
    if setup.device == "cuda":
        yield _memory_on_gpu(setup, family)


def described(
    contestant: Contestant, config: ModelConfig, job: Job, runs: list[Run], roofs: Roofs
) -> Outcome:
    """The median, tokens per second, and the share of the roofs where these were measured."""
    seconds = Spread.of([run.seconds(job) for run in runs]).median
    tokens = job.batch * (job.prompt if job.kind == "prefill" else 1)
    figures = {"seconds": seconds, "tokens_per_second": tokens / seconds}
    note = f"{seconds * 1e3:,.1f} ms, {tokens / seconds:,.1f} tokens/s"
    least = least_seconds(roofs, contestant, config, job) if roofs.reads else None
    if least:
        figures["share_of_roof"] = least / seconds
        note += f", {least / seconds:.0%} of the roof"
    return Outcome("speed", f"{contestant.name}, {job.name}", note=note, figures=figures)


def lacks_memory(setup: Setup) -> str:
    """Why the weights do not fit on the device with some room beside them; "" if they do."""
    device = torch.device(setup.device)
    needed, there = setup.config().weight_bytes(), memory_of(device)
    if needed * 5 // 4 < there:
        return ""
    return f"the weights take {needed / GB:.1f} GB of {there / GB:.1f} GB"


# ---- memory -------------------------------------------------------------------------------------


def memory_on_cpu() -> Iterator[Outcome]:
    """The planner's estimate beside what a process took: 2 of the 0.5B's layers, 4 prompts."""
    began = time.perf_counter()
    job = MemoryJob(TIED, "float32", prompts=4, length=64, tokens=256)
    try:
        found = measure(job)
    except Exception as error:
        yield Outcome(
            "memory", "predicted beside measured", note=f"skipped: {kind_and_words(error)}"
        )
        return
    outcome = compared_memory("memory", found.predicted, found.measured)
    outcome.seconds = time.perf_counter() - began
    yield outcome


def _memory_on_gpu(setup: Setup, family: str) -> Outcome:
    """The planner's estimate for the load beside the most that PyTorch held."""
    planner = Planner(
        setup.config(),
        dtype=setup.contestant.form,
        max_num_batched_tokens=setup.step_tokens,
        device=setup.device,
    )
    estimate = planner.estimate(setup.longest, setup.batch)
    outcome = compared_memory(family, estimate.total, torch.cuda.max_memory_allocated())
    outcome.name = f"{setup.contestant.name}, memory"
    return outcome


def compared_memory(family: str, predicted: int, measured: int) -> Outcome:
    note = (
        f"{predicted / GB:.2f} GB predicted, {measured / GB:.2f} GB measured "
        f"({measured / predicted:.0%})"
    )
    figures = {"predicted_bytes": float(predicted), "measured_bytes": float(measured)}
    return Outcome(family, "predicted beside measured", note=note, figures=figures)


# ---- several GPUs -------------------------------------------------------------------------------


def on_gpus(setup: Setup, jobs: list[Job], roofs: Roofs) -> Iterator[Outcome]:
    """Tensor parallelism over all the GPUs that can share the heads, in processes of their own."""
    count = torch.cuda.device_count()
    config = setup.config()
    degrees = [n for n in range(2, count + 1) if config.num_attention_heads % n == 0]
    if not degrees:
        yield Outcome("several GPUs", "speed", note=f"skipped: there are {count} GPUs")
        return
    contestant = replace(setup.contestant, degree=degrees[-1])
    with Turns([replace(setup, contestant=contestant)], {}, lambda text: None) as turns:
        (result,) = turns.run_together(jobs, 3)
    if result.error:
        yield Outcome("several GPUs", contestant.name, note=f"skipped: {result.error}")
        return
    for job in jobs:
        outcome = described(contestant, config, job, result.runs[job.name], roofs)
        outcome.family = "several GPUs"
        yield outcome
