"""A golden pack holds what a model computes, says so, and notices every change."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import refusal
from support.packs import IDS, model, pack, prompts, sign

from minqwen import Qwen2
from minqwen.config import ModelConfig
from minqwen.lab.golden import digest, file_digest
from minqwen.lab.packs.pack import MANIFEST, Pack, PackPrompt
from minqwen.lab.packs.writer import Recipe, make
from minqwen.model.trace import POINTS, point_names, point_of

RUNS = {
    "float64": dict(dtype="float64"),
    "native-bfloat16": dict(dtype="bfloat16"),
    "exact-float32": dict(dtype="float32", arithmetic="exact"),
}


def test_a_pack_holds_every_point_of_every_run_in_every_bit(tmp_path):
    found = pack(tmp_path, runs=tuple(RUNS))
    assert found.runs == tuple(RUNS) and found.names == tuple(point_names(2))
    assert [prompt.ids for prompt in found.prompts] == IDS and found.full_logits
    for run, options in RUNS.items():
        qwen = Qwen2.from_pretrained(tmp_path / "model", **options)
        for n, ids in enumerate(IDS):
            logits, seen = qwen.run_with_cache(torch.tensor([ids]))
            assert torch.equal(found.read(run, n, "logits"), logits[0])
            for name in found.names:
                kept = found.read(run, n, name)
                assert kept.dtype == seen[name].dtype and torch.equal(kept, seen[name][0]), name
    assert not found.damage()


def test_the_manifest_says_what_the_tensors_are(tmp_path):
    found = pack(tmp_path, prompts=(PackPrompt([4, 2], "a text"), PackPrompt([1], None)))
    content = json.loads((found.path / MANIFEST).read_text())
    assert content["prompts"][0] == {"text": "a text", "ids": [4, 2], "positions": [0, 1]}
    assert content["points"]["layers.1.attn.k"] == {"shape": "T K d", "split by": "kv heads"}
    assert content["weights"] == {
        file: file_digest(tmp_path / "model" / file)
        for file in ("config.json", "model.safetensors")
    }
    assert {"minqwen", "torch", "python", "cpu", "threads"} == content["machine"].keys()
    entry = content["runs"]["float64"]["prompts"][0]["tensors"]["logits"]
    logits = load_file(found.path / "float64.0.safetensors")["logits"]
    assert entry == {"dtype": "float64", "shape": [2, 61], "sha256": digest([logits])}
    assert content["runs"]["float64"]["prompts"][0]["logit_rows"] == [digest([x]) for x in logits]
    assert found.config == ModelConfig.from_json(tmp_path / "model")
    assert found.model_dir == (tmp_path / "model").resolve()
    assert found.prompts[0].text == "a text" and found.prompts[1].text is None


def test_points_are_chosen_by_patterns_and_logits_are_always_there(tmp_path):
    found = pack(tmp_path, points=["*.resid_post", "*.attn.result"])
    names = ("layers.0.attn.result", "layers.0.resid_post")
    assert found.names == (*names, *(name.replace("0", "1") for name in names), "logits")
    assert found.read("float64", 2, "layers.0.attn.result").shape == (7, 4, 24)
    assert found.read("float64", 0, "blocks.1.hook_resid_post").shape == (10, 24)


def test_of_a_large_vocabulary_some_logits_are_kept_and_the_digest_of_each_row(tmp_path):
    found = pack(tmp_path, runs=("float64", "native-bfloat16"), top_k=5, points="final_norm")
    assert found.names == ("final_norm",) and found.top_k == 5 and not found.full_logits
    truth = Qwen2.from_pretrained(tmp_path / "model", dtype="float64")
    narrow = Qwen2.from_pretrained(tmp_path / "model", dtype="bfloat16")
    for n, ids in enumerate(IDS):
        logits = truth(torch.tensor([ids]))[0]
        best, values = found.top("float64", n)
        assert torch.equal(values, logits.topk(5).values)
        assert torch.equal(logits.gather(1, best), values)
        # The same tokens in every run, so that runs can be compared.
        logits = narrow(torch.tensor([ids]))[0]
        same, values = found.top("native-bfloat16", n)
        assert torch.equal(same, best) and torch.equal(values, logits.gather(1, best))
        recorded = found.recorded["native-bfloat16", n]
        assert recorded.rows == [digest([row]) for row in logits]
    refusal(lambda: found.read("float64", 0, "logits"), "logits of 5 tokens", "Pack.top")


@pytest.mark.parametrize(
    "rows, top_k, kept", [(61, None, None), (40_000, None, 20), (40_000, 0, None), (61, 99, None)]
)
def test_small_vocabularies_are_kept_whole_unless_told_otherwise(tmp_path, rows, top_k, kept):
    path = model(tmp_path / "model", vocab_size=rows)
    assert Recipe(path, prompts(), top_k=top_k).kept_logits == kept


# ---- writing ------------------------------------------------------------------------------------


def test_what_is_there_is_replaced_only_if_it_is_a_pack_and_told_so(tmp_path):
    pack(tmp_path)
    recipe = Recipe(tmp_path / "model", prompts([[7]]), "embed", ("float64",))
    refusal(lambda: make(tmp_path / "pack", recipe), "exists", "--overwrite")
    assert len(make(tmp_path / "pack", recipe, overwrite=True).prompts) == 1
    assert len(list((tmp_path / "pack").iterdir())) == 2
    (tmp_path / "pack" / "notes.txt").write_text("mine")
    refusal(lambda: make(tmp_path / "pack", recipe, overwrite=True), "'notes.txt'", "lost")
    refusal(lambda: make(tmp_path / "model", recipe, overwrite=True), "'config.json'", "lost")
    refusal(lambda: make(tmp_path / "pack" / "notes.txt", recipe), "is a file")


def test_a_pack_appears_whole_or_not_at_all(tmp_path):
    model(tmp_path / "model")
    recipe = Recipe(tmp_path / "model", prompts(), runs=("float64", "exact-bfloat16"))
    os.truncate(tmp_path / "model" / "model.safetensors", 3000)
    refusal(lambda: make(tmp_path / "pack", recipe), "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(prompts=()), ["no prompt"]),
        (dict(prompts=prompts([[1], []])), ["prompt 1", "no tokens"]),
        (dict(prompts=prompts([[60, 61]])), ["prompt 0", "the token 61", "0 to 60"]),
        (dict(runs=()), ["at least one"]),
        (dict(runs=("float64", "float64")), ["each one once"]),
        (dict(runs=("natve-float32",)), ["'natve-float32'", "mean 'native-float32'"]),
        (dict(points="layers.2.attn.q"), ["no point", "2 layers"]),
        (dict(top_k=-1), ["top_k is -1"]),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(tmp_path, changes, words):
    path = model(tmp_path / "model")
    refusal(lambda: Recipe(path, **({"prompts": prompts()} | changes)), *words)


# ---- damage -------------------------------------------------------------------------------------


def test_a_bit_that_changed_is_found_and_its_tensor_named(tmp_path):
    found = pack(tmp_path, runs=("float64", "native-bfloat16"))
    file = found.file("native-bfloat16", 2)
    last = {name: x.clone() for name, x in load_file(file).items()}  # a file is mapped
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    wrong = [name for name, x in load_file(file).items() if not torch.equal(x, last[name])]
    (line,) = found.damage()
    assert wrong[0] in line and str(file) in line and "SHA-256" in line
    refusal(lambda: found.read("native-bfloat16", 2, wrong[0]), wrong[0])


def test_files_that_are_short_or_gone_are_named(tmp_path):
    found = pack(tmp_path, points="embed")
    os.truncate(found.file("float64", 0), 50)
    found.file("float64", 1).unlink()
    lines = found.damage()
    assert len(lines) == 4  # two tensors in each file
    assert all(str(found.file("float64", i // 2)) in line for i, line in enumerate(lines))


def test_a_manifest_that_was_edited_is_refused(tmp_path):
    path = pack(tmp_path).path / MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"top_k": null', '"top_k": 3'))
    refusal(lambda: Pack.open(path.parent), "manifest.json", "was changed", "SHA-256")
    path.write_text(text.replace("golden pack 1", "golden pack 2"))
    refusal(lambda: Pack.open(path.parent), "'minqwen golden pack 2'", "this version")
    path.write_text(text[:-9])
    refusal(lambda: Pack.open(path.parent), "not valid JSON")
    path.unlink()
    refusal(lambda: Pack.open(path.parent), "manifest.json", "tools/golden.py make")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.pop("prompts"), ["prompts"]),
        (lambda c: c.update(runs=3), ["TypeError"]),
        (lambda c: c["runs"].update({"../x": {}}), ["no run '../x'"]),
        (lambda c: c["runs"]["float64"]["prompts"].pop(), ["IndexError"]),
        (lambda c: c["config"].pop("hidden_size"), ["hidden_size"]),
        (lambda c: c["points"].pop("embed"), ["a run has", "expected"]),
    ],
)
def test_a_manifest_with_a_right_digest_and_wrong_contents_is_refused(tmp_path, change, words):
    path = pack(tmp_path).path
    sign(path, change)
    refusal(lambda: Pack.open(path), "manifest.json", *words)


def test_other_weights_are_named(tmp_path):
    found = pack(tmp_path)
    assert found.check_model() == found.model_dir
    other = model(tmp_path / "other", intermediate_size=48)
    refusal(lambda: found.check_model(other), "other/config.json", "--model")
    raw = bytearray((found.model_dir / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (found.model_dir / "model.safetensors").write_bytes(raw)
    refusal(lambda: found.check_model(), "model/model.safetensors", "is not the file")


def test_what_is_not_in_a_pack_is_said(tmp_path):
    found = pack(tmp_path, points="embed")
    refusal(lambda: found.read("native-float32", 0, "embed"), "native-float32", "one of float64")
    refusal(lambda: found.read("float64", 3, "embed"), "prompt 3", "from 0 to 2")
    refusal(lambda: found.read("float64", 0, "embd"), "embd", "mean 'embed'")


def test_every_kind_of_point_is_in_the_test_of_every_bit():
    assert {point_of(name) for name in point_names(2)} == {p for p in POINTS if not p.costly}
