"""The engine's tokens and logprobs against transformers, one full forward pass, and float64."""

from __future__ import annotations

import pytest
import torch
from support.engine import GREEDY, all_logprobs, ragged

from minqwen import LLM, SamplingParams
from minqwen.lab.compare import ROUNDING, rms

END_OF_TEXT, STOP_TOKEN = 2018, 2016


def tokens_of_transformers(model, prompts: list[list[int]], penalty: float) -> list[list[int]]:
    """12 tokens after each of the prompts, which are of one length, or fewer with the end token."""
    ids = torch.tensor(prompts)
    rows = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=penalty,
        eos_token_id=[END_OF_TEXT, STOP_TOKEN],
        pad_token_id=0,
    )
    found = []
    for row in rows[:, ids.shape[1] :].tolist():
        ends = (at for at, token in enumerate(row) if token in (END_OF_TEXT, STOP_TOKEN))
        found.append(row[: next(ends, len(row)) + 1])
    return found


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_200_ragged_prompts_have_the_tokens_of_transformers_generate(
    embedded, embedded_model, embedded_tokenizer, penalty
):
    """transformers gets 8 prompts of one length at a time: padding would have other numerics."""
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(embedded, dtype=torch.float32, attn_implementation="eager")
    prompts = ragged(embedded_tokenizer, lengths=range(1, 74, 3), each=8)
    llm = LLM(
        embedded_model,
        tokenizer=embedded_tokenizer,
        num_blocks=150,
        block_size=8,
        max_model_len=128,
        seed=0,
    )
    params = SamplingParams(
        temperature=0, repetition_penalty=penalty, max_tokens=12, stop_token_ids=[STOP_TOKEN]
    )
    ours = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    want = []
    for i in range(0, len(prompts), 8):
        want += tokens_of_transformers(theirs, prompts[i : i + 8], penalty)
    assert len(want) == 200 and sum(map(len, want)) > 2000
    assert [i for i in range(200) if ours[i] != want[i]] == []


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("arithmetic", ["native", "exact"])
def test_decode_logprobs_are_those_of_one_full_forward(
    make, embedded_model, exact_model, double_model, embedded_tokenizer, arithmetic, forced
):
    """The naive teacher: every token's logprobs over the whole vocabulary."""
    model = exact_model if arithmetic == "exact" else embedded_model
    prompts = ragged(embedded_tokenizer, lengths=[1, 2, 7, 8, 9, 31, 60], each=2)
    llm = make(
        model,
        None,
        block_size=4,
        num_blocks=30,
        max_model_len=80,
        max_num_batched_tokens=24,
        max_num_seqs=8,
    )
    how = {"forced_ids": list(range(50, 62))} if forced else {"max_tokens": 12, **GREEDY}
    for out in llm.generate(prompts, SamplingParams(logprobs=-1, **how), use_tqdm=False):
        tokens, start = out.outputs[0].token_ids, len(out.prompt_token_ids) - 1
        ids = torch.tensor([out.prompt_token_ids + tokens[:-1]])
        with torch.no_grad():
            truth = model.ops.log_softmax(model(ids)[0, start:])
            # Native float32 is measured by float64: one full forward in float32 has errors of its
            # own, as large and in other places. They are the unit.
            double = double_model(ids)[0, start:].log_softmax(-1)
        got = torch.tensor(all_logprobs(out.outputs[0]), dtype=truth.dtype)
        assert len(tokens) == 12 and (forced or truth.argmax(-1).tolist() == tokens)
        if arithmetic == "exact":
            assert torch.equal(got, truth)
        else:
            assert rms(got.double() - double) <= ROUNDING * rms(truth.double() - double)
    assert llm.core.scheduler.num_preemptions > 0
