"""generation_config.json's max_length: the most tokens of prompt and output together."""

from __future__ import annotations

import json

import pytest
import torch
from support.checkpoints import refusal, tiny, write
from transformers import AutoModelForCausalLM

from minqwen import LLM, SamplingParams

PROMPT = [3, 1, 4, 1, 5]


def llm_with(tmp_path, embedded_tokenizer, **generation):
    write(tmp_path / "c", tiny(dtype="float32", max_position_embeddings=64))
    (tmp_path / "c" / "generation_config.json").write_text(json.dumps(generation))
    return LLM(tmp_path / "c", tokenizer=embedded_tokenizer)


def ids_of(llm, params=None, prompt=PROMPT):
    return llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids


@pytest.mark.parametrize("new", [None, 9])
def test_without_parameters_the_output_is_transformers(tmp_path, embedded_tokenizer, new):
    llm = llm_with(tmp_path, embedded_tokenizer, max_length=12, max_new_tokens=new)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "c", attn_implementation="eager")
    whole = theirs.generate(torch.tensor([PROMPT]))[0].tolist()
    assert len(whole) == (12 if new is None else len(PROMPT) + new)
    output = llm.generate([PROMPT], use_tqdm=False)[0].outputs[0]
    assert output.token_ids == whole[len(PROMPT) :] and output.finish_reason == "length"


def test_it_holds_only_where_nothing_else_says_how_many(tmp_path, embedded_tokenizer):
    llm = llm_with(tmp_path, embedded_tokenizer, max_length=12)
    assert len(ids_of(llm, SamplingParams(max_tokens=9, ignore_eos=True))) == 9
    assert len(ids_of(llm, SamplingParams(max_tokens=None, ignore_eos=True))) == 7
    assert len(llm.score([PROMPT * 4], use_tqdm=False)[0]) == 19


def test_a_prompt_as_long_is_refused_and_one_beyond_the_context_is_not_allowed(
    tmp_path, embedded_tokenizer
):
    llm = llm_with(tmp_path, embedded_tokenizer, max_length=12)
    line = refusal(lambda: ids_of(llm, None, [1] * 12), "12 tokens", "max_length", "max_tokens")
    assert "generation_config.json" in line and not llm.has_unfinished_requests
    longer = llm_with(tmp_path / "longer", embedded_tokenizer, max_length=1000)
    assert len(ids_of(longer, SamplingParams(max_tokens=None, ignore_eos=True))) == 64 - 5
