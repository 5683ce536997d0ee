"""Starts the contestants, each in a process of its own, and lets them take turns.

In every round each contestant runs every job once, one after the other, so that a change of the
machine's speed meets all of them. A process of its own keeps their threads, their memory and their
processor time apart, and a peer may live in another Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minqwen.errors import MinqwenError
from minqwen.lab.bench.contestants import Contestant
from minqwen.lab.bench.jobs import Job
from minqwen.lab.bench.roofs import Roofs
from minqwen.lab.bench.setup import Setup
from minqwen.lab.bench.timing import Mark, Run

PACKAGE = Path(__file__).resolve().parents[3]  # the directory that `minqwen` is in
MODULE = "minqwen.lab.bench.worker"
Say = Callable[[str], None]


@dataclass
class Result:
    """What became of one contestant. Runs are by the job's name, the warm-up not among them.

    error: why it did not take part, or stopped. missing: whether it is only not installed.
    """

    contestant: Contestant
    runs: dict[str, list[Run]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)  # bytes, after the job's last run
    version: str = ""
    load_seconds: float = 0.0
    error: str = ""
    missing: bool = False


class Process:
    """A worker, and the lines that go to it and come from it."""

    def __init__(self, setup: Mapping[str, Any], python: str, threads: int, ranks: int = 1):
        path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
        self.setup = tempfile.NamedTemporaryFile("w", suffix=".json")
        self.setup.write(json.dumps(setup))
        self.setup.flush()
        self.log = tempfile.TemporaryFile("w+")
        start = [python, "-m", MODULE]
        if ranks > 1:
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            start = [python, "-m", *launcher, "-m", MODULE]
        self.child = subprocess.Popen(
            [*start, self.setup.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path},
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a line, and wait for the answer."""
        assert self.child.stdin is not None
        try:
            print(json.dumps(request), file=self.child.stdin, flush=True)
        except BrokenPipeError:
            return {"error": self._last_words()}
        return self.hear()

    def hear(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            return {"error": self._last_words()}
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        code = self.child.wait()
        self.log.seek(0)
        lines = self.log.read().strip().splitlines() or ["no output"]
        return f"its process ended with code {code}: {lines[-1]}"

    def say_goodbye(self) -> None:
        """Without more lines to read a worker ends; `close` waits for that."""
        assert self.child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()

    def close(self) -> None:
        self.say_goodbye()
        assert self.child.stdout is not None
        self.child.stdout.close()
        try:
            self.child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.setup.close()
        self.log.close()


class Turns:
    """All contestants with their processes. Use it with `with`, which ends the processes."""

    def __init__(self, setups: list[Setup], pythons: Mapping[str, str], say: Say):
        self.setups, self.pythons, self.say = setups, pythons, say
        self.results = [Result(setup.contestant) for setup in setups]
        self.processes: dict[int, Process] = {}

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes.values():
            process.say_goodbye()
        for number in list(self.processes):
            self._drop(number)

    def run_together(self, jobs: list[Job], rounds: int) -> list[Result]:
        """All contestants in memory at once, every round of all of them after the other."""
        for number in range(len(self.setups)):
            self._load(number)
        for job in jobs:
            for turn in range(rounds + 1):
                for number in list(self.processes):
                    self._take_turn(number, job, turn)
            self.say(f"{job.name}: {rounds} rounds done")
        return self.results

    def run_in_sequence(self, jobs: list[Job], rounds: int) -> list[Result]:
        """One contestant after the other: for a device that does not hold them all."""
        for number, result in enumerate(self.results):
            self._load(number)
            for job in jobs:
                for turn in range(rounds + 1):
                    self._take_turn(number, job, turn)
            if number in self.processes:
                self._drop(number)
                self.say(f"{result.contestant.name}: done")
        return self.results

    def _load(self, number: int) -> None:
        setup, result = self.setups[number], self.results[number]
        python = self.pythons.get(setup.contestant.engine, sys.executable)
        ranks = setup.contestant.ranks
        process = Process(setup.as_json(), python, setup.threads, ranks)
        self.processes[number] = process
        heard = process.hear()
        if self._stops(number, heard):
            return
        result.load_seconds, result.version = heard["seconds"], heard["version"]
        self.say(f"{result.contestant.name}: loaded in {result.load_seconds:.1f} s")

    def _take_turn(self, number: int, job: Job, turn: int) -> None:
        """Run the job once. The first turn warms up, and is not kept."""
        if number not in self.processes:
            return
        result = self.results[number]
        heard = self.processes[number].ask({"job": asdict(job), "seed": turn})
        if self._stops(number, heard):
            return
        result.peaks[job.name] = heard["peak"]
        if turn:
            marks = [Mark(*mark) for mark in heard["marks"]]
            result.runs.setdefault(job.name, []).append(Run(marks, heard["tokens"]))

    def _stops(self, number: int, heard: Mapping[str, Any]) -> bool:
        """Note an answer that is an error. That contestant has no more turns."""
        result = self.results[number]
        result.error = heard.get("missing") or heard.get("error") or ""
        result.missing = "missing" in heard
        if result.error:
            self.say(f"{result.contestant.name}: left out: {result.error}")
            self._drop(number)
        return bool(result.error)

    def _drop(self, number: int) -> None:
        self.processes.pop(number).close()


def roofs_of(device: str, threads: int, seconds: float) -> Roofs:
    """Measured in a process of its own, as everything is. Raises MinqwenError if that ends."""
    process = Process(
        {"roofs": device, "threads": threads, "seconds": seconds}, sys.executable, threads
    )
    heard = process.hear()
    process.close()
    if "error" in heard:
        raise MinqwenError(f"the roofs cannot be measured: {heard['error']}")
    return Roofs(**heard)
