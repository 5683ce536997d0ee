"""The tasks that the embedded model is trained on, and the marks that a model gets for them.

    text    continue the King James Version: the loss on chapters that were held out
    sums    `What is 47 + 38?` -> `7+8=15, 4+3+1=8: 85`: a tenth of the pairs was held out
    needle  verses with `The secret number of Aaron is 4821.` among them, and then the question
    json    `Moses saw 47 men in Hebron. Write it as JSON.` -> the object of name, number and place

A sum, a needle or an object has exactly one right answer, so an answer is right or wrong and needs
no judge.
Questions are made from a seed: the same seed gives the same questions on every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minqwen.errors import MinqwenError
from minqwen.files import lines_of, printable
from minqwen.model import Batch, Qwen2
from minqwen.tokenizer import Tokenizer

# ---- text ---------------------------------------------------------------------------------------


class Chapter(NamedTuple):
    """One chapter of the text; `name` as the command `bible` spells it, "Ge1"."""

    name: str
    verses: list[str]


class TextLoss(NamedTuple):
    """How well a model predicts a text. A byte is one of the text's UTF-8 bytes."""

    nats_per_token: float
    bits_per_byte: float


def parse_chapters(text: str) -> list[Chapter]:
    """The chapters of what `bible -f gen1:1-rev22:21` prints: lines like `Ge1:1 In the beginning`.

    Raises MinqwenError for a line of another form.
    """
    chapters: list[Chapter] = []
    for number, line in enumerate(lines_of(text), 1):
        reference, _, verse = line.partition(" ")
        name, colon, _ = reference.rpartition(":")
        if not colon or not verse:
            raise MinqwenError(
                printable(
                    f"line {number} of the text is {line[:40]!r}, expected a verse such as "
                    "`Ge1:1 In the beginning`; give what `bible -f gen1:1-rev22:21` prints"
                )
            )
        if not chapters or chapters[-1].name != name:
            chapters.append(Chapter(name, []))
        chapters[-1].verses.append(verse.strip())
    return chapters


def split_chapters(chapters: list[Chapter]) -> tuple[list[Chapter], list[Chapter]]:
    """(trained on, held out): every 50th chapter of the book is held out, 2 per cent."""
    trained = [chapter for i, chapter in enumerate(chapters) if i % 50 != 49]
    return trained, chapters[49::50]


@torch.no_grad()
def heldout_loss(model: Qwen2, tokenizer: Tokenizer, chapters: list[Chapter]) -> TextLoss:
    """The loss over whole chapters. Every token after a chapter's first is scored exactly once.

    Windows of 1,024 tokens overlap by half: a token is predicted from at least the 512 tokens
    before it, or from the chapter's beginning.
    """
    nats, tokens, size = 0.0, 0, 0
    for chapter in chapters:
        ids = tokenizer.encode("\n".join(chapter.verses) + "\n")
        size += len(tokenizer.decode(ids[1:]).encode())
        done = 1  # ids[:done] are scored; the first token is given, not predicted
        while done < len(ids):
            start = max(0, done - 512)
            window = torch.tensor(ids[start : start + 1024], device=model.device)
            new = done - start  # of the window, the tokens from here on are not scored yet
            logits = model(window[None, :-1])[0, new - 1 :]
            nats += float(F.cross_entropy(logits, window[new:], reduction="sum"))
            tokens += len(window) - new
            done = start + len(window)
    return TextLoss(nats / tokens, nats / math.log(2) / size)


# ---- sums ---------------------------------------------------------------------------------------


class Question(NamedTuple):
    """What the user says, and all of what the assistant must answer."""

    prompt: str
    answer: str


def is_heldout(a: int, b: int) -> bool:
    """Whether a + b is held out: a tenth of the pairs is, chosen by a hash.

    a + b and b + a are one pair, so that a model never sees the one and is asked the other.
    """
    low, high = sorted((a, b))
    return hashlib.sha256(f"minqwen sum {low} {high}".encode()).digest()[0] % 10 == 0


def sum_question(a: int, b: int) -> Question:
    """47 + 38 is answered `7+8=15, 4+3+1=8: 85`: column by column, as at school, then the sum."""
    (tens_a, ones_a), (tens_b, ones_b) = divmod(a, 10), divmod(b, 10)
    ones = f"{ones_a}+{ones_b}={ones_a + ones_b}"
    if ones_a + ones_b >= 10:
        tens = f"{tens_a}+{tens_b}+1={tens_a + tens_b + 1}"
    else:
        tens = f"{tens_a}+{tens_b}={tens_a + tens_b}"
    return Question(f"What is {a} + {b}?", f"{ones}, {tens}: {a + b}")


def heldout_questions() -> list[Question]:
    """Every held-out sum of two numbers from 10 to 99, in both orders: 753. None is trained on."""
    return [sum_question(a, b) for a in range(10, 100) for b in range(10, 100) if is_heldout(a, b)]


# ---- needles in a haystack ----------------------------------------------------------------------

NAMES = (
    "Aaron Abel Abner Abraham Adam Ahab Amos Andrew Asher Barak Benjamin Boaz Caleb Cyrus Dan "
    "Daniel David Deborah Eli Elijah Elisha Esau Esther Eve Ezra Gad Gideon Hagar Hannah Hezekiah "
    "Isaac Isaiah Jacob James Jeremiah Jesse Job Joel John Jonah Jonathan Joseph Joshua Judah "
    "Laban Lazarus Leah Levi Lot Luke Mark Martha Mary Micah Miriam Mordecai Moses Naomi Nathan "
    "Nehemiah Noah Paul Peter Rachel Rebekah Reuben Ruth Samson Samuel Sarah Saul Silas Simon "
    "Solomon Stephen Thomas Timothy Titus Uriah Zechariah"
).split()


class NeedleChat(NamedTuple):
    """A chat about one haystack: its first message is the haystack and the first question."""

    pieces: list[str]  # verses and needles in turn, verses first and last; joined, the haystack
    questions: list[Question]  # one for each needle, in the order in which they are asked

    def opening(self) -> Question:
        """The first question, with the haystack before it."""
        first = self.questions[0]
        return Question("".join(self.pieces).strip() + " " + first.prompt, first.answer)


def needle_chat(rng: random.Random, verses: list[str], needles: int) -> NeedleChat:
    """`needles` secret numbers at random places among the verses, asked for in random order."""
    names = rng.sample(NAMES, needles)
    numbers = [str(rng.randrange(1000, 10000)) for _ in names]
    places = sorted(rng.randrange(len(verses) + 1) for _ in names)
    pieces: list[str] = []
    start = 0
    for place, name, number in zip(places, names, numbers):
        pieces.append(_spaced(verses[start:place]))
        pieces.append(f" The secret number of {name} is {number}.")
        start = place
    pieces.append(_spaced(verses[start:]))
    questions = [
        Question(f"What is the secret number of {name}?", f"{number}.")
        for name, number in zip(names, numbers)
    ]
    rng.shuffle(questions)
    return NeedleChat(pieces, questions)


def _spaced(verses: list[str]) -> str:
    return "".join(" " + verse for verse in verses)


def verse_lengths(tokenizer: Tokenizer, verses: list[str]) -> list[int]:
    """How many tokens each verse is, with the space before it."""
    return [len(ids) for ids in tokenizer.encode_batch([" " + verse for verse in verses])]


def haystack(rng: random.Random, verses: list[str], lengths: list[int], room: int) -> list[str]:
    """Consecutive verses from a random place, as many as fit in `room` tokens."""
    start = end = rng.randrange(len(verses))
    while end < len(verses) and lengths[end] <= room:
        room -= lengths[end]
        end += 1
    return verses[start:end]


def needle_questions(
    chapters: list[Chapter],
    tokenizer: Tokenizer,
    tokens: int,
    count: int,
    seed: int = 0,
    needles: int = 1,
) -> list[Question]:
    """`count` opening questions of needle chats that are a little shorter than `tokens` tokens."""
    rng = random.Random(f"needles {tokens} {seed}")
    verses = [verse for chapter in chapters for verse in chapter.verses]
    lengths = verse_lengths(tokenizer, verses)
    room = tokens - 27 - 15 * needles  # 27: the question, the answer and the chat's frame
    questions = []
    for _ in range(count):
        chat = needle_chat(rng, haystack(rng, verses, lengths, room), needles)
        questions.append(chat.opening())
    return questions


# ---- a sentence as JSON --------------------------------------------------------------------------

PLACES = (
    "Antioch Ashdod Babylon Beersheba Bethany Bethel Bethlehem Canaan Capernaum Carmel Corinth "
    "Damascus Ephesus Galilee Gath Gaza Gibeah Gibeon Gilead Gilgal Hebron Jericho Jerusalem Joppa "
    "Kadesh Lachish Macedonia Mizpeh Moab Nazareth Nineveh Patmos Philippi Ramah Rome Samaria "
    "Sardis Shechem Shiloh Shushan Sidon Sinai Smyrna Sodom Tarshish Thessalonica Tyre Zidon "
    "Ziklag Zion"
).split()
SENTENCES = (
    "{name} saw {number} {things} in {place}.",
    "{name} had {number} {things} at {place}.",
    "{name} came to {place} with {number} {things}.",
    "{name} brought {number} {things} out of {place}.",
    "In {place} {name} counted {number} {things}.",
    "And {name} went from {place} with {number} {things}.",
    "There were {number} {things} with {name} in {place}.",
    "{number} {things} were given to {name} in {place}.",
    "Then {name} sent {number} {things} to {place}.",
    "At {place} they found {number} {things} of {name}.",
)
THINGS = "men women servants sheep oxen camels goats horses vessels talents".split()
JSON_SCHEMA = {  # what every answer is an instance of
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "number": {"type": "integer"},
        "place": {"type": "string"},
    },
    "required": ["name", "number", "place"],
    "additionalProperties": False,
}


def is_heldout_pair(name: str, place: str) -> bool:
    """Whether a name and a place are held out together: a fifth of the pairs is, by a hash.

    No sentence that a model is trained to write as JSON has both of them.
    """
    return hashlib.sha256(f"minqwen json {name} {place}".encode()).digest()[0] % 5 == 0


def json_question(rng: random.Random, name: str, place: str) -> Question:
    """A random sentence about the two, and its object on one line as `json.dumps` writes it."""
    number = rng.randrange(2, 10 ** rng.randint(1, 4))
    sentence = rng.choice(SENTENCES).format(
        name=name, number=number, things=rng.choice(THINGS), place=place
    )
    found = {"name": name, "number": number, "place": place}
    return Question(f"{sentence} Write it as JSON.", json.dumps(found))


def json_questions(count: int, seed: int = 0) -> list[Question]:
    """`count` questions about a name and a place that are held out: no model has seen both."""
    rng = random.Random(f"json {seed}")
    pairs = [(name, place) for name in NAMES for place in PLACES if is_heldout_pair(name, place)]
    return [json_question(rng, *rng.choice(pairs)) for _ in range(count)]


# ---- greedy text --------------------------------------------------------------------------------


def opening(chapter: Chapter, words: int = 8) -> str:
    """The first words of a chapter: where a model goes on from."""
    return " ".join(chapter.verses[0].split()[:words])


def repeated(ids: Sequence[int], n: int) -> list[bool]:
    """For each id, whether the n ids that end with it have come before in the same order."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for end in range(1, len(ids) + 1):
        gram = tuple(ids[max(0, end - n) : end])
        found.append(len(gram) == n and gram in seen)
        seen.add(gram)
    return found


@torch.no_grad()
def continued(model: Qwen2, ids: Tensor, count: int) -> Tensor:
    """ids [B, T] and `count` more of each row, the most likely ones: [B, T + count]."""
    B = len(ids)
    for _ in range(count):
        T = ids.shape[1]
        last = torch.arange(1, B + 1, device=ids.device) * T - 1
        batch = dataclasses.replace(Batch.dense(B, T, device=ids.device), logits_at=last)
        ids = torch.cat([ids, model(ids.flatten(), batch).argmax(-1, keepdim=True)], dim=1)
    return ids


def count_unrepeated(
    model: Qwen2, tokenizer: Tokenizer, chapters: list[Chapter], tokens: int = 64, n: int = 6
) -> int:
    """How many chapters' openings a model goes on from, greedily, without n tokens coming twice."""
    count = 0
    for chapter in chapters:
        ids = torch.tensor([tokenizer.encode(opening(chapter))], device=model.device)
        count += not any(repeated(continued(model, ids, tokens)[0].tolist(), n))
    return count


# ---- marks --------------------------------------------------------------------------------------


def count_correct(model: Qwen2, tokenizer: Tokenizer, questions: Sequence[Question]) -> int:
    """How many answers greedy decoding gets right to the last token, the end of the turn included.

    One forward pass decides: greedy decoding says the answer exactly when, after every beginning of
    it, its next token is the most likely one.
    """
    if tokenizer.eos_token_id is None:
        raise MinqwenError(
            "tokenizer_config.json names no eos_token, expected the token that ends a turn; add it"
        )
    chats = []
    for question in questions:
        prompt = tokenizer.encode_chat([{"role": "user", "content": question.prompt}])
        answer = [*tokenizer.encode(question.answer), tokenizer.eos_token_id]
        chats.append(_Chat(prompt, answer))
    chats.sort(key=lambda chat: chat.length)  # chats of about one length go together
    correct = 0
    while chats:
        size = max(1, 2048 // chats[-1].length)
        correct += _count_said(model, chats[-size:])
        del chats[-size:]
    return correct


class _Chat(NamedTuple):
    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


def _count_said(model: Qwen2, chats: list[_Chat]) -> int:
    """How many of the answers the model says, all chats in one forward pass."""
    width = max(chat.length for chat in chats)
    ids = torch.zeros(len(chats), width, dtype=torch.int64)  # what follows a chat does not matter
    is_answer = torch.zeros(len(chats), width, dtype=torch.bool)
    for row, chat in enumerate(chats):
        ids[row, : chat.length] = torch.tensor(chat.prompt + chat.answer)
        is_answer[row, len(chat.prompt) : chat.length] = True
    ids, is_answer = ids.to(model.device), is_answer.to(model.device)
    with torch.no_grad():
        logits = logits_where(model, ids[:, :-1], is_answer[:, 1:])
    right = logits.argmax(-1) == ids[is_answer]
    answers = right.split([len(chat.answer) for chat in chats])
    return sum(bool(answer.all()) for answer in answers)


def logits_where(model: Qwen2, ids: Tensor, wanted: Tensor) -> Tensor:
    """ids [B, T] -> logits [N, V] after the N tokens at which `wanted` [B, T] is true, row by row.

    The other tokens' logits are not computed: with a large vocabulary they are most of the memory.
    """
    B, T = ids.shape
    at = wanted.flatten().nonzero()[:, 0]
    batch = dataclasses.replace(Batch.dense(B, T, device=ids.device), logits_at=at)
    logits: Tensor = model(ids.flatten(), batch)
    return logits
