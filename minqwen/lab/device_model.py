"""What one checkpoint's model computes here, as outcomes like those of device.py.

Its exact fingerprints, exact logits in whatever company and order, native logits beside those of
transformers. Each function yields its outcomes one after the other.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minqwen.checks import dtype_name
from minqwen.lab.device import Outcome, difference
from minqwen.lab.device_checks import STORAGE, in_pieces
from minqwen.lab.golden import fingerprint, prompts
from minqwen.model import Batch, Qwen2

RANKS = 2  # processes of `on_ranks`
BLOCK_SIZE = 16
DIGESTS = "minqwen.lab.rank_digests"  # what each of them runs
PACKAGE = str(Path(__file__).resolve().parents[2])  # the directory that `minqwen` is in


def fingerprints(path: str | Path, device: str, frozen: Mapping[str, str]) -> Iterator[Outcome]:
    """One for each storage dtype: on the CPU, on the device, and as it was frozen.

    The digest is the outcome's note.
    """
    for dtype in STORAGE:
        began, name = time.perf_counter(), dtype_name("dtype", dtype)
        here = fingerprint(path, dtype, device="cpu")
        outcome = Outcome("fingerprint", name, note=here)
        if name in frozen:
            note_digest(outcome, "the frozen one", frozen[name], here)
        if device != "cpu":
            note_digest(outcome, device, fingerprint(path, dtype, device=device), here)
        outcome.seconds = time.perf_counter() - began
        yield outcome


def note_digest(outcome: Outcome, what: str, other: str, here: str) -> None:
    """Note whether a digest from elsewhere is that of the CPU."""
    outcome.against.append(what)
    if other != here:
        outcome.differences.append(f"{what}: {other or 'none'}, not {here}")


@torch.inference_mode()
def in_any_company(path: str | Path, device: str) -> Iterator[Outcome]:
    """Exact logits of a prompt alone, among others, and in pieces over blocks: all the same.

    Native float32 is the control. It should differ; where it does not, the check shows little.
    """
    for arithmetic in ("exact", "native"):
        began = time.perf_counter()
        model = Qwen2.from_pretrained(path, dtype="float32", device=device, arithmetic=arithmetic)
        ids = [each[0].to(device) for each in prompts(model.config.vocab_size)]
        alone = [model(each[None])[0].cpu() for each in ids]
        found = {
            "together": together(model, ids),
            "in pieces": [in_pieces(model, each).cpu() for each in ids],
        }
        outcome = Outcome("model", f"{arithmetic} float32, alone, among others, in pieces")
        outcome.numbers = sum(x.numel() for x in alone)
        for what, logits in found.items():
            wrong = difference(alone, logits, ())
            outcome.against.append(what)
            if wrong:
                outcome.differences.append(f"{what}: {wrong}")
        outcome.seconds = time.perf_counter() - began
        if arithmetic == "native":
            outcome = control(outcome)
        yield outcome


def control(outcome: Outcome) -> Outcome:
    """The same as a note: what is expected to differ proves nothing wrong when it does."""
    outcome.note = "; ".join(outcome.differences) or "no difference, though one was expected"
    outcome.name, outcome.against, outcome.differences = f"control: {outcome.name}", [], []
    return outcome


def together(model: Qwen2, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Logits of sequences of ids [T] that share one step, over blocks dealt out in turn."""
    lengths = [len(ids) for ids in sequences]
    most = -(-max(lengths) // BLOCK_SIZE)
    blocks = [[j * len(lengths) + i for j in range(most)] for i in range(len(lengths))]
    cache = model.new_cache(most * len(lengths), BLOCK_SIZE)
    batch = Batch.paged(lengths, lengths, blocks, BLOCK_SIZE, device=model.device)
    logits: Tensor = model(torch.cat(list(sequences)), batch, cache)
    return list(logits.cpu().split(lengths))


@torch.inference_mode()
def beside_transformers(path: str | Path, device: str) -> Iterator[Outcome]:
    """Native logits in float32 and bfloat16 against transformers' eager attention."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging
    except ImportError:
        yield Outcome("model", "native beside transformers", note="transformers is not installed")
        return
    messages: Any = transformers_logging
    messages.disable_progress_bar()
    for dtype in (torch.float32, torch.bfloat16):
        began = time.perf_counter()
        theirs: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="eager"
        )
        theirs = theirs.to(device)
        ours = Qwen2.from_pretrained(path, dtype=dtype, device=device)
        ids = [each.to(device) for each in prompts(ours.config.vocab_size)]
        logits = [ours(each).cpu() for each in ids]
        outcome = Outcome("model", f"native {dtype_name('dtype', dtype)} beside transformers")
        outcome.numbers = sum(x.numel() for x in logits)
        outcome.against.append(f"transformers on {device}")
        wrong = difference([theirs(each).logits.cpu() for each in ids], logits, ())
        if wrong:
            outcome.differences.append(f"transformers on {device}: {wrong}")
        outcome.seconds = time.perf_counter() - began
        yield outcome


def on_ranks(
    path: str | Path, device: str = "cpu", module: str = DIGESTS, seconds: float = 600.0
) -> Iterator[Outcome]:
    """The exact float32 fingerprint of RANKS processes, and native's as the control.

    module: what each of the processes runs. seconds: after which they are ended.
    """
    began, name = time.perf_counter(), f"exact float32 on {RANKS} ranks"
    if device == "cuda" and torch.cuda.device_count() < RANKS:
        yield Outcome("model", name, note=f"skipped: there are fewer than {RANKS} GPUs")
        return
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*start, str(RANKS), "-m", module, str(path), device]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([PACKAGE, *sys.path])}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # so that all of them can be ended
    ) as child:
        try:
            out, errors = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            late = f"{RANKS} ranks: no end in {seconds:.0f} s"
            yield Outcome("model", name, against=[f"{RANKS} ranks"], differences=[late])
            return
    lines = (line.split() for line in out.splitlines())
    digests = {words[0]: words[1] for words in lines if len(words) == 2}
    for arithmetic in ("exact", "native"):
        outcome = Outcome("model", f"{arithmetic} float32 on {RANKS} ranks")
        here = fingerprint(path, "float32", arithmetic, device=device)
        note_digest(outcome, f"{RANKS} ranks", digests.get(arithmetic, ""), here)
        if child.returncode:
            outcome.note = (errors.strip().splitlines() or ["no output"])[-1]
        outcome.seconds = time.perf_counter() - began
        yield outcome if arithmetic == "exact" else control(outcome)
