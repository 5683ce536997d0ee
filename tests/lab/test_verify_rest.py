"""Weights that have nothing to do with heads are compared too, whatever the text shows of them."""

from __future__ import annotations

import pytest
import torch
from support.heads import extended, random_model

from minqwen import Checkpoint
from minqwen.checkpoint import write_checkpoint
from minqwen.checkpoint.reader import EMBEDDING
from minqwen.heads.layout import layout
from minqwen.lab import verify_rest
from minqwen.lab.verify import verify_checkpoints
from minqwen.lab.verify_rest import differing_weights, not_compared

NORM = "model.layers.1.input_layernorm.weight"
CONFIG, WEIGHTS = random_model(6, 3)


def write(path, config, weights) -> Checkpoint:
    dtype = getattr(torch, config.dtype)
    write_checkpoint(path, config, ((n, w.to(dtype)) for n, w in weights.items()))
    return Checkpoint(path)


@pytest.fixture
def original(tmp_path):
    return write(tmp_path / "a", CONFIG, WEIGHTS)


def changed(name: str, row: int | None = None, factor: float = 1.5) -> dict[str, torch.Tensor]:
    """The extension's weights, one tensor or one row of it times a factor."""
    _, wide = extended(CONFIG, WEIGHTS, layout(CONFIG, 9))
    wide[name] = wide[name].clone()
    if row is None:
        wide[name] *= factor
    else:
        wide[name][row] *= factor
    return wide


def extension(path, weights) -> Checkpoint:
    return write(path, CONFIG.replace(num_attention_heads=9), weights)


def test_a_row_of_a_token_that_the_text_does_not_hold_is_named(original, tmp_path):
    other = extension(tmp_path / "b", changed(EMBEDDING, row=96))
    report = verify_checkpoints(original, other, torch.arange(20)[None], torch.float32, "native")
    assert report.outputs == "bitwise" and report.verdict == "different"
    assert report.problems == [
        f"{EMBEDDING} is not the original's in 1 of 97 rows, the first is 96"
    ]


@pytest.mark.parametrize("piece", [1, 100, 1 << 22])
def test_rows_are_found_in_whatever_pieces_they_are_read(original, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(verify_rest, "PIECE", piece)
    weights = changed("model.layers.0.mlp.up_proj.weight", row=47)
    weights["model.layers.0.mlp.up_proj.weight"][3] = torch.nan
    weights[NORM] = weights[NORM] * 2
    assert differing_weights(original, extension(tmp_path / "b", weights)) == [
        "model.layers.0.mlp.up_proj.weight is not the original's in 2 of 48 rows, the first is 3",
        f"{NORM} is not the original's",
    ]


def test_another_dtype_is_the_same_weight(original, tmp_path):
    half = write(tmp_path / "b", CONFIG.replace(dtype="bfloat16"), WEIGHTS)
    assert differing_weights(original, half) == differing_weights(half, original) == []
    assert not_compared(original, half) == []


def test_what_has_another_size_is_said(original, tmp_path):
    to = layout(CONFIG, 9, intermediate_size=60)
    padded = write(tmp_path / "b", *extended(CONFIG, WEIGHTS, to))
    assert differing_weights(original, padded) == []
    [said] = not_compared(original, padded)
    assert said.startswith("6 tensors have other sizes, the first is model.layers.0.mlp.gate_proj")
