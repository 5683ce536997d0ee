"""A directory becomes a model and a directory again; a mistyped option is told before any file."""

from __future__ import annotations

import os

import pytest
import torch
from support.checkpoints import FILE, Q0, assert_holds, refusal, rewrite, tiny, write

from minqwen.checkpoint import Checkpoint, load_pretrained, save_pretrained
from minqwen.checkpoint.load import check_options, resolve_dtype
from minqwen.checkpoint.weight_files import DTYPES
from minqwen.config import BYTES_PER_ELEMENT
from minqwen.errors import ConfigError
from minqwen.model import Native
from minqwen.parallel import Mesh


def test_a_model_has_the_checkpoints_weights(tmp_path):
    tensors = write(tmp_path / "c")
    model = load_pretrained(tmp_path / "c")
    assert model.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[name]), name


@pytest.mark.parametrize("dtype", ["float32", torch.float64, "torch.float16"], ids=str)
def test_weights_are_converted_to_the_dtype_that_is_asked_for(tmp_path, dtype):
    tensors = write(tmp_path / "c")
    model = load_pretrained(tmp_path / "c", dtype=dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    for name, value in model.state_dict().items():
        assert value.dtype == wanted and torch.equal(value, tensors[name].to(wanted)), name


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_what_was_loaded(tmp_path, tied):
    config = tiny(tie_word_embeddings=tied)
    tensors = write(tmp_path / "c", config)
    save_pretrained(load_pretrained(tmp_path / "c"), tmp_path / "d", max_file_bytes=9000)
    assert_holds(tmp_path / "d", tensors)
    assert Checkpoint(tmp_path / "d").config == config
    assert not (tmp_path / "d" / FILE).exists()  # several weight files


def test_a_model_is_saved_in_the_dtype_that_it_has(tmp_path):
    tensors = write(tmp_path / "c")
    load_pretrained(tmp_path / "c", dtype="float32").save_pretrained(tmp_path / "d")
    assert Checkpoint(tmp_path / "d").config.dtype == "float32"
    assert_holds(tmp_path / "d", {name: t.float() for name, t in tensors.items()})


@pytest.mark.parametrize("options", [{"arithmetic": "exact"}, {"offload": "memory"}], ids=str)
def test_a_model_without_the_checkpoints_own_weights_is_not_saved(tmp_path, options):
    write(tmp_path / "c", tiny(dtype="float32"))
    model = load_pretrained(tmp_path / "c", **options)
    refusal(lambda: save_pretrained(model, tmp_path / "d"), "not written", "load it whole")
    assert os.listdir(tmp_path) == ["c"]


def test_weights_that_are_not_finite_are_refused_when_that_is_asked(tmp_path):
    write(tmp_path / "c")
    rewrite(tmp_path / "c", lambda tensors: tensors[Q0][3, 3].fill_(float("nan")))
    load_pretrained(tmp_path / "c")
    refusal(lambda: load_pretrained(tmp_path / "c", check_finite=True), Q0, "1 NaN")


def test_a_degree_that_cannot_work_is_refused_before_the_tensors_are_compared(tmp_path):
    path = tmp_path / "c"
    write(path)
    rewrite(path, lambda tensors: tensors.pop(Q0))
    mesh = Mesh()
    refusal(lambda: load_pretrained(path, mesh=mesh), Q0, "is missing")
    mesh.size = 3
    refusal(lambda: load_pretrained(path, mesh=mesh), "degree 3 does not fit")


# ---- options


WRONG = [
    (
        {"arithmetic": "exakt"},
        "arithmetic is 'exakt'",
        "'native' or 'fast' or 'int8' or 'exact'",
        "mean 'exact'?",
    ),
    ({"arithmetic": None}, "arithmetic is None", "'native' or 'fast' or 'int8' or 'exact'", ""),
    ({"device": "gpu"}, "device is 'gpu'", "'cpu' or 'cuda'", "mean 'cuda'?"),
    ({"device": "CPU"}, "device is 'CPU'", "'cpu' or 'cuda'", ""),
    ({"device": "cuda:999"}, "device is 'cuda:999'", "GPUs", "'cpu'"),
    ({"dtype": "float23"}, "dtype is 'float23'", "'auto' or 'bfloat16'", "mean 'float32'?"),
    ({"dtype": "bf16"}, "dtype is 'bf16'", "'float64'", ""),
    ({"dtype": torch.int8}, "dtype is 'int8'", "'float64'", ""),
    ({"offload": "dick"}, "offload is 'dick'", "None or 'memory' or 'disk'", "mean 'disk'?"),
    ({"offload": "cloud"}, "offload is 'cloud'", "None or 'memory' or 'disk'", ""),
]


@pytest.mark.parametrize("options, words", [(o, w) for o, *w in WRONG], ids=str)
def test_a_mistyped_option_is_told_before_any_file_is_read(tmp_path, options, words):
    """There is no such directory, and that is not what the line says."""
    for act in (check_options, lambda **o: load_pretrained(tmp_path / "nowhere", **o)):
        line = refusal(lambda act=act: act(**options), *words)
        assert "nowhere" not in line


def test_every_valid_option_is_taken():
    check_options()
    for dtype in ("auto", *DTYPES, *DTYPES.values()):
        check_options(dtype=dtype)
    for device in (None, "cpu", torch.device("cpu")):
        check_options(device=device)
    for arithmetic in ("native", "exact", Native()):
        check_options(arithmetic=arithmetic)
    for offload in (None, "memory", "disk"):
        check_options(offload=offload)


def test_a_dtype_is_a_name_of_the_config_or_torchs_own():
    assert set(DTYPES) == set(BYTES_PER_ELEMENT)
    assert resolve_dtype("auto", tiny(dtype="float16")) == torch.float16
    assert resolve_dtype("float64", tiny()) == resolve_dtype(torch.float64, tiny()) == torch.float64
    with pytest.raises(ConfigError):
        resolve_dtype("int8", tiny())
