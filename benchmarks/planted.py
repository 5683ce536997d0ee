#!/usr/bin/env python3
"""Mistakes planted in transformers, and clean runs: what does diff say of their dumps?

  python benchmarks/planted.py mistakes [--only NAME ...] [--model NAME] [--dtype NAME]
  python benchmarks/planted.py clean

"mistakes": every mistake of tests/support/broken_transformers.py is planted in transformers' Qwen2,
dumped by minqwen/lab/dump.py and examined. Named: the layer and the operation at which the dump is
wrong first are what the table of mistakes says. Entry: the catalogue's entry that diff gives as the
explanation is the planted one, or is among those that explain the dump as well. Mistakes that are
smaller than bfloat16's rounding are left out there.

"clean": transformers eager and sdpa, our tensor-parallel ranks (threads) and our paged engine, in
several dtypes, on the embedded model and on random ones. Any divergence is a false alarm.

The files in tests/support are run by their paths, because nothing imports tests.
"""

from __future__ import annotations

import argparse
import json
import runpy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2ForCausalLM

from minqwen import LLM, Checkpoint, SamplingParams
from minqwen.checkpoint import write_checkpoint
from minqwen.cli import EMBEDDED
from minqwen.config import ModelConfig, RopeScaling
from minqwen.lab.diff.diagnosis import examine
from minqwen.lab.diff.diff import Report
from minqwen.lab.diff.dumps import FORMAT, Dump
from minqwen.lab.dump import SPLIT, dump
from minqwen.lab.faults import FAULTS, build
from minqwen.model.trace import point_names, point_of
from minqwen.parallel import Mesh

SUPPORT = Path(__file__).parents[1] / "tests" / "support"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LENGTHS = (40, 23, 57)  # tokens of the prompts; no multiples of 16
WINDOW = 8


class Prompt(NamedTuple):
    ids: list[int]


class Asked:
    """A golden pack without runs: what is right is computed."""

    runs: Sequence[str] = ()
    names: Sequence[str] = ()
    full_logits = True

    def __init__(self, config: ModelConfig, prompts: Sequence[list[int]]):
        self.config, self.prompts = config, [Prompt(ids) for ids in prompts]

    def read(self, run: str, prompt: int, name: str) -> NoReturn:
        raise KeyError(run)


class Subject:
    """A model in a directory, for us and for transformers, and prompts for it."""

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path
        self.checkpoint = Checkpoint(path)
        self.config = self.checkpoint.config
        self.theirs = Qwen2ForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
        draw = torch.Generator().manual_seed(1)
        self.prompts: list[list[int]] = [
            torch.randint(0, self.config.vocab_size, (length,), generator=draw).tolist()
            for length in LENGTHS
        ]

    def examined(self, directory: Path, prompts: Sequence[list[int]]) -> Report:
        found = Dump.open(directory, self.config)
        return examine(Asked(self.config, prompts), found, self.checkpoint)


RANDOM: dict[str, dict[str, Any]] = {
    "random, YaRN": dict(
        num_attention_heads=14,
        num_key_value_heads=2,
        rope_scaling=RopeScaling(4.0, 16),
        tie_word_embeddings=False,
    ),
    "random, tied": dict(
        num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True, rope_theta=1e6
    ),
}


def subjects(directory: Path) -> Iterator[Subject]:
    """The embedded model and the random ones."""
    for seed, (name, changes) in enumerate(RANDOM.items()):
        config = ModelConfig(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=72,
            num_hidden_layers=3,
            head_dim=8,
            dtype="float32",
            **changes,
        )
        path = directory / str(seed)
        write_checkpoint(path, config, random_weights(config, seed).items())
        about = json.loads((path / "config.json").read_text())
        about |= {"sliding_window": WINDOW, "use_sliding_window": False}
        (path / "config.json").write_text(json.dumps(about))
        yield Subject(name, path)
    yield Subject("embedded", EMBEDDED)


def random_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Weights that leave nothing at zero or one, of a size that a trained model's have."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.parameter_shapes().items():
        x = torch.randn(shape, generator=draw)
        if "norm" in name:
            x = 1 + x / 4
        elif len(shape) == 2 and "embed" not in name:
            x *= 1.5 / shape[1] ** 0.5
        weights[name] = x
    return weights


# ---- mistakes -----------------------------------------------------------------------------------


class Outcome(NamedTuple):
    named: bool
    entry: bool
    line: str


def mistakes(subject: Subject, dtype: str, only: list[str] | None) -> Iterator[Outcome]:
    """Each mistake that the model can have, planted, dumped and examined."""
    support = runpy.run_path(str(SUPPORT / "broken_transformers.py"))
    for planted in support["PLANTED"]:
        possible = planted.needs(subject.theirs.config) and FAULTS[planted.name].applies(
            subject.config
        )
        chosen = planted.name in only if only else not (planted.faint and dtype == "bfloat16")
        if possible and chosen:
            with support["broken"](planted, subject.theirs, DTYPES[dtype]) as model:
                yield judged(planted, dtype, dumped_report(subject, model, subject.prompts[:1]))


def dumped_report(subject: Subject, model: Any, prompts: Sequence[list[int]]) -> Report:
    with tempfile.TemporaryDirectory() as directory:
        with dump(model, directory):
            for ids in prompts:
                model(torch.tensor([ids]))
        return subject.examined(Path(directory), prompts)


def judged(planted: Any, dtype: str, report: Report) -> Outcome:
    first = report.first.point if report.first else ""
    entries = [e.name for e in (report.explained_by, *report.also) if e is not None]
    named, entry = first == planted.first, planted.name in entries
    units = f"{report.explained_by.units:.2f}" if report.explained_by else "-"
    said = ", ".join(entries) or "none"
    marks = f"{'named' if named else 'NOT NAMED':10}{'entry' if entry else 'OTHER':7}"
    where = "" if named else f" (should be {planted.first})"
    return Outcome(
        named, entry, f"{dtype:9} {planted.name:28} {marks} {first}{where}; {said} {units}"
    )


# ---- clean runs ---------------------------------------------------------------------------------


def clean(subject: Subject) -> Iterator[tuple[str, Report]]:
    """(what ran, what diff says of it), a prompt at a time."""
    for name, dtype in DTYPES.items():
        for kind in ("eager", "sdpa"):
            model = Qwen2ForCausalLM.from_pretrained(
                subject.path, dtype=dtype, attn_implementation=kind
            )
            for ids in subject.prompts:
                yield f"transformers {kind} {name}", dumped_report(subject, model, [ids])
        for ranks in (2, 4):
            if subject.config.num_attention_heads % ranks == 0:
                yield from on_ranks(subject, ranks, name)
        if subject.name == "embedded":
            yield from paged(subject, name)


def on_ranks(subject: Subject, ranks: int, dtype: str) -> Iterator[tuple[str, Report]]:
    """Our tensor-parallel ranks, each of which writes its part."""
    run: Callable[..., Any] = runpy.run_path(str(SUPPORT / "ranks.py"))["on_ranks"]
    if subject.config.num_key_value_heads % ranks and ranks % subject.config.num_key_value_heads:
        return
    weights = {name: subject.checkpoint.read(name) for name in subject.checkpoint.names}

    def one(mesh: Mesh, ids: list[int], directory: str) -> None:
        model = build_rank(subject.config, weights, DTYPES[dtype], mesh)
        _, seen = model.run_with_cache(torch.tensor([ids]), gather=False)
        tensors = {name: x[0].contiguous() for name, x in seen.items()}
        if mesh.rank:
            tensors = {name: x for name, x in tensors.items() if point_of(name).name in SPLIT}
        save_file(tensors, f"{directory}/0.rank{mesh.rank}of{ranks}.safetensors")

    for ids in subject.prompts:
        with tempfile.TemporaryDirectory() as directory:
            run(ranks, lambda mesh, ids=ids, to=directory: one(mesh, ids, to))
            describe(directory, dtype, ranks)
            yield f"our {ranks} ranks {dtype}", subject.examined(Path(directory), [ids])


def build_rank(
    config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype, mesh: Mesh
) -> Any:
    from_tensors = type(build(config, weights, dtype)).from_tensors

    def read(name: str, shard: Any) -> Tensor:
        if shard is None:
            return weights[name]
        return weights[name].narrow(shard.dim, shard.start, shard.stop - shard.start)

    return from_tensors(config, read, dtype=dtype, mesh=mesh)


def paged(subject: Subject, dtype: str) -> Iterator[tuple[str, Report]]:
    """Our engine: blocks of 16 tokens, chunks of 16."""
    llm = LLM(subject.path, dtype=dtype, max_num_batched_tokens=16, max_num_seqs=4)
    names = [
        name
        for name in point_names(subject.config.num_hidden_layers)
        if point_of(name).name not in ("attn.scores", "attn.pattern")
    ]
    for ids in subject.prompts:
        params = SamplingParams(max_tokens=1, temperature=0)
        output = llm.generate({"prompt_token_ids": ids}, params, trace=names)[0].outputs[0]
        # The final norm and the logits are computed of the last token only.
        tensors = {
            name: x.clone()
            for name, x in output.trace.items()
            if isinstance(x, Tensor) and (len(x) == len(ids) or name == "logits")
        }
        tensors["input_ids"] = torch.tensor(ids)
        with tempfile.TemporaryDirectory() as directory:
            save_file(tensors, f"{directory}/0.safetensors")
            describe(directory, dtype, 1)
            yield f"our paged engine {dtype}", subject.examined(Path(directory), [ids])


def describe(directory: str, dtype: str, ranks: int) -> None:
    about = {"format": FORMAT, "engine": "minqwen", "dtype": dtype, "passes": 1, "ranks": ranks}
    (Path(directory) / "dump.json").write_text(json.dumps(about))


# ---- the tables ---------------------------------------------------------------------------------


def print_mistakes(args: argparse.Namespace, directory: Path) -> None:
    totals = []
    for subject in subjects(directory):
        if args.model not in (None, subject.name):
            continue
        for dtype in ("float32", "bfloat16"):
            if args.dtype not in (None, dtype):
                continue
            print(f"\n{subject.name}, {dtype}", flush=True)
            outcomes = []
            for outcome in mistakes(subject, dtype, args.only):
                print(" ", outcome.line, flush=True)
                outcomes.append(outcome)
            named, entry = sum(o.named for o in outcomes), sum(o.entry for o in outcomes)
            totals.append((subject.name, dtype, len(outcomes), named, entry))
    print(f"\n{'model':14} {'dtype':9} {'planted':>8} {'named':>6} {'entry':>6}")
    for name, dtype, count, named, entry in totals:
        print(f"{name:14} {dtype:9} {count:8} {named:6} {entry:6}")
    print(f"{'all':24} {sum(t[2] for t in totals):8}", end="")
    print(f" {sum(t[3] for t in totals):6} {sum(t[4] for t in totals):6}")


def print_clean(args: argparse.Namespace, directory: Path) -> None:
    runs = alarms = 0
    for subject in subjects(directory):
        if args.model not in (None, subject.name):
            continue
        for what, report in clean(subject):
            runs, alarms = runs + 1, alarms + (report.verdict != "agree")
            worst = max(report.points, key=lambda point: point.added)
            print(
                f"{subject.name:14} {what:28} {report.verdict:8} "
                f"worst {worst.added:.2f} at {worst.point}",
                flush=True,
            )
    print(f"\n{runs} clean runs, {alarms} false alarms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=("mistakes", "clean"))
    parser.add_argument("--only", metavar="NAME", nargs="+", help="these mistakes")
    parser.add_argument("--model", choices=(*RANDOM, "embedded"), help="one model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="one dtype of mistakes")
    args = parser.parse_args()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as directory:
        table = print_mistakes if args.table == "mistakes" else print_clean
        table(args, Path(directory))


if __name__ == "__main__":
    main()
