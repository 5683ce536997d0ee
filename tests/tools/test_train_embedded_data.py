"""The rows that tools/train_embedded trains on: what is in them, and what must not be."""

from __future__ import annotations

import json
import random
import re
import runpy

import pytest
import torch
from support.paths import ROOT

from minqwen.lab.tasks import NAMES, PLACES, Chapter, is_heldout, is_heldout_pair

TOOL = ROOT / "tools" / "train_embedded"
VERSES = [
    "And Hiram sent to the king sixscore talents of gold.",
    "My flesh and my skin hath he made old; he hath broken my bones.",
    "And they departed from Dophkah, and encamped in Alush, and Moses with them.",
]
CHAPTERS = [Chapter(f"Nu{i}", VERSES * 20) for i in range(4)]


@pytest.fixture(scope="module")
def data() -> dict:
    return runpy.run_path(str(TOOL / "data.py"))


@pytest.fixture(scope="module")
def chats(data, embedded_tokenizer):
    return data["Chats"](CHAPTERS, embedded_tokenizer, seed=3)


def text_of(tokenizer, row) -> str:
    return tokenizer.decode([id for id, _ in row])


def test_the_answers_of_a_row_of_chats_count_and_nothing_else(data, chats, embedded_tokenizer):
    row = chats.row(random.Random(0), 400)
    assert len(row) == data["LENGTH"] + 1
    parts = re.split(r"<\|im_start\|>assistant\n", text_of(embedded_tokenizer, row))
    answers = [part.partition("<|im_end|>")[0] + "<|im_end|>" for part in parts[1:]]
    assert len(answers) > 5
    counted = [id for id, kind in row if kind != data["NOTHING"]]
    assert embedded_tokenizer.decode(counted) == "".join(answers)


def test_no_sum_and_no_sentence_of_a_chat_is_held_out(chats, embedded_tokenizer):
    rng = random.Random(1)
    for _ in range(300):
        text = text_of(embedded_tokenizer, chats.sum(rng))
        a, b = re.search(r"What is (\d+) \+ (\d+)\?", text).groups()
        assert not is_heldout(int(a), int(b))
    pairs = set()
    for _ in range(600):
        text = text_of(embedded_tokenizer, chats.json(rng))
        answer = json.loads(text.split("assistant\n")[1].partition("<|im_end|>")[0])
        if isinstance(answer, dict):
            pairs.add((answer["name"], answer["place"]))
            assert "Write it as JSON." in text
        else:
            assert f"Write {answer} as JSON." in text
    assert not any(is_heldout_pair(*pair) for pair in pairs)
    assert sum(name in NAMES and place in PLACES for name, place in pairs) > 60


def test_a_needle_chat_is_as_long_as_asked_at_most(data, chats):
    rng = random.Random(2)
    for room in (64, 200, 700, data["LENGTH"]):
        assert all(len(chats.needle(rng, room)) <= room for _ in range(30))


def test_the_rows_of_a_step_do_not_depend_on_where_a_run_was_resumed(data, chats):
    whole, resumed = data["Supply"](chats, 40, None), data["Supply"](chats, 40, None)
    for step in range(8):
        expected = whole.examples(step)
    found = resumed.examples(7)
    assert torch.equal(found.inputs, expected.inputs) and torch.equal(found.kinds, expected.kinds)
    assert not torch.equal(whole.examples(8).inputs, expected.inputs)


def test_an_epoch_of_text_has_every_window_once_and_the_next_begins_elsewhere(
    data, embedded_tokenizer
):
    text = data["Text"](CHAPTERS, embedded_tokenizer, seed=3)
    places = [text.places(epoch) for epoch in (0, 1)]
    for order in places:
        apart = order.sort().values.diff()
        assert len(order) == text.windows and (apart == data["LENGTH"]).all()
    assert not torch.equal(places[0], places[1])


def test_blanked_inputs_are_still_targets(data, embedded_tokenizer):
    text = data["Text"](CHAPTERS, embedded_tokenizer, seed=3)
    whole, some = text.examples(0, 2, 0.0, 2047), text.examples(0, 2, 0.25, 2047)
    blank = some.inputs == 2047
    assert 0.2 < blank.float().mean() < 0.3
    assert torch.equal(some.inputs[~blank], whole.inputs[~blank])
    assert torch.equal(some.targets, whole.targets)


def test_matrices_are_orthogonalised_together_as_each_alone():
    orthogonal = runpy.run_path(str(TOOL / "optimizer.py"))["orthogonal"]
    x = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    found = orthogonal(x)
    torch.testing.assert_close(found, torch.cat([orthogonal(one[None]) for one in x]))
    values = torch.linalg.svdvals(found)
    assert (0.5 < values).all() and (values < 1.5).all()
