"""Writes golden packs (packs.py): runs a model over prompts and keeps what it computes.

A pack appears whole or not at all. In memory there is one run of one prompt at a time, or of all
prompts if the model is streamed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minqwen.checkpoint import Checkpoint
from minqwen.checkpoint.embedded import EMBEDDED
from minqwen.checkpoint.tensor_file import save_tensors
from minqwen.checks import integer
from minqwen.config import ModelConfig
from minqwen.errors import PackError
from minqwen.files import quoted, read_json_object, replacing_directory
from minqwen.lab.golden import digest, file_digests
from minqwen.lab.machine import this_machine
from minqwen.lab.packs.pack import (
    EMBEDDED_MODEL,
    FORMAT,
    LOGITS,
    MANIFEST,
    TOP_IDS,
    TOP_VALUES,
    Pack,
    PackPrompt,
    described,
    file_name,
    is_pack_file,
    manifest_digest,
)
from minqwen.lab.packs.runs import Run, Tensors, compute, find_run
from minqwen.model.qwen2 import make_arithmetic
from minqwen.model.trace import Names, every_name, point_of, select

DEFAULT_RUNS = ("float64", "native-float32", "native-bfloat16", "exact-float32")
SMALL_VOCABULARY = 1 << 15  # up to so many rows, logits are kept whole if nobody asks for less
DEFAULT_TOP_K = 20


@dataclass(frozen=True)
class Recipe:
    """What to put into a pack. Raises PackError, ConfigError, TraceError for what cannot be.

    points: as trace.py's `select` takes them; logits are always kept. top_k: the logits of so many
    tokens of each row, the likeliest of the first run; 0: of all; None: of all if the vocabulary is
    small. streamed: the model is read layer by layer.
    """

    model_dir: Path
    prompts: tuple[PackPrompt, ...]
    points: Names = None
    runs: tuple[str, ...] = DEFAULT_RUNS
    top_k: int | None = None
    streamed: bool = False

    def __post_init__(self) -> None:
        config = ModelConfig.from_json(self.model_dir)
        select(self.points, config.num_hidden_layers)
        for name in self.runs:
            find_run(name)
        if not self.runs or len(set(self.runs)) < len(self.runs):
            raise PackError(f"runs are {list(self.runs)}, expected each one once, and at least one")
        if not self.prompts:
            raise PackError("there is no prompt: give at least one")
        for n, prompt in enumerate(self.prompts):
            check_prompt(n, prompt, config.vocab_size)
        if self.top_k is not None:
            integer("top_k", self.top_k, 0, error=PackError)

    @property
    def kept_logits(self) -> int | None:
        """`Pack.top_k` of the pack: of how many tokens logits are kept; None: of all."""
        rows = ModelConfig.from_json(self.model_dir).vocab_size
        top_k = self.top_k
        if top_k is None:
            top_k = 0 if rows <= SMALL_VOCABULARY else DEFAULT_TOP_K
        return top_k if 0 < top_k < rows else None


def check_prompt(number: int, prompt: PackPrompt, rows: int) -> None:
    """Raise PackError unless the prompt has tokens, all of the vocabulary."""
    if not prompt.ids:
        raise PackError(f"prompt {number} has no tokens, expected at least one")
    wrong = [id for id in prompt.ids if not 0 <= id < rows]
    if wrong:
        raise PackError(
            f"prompt {number} has the token {wrong[0]}, expected 0 to {rows - 1}; correct it"
        )


def make(out: str | Path, recipe: Recipe, overwrite: bool = False) -> Pack:
    """Write the pack and open it. Raises PackError if there is something at `out` already.

    overwrite: a pack that is there is replaced, and nothing else.
    """
    out = Path(out)
    check_replaceable(out, overwrite)
    Checkpoint(recipe.model_dir).check()
    with replacing_directory(out, PackError) as directory:
        writer = Writer(directory, recipe)
        for name in recipe.runs:
            writer.write(find_run(name))
        content = writer.manifest()
        (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return Pack.open(out)


def check_replaceable(out: Path, overwrite: bool) -> None:
    """Raise PackError for a place where something is that may not be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise PackError(f"{out}: is a file, expected a directory to write; choose another")
    names = sorted(path.name for path in out.iterdir())
    foreign = [name for name in names if not is_pack_file(name)]
    if foreign or (names and MANIFEST not in names):
        found = quoted((foreign or names)[0])
        raise PackError(
            f"{out}: exists and holds {found}, which would be lost; choose another directory"
        )
    if names and not overwrite:
        raise PackError(f"{out}: exists; choose another directory, or replace it with --overwrite")


class Writer:
    """Writes the runs of a recipe into a directory, one after another."""

    def __init__(self, directory: Path, recipe: Recipe):
        self.directory, self.recipe = directory, recipe
        self.config = ModelConfig.from_json(recipe.model_dir)
        layers = self.config.num_hidden_layers
        self.names = select(recipe.points, layers) | {LOGITS}
        self.order = [name for name in every_name(layers) if name in self.names]
        self.top_k = recipe.kept_logits
        self.top_ids: dict[int, Tensor] = {}  # of each prompt, [T, K], by the first run
        self.runs: dict[str, dict[str, Any]] = {}  # what the manifest says of them

    def write(self, run: Run) -> None:
        """Compute a run, and write a file for each prompt."""
        prompts = [prompt.ids for prompt in self.recipe.prompts]
        told: list[dict[str, Any]] = []
        every = compute(self.recipe.model_dir, run, prompts, self.names, self.recipe.streamed)
        for n, tensors in enumerate(every):
            rows = row_digests(tensors[LOGITS])
            if self.top_k is not None:
                self._cut_logits(n, tensors)
            metadata = {"format": "pt", "run": run.name, "prompt": str(n)}
            save_tensors(self.directory / file_name(run.name, n), tensors, PackError, metadata)
            told.append({"tensors": entries(tensors), "logit_rows": rows})
        self.runs[run.name] = {
            "dtype": run.dtype,
            "arithmetic": make_arithmetic(run.arithmetic).name,
            "prompts": told,
        }

    def _cut_logits(self, prompt: int, tensors: Tensors) -> None:
        """Leave of the logits those of the first run's likeliest tokens."""
        logits = tensors.pop(LOGITS)
        if prompt not in self.top_ids:
            self.top_ids[prompt] = likeliest(logits, self.top_k or 1)
        ids = self.top_ids[prompt]
        tensors[TOP_IDS], tensors[TOP_VALUES] = ids, logits.gather(-1, ids)

    def manifest(self) -> dict[str, Any]:
        """All that is told of the pack, and the digest of that."""
        recipe = self.recipe
        here = recipe.model_dir.resolve()
        content: dict[str, Any] = {
            "format": FORMAT,
            "model": EMBEDDED_MODEL if here == EMBEDDED.resolve() else str(here),
            "config": read_json_object(recipe.model_dir / "config.json", PackError),
            "weights": file_digests(recipe.model_dir),
            "machine": this_machine(),
            "streamed": recipe.streamed,
            "top_k": self.top_k,
            "prompts": [
                {"text": prompt.text, "ids": prompt.ids, "positions": list(range(len(prompt.ids)))}
                for prompt in recipe.prompts
            ],
            "points": {
                name: {"shape": point_of(name).shape, "split by": point_of(name).axis}
                for name in self.order
                if name != LOGITS or self.top_k is None
            },
            "runs": self.runs,
        }
        return content | {"sha256": manifest_digest(content)}


def entries(tensors: Tensors) -> dict[str, dict[str, Any]]:
    """What the manifest says of each tensor."""
    return {name: described(tensor)._asdict() for name, tensor in tensors.items()}


def row_digests(logits: Tensor) -> list[str]:
    """SHA-256 of each whole row."""
    return [digest([row]) for row in logits]


def likeliest(logits: Tensor, count: int) -> Tensor:
    """The ids of the largest logits of each row, [T, count]; of equal ones the lower id first."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].contiguous()
