"""What the embedded model is trained on: the text, and the batches that are made of it.

Every step mixes text, sums and needle chats (minqwen/lab/tasks.py), so that one model learns all
three. The loss of a chat counts its answers only; the verses of a needle chat count as text.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minqwen import Tokenizer
from minqwen.errors import MinqwenError
from minqwen.files import read_text
from minqwen.lab.tasks import (
    Chapter,
    haystack,
    is_heldout,
    needle_chat,
    parse_chapters,
    sum_question,
    verse_lengths,
)

VERSES = "gen1:1-rev22:21"  # the whole Bible, as the command `bible` wants to be asked for it

# What a target counts as in the loss.
NOTHING, TEXT, ANSWER = 0, 1, 2

Row = list[tuple[int, int]]  # (token id, what it counts as)


def read_bible(path: Path | None) -> list[Chapter]:
    """The King James Version from `bible -f`, or from a file of what that prints.

    Raises MinqwenError if it cannot be read, or has fewer than 50 chapters: of those, none would be
    held out.
    """
    chapters = parse_chapters(_bible_command() if path is None else _text_file(path))
    if len(chapters) < 50:
        raise MinqwenError(
            f"the text has {len(chapters)} chapters, expected at least 50 (the Bible has 1,189); "
            f"give all that `bible -f {VERSES}` prints"
        )
    return chapters


def _text_file(path: Path) -> str:
    if not path.exists():
        raise MinqwenError(f"--text {path}: does not exist; write `bible -f {VERSES}` to a file")
    return read_text(path, MinqwenError)


def _bible_command() -> str:
    if shutil.which("bible") is None:
        raise MinqwenError("no command `bible` here: `apt-get install bible-kjv`, or --text FILE")
    done = subprocess.run(["bible", "-f", VERSES], capture_output=True, text=True)
    if done.returncode != 0:
        raise MinqwenError(
            f"`bible -f {VERSES}` ended with {done.returncode} ({done.stderr.strip()}), "
            "expected 0; install bible-kjv again, or give --text FILE"
        )
    return done.stdout


class Examples(NamedTuple):
    """A batch for one thread."""

    skill: str  # of its answers, "sum" or "needle"
    inputs: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64, the next token
    kinds: Tensor  # [B, T] int64: NOTHING, TEXT or ANSWER


class Data:
    """The batches of each step. They follow from the seed and the number of the step alone, so that
    a training can be stopped and go on."""

    SHORT_ROWS, NEEDLE_ROWS, LONG_ROWS, SUM_ROWS = 7, 4, 1, 32
    SHORT, LONG, SUM = 256, 1024, 48  # tokens

    def __init__(self, chapters: list[Chapter], tokenizer: Tokenizer, seed: int) -> None:
        self.seed, self.tokenizer = seed, tokenizer
        numbers = range(10, 100)
        self.trained_pairs = [(a, b) for a in numbers for b in numbers if not is_heldout(a, b)]
        self.verses = [verse for chapter in chapters for verse in chapter.verses]
        self.lengths = verse_lengths(tokenizer, self.verses)
        (self.end,) = tokenizer.encode("<|endoftext|>")
        self.head = tokenizer.encode("<|im_start|>user\n")
        self.middle = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n")
        self.tail = tokenizer.encode("<|im_end|>\n")
        stream: list[int] = []
        starts: list[int] = []  # where each verse begins in the stream
        for chapter in chapters:
            for ids in tokenizer.encode_batch([verse + "\n" for verse in chapter.verses]):
                starts.append(len(stream))
                stream += ids
            stream.append(self.end)
        self.windows = len(stream) // self.SHORT
        self.stream = torch.tensor(
            stream + stream[: self.SHORT + 1]
        )  # the end goes on at the start
        self.starts = torch.tensor(starts)

    def step(self, step: int) -> list[Examples]:
        """Even steps: text, short needle chats, a row of long ones. Odd steps: text, sums.

        The two batches cost about the same, one for each of two threads.
        """
        rng = random.Random(f"{self.seed} step {step}")
        even_texts = self.SHORT_ROWS - self.NEEDLE_ROWS  # an odd step has SHORT_ROWS of them
        first = step // 2 * (even_texts + self.SHORT_ROWS)
        if step % 2 == 0:
            rows = [self.text(first + i) for i in range(even_texts)]
            rows += [self.needles(rng, self.SHORT) for _ in range(self.NEEDLE_ROWS)]
            long = [self.needles(rng, self.LONG) for _ in range(self.LONG_ROWS)]
            other = self.examples("needle", long, self.LONG)
        else:
            rows = [self.text(first + even_texts + i) for i in range(self.SHORT_ROWS)]
            sums = [self.sum(rng) for _ in range(self.SUM_ROWS)]
            other = self.examples("sum", sums, self.SUM)
        return [self.examples("needle", rows, self.SHORT), other]

    def examples(self, skill: str, rows: list[Row], length: int) -> Examples:
        """The rows, cut or padded to `length` inputs and the targets that follow them."""
        filler = [(self.end, NOTHING)] * (length + 1)
        both = torch.tensor([(row + filler)[: length + 1] for row in rows])  # [B, T + 1, 2]
        ids, kinds = both.unbind(-1)
        return Examples(
            skill, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), kinds[:, 1:].contiguous()
        )

    def text(self, index: int) -> Row:
        """Window `index` of an endless series of shuffled epochs; each begins with a verse."""
        epoch, window = divmod(index, self.windows)
        rng = random.Random(f"{self.seed} epoch {epoch}")
        offset = rng.randrange(self.SHORT)
        place = rng.sample(range(self.windows), self.windows)[window] * self.SHORT + offset
        verse = int(torch.searchsorted(self.starts, place, right=True)) - 1
        start = int(self.starts[max(verse, 0)])
        return _row(self.stream[start : start + self.SHORT + 1].tolist(), TEXT)

    def sum(self, rng: random.Random) -> Row:
        """A chat that asks for a sum which is not held out."""
        question = sum_question(*rng.choice(self.trained_pairs))
        return self.turn([(question.prompt, NOTHING)], question.answer)

    def needles(self, rng: random.Random, length: int) -> Row:
        """A row of needle chats. Half of them have next to no haystack: there copying is learnt."""
        row: Row = []
        while (left := length - len(row)) >= 56:  # a shorter chat would not fit
            short = rng.random() < 0.5
            chat = self.needle(rng, rng.randint(48, min(96, left) if short else left))
            if len(chat) <= left + 1:  # the last target lies after the last input
                row += chat
        return row

    def needle(self, rng: random.Random, room: int) -> Row:
        """A needle chat of at most about `room` tokens that asks for every needle in turn."""
        needles = rng.choice((1, 2, 3, 3)) if room > 160 else 1
        verses = haystack(rng, self.verses, self.lengths, room - 42 * needles)
        chat = needle_chat(rng, verses, needles)
        first, *others = chat.questions
        parts = [(piece, NOTHING if i % 2 else TEXT) for i, piece in enumerate(chat.pieces)]
        parts = [(piece, kind) for piece, kind in parts if piece]
        parts[0] = (parts[0][0].lstrip(), parts[0][1])
        row = self.turn([*parts, (" " + first.prompt, NOTHING)], first.answer)
        for question in others:
            row += self.turn([(question.prompt, NOTHING)], question.answer)
        return row

    def turn(self, parts: list[tuple[str, int]], answer: str) -> Row:
        """The user's message, in parts with what each counts as, and the answer to it."""
        row = _row(self.head, NOTHING)
        for text, kind in parts:
            row += _row(self.tokenizer.encode(text), kind)
        row += _row(self.middle, NOTHING)
        row += _row(self.tokenizer.encode(answer), ANSWER)
        row += _row(self.tail[:1], ANSWER)  # <|im_end|>: the model must end its answer
        return row + _row(self.tail[1:], NOTHING)


def _row(ids: list[int], kind: int) -> Row:
    return [(id, kind) for id in ids]
