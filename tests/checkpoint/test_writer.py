"""What is written is read back, by this package and by transformers."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import (
    INDEX,
    Q0,
    assert_holds,
    refusal,
    tiny,
    weights,
    write,
)

from minqwen.checkpoint import Checkpoint, write_checkpoint
from minqwen.checkpoint.weight_files import TensorSpec, index_text, lay_out_files
from minqwen.lab.shapes import official_config


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize(
    "limit,tied", [(4 * 10**9, True), (4 * 10**9, False), (9000, True), (1, False)]
)
def test_round_trip(tmp_path, dtype, limit, tied):
    config = tiny(dtype=dtype, tie_word_embeddings=tied)
    tensors = write(tmp_path / "c", config, max_file_bytes=limit)
    assert_holds(tmp_path / "c", tensors)
    assert Checkpoint(tmp_path / "c").config == config
    files = sorted(p.name for p in (tmp_path / "c").iterdir())
    if limit > 10**9:
        assert files == ["config.json", "model.safetensors"]
    else:
        index = json.loads((tmp_path / "c" / INDEX).read_text())
        assert list(index["weight_map"]) == sorted(tensors) and set(
            index["weight_map"].values()
        ) < set(files)
        assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
        assert limit > 1 or len(files) == len(tensors) + 2  # a limit below any tensor: a file each
    assert os.listdir(tmp_path) == ["c"]  # no temporary left


def test_files_are_plain_safetensors_in_any_order_and_mixed_precision(tmp_path):
    config = tiny(num_hidden_layers=3, hidden_size=25)  # odd: bf16 would misalign its neighbours
    tensors = {
        n: t.float() if "norm" in n else t.double() if n == Q0 else t
        for n, t in weights(config).items()
    }
    shuffled = random.Random(1).sample(list(tensors.items()), len(tensors))
    dtypes = {n: t.dtype for n, t in tensors.items() if t.dtype != torch.bfloat16}
    write_checkpoint(tmp_path / "c", config, iter(shuffled), max_file_bytes=20000, dtypes=dtypes)
    assert_holds(tmp_path / "c", tensors)
    for file in (tmp_path / "c").glob("*.safetensors"):
        n = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + n])
        assert header.pop("__metadata__") == {"format": "pt"} and n % 8 == 0
        for name, t in load_file(file).items():
            assert torch.equal(t, tensors[name])
            assert (
                header[name]["data_offsets"][0] % t.itemsize == 0
            )  # aligned, whatever the neighbours


# Of the official models: tensors, weight files, and KiB of the index where it is published.
PUBLISHED = {
    "0.5B": (290, 1, None),
    "1.5B": (338, 1, None),
    "3B": (434, 2, 34.7),
    "7B": (339, 4, 27.1),
    "14B": (579, 8, 46.4),
    "32B": (771, 17, 61.8),
    "72B": (963, 37, 77.2),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_weight_files_are_divided_where_hugging_face_divides_them(size):
    from huggingface_hub import split_torch_state_dict_into_shards

    config = official_config(size)
    shapes = config.parameter_shapes()
    files = lay_out_files({n: TensorSpec(torch.bfloat16, s) for n, s in shapes.items()})
    where = {name: file for file, layout in files.items() for name in layout.places}
    with torch.device("meta"):
        split = split_torch_state_dict_into_shards(
            {n: torch.empty(s, dtype=torch.bfloat16) for n, s in shapes.items()},
            max_shard_size=4 * 10**9,
        )
    assert where == split.tensor_to_filename
    total = sum(layout.size - len(layout.header) for layout in files.values())
    assert total == config.weight_bytes() == split.metadata["total_size"]
    tensors, count, kib = PUBLISHED[size]
    assert len(where) == tensors and len(files) == count
    if kib is not None:
        assert round(len(index_text(files)) / 1024, 1) == kib


def test_the_seven_billion_model_has_as_many_bytes_as_published():
    assert official_config("7B").weight_bytes() == 15_231_233_024


@pytest.mark.parametrize("tied,limit", [(True, 4 * 10**9), (False, 9000)])
def test_transformers_loads_it_strictly(tmp_path, tied, limit):
    from transformers import AutoModelForCausalLM

    path = tmp_path / "c"
    tensors = write(
        path, tiny(tie_word_embeddings=tied, num_attention_heads=6), max_file_bytes=limit
    )
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert {k: len(v) for k, v in info.items() if v} == {}
    assert type(model).__name__ == "Qwen2ForCausalLM"
    state = model.state_dict()
    for name, t in tensors.items():
        assert torch.equal(state[name], t), name


def test_the_writer_takes_exactly_the_configs_tensors(tmp_path):
    path, config, good = tmp_path / "c", tiny(), weights(tiny())
    faults = {
        "was not given": {n: t for n, t in good.items() if n != Q0},
        "not one of the 27": good | {"model.x": torch.ones(1)},
        "(31, 24)": good | {Q0: good[Q0][:-1]},
        "torch.float32": good | {Q0: good[Q0].float()},
    }
    for word, tensors in faults.items():
        refusal(lambda t=tensors: write_checkpoint(path, config, t.items()), word)
    refusal(lambda: write_checkpoint(path, config, [*good.items(), (Q0, good[Q0])]), Q0, "twice")
    refusal(
        lambda: write_checkpoint(path, config, good.items(), max_file_bytes=0), "max_file_bytes"
    )
    refusal(
        lambda: write_checkpoint(path, config, good.items(), dtypes={Q0: torch.int8}), Q0, "int8"
    )
    assert os.listdir(tmp_path) == []
    for t in (
        good[Q0].T.contiguous().T,
        good[Q0].clone().requires_grad_(),
    ):  # strides, gradients: no matter
        write_checkpoint(path, config, (good | {Q0: t}).items(), overwrite=True)
        assert_holds(path, good)


def test_companions_and_extra_files(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    keep = (
        "tokenizer.json",
        "generation_config.json",
        "merges.txt",
        "chat_template.jinja",
        "tokenizer.model",
        "LICENSE",
    )
    for name in (
        *keep,
        "config.json",
        "quantize_config.json",  # of packed weights, which these are not
        "adapter_config.json",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "x.safetensors",
        ".gitattributes",
        "t.gguf",
    ):
        (source / name).write_text(name)
    (source / "sub").mkdir()
    write(tmp_path / "c", sources=source, extra_files={"NOTE.md": "ü", "LICENSE": b"mine"})
    got = {p.name for p in (tmp_path / "c").iterdir()}
    assert got == {*keep, "config.json", "model.safetensors", "NOTE.md"}
    assert (tmp_path / "c" / "LICENSE").read_text() == "mine"
    assert (tmp_path / "c" / "NOTE.md").read_bytes() == "ü".encode()
    refusal(
        lambda: write(tmp_path / "c", seed=1, sources=tmp_path / "c", overwrite=True),
        "another directory",
    )
    assert {p.name for p in (tmp_path / "c").iterdir()} == got
    for name in ("../x", "a/b", "config.json", "model.safetensors", "", ".."):
        refusal(lambda n=name: write(tmp_path / "d", extra_files={n: "x"}), "plain file name")
    refusal(lambda: write(tmp_path / "d", sources=tmp_path / "gone"), "gone", "not a directory")
    os.mkfifo(source / "vocab.json")
    refusal(lambda: write(tmp_path / "d", sources=source), "vocab.json", "regular")


def test_only_a_checkpoint_is_replaced(tmp_path):
    d = tmp_path / "d"
    d.mkdir()
    old = write(d)  # empty: taken
    (d / "notes").mkdir()
    refusal(lambda: write(d, seed=1, overwrite=True), "'notes'", "not replaced")
    (d / "notes").rmdir()
    (d / "optimizer.pt").write_text("x")
    refusal(lambda: write(d, seed=1, overwrite=True), "'optimizer.pt'", "not replaced")
    (d / "optimizer.pt").unlink()
    for name in ("notes.md", "eval.json"):
        (d / name).write_text("mine")
    refusal(lambda: write(d, seed=1, overwrite=True), "'eval.json', 'notes.md'", "not replaced")
    for name in ("notes.md", "eval.json"):
        (d / name).unlink()
    refusal(lambda: write(d, seed=1), "exists", "--overwrite", "overwrite=True")
    assert_holds(d, old)
    assert_holds(d, write(d, seed=1, max_file_bytes=20000, overwrite=True))
    new = write(d, seed=2, overwrite=True)
    assert_holds(d, new)
    assert sorted(os.listdir(d)) == ["config.json", "model.safetensors"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    refusal(lambda: write(other), "'thesis.txt'", "not a checkpoint")
    refusal(lambda: write(other / "thesis.txt"), "not a directory")
    refusal(lambda: write(Path("/")), "not a directory that can be replaced")
    refusal(lambda: write(other / "thesis.txt" / "c"), "could not be written", "thesis.txt")
    (tmp_path / "link").symlink_to(d)
    assert_holds(
        d, write(tmp_path / "link", seed=3, overwrite=True)
    )  # what a link points to is replaced, not the link
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == [
        "d",
        "link",
        "other",
    ]
