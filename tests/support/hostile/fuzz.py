"""Fuzzing of every kind of file that is read: `python tests/support/hostile/fuzz.py --help`.

Case number i of a target follows from the seed, the target and i, so it can be made again:

  python tests/support/hostile/fuzz.py --count 1000                 # of each target
  python tests/support/hostile/fuzz.py --count 1000 --out fuzz      # goes on where it was
  python tests/support/hostile/fuzz.py --target index --show 17     # one case, with its traceback

A case is one file of a small sound directory with one to three changes (mutations.py). It is read
in a fork of a warm process. What must come of it says targets.py: the same as before, what the file
now says, or one line of at most 480 printable characters that begins with where it is. All else is
a finding: another exception, a case that takes 5 s of processor time (its fork ends), a gigabyte,
anything that is printed, another content. Exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[3]), str(Path(__file__).parents[2])]

import torch
from support.hostile.mutations import mutated, mutated_json
from support.hostile.targets import TARGETS, Target, make_all
from tqdm import tqdm

from minqwen.errors import MAX_LINE, MinqwenError

CPU_SECONDS = 5.0  # of one case
ADDRESSES = 2 << 30  # bytes of address space beyond what there is; the kernel counts maps too
STILL = 60  # seconds after which a case that uses no processor hangs
STARTS = ("chat template", "--prompt-file ")  # of lines that say first what the file is for
CHUNK = 20_000  # cases of one fork
Finding = dict[str, Any]


class Case:
    """The directory of one target in which one file after the other is tried."""

    def __init__(self, target: Target, name: str, bases: Path, work: Path, seed: int):
        self.target, self.name, self.seed = target, name, seed
        self.path = work / "c"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(bases / target.base, self.path)
        self.file = self.path / target.file
        self.sound = self.file.read_bytes()
        self.before = target.read(self.path)
        wrong = target.judge(self.path, self.before, self.before)
        assert wrong is None, (name, wrong)

    def bytes(self, number: int) -> bytes:
        """The file of case `number`."""
        r = random.Random(f"{self.seed}/{self.name}/{number}")
        if self.target.sign is not None:
            return signed(mutated_json(self.sound, r), self.target.sign)
        if not self.target.header:
            return mutated(self.sound, r, self.target.is_json)
        length = int.from_bytes(self.sound[:8], "little")
        header = mutated(self.sound[8 : 8 + length], r, is_json=True)
        said = len(header) if r.random() < 0.9 else r.choice((0, 1, length, 2**63, len(header) + 1))
        return said.to_bytes(8, "little") + header + self.sound[8 + length :]

    def outcome(self, number: int) -> tuple[str, str]:
        """("refused" | "same" | "as written", "") or ("wrong" | an exception's name, words)."""
        self.file.write_bytes(self.bytes(number))
        try:
            read = self.target.read(self.path)
            wrong = self.target.judge(self.path, read, self.before)
        except MinqwenError as error:
            return self.refused(str(error))
        except BaseException as error:  # a panic of a library is no Exception
            where = traceback.extract_tb(error.__traceback__)[-1]
            return type(error).__name__, f"{str(error)[:200]} ({where.filename}:{where.lineno})"
        if wrong is not None:
            return "wrong", wrong
        return ("same" if read == self.before else "as written"), ""

    def refused(self, line: str) -> tuple[str, str]:
        if not line.isprintable() or len(line) > MAX_LINE:
            return "wrong line", repr(line[:600])
        if not line.startswith((str(self.path), *STARTS, str(self.path.parents[1]))):
            return "names no place", line
        return "refused", ""


def signed(data: bytes, sign: Callable[[dict[str, Any]], str]) -> bytes:
    """The JSON with a digest of itself that is right: the reader looks further."""
    content = json.loads(data)
    if "sha256" in content:
        try:
            content["sha256"] = sign(content)
        except UnicodeEncodeError:
            return data
    return json.dumps(content).encode()


# ---- forks --------------------------------------------------------------------------------------


def run_chunk(case: Case, numbers: range, shared: mmap.mmap, out: Path) -> None:
    """In a fork: all cases of a range. The number of the current one is in shared memory."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    noise = tempfile.TemporaryFile()
    for descriptor in (1, 2):
        os.dup2(noise.fileno(), descriptor)
    warnings.simplefilter("ignore")
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, limit))
    counts: Counter[str] = Counter()
    with out.open("w") as file:
        for number in numbers:
            shared[:8] = number.to_bytes(8, "little")
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            kind, text = case.outcome(number)
            signal.setitimer(signal.ITIMER_PROF, 0)
            printed = printed_by_library(noise)
            if kind == "refused" and "tokenizers/src" in printed:  # docs/reliability.md says so
                kind, printed = "refused after the library's panic", ""
            counts[kind] += 1
            if text:
                file.write(json.dumps({"case": number, "kind": kind, "text": text}) + "\n")
            elif printed:
                file.write(json.dumps({"case": number, "kind": "prints", "text": printed}) + "\n")
            if number % 100 == 99 or number == numbers[-1]:
                file.write(json.dumps({"counts": counts}) + "\n")
                file.flush()
                counts.clear()


def printed_by_library(noise: IO[bytes]) -> str:
    """What was written to stdout and stderr since the last time."""
    if not os.fstat(noise.fileno()).st_size:
        return ""
    noise.seek(0)
    text = noise.read(300).decode(errors="replace")
    noise.truncate(0)
    noise.seek(0)
    return text


def forked(case: Case, numbers: range, found: list[Finding], counts: Counter[str]) -> None:
    """The same, in as many forks as it takes: a case that ends its fork is a finding."""
    shared = mmap.mmap(-1, 8)
    tqdm.set_lock(threading.RLock())  # its usual one is shared with forks, which may be ended
    out = case.path.with_name("findings.jsonl")
    while numbers:
        shared[:8] = numbers.start.to_bytes(8, "little")
        pid = os.fork()
        if pid == 0:
            try:
                run_chunk(case, numbers, shared, out)
                os._exit(0)
            finally:
                os._exit(1)
        status = wait(pid, shared)
        for line in out.read_text().splitlines():
            one = json.loads(line)
            counts.update(one.pop("counts", {}))
            if one:
                found.append({"target": case.name, **one})
        if status == 0:
            return
        number = int.from_bytes(shared[:8], "little")
        text = f"its process ended with {status}"
        found.append({"target": case.name, "case": number, "kind": "ends", "text": text})
        numbers = range(number + 1, numbers.stop)


def wait(pid: int, shared: mmap.mmap) -> int:
    """The status of a fork, which is ended where it stands still."""
    last, since = b"", time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if shared[:8] != last:
            last, since = shared[:8], time.monotonic()
        elif time.monotonic() - since > STILL:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


# ---- the run ------------------------------------------------------------------------------------


def fuzz(
    names: list[str], count: int, seed: int, bases: Path, out: Path | None = None
) -> list[Finding]:
    """`count` cases of each target. out: where it is written how far each target is."""
    torch.set_num_threads(1)
    state: dict[str, Any] = {"done": {}, "counts": {}, "findings": [], "seconds": {}}
    if out is not None and out.exists():
        state = json.loads(out.read_text())
    for name in names:
        case = Case(TARGETS[name], name, bases, bases / "work", seed)
        counts = Counter(state["counts"].get(name, {}))
        done = state["done"].get(name, 0)
        while done < count:
            numbers = range(done, min(count, done + CHUNK))
            start = time.perf_counter()
            forked(case, numbers, state["findings"], counts)
            seconds = state["seconds"].get(name, 0) + time.perf_counter() - start
            done = numbers.stop
            state["done"][name], state["counts"][name] = done, dict(counts)
            state["seconds"][name] = round(seconds, 1)
            if out is not None:
                out.write_text(json.dumps(state))
                report(name, state)
        if out is None:
            report(name, state)
    findings: list[Finding] = state["findings"]
    return findings


def report(name: str, state: dict[str, Any]) -> None:
    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(state["counts"][name].items()))
    found = sum(one["target"] == name for one in state["findings"])
    print(
        f"{name}: {state['done'][name]} cases, {counts}; {found} findings, "
        f"{state['seconds'][name]:.0f} s",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--target", action="append", choices=list(TARGETS), metavar="NAME")
    parser.add_argument("--out", type=Path, metavar="FILE", help="how far it is; goes on there")
    parser.add_argument("--show", type=int, metavar="CASE", help="one case of one target")
    args = parser.parse_args()
    names = args.target or list(TARGETS)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        bases = Path(directory)
        make_all(bases)
        if args.show is not None:
            case = Case(TARGETS[names[0]], names[0], bases, bases / "work", args.seed)
            print(case.bytes(args.show)[:3000])
            print(
                case.target.read(case.path) if case.file.write_bytes(case.bytes(args.show)) else 0
            )
            return 0
        found = fuzz(names, args.count, args.seed, bases, args.out)
    for one in found[:200]:
        print(json.dumps(one))
    print(f"{len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
