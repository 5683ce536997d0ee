"""Golden packs: what a model computes on some prompts, by name, with every digest. Their reader.

A pack is a directory with manifest.json and, for each run and prompt, RUN.N.safetensors, whose keys
are points (model/trace.py). Runs are those of runs.py; tensors have no batch dimension. The logits
are whole rows, or the numbers of K tokens in each row ("logits.ids", "logits.values") and the
SHA-256 of the whole row. pack_writer.py makes packs, pack_check.py computes them again, and
docs/golden.md is for their users.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minqwen.checkpoint.embedded import EMBEDDED
from minqwen.checks import boolean, did_you_mean, integer, mapping
from minqwen.config import ModelConfig
from minqwen.errors import PackError, told
from minqwen.files import and_more, check_regular, quoted, read_json_object
from minqwen.lab.golden import digest, file_digests
from minqwen.lab.packs.runs import find_run
from minqwen.model.trace import canonical, every_name

MANIFEST = "manifest.json"
FORMAT = "minqwen golden pack 1"
LOGITS, TOP_IDS, TOP_VALUES = "logits", "logits.ids", "logits.values"
EMBEDDED_MODEL = "embedded"  # in place of its directory, which is another one on every machine

_FILE = re.compile(r"[\w-]+\.\d+\.safetensors")


class Entry(NamedTuple):
    """What the manifest says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class PackPrompt:
    """A prompt: its token ids, and its text if it was made of one."""

    ids: list[int]
    text: str | None


@dataclass(frozen=True)
class Recorded:
    """One run over one prompt. rows: the SHA-256 of each whole row of logits."""

    tensors: dict[str, Entry]
    rows: list[str]


@dataclass(frozen=True)
class Pack:
    """An open pack.

    names: the points that are kept, in the order of computation. top_k: of how many tokens of each
    row the logits are kept; None: of all. weights: {file: SHA-256} of what makes the model.
    machine: what the pack was made with. streamed: it was made layer by layer.
    """

    path: Path
    config: ModelConfig
    model_dir: Path
    prompts: tuple[PackPrompt, ...]
    runs: tuple[str, ...]
    names: tuple[str, ...]
    top_k: int | None
    weights: dict[str, str]
    machine: dict[str, str]
    streamed: bool
    recorded: dict[tuple[str, int], Recorded]

    @staticmethod
    def open(path: str | Path) -> Pack:
        """Read and check the manifest; no tensor is read. Raises PackError."""
        path = Path(path)
        if not os.path.lexists(path / MANIFEST):
            raise PackError(
                f"{path}: has no {MANIFEST}, expected the directory of a golden pack; make one "
                "with tools/golden.py make"
            )
        content = read_json_object(path / MANIFEST, PackError)
        _check_manifest(path / MANIFEST, content)
        try:
            return _pack_of(path, content)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            raise PackError(
                f"{path / MANIFEST}: is no manifest of a pack ({told(e)}); make the pack again"
            ) from None

    @property
    def full_logits(self) -> bool:
        """Whether the logits' whole rows are kept."""
        return self.top_k is None

    def read(self, run: str, prompt: int, name: str) -> Tensor:
        """A point of one run over prompt number `prompt`, with the digest that was recorded.

        Raises PackError if it is not there or damaged.
        """
        name = canonical(name)
        where = f"{self.path}: {run}, prompt {prompt}"
        recorded = self.recorded.get((run, prompt))
        if recorded is None:
            raise PackError(
                f"{where}: not in the pack, expected one of {', '.join(self.runs)} and a prompt "
                f"from 0 to {len(self.prompts) - 1}"
            )
        if name not in recorded.tensors:
            hint = did_you_mean(name, recorded.tensors)
            if name == LOGITS:
                hint = f": only the logits of {self.top_k} tokens are, see Pack.top"
            raise PackError(f"{where}: {name} is not in the pack{hint}")
        return self._read_tensor(self.file(run, prompt), name, recorded.tensors[name])

    def top(self, run: str, prompt: int) -> tuple[Tensor, Tensor]:
        """The K tokens of each row whose logits are kept, [T, K], and these logits, [T, K].

        They are the likeliest tokens of the pack's first run, in its order.
        """
        return self.read(run, prompt, TOP_IDS), self.read(run, prompt, TOP_VALUES)

    def file(self, run: str, prompt: int) -> Path:
        return self.path / file_name(run, prompt)

    def damage(self) -> list[str]:
        """One line for each tensor that is not what the manifest says."""
        found = []
        for (run, prompt), recorded in self.recorded.items():
            for name in recorded.tensors:
                try:
                    self.read(run, prompt, name)
                except PackError as error:
                    found.append(str(error))
        return found

    def check_model(self, model_dir: str | Path | None = None) -> Path:
        """The directory of the pack's model. Raises PackError if it holds another one."""
        directory = Path(self.model_dir if model_dir is None else model_dir)
        here = file_digests(directory)
        both = here.keys() | self.weights.keys()
        other = [file for file in sorted(both) if here.get(file) != self.weights.get(file)]
        if other or ModelConfig.from_json(directory) != self.config:
            named = directory / other[0] if other else directory / "config.json"
            raise PackError(
                f"{named}: is not the file that {self.path} was made of{and_more(other)}; give the "
                "right directory with --model, or make the pack again"
            )
        return directory

    def _read_tensor(self, file: Path, name: str, entry: Entry) -> Tensor:
        try:
            check_regular(file, PackError)
            with safe_open(file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(name).clone()
        except (SafetensorError, OSError) as e:
            why = " ".join(str(e).split())[:200]
            raise PackError(f"{file}: {name} cannot be read ({why}); make the pack again") from None
        if described(tensor) != entry:
            raise PackError(
                f"{file}: {name} is not what the manifest says: its shape, dtype or SHA-256 is "
                "another; make the pack again"
            )
        return tensor


# ---- what a manifest says -----------------------------------------------------------------------


def file_name(run: str, prompt: int) -> str:
    return f"{run}.{prompt}.safetensors"


def is_pack_file(name: str) -> bool:
    """Whether a pack has files of that name."""
    return name == MANIFEST or _FILE.fullmatch(name) is not None


def described(tensor: Tensor) -> Entry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Entry(dtype, tuple(tensor.shape), digest([tensor]))


def manifest_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of all that a manifest says besides this digest."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(rest, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_manifest(file: Path, content: dict[str, Any]) -> None:
    if content.get("format") != FORMAT:
        raise PackError(
            f"{file}: format is {content.get('format')!r}, expected {FORMAT!r}; make the pack "
            "again with this version"
        )
    if content.get("sha256") != manifest_digest(content):
        raise PackError(
            f"{file}: was changed: its contents have another SHA-256 than the one it gives; make "
            "the pack again"
        )


def _pack_of(path: Path, content: dict[str, Any]) -> Pack:
    config = ModelConfig.from_dict(content["config"], source=f"{path / MANIFEST}: config")
    model = content["model"]
    runs = tuple(find_run(name).name for name in content["runs"])
    prompts = tuple(_prompt(p, config) for p in content["prompts"])
    if not prompts or not runs:
        raise PackError("it has no prompt or no run, expected one of each")
    names, top_k = tuple(content["points"]), content["top_k"]
    unknown = [name for name in names if name not in every_name(config.num_hidden_layers)]
    if unknown:
        raise PackError(f"points has {quoted(unknown[0])}, expected points of its model")
    if top_k is not None:
        integer("top_k", top_k, 1, config.vocab_size, error=PackError)
    keys = {*names} if top_k is None else {*names, TOP_IDS, TOP_VALUES}
    recorded = {
        (run, n): _recorded(content["runs"][run]["prompts"][n], keys)
        for run in runs
        for n in range(len(prompts))
    }
    return Pack(
        path=path,
        config=config,
        model_dir=EMBEDDED if model == EMBEDDED_MODEL else Path(model),
        prompts=prompts,
        runs=runs,
        names=names,
        top_k=top_k,
        weights=_texts("weights", content["weights"]),
        machine=_texts("machine", content["machine"]),
        streamed=boolean("streamed", content["streamed"], error=PackError),
        recorded=recorded,
    )


def _prompt(content: Mapping[str, Any], config: ModelConfig) -> PackPrompt:
    ids, text = content["ids"], content["text"]
    if not isinstance(ids, list) or not ids or not isinstance(text, str | None):
        raise PackError(f"a prompt is {quoted(content, 100)}, expected ids and a text or null")
    most = config.vocab_size - 1
    return PackPrompt([integer("an id", id, 0, most, error=PackError) for id in ids], text)


def _texts(where: str, content: Any) -> dict[str, str]:
    """An object whose values are texts."""
    found = dict(mapping(where, content, error=PackError))
    if not all(isinstance(text, str) for text in found.values()):
        raise PackError(f"{where} is {quoted(content, 100)}, expected texts")
    return found


def _recorded(content: Mapping[str, Any], keys: set[str]) -> Recorded:
    if content["tensors"].keys() != keys:
        raise PackError(f"a run has {len(content['tensors'])} tensors, expected {len(keys)}")
    tensors = {
        name: Entry(entry["dtype"], tuple(entry["shape"]), entry["sha256"])
        for name, entry in content["tensors"].items()
    }
    return Recorded(tensors, list(content["logit_rows"]))
