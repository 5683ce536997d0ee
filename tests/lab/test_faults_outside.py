"""Mistakes outside the model: in what is reported of the logits, and in the prompt's tokens."""

from __future__ import annotations

import math

import pytest
import torch

from minqwen.lab.faults import FAULTS

IDS = torch.randint(0, 97, (30,), generator=torch.Generator().manual_seed(0))
LOGITS = torch.randn(30, 97, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
RIGHT = LOGITS.log_softmax(-1)
REPORTS = [name for name, fault in FAULTS.items() if fault.kind == "logits"]
ENCODINGS = [name for name, fault in FAULTS.items() if fault.kind == "tokens"]
CHAT = [{"role": "user", "content": "What is 3 + 4?"}]


def reported(name):
    return FAULTS[name].logprobs(LOGITS, IDS)


def test_other_faults_report_log_probabilities():
    assert torch.equal(reported("gelu"), RIGHT)


def test_a_temperature_makes_likely_tokens_likelier():
    best = RIGHT.argmax(-1, keepdim=True)
    wrong = reported("logprobs-of-temperature")
    assert (wrong.gather(1, best) > RIGHT.gather(1, best)).all()
    torch.testing.assert_close((wrong * 0.7).log_softmax(-1), RIGHT)


@pytest.mark.parametrize("name", ["logprobs-of-top-k", "logprobs-of-top-p"])
def test_what_the_sampler_keeps_adds_up_to_one(name):
    wrong = reported(name)
    kept = wrong.isfinite()
    torch.testing.assert_close(wrong.exp().sum(-1), torch.ones(30, dtype=torch.float64))
    shift = (wrong - RIGHT).masked_fill(~kept, 0).amax(-1)  # of the row's kept tokens, all alike
    torch.testing.assert_close((RIGHT + shift[:, None])[kept], wrong[kept])
    if name == "logprobs-of-top-k":
        assert (kept.sum(-1) == 20).all()
    else:
        assert (shift > 0).all() and (shift <= -math.log(0.8) + 1e-12).all()


def test_a_penalty_makes_what_was_there_unlikelier():
    wrong = reported("logprobs-of-penalty")
    for t, row in enumerate(wrong):
        seen = torch.zeros(97, dtype=torch.bool)
        seen[IDS[: t + 1]] = True
        change = row - RIGHT[t]
        torch.testing.assert_close(change[~seen], change[~seen].max().expand(int((~seen).sum())))
        assert change[seen].max() < change[~seen].min()


def test_padded_rows_take_probability_from_all_tokens_alike():
    wrong = reported("padded-rows-sampled")
    extra = 31 / (LOGITS.exp().sum(-1) + 31)  # 97 rows are filled up to 128
    torch.testing.assert_close(wrong.exp().sum(-1), 1 - extra)


def test_no_report_is_right_and_no_two_are_alike():
    found = [RIGHT, *(reported(name) for name in REPORTS)]
    for i, a in enumerate(found):
        assert not any(torch.allclose(a, b) for b in found[:i])


def test_the_model_itself_is_right_where_the_logits_or_the_tokens_are_wrong():
    assert len(REPORTS) >= 5 and len(ENCODINGS) >= 4
    for name in [*REPORTS, *ENCODINGS]:
        fault = FAULTS[name]
        assert not fault.in_model and fault.change is fault.ops is fault.rebuild is None


def test_wrong_tokens_of_a_chat(embedded_tokenizer):
    tokenizer = embedded_tokenizer
    right = FAULTS["gelu"].ids(tokenizer, CHAT)
    assert right == tokenizer.encode_chat(CHAT)
    wrong = {name: FAULTS[name].ids(tokenizer, CHAT) for name in ENCODINGS}
    assert right not in wrong.values() and len({tuple(ids) for ids in wrong.values()}) == len(wrong)
    assert wrong["bos-twice"] == [right[0], *right]
    missing = wrong["generation-prompt-missing"]
    assert missing == right[: len(missing)] and len(missing) < len(right)
    as_text = wrong["markers-as-text"]
    assert not tokenizer.special_ids.intersection(as_text)
    assert tokenizer.decode(as_text) == tokenizer.decode(right)
    other = tokenizer.decode(wrong["system-prompt-of-qwen2"])
    assert other.count("You are a helpful assistant.") == 1


def test_a_system_message_that_is_there_is_replaced(embedded_tokenizer):
    chat = [{"role": "system", "content": "Answer in verse."}, *CHAT]
    ids = FAULTS["system-prompt-of-qwen2"].ids(embedded_tokenizer, chat)
    text = embedded_tokenizer.decode(ids)
    assert "verse" not in text and "helpful" in text and "3 + 4" in text
