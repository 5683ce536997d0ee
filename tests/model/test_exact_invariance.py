"""Exact logits are the same bits whatever the batch, the chunks, the blocks, heads and threads.

The control of each test is `Ordered` in float32, whose sums depend on rows, columns and threads by
construction: the same comparison, with it, must see other bits.
"""

from __future__ import annotations

import random

import pytest
import torch
from support.arithmetics import Ordered
from support.exact import (
    STORAGE,
    alone,
    build,
    more_heads,
    ragged_ids,
    random_model,
    same,
)
from support.paged import run_paged, whole

from minqwen.model import Exact, attention


@pytest.fixture
def model(request, models):
    if request.param == "ordered":
        return models["ordered", torch.float32]
    name, dtype = request.param.split()
    return models[name, getattr(torch, dtype)]


EXACT = pytest.mark.parametrize("model", ["exact float32", "exact bfloat16"], indirect=True)
CONTROL = pytest.mark.parametrize("model", ["ordered"], indirect=True)


# ---- batches ------------------------------------------------------------------------------------

MEMBERS = [[0], [31, 7], [3, 1, 30, 20, 8], list(range(33)), list(range(32, -1, -1))]


def batches(model):
    """For each of MEMBERS, and for a dense batch: whether all logits are those of a solo run."""
    sequences = ragged_ids(33, 40)
    expected = alone(model, sequences)
    for members in MEMBERS:
        got = run_paged(model, [sequences[i] for i in members])
        yield same(got, [expected[i] for i in members])
    width = min(map(len, sequences[1:4]))
    square = torch.stack([ids[:width] for ids in sequences[1:4]])
    yield same(model(square), [logits[:width] for logits in expected[1:4]])


@EXACT
def test_neighbours_and_places_in_the_batch(model):
    assert all(batches(model))


@CONTROL
def test_control_other_bits_in_another_batch_are_seen(model):
    found = list(batches(model))
    assert found[0], "a batch of one is no other batch"
    assert not any(found[1:])


# ---- chunks -------------------------------------------------------------------------------------


def chunkings(model):
    """{chunking: whether all logits are those of a whole sequence}."""
    sequences = [*ragged_ids(3, 20, seed=1), torch.arange(100, 210)]
    r = random.Random(3)
    chunks = {
        "1": lambda i, done: 1,
        "7": lambda i, done: 7,
        "32": lambda i, done: 32,
        "64": lambda i, done: 64,
        "random": lambda i, done: r.randint(1, 30),
        "prefill, then decode": lambda i, done: 1 if done else 90,
    }
    expected = alone(model, sequences)
    return {
        name: same(run_paged(model, sequences, 16, chunk), expected)
        for name, chunk in chunks.items()
    }


@EXACT
def test_chunked_recomputed_and_decoded(model):
    found = chunkings(model)
    assert all(found.values()), found


@CONTROL
def test_control_other_bits_in_chunks_are_seen(model):
    found = chunkings(model)
    assert not any(found.values()), found


# ---- blocks -------------------------------------------------------------------------------------


def block_sizes(model):
    """Steps of 9 tokens, on blocks of several sizes in several places."""
    sequences = ragged_ids(4, 130, seed=4)
    expected = alone(model, sequences)
    for seed, size in enumerate((1, 7, 16, 128, 1, 128)):
        got = run_paged(model, sequences, size, lambda i, done: 9, seed)
        yield same(got, expected)


@EXACT
def test_block_size_and_placement(model):
    assert all(block_sizes(model))


@CONTROL
def test_control_other_bits_on_blocks_are_seen(model):
    """It is the steps of 9 tokens that move them: keys of all block sizes are gathered alike."""
    assert not any(block_sizes(model))


@EXACT
@pytest.mark.parametrize("rows", [1, 7, 10**9])
def test_rows_that_attend_at_a_time(model, rows, monkeypatch):
    sequences = ragged_ids(4, 130, seed=4)
    expected = alone(model, sequences)
    monkeypatch.setattr(attention, "tile_rows", lambda device, scores_per_row: rows)
    assert same(run_paged(model, sequences), expected)


# ---- heads --------------------------------------------------------------------------------------

HEADS = [(8, 0), (8, 1), (14, 0)]  # query heads of a group of 7, extended; a seed for the new rows


def extended(weights, arithmetic, dtype, chunk=whole):
    """Of the model with more heads: whether dense and paged logits are those of the model."""
    sequences = ragged_ids(4, 60, seed=5)
    expected = alone(build(weights, arithmetic, dtype), sequences)
    for per_group, seed in HEADS:
        model = build(more_heads(weights, per_group, seed), arithmetic, dtype)
        yield same(alone(model, sequences), expected)
        yield same(run_paged(model, sequences, 16, chunk), expected)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_28_32_and_56_query_heads(embedded_weights, dtype):
    assert all(extended(embedded_weights, "exact", dtype, lambda i, done: 9))


def test_control_other_bits_with_more_heads_are_seen(embedded_weights):
    assert not any(extended(embedded_weights, Ordered(), torch.float32))


# ---- threads, widening, storage -----------------------------------------------------------------


def with_threads(model, threads):
    torch.set_num_threads(threads)
    return model(torch.arange(100)[None])


def test_number_of_threads():
    weights = random_model(hidden_size=64, intermediate_size=4864)
    for dtype in STORAGE:
        model = build(weights, "exact", dtype)
        assert same(with_threads(model, 1), with_threads(model, 2)), dtype


def test_control_other_bits_with_other_threads_are_seen():
    model = build(random_model(hidden_size=64, intermediate_size=4864), Ordered())
    assert same(with_threads(model, 1), with_threads(model, 1))
    assert not same(with_threads(model, 1), with_threads(model, 2))


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_weights_kept_in_float64_and_watching_change_nothing(embedded_weights, models, dtype):
    ids = ragged_ids(1, 90, seed=8)[0][None]
    model, wide = models["exact", dtype], build(embedded_weights, Exact(widen=True), dtype)
    expected = model(ids)
    assert wide.model.layers[0].mlp.up_proj.weight.dtype == torch.float64
    assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert same(wide(ids), expected)
    logits, seen = wide.run_with_cache(ids)
    assert same(logits, expected)
    assert (seen["layers.0.attn.pattern"].sum(-1) - 1).abs().max() < 1e-9


def test_float16_storage_works_too(embedded_weights):
    model, ids = build(embedded_weights, dtype=torch.float16), ragged_ids(1, 90, seed=8)
    assert same(run_paged(model, ids, 16, lambda i, done: 5), alone(model, ids))
