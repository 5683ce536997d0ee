"""Tensor parallelism: several ranks together compute what one process does."""

from __future__ import annotations

import json

import pytest
import torch
from support.forked import forked

from minqwen.config import ModelConfig
from minqwen.model import Native
from minqwen.model.arithmetic import RowParallelLinear
from minqwen.model.qwen2 import Embedding
from minqwen.parallel import Mesh, shard

RANK = """
import json, sys, torch
from minqwen.config import ModelConfig
from minqwen.model import Batch, Qwen2
from minqwen.parallel import Mesh

torch.set_grad_enabled(False)
mesh = Mesh.from_env("cpu")

def error(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()

def prefill_and_decode(model, ids):
    T, cache = len(ids), model.new_cache(4, 16)
    logits = []
    for start, end in ((0, T - 2), (T - 2, T - 1), (T - 1, T)):
        batch = Batch.paged([end - start], [end], [[2, 0, 3]], 16)
        logits.append(model(ids[start:end], batch, cache))
    return torch.cat(logits)

def greedy(model, ids):
    for _ in range(6):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids

report = {}
for case, changes in json.loads(sys.argv[1]).items():
    config = ModelConfig(**changes)
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=generator) * 0.3 + ("norm" in name)
               for name, shape in config.parameter_shapes().items()}
    ids = torch.randint(config.vocab_size, (2, 33), generator=generator)
    def read(name, mine):
        w = weights[name]
        return w if mine is None else w.narrow(mine.dim, mine.start, mine.stop - mine.start)
    report[case] = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        part = Qwen2.from_tensors(config, read, dtype=dtype, mesh=mesh)
        dense, paged = part(ids), prefill_and_decode(part, ids[0])
        text = greedy(part, ids[:, :5]) if dtype == torch.float32 else None
        high, low = mesh.all_reduce(dense.clone(), "max"), -mesh.all_reduce(-dense, "max")
        if mesh.rank == 0:  # alone from here
            whole = Qwen2.from_tensors(config, read, dtype=dtype)
            right = whole(ids)
            truth = right if dtype == torch.float64 else truth
            report[case][str(dtype)] = dict(
                dense=error(dense, right), paged=error(paged, right[0]),
                same_greedy=text is None or torch.equal(text, greedy(whole, ids[:, :5])),
                same_on_all_ranks=torch.equal(high, low),
                shape_and_dtype=dense.shape == right.shape and dense.dtype == dtype,
                lost=error(dense, truth), lost_by_one=error(right, truth))
mesh.barrier()
if mesh.rank == 0:
    print(json.dumps(report))
mesh.close()
"""
SMALL = dict(vocab_size=101, hidden_size=24, intermediate_size=48, num_hidden_layers=2, head_dim=8)
RANKS = {
    2: {
        "14/2": dict(num_attention_heads=14, num_key_value_heads=2),
        "6/6 llama": dict(num_attention_heads=6, num_key_value_heads=6, model_type="llama"),
    },
    4: {
        "28/4": dict(num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=True),
        "16/2 replicated": dict(num_attention_heads=16, num_key_value_heads=2),
    },
    8: {"32/4 replicated": dict(num_attention_heads=32, num_key_value_heads=4)},
}


@pytest.mark.parametrize("size", RANKS)
def test_ranks_agree_with_one_process(size):
    """Only the order of row-parallel sums differs. The vocabulary does not divide by the ranks."""
    run = forked(
        size, RANK, [json.dumps({name: SMALL | changes for name, changes in RANKS[size].items()})]
    )
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout)
    assert report.keys() == RANKS[size].keys()
    for case, by_dtype in report.items():
        for dtype, found in by_dtype.items():
            assert found["same_on_all_ranks"] and found["shape_and_dtype"], (case, dtype, found)
            if dtype != "torch.bfloat16":
                tolerance = {"torch.float64": 1e-12, "torch.float32": 2e-5}[dtype]
                assert found["dense"] < tolerance and found["paged"] < tolerance, (
                    case,
                    dtype,
                    found,
                )
                assert found["same_greedy"], (case, dtype, found)
        # Partial sums meet in float32: splitting must not add to what bfloat16 loses anyway.
        found = by_dtype["torch.bfloat16"]
        assert found["lost"] < 2 * found["lost_by_one"], (case, found)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_partial_sums_meet_in_float32_at_least(dtype):
    mesh, asked = Mesh(), []
    mesh.size, mesh.all_reduce = 2, lambda t, op="sum", dtype=None: asked.append((op, dtype)) or t
    linear = RowParallelLinear(Native(), mesh, 8, 4, dtype=dtype)
    assert linear(torch.zeros(3, 8, dtype=dtype)).dtype == dtype
    assert asked == [("sum", torch.float64 if dtype == torch.float64 else torch.float32)]


def test_a_rank_may_hold_no_row_of_the_vocabulary():
    """17 rows in pieces of ceil(17 / 8) leave the last two of 8 ranks without any."""
    mesh, config = Mesh(), ModelConfig(**SMALL | RANKS[8]["32/4 replicated"] | dict(vocab_size=17))
    mesh.size, mesh.all_reduce = 8, lambda t: t
    mine = shard("model.embed_tokens.weight", config, 7, 8)
    assert mine.start == mine.stop
    embedding = Embedding(mesh, range(mine.start, mine.stop), 4)
    assert torch.equal(embedding(torch.tensor([0, 16])), torch.zeros(2, 4))
