"""JSONL of a trainer or a rollout engine: what it may say, and one line for what it may not."""

from __future__ import annotations

import json
import math

import pytest
from support.heads import random_model

from minqwen.errors import MinqwenError
from minqwen.lab.audit.records import Entry, at_most, read_jsonl

CONFIG, _ = random_model(4, 2)
LINE = {"prompt_token_ids": [5, 6], "token_ids": [7, 8], "logprobs": [-1.5, -0.25]}


def written(tmp_path, *lines):
    path = tmp_path / "rollout.jsonl"
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


def test_a_line_is_a_record(tmp_path):
    (record,) = read_jsonl(written(tmp_path, LINE), CONFIG)
    assert record.ids == (5, 6, 7, 8) and record.prompt == 2 and not record.greedy
    assert record.entries == (Entry(2, 7, -1.5), Entry(3, 8, -0.25))


def test_what_else_a_line_may_say(tmp_path):
    more = {
        "prompt_logprobs": [None, -2],
        "top_logprobs": [{"7": -1.5, "9": -3}, {}],
        "temperature": 0,
        "messages": [{"role": "user", "content": "hi"}],
        "step": 12,
    }
    (record,) = read_jsonl(written(tmp_path, LINE | more, ""), CONFIG)
    assert set(record.entries) == {
        Entry(1, 6, -2.0),
        Entry(2, 7, -1.5),
        Entry(3, 8, -0.25),
        Entry(2, 9, -3.0),
    }
    assert record.greedy and record.messages == ({"role": "user", "content": "hi"},)


@pytest.mark.parametrize("value", ["-Infinity", "-9999.0", "-1e9"])
def test_a_token_that_cannot_be_drawn_has_minus_infinity(tmp_path, value):
    line = json.dumps(LINE).replace("-1.5", value)
    (record,) = read_jsonl(written(tmp_path, line), CONFIG)
    assert record.entries[0].logprob == -math.inf


def test_a_prompt_may_be_replaced(tmp_path):
    line = LINE | {"prompt_logprobs": [None, -2]}
    (record,) = read_jsonl(written(tmp_path, line), CONFIG)
    moved = record.with_prompt([1, 2, 3])
    assert moved.ids == (1, 2, 3, 7, 8) and moved.prompt == 3
    assert moved.entries == (Entry(3, 7, -1.5), Entry(4, 8, -0.25))


WRONG = {
    "[1, 2]": "no 'prompt_token_ids'",
    "{": "is not valid JSON",
    json.dumps({"prompt_token_ids": [1], "token_ids": [2]}): "no 'logprobs'",
    json.dumps(LINE | {"token_ids": "ab"}): "expected a list of token ids",
    json.dumps(LINE | {"token_ids": [7, True]}): "expected a list of token ids",
    json.dumps(LINE | {"prompt_token_ids": []}): "must hold a token each",
    json.dumps(LINE | {"logprobs": [-1]}): "logprobs: 1, expected a list of 2",
    json.dumps(LINE | {"logprobs": -1}): "expected a list of 2",
    json.dumps(LINE | {"logprobs": [-1, "x"]}): r"logprobs\[1\] is 'x', expected a log prob",
    json.dumps(LINE | {"logprobs": [-1, math.nan]}): r"logprobs\[1\] is nan",
    json.dumps(LINE | {"logprobs": [-1, math.inf]}): r"logprobs\[1\] is inf",
    json.dumps(LINE | {"logprobs": [-1, 0.7]}): "at most 0",
    json.dumps(LINE | {"top_logprobs": [{}, {"x": -1}]}): r"top_logprobs\[1\]",
    json.dumps(LINE | {"top_logprobs": [{}, {"9" * 5000: -1}]}): r"top_logprobs\[1\]",
    json.dumps(LINE | {"top_logprobs": [{}, {"\u0661": -1}]}): r"top_logprobs\[1\]",
    json.dumps(LINE | {"prompt_logprobs": [None]}): "expected a list of 2",
    json.dumps(LINE | {"messages": "hi"}): "expected a list of messages",
    json.dumps(LINE | {"token_ids": [7, 97]}): "token id 97, expected 0 to 96",
    json.dumps(LINE | {"token_ids": [7, -1]}): "token id -1",
    json.dumps(LINE | {"top_logprobs": [{}, {"123456": -1}]}): "token id 123456",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_is_named(tmp_path, line):
    path = written(tmp_path, LINE, line)
    with pytest.raises(MinqwenError, match=WRONG[line]) as caught:
        read_jsonl(path, CONFIG)
    assert f"{path}, line 2" in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(MinqwenError, match="holds no record"):
        read_jsonl(written(tmp_path, "", ""), CONFIG)


def test_a_text_longer_than_the_context_is_refused(tmp_path):
    long = {**LINE, "prompt_token_ids": [1] * 40}
    with pytest.raises(MinqwenError, match="42 tokens, and the model's context is 32"):
        read_jsonl(written(tmp_path, long), CONFIG.replace(max_position_embeddings=32))


def test_of_many_records_the_first_are_taken(tmp_path):
    records = read_jsonl(written(tmp_path, *[LINE] * 5), CONFIG)
    assert len(at_most(records, 11)) == 2 and len(at_most(records, 1)) == 1
