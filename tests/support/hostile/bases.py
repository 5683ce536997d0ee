"""Small sound checkpoint directories, of every kind that is read, and a process that reads them."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import sentencepiece
from safetensors.torch import save_file
from support.checkpoints import tiny, write
from support.hostile import worker
from support.hostile.cases import CANARY, FILE, GENERATION, INDEX, TEMPLATE, Case
from support.paths import ROOT
from support.quantised import AWQ, checkpoint
from support.quantised import read as read_tensors
from support.quantised import tiny as tiny_quantised
from support.tokenizer import tiny_json

from minqwen.heads.convert import extend
from minqwen.heads.layout import layout

SECONDS = 120  # a directory that is waited for so long hangs: none should be waited for at all
CONFIG = tiny(vocab_size=260, rope_theta=1e4)


def make_bases(root: Path) -> None:
    """root/one, many, older, pieces, wide and awq."""
    one = root / "one"
    write(one, CONFIG)
    tiny_json(one)
    (one / GENERATION).write_text(json.dumps({"eos_token_id": 258}))
    (one / TEMPLATE).write_text("{{ messages[0].content }}")
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (one / name).write_text("{}")
    (one / "additional_chat_templates").mkdir()
    (one / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    write(root / "many", CONFIG, max_file_bytes=16000, sources=one)
    shutil.copytree(one, root / "older")
    as_older(root / "older")
    shutil.copytree(one, root / "pieces")
    as_pieces(root / "pieces")
    extend(one, root / "wide", layout(CONFIG, 8))
    as_awq(root / "awq", one)


def as_older(path: Path) -> None:
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def as_pieces(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hell is other people", "say hello to all of them"] * 20),
        model_prefix=str(path / "tokenizer"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (path / "tokenizer.vocab").unlink()


def as_awq(path: Path, one: Path) -> None:
    config = tiny_quantised(quant=AWQ).replace(vocab_size=260, max_position_embeddings=128)
    checkpoint(path, config)
    tensors = read_tensors(path)
    for file in (*path.glob("model*"), path / "tokenizer.json"):
        file.unlink()
    assert not (path / INDEX).exists()
    save_file(tensors, path / FILE)
    for name in ("tokenizer.json", "tokenizer_config.json", TEMPLATE):
        shutil.copy(one / name, path)


class Reader:
    """A process that reads directories (worker.py). It starts again when one ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def read(self, case: Case, bases: Path, work: Path) -> dict[str, Any]:
        """What became of a copy of the case's base after its change: worker.py's answer."""
        path = work / "c"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(bases / case.base, path)
        case.change(path)
        action, _, part = case.action.partition(" ")
        reply = self._ask({"action": action, "path": str(path / part)}, work)
        reply["canary"] = (work / CANARY).exists() or (path / CANARY).exists()
        reply["out"] = (work / "out").exists()
        return reply

    def _ask(self, request: dict[str, str], work: Path) -> dict[str, Any]:
        process = self._running(work)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        ready, _, _ = select.select([process.stdout], [], [], SECONDS)
        line = process.stdout.readline() if ready else b""
        if not line:
            process.kill()
            kind = f"ended with status {process.wait()}" if ready else "hangs"
            self.process = None
            return {"kind": kind, "text": "", "megabytes": 0, "printed": ""}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _running(self, work: Path) -> subprocess.Popen[bytes]:
        if self.process is None:
            path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
            self.process = subprocess.Popen(
                [sys.executable, worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,  # select() sees no line that Python has read ahead
                cwd=work.parent,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path},
            )
        return self.process

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
