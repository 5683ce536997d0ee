"""Extending and shrinking destroy nothing, follow no link out, and believe no manifest."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
import torch
from support.heads import random_model
from support.quantised import checkpoint, read, tiny
from support.tool import run_tool_here

from minqwen import Checkpoint, ModelConfig
from minqwen.checkpoint import write_checkpoint
from minqwen.errors import HeadsError, MinqwenError
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
def test_500_odd_manifests_give_the_source_or_one_line(tmp_path, monkeypatch, packed, signed):
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
    for _ in range(500):
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
    assert refusals > 250


def resigned(content: dict) -> dict:
    """Format 1, which has no digest of its own."""
    if "format" in content:
        content["format"] = 1
    content.pop("sha256", None)
    return content
