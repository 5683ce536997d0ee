#!/usr/bin/env python3
"""Which small mistakes in the code do the tests of its room notice? Mutation testing.

  python benchmarks/mutants.py --out mutants.jsonl               # 150, spread over the rooms
  python benchmarks/mutants.py --out mutants.jsonl --only heads  # of one room
  python benchmarks/mutants.py --out mutants.jsonl --summary     # what has been found so far

A mutant is the code with one small change: a comparison, a number, an operator, a condition, a
returned value or a deleted statement. It is written into a copy of the checkout, and the tests of
its room run there until the first one fails. Then it is killed; a mutant that hangs is, too. One
that survives is a test that is missing, or a change that changes nothing.

Which tests execute which lines is found out first, on the code as it is. The tests that execute the
changed statement run first, the fastest before the others; only if none of them fails all the
others of the room run, too. So the order saves time, and no outcome depends on it.

The sample follows from --seed, and a larger --count has the mutants of a smaller one. What has been
tried is in the file --out, so that a run that is broken off goes on where it was. The tests run in
forks of one process that has imported torch. Exits with 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from minqwen.cli import Parser, run

ROOT = Path(__file__).resolve().parents[1]
# Imported before the forks, without minqwen itself, which each fork imports from the copy.
WARM = (
    *("torch", "transformers", "numpy", "hypothesis", "pytest", "safetensors.torch", "psutil"),
    *("tokenizers", "sentencepiece", "jinja2", "llguidance", "jsonschema", "torch.distributed"),
)
# A mutant hangs if one test takes so many times the processor's time that it takes by itself, and
# some seconds; or ten times that by the clock, where it waits and does nothing.
IMPATIENCE, LEAST, WAITING = 4, 8, 10
HOUR = 3600


@dataclass(frozen=True)
class Room:
    """Files that are changed, and the tests that should notice, the likeliest and fastest first.

    Names are glob patterns.
    """

    files: tuple[str, ...]
    tests: tuple[str, ...]


ROOMS = {
    "cache": Room(
        ("minqwen/engine/blocks.py", "minqwen/model/kv_cache.py"),
        ("engine/test_blocks.py", "model/test_kv_cache.py", "engine/test_int8_cache.py")
        + ("engine/test_scheduler.py",),
    ),
    "scheduler": Room(
        ("minqwen/engine/scheduler.py",),
        ("engine/test_blocks.py", "engine/test_scheduler.py", "engine/test_step.py"),
    ),
    "sampling": Room(
        tuple(f"minqwen/sampling/{name}.py" for name in ("draw", "params", "stopping", "warp"))
        + ("minqwen/sampling/kernels.py", "minqwen/sampling/logprobs.py"),
        ("sampling/test_params.py", "sampling/test_stopping.py", "sampling/test_warp.py")
        + ("sampling/test_logprobs.py", "sampling/test_kernels.py", "sampling/test_draw.py")
        + ("sampling/test_bad_words.py",),
    ),
    "loader": Room(
        ("minqwen/checkpoint/reader.py",),
        ("checkpoint/test_reader.py", "checkpoint/test_refusals.py", "checkpoint/test_odd_files.py")
        + ("checkpoint/test_dtype_of_files.py", "checkpoint/test_quantised.py")
        + ("checkpoint/test_load.py",),
    ),
    "arithmetic": Room(
        ("minqwen/model/arithmetic.py", "minqwen/model/exact.py"),
        ("model/test_arithmetic.py", "model/test_exact_zeros.py", "model/test_exact_functions.py")
        + ("model/test_exact_sums.py", "model/test_rope.py", "sampling/test_exact.py")
        + ("model/test_exact_accuracy.py", "model/test_fast.py"),
    ),
    "heads": Room(
        ("minqwen/heads/*.py",),
        ("heads/test_layout.py", "heads/test_manifest.py", "heads/test_tensors.py", "heads/*.py"),
    ),
}


# ---- mutants ------------------------------------------------------------------------------------

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
}


@dataclass(frozen=True)
class Mutant:
    """One change: of the `index`th place in the file's tree, in the order of `places`."""

    room: str
    file: str
    index: int
    line: int
    before: str
    after: str


def places(tree: ast.Module) -> list[tuple[ast.AST, str, object, ast.AST | None]]:
    """(node, field, key in it, what takes its place or None for nothing), for every change."""
    found: list[tuple[ast.AST, str, object, ast.AST | None]] = []
    for parent in walk(tree):
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            children = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
            for key, child in children:
                if isinstance(child, ast.AST):
                    found += [(parent, field, key, new) for new in changes(child)]
    return found


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that do something: no annotations, no texts, no assertions."""
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr | ast.Assert):
                yield from walk(child)


def changes(node: ast.AST) -> list[ast.AST | None]:
    """What may stand in a node's place."""
    if isinstance(node, ast.Compare):
        first = COMPARISONS[type(node.ops[0])]()
        return [ast.Compare(node.left, [first, *node.ops[1:]], node.comparators)]
    if isinstance(node, ast.BoolOp):
        return [ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return [ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        return [node.operand]
    if isinstance(node, ast.Constant):
        return constants(node)
    if isinstance(node, ast.stmt):
        return statements(node)
    return []


def constants(node: ast.Constant) -> list[ast.AST | None]:
    if isinstance(node.value, bool):
        return [ast.Constant(not node.value)]
    if isinstance(node.value, int):
        return [ast.Constant(node.value + 1)]
    if isinstance(node.value, float):
        return [ast.Constant(node.value * 2 or 1.0)]
    return []


def statements(node: ast.stmt) -> list[ast.AST | None]:
    """A statement that is not executed, a condition the other way round, a result that is lost."""
    if isinstance(node, ast.If):
        return [ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)]
    if isinstance(node, ast.Return):
        lost = node.value is not None and ast.unparse(node.value) != "None"
        return [ast.Return(ast.Constant(None))] if lost else []
    if isinstance(node, ast.Raise | ast.AugAssign | ast.Break | ast.Continue | ast.Delete):
        return [ast.Pass()]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return [ast.Pass()]
    if isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple):
        return [ast.Pass()]
    return []


def mutants_of(room: str, file: str, source: str) -> list[Mutant]:
    found = []
    for index, (parent, field, key, new) in enumerate(places(ast.parse(source))):
        old = child_of(parent, field, key)
        before, after = (" ".join(ast.unparse(node).split())[:90] for node in (old, new) if node)
        found.append(Mutant(room, file, index, getattr(old, "lineno", 0), before, after))
    return found


def child_of(parent: ast.AST, field: str, key: object) -> ast.AST:
    value = getattr(parent, field)
    child: ast.AST = value[key] if isinstance(key, int) else value
    return child


def mutated(source: str, index: int) -> str:
    """The source with the change of one place."""
    tree = ast.parse(source)
    parent, field, key, new = places(tree)[index]
    if isinstance(key, int):
        getattr(parent, field)[key] = new
    else:
        setattr(parent, field, new)
    return ast.unparse(ast.fix_missing_locations(tree))


def files_of(room: str) -> list[str]:
    """The files of a room that are changed."""
    paths = [path for pattern in ROOMS[room].files for path in sorted(ROOT.glob(pattern))]
    return [str(path.relative_to(ROOT)) for path in paths]


def sample(rooms: list[str], count: int, seed: int) -> list[Mutant]:
    """`count` mutants, as many of each room, in an order that tries all rooms soon."""
    queues = []
    for room in rooms:
        all_ = [
            mutant
            for file in files_of(room)
            for mutant in mutants_of(room, file, (ROOT / file).read_text())
        ]
        random.Random(f"{seed}/{room}").shuffle(all_)
        queues.append(all_)
    rounds = [mutant for row in zip(*queues) for mutant in row]
    return rounds[:count]


# ---- the copy, and tests in it ------------------------------------------------------------------


@dataclass
class Known:
    """What one test does with the code as it is."""

    seconds: float  # of the processor
    lines: dict[str, list[int]]  # of the files that are changed: those that it executes


class Recorder:
    """A plugin of pytest: notes the lines and the time of each test. Forked processes are not seen.

    What a fixture executes is noted for the first test that has it.
    """

    def __init__(self, copy: Path, files: list[str]):
        self.names = {str(copy / file): file for file in files}
        self.found: dict[str, Known] = {}
        self.now: dict[str, set[int]] = {}

    def pytest_runtest_protocol(self, item: Any) -> None:
        self.now = {file: set() for file in self.names.values()}
        self.start = processor_time()
        threading.settrace(self.of_call)
        sys.settrace(self.of_call)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        sys.settrace(None)
        lines = {file: sorted(lines) for file, lines in self.now.items() if lines}
        self.found[nodeid] = Known(round(processor_time() - self.start, 2), lines)

    def of_call(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        file = self.names.get(frame.f_code.co_filename)
        if file is None:
            return None
        lines = self.now[file]

        def of_line(frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
            lines.add(frame.f_lineno)
            return of_line

        return of_line(frame, event, arg)


class Chosen:
    """A plugin of pytest: runs some tests of the files that it is given, and ends one that hangs.

    names: in this order; None for all that are not in `without`.
    """

    def __init__(self, known: dict[str, Known], names: list[str] | None, without: set[str]):
        self.known, self.without = known, without
        self.order = None if names is None else {name: place for place, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.order is None:
            items[:] = [item for item in items if item.nodeid not in self.without]
        else:
            order = self.order
            items[:] = sorted(
                (item for item in items if item.nodeid in order),
                key=lambda item: order[item.nodeid],
            )

    def pytest_runtest_protocol(self, item: Any) -> None:
        known = self.known.get(item.nodeid)
        limit = LEAST + (IMPATIENCE * known.seconds if known else HOUR)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + limit) + 1, hard))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(WAITING * limit))


def processor_time() -> float:
    """Of this process and of those that it has waited for, in seconds."""
    return sum(os.times()[:4])


class Bench:
    """A copy of the checkout in which one file at a time is changed."""

    def __init__(self, copy: Path):
        self.copy = copy
        self.clock = int(time.time())
        ignore = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "*.egg-info", "results")
        shutil.copytree(ROOT, copy, ignore=ignore, symlinks=True)
        for name in WARM:
            importlib.import_module(name)
        for name in [name for name in sys.modules if name.split(".")[0] == "minqwen"]:
            del sys.modules[name]
        self.known: dict[str, dict[str, Known]] = {}  # by room, then by test

    def tests_of(self, room: str, file: str = "") -> list[str]:
        """Files of a room, those first that are named like the file that is changed."""
        folder = self.copy / "tests"
        paths = [path for pattern in ROOMS[room].tests for path in sorted(folder.glob(pattern))]
        names = [str(path.relative_to(self.copy)) for path in paths if path.stem.startswith("test")]
        likely = f"test_{Path(file).stem}.py"
        return sorted(dict.fromkeys(names), key=lambda name: Path(name).name != likely)

    def measure(self, room: str) -> dict[str, Known]:
        """Run a room's tests on the code as it is, each file in a fork of its own.

        So each file's tests are the first to have what is kept for later ones.
        """
        known: dict[str, Known] = {}
        files = files_of(room)
        start = time.monotonic()
        for test in self.tests_of(room):
            recorder = Recorder(self.copy, files)
            outcome = self.test([test], recorder, kept := self.copy / "known.json")
            if outcome != "survived":
                raise SystemExit(f"{room}: tests fail before anything is changed: {outcome}")
            known |= {name: Known(**one) for name, one in json.loads(kept.read_text()).items()}
        seconds = sum(one.seconds for one in known.values())
        took = time.monotonic() - start
        print(
            f"{room}: {len(known)} tests, {seconds:.0f} s of the processor, {took:.0f} s of the "
            "clock",
            flush=True,
        )
        return known

    def try_(self, mutant: Mutant) -> tuple[str, float]:
        """What became of a mutant: killed (by which test), hangs or survived; and seconds."""
        path = self.copy / mutant.file
        source = path.read_text()
        if mutant.room not in self.known:
            self.known[mutant.room] = self.measure(mutant.room)
        known = self.known[mutant.room]
        first = by_time(known, mutant.file, statement_lines(source, mutant.index))
        try:
            self.write(path, mutated(source, mutant.index))
            start = time.monotonic()
            outcome = "survived"
            if first:
                files = list(dict.fromkeys(name.split("::")[0] for name in first))
                outcome = self.test(files, Chosen(known, first, set()))
            if outcome == "survived":
                files = self.tests_of(mutant.room, mutant.file)
                outcome = self.test(files, Chosen(known, None, set(first)))
            return outcome, time.monotonic() - start
        finally:
            self.write(path, source)

    def write(self, path: Path, source: str) -> None:
        """With a time of its own: Python takes a compiled file for new by time and size."""
        path.write_text(source)
        self.clock += 1
        os.utime(path, (self.clock, self.clock))

    def test(self, files: list[str], plugin: Recorder | Chosen, kept: Path | None = None) -> str:
        """What became of tests in a fork. kept: where it leaves what a recorder has found."""
        report = self.copy / "mutant.log"
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = self.run_tests(files, report, plugin)
                if kept is not None and isinstance(plugin, Recorder):
                    kept.write_text(
                        json.dumps({name: asdict(one) for name, one in plugin.found.items()})
                    )
            finally:
                os._exit(code)
        status = wait(pid)
        if status in (None, -signal.SIGXCPU, -signal.SIGALRM):
            return "hangs"
        return "survived" if status == 0 else f"killed by {first_failure(report)}"

    def run_tests(self, files: list[str], report: Path, plugin: Recorder | Chosen) -> int:
        """In the fork: pytest, whose last words are kept. 0 if all tests pass."""
        os.setsid()
        out = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for descriptor in (1, 2):
            os.dup2(out, descriptor)
        os.chdir(self.copy)
        sys.path[:0] = [str(self.copy), str(self.copy / "tests")]
        os.environ.update(PYTHONPATH=str(self.copy))
        pytest = importlib.import_module("pytest")
        words = ["-x", "-q", "-n0", "--tb=no", "-p", "no:cacheprovider", "-p", "no:randomly"]
        code = int(pytest.main([*words, *files], plugins=[plugin]))
        here = Path(str(sys.modules["minqwen"].__file__)).is_relative_to(self.copy)
        sys.stdout.flush()
        return (0 if code == NO_TESTS else code) if here else 98


NO_TESTS = 5  # pytest's status where none is left to run


def by_time(known: dict[str, Known], file: str, lines: range) -> list[str]:
    """The tests that execute one of the lines, the fastest first."""
    hits = [name for name, one in known.items() if any(n in lines for n in one.lines.get(file, []))]
    return sorted(hits, key=lambda name: known[name].seconds)


def statement_lines(source: str, index: int) -> range:
    """The lines of the statement that a mutant changes; of one that has others inside, its head."""
    tree = ast.parse(source)
    parent, field, key, _ = places(tree)[index]
    line = getattr(child_of(parent, field, key), "lineno", 0)
    best = range(0)
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            body = getattr(node, "body", None)
            last = node.end_lineno or node.lineno
            lines = range(node.lineno, max(node.lineno, body[0].lineno - 1 if body else last) + 1)
            if line in lines and node.lineno >= best.start:
                best = lines
    return best


def wait(pid: int) -> int | None:
    """The exit status of a fork; None if it had to be ended, with all that it started."""
    end = time.monotonic() + HOUR
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            end_group(pid)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    end_group(pid)
    os.waitpid(pid, 0)
    return None


def end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def first_failure(report: Path) -> str:
    lines = report.read_text(errors="replace").splitlines()
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return failed[0].removeprefix("tests/") if failed else "the end of its process"


# ---- the run ------------------------------------------------------------------------------------


def key(found: dict[str, object]) -> tuple[object, ...]:
    return tuple(found[name] for name in ("file", "line", "before", "after", "index"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def results(path: Path) -> dict[tuple[object, ...], dict[str, object]]:
    return {key(found): found for found in lines(path)}


def summary(found: list[dict[str, object]]) -> int:
    """Print what there is, and return the number of survivors."""
    tried = Counter(str(one["room"]) for one in found)
    alive = [one for one in found if one["outcome"] == "survived"]
    lived = Counter(str(one["room"]) for one in alive)
    for room, count in tried.items():
        print(f"{room}: {count - lived[room]} of {count} killed")
    if found:
        share = 100 * (1 - len(alive) / len(found))
        print(f"all: {len(found) - len(alive)} of {len(found)} killed, {share:.1f} %")
    for one in sorted(alive, key=lambda one: (str(one["file"]), str(one["line"]))):
        print(f"  survived: {one['file']}:{one['line']}: `{one['before']}` as `{one['after']}`")
    return len(alive)


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--count", type=int, default=150, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", choices=list(ROOMS), action="append", metavar="ROOM")
    parser.add_argument("--survivors", action="store_true", help="try those that survived again")
    parser.add_argument("--summary", action="store_true", help="only print what --out holds")
    args = parser.parse_args()
    known = results(args.out)
    if args.summary:
        return 1 if summary(list(known.values())) else 0
    chosen = sample(args.only or list(ROOMS), args.count, args.seed)
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory, "copy"))
        for mutant in chosen:
            before = known.get(key(asdict(mutant)))
            if before and not (args.survivors and before["outcome"] == "survived"):
                continue
            outcome, seconds = bench.try_(mutant)
            found = {**asdict(mutant), "outcome": outcome, "seconds": round(seconds, 1)}
            known[key(found)] = found
            with args.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(
                f"{mutant.file}:{mutant.line}: `{mutant.before}` as `{mutant.after}`: {outcome}, "
                f"{seconds:.0f} s",
                flush=True,
            )
    tried = [known[key(asdict(mutant))] for mutant in chosen]
    return 1 if summary(tried) else 0


if __name__ == "__main__":
    run(main)
