"""tools/golden.py make and verify: a pack, its exit codes, and mistakes in one line."""

from __future__ import annotations

import pytest
from support.packs import forge, model
from support.tool import run_tool_here

from minqwen.lab.packs.pack import Pack


@pytest.fixture
def made(tmp_path):
    """(pack, model) that the command line made."""
    path = model(tmp_path / "model")
    args = ("--model", path, "--ids", "5,17,60", "2", "--run", "float64", "native-bfloat16")
    done = run_tool_here("golden.py", "make", tmp_path / "pack", *args)
    assert done.code == 0 and not done.err
    assert "5 files" in done.out and "prompts of 3, 1 tokens; 44 points" in done.out
    return tmp_path / "pack", path


def test_what_was_made_is_verified(made):
    done = run_tool_here("golden.py", "verify", made[0])
    assert done.code == 0 and not done.err
    *_, float64, bfloat16, last = done.out.splitlines()
    assert float64.split() == ["float64", "44", "0", "0"]
    assert bfloat16.split() == ["native-bfloat16", "44", "0", "0"]
    assert last == "good: these are the numbers of the pack"
    assert run_tool_here("golden.py", "verify", made[0], "--stream-layers").out == done.out


def test_numbers_that_the_model_does_not_give_are_named_with_exit_code_1(made):
    forge(made[0], "native-bfloat16", 1, "layers.1.attn.out", lambda x: x + 1)
    done = run_tool_here("golden.py", "verify", made[0])
    assert done.code == 1 and "layers.1.attn.out differs by" in done.out
    assert done.out.splitlines()[-1] == "differs: native-bfloat16"


def test_a_damaged_file_is_named_with_exit_code_1(made):
    file = Pack.open(made[0]).file("float64", 0)
    file.write_bytes(file.read_bytes()[:-8])
    done = run_tool_here("golden.py", "verify", made[0])
    assert done.code == 1 and str(file) in done.out
    assert done.out.splitlines()[-1] == "differs: 44 tensors are damaged"


def test_other_weights_are_refused_with_exit_code_2(made, tmp_path):
    other = model(tmp_path / "other", rms_norm_eps=1e-5)
    done = run_tool_here("golden.py", "verify", made[0], "--model", other)
    assert done.code == 2 and "other/config.json: is not the file" in done.err
    assert done.err.count("\n") == 1 and not done.out


def test_prompts_are_texts_lines_of_a_file_or_ids(embedded_args, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("In the beginning\nAnd God said\n")
    texts = run_tool_here(
        "golden.py", "make", tmp_path / "a", *embedded_args, "--prompt-file", file
    )
    assert texts.code == 0, texts.err
    assert [p.text for p in Pack.open(tmp_path / "a").prompts] == [
        "In the beginning",
        "And God said",
    ]
    run_tool_here(
        "golden.py", "make", tmp_path / "b", *embedded_args, "--prompt", "In the beginning"
    )
    assert Pack.open(tmp_path / "b").prompts[0] == Pack.open(tmp_path / "a").prompts[0]


@pytest.fixture
def embedded_args():
    return ["--run", "native-bfloat16", "--points", "final_norm"]


@pytest.mark.parametrize(
    "args, expected",
    [
        (["make"], "OUT"),
        (["make", "OUT", "--model", "/nowhere"], "/nowhere"),
        (["make", "OUT", "--run", "float65"], "invalid choice: 'float65'"),
        (["make", "OUT", "--ids", "1,x"], "--ids"),
        (["make", "OUT", "--ids", "1", "--prompt", "x"], "not allowed with"),
        (["make", "OUT", "--ids", "99999"], "the token 99999"),
        (["make", "OUT", "--prompt", ""], "no tokens"),
        (["make", "OUT", "--points", "layers.99.mlp"], "no point is called 'layers.99.mlp'"),
        (["make", "OUT", "--prompt-file", "/nowhere.txt"], "/nowhere.txt"),
        (["make", "OUT", "--stream-layer"], "mean '--stream-layers'"),
        (["verify", "/nowhere"], "manifest.json"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(args, expected, tmp_path):
    args = [str(tmp_path / "OUT") if arg == "OUT" else arg for arg in args]
    done = run_tool_here("golden.py", *args)
    assert done.code == 2 and expected in done.err, done
    assert done.err.count("\n") == 1 and not done.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["make", "verify"])
def test_ranks_do_not_write_or_read_one_pack_together(command, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run_tool_here("golden.py", command, tmp_path / "pack")
    assert done.code == 2 and "without torchrun" in done.err and not list(tmp_path.iterdir())
