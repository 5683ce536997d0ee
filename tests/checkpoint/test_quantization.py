"""How AWQ and GPTQ checkpoints lie in their files, and what is refused of them."""

from __future__ import annotations

import pytest
import torch
from support.quantised import AWQ, GPTQ, GPTQ8, KINDS, checkpoint, tiny

from minqwen.checkpoint.packed import PackedCheckpoint
from minqwen.checkpoint.quantization import Packing
from minqwen.errors import CheckpointError, MinqwenError


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_checkpoint_reads_as_it_was_written(kind, tmp_path):
    config = tiny(quant=KINDS[kind])
    tensors = checkpoint(tmp_path / "a", config)
    packed = PackedCheckpoint(tmp_path / "a")
    packed.check()
    assert set(packed.names) == set(tensors)
    for name, tensor in tensors.items():
        got = packed.read(name)
        assert got.dtype == tensor.dtype and torch.equal(got, tensor), name


@pytest.mark.parametrize(
    "quant, bits, offset, act_order",
    [
        (AWQ, 4, 0, False),
        (GPTQ, 4, 1, False),
        (GPTQ8 | {"checkpoint_format": "gptq_v2"}, 8, 0, False),
        (GPTQ | {"desc_act": True}, 4, 1, True),
    ],
)
def test_the_layout_is_read_from_the_config(quant, bits, offset, act_order):
    packing = Packing.read(quant | {"group_size": 128})
    assert packing == Packing(quant["quant_method"], bits, 128, offset, act_order)
    assert packing.pack == 32 // bits


def test_one_word_holds_a_value_everywhere():
    word = Packing.read(GPTQ | {"group_size": 128}).word(8)
    assert word & 0xFFFFFFFF == 0x88888888
    assert torch.tensor(word, dtype=torch.int32).item() == word


@pytest.mark.parametrize(
    "change, said",
    [
        (AWQ | {"version": "gemv"}, "'awq' 'gemv' with 4 bits"),
        (GPTQ | {"bits": 3}, "with 3 bits"),
        (GPTQ | {"bits": [4]}, "with [4] bits"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        (GPTQ | {"group_size": "128"}, "group_size is '128'"),
        (GPTQ | {"group_size": 0}, "group_size is 0"),
        (GPTQ | {"group_size": True}, "group_size is True"),
    ],
)
def test_what_is_neither_awq_nor_gptq_is_refused(change, said):
    with pytest.raises(CheckpointError) as error:
        Packing.read({"group_size": 128} | change)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_that_is_not_quantised_is_refused(tmp_path):
    config = tiny()
    checkpoint(tmp_path / "a", config)
    config.replace(quantization_config=None).save(tmp_path / "a")
    with pytest.raises(MinqwenError, match="no quantization_config"):
        PackedCheckpoint(tmp_path / "a")
