"""Models and engines with more heads than their checkpoint: the same function, on any ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.checkpoints import refusal
from support.forked import forked
from support.heads import random_model
from support.paths import DATA, EMBEDDED, ROOT
from support.ranks import on_ranks

from minqwen import LLM, ModelConfig, Qwen2, SamplingParams
from minqwen.errors import HeadsError
from minqwen.heads.layout import layout
from minqwen.heads.proposals import working_counts
from minqwen.heads.view import open_weights
from minqwen.parallel import check_degree

IDS = torch.arange(40, 60)[None]
SIZES = (1, 2, 4, 8, 16)
FINGERPRINT = json.loads((DATA / "fingerprints.json").read_text())["float32"]


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    """The embedded model's exact logits, with its own 28 heads."""
    return Qwen2.from_pretrained(EMBEDDED, dtype="float32", arithmetic="exact")(IDS)


def test_28_heads_on_disk_are_32_in_memory_and_the_logits_keep_every_bit(embedded, logits):
    before = sorted(p.name for p in Path(embedded).iterdir())
    model = Qwen2.from_pretrained(
        embedded, num_attention_heads=32, dtype="float32", arithmetic="exact"
    )
    assert (model.config.num_attention_heads, model.config.head_dim) == (32, 16)
    assert torch.equal(model(IDS), logits)
    assert sorted(p.name for p in Path(embedded).iterdir()) == before


@pytest.mark.parametrize("size", SIZES)
def test_exact_logits_keep_every_bit_on_any_number_of_ranks(embedded, logits, size):
    def run(mesh):
        model = Qwen2.from_pretrained(
            embedded, num_attention_heads=32, dtype="float32", arithmetic="exact", mesh=mesh
        )
        return model(IDS)

    for found in on_ranks(size, run):
        assert torch.equal(found, logits)


@pytest.mark.parametrize("size", [2, 4])
def test_the_fingerprint_is_the_same_on_processes_that_talk_to_each_other(size):
    flags = ["fingerprint", "--dtype", "float32", "--num-attention-heads", "32"]
    done = forked(size, ROOT / "tools" / "golden.py", flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == FINGERPRINT


# ---- the engine ---------------------------------------------------------------------------------


def test_an_engine_with_more_heads_writes_the_same_text(embedded, tmp_path):
    greedy = SamplingParams(temperature=0, max_tokens=12)

    def text(**options):
        llm = LLM(embedded, dtype="float32", arithmetic="exact", **options)
        return llm.generate("And God said", greedy, use_tqdm=False)[0].outputs[0].token_ids

    plain = text()
    for options in (
        {"num_attention_heads": 32},
        {"num_attention_heads": 32, "num_key_value_heads": 8, "head_recipe": "zero"},
        {"num_key_value_heads": 28},
        {"num_attention_heads": 28, "num_key_value_heads": 4},
        {"num_attention_heads": 32, "offload": "disk"},
        {"num_attention_heads": 32, "offload": "memory"},
    ):
        assert text(**options) == plain, options


# ---- what is refused ----------------------------------------------------------------------------

REFUSED = [
    ({"num_attention_heads": 30}, ["num_attention_heads 30", "28, 32, 36, 40"]),
    ({"num_attention_heads": 24}, ["24 query heads", "28, 32, 36, 40"]),
    ({"num_key_value_heads": 3}, ["num_key_value_heads 3", "with 4 key/value heads", "28, 32"]),
    ({"num_key_value_heads": 8}, ["num_attention_heads 28", "with 8 key/value heads", "32, 40"]),
    ({"num_attention_heads": 0}, ["num_attention_heads is 0", "at least 1"]),
    ({"num_attention_heads": "32"}, ["num_attention_heads is '32'"]),
    ({"num_attention_heads": True}, ["num_attention_heads is True"]),
    ({"num_key_value_heads": 4.0}, ["num_key_value_heads is 4.0"]),
    ({"num_attention_heads": 32, "head_recipe": "gost"}, ["head_recipe is 'gost'", "'ghost'"]),
    ({"head_recipe": "split"}, ["head_recipe is 'split'", "num_attention_heads too"]),
    ({"num_attention_head": 32}, ["'num_attention_head'", "did you mean 'num_attention_heads'"]),
]


@pytest.mark.parametrize("options, says", REFUSED, ids=str)
@pytest.mark.parametrize("load", [LLM, Qwen2.from_pretrained], ids=["LLM", "from_pretrained"])
def test_numbers_that_cannot_work_are_refused_with_those_that_can(embedded, load, options, says):
    refusal(lambda: load(embedded, **options), *says)


@pytest.mark.parametrize("H, K", [(28, 4), (14, 2), (5, 1), (9, 9), (6, 3)])
def test_the_numbers_that_a_refusal_names_work(H, K):
    config, _ = random_model(H, K)
    for kv_heads in range(K, 3 * K + 2):
        found = working_counts(config, kv_heads)
        for heads in range(1, found[-1] + 1):
            try:
                layout(config, heads, kv_heads)
            except HeadsError:
                assert heads not in found
            else:
                assert heads in found


def test_a_model_that_is_loaded_already_takes_no_number_of_heads(embedded_model):
    for option in ({"num_attention_heads": 32}, {"head_recipe": "split"}):
        refusal(lambda o=option: LLM(embedded_model, **o), next(iter(option)), "loaded already")


def test_a_degree_that_cannot_work_names_the_flag_that_helps(embedded):
    config = ModelConfig.from_json(embedded)
    refusal(lambda: check_degree(config, 8), "--num-attention-heads 32")
    check_degree(open_weights(embedded, 32).config, 8)
    check_degree(open_weights(embedded, 32).config, 16)


def test_adapters_are_refused_by_name(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    refusal(lambda: open_weights(tmp_path / "lora", 6), "LoRA adapter", "extend-adapter")
