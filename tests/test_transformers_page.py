"""docs/transformers.md: its block runs in any directory, and what it says holds."""

from __future__ import annotations

import re

import torch
from support.paths import EMBEDDED, ROOT
from transformers import AutoModelForCausalLM

from minqwen.lab.transformers import GenerationConfig
from minqwen.lab.transformers.causal_lm import FORWARD

PAGE = (ROOT / "docs" / "transformers.md").read_text()


def test_the_block_runs_and_its_numbers_are_transformers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    names = {}
    exec(compile(block, "docs/transformers.md", "exec"), names)
    hf = AutoModelForCausalLM.from_pretrained(
        EMBEDDED, dtype="float32", attn_implementation="eager"
    )
    batch, greedy = names["batch"], names["greedy"]
    assert torch.equal(hf(**batch, labels=names["labels"]).loss, names["out"].loss)
    assert torch.equal(hf.generate(**batch, max_new_tokens=20, do_sample=False), greedy)
    assert names["drawn"].shape == (4, greedy.shape[1]) and len(names["steps"].scores) == 5


def test_the_tables_name_what_is_taken():
    taken = {name for row in PAGE.splitlines() if row.startswith("| ") for name in words(row)}
    assert {*FORWARD, *vars(GenerationConfig())} - {"bos_token_id", "use_cache"} <= taken


def words(row):
    return re.findall(r"`(\w+)", row)
