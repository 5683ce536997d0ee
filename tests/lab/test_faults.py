"""The catalogue of mistakes: each is told in plain words, and is seen first where it says."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
import torch
from support.heads import build, random_model
from support.paged import run_paged

from minqwen.config import RopeScaling
from minqwen.errors import ConfigError, MinqwenError
from minqwen.lab.compare import ROUNDING, Compared, faithful, first_difference, rms
from minqwen.lab.faults import FAULTS, HEAD_FAULTS, find, hypotheses
from minqwen.lab.faults.attention import Attending, Held, WholeTexts
from minqwen.lab.faults.fault import Mistaken
from minqwen.model import Native
from minqwen.model.trace import point_names

IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
ENGINE_FAULTS = [name for name in FAULTS if name not in HEAD_FAULTS]
IN_MODEL = [name for name in ENGINE_FAULTS if FAULTS[name].in_model]
SILENT = {"positions-from-one", "norm-weight-cast-late"}
# These change the logits by less than bfloat16 does anyway: an engine in bfloat16 hides them.
FAINT = {
    "rope-frequencies-bfloat16",
    "yarn-attention-factor-half",
    "softmax-bfloat16",
    "scores-float16",
    "norm-eps-1e-5",
    "norm-eps-outside-root",
    "norm-reduced-bfloat16",
    "kv-cache-int8",
    "weights-int8-per-group",
    "weights-int8-per-tensor",
    "weights-float16-flushed",
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def right_model(tied=False):
    """14 query and 2 KV heads of 8 in a width of 40, with YaRN: its config and tensors."""
    config, weights = random_model(14, 2)
    config = config.replace(rope_scaling=RopeScaling(4.0, 16), tie_word_embeddings=tied)
    raw = {**config.raw, "sliding_window": 8, "use_sliding_window": False}
    if tied:
        del weights["lm_head.weight"]
    return dataclasses.replace(config, raw=raw), weights


def traced(model):
    """Every point in the order of computation, in float64, with the logits last."""
    _, seen = model.run_with_cache(IDS)
    return {name: seen[name].double() for name in point_names(2)}


class Original:
    """The right model's traces: in float64, added in another order, and in narrower dtypes."""

    def __init__(self, tied=False):
        self.config, self.weights = right_model(tied)
        model = build(self.config, self.weights, dtype=torch.float64)
        self.truth, self.second = traced(model), traced(faithful(model))
        self.units = {
            dtype: rms(self.native(dtype)["logits"] - self.truth["logits"])
            for dtype in (torch.float32, torch.bfloat16)
        }

    def native(self, dtype):
        return traced(build(self.config, self.weights, dtype=dtype))

    def wrong(self, name, dtype=torch.float64):
        return traced(FAULTS[name].model(self.config, self.weights, dtype=dtype))

    def error(self, wrong, dtype):
        """Of the logits, in units of a faithful implementation's error in `dtype`."""
        return rms(wrong["logits"] - self.truth["logits"]) / self.units[dtype]

    def first(self, wrong):
        points = ((name, self.compared(name, wrong[name])) for name in self.truth)
        return first_difference(points)

    def compared(self, name, x):
        truth, second = self.truth[name], self.second[name]
        if x.shape != truth.shape:  # as if the candidate were wrong by infinity
            x = torch.full_like(truth, torch.inf)
        return Compared(original=truth, candidate=x, faithful=second, truth=truth)


@pytest.fixture(scope="module")
def original():
    return Original()


@pytest.fixture(scope="module")
def tied():
    return Original(tied=True)


@pytest.fixture
def original_for(original, tied):
    """The one of the two models that can have a mistake."""
    return lambda name: original if FAULTS[name].applies(original.config) else tied


def test_a_fault_is_a_model_that_makes_one_mistake(original):
    fault = find("rope-interleaved")
    wrong = fault.model(original.config, original.weights, dtype=torch.float64)(IDS)
    right = original.truth["logits"]
    torch.testing.assert_close(wrong[:, 0], right[:, 0])  # position 0 is not turned
    assert ((wrong - right).abs().amax(-1) > 0.1)[:, 1:].all()


def test_the_catalogue_is_large_and_every_entry_is_in_plain_words():
    assert len(ENGINE_FAULTS) >= 45 and len(IN_MODEL) >= 40
    for name, fault in FAULTS.items():
        assert fault.name == name and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
        assert fault.kind in ("config", "weights", "operation", "cache", "logits", "tokens")
        assert fault.symptom.endswith(".") and 8 <= len(fault.symptom.split()) <= 40, name
        assert fault.source and not fault.source.endswith("."), name
        ways = [fault.change, fault.ops, fault.rebuild, fault.report, fault.encode]
        assert sum(way is not None for way in ways) == 1, name
        assert fault.first in ("", *point_names(1)), name
    assert len({fault.symptom for fault in FAULTS.values()}) == len(FAULTS)
    assert {name for name, fault in FAULTS.items() if fault.silent} == SILENT
    assert {name for name, fault in FAULTS.items() if not fault.first} == {
        "article",  # no model can be built of it
        *(name for name, fault in FAULTS.items() if fault.kind == "logits"),
    }


@pytest.mark.parametrize("name", [name for name in IN_MODEL if name not in SILENT])
def test_a_mistake_is_seen_first_where_the_catalogue_says_and_reaches_the_logits(
    original_for, name
):
    original = original_for(name)
    wrong = original.wrong(name)
    assert original.first(wrong) == FAULTS[name].first
    assert original.error(wrong, torch.float32) > ROUNDING
    if name not in FAINT:
        assert original.error(wrong, torch.bfloat16) > ROUNDING


def test_positions_from_one_change_queries_and_keys_but_no_logits(original):
    wrong = original.wrong("positions-from-one")
    assert original.first(wrong) == FAULTS["positions-from-one"].first
    assert original.error(wrong, torch.float32) < 1e-6


def test_a_late_cast_changes_last_bits_in_16_bits_only(original):
    name, first = "norm-weight-cast-late", FAULTS["norm-weight-cast-late"].first
    assert all(torch.equal(x, original.truth[n]) for n, x in original.wrong(name).items())
    wrong, right = original.wrong(name, torch.bfloat16), original.native(torch.bfloat16)
    normalized = wrong[f"{first}.normalized"].bfloat16().double()
    assert torch.equal(normalized, right[f"{first}.normalized"])
    assert not torch.equal(wrong[first], right[first])
    assert original.error(wrong, torch.bfloat16) < ROUNDING


def test_no_mistake_is_like_another(original):
    """Their logits are further apart than a faithful float32 implementation is from the truth."""
    names = [name for name in IN_MODEL if FAULTS[name].applies(original.config)]
    logits = {name: original.wrong(name)["logits"] for name in names if name not in SILENT}
    limit = ROUNDING * original.units[torch.float32]
    alike = [
        (a, b) for a, b in itertools.combinations(logits, 2) if rms(logits[a] - logits[b]) < limit
    ]
    assert len(logits) > 50 and not alike


def test_a_faithful_model_is_not_flagged(original):
    """Nor is one that adds in another order and in another dtype."""
    assert original.first(original.truth) is None
    assert original.first(original.second) is None
    native = original.native(torch.float32)
    reversed_sums = faithful(build(original.config, original.weights, dtype=torch.float64))
    other = traced(build(original.config, original.weights, arithmetic=reversed_sums.ops))
    assert rms(other["logits"] - native["logits"]) > 0
    assert original.error(other, torch.float32) < ROUNDING


@pytest.mark.parametrize("kind", [Mistaken, WholeTexts, Attending, Held])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_mistakes_are_built_on_is_native_bit_for_bit(original, kind, dtype, monkeypatch):
    monkeypatch.setattr(Held, "hold", lambda self, x: x)
    ops = kind(original.config)
    model = build(original.config, original.weights, dtype=dtype, arithmetic=ops)
    right = original.native(dtype)
    assert all(torch.equal(x, right[name]) for name, x in traced(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_mistake_can_be_made_in_every_dtype(original_for, dtype):
    for name in IN_MODEL:
        original = original_for(name)
        before = {n: w.clone() for n, w in original.weights.items()}
        model = FAULTS[name].model(original.config, original.weights, dtype=dtype)
        logits = model(IDS)
        assert logits.dtype == dtype and logits.isfinite().all(), name
        assert name in model.ops.name
        assert all(torch.equal(w, before[n]) for n, w in original.weights.items()), name


def test_a_mistake_that_a_model_cannot_have_is_refused_and_no_hypothesis(original):
    plain, weights = random_model(4, 4)
    for name in ("yarn-off", "sliding-window", "heads-tiled", "head-never-loaded"):
        with pytest.raises(ConfigError, match=f"'{name}' needs a model with"):
            FAULTS[name].model(plain, weights)
        assert name not in [fault.name for fault in hypotheses(plain)]
    tried = [fault.name for fault in hypotheses(original.config)]
    assert set(IN_MODEL) - set(tried) == {"head-never-loaded"}
    assert set(HEAD_FAULTS) - set(tried) == {"article"}


def test_an_unknown_mistake_is_refused_with_the_nearest():
    with pytest.raises(MinqwenError, match=r"'rope-interleavd'.*did you mean 'rope-interleaved'"):
        find("rope-interleavd")


def test_with_a_cache_a_mistake_is_made_too_or_refused(original):
    """Never left out in silence."""
    texts = list(IDS)
    for name in ("rope-interleaved", "gelu", "kv-cache-int8", "v-bias-missing"):
        model = FAULTS[name].model(original.config, original.weights, dtype=torch.float64)
        for paged, dense in zip(run_paged(model, texts), model(IDS)):
            torch.testing.assert_close(paged, dense)
    for name in ("mask-missing", "stale-block", "heads-tiled"):
        model = FAULTS[name].model(original.config, original.weights)
        with pytest.raises(MinqwenError, match="on whole texts"):
            run_paged(model, texts)


def test_every_override_of_dense_attention_refuses_a_cache():
    for fault in FAULTS.values():
        if isinstance(fault.ops, type) and issubclass(fault.ops, Native):
            changed = {"attend", "attend_dense"} & set(dir_of(fault.ops))
            assert not changed or issubclass(fault.ops, WholeTexts), fault.name


def dir_of(kind):
    """The names that a class and its bases below Native define."""
    return [name for base in kind.__mro__ if base not in Native.__mro__ for name in vars(base)]


def test_a_foreign_block_needs_a_second_text(original):
    model = FAULTS["foreign-block"].model(original.config, original.weights, dtype=torch.float64)
    right = build(original.config, original.weights, dtype=torch.float64)
    assert torch.equal(model(IDS[:1]), right(IDS[:1]))
    assert torch.equal(model(IDS)[:, :16], right(IDS)[:, :16])  # the first block is its own
