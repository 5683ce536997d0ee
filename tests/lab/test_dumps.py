"""Directories of other engines' tensors: what is understood, and what is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import tiny

from minqwen.errors import DumpError
from minqwen.lab.diff.dumps import Dump, point_name

T = 5
CONFIG = tiny()  # 4 heads of 8, 2 KV heads, 2 layers, width 24, 61 tokens
Q, K = torch.randn(T, 4, 8), torch.randn(T, 2, 8)
SCORES, LOGITS = torch.randn(4, T, T), torch.randn(T, 61)


def save(path, tensors, file="a.safetensors"):
    save_file({name: x.contiguous() for name, x in tensors.items()}, path / file)
    return path


def opened(path, **options):
    return Dump.open(path, CONFIG, **options)


def refused(path, *words, **options):
    with pytest.raises(DumpError) as e:
        opened(path, **options)
    line = str(e.value)
    assert line.isprintable() and len(line) < 900, line
    for word in words:
        assert word in line, f"{word!r} is not in: {line}"


def test_a_directory_of_arrays_is_one_pass(tmp_path):
    np.save(tmp_path / "layers.1.attn.q.npy", Q.numpy())
    np.savez(tmp_path / "more.npz", **{"logits": LOGITS.numpy(), "layers.0.attn.k": K.numpy()})
    save(tmp_path, {"layers.0.attn.scores": SCORES, "input_ids": torch.arange(T)})
    (tmp_path / "notes.txt").write_text("not an array")
    dump = opened(tmp_path)
    assert dump.passes == 1 and dump.dtype == torch.float32 and dump.ids(0) == [0, 1, 2, 3, 4]
    assert dump.positions(0) is None
    assert dump.names(0) == ["layers.0.attn.k", "layers.0.attn.scores", "layers.1.attn.q", "logits"]
    for name, x in zip(dump.names(0), (K, SCORES, Q, LOGITS), strict=True):
        assert torch.equal(dump.read(0, name), x), name


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.embed_tokens", "embed"),
        ("model.layers.1.self_attn.q_proj", "layers.1.attn.q"),
        ("model.layers.1.self_attn.q_proj.output", "layers.1.attn.q"),
        ("model.layers.0.self_attn.o_proj.input", "layers.0.attn.z"),
        ("model.layers.0.self_attn.o_proj", "layers.0.attn.out"),
        ("model.layers.1", "layers.1.resid_post"),
        ("model.layers.1.input", "layers.1.resid_pre"),
        ("model.layers.0.mlp.down_proj.input", "layers.0.mlp.act"),
        ("model.norm", "final_norm"),
        ("lm_head", "logits"),
        ("hidden_states.0", "embed"),
        ("hidden_states.1", "layers.0.resid_post"),
        ("hidden_states.2", "final_norm"),
        ("blocks.1.attn.hook_z", "layers.1.attn.z"),
        ("position_ids", "positions"),
        ("hidden_states.3", None),
        ("model.layers.2", None),
        ("layers.2.attn.q", None),
        ("model.layers.0.self_attn.rotary_emb", None),
        (".mlp", None),
        ("lm_head.input", None),
        ("", None),
    ],
)
def test_names_of_hugging_face_and_transformerlens_are_understood(theirs, ours):
    assert point_name(theirs, num_layers=2) == ours


@pytest.mark.parametrize("shape", [(T, 4, 8), (1, T, 4, 8), (T, 32), (1, T, 32)])
def test_heads_may_lie_side_by_side_and_a_batch_of_one_is_dropped(tmp_path, shape):
    save(tmp_path, {"layers.0.attn.q": Q.reshape(shape), "logits": LOGITS[None]})
    dump = opened(tmp_path)
    assert torch.equal(dump.read(0, "layers.0.attn.q"), Q)
    assert torch.equal(dump.read(0, "logits"), LOGITS)


def test_numbered_files_are_passes_and_a_decode_step_has_more_context_than_tokens(tmp_path):
    for n in range(11):
        tensors = {"layers.0.attn.pattern": SCORES[:, -1:], "positions": torch.tensor([4])}
        save(tmp_path, tensors, f"{n}.safetensors")
    dump = opened(tmp_path)
    assert dump.passes == 11 and dump.positions(10) == [4]
    assert dump.read(10, "layers.0.attn.pattern").shape == (4, 1, T)


def test_logits_may_be_fewer_than_the_tokens(tmp_path):
    save(tmp_path, {"lm_head": LOGITS[-2:], "model.embed_tokens": torch.zeros(T, 24)})
    assert torch.equal(opened(tmp_path).read(0, "logits"), LOGITS[-2:])


def test_the_dtype_is_that_of_dump_json_or_the_widest(tmp_path):
    save(tmp_path, {"layers.0.attn.q": Q.bfloat16(), "layers.0.attn.k": K})
    assert opened(tmp_path).dtype == torch.float32
    (tmp_path / "dump.json").write_text('{"dtype": "bfloat16"}')
    assert opened(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<f2"])
def test_arrays_of_numpy_are_read_in_any_order_of_bytes_and_axes(tmp_path, order, dtype):
    x = np.array(Q.numpy().astype(dtype), order=order)
    np.save(tmp_path / "layers.0.attn.q.npy", x)
    np.savez_compressed(tmp_path / "b.npz", **{"layers.1.attn.q": x})
    dump = opened(tmp_path)
    for name in dump.names(0):
        assert np.array_equal(dump.read(0, name).numpy(), x)


def test_ranks_are_joined_by_the_points_axis(tmp_path):
    for rank in range(4):  # of 4 ranks two hold the same KV head
        part = {
            "layers.0.attn.q": Q[:, rank : rank + 1],
            "layers.0.attn.k": K[:, rank // 2 : rank // 2 + 1],
            "layers.0.attn.scores": SCORES[rank : rank + 1],
        }
        whole = {"logits": LOGITS} if rank == 0 else {}
        save(tmp_path, part | whole, f"0.rank{rank}of4.safetensors")
    dump = opened(tmp_path)
    tensors = (Q, K, SCORES, LOGITS)
    for name, x in zip(dump.names(0), tensors, strict=True):
        assert torch.equal(dump.read(0, name), x), name


# ---- what is refused ----------------------------------------------------------------------------


def test_what_is_no_dump_is_refused(tmp_path):
    refused(tmp_path / "none", "is no directory")
    refused(tmp_path, "holds no file that ends in .safetensors")


def test_a_name_that_means_no_point_is_refused_with_the_nearest(tmp_path):
    save(tmp_path, {"layers.0.atn.q": Q})
    refused(tmp_path, "'layers.0.atn.q'", "a model of 2 layers", "did you mean 'layers.0.attn.q'?")


def test_two_arrays_of_one_point_are_refused(tmp_path):
    save(tmp_path, {"layers.0.attn.q": Q, "blocks.0.attn.hook_q": Q + 1})
    refused(tmp_path, "is layers.0.attn.q, and so is", "remove one")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"layers.0.attn.q": Q[:, :3]}, ["[5, 3, 8]", "expected floats [5, 4, 8]"]),
        ({"layers.0.attn.q": Q[..., :7]}, ["[5, 4, 7]", "expected floats [5, 4, 8]"]),
        ({"layers.0.attn.q": Q.long()}, ["dtype I64", "expected floats"]),
        ({"layers.0.attn.q": torch.zeros(2, T, 32)}, ["[2, 5, 32]", "expected floats"]),
        ({"embed": torch.zeros(T, 24), "layers.0.norm1": torch.zeros(4, 24)}, ["of 4 tokens", "5"]),
        ({"embed": torch.zeros(0, 24)}, ["[0, 24]"]),
        ({"embed": torch.zeros(4, 24), "logits": LOGITS}, ["[5, 61]", "[4, 61]"]),
        ({"logits": torch.zeros(T, 64)}, ["[5, 64]", "[5, 61]"]),
        ({"input_ids": torch.zeros(T), "embed": torch.zeros(T, 24)}, ["input_ids", "int64"]),
        ({"input_ids": torch.zeros(2, 2).long()}, ["[2, 2]"]),
        ({"input_ids": torch.arange(4), "embed": torch.zeros(T, 24)}, ["of 5 tokens", "the 4"]),
        ({"layers.0.attn.scores": SCORES[0]}, ["[5, 5]", "expected floats [4, T, L]"]),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(tmp_path, tensors, words):
    refused(save(tmp_path, tensors), "a.safetensors", *words)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    save(tmp_path, {"layers.0.attn.q": Q[:, :2]}, "0.rank0of2.safetensors")
    refused(tmp_path, "is there of 1 ranks, expected all 2", "rank 1")
    save(tmp_path, {"layers.0.attn.q": Q}, "0.safetensors")
    refused(tmp_path, "is of rank 0 of", "remove the files of the other dump")
    os.remove(tmp_path / "0.safetensors")
    os.rename(tmp_path / "0.rank0of2.safetensors", tmp_path / "0.rank0of3.safetensors")
    refused(tmp_path, "is of 3 ranks, which cannot share")
    os.rename(tmp_path / "0.rank0of3.safetensors", tmp_path / "1.safetensors")
    refused(tmp_path, "no file of pass 0")


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"format": "minqwen dump 2"}, ["format is 'minqwen dump 2'", "'minqwen dump 1'"]),
        ({"format": "minqwen dump 1", "passes": 2}, ["says 2 passes", "of 1"]),
        ({"format": "minqwen dump 1", "passes": 0}, ["passes is 0"]),
        ({"format": "minqwen dump 1", "passes": 1, "ranks": 2}, ["2 ranks", "say 1"]),
        ({"dtype": "int8"}, ["dtype is 'int8'"]),
        ({"dtype": "bfloat16", "engine": 3}, ["engine is 3"]),
    ],
)
def test_a_dump_json_that_cannot_be_is_refused(tmp_path, described, words):
    save(tmp_path, {"logits": LOGITS}, "0.safetensors")
    (tmp_path / "dump.json").write_text(json.dumps(described))
    refused(tmp_path, "dump.json", *words)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_pickles_are_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("npy", "npz", "pt"):
        (tmp_path / name).mkdir()
    array = np.array([Evil()], dtype=object)
    np.save(tmp_path / "npy" / "logits.npy", array, allow_pickle=True)
    np.savez(tmp_path / "npz" / "a.npz", logits=array)
    (tmp_path / "pt" / "logits.pt").write_bytes(pickle.dumps({"logits": Evil()}))
    refused(tmp_path / "npy", "logits.npy", "dtype 'object'")
    refused(tmp_path / "npz", "a.npz", "'logits'", "dtype 'object'")
    refused(tmp_path / "pt", "is a .pt file")
    refused(tmp_path / "pt", "weights_only=True", allow_pickle=True)
    torch.save({"logits": Evil()}, tmp_path / "pt" / "logits.pt")
    refused(tmp_path / "pt", "weights_only=True", allow_pickle=True)
    assert not (tmp_path / "executed").exists()


def test_pt_files_are_read_if_they_are_allowed(tmp_path):
    torch.save({"model.layers.0.self_attn.q_proj": Q.flatten(1)[None]}, tmp_path / "a.pt")
    torch.save(LOGITS, tmp_path / "logits.pt")
    refused(tmp_path, "is a .pt file")
    dump = opened(tmp_path, allow_pickle=True)
    assert torch.equal(dump.read(0, "layers.0.attn.q"), Q)
    assert torch.equal(dump.read(0, "logits"), LOGITS)


def header(shape, dtype="<f4"):
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (header((10**12, 24)) + b"\0" * 480, "holds 480 bytes"),
        (header((-5, -24)) + b"\0" * 480, "holds 480 bytes"),
        (header((5, 24)) + b"\0" * 481, "holds 481 bytes"),
        (header((5, 24), "<c8") + b"\0" * 960, "complex64"),
        (header((5, 24), "|V4") + b"\0" * 480, "dtype"),
        (header("__import__('os')"), "numpy's format"),
        (b"\x93NUMPY\x09\x00" + b"\0" * 100, "numpy's format"),
        (b"garbage", "numpy's format"),
        (b"", "is empty"),
    ],
)
def test_a_damaged_npy_file_is_refused(tmp_path, content, word):
    (tmp_path / "embed.npy").write_bytes(content)
    refused(tmp_path, "embed.npy", word)
    (tmp_path / "embed.npy").unlink()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("embed.npy", content)
    refused(tmp_path, "a.npz", "numpy's format" if word == "is empty" else word)


def test_damaged_archives_and_safetensors_are_refused(tmp_path):
    for name, content in (("a.npz", b"PK\x03\x04 not a zip"), ("a.safetensors", b"\xff" * 64)):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path, name, "is no whole")
        (tmp_path / name).unlink()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("../evil.py", b"1")
    refused(tmp_path, "'../evil.py'", "expected arrays only")


def test_a_fifo_is_refused_and_not_opened(tmp_path):
    os.mkfifo(tmp_path / "embed.npy")
    refused(tmp_path, "embed.npy", "is not a regular file")


def test_names_out_of_files_are_printed_in_one_line(tmp_path):
    save(tmp_path, {"a\nb\x1b[2J" + "c" * 5000: Q})
    refused(tmp_path, "is no point")
