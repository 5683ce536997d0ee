"""Zeros in the weights: what some rows or some ranks see as zero must not move anybody's bits."""

from __future__ import annotations

import pytest
import torch
from support.exact import STORAGE, Weights, build, more_heads, random_model, same
from support.ranks import on_ranks

from minqwen import Qwen2
from minqwen.model import Exact
from minqwen.model.arithmetic import Linear
from minqwen.parallel import SINGLE

IDS = torch.arange(20)[None] * 5


def layer(weight, mesh=SINGLE):
    linear = Linear(Exact(), weight.shape[1], len(weight))
    linear.weight.copy_(weight)
    linear.ops.prepare([linear], mesh)
    return linear


def test_rows_of_a_linear_do_not_know_which_rank_has_the_other_rows():
    """A column is zero in the first two rows and not in the others; its input is an outlier."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 8, generator=g), torch.randn(1, 8, generator=g)
    weight[:2, 0], x[0, 0] = 0, 1e4
    parts = on_ranks(2, lambda mesh: layer(weight.chunk(2)[mesh.rank], mesh)(x))
    assert torch.equal(torch.cat(parts, 1), layer(weight)(x))


def test_a_rank_whose_rows_alone_are_bfloat16_values_has_the_grids_of_all():
    """And so has one whose rows alone would call a column small."""
    g = torch.Generator().manual_seed(1)
    weight, x = torch.randn(4, 300, generator=g), torch.randn(5, 300, generator=g)
    weight[:2] = weight[:2].bfloat16()
    weight[:2, 7] *= 2.0**-12
    x[:, 7] *= 300
    parts = on_ranks(2, lambda mesh: layer(weight.chunk(2)[mesh.rank], mesh)(x))
    assert torch.equal(torch.cat(parts, 1), layer(weight)(x))
    assert not torch.equal(parts[0], layer(weight[:2])(x))  # the control


def sparse_model(seed: int) -> Weights:
    """Four of five weights are zero, and outliers make the grids coarse."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 1 + seed % 2}
    config, tensors = random_model(seed, 300.0, bool(seed % 2), **shape)
    g = torch.Generator().manual_seed(seed)
    for name, x in tensors.items():
        if name.endswith("proj.weight") or "lm_head" in name:
            x *= torch.rand(x.shape, generator=g) < 0.2
    return config, tensors


def on_degree(weights: Weights, degree: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits of a model whose weights are cut for `degree` ranks."""
    config, tensors = weights

    def read(name, part):
        x = tensors[name]
        return x if part is None else x.narrow(part.dim, part.start, part.stop - part.start)

    def run(mesh):
        return Qwen2.from_tensors(config, read, dtype=dtype, mesh=mesh, arithmetic="exact")(IDS)

    return on_ranks(degree, run)[0]


@pytest.mark.parametrize("degree, count", [(2, 20), (4, 40)])
def test_sparse_models_on_ranks(degree, count):
    """Grids that each rank chooses alone are seen in half of the models, a column that some ranks
    leave out in one of seven, and that only on four ranks."""
    for seed in range(count):
        weights, dtype = sparse_model(seed), STORAGE[seed // 2 % 2]
        assert same([on_degree(weights, degree, dtype)], [build(weights, dtype=dtype)(IDS)]), seed


def test_padded_heads_of_sparse_models():
    """Whatever the new query rows are, and whatever else is zero.

    Grids that the new rows have a say in are seen in a third of the models.
    """
    for seed in range(60):
        weights, dtype = sparse_model(seed), STORAGE[seed // 2 % 2]
        more = build(more_heads(weights, 3 + seed % 3, seed), dtype=dtype)
        assert same([more(IDS)], [build(weights, dtype=dtype)(IDS)]), seed
