"""Official shapes, and random weights for any shape."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import Q0, tiny

from minqwen.lab.shapes import PERIOD, SIZES, official_config, random_tensors


@pytest.mark.parametrize("size", SIZES)
def test_an_official_size_has_about_as_many_parameters_as_its_name_says(size):
    billions = official_config(size).num_parameters() / 1e9
    assert abs(billions / float(size.removesuffix("B")) - 1) < 0.09 or size == "7B"


def test_random_tensors_are_the_parameters_of_the_config_in_order():
    config = tiny()
    tensors = dict(random_tensors(config, 0))
    assert {n: tuple(t.shape) for n, t in tensors.items()} == config.parameter_shapes()
    assert list(tensors) == list(config.parameter_shapes())
    assert all(t.dtype == torch.bfloat16 for t in tensors.values())


def test_a_tensor_depends_on_seed_name_and_shape_alone():
    few, many = (dict(random_tensors(tiny(num_hidden_layers=n), 3)) for n in (1, 2))
    assert all(torch.equal(many[name], t) for name, t in few.items())
    assert not torch.equal(few[Q0], dict(random_tensors(tiny(), 4))[Q0])


def test_rows_stay_distinct_where_the_numbers_repeat():
    assert all(PERIOD % k for k in range(2, 4097))  # prime: 4096 is its root
    tensors = dict(random_tensors(tiny(dtype="float32"), 0, period=101))
    embedding = tensors["model.embed_tokens.weight"]
    assert embedding.numel() > 14 * 101 and len(embedding.unique(dim=0)) == len(embedding) == 61


def test_a_llama_output_bias_is_zero():
    tensors = dict(random_tensors(tiny(model_type="llama"), 0))
    biases = [t for name, t in tensors.items() if name.endswith("o_proj.bias")]
    assert len(biases) == 2 and not any(t.any() for t in biases)
