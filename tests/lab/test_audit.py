"""An engine is judged by its log probabilities: rounding is no alarm, a mistake is named."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support.audited import continued, record_of, records_of, texts, written, yarn_model

from minqwen.errors import MinqwenError
from minqwen.lab.audit.audit import FEWEST, audit
from minqwen.lab.audit.evidence import Original
from minqwen.lab.audit.forced import FusedAttention
from minqwen.lab.audit.records import Record
from minqwen.lab.compare import ROUNDING, ReversedSums
from minqwen.lab.faults import FAULTS, build
from minqwen.model import Native, Qwen2

TEXTS = texts(97)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
# Mistakes of each kind: in the positions, the heads, the scores, a norm, the MLP, the cache, the
# ranks, the weights' bits, and in what is reported. benchmarks/audited.py tries all of them.
NAMED = (
    "rope-interleaved",
    "heads-exchanged",
    "mask-sees-next",
    "norm-subtracts-mean",
    "gelu",
    "chunk-tail-lost",
    "shard-not-added",
    "weights-int8-per-tensor",
    "weights-int4-per-group",
    "logprobs-of-penalty",
    "padded-rows-sampled",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return Original(written(tmp_path_factory.mktemp("audit") / "model", *yarn_model()))


def engine(original, dtype, ops=None):
    return build(original.config, original.weights, DTYPES[dtype], ops or Native())


def mistaken(original, name, dtype):
    """What an engine with a mistake says of the texts."""
    fault = FAULTS[name]
    report = fault.logprobs if fault.report is not None else None
    return records_of(original.wrong(fault, DTYPES[dtype]), TEXTS, report)


def test_a_right_engine_agrees_and_a_wrong_one_is_named(original):
    right = audit(original, records_of(engine(original, "bfloat16"), TEXTS))
    assert right.verdict == "agree" and 0.7 < right.units < 1.3
    assert right.low < right.units < right.high and right.numbers == 300
    assert right.reported == "raw" and right.explained_by is None
    wrong = audit(original, mistaken(original, "rope-theta-10000", "bfloat16"))
    assert wrong.verdict == "diverge" and wrong.low > ROUNDING
    assert wrong.explained_by.name == "rope-theta-10000" and wrong.explained_by.units < ROUNDING
    assert wrong.runner_up.name != "rope-theta-10000" and not wrong.runner_up.explains
    assert "most like rope-theta-10000" in wrong.sentence and wrong.runner_up.name in wrong.sentence


@pytest.mark.parametrize(
    ("dtype", "ops"),
    [
        ("bfloat16", FusedAttention),
        ("bfloat16", ReversedSums),
        ("float32", FusedAttention),
        ("float32", Native),
        ("float16", Native),
    ],
)
def test_faithful_engines_agree_in_every_dtype(original, dtype, ops):
    report = audit(original, records_of(engine(original, dtype, ops()), TEXTS), dtype)
    assert report.verdict == "agree", report.sentence


def test_an_engine_that_is_more_exact_than_it_claims_agrees_and_is_told(original):
    """Its rounding is that of our own float32 model in every bit: no mistake may explain that."""
    report = audit(original, records_of(engine(original, "float32"), TEXTS), "bfloat16")
    assert report.verdict == "agree" and report.units < 0.01
    assert any("more exact than bfloat16" in note for note in report.notes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMED)
def test_mistakes_are_named(original, name, dtype):
    report = audit(original, mistaken(original, name, dtype), dtype)
    assert report.verdict == "diverge" and report.explained_by.name == name, report.sentence


def test_a_mistake_smaller_than_rounding_is_found_if_the_catalogue_is_tried(original):
    records = mistaken(original, "weights-int8-per-group", "bfloat16")
    assert audit(original, records, among="none").units < 2 * ROUNDING
    report = audit(original, records)
    assert report.explained_by.name == "weights-int8-per-group"
    assert 0.8 < report.explained_by.share < 1.2


def test_an_engine_in_fewer_bits_than_it_claims_diverges_and_no_mistake_explains_it(original):
    report = audit(original, records_of(engine(original, "bfloat16"), TEXTS), "float32")
    assert report.verdict == "diverge" and report.explained_by is None
    assert "none of the mistakes" in report.sentence and report.reported == "unknown"
    assert any("bfloat16's rounding" in note for note in report.notes)
    quick = audit(
        original, records_of(engine(original, "bfloat16"), TEXTS), "float32", among="none"
    )
    assert quick.sentence.endswith("; mistakes were not tried") and quick.tried == []


def test_a_mistake_that_the_catalogue_does_not_have_is_explained_by_none(original):
    weights = dict(original.weights)
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].flip(0)
    report = audit(original, records_of(build(original.config, weights, torch.bfloat16), TEXTS))
    assert report.verdict == "diverge" and report.explained_by is None
    assert report.runner_up is not None and not report.runner_up.explains


def reporting(original, report, dtype="bfloat16"):
    return audit(original, records_of(engine(original, dtype), TEXTS, report), dtype)


@pytest.mark.parametrize(("temperature", "dtype"), [(0.7, "bfloat16"), (1.31, "float32")])
def test_a_temperature_is_estimated(original, temperature, dtype):
    report = reporting(original, lambda z, ids: (z / temperature).log_softmax(-1), dtype)
    assert report.explained_by.name == "logprobs-of-temperature"
    assert float(report.reported.split()[-1]) == pytest.approx(temperature, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "top"), [("logprobs-of-top-k", "top_k=20"), ("logprobs-of-top-p", "top_p=0.8")]
)
def test_renormalised_logprobs_are_recognised(original, name, top):
    report = reporting(original, FAULTS[name].logprobs)
    assert report.explained_by.name == name and report.reported == f"renormalised after {top}"
    assert report.impossible > 0  # tokens that were dropped


def rounded(records, digits):
    return [
        dataclasses.replace(
            r, entries=tuple(e._replace(logprob=digits(e.logprob)) for e in r.entries)
        )
        for r in records
    ]


@pytest.mark.parametrize(
    ("digits", "what"),
    [
        (lambda x: round(x, 2), "2 decimals"),
        (lambda x: round(x, 4), "4 decimals"),
        (lambda x: float(f"{x:.3g}"), "3 digits"),
        (lambda x: torch.tensor(x).bfloat16().item(), "bfloat16"),
    ],
)
def test_few_digits_are_no_alarm(original, digits, what):
    records = rounded(records_of(engine(original, "float32", FusedAttention()), TEXTS), digits)
    report = audit(original, records, "float32")
    assert report.verdict == "agree" and report.printed == what, report.sentence


def test_the_worst_token_is_shown_first(original):
    (record, *others) = records_of(engine(original, "bfloat16"), TEXTS)
    entries = list(record.entries)
    entries[41] = entries[41]._replace(logprob=entries[41].logprob - 3)
    wrong = dataclasses.replace(record, entries=tuple(entries))
    worst = audit(original, [wrong, *others], among="none").worst[0]
    assert (worst.record, worst.position) == (0, 42) and worst.error == pytest.approx(-3, abs=0.3)
    assert worst.text == str(TEXTS[0][42])  # there is no tokenizer


def greedy_records(model, count=12):
    starts = [ids[:20] for ids in TEXTS]
    return [Record(tuple(continued(model, ids, count)), 20, (), greedy=True) for ids in starts]


def test_greedy_tokens_alone_show_a_mistake_by_their_margins(original):
    right = audit(original, greedy_records(engine(original, "bfloat16")))
    assert right.verdict == "agree" and right.units is None
    assert all(flip.tie for flip in right.flips)
    wrong = audit(original, greedy_records(original.wrong(FAULTS["heads-tiled"], torch.bfloat16)))
    assert wrong.verdict == "diverge" and any(not flip.tie for flip in wrong.flips)
    assert wrong.explained_by.name == "heads-tiled"


def test_a_flip_at_a_margin_below_rounding_is_a_tie(original):
    records = greedy_records(engine(original, "float32"))
    report = audit(original, records, "bfloat16", among="none")
    assert report.verdict == "agree" and report.tie_margin > 0
    ids = list(records[0].ids)
    ids[-1] = (ids[-1] + 1) % 97
    other = [dataclasses.replace(records[0], ids=tuple(ids)), *records[1:]]
    (flip,) = [f for f in audit(original, other, among="none").flips if not f.tie]
    assert (flip.record, flip.position) == (0, 31) and flip.margin > report.tie_margin


def test_too_few_numbers_are_refused(original):
    record = record_of(engine(original, "bfloat16"), TEXTS[0][:FEWEST])
    report = audit(original, [record])
    assert report.verdict == "refused" and "too few" in report.sentence
    json.dumps(report.as_json())


def test_records_that_the_model_cannot_have_and_unknown_dtypes_are_refused(original):
    record = record_of(engine(original, "bfloat16"), TEXTS[0])
    wrong = dataclasses.replace(record, ids=(97, *record.ids[1:]), where="line 3")
    with pytest.raises(MinqwenError, match="line 3: token id 97, expected 0 to 96"):
        audit(original, [wrong])
    with pytest.raises(MinqwenError, match="claimed dtype is 'int8'"):
        audit(original, [record], "int8")


def test_fused_attention_is_the_same_function_with_another_rounding(original):
    """Fused attention has a faithful error of its own, and no mask of the future."""
    assert isinstance(original.right(torch.float32, Native()), Qwen2)
    ids = torch.tensor([TEXTS[0]])
    wide = [original.right(torch.float64, ops())(ids) for ops in (Native, FusedAttention)]
    torch.testing.assert_close(*wide, rtol=0, atol=1e-11)
    narrow = [original.right(torch.float32, ops())(ids) for ops in (Native, FusedAttention)]
    assert not torch.equal(*narrow)
