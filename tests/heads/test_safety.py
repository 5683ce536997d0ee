"""Extending and shrinking destroy nothing, follow no link out, and believe no manifest."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.heads import random_model
from support.quantised import checkpoint, read, tiny
from support.tool import run_tool, run_tool_here

from minqwen import Checkpoint, ModelConfig
from minqwen.checkpoint import write_checkpoint
from minqwen.errors import HeadsError, MinqwenError
from minqwen.heads import convert
from minqwen.heads import packed as packed_words
from minqwen.heads.adapter import ADAPTER_CONFIG, extend_adapter
from minqwen.heads.convert import extend, shrink
from minqwen.heads.layout import layout
from minqwen.heads.manifest import MANIFEST, read_manifest
from minqwen.heads.packed import extend_packed, shrink_packed

CONFIG, WEIGHTS = random_model(6, 3)
TO = layout(CONFIG, 9)


def plain_source(path):
    write_checkpoint(
        path, CONFIG, ((n, w.to(getattr(torch, CONFIG.dtype))) for n, w in WEIGHTS.items())
    )


def refused(act, *words: str) -> None:
    with pytest.raises(MinqwenError) as error:
        act()
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_target_stays_unless_the_user_says_so(tmp_path):
    src, dst = tmp_path / "a", tmp_path / "b"
    plain_source(src)
    extend(src, dst, TO)
    refused(lambda: extend(src, dst, TO), "exists", "--overwrite")
    extend(src, dst, TO, overwrite=True)
    for name in ("notes.md", "eval.json"):
        (dst / name).write_text("mine")
    refused(lambda: extend(src, dst, TO, overwrite=True), "'eval.json', 'notes.md'")
    done = run_tool_here("heads.py", "extend", src, dst, "--num-attention-heads", 9, "--overwrite")
    assert done.code == 2 and "eval.json" in done.err
    assert (dst / "notes.md").read_text() == "mine"


def test_a_file_that_is_not_copied_is_told_in_one_line(tmp_path):
    src, dst = tmp_path / "a", tmp_path / "b"
    plain_source(src)
    (src / "notes.md").write_text("mine")
    done = run_tool("heads.py", "extend", src, dst, "--num-attention-heads", 9)
    said = f"warning: {src}: not copied, because no checkpoint needs it: 'notes.md'"
    assert done.code == 0 and said in done.err.splitlines()
    assert all(line.startswith("warning: ") for line in done.err.splitlines())


@pytest.mark.parametrize("target", ["/proc/self/environ", "/etc/passwd", "../secret"])
def test_extending_copies_no_file_that_a_link_names_elsewhere(tmp_path, target):
    plain_source(tmp_path / "a")
    (tmp_path / "secret").write_text("key")
    (tmp_path / "a" / "NOTICE").symlink_to(target)
    (tmp_path / "a" / "LICENSE").write_text("mine")
    (tmp_path / "a" / "LICENSE").chmod(0o640)
    with pytest.warns(UserWarning, match="NOTICE: is a link to .* and is not copied"):
        extend(tmp_path / "a", tmp_path / "b", TO)
    assert not os.path.lexists(tmp_path / "b" / "NOTICE")
    assert (tmp_path / "b" / "LICENSE").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("packed", [False, True])
def test_a_source_is_not_its_own_target(tmp_path, packed):
    src, wide, link = tmp_path / "a", tmp_path / "b", tmp_path / "link"
    if packed:
        checkpoint(src, tiny())
        to, widen, back = layout(tiny(), 4), extend_packed, shrink_packed
    else:
        plain_source(src)
        to, widen, back = TO, extend, shrink
    widen(src, wide, to)
    link.symlink_to(src)
    for target in (src, link, src / ".." / "a"):
        refused(lambda t=target: widen(src, t, to, overwrite=True), "another directory")
    refused(lambda: back(wide, wide, overwrite=True), "another directory")


@pytest.mark.parametrize("kind", ["fifo", "device", "dangling link"])
def test_a_manifest_that_is_no_file_is_refused(tmp_path, kind):
    plain_source(tmp_path / "a")
    for name, act in (
        (MANIFEST, lambda: read_manifest(tmp_path / "a")),
        (ADAPTER_CONFIG, lambda: extend_adapter(tmp_path / "a", tmp_path / "b", TO)),
    ):
        path = tmp_path / "a" / name
        if kind == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero" if kind == "device" else "/nowhere")
        with pytest.raises(HeadsError, match=name):
            act()


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_changed_number_in_the_manifest_is_seen(tmp_path, key):
    plain_source(tmp_path / "a")
    extend(tmp_path / "a", tmp_path / "b", TO)
    content = json.loads((tmp_path / "b" / MANIFEST).read_text())
    content["source_config"][key] = 0.5
    (tmp_path / "b" / MANIFEST).write_text(json.dumps(content))
    refused(lambda: shrink(tmp_path / "b", tmp_path / "c"), "changed after it was written")


def test_a_tensor_that_no_slot_gives_away_is_compared_with_its_digest(tmp_path):
    plain_source(tmp_path / "a")
    extend(tmp_path / "a", tmp_path / "b", TO)
    manifest = read_manifest(tmp_path / "b")
    manifest.source_sha256["model.norm.weight"] = "0" * 64
    (tmp_path / "b" / MANIFEST).write_text(manifest.to_json())
    refused(lambda: shrink(tmp_path / "b", tmp_path / "c"), "model.norm.weight has changed")
    assert not (tmp_path / "c").exists()


def places(value, path=()):
    """The path of every value in a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def mutated(content: dict, rng: random.Random) -> dict:
    """One value replaced, removed or repeated, anywhere."""
    content = json.loads(json.dumps(content))
    *path, last = rng.choice([path for path in places(content) if path])
    parent = content
    for key in path:
        parent = parent[key]
    old = parent[last]
    odd = [None, True, 0, 1, -1, 2, 7, 1e-9, 0.5, 10**30, "", "x", [], {}, [[]], [0], {"a": 1}]
    kind = rng.randrange(4)
    if kind == 0:
        del parent[last]
    elif kind == 1 and type(old) is int:
        parent[last] = old + rng.choice([-1, 1])
    elif kind == 2 and isinstance(old, list) and old:
        parent[last] = rng.choice([old + old[-1:], old[:-1], old[::-1]])
    else:
        parent[last] = rng.choice(odd)
    return content


@pytest.mark.parametrize("signed", [True, False], ids=["with the old digest", "without one"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_150_odd_manifests_give_the_source_or_one_line(tmp_path, monkeypatch, packed, signed):
    src, wide, back = (tmp_path / name for name in "abc")
    if packed:
        checkpoint(src, tiny())
        extend_packed(src, wide, layout(tiny(), 4))
        undo, tensors, config = shrink_packed, read(src), ModelConfig.from_json(src)
    else:
        plain_source(src)
        extend(src, wide, TO)
        source = Checkpoint(src)
        undo, config = shrink, source.config
        tensors = {name: source.read(name) for name in source.names}
    content = json.loads((wide / MANIFEST).read_text())
    rng = random.Random(packed)
    refusals = 0
    for _ in range(150):
        changed = mutated(content, rng)
        if not signed:  # what is behind the digest must hold too
            changed = resigned(changed)
        (wide / MANIFEST).write_text(json.dumps(changed))
        try:
            undo(wide, back)
        except MinqwenError as error:
            refusals += 1
            assert "\n" not in str(error) and not back.exists()
            continue
        found = read(back)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        if signed:
            assert ModelConfig.from_json(back) == config
        shutil.rmtree(back)
    assert refusals > 75


def resigned(content: dict) -> dict:
    """Format 1, which has no digest of its own."""
    if "format" in content:
        content["format"] = 1
    content.pop("sha256", None)
    return content


class Saboteur:
    """In place of tqdm: once the last tensor is written, one byte of its file changes."""

    def __init__(self, names=None, *, total=None, **_):
        self.names, self.left = names, total

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, count=1):
        self.left -= count
        if not self.left:
            self.damage()

    def __iter__(self):
        yield from self.names
        self.damage()

    @staticmethod
    def damage():
        [file] = Saboteur.directory.glob(".c.tmp-*/model.safetensors")
        with open(file, "r+b") as f:
            f.seek(-1, os.SEEK_END)
            last = f.read(1)[0]
            f.seek(-1, os.SEEK_END)
            f.write(bytes([last ^ 1]))


@pytest.mark.parametrize("tolerance", [0.0, 0.5, "packed"])
def test_what_is_on_the_disk_is_compared_before_it_is_put_in_place(
    tmp_path, monkeypatch, tolerance
):
    if tolerance == "packed":
        checkpoint(tmp_path / "a", tiny())
        extend_packed(tmp_path / "a", tmp_path / "b", layout(tiny(), 4))
    else:
        plain_source(tmp_path / "a")
        extend(tmp_path / "a", tmp_path / "b", TO)
    monkeypatch.setattr(Saboteur, "directory", tmp_path, raising=False)
    for room in (convert, packed_words):
        monkeypatch.setattr(room, "tqdm", Saboteur)
    options = {} if tolerance == "packed" else {"tolerance": tolerance}
    undo = shrink_packed if tolerance == "packed" else shrink
    refused(lambda: undo(tmp_path / "b", tmp_path / "c", **options), "is not what was written")
    assert not (tmp_path / "c").exists()


def test_a_padded_mlp_shrinks_back_and_one_of_another_width_is_refused(tmp_path):
    plain_source(tmp_path / "a")
    to = layout(CONFIG, 9, intermediate_size=CONFIG.intermediate_size + 8)
    extend(tmp_path / "a", tmp_path / "b", to)
    assert ModelConfig.from_json(tmp_path / "b").intermediate_size == CONFIG.intermediate_size + 8
    assert shrink(tmp_path / "b", tmp_path / "c") == []
    before, after = read(tmp_path / "a"), read(tmp_path / "c")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    content = resigned(json.loads((tmp_path / "b" / MANIFEST).read_text()))
    content["source_config"]["intermediate_size"] += 1
    (tmp_path / "b" / MANIFEST).write_text(json.dumps(content))
    refused(lambda: shrink(tmp_path / "b", tmp_path / "d"), "are not of one model")


def test_with_a_tolerance_the_tensors_that_are_not_the_sources_are_named(tmp_path):
    plain_source(tmp_path / "a")
    extend(tmp_path / "a", tmp_path / "b", TO)
    assert shrink(tmp_path / "b", tmp_path / "c") == []
    weights = read(tmp_path / "b")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    config = ModelConfig.from_json(tmp_path / "b")
    manifest = (tmp_path / "b" / MANIFEST).read_text()
    write_checkpoint(
        tmp_path / "trained", config, weights.items(), extra_files={MANIFEST: manifest}
    )
    refused(lambda: shrink(tmp_path / "trained", tmp_path / "d"), "model.norm.weight has changed")
    found = shrink(tmp_path / "trained", tmp_path / "d", tolerance=0.1)
    assert found == ["model.norm.weight"]
    done = run_tool_here("heads.py", "shrink", tmp_path / "trained", tmp_path / "e")
    assert done.code == 2
    done = run_tool_here(
        "heads.py", "shrink", tmp_path / "trained", tmp_path / "e", "--tolerance", 0.1
    )
    assert done.code == 0 and "note: 1 tensors are not the source's" in done.err


def test_no_tolerance_lets_a_nan_pass(tmp_path):
    plain_source(tmp_path / "a")
    extend(tmp_path / "a", tmp_path / "b", TO)
    weights = read(tmp_path / "b")
    name = next(name for name in weights if name.endswith("o_proj.weight"))
    slot = next(slot for slot, share in enumerate(TO.shares) if not share)  # it adds nothing
    weights[name][0, slot * TO.head_dim] = float("nan")
    config = ModelConfig.from_json(tmp_path / "b")
    manifest = (tmp_path / "b" / MANIFEST).read_text()
    write_checkpoint(tmp_path / "n", config, weights.items(), extra_files={MANIFEST: manifest})
    act = lambda: shrink(tmp_path / "n", tmp_path / "c", tolerance=1e9)
    refused(act, f"{name} has drifted from its layout in 1 slots", f"{slot}: nan")


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf"), "0", None, True])
def test_a_tolerance_is_a_finite_number(tmp_path, tolerance):
    refused(lambda: shrink(tmp_path, tmp_path / "c", tolerance=tolerance), "tolerance is")


def test_packed_words_take_no_tolerance(tmp_path):
    checkpoint(tmp_path / "a", tiny())
    extend_packed(tmp_path / "a", tmp_path / "b", layout(tiny(), 4))
    flags = ("--tolerance", 0.1)
    done = run_tool_here("heads.py", "shrink", tmp_path / "b", tmp_path / "c", *flags)
    assert done.code == 2 and "packed words cannot drift" in done.err


def test_a_bias_that_extending_added_to_packed_words_must_still_be_zero(tmp_path):
    checkpoint(tmp_path / "a", tiny())
    extend_packed(tmp_path / "a", tmp_path / "b", layout(tiny(), 4), arch="llama")
    shrink_packed(tmp_path / "b", tmp_path / "c")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.bias"] += 1
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    refused(lambda: shrink_packed(tmp_path / "b", tmp_path / "d"), "o_proj.bias is not zero")


@pytest.mark.parametrize(
    "key, value",
    [("rms_norm_eps", 1e-5), ("rope_theta", 5e5), ("model_type", "llama"), ("vocab_size", 96)],
)
def test_an_unsigned_manifest_must_agree_with_the_config(tmp_path, key, value):
    """Format 1 has no digest of its own."""
    plain_source(tmp_path / "a")
    extend(tmp_path / "a", tmp_path / "b", TO)
    content = resigned(json.loads((tmp_path / "b" / MANIFEST).read_text()))
    if key == "model_type":
        content["arch"] = value
    else:
        content["source_config"][key] = value
    (tmp_path / "b" / MANIFEST).write_text(json.dumps(content))
    refused(lambda: shrink(tmp_path / "b", tmp_path / "c"), key, "not of one checkpoint")
