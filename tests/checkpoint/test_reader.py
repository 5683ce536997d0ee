"""What a checkpoint holds is what is read, whole or by slices, in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import (
    FILE,
    Q0,
    assert_holds,
    refusal,
    rewrite,
    tiny,
    weights,
    write,
)
from support.paths import ROOT

from minqwen.checkpoint import Checkpoint, reader, write_checkpoint
from minqwen.lab.shapes import official_config, random_tensors
from minqwen.parallel import Shard


@pytest.mark.parametrize("tied,limit", [(True, "1GB"), (False, "8KB")])
def test_reads_what_transformers_saves(tmp_path, tied, limit):
    from transformers import AutoModelForCausalLM, Qwen2Model

    write(tmp_path / "ours", tiny(tie_word_embeddings=tied))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    expected = {n: t for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    assert_holds(tmp_path / "theirs", expected)
    base = Qwen2Model.from_pretrained(
        tmp_path / "ours", dtype=torch.bfloat16
    )  # saves names without `model.`
    base.save_pretrained(tmp_path / "base", max_shard_size=limit)
    c = Checkpoint(tmp_path / "base")
    assert torch.equal(c.read(Q0), expected[Q0])
    if tied:
        assert_holds(tmp_path / "base", expected)
    else:
        refusal(c.check, "lm_head.weight", "missing")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slices_equal_indexing(tmp_path_factory, data):
    config = tiny()
    path = Path(tmp_path_factory.getbasetemp()) / "slices"
    if not path.exists():
        write(path, config)
    tensors, c = weights(config), Checkpoint(path)
    name = data.draw(st.sampled_from(c.names))
    dim = data.draw(st.integers(0, len(c.shape(name)) - 1))
    start = data.draw(st.integers(0, c.shape(name)[dim]))
    stop = data.draw(st.integers(start, c.shape(name)[dim]))
    dtype = data.draw(st.sampled_from([None, torch.float64, torch.bfloat16]))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(reader, "PIECE_BYTES", data.draw(st.sampled_from([1, 100, 1000, 4 << 20])))
        got = c.read(name, Shard(dim, start, stop), dtype=dtype)
    assert torch.equal(
        got, tensors[name].narrow(dim, start, stop - start).to(dtype or torch.bfloat16)
    )
    assert (
        got.is_contiguous() and got.untyped_storage().nbytes() == got.nbytes
    )  # its own memory, no more


def test_bad_slices_and_names(tmp_path):
    write(tmp_path / "c")
    c = Checkpoint(tmp_path / "c")
    for shard in (Shard(0, 0, 33), Shard(2, 0, 1), Shard(1, 5, 4), Shard(0, -1, 4)):
        refusal(lambda s=shard: c.read(Q0, s), Q0, "with a slice", "model.safetensors")
    refusal(lambda: c.read("nonsense"), "nonsense", "no tensor")


MEMORY = """
import json, sys, torch
from minqwen.checkpoint import Checkpoint
from minqwen.parallel import Shard

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

path = sys.argv[1]
warm = torch.ones(1000).bfloat16().clone(); warm.copy_(warm.float())  # torch's own first-use memory
c = Checkpoint(path); c.check(); c.read("model.norm.weight")
for ranks in (4, 1):
    held = {}
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
    before = kib("VmRSS")
    for name in c.names:
        dim = 1 if "o_proj" in name or "down" in name else 0
        n = c.shape(name)[dim] // ranks
        held[name] = c.read(name, None if "norm" in name or ranks == 1 else Shard(dim, n, 2 * n))
    size = sum(t.nbytes for t in held.values())
    ratio = (kib("VmHWM") - before) * 1024 / size
    mapped = sum(path in line for line in open("/proc/self/maps"))
    c.check_finite()
    print(json.dumps({"held": size * ranks, "ratio": ratio, "mapped": mapped,
                      "scan": (kib("VmHWM") - before) * 1024 / size}))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """201 MB: the 1.5B's widths, with an embedding that is a third of everything."""
    path = tmp_path_factory.mktemp("big") / "c"
    config = official_config("1.5B").replace(num_hidden_layers=1, vocab_size=35000)
    write_checkpoint(path, config, random_tensors(config, seed=0))
    return path


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's /proc")
def test_a_rank_holds_its_slices_and_little_more(big):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(big)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for got in map(json.loads, done.stdout.splitlines()):
        assert got["held"] > 195e6 and got["mapped"] == 0, got
        assert 0.9 < got["ratio"] <= 1.15 and got["scan"] <= 1.25, got


def test_a_pickle_beside_safetensors_is_never_opened(tmp_path):
    tensors = write(tmp_path / "c")
    os.mkfifo(tmp_path / "c" / "pytorch_model.bin")  # to open it would block
    assert_holds(tmp_path / "c", tensors)


def test_rotary_buffers_and_a_tied_head_copy_are_tolerated(tmp_path):
    path = tmp_path / "c"
    tensors = write(path, tiny(tie_word_embeddings=True))
    embedding = tensors["model.embed_tokens.weight"]
    rewrite(
        path,
        lambda t: t.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.int64),
                "lm_head.weight": embedding.clone(),
            }
        ),
    )
    assert_holds(path, tensors)
    for change in (
        lambda w: w.index_put_((torch.tensor(60), torch.tensor(23)), torch.tensor(1.0).bfloat16()),
        lambda w: w.float(),
        lambda w: w[:-1].clone(),
        lambda w: torch.where(w == w[3, 3], -w, w),
    ):
        rewrite(path, lambda t, f=change: t.update({"lm_head.weight": f(embedding.clone())}))
        refusal(Checkpoint(path).check, FILE, "lm_head.weight", "differs", "tie_word_embeddings")


def test_a_llama_config_needs_a_zero_output_bias(tmp_path):
    config = tiny(model_type="llama")
    bias = "model.layers.1.self_attn.o_proj.bias"
    zero = {
        n: torch.zeros_like(t) if n.endswith("o_proj.bias") else t
        for n, t in weights(config).items()
    }
    write_checkpoint(tmp_path / "zero", config, zero.items())
    Checkpoint(tmp_path / "zero").check()
    rewrite(
        tmp_path / "zero",
        lambda t: t.update({bias: t[bias].index_fill(0, torch.tensor([5]), 1e-3)}),
    )
    refusal(Checkpoint(tmp_path / "zero").check, bias, "not zero")


def test_a_hugging_face_cache_of_links_reads(tmp_path):
    tensors = write(tmp_path / "blobs", max_file_bytes=20000)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for i, p in enumerate(sorted((tmp_path / "blobs").iterdir())):
        p.rename(tmp_path / "blobs" / str(i))
        (snapshot / p.name).symlink_to(f"../../blobs/{i}")
    assert_holds(snapshot, tensors)


def test_not_finite(tmp_path, monkeypatch):
    path = tmp_path / "c"
    write(path)
    Checkpoint(path).check_finite()
    monkeypatch.setattr(reader, "PIECE_BYTES", 500)
    up = "model.layers.1.mlp.up_proj.weight"
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        bad = torch.ones(40, 24, dtype=dtype)
        bad[3, 5] = bad[39, 23] = float("nan")
        bad[20, 0] = float("-inf")
        rewrite(path, lambda t, bad=bad: t.update({up: bad}))
        Checkpoint(path).check()
        refusal(Checkpoint(path).check_finite, FILE, up, "2 NaN", "1 infinite", "among 960")


@pytest.mark.parametrize("value, words", [("inf", "0 NaN and 1"), ("nan", "1 NaN and 0")])
def test_one_value_that_is_not_finite_is_enough(tmp_path, value, words):
    write(tmp_path / "c")
    bad = torch.ones(32, 24, dtype=torch.bfloat16)
    bad[31, 23] = float(value)
    rewrite(tmp_path / "c", lambda t: t.update({Q0: bad}))
    refusal(Checkpoint(tmp_path / "c").check_finite, Q0, f"{words} infinite")


def test_a_file_that_changes_while_open_is_refused(tmp_path):
    write(tmp_path / "c")
    c = Checkpoint(tmp_path / "c")
    write(tmp_path / "c", seed=1, overwrite=True)
    refusal(lambda: c.read(Q0), "changed since", "model.safetensors")
    shutil.rmtree(tmp_path / "c")
    refusal(lambda: c.read(Q0), "model.safetensors", "cannot be read")
