#!/usr/bin/env python3
"""The audit of right and of wrong engines: who is alarmed, and which mistake is named.

  python benchmarks/audited.py clean [--model DIR] [--runs 3]
  python benchmarks/audited.py served [--model DIR] [--runs 3]
  python benchmarks/audited.py faults [--model DIR] [--dtype bfloat16] [--only NAME ...]
  python benchmarks/audited.py planted [--model DIR] [--dtype bfloat16] [--only NAME ...]

clean: transformers (eager and sdpa) and our engines in bfloat16 and float32, on several texts; the
paged engine is asked by `LLM.score`. served: transformers behind a small server
(tests/support/openai_server.py), asked over HTTP for texts and chats. faults: every mistake of the
catalogue, in our own model. planted: the same in transformers
(tests/support/broken_transformers.py). Each run judges 300 tokens by the log probabilities of these
tokens alone. A mistake counts where it changes all the logits of these texts by more than 1.5
units.
"""

from __future__ import annotations

import argparse
import random
import runpy
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minqwen import LLM, Qwen2
from minqwen.checkpoint import write_checkpoint
from minqwen.cli import EMBEDDED, Parser, run
from minqwen.config import ModelConfig, RopeScaling
from minqwen.errors import MinqwenError
from minqwen.lab.audit.audit import Report, audit
from minqwen.lab.audit.client import Endpoint
from minqwen.lab.audit.endpoint import audit_endpoint
from minqwen.lab.audit.evidence import Original
from minqwen.lab.audit.forced import Report as Reported
from minqwen.lab.audit.questions import TEXT
from minqwen.lab.audit.records import Entry, Record
from minqwen.lab.compare import ROUNDING, rms
from minqwen.lab.faults import FAULTS
from minqwen.model import Native

COUNT, LENGTH = 2, 151  # texts of a run, and tokens of each; the first one has no log probability
SUPPORT = Path(__file__).parents[1] / "tests" / "support"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def texts(original: Original, seed: int) -> list[list[int]]:
    """Pieces of our text, half of them with random tokens: other texts for every seed."""
    draw = random.Random(seed)
    vocabulary = original.config.vocab_size
    many = []
    for i in range(COUNT):
        ids = [draw.randrange(vocabulary) for _ in range(LENGTH)]
        if original.tokenizer is not None and i % 2 == 0:
            words = TEXT.split()
            draw.shuffle(words)
            ids = original.tokenizer.encode(" ".join(words), add_special_tokens=False)[:LENGTH]
        many.append(ids)
    return many


def recorded(table: Tensor, ids: Sequence[int]) -> Record:
    """table [T, V]: log probabilities of the next tokens."""
    wanted = range(1, len(ids))
    return Record(
        tuple(ids), 1, tuple(Entry(i, ids[i], table[i - 1, ids[i]].item()) for i in wanted)
    )


def logits_of(model: Callable[[Tensor], Any], ids: Sequence[int]) -> Tensor:
    """[T, V], of our model or of transformers'."""
    with torch.inference_mode():
        answer = model(torch.tensor([ids]))
    logits: Tensor = getattr(answer, "logits", answer)[0]
    return logits if logits.dtype == torch.float64 else logits.float()


def records_of(
    logits: Callable[[Sequence[int]], Tensor],
    many: Sequence[Sequence[int]],
    report: Reported | None = None,
) -> list[Record]:
    records = []
    for ids in many:
        z = logits(ids)
        table = z.log_softmax(-1) if report is None else report(z, torch.tensor(ids))
        records.append(recorded(table, ids))
    return records


def opened(model: str) -> Original:
    """A checkpoint; "random": a small random one, with YaRN."""
    if model != "random":
        return Original(model)
    config = ModelConfig(
        vocab_size=97,
        hidden_size=40,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=8,
        dtype="bfloat16",
        rope_scaling=RopeScaling(4.0, 16),
    )
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in config.parameter_shapes().items():
        w = torch.randn(shape, generator=draw) * (0.3 if len(shape) == 2 else 0.5)
        weights[name] = (w + 1 if "norm" in name else w).bfloat16()
    path = Path(tempfile.mkdtemp()) / "random"
    write_checkpoint(path, config, weights.items())
    return Original(path)


# ---- right engines


def of_transformers(path: Path, dtype: str, attention: str, many: list[list[int]]) -> list[Record]:
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(
        path, dtype=DTYPES[dtype], attn_implementation=attention
    )
    return records_of(partial(logits_of, model), many)


def of_engine(path: Path, dtype: str, arithmetic: str, many: list[list[int]]) -> list[Record]:
    model = Qwen2.from_pretrained(path, dtype=dtype, arithmetic=arithmetic)
    scores = LLM(model).score(many, use_tqdm=False)
    records = []
    for ids, logprobs in zip(many, scores):
        entries = [Entry(i, ids[i], logprob) for i, logprob in enumerate(logprobs, 1)]
        records.append(Record(tuple(ids), 1, tuple(entries)))
    return records


def clean_engines(
    path: Path, dtype: str, many: list[list[int]]
) -> Iterator[tuple[str, list[Record]]]:
    for attention in ("eager", "sdpa"):
        yield f"transformers {attention}", of_transformers(path, dtype, attention, many)
    for arithmetic in ("native", "exact"):
        yield f"ours, paged, {arithmetic}", of_engine(path, dtype, arithmetic, many)


def clean_reports(original: Original, dtype: str, seed: int) -> Iterator[tuple[str, Report]]:
    for name, records in clean_engines(original.path, dtype, texts(original, seed)):
        yield name, audit(original, records, dtype)


def served_reports(original: Original, dtype: str, seed: int) -> Iterator[tuple[str, Report]]:
    """Of transformers behind a server, which is asked for texts and for chats."""
    from transformers import Qwen2ForCausalLM

    server = run_with_neighbours("openai_server.py")
    words = TEXT.split()
    random.Random(seed).shuffle(words)
    for attention in ("eager", "sdpa"):
        model = Qwen2ForCausalLM.from_pretrained(
            original.path, dtype=DTYPES[dtype], attn_implementation=attention
        )
        engine = server["Engine"](lambda ids, model=model: model(ids).logits, original.tokenizer)
        with server["served"](engine) as url:
            report = audit_endpoint(Endpoint(url), original, dtype, text=" ".join(words))
        yield f"transformers {attention}", report


def run_with_neighbours(name: str) -> dict[str, Any]:
    """A file of tests/support that imports others of it. Nothing imports tests."""
    sys.path.insert(0, str(SUPPORT.parent))
    try:
        return runpy.run_path(str(SUPPORT / name))
    finally:
        sys.path.pop(0)


def print_clean(args: argparse.Namespace) -> None:
    original = opened(args.model)
    alarms = runs = 0
    print(f"{'dtype':10}{'engine':24}{'text':>5}{'units':>8}{'99% interval':>18}  verdict")
    for dtype in DTYPES:
        for seed in range(args.runs):
            for name, report in args.reports(original, dtype, seed):
                runs, alarms = runs + 1, alarms + (report.verdict != "agree")
                interval = f"{report.low:.2f} to {report.high:.2f}"
                row = f"{dtype:10}{name:24}{seed:5}{report.units:8.2f}{interval:>18}"
                print(f"{row}  {report.verdict}", flush=True)
    print(f"{alarms} alarms in {runs} runs")


# ---- wrong engines


class Wrong(NamedTuple):
    """An engine with a mistake: its logits of a text, and what it reports of them."""

    name: str
    logits: Callable[[Sequence[int]], Tensor]
    report: Reported | None = None


def of_catalogue(original: Original, dtype: torch.dtype) -> Iterator[Wrong]:
    """Every mistake of one text at a time that a model with this config can have."""
    for fault in FAULTS.values():
        if fault.encode is None and not fault.silent and fault.applies(original.config):
            try:
                model = original.wrong(fault, dtype)
            except MinqwenError as error:
                print(f"{fault.name:32} no engine runs it: {error}")
                continue
            report = None if fault.report is None else fault.logprobs
            yield Wrong(fault.name, partial(logits_of, model), report)


def of_second_implementation(original: Original, dtype: torch.dtype) -> Iterator[Wrong]:
    """The same mistakes in transformers. Nothing imports tests, so the file is run by its path."""
    from transformers import Qwen2ForCausalLM

    support = runpy.run_path(str(SUPPORT / "broken_transformers.py"))
    model = Qwen2ForCausalLM.from_pretrained(
        original.path, dtype=torch.float32, attn_implementation="eager"
    )
    for planted in support["PLANTED"]:
        possible = planted.needs(model.config) and FAULTS[planted.name].applies(original.config)
        if possible and not FAULTS[planted.name].silent:
            with support["broken"](planted, model, dtype) as broken:
                yield Wrong(planted.name, partial(logits_of, broken))


def print_wrong(args: argparse.Namespace) -> None:
    """Judge all of them, and count."""
    original, dtype = opened(args.model), DTYPES[args.dtype]
    many = texts(original, 0)
    truth = tables_of(partial(logits_of, original.right(torch.float64, Native())), many)
    unit = rms(tables_of(partial(logits_of, original.right(dtype, Native())), many) - truth)
    counts: Counter[str] = Counter()
    print(f"{'mistake':32}{'logits':>10}{'units':>10}  verdict  named")
    for wrong in args.engines(original, dtype):
        if args.only and wrong.name not in args.only:
            continue
        size = rms(tables_of(wrong.logits, many, wrong.report) - truth) / unit
        report = audit(original, records_of(wrong.logits, many, wrong.report), args.dtype)
        found = report.explained_by
        named = found is not None and found.name == wrong.name
        where = "above" if size > ROUNDING else "below"
        counts.update({where: 1, f"{where}, diverges": report.verdict == "diverge"})
        counts[f"{where}, named"] += named
        counts["wrong name"] += found is not None and not named
        print(row_of(wrong.name, size, report), flush=True)
    for where in ("above", "below"):
        print(
            f"{counts[where]} mistakes {where} {ROUNDING} units of logits: "
            f"{counts[f'{where}, diverges']} diverge, {counts[f'{where}, named']} are named"
        )
    print(f"{counts['wrong name']} have a wrong name")


def tables_of(
    logits: Callable[[Sequence[int]], Tensor],
    many: Sequence[Sequence[int]],
    report: Reported | None = None,
) -> Tensor:
    """All log probabilities of all texts; what is impossible counts 60 nats."""
    tables = []
    for ids in many:
        z = logits(ids)
        table = z.log_softmax(-1) if report is None else report(z, torch.tensor(ids))
        tables.append(table.double().clamp_min(-60.0))
    return torch.cat(tables)


def row_of(wrong: str, size: float, report: Report) -> str:
    found = report.explained_by
    name = "-" if found is None else f"{found.name} ({found.units:.2f} units)"
    if found is not None and found.name == wrong:
        name = f"yes ({found.units:.2f} units)"
    return f"{wrong:32}{size:10.4g}{report.units:10.4g}  {report.verdict:8} {name}"


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, reports in (("clean", clean_reports), ("served", served_reports)):
        command = parser.add_command(name)
        command.add_argument("--runs", type=int, default=3, help="texts of each engine")
        command.set_defaults(do=print_clean, reports=reports)
    for name, engines in (("faults", of_catalogue), ("planted", of_second_implementation)):
        command = parser.add_command(name)
        command.set_defaults(do=print_wrong, engines=engines)
        command.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
        command.add_argument("--only", nargs="+", metavar="NAME")
    for command in parser.commands.values():
        command.add_argument(
            "--model", default=str(EMBEDDED), metavar="DIR", help='a checkpoint, or "random"'
        )
    args = parser.parse_args()
    args.do(args)
    return 0


if __name__ == "__main__":
    run(main)
