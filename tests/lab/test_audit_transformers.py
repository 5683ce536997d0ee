"""The audit of a second implementation, transformers: right, and with mistakes planted in it.

benchmarks/audited.py tries all of them, on the embedded model too.
"""

from __future__ import annotations

import pytest
import torch
from support.audited import records_of, texts, written, yarn_model
from support.broken_transformers import PLANTED, broken
from transformers import Qwen2ForCausalLM

from minqwen.lab.audit.audit import audit
from minqwen.lab.audit.evidence import Original

TEXTS = texts(97, count=2, length=151)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NAMED = (
    "rope-table-interleaved",
    "query-one-ahead",
    "yarn-no-attention-factor",
    "heads-tiled",
    "padding-attended",
    "residual-after-norm",
    "stale-block",
    "weights-int8-per-group",
    "weights-int8-per-tensor",
    "weights-int4-per-group",
    "weights-int4-per-tensor",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return Original(written(tmp_path_factory.mktemp("second") / "model", *yarn_model()))


def theirs(original, dtype, attention):
    return Qwen2ForCausalLM.from_pretrained(
        original.path, dtype=dtype, attn_implementation=attention
    ).eval()


def said(model, many=TEXTS):
    return records_of(lambda ids: model(ids).logits, many)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_agrees(original, dtype, attention):
    report = audit(original, said(theirs(original, DTYPES[dtype], attention)), dtype)
    assert report.verdict == "agree" and report.units < 1.3, report.sentence


@pytest.fixture(scope="module")
def model(original):
    return theirs(original, torch.float32, "eager")


@pytest.mark.parametrize("planted", [p for p in PLANTED if p.name in NAMED], ids=lambda p: p.name)
def test_mistakes_planted_in_transformers_are_named(original, model, planted):
    with broken(planted, model, torch.bfloat16) as wrong:
        records = said(wrong)
    report = audit(original, records)
    assert report.verdict == "diverge" and report.explained_by.name == planted.name, report.sentence
