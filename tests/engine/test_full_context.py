"""A sequence as long as the context is scored whole: nothing comes after it."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import refusal, tiny, write
from support.engine import GREEDY, idle
from transformers import AutoModelForCausalLM

from minqwen import LLM, Qwen2, SamplingParams

CONTEXT = 32
FULL = [(7 * i * i + 3 * i) % 61 for i in range(CONTEXT)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("full") / "c"
    write(path, tiny(dtype="float32", max_position_embeddings=CONTEXT))
    return path


def small(directory, **options) -> LLM:
    """An engine whose cache has room for one context only."""
    sizes = {"block_size": 4, "num_blocks": CONTEXT // 4, "max_num_batched_tokens": 64}
    return LLM(Qwen2.from_pretrained(directory), **{**sizes, **options})


def test_every_token_after_the_first_has_its_score(directory):
    llm = small(directory)
    (scores,) = llm.score([FULL], use_tqdm=False)
    ids = torch.tensor([FULL])
    theirs = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        for logits in (llm.model(ids), theirs(ids).logits):
            table = logits[0, :-1].log_softmax(-1)
            expected = table.gather(1, ids[0, 1:, None])[:, 0]
            assert len(scores) == CONTEXT - 1
            assert torch.tensor(scores).sub(expected).abs().max() < 1e-5
    assert idle(llm)


@pytest.mark.parametrize("options", [{"max_num_batched_tokens": 5, "max_num_seqs": 5}, {}])
def test_neither_chunks_nor_others_nor_samples_change_that(directory, options):
    llm, alone = small(directory, **options), small(directory)
    prompts = [FULL, FULL[:7], FULL[::-1]]
    expected = [alone.score([prompt], use_tqdm=False)[0] for prompt in prompts]
    for found, wanted in zip(llm.score(prompts, use_tqdm=False), expected):
        assert found == pytest.approx(wanted, abs=1e-5)
    params = SamplingParams(n=3, max_tokens=1, prompt_logprobs=0, seed=1)
    output = llm.generate([FULL], params, use_tqdm=False)[0]
    assert [one.finish_reason for one in output.outputs] == ["length"] * 3
    assert [len(one.token_ids) for one in output.outputs] == [1, 1, 1] and idle(llm)


def test_the_token_after_a_full_context_can_be_scored_too(directory):
    """Hugging Face's model gives logits at the last place of its context, so this one does."""
    llm = small(directory)
    params = SamplingParams(forced_ids=[9], logprobs=0, prompt_logprobs=0)
    output = llm.generate([FULL], params, use_tqdm=False)[0].outputs[0]
    with torch.no_grad():
        expected = llm.model(torch.tensor([FULL]))[0, -1].log_softmax(-1)[9]
    assert output.token_ids == [9]
    assert output.cumulative_logprob == pytest.approx(float(expected), abs=1e-5)


def test_what_needs_more_room_is_refused(directory):
    llm = small(directory)
    for prompt, fields in (
        (FULL, {"max_tokens": 1}),
        (FULL, {"max_tokens": 2, "prompt_logprobs": 0}),
        (FULL, {"forced_ids": [1, 2]}),
        ([*FULL, 1], {"max_tokens": 1, "prompt_logprobs": 0}),
    ):
        params = SamplingParams(**{**GREEDY, **fields})
        refusal(lambda p=prompt, s=params: llm.generate([p], s), f"room for {CONTEXT}")
    assert idle(llm)
