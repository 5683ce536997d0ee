"""Heads that are added while a checkpoint is loaded: as if it had been extended on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import refusal
from support.heads import random_model
from support.paths import EMBEDDED
from support.quantised import LINEARS, checkpoint, tiny

from minqwen import Checkpoint, ModelConfig
from minqwen.checkpoint import write_checkpoint
from minqwen.heads.convert import extend
from minqwen.heads.layout import RECIPES, layout
from minqwen.heads.proposals import asked_layout
from minqwen.heads.view import ExtendedCheckpoint, load_pretrained, open_weights, runs
from minqwen.parallel import Shard, shard

IDS = torch.arange(40, 60)[None]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (1, 2, 4, 8, 16)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous()) and torch.equal(
        a.view(torch.uint8), b.contiguous().view(torch.uint8)
    )


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def small(request, tmp_path_factory) -> Path:
    """A checkpoint with 28 query and 4 KV heads, two layers."""
    path = tmp_path_factory.mktemp("view") / "small"
    config, weights = random_model(28, 4, dtype=request.param)
    write_checkpoint(path, config, weights.items())
    return path


def slices_of_ranks(name: str, config: ModelConfig) -> set[Shard]:
    """All slices of a tensor that ranks hold, each once."""
    all_ranks = [(rank, size) for size in (2, 4, 5, 8, 16) for rank in range(size)]
    return {shard(name, config, rank, size) for rank, size in all_ranks} - {None}


@pytest.mark.parametrize("counts", [(32, None), (32, 8), (28, 28), (40, 5)], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_tensor_and_every_rank_s_slice_is_what_extend_writes(small, tmp_path, recipe, counts):
    extend(small, tmp_path / "wide", layout(ModelConfig.from_json(small), *counts, recipe=recipe))
    written, view = Checkpoint(tmp_path / "wide"), open_weights(small, *counts, recipe)
    assert view.config == written.config and set(view.names) == set(written.names)
    for name in written.names:
        whole = written.read(name)
        assert same_bits(view.read(name), whole), name
        for mine in slices_of_ranks(name, view.config):
            piece = whole.narrow(mine.dim, mine.start, mine.stop - mine.start)
            assert same_bits(view.read(name, mine), piece), (name, mine)


@pytest.mark.parametrize("recipe", RECIPES)
def test_slices_that_cut_a_head_or_lie_along_the_other_dimension(small, tmp_path, recipe):
    extend(small, tmp_path / "wide", layout(ModelConfig.from_json(small), 32, recipe=recipe))
    written, view = Checkpoint(tmp_path / "wide"), open_weights(small, 32, None, recipe)
    for projection in "qkvo":
        name = f"model.layers.1.self_attn.{projection}_proj.weight"
        for piece in (Shard(0, 3, 11), Shard(1, 5, 30), Shard(0, 8, 8), Shard(1, 16, 16)):
            assert same_bits(view.read(name, piece), written.read(name, piece)), (name, piece)


def test_a_padded_mlp_is_read_by_slices_too(small):
    source = Checkpoint(small)
    to = layout(source.config, 32, intermediate_size=56, intermediate_block=2)
    view = ExtendedCheckpoint(source, to)
    for kind in ("gate", "up", "down"):
        name = f"model.layers.0.mlp.{kind}_proj.weight"
        parts = [view.read(name, shard(name, view.config, rank, 8)) for rank in range(8)]
        dim = 1 if kind == "down" else 0
        assert same_bits(torch.cat(parts, dim).contiguous(), view.read(name))


def test_what_is_read_goes_where_it_is_wanted(small):
    view, name = open_weights(small, 32), "model.layers.0.self_attn.o_proj.weight"
    assert view.read(name, dtype=torch.float64).dtype == torch.float64
    out = torch.empty(40, 32 * 8)
    assert view.read(name, out=out) is out and torch.equal(out, view.read(name).float())


# ---- what a rank reads ---------------------------------------------------------------------------


class Counting(Checkpoint):
    """Counts the bytes of the slices that were asked for."""

    read_bytes = 0

    def read(self, name, shard=None, dtype=None, device="cpu", out=None):
        value = super().read(name, shard, dtype, device, out)
        self.read_bytes += value.numel() * self.dtype(name).itemsize
        return value


def bytes_read(size: int, rank: int, recipe: str = "ghost") -> tuple[int, int]:
    """Bytes that a rank reads of the embedded model for 32 heads, and bytes that it then holds."""
    source = Counting(EMBEDDED)
    view = ExtendedCheckpoint(source, asked_layout(source.config, 32, None, recipe))
    held = 0
    for name in view.names:
        value = view.read(name, shard(name, view.config, rank, size))
        held += value.numel() * value.element_size()
    return source.read_bytes, held


# For 28 heads read as 32, recipe ghost: fewest and most bytes that a rank reads. The file has
# 14,233,984; more are read in all where several ranks hold a KV head, or the q of a new slot.
BYTES_READ = {
    1: (14_233_984, 14_233_984),
    2: (7_121_024, 7_121_024),
    4: (3_564_544, 3_564_544),
    8: (1_843_840, 1_901_184),
    16: (954_752, 1_012_096),
}


@pytest.mark.parametrize("size", BYTES_READ)
def test_a_rank_reads_only_the_heads_that_it_needs(size):
    found = [bytes_read(size, rank) for rank in range(size)]
    assert (min(read for read, _ in found), max(read for read, _ in found)) == BYTES_READ[size]
    assert all(read <= held for read, held in found)


@pytest.mark.parametrize("recipe", ["zero", "split", "weighted"])
def test_a_rank_reads_no_more_than_it_holds(recipe):
    for rank in range(8):
        read, held = bytes_read(8, rank, recipe)
        assert read <= held, (rank, read, held)


def test_runs_are_ranges_of_neighbours():
    assert runs([]) == [] and runs([3]) == [(3, 4)]
    assert runs([0, 4, 5, 6]) == [(0, 1), (4, 7)] and runs([1, 2, 4]) == [(1, 3), (4, 5)]


def test_a_model_with_more_heads_is_saved_as_extend_writes_it(small, tmp_path):
    load_pretrained(small, num_attention_heads=32).save_pretrained(tmp_path / "saved")
    extend(small, tmp_path / "wide", layout(ModelConfig.from_json(small), 32))
    saved, written = Checkpoint(tmp_path / "saved"), Checkpoint(tmp_path / "wide")
    assert saved.config == written.config
    for name in written.names:
        assert same_bits(saved.read(name), written.read(name)), name


def test_an_extension_is_not_extended_again_but_may_be_named_as_it_is(small, tmp_path):
    extend(small, tmp_path / "wide", layout(ModelConfig.from_json(small), 32))
    refusal(lambda: open_weights(tmp_path / "wide", 64), "wide", "extended already")
    assert isinstance(open_weights(tmp_path / "wide", 32), Checkpoint)


def test_words_of_weights_with_heads_are_not_those_of_the_file(tmp_path):
    """Nobody may take them for the weights that are read; those without heads are as they lie."""
    checkpoint(tmp_path / "packed", tiny(), linears=LINEARS)
    source = Checkpoint(tmp_path / "packed")
    view = ExtendedCheckpoint(source, layout(source.config, 4))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        words = view.words_of(f"model.layers.0.self_attn.{name}.weight")
        assert words == "they have other heads here than in their files"
    for name in ("gate_proj", "down_proj"):
        words = view.words_of(f"model.layers.0.mlp.{name}.weight")
        assert words is not None and words is source.words_of(f"model.layers.0.mlp.{name}.weight")
    assert view.words_of("model.norm.weight") is None
