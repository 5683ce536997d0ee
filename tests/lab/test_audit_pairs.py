"""A trainer and a rollout engine: which of them is wrong, and is their difference rounding?"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support.audited import records_of, texts, written, yarn_model

from minqwen.errors import MinqwenError
from minqwen.lab.audit.evidence import Original
from minqwen.lab.audit.forced import FusedAttention
from minqwen.lab.audit.pairs import audit_pair
from minqwen.lab.faults import FAULTS
from minqwen.model import Native

TEXTS = texts(97)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return Original(written(tmp_path_factory.mktemp("pairs") / "model", *yarn_model()))


def said(original, ops=Native, dtype=torch.bfloat16):
    return records_of(original.right(dtype, ops()), TEXTS)


def test_two_faithful_engines_differ_by_rounding(original):
    pair = audit_pair(original, said(original), said(original, FusedAttention))
    assert pair.verdict == "agree" and 0.5 < pair.apart.units < 1.5, pair.sentence
    assert "the difference is rounding" in pair.sentence
    assert pair.ratio_mean == pytest.approx(1, abs=0.01)
    json.dumps(pair.as_json())


@pytest.mark.parametrize("swapped", [False, True])
def test_the_side_with_a_mistake_is_the_further_one(original, swapped):
    wrong = records_of(original.wrong(FAULTS["k-bias-missing"], torch.bfloat16), TEXTS)
    sides = [said(original, FusedAttention), wrong]
    pair = audit_pair(original, *(sides[::-1] if swapped else sides))
    assert pair.verdict == "diverge" and pair.apart.low > 1.5
    assert pair.nearer == ("rollout" if swapped else "trainer")
    assert "k-bias-missing" in pair.sentence


def test_a_more_exact_side_is_nearer_and_that_is_no_mistake(original):
    pair = audit_pair(original, said(original, dtype=torch.float32), said(original))
    assert pair.verdict == "agree" and pair.nearer == "trainer" and pair.sure > 0.99


def test_two_sides_with_one_mistake_diverge_although_they_agree_with_each_other(original):
    wrong = records_of(original.wrong(FAULTS["gelu"], torch.bfloat16), TEXTS)
    pair = audit_pair(original, wrong, wrong)
    assert pair.verdict == "diverge" and pair.apart.units == 0 and pair.nearer == "neither"


def test_other_tokens_and_other_counts_are_refused(original):
    records = said(original)
    other = [dataclasses.replace(records[0], ids=(1, *records[0].ids[1:])), *records[1:]]
    with pytest.raises(MinqwenError, match="other tokens, expected the same ones"):
        audit_pair(original, records, other)
    with pytest.raises(MinqwenError, match="the trainer has 3 records and the rollout 2"):
        audit_pair(original, records, records[:2])


def test_only_what_both_sides_said_is_compared(original):
    records = said(original)
    half = [dataclasses.replace(r, entries=r.entries[::2]) for r in records]
    assert audit_pair(original, records, half, among="none").trainer.numbers == 150
