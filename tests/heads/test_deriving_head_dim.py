"""An extended directory whose config.json lost its head_dim: nobody may load it silently.

docs/head-extension.md, "What other engines do with an extended directory".
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.heads import random_model
from transformers import AutoModelForCausalLM

from minqwen import MinqwenError, Qwen2
from minqwen.checkpoint import write_checkpoint
from minqwen.heads.convert import extend
from minqwen.heads.layout import layout

IDS = torch.arange(3, 11)[None]


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> tuple[Path, Path]:
    """A model of 8/4 heads with 20 of them, and the same without head_dim in config.json.

    40 / 20 = 2 could be a head_dim, as 3,584 / 32 = 112 could be one for the 7B; but it is 8.
    """
    folder = tmp_path_factory.mktemp("derived")
    config, weights = random_model(8, 4)
    write_checkpoint(folder / "source", config, weights.items())
    extend(folder / "source", folder / "wide", layout(config, 20))
    shutil.copytree(folder / "wide", folder / "lost")
    path = folder / "lost" / "config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("head_dim") == 8 and config.hidden_size // 20 == 2
    path.write_text(json.dumps(fields))
    return folder / "wide", folder / "lost"


def test_transformers_takes_head_dim_from_the_config(directories):
    wide, _ = directories
    theirs, info = AutoModelForCausalLM.from_pretrained(
        wide, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        ours = Qwen2.from_pretrained(wide, dtype="float32")(IDS)
        torch.testing.assert_close(theirs(IDS).logits, ours)
    assert theirs.config.head_dim == json.loads((wide / "config.json").read_text())["head_dim"]


def test_without_it_transformers_derives_another_and_refuses_the_shapes(directories):
    _, lost = directories
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(lost, dtype=torch.float32)


def test_without_it_minqwen_refuses_too(directories):
    _, lost = directories
    with pytest.raises(MinqwenError) as refused:
        Qwen2.from_pretrained(lost, dtype="float32")
    (line,) = str(refused.value).splitlines()
    assert "(160, 40)" in line and "(40, 40)" in line
