"""tools/make_checkpoint.py writes a random checkpoint of any Qwen2.5 shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.checkpoints import INDEX, Q0, assert_holds
from support.tool import run_tool, run_tool_here

from minqwen.checkpoint import Checkpoint

SMALL = (
    "--hidden-size 24 --head-dim 8 --intermediate-size 40 --vocab-size 61 --num-hidden-layers 2"
).split()


def make(*args: object) -> dict:
    """Run the tool; what it prints."""
    done = run_tool_here("make_checkpoint.py", *args)
    assert done.code == 0, done.err
    return json.loads(done.out)


def refused(*args: object) -> str:
    """Run the tool; its one line of complaint."""
    done = run_tool_here("make_checkpoint.py", *args)
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1, done
    assert done.err.startswith("error: ")
    return done.err


@pytest.fixture
def small(tmp_path) -> Path:
    """The 7B's head counts with small widths."""
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    make("--size", "7B", *SMALL, "--tokenizer", tmp_path / "tok", tmp_path / "a")
    return tmp_path / "a"


def test_it_writes_a_checkpoint_and_says_what_it_wrote(tmp_path):
    done = run_tool("make_checkpoint.py", "--size", "0.5B", *SMALL, tmp_path / "c")
    assert done.code == 0 and "B/s" in done.err, done.err
    checkpoint, said = Checkpoint(tmp_path / "c"), json.loads(done.out)
    checkpoint.check()
    assert said == {
        "path": str(tmp_path / "c"),
        "parameters": checkpoint.config.num_parameters(),
        "bytes": checkpoint.config.weight_bytes(),
        "dtype": "bfloat16",
        "files": 1,
    }


def test_it_takes_any_official_shape_with_changes(small):
    checkpoint = Checkpoint(small)
    checkpoint.check()
    checkpoint.check_finite()
    config = checkpoint.config
    assert (config.num_attention_heads, config.head_dim) == (28, 8)
    assert not config.tie_word_embeddings
    assert (small / "tokenizer.json").exists()


def test_its_numbers_are_what_the_docstring_says(small):
    checkpoint = Checkpoint(small)
    w = checkpoint.read(Q0, dtype=torch.float32)
    assert abs(w.mean()) < 2e-3 and 0.018 < w.std() < 0.022 and len(w.unique(dim=0)) == len(w)
    assert checkpoint.read("model.norm.weight").eq(1).all()
    assert 0 < checkpoint.read(Q0.replace("weight", "bias")).abs().max() < 0.1
    assert not torch.equal(checkpoint.read(Q0), checkpoint.read(Q0.replace("s.0.", "s.1.")))


def test_another_precision_and_smaller_files_hold_the_same_numbers(small, tmp_path):
    options = ["--dtype", "float32", "--max-file-bytes", "9000", "--tie-word-embeddings"]
    make("--config", small / "config.json", *options, tmp_path / "b")
    b = Checkpoint(tmp_path / "b")
    b.check()
    assert b.config.dtype == "float32" and b.config.tie_word_embeddings
    assert (tmp_path / "b" / INDEX).exists()
    assert torch.equal(b.read(Q0, dtype=torch.bfloat16), Checkpoint(small).read(Q0))


def test_the_seed_decides_the_numbers(small, tmp_path):
    make("--size", "7B", *SMALL, "--seed", "1", tmp_path / "b")
    one = Checkpoint(tmp_path / "b")
    assert not torch.equal(one.read(Q0), Checkpoint(small).read(Q0))
    make("--config", small, "--seed", "1", tmp_path / "c")
    assert_holds(tmp_path / "c", {name: one.read(name) for name in one.names})


def test_a_checkpoint_is_replaced_only_when_the_user_says_so(small):
    old = Checkpoint(small).read(Q0)
    line = refused("--size", "7B", *SMALL, "--seed", "1", small)
    assert "exists" in line and "--overwrite" in line
    assert torch.equal(Checkpoint(small).read(Q0), old)
    make("--size", "7B", *SMALL, "--seed", "1", "--overwrite", small)
    assert not torch.equal(Checkpoint(small).read(Q0), old)


def test_a_shape_that_cannot_be_is_refused_in_one_line(tmp_path):
    assert "num_attention_heads" in refused(
        "--size", "7B", "--num-attention-heads", "27", tmp_path / "d"
    )
    assert "gone" in refused("--config", tmp_path / "gone", tmp_path / "d")
    assert "num_key_value_heads" in refused("--size", "7B", "--num-key-value-heads", "3", tmp_path)


@pytest.mark.parametrize(
    "args", ["--size 9B", "--size 0.5B --seed -1", "", "--size 7B --config x"], ids=repr
)
def test_flags_that_make_no_sense_end_with_code_2(tmp_path, args):
    assert run_tool_here("make_checkpoint.py", *args.split(), tmp_path / "d").code == 2
    assert not (tmp_path / "d").exists()


def test_help_names_the_flags_and_the_sizes():
    done = run_tool_here("make_checkpoint.py", "--help")
    assert done.code == 0
    for words in ("--num-hidden-layers", "72B", "four weight files"):
        assert words in done.out
