"""tools/trace.py as a user runs it: the table of points, sizes, files, and mistakes."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.forked import forked
from support.paths import EMBEDDED, ROOT
from support.tool import run_tool, run_tool_here

from minqwen import Checkpoint
from minqwen.model.trace import POINTS

TEXT = "In the beginning"
NAMES = ["layers.0.attn.z", "*.resid_post", "final_norm"]


@pytest.fixture(scope="module")
def truth(embedded_model, embedded_tokenizer):
    """What the model itself shows of TEXT, at NAMES."""
    ids = torch.tensor([embedded_tokenizer.encode(TEXT)])
    with torch.no_grad():
        _, seen = embedded_model.run_with_cache(ids, NAMES)
    return {name: x[0] for name, x in seen.items()}


def test_points_are_listed_without_a_model_being_read(monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", None)
    result = run_tool_here("trace.py", "points")
    header, *rows = result.out.splitlines()
    assert result.code == 0 and result.err == ""
    assert header.split()[:4] == ["name", "shape", "dtype", "split"] and len(rows) == len(POINTS)
    for point, row in zip(POINTS, rows):
        name, alias = point.name, point.alias
        if point.layered:
            name, alias = f"layers.N.{name}", f"blocks.N.{alias}" if alias else None
        assert row.startswith(name + " ") and f"[{point.shape}]" in row and row.endswith(point.what)
        assert f" {alias or '-'} " in row


def test_what_is_saved_is_what_the_model_shows(truth, tmp_path):
    out = tmp_path / "seen.safetensors"
    result = run_tool("trace.py", "save", TEXT, out, "--names", *NAMES, "--dtype", "float32")
    assert result.code == 0 and result.out == "", result.err
    saved = load_file(out)
    assert saved.keys() == truth.keys()
    for name, x in truth.items():
        assert torch.equal(saved[name], x), name


def test_all_points_can_be_saved_with_what_they_are_of(
    embedded_model, embedded_tokenizer, tmp_path
):
    out = tmp_path / "seen.safetensors"
    result = run_tool_here("trace.py", "save", TEXT, out, "--names", "*", "--dtype", "float32")
    assert result.code == 0 and result.out == "", result.err
    ids = embedded_tokenizer.encode(TEXT)
    with torch.no_grad():
        _, seen = embedded_model.run_with_cache(torch.tensor([ids]))
    saved = load_file(out)
    assert saved.keys() == seen.keys() and all(torch.equal(saved[n], x[0]) for n, x in seen.items())
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    weights = (EMBEDDED / "model.safetensors").read_bytes()
    assert json.loads(metadata["ids"]) == ids and metadata["text"] == TEXT
    assert metadata["dtype"] == "float32" and metadata["arithmetic"] == "native"
    assert metadata["model"] == str(EMBEDDED)
    assert json.loads(metadata["sha256"]) == {
        "config.json": hashlib.sha256((EMBEDDED / "config.json").read_bytes()).hexdigest(),
        "model.safetensors": hashlib.sha256(weights).hexdigest(),
    }


def saved_logits(out, *args):
    result = run_tool_here("trace.py", "save", *args, "--names", "logits", "--dtype", "float32")
    assert result.code == 0, result.err
    with safe_open(out, "pt") as file:
        return file.get_tensor("logits"), file.metadata()


def test_ids_and_a_chat_are_input_too(embedded_model, embedded_tokenizer, tmp_path):
    out = tmp_path / "seen.safetensors"
    logits, metadata = saved_logits(out, out, "--ids", "5,300,17")
    with torch.no_grad():
        assert torch.equal(logits, embedded_model(torch.tensor([[5, 300, 17]]))[0])
    assert json.loads(metadata["ids"]) == [5, 300, 17] and "text" not in metadata
    logits, metadata = saved_logits(out, "What is 47 + 38?", out, "--chat")
    chat = [{"role": "user", "content": "What is 47 + 38?"}]
    ids = embedded_tokenizer.encode_chat(chat)
    with torch.no_grad():
        assert torch.equal(logits, embedded_model(torch.tensor([ids]))[0])
    assert json.loads(metadata["ids"]) == ids
    assert metadata["text"] == embedded_tokenizer.apply_chat_template(chat)


def test_sizes_are_shown_in_the_order_of_the_model(truth):
    result = run_tool_here("trace.py", "show", TEXT, "--names", *NAMES, "--dtype", "float32")
    assert result.code == 0, result.err
    header, *rows = result.out.splitlines()
    assert header.split()[0] == "name" and [row.split()[0] for row in rows] == list(truth)
    for row, x in zip(rows, truth.values()):
        assert str(list(x.shape)) in row
        mean, std, largest = map(float, row.split("]")[1].split())
        assert mean == pytest.approx(x.double().mean().item(), abs=1e-5)
        assert std == pytest.approx(x.double().std().item(), abs=1e-5)
        assert largest == pytest.approx(x.abs().max().item(), abs=1e-5)


def test_two_ranks_save_whole_tensors_once(truth, tmp_path):
    out = tmp_path / "seen.safetensors"
    args = ["save", TEXT, out, "--names", *NAMES, "--dtype", "float32"]
    result = forked(2, ROOT / "tools" / "trace.py", args)
    assert result.returncode == 0 and result.stdout == "", result.stderr
    saved = load_file(out)
    assert saved.keys() == truth.keys()
    for name, x in truth.items():
        torch.testing.assert_close(saved[name], x, rtol=1e-4, atol=1e-4, msg=name)


def test_a_model_of_nan_is_shown(tmp_path):
    """Whoever looks for the first NaN finds tensors without one finite number."""
    for path in EMBEDDED.iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, tmp_path / path.name)
    tensors = load_file(EMBEDDED / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    args = ["--model", tmp_path, "--names", "*.resid_post"]
    result = run_tool_here("trace.py", "show", TEXT, *args)
    assert result.code == 0 and result.err == "", result.err
    numbers = [line.split("]")[1].split() for line in result.out.splitlines()[1:]]
    assert "nan" not in numbers[0] and numbers[1:] == [["nan"] * 3] * 3


def test_one_token_is_shown():
    result = run_tool_here("trace.py", "show", "--ids", "5", "--names", "layers.0.attn.pattern")
    assert result.code == 0 and result.err == "", result.err


# ---- mistakes -----------------------------------------------------------------------------------


class WeightIsReadError(Exception):
    pass


@pytest.fixture
def unreadable_weights(monkeypatch):
    """Whoever reads a weight gets a WeightIsReadError."""

    def read(*args, **options):
        raise WeightIsReadError

    monkeypatch.setattr(Checkpoint, "read", read)


def test_control_a_weight_that_is_read_is_seen(unreadable_weights):
    with pytest.raises(WeightIsReadError):
        run_tool_here("trace.py", "show", TEXT)


@pytest.mark.parametrize(
    "args, says",
    [
        (["save", TEXT, "/nowhere/x"], "/nowhere"),
        (["save", TEXT, "/"], "is a directory"),
        (["show", ""], "no tokens"),
        (["show", TEXT, "--model", "/nowhere"], "/nowhere"),
        (["show", TEXT, "--names", "nothing"], "nothing"),
        (["show", TEXT, "--names", "layers.9.attn.z"], "layers.9.attn.z"),
        (["show", TEXT, "--name", "logits"], "did you mean '--names'"),
        (["show", TEXT, "--device", "gpu"], "--device"),
        (["shwo", TEXT], "shwo"),
        (["points", "--model", "/nowhere"], "/nowhere"),
        ([], "command"),
        (["show"], "--ids 5,300,17"),
        (["save", "/tmp/x"], "--ids 5,300,17"),
        (["show", TEXT, "--ids", "1,2"], "give one of them"),
        (["show", "--ids", "1,2", "--chat"], "--chat"),
        (["show", "--ids", "1,99999"], "99999"),
        (["show", "--ids", "one"], "--ids"),
        (["show", "--ids", ""], "--ids"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_mistakes_are_one_line_and_exit_2_before_a_weight_is_read(unreadable_weights, args, says):
    result = run_tool_here("trace.py", *args)
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert says in result.err


def test_a_trace_with_more_heads_says_so(tmp_path):
    flags = ["--names", "*.pattern", "--num-attention-heads", 32]
    done = run_tool_here("trace.py", "save", "In the beginning", tmp_path / "t.safetensors", *flags)
    assert done.code == 0, done.err
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert json.loads(file.metadata()["heads"])["num_attention_heads"] == 32
        assert file.get_slice("layers.0.attn.pattern").get_shape()[0] == 32


def test_plot_writes_a_page(tmp_path):
    out = tmp_path / "plot.html"
    result = run_tool_here("trace.py", "plot", TEXT, out, "--layers", "0", "3")
    assert result.code == 0 and result.out == "", result.err
    page = out.read_text()
    assert "In the beginning" in page and page.count("<figure") == 2 * 28
    wrong = run_tool_here("trace.py", "plot", TEXT, out, "--layers", "4")
    assert wrong.code == 2 and wrong.err == "error: --layers has 4, expected 0 to 3\n"
    missing = run_tool_here("trace.py", "plot", TEXT, tmp_path / "nowhere" / "plot.html")
    assert missing.code == 2 and len(missing.err.splitlines()) == 1
