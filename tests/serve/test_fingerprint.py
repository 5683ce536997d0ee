"""The name of weights and arithmetic that every answer has."""

from __future__ import annotations

import json

import pytest
from support.configs import B7

from minqwen.config import ModelConfig
from minqwen.serve.fingerprint import system_fingerprint


def fingerprint(directory, arithmetic="exact", weights="digest", **changes):
    """Of a config.json that lies in this directory."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**B7, **changes}))
    config = ModelConfig.from_json(directory / "config.json")
    return system_fingerprint(weights, config, arithmetic, "torch.float32")


def test_it_does_not_depend_on_where_the_model_lies_nor_on_who_wrote_it(tmp_path):
    here = fingerprint(tmp_path / "here")
    assert fingerprint(tmp_path / "there", transformers_version="5.0") == here
    assert here.startswith("fp_") and len(here) == 35


@pytest.mark.parametrize(
    "change", [{"rope_theta": 9.0}, {"arithmetic": "native"}, {"weights": "others"}]
)
def test_it_depends_on_what_is_computed(tmp_path, change):
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "two", **change)
