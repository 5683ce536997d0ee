"""Small golden packs of random models, and forgeries of them whose digests are right."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from minqwen.lab.packs.pack import MANIFEST, Pack, PackPrompt, described, file_name, manifest_digest
from minqwen.lab.packs.writer import Recipe, make
from support import checkpoints

IDS = [[5, 17, 60, 2, 9, 9, 31, 44, 0, 13], [3], [8, 41, 22, 7, 50, 33, 12]]


def prompts(ids=IDS):
    return tuple(PackPrompt(list(row), None) for row in ids)


def model(path: Path, **changes) -> Path:
    """A random checkpoint with activations of ordinary size."""
    config = checkpoints.tiny(**changes)
    tensors = {
        name: x * 10 if x.dim() == 2 else x + 1 for name, x in checkpoints.weights(config).items()
    }
    checkpoints.write_checkpoint(path, config, tensors.items())
    return path


def pack(directory: Path, out: str = "pack", model_dir: Path | None = None, **recipe) -> Pack:
    """A pack of a random model, DIRECTORY/model unless another is given."""
    model_dir = model_dir or directory / "model"
    if not model_dir.exists():
        model(model_dir)
    recipe = {"prompts": prompts(), "runs": ("float64",)} | recipe
    return make(directory / out, Recipe(model_dir, **recipe))


def sign(path: Path, change) -> None:
    """Let `change` edit a manifest, and make its digest right again."""
    content = json.loads((path / MANIFEST).read_text())
    change(content)
    content["sha256"] = manifest_digest(content)
    (path / MANIFEST).write_text(json.dumps(content))


def elsewhere(path: Path) -> None:
    """Let a pack say that it was made on another machine."""
    sign(path, lambda content: content["machine"].update(cpu="another"))


def forge(path: Path, run: str, prompt: int, name: str, change) -> None:
    """Let `change` alter a tensor of a pack, and make all digests right again."""
    file = path / file_name(run, prompt)
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})

    def told(content):
        entries = content["runs"][run]["prompts"][prompt]["tensors"]
        entries[name] = described(tensors[name])._asdict()

    sign(path, told)


def one_bit(x: torch.Tensor) -> torch.Tensor:
    """x with its last number moved to its neighbour."""
    x = x.clone()
    x.view(-1)[-1] = torch.nextafter(x.view(-1)[-1], torch.tensor(9.0, dtype=x.dtype))
    return x
