"""The manifest beside an extended checkpoint: read back, and refused in one line when damaged."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.heads import random_model

from minqwen.errors import HeadsError, MinqwenError
from minqwen.heads.layout import layout
from minqwen.heads.manifest import MANIFEST, Manifest, read_manifest, require_manifest

CONFIG, WEIGHTS = random_model(6, 3)
WHOLE = Manifest(layout(CONFIG, 9), "qwen2", CONFIG.to_dict(), {name: "00" for name in WEIGHTS})


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    assert read_manifest(tmp_path) is None
    (tmp_path / MANIFEST).write_text(WHOLE.to_json())
    assert read_manifest(tmp_path) == WHOLE
    assert WHOLE.config(tmp_path) == CONFIG


def test_a_checkpoint_without_one_is_nobodys_extension(tmp_path):
    with pytest.raises(HeadsError, match=f"has no {MANIFEST}"):
        require_manifest(tmp_path)


def refused(directory, content: bytes) -> str:
    (directory / MANIFEST).write_bytes(content)
    with pytest.raises(MinqwenError) as error:
        require_manifest(directory)
    assert "\n" not in str(error.value) and MANIFEST in str(error.value)
    return str(error.value)


def test_a_manifest_cut_short_anywhere_is_refused(tmp_path):
    text = WHOLE.to_json().encode()
    for end in range(0, len(text) - 2, 97):
        refused(tmp_path, text[:end])


@pytest.mark.parametrize("key", ["layout", "arch", "source_config", "source_sha256"])
@pytest.mark.parametrize("value", [None, 3, "x", [], [1], {"a": 1}])
def test_a_part_of_the_wrong_kind_is_refused(tmp_path, key, value):
    content = json.loads(WHOLE.to_json()) | {key: value}
    if key == "source_config" and isinstance(value, dict):  # any object, until it is asked for
        (tmp_path / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(MinqwenError, match=MANIFEST):
            require_manifest(tmp_path).config(tmp_path)
    else:
        refused(tmp_path, json.dumps(content).encode())


def test_a_layout_that_breaks_a_rule_is_refused(tmp_path):
    content = json.loads(WHOLE.to_json())
    content["layout"]["shares"][2] = 1.0
    assert "add up to 2" in refused(tmp_path, json.dumps(content).encode())


def test_a_manifest_of_another_checkpoint_is_refused(tmp_path):
    other = CONFIG.replace(num_attention_heads=12, num_key_value_heads=3, head_dim=8)
    with pytest.raises(HeadsError, match="num_attention_heads is 12 .* expected 9"):
        WHOLE.check_fits(other, tmp_path)
    huge = Manifest(WHOLE.layout, "qwen2", CONFIG.to_dict() | {"num_hidden_layers": 1000}, {})
    with pytest.raises(HeadsError, match="num_hidden_layers is 2 .* expected 1000"):
        huge.check_fits(CONFIG.replace(num_attention_heads=9), tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_changed_byte_is_read_or_refused_in_one_line(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("manifest")
    text = bytearray(WHOLE.to_json().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    (directory / MANIFEST).write_bytes(bytes(text))
    try:
        manifest = require_manifest(directory)
        manifest.check_fits(CONFIG.replace(num_attention_heads=9), directory)
    except MinqwenError as error:
        assert "\n" not in str(error)
