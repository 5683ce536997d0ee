"""docs/finetune.md: its blocks run in order; the loss falls, and what is saved loads strictly."""

from __future__ import annotations

import re

import pytest
import torch
from support.paths import ROOT

PAGE = (ROOT / "docs" / "finetune.md").read_text()


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the page's blocks have defined at their end."""
    out, found = tmp_path_factory.mktemp("finetune") / "model", {}
    with torch.enable_grad():
        for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
            block = block.replace("/tmp/minqwen-finetuned", str(out))
            exec(compile(block, "docs/finetune.md", "exec"), found)
    return found


def test_the_loss_falls(names):
    assert names["losses"][-1] < 0.7 * names["losses"][0]


def test_what_is_saved_loads_strictly_in_transformers_with_the_same_bits(names):
    assert not any(names["info"].values())
    with torch.no_grad():
        trained = names["model"](names["ids"])
        assert torch.equal(names["theirs"](names["ids"]).logits, trained)
        before = names["Qwen2"].from_pretrained(names["EMBEDDED"], dtype="float32")(names["ids"])
    assert not torch.equal(before, trained)
