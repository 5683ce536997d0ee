"""tools/diff.py: what another engine computed against a golden pack, with an exit code."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from support.packs import IDS, model, pack
from support.tool import run_tool_here

from minqwen import Checkpoint
from minqwen.lab.faults import FAULTS
from minqwen.model import Qwen2


@pytest.fixture
def golden(tmp_path):
    return pack(tmp_path, runs=("float64", "native-float32"))


def dumped(out, qwen, prompts=IDS, dtype="float32"):
    """What lab/dump.py writes of a model, but for the points that no hook sees."""
    out.mkdir()
    for n, ids in enumerate(prompts):
        with torch.no_grad():
            _, seen = qwen.run_with_cache(torch.tensor([ids]))
        held = {
            name: x[0] for name, x in seen.items() if "normalized" not in name and "rot" not in name
        }
        save_file({**held, "input_ids": torch.tensor(ids)}, out / f"{n}.safetensors")
    about = {"format": "minqwen dump 1", "engine": "a test", "dtype": dtype, "passes": len(prompts)}
    (out / "dump.json").write_text(json.dumps(about))
    return out


def right_model(golden, dtype=torch.float32):
    return Qwen2.from_pretrained(golden.model_dir, dtype=dtype)


def wrong_model(golden, name):
    source = Checkpoint(golden.model_dir)
    weights = {name: source.read(name) for name in source.names}
    return FAULTS[name].model(source.config, weights)


def test_a_right_engine_agrees_with_exit_code_0(golden, tmp_path):
    out = dumped(tmp_path / "out", right_model(golden))
    done = run_tool_here("diff.py", golden.path, out)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[-1] == "agrees: float32 rounding at every point (logits at 1 units)"
    assert lines[1].split()[0] == "embed" and "layers.1.mlp.out" in done.out


def test_a_wrong_engine_diverges_with_exit_code_1_and_the_mistake_is_named(golden, tmp_path):
    out = dumped(tmp_path / "out", wrong_model(golden, "gelu"))
    json_file, page = tmp_path / "r.json", tmp_path / "r.html"
    done = run_tool_here("diff.py", golden.path, out, "--json", json_file, "--html", page)
    assert (done.code, done.err) == (1, "")
    assert "first wrong: layer 0, MLP's activation (" in done.out.splitlines()[-1]
    assert "most like `gelu`" in done.out.splitlines()[-1]
    report = json.loads(json_file.read_text())
    assert report["verdict"] == "diverge" and report["explained_by"]["name"] == "gelu"
    assert report["first"]["point"] == "layers.0.mlp.act"
    assert "<strong>diverge</strong>" in page.read_text()


def refused(*args):
    done = run_tool_here("diff.py", *args)
    assert done.code == 2 and not done.out
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    return done.err


def test_what_cannot_be_compared_is_refused_with_exit_code_2(golden, tmp_path):
    other = dumped(tmp_path / "other", right_model(golden), [[1, 2]])
    report = tmp_path / "r.json"
    line = refused(golden.path, other, "--json", report)
    assert "2 ids that are no prompt of the pack" in line
    found = json.loads(report.read_text())
    assert found["verdict"] == "refused" and found["reason"] in line and found["first"] is None
    assert "nowhere" in refused(golden.path, tmp_path / "nowhere")
    assert "nowhere" in refused(tmp_path / "nowhere", other)
    assert "--html" in refused(golden.path, other, "--html", tmp_path / "no" / "page.html")


def test_another_model_than_the_packs_is_refused(golden, tmp_path):
    out = dumped(tmp_path / "out", right_model(golden))
    model(tmp_path / "two", rms_norm_eps=1e-5)
    assert "--model" in refused(golden.path, out, "--model", tmp_path / "two")
