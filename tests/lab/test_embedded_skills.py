"""What the embedded model's card says that it can do, on questions that it was never shown."""

from __future__ import annotations

import json

import pytest
import torch
from support.paths import EMBEDDED

from minqwen import LLM, SamplingParams, StructuredOutputs
from minqwen.lab.tasks import (
    JSON_SCHEMA,
    continued,
    count_correct,
    heldout_questions,
    json_questions,
    repeated,
)


def test_sums(embedded_model, embedded_tokenizer):
    questions = heldout_questions()[::3]
    assert count_correct(embedded_model, embedded_tokenizer, questions) >= 0.99 * len(questions)


def test_a_sentence_becomes_json_without_a_grammar(embedded_model, embedded_tokenizer):
    questions = json_questions(100)
    assert count_correct(embedded_model, embedded_tokenizer, questions) >= 95


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(EMBEDDED, dtype="float32", max_model_len=128, num_blocks=400)


def test_a_grammar_does_not_change_an_answer_that_follows_it(llm):
    questions = json_questions(24)
    chats = [[{"role": "user", "content": question.prompt}] for question in questions]
    free = SamplingParams(temperature=0, max_tokens=64)
    bound = SamplingParams(
        temperature=0, max_tokens=64, structured_outputs=StructuredOutputs(json=JSON_SCHEMA)
    )
    texts = [[o.outputs[0].text for o in llm.chat(chats, p, use_tqdm=False)] for p in (free, bound)]
    right = [q.answer for q in questions]
    assert sum(a == b for a, b in zip(texts[0], right)) >= 22
    for without, within, answer in zip(*texts, right):
        assert set(json.loads(within)) == {"name", "number", "place"}
        assert within == without or without != answer


def test_a_grammar_makes_an_object_where_the_model_alone_does_not(llm):
    """Nobody asks for JSON here, so that the model goes on with the text."""
    prompt = "And Moses went from Sinai with 40 camels."
    free = SamplingParams(temperature=0, max_tokens=64)
    bound = SamplingParams(
        temperature=0, max_tokens=64, structured_outputs=StructuredOutputs(json=JSON_SCHEMA)
    )
    alone, within = (
        llm.generate(prompt, p, use_tqdm=False)[0].outputs[0].text for p in (free, bound)
    )
    assert "{" not in alone
    assert set(json.loads(within)) == {"name", "number", "place"}


def test_greedy_text_does_not_go_round_in_circles(embedded_model, embedded_tokenizer):
    ids = torch.tensor([embedded_tokenizer.encode("In the beginning")])
    assert not any(repeated(continued(embedded_model, ids, 64)[0].tolist(), 6))
