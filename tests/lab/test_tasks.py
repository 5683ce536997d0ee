"""The tasks that the embedded model is marked by: which questions there are, and their marks."""

from __future__ import annotations

import hashlib
import json
import math
import random

import pytest
import torch
from support.naive import greedy

from minqwen import ModelConfig, Qwen2
from minqwen.errors import MinqwenError
from minqwen.lab.tasks import (
    JSON_SCHEMA,
    NAMES,
    PLACES,
    Chapter,
    Question,
    continued,
    count_correct,
    count_unrepeated,
    haystack,
    heldout_loss,
    heldout_questions,
    is_heldout,
    is_heldout_pair,
    json_question,
    json_questions,
    logits_where,
    needle_chat,
    needle_questions,
    opening,
    parse_chapters,
    repeated,
    split_chapters,
    sum_question,
    verse_lengths,
)

VERSES = [  # of the King James Version, from chapters that the embedded model was not trained on
    "Make no friendship with an angry man; and with a furious man thou shalt not go:",
    "The Father loveth the Son, and hath given all things into his hand.",
    "But man dieth, and wasteth away: yea, man giveth up the ghost, and where is he?",
    "And Hiram sent to the king sixscore talents of gold.",
    "The rich ruleth over the poor, and the borrower is servant to the lender.",
    "He shall come down like rain upon the mown grass: as showers that water the earth.",
    "My flesh and my skin hath he made old; he hath broken my bones.",
    "All our enemies have opened their mouths against us.",
    "And they departed from Dophkah, and encamped in Alush.",
]
CHAPTERS = [Chapter("Pr22", VERSES[:5]), Chapter("Nu33", VERSES[5:])]


def say(model, tokenizer, question: Question) -> str:
    """What the model answers greedily, in as many tokens as the right answer has."""
    prompt = tokenizer.encode_chat([{"role": "user", "content": question.prompt}])
    count = len(tokenizer.encode(question.answer)) + 1
    return tokenizer.decode(greedy(model, prompt, count))


def digest(questions: list[Question]) -> str:
    text = "\n".join(f"{question.prompt}\n{question.answer}" for question in questions)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_embedded_model_works_out_a_sum_it_was_never_shown(embedded_model, embedded_tokenizer):
    question = heldout_questions()[0]
    assert say(embedded_model, embedded_tokenizer, question) == question.answer + "<|im_end|>"
    assert count_correct(embedded_model, embedded_tokenizer, [question]) == 1


# ---- which questions ----------------------------------------------------------------------------


def test_a_sum_is_worked_out_column_by_column_with_the_carry():
    assert sum_question(47, 38) == ("What is 47 + 38?", "7+8=15, 4+3+1=8: 85")
    assert sum_question(12, 34) == ("What is 12 + 34?", "2+4=6, 1+3=4: 46")
    assert sum_question(99, 91) == ("What is 99 + 91?", "9+1=10, 9+9+1=19: 190")


def test_every_worked_answer_ends_with_the_sum():
    for a in range(10, 100):
        for b in range(10, 100):
            assert sum_question(a, b).answer.endswith(f": {a + b}")


def test_a_tenth_of_the_pairs_is_held_out_in_both_orders():
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    heldout = {pair for pair in pairs if is_heldout(*pair)}
    assert {(b, a) for a, b in heldout} == heldout
    assert len(heldout_questions()) == len(heldout) == 753
    assert 0.08 < len(heldout) / len(pairs) < 0.12


def test_a_seed_gives_the_same_questions_as_when_the_embedded_model_was_trained(embedded_tokenizer):
    """The digests are of the program that trained it: other questions could be ones it has seen."""
    assert digest(heldout_questions()) == "a8ed00e53f05b89c"
    found = [
        digest(needle_questions(CHAPTERS, embedded_tokenizer, 128, 16, seed, needles))
        for seed, needles in ((0, 1), (0, 3), (5, 1))
    ]
    assert found == ["6a1f0c8a91aaa905", "5e80fcda09d649df", "3c783baa7538f866"]


def test_a_needle_chat_hides_every_secret_number_once_among_the_verses_in_order():
    rng = random.Random(0)
    for needles in (1, 2, 3) * 20:
        chat = needle_chat(rng, VERSES, needles)
        assert len(chat.questions) == needles
        text = "".join(chat.pieces)
        for question in chat.questions:
            name = question.prompt.removeprefix("What is the secret number of ").removesuffix("?")
            assert name in NAMES
            needle = f" The secret number of {name} is {question.answer}"
            assert text.count(needle) == 1
            text = text.replace(needle, "")
        assert text == "".join(" " + verse for verse in VERSES)


def test_the_opening_question_of_a_needle_chat_has_the_whole_haystack_before_it():
    chat = needle_chat(random.Random(1), VERSES, 2)
    opening = chat.opening()
    assert opening.answer == chat.questions[0].answer
    assert opening.prompt.startswith(VERSES[0][:5]) or opening.prompt.startswith("The secret")
    assert opening.prompt.endswith(" " + chat.questions[0].prompt)
    assert all(verse in opening.prompt for verse in VERSES)


def test_needles_lie_at_every_place_and_their_questions_come_in_every_order():
    rng = random.Random(2)
    firsts, orders = set(), set()
    for _ in range(200):
        chat = needle_chat(rng, VERSES, 2)
        firsts.add(chat.pieces[0])
        orders.add(chat.pieces[1].endswith(chat.questions[0].answer))
    assert len(firsts) > len(VERSES) // 2  # needles before the first verse and after many
    assert orders == {True, False}


def test_a_haystack_takes_consecutive_verses_that_fit():
    lengths = [10] * len(VERSES)
    for seed in range(20):
        found = haystack(random.Random(seed), VERSES, lengths, 35)
        start = VERSES.index(found[0])
        assert found == VERSES[start : start + 3]
    assert haystack(random.Random(0), VERSES, lengths, 9) == []


@pytest.mark.parametrize("tokens, needles", [(64, 1), (96, 1), (128, 3)])
def test_needle_questions_are_at_most_as_long_as_asked(embedded_tokenizer, tokens, needles):
    book = [Chapter("Ps1", VERSES * 20)]
    questions = needle_questions(book, embedded_tokenizer, tokens, 32, needles=needles)
    assert len(set(questions)) == 32
    longest_verse = max(verse_lengths(embedded_tokenizer, VERSES))
    for question in questions:
        prompt = embedded_tokenizer.encode_chat([{"role": "user", "content": question.prompt}])
        length = len(prompt) + len(embedded_tokenizer.encode(question.answer)) + 1
        assert tokens - longest_verse - 15 * needles < length <= tokens


# ---- a sentence as JSON -------------------------------------------------------------------------


def test_a_sentence_becomes_the_object_of_its_name_number_and_place():
    rng = random.Random(0)
    for _ in range(200):
        prompt, answer = json_question(rng, "Moses", "Hebron")
        found = json.loads(answer)
        assert list(found) == JSON_SCHEMA["required"] == ["name", "number", "place"]
        assert found["name"] == "Moses" and found["place"] == "Hebron"
        assert prompt.endswith(" Write it as JSON.")
        for value in found.values():
            assert f" {value}" in f" {prompt}"


def test_the_pairs_of_the_questions_are_held_out():
    questions = json_questions(200)
    assert len(set(questions)) > 190 and questions == json_questions(200)
    assert questions != json_questions(200, seed=1)
    found = [json.loads(question.answer) for question in questions]
    pairs = {(value["name"], value["place"]) for value in found}
    assert all(is_heldout_pair(*pair) for pair in pairs) and len(pairs) > 150
    share = sum(is_heldout_pair(a, b) for a in NAMES for b in PLACES) / len(NAMES) / len(PLACES)
    assert 0.15 < share < 0.25


# ---- greedy text --------------------------------------------------------------------------------


def test_an_id_that_ends_n_ids_that_came_before_is_repeated():
    assert repeated([1, 2, 3, 1, 2, 3, 1], 3) == [False] * 5 + [True, True]
    assert repeated([7, 7, 7, 7], 2) == [False, False, True, True]
    assert repeated([1, 2, 3, 4], 2) == [False] * 4
    assert repeated([1, 1], 3) == [False, False]


def test_a_row_goes_on_as_greedy_decoding_does(embedded_model, embedded_tokenizer):
    rows = [embedded_tokenizer.encode(text)[:4] for text in VERSES[:3]]
    found = continued(embedded_model, torch.tensor(rows), 6)
    assert found.tolist() == [row + greedy(embedded_model, row, 6) for row in rows]


def test_an_opening_is_counted_if_nothing_comes_twice_in_its_greedy_text(
    embedded_model, embedded_tokenizer
):
    chapters = [Chapter(f"Ps{i}", [verse]) for i, verse in enumerate(VERSES)]
    assert opening(chapters[0]) == "Make no friendship with an angry man; and"
    expected = 0
    for chapter in chapters:
        ids = embedded_tokenizer.encode(opening(chapter))
        ids += greedy(embedded_model, ids, 24)
        grams = [tuple(ids[i : i + 6]) for i in range(len(ids) - 5)]
        expected += len(set(grams)) == len(grams)
    assert count_unrepeated(embedded_model, embedded_tokenizer, chapters, tokens=24) == expected


# ---- marks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed_questions(embedded_tokenizer) -> list[Question]:
    """Long and short questions in turn; every third expected answer is wrong, at its very end."""
    needles = needle_questions(CHAPTERS, embedded_tokenizer, 96, 9)
    questions = []
    for i, (needle, plus) in enumerate(zip(needles, heldout_questions()[::80])):
        if i % 3 == 0:
            plus = plus._replace(answer=plus.answer[:-1] + str((int(plus.answer[-1]) + 1) % 10))
            needle = needle._replace(answer=needle.answer[:-1] + "!")
        questions += [needle, plus]
    return questions


def test_count_correct_agrees_with_what_the_model_says(
    embedded_model, embedded_tokenizer, mixed_questions
):
    said = [say(embedded_model, embedded_tokenizer, question) for question in mixed_questions]
    right = [text == q.answer + "<|im_end|>" for text, q in zip(said, mixed_questions)]
    assert 6 <= sum(right) <= 12  # of 18, of which 6 cannot be right
    assert count_correct(embedded_model, embedded_tokenizer, mixed_questions) == sum(right)
    for question, is_right in zip(mixed_questions, right):
        assert count_correct(embedded_model, embedded_tokenizer, [question]) == is_right


def test_an_answer_that_does_not_end_where_it_should_is_wrong(embedded_model, embedded_tokenizer):
    question = heldout_questions()[0]
    shorter = question._replace(answer=question.answer.rpartition(":")[0])
    assert count_correct(embedded_model, embedded_tokenizer, [shorter]) == 0


def test_logits_where_are_the_logits_of_the_whole_rows(embedded_model):
    ids = torch.randint(0, 2000, (3, 17), generator=torch.Generator().manual_seed(0))
    wanted = torch.rand(3, 17, generator=torch.Generator().manual_seed(1)) < 0.3
    with torch.no_grad():
        whole, some = embedded_model(ids), logits_where(embedded_model, ids, wanted)
    assert some.shape == (int(wanted.sum()), embedded_model.config.vocab_size)
    torch.testing.assert_close(some, whole[wanted])


def test_a_model_learns_from_the_tokens_that_are_wanted():
    """It is minqwen's own model that is trained: gradients flow through its arithmetic."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Qwen2(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    optimizer = torch.optim.Adam(model.requires_grad_().parameters(), lr=0.02)
    ids = torch.randint(0, 17, (4, 9))
    wanted = torch.zeros(4, 8, dtype=torch.bool)
    wanted[:, 3:] = True
    losses = []
    for _ in range(40):
        logits = logits_where(model, ids[:, :-1], wanted)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][wanted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert losses[-1] < 0.2 * losses[0]


# ---- text ---------------------------------------------------------------------------------------


def test_the_loss_of_a_short_chapter_is_its_mean_over_all_tokens_but_the_first(
    embedded_model, embedded_tokenizer
):
    text = "\n".join(VERSES) + "\n"
    ids = torch.tensor(embedded_tokenizer.encode(text))
    with torch.no_grad():
        logprobs = embedded_model(ids[None, :-1])[0].log_softmax(-1)
    nats = -float(logprobs.gather(1, ids[1:, None]).sum())
    loss = heldout_loss(embedded_model, embedded_tokenizer, [Chapter("Ps1", VERSES)])
    assert loss.nats_per_token == pytest.approx(nats / (len(ids) - 1), rel=1e-6)
    size = len(text.encode()) - len(embedded_tokenizer.decode([int(ids[0])]).encode())
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert 3 < loss.nats_per_token < 4.5  # as on the card, about: these verses were held out


def test_each_token_of_a_long_chapter_is_scored_once_from_windows_that_overlap_by_half(
    embedded_model, embedded_tokenizer
):
    verses = VERSES * 8
    ids = torch.tensor(embedded_tokenizer.encode("\n".join(verses) + "\n"))
    assert 1024 < len(ids) <= 1536  # two windows
    with torch.no_grad():
        first = embedded_model(ids[None, :1023])[0].log_softmax(-1)
        second = embedded_model(ids[None, 512:-1])[0].log_softmax(-1)[511:]
    logprobs = torch.cat([first, second])
    assert len(logprobs) == len(ids) - 1
    nats = -float(logprobs.gather(1, ids[1:, None]).mean())
    loss = heldout_loss(embedded_model, embedded_tokenizer, [Chapter("Ps1", verses)])
    assert loss.nats_per_token == pytest.approx(nats, rel=1e-6)


def test_chapters_are_read_as_the_command_bible_prints_them():
    lines = [
        "Ge1:1 In the beginning",
        "Ge1:2 And the\u2028earth ",
        "1Jn2:1 My little children: these",
    ]
    assert parse_chapters("\n".join(lines)) == [
        ("Ge1", ["In the beginning", "And the\u2028earth"]),
        ("1Jn2", ["My little children: these"]),
    ]
    with pytest.raises(MinqwenError, match="line 2 of the text is 'In the', expected a verse"):
        parse_chapters("Ge1:1 In the beginning\nIn the")


def test_every_50th_chapter_is_held_out():
    book = [Chapter(f"Ps{i}", VERSES) for i in range(1, 151)]
    trained, heldout = split_chapters(book)
    assert [chapter.name for chapter in heldout] == ["Ps50", "Ps100", "Ps150"]
    assert len(trained) == 147 and not set(c.name for c in trained) & {"Ps50", "Ps100", "Ps150"}
