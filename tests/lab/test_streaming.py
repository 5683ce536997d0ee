"""A model that is read layer by layer computes what it computes in memory."""

from __future__ import annotations

import re

import pytest
import torch
from support.checkpoints import refusal
from support.packs import IDS, model

from minqwen import Checkpoint, Qwen2
from minqwen.lab.packs.runs import record_streamed
from minqwen.lab.packs.streaming import ROW_BLOCK, StreamedModel, cut
from minqwen.model.trace import UNTRACED, select


@pytest.fixture
def reads(monkeypatch):
    """What is read of a checkpoint: (name, shape), in order."""
    found = []
    read = Checkpoint.read

    def noted(self, name, *args, **kwargs):
        x = read(self, name, *args, **kwargs)
        found.append((name, tuple(x.shape)))
        return x

    monkeypatch.setattr(Checkpoint, "read", noted)
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "dtype, arithmetic",
    [("float64", "native"), ("bfloat16", "native"), ("float32", "native"), ("float32", "exact")],
)
def test_every_point_has_the_bits_of_the_model_in_memory(tmp_path, dtype, arithmetic, tied):
    path = model(tmp_path, tie_word_embeddings=tied, num_hidden_layers=3)
    streamed = record_streamed(StreamedModel(path, dtype, arithmetic), IDS, select(None, 3))
    whole = Qwen2.from_pretrained(path, dtype=dtype, arithmetic=arithmetic)
    for ids, mine in zip(IDS, streamed, strict=True):
        _, seen = whole.run_with_cache(torch.tensor([ids]))
        assert mine.keys() == seen.keys()
        for name, x in mine.items():
            assert x.dtype == seen[name].dtype and torch.equal(x, seen[name][0]), name


def test_each_layer_is_read_once_for_all_prompts_and_only_the_rows_that_are_needed(tmp_path, reads):
    path = model(tmp_path, num_hidden_layers=4, vocab_size=3000)
    StreamedModel(path, "float64", head_bytes=1).run(IDS, lambda n: UNTRACED)
    layers = [int(m[1]) for name, _ in reads if (m := re.match(r"model\.layers\.(\d+)", name))]
    assert layers == sorted(layers) and len(layers) == 4 * 12
    rows = [shape for name, shape in reads if name == "model.embed_tokens.weight"]
    assert rows == [(1, 24)] * sum(len(set(ids)) for ids in IDS)
    pieces = [shape[0] for name, shape in reads if name == "lm_head.weight"]
    assert pieces == [960, 960, 1080] * len(IDS)


@pytest.mark.parametrize("arithmetic", ["native", "exact"])
def test_a_head_in_pieces_gives_the_logits_of_the_whole(tmp_path, arithmetic):
    """In every bit where sums have no order; elsewhere that is the library's to promise."""
    path = model(tmp_path, vocab_size=3000)
    dtype = {"native": "float64", "exact": "bfloat16"}[arithmetic]
    pieces = StreamedModel(path, dtype, arithmetic, head_bytes=1).run(IDS, lambda n: UNTRACED)
    whole = StreamedModel(path, dtype, arithmetic).run(IDS, lambda n: UNTRACED)
    for a, b in zip(pieces, whole, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13 * float(b.abs().max()))
        assert arithmetic == "native" or torch.equal(a, b)


@pytest.mark.parametrize("most", [1, 960, 2000, 10**6])
@pytest.mark.parametrize("rows", [1, 959, 960, 961, 1919, 1920, 1921, 151_936])
def test_pieces_cover_all_rows_and_none_but_the_only_one_is_short(rows, most):
    pieces = cut(rows, most)
    assert [row for piece in pieces for row in piece] == list(range(rows))
    assert all(len(piece) % ROW_BLOCK == 0 for piece in pieces[:-1])
    assert len(pieces) == 1 or len(pieces[-1]) >= ROW_BLOCK
    assert all(len(piece) < max(most, ROW_BLOCK) + ROW_BLOCK for piece in pieces)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    refusal(lambda: StreamedModel(tmp_path / "none", "float64"), "none", "no such directory")
    refusal(lambda: StreamedModel(model(tmp_path / "m"), "float64", "exact"), "float64", "exact")
