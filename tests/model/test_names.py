"""Parameters have transformers' names; models are built from them, strictly."""

from __future__ import annotations

import pytest
import torch
from support.qwen2 import differences, oracle, ours, tokens

from minqwen.config import ModelConfig
from minqwen.model import Qwen2


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_names_are_transformers(tied):
    hf = oracle(tie_word_embeddings=tied)
    theirs, model = hf.state_dict(), Qwen2(ModelConfig.from_dict(hf.config.to_dict()))
    assert model.state_dict().keys() == theirs.keys()
    assert {
        k: tuple(v.shape) for k, v in model.named_parameters()
    } == model.config.parameter_shapes()
    assert not model.load_state_dict(theirs, strict=True).missing_keys
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with pytest.raises(RuntimeError, match="model.norm.weight"):
        model.load_state_dict({k: v for k, v in theirs.items() if k != "model.norm.weight"})
    with pytest.raises(RuntimeError, match="o_proj.bias"):
        model.load_state_dict(theirs | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(24)})


def test_a_tied_head_has_two_names_in_a_state_dict_and_one_in_a_checkpoint():
    """load_state_dict wants both, as transformers' does; from_pretrained wants the one."""
    hf = oracle(tie_word_embeddings=True)
    model = ours(hf)
    assert "lm_head.weight" not in model.config.parameter_shapes()
    for m in (hf, model):
        with pytest.raises(RuntimeError, match='Missing key.*"lm_head.weight"'):
            m.load_state_dict(
                {name: hf.state_dict()[name] for name in model.config.parameter_shapes()}
            )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_from_tensors_asks_once_for_every_tensor(tied):
    hf = oracle(tie_word_embeddings=tied)
    weights, asked = hf.state_dict(), []

    def read(name, shard):
        asked.append(name)
        assert shard is None
        return weights[name]

    config = ModelConfig.from_dict(hf.config.to_dict())
    model = Qwen2.from_tensors(config, read)
    assert asked == list(config.parameter_shapes())
    assert not any(p.is_meta or p.requires_grad for p in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not differences(hf, model, tokens(hf, 2, 9))


@pytest.mark.parametrize("shape", [(5,), (1, 5, 1), ()])
def test_ids_of_another_shape_are_refused(shape):
    model = ours(oracle())
    with pytest.raises(ValueError, match=r"ids have shape \(.*\), expected \[B, T\]") as refusal:
        model(torch.zeros(shape, dtype=torch.long))
    assert "\n" not in str(refusal.value)
