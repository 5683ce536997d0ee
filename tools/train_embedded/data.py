"""What the embedded model is trained on: the text, and rows of chats.

Every step mixes rows of text and rows of chats (minqwen/lab/tasks.py), so that one model learns all
skills. The loss of a chat counts its answers only: the verses of a haystack are no text to learn,
because they would be seen far more often than the text itself.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections import deque
from concurrent.futures import Executor, Future
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minqwen import Tokenizer
from minqwen.errors import MinqwenError
from minqwen.files import read_text
from minqwen.lab.tasks import (
    NAMES,
    PLACES,
    Chapter,
    haystack,
    is_heldout,
    is_heldout_pair,
    json_question,
    needle_chat,
    parse_chapters,
    sum_question,
    verse_lengths,
)

VERSES = "gen1:1-rev22:21"  # the whole Bible, as the command `bible` wants to be asked for it

# What a target counts as in the loss, and the names of these kinds.
NOTHING, TEXT, SUM, NEEDLE, JSON, REPEAT = range(6)
KINDS = ("nothing", "text", "sum", "needle", "json", "repeat")

LENGTH = 1024  # tokens of a row
CHUNK = 64  # rows that are made at once
USES = 2  # how often a row of chats is used, on average
PROMPT_TOKENS = 24  # at most, of a prompt that shows what a model repeats
AHEAD = 32  # chunks that worker processes make ahead of need

Row = list[tuple[int, int]]  # (token id, what it counts as)
Chunk = tuple[np.ndarray, np.ndarray]  # ids and kinds [CHUNK, LENGTH + 1]


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
    """Rows for one forward pass and its gradients."""

    inputs: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64, the next token
    kinds: Tensor  # [B, T] int64, what a target counts as: a place in KINDS
    from_text: bool = False  # seen many times, so that dropout is wanted

    @staticmethod
    def of(ids: Tensor, kinds: Tensor, from_text: bool = False) -> Examples:
        """ids and kinds [B, T + 1]; what the first id counts as does not matter."""
        ids, kinds = ids.long(), kinds.long()
        return Examples(
            ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), kinds[:, 1:].contiguous(), from_text
        )


# ---- text ---------------------------------------------------------------------------------------


class Text:
    """The chapters as one stream of tokens, and windows of it."""

    def __init__(self, chapters: list[Chapter], tokenizer: Tokenizer, seed: int) -> None:
        self.seed = seed
        (end,) = tokenizer.encode("<|endoftext|>")
        stream: list[int] = []
        starts: list[int] = []  # where each verse begins in the stream
        for chapter in chapters:
            for ids in tokenizer.encode_batch([verse + "\n" for verse in chapter.verses]):
                starts.append(len(stream))
                stream += ids
            stream.append(end)
        self.windows = max(1, len(stream) // LENGTH)
        while len(stream) <= starts[-1] + LENGTH:  # the end goes on at the start
            stream += stream
        self.stream, self.starts = torch.tensor(stream), torch.tensor(starts)

    def window(self, index: int) -> Tensor:
        """[LENGTH + 1] ids, of an endless series of shuffled epochs; they begin with a verse."""
        epoch, window = divmod(index, self.windows)
        place = int(self.places(epoch)[window])
        verse = int(torch.searchsorted(self.starts, place, right=True)) - 1
        start = int(self.starts[max(verse, 0)])
        return self.stream[start : start + LENGTH + 1]

    @lru_cache(maxsize=4)  # noqa: B019  # there is one Text, and it lives as long as the program
    def places(self, epoch: int) -> Tensor:
        """[windows]: the windows of an epoch in its order; another epoch begins them elsewhere."""
        rng = np.random.default_rng([self.seed, epoch])
        shifted = np.arange(self.windows) * LENGTH + rng.integers(LENGTH)
        return torch.from_numpy(rng.permutation(shifted))

    def examples(self, first: int, rows: int, blanked: float, blank: int) -> Examples:
        """Windows `first` and on. A part `blanked` of the inputs, by chance, is the id `blank`."""
        ids = torch.stack([self.window(first + i) for i in range(rows)])
        found = Examples.of(ids, torch.full_like(ids, TEXT), from_text=True)
        if blanked:
            draws = np.random.default_rng([self.seed, first, rows]).random(found.inputs.shape)
            found.inputs[torch.from_numpy(draws < blanked)] = blank
        return found

    def prompts(self, seed: int, rows: int) -> Tensor:
        """[rows, P] ids: the start of a verse and a piece of another one, PROMPT_TOKENS at most.

        No text goes on after such a prompt. After the start of a verse that it knows by heart a
        model does not show how it repeats itself.
        """
        rng = np.random.default_rng([self.seed, seed])
        starts, places = (torch.from_numpy(rng.choice(self.starts.numpy(), rows)) for _ in range(2))
        lengths = rng.integers(3, PROMPT_TOKENS // 2 + 1, 2)
        one, other = (torch.arange(int(length)) for length in lengths)
        places = (places + int(rng.integers(4, 20))) % (len(self.stream) - len(other))
        return torch.cat(
            [self.stream[starts[:, None] + one], self.stream[places[:, None] + other]], 1
        )


# ---- chats --------------------------------------------------------------------------------------


def proper_nouns(verses: list[str]) -> list[str]:
    """Words that have a capital also inside a sentence, and are nowhere written without one."""
    text = "\n".join(verses)
    lower = set(re.findall(r"\b[a-z]+\b", text))
    found = set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b(?![-'])", text))
    return sorted(word for word in found if word.lower() not in lower)


class Chats:
    """Rows of chats, all of LENGTH + 1 tokens. A row's chats are of several skills."""

    LONG_SHARE = 0.4  # of the rows begin with a needle chat of up to a whole row

    def __init__(self, chapters: list[Chapter], tokenizer: Tokenizer, seed: int) -> None:
        self.seed, self.tokenizer = seed, tokenizer
        numbers = range(10, 100)
        self.trained_pairs = [(a, b) for a in numbers for b in numbers if not is_heldout(a, b)]
        self.verses = [verse for chapter in chapters for verse in chapter.verses]
        self.lengths = verse_lengths(tokenizer, self.verses)
        nouns = proper_nouns(self.verses)
        self.listed = sorted({*NAMES, *PLACES})
        self.words = sorted({*nouns, *self.listed})
        (self.end,) = tokenizer.encode("<|endoftext|>")
        self.head = tokenizer.encode("<|im_start|>user\n")
        self.middle = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n")
        self.tail = tokenizer.encode("<|im_end|>\n")

    def chunk(self, index: int, longest: int) -> Chunk:
        """CHUNK rows, which follow from the seed and the index; no chat has more than `longest`
        tokens."""
        rng = random.Random(f"{self.seed} chunk {index}")
        both = np.array([self.row(rng, longest) for _ in range(CHUNK)], dtype=np.uint16)
        return both[..., 0], both[..., 1]

    def row(self, rng: random.Random, longest: int) -> Row:
        """As many chats as fit, and padding."""
        row: Row = []
        if rng.random() < self.LONG_SHARE:
            row = self.needle(rng, rng.randint(min(128, longest), longest))
        while True:
            chat = self.small_chat(rng)
            if len(row) + len(chat) > LENGTH + 1:
                break
            row += chat
        filler = [(self.end, NOTHING)] * (LENGTH + 1)
        return (row + filler)[: LENGTH + 1]

    def small_chat(self, rng: random.Random) -> Row:
        skill = rng.choice((self.sum, self.json, self.json, self.needle))
        return skill(rng)

    def sum(self, rng: random.Random) -> Row:
        """A chat that asks for a sum which is not held out."""
        question = sum_question(*rng.choice(self.trained_pairs))
        return self.turn([question.prompt], question.answer, SUM)

    def json(self, rng: random.Random) -> Row:
        """A sentence to write as JSON, whose words are not held out together; or one word alone.

        A word is other tokens behind a quotation mark than behind a space: the words alone show how
        each is spelled.
        """
        if rng.random() < 0.3:
            word = rng.choice(rng.choice((self.listed, self.words)))
            return self.turn([f"Write {word} as JSON."], json.dumps(word), JSON)
        name = place = ""
        while not name or is_heldout_pair(name, place):
            name = rng.choice(rng.choice((NAMES, self.words)))
            place = rng.choice(rng.choice((PLACES, self.words)))
        question = json_question(rng, name, place)
        return self.turn([question.prompt], question.answer, JSON)

    def needle(self, rng: random.Random, room: int = 0) -> Row:
        """A needle chat of at most about `room` tokens that asks for every needle in turn.

        Without `room` it has next to no haystack: there copying is learnt.
        """
        room = room or rng.randint(48, 160)
        needles = rng.choice((1, 2, 3, 3)) if room > 140 else 1
        verses = haystack(rng, self.verses, self.lengths, room - 42 * needles)
        chat = needle_chat(rng, verses, needles)
        first, *others = chat.questions
        pieces = [piece for piece in chat.pieces if piece]
        pieces[0] = pieces[0].lstrip()
        row = self.turn([*pieces, " " + first.prompt], first.answer, NEEDLE)
        for question in others:
            row += self.turn([question.prompt], question.answer, NEEDLE)
        return row

    def turn(self, parts: list[str], answer: str, kind: int) -> Row:
        """The user's message, in parts, and the answer to it, of which each token counts."""
        row = _row(self.head, NOTHING)
        for text in parts:
            row += _row(self.tokenizer.encode(text), NOTHING)
        row += _row(self.middle, NOTHING)
        row += _row(self.tokenizer.encode(answer), kind)
        row += _row(self.tail[:1], kind)  # <|im_end|>: the model must end its answer
        return row + _row(self.tail[1:], NOTHING)


def _row(ids: list[int], kind: int) -> Row:
    return [(id, kind) for id in ids]


# ---- the supply ---------------------------------------------------------------------------------

_chats: list[Chats] = []  # in a worker process: the one that it makes rows with


def start_worker(chapters: list[Chapter], tokenizer: Path, seed: int) -> None:
    torch.set_num_threads(1)
    _chats.append(Chats(chapters, Tokenizer.from_dir(tokenizer), seed))


def work(index: int, longest: int) -> Chunk:
    return _chats[0].chunk(index, longest)


class Supply:
    """Rows of chats for each step, made by worker processes while the model is trained.

    Which rows a step gets follows from the seed and the number of the step alone. The first chats
    are short; the longest grows by a token with each step. For a model that has learnt them
    already (`grown`) they are as long as a row from the start.
    """

    HELD = 16  # chunks that a step's rows are drawn from

    def __init__(self, chats: Chats, rows: int, pool: Executor | None, grown: bool = False) -> None:
        self.chats, self.rows, self.pool, self.grown = chats, rows, pool, grown
        self.every = max(1, USES * CHUNK // max(rows, 1))  # steps between two chunks
        self.held: deque[Chunk] = deque(maxlen=self.HELD)
        self.coming: deque[Future[Chunk]] = deque()
        self.next = 0  # the number of the next chunk

    def examples(self, step: int) -> Examples:
        newest = step // self.every
        self.next = max(self.next, newest + 1 - self.HELD)  # a resumed run needs no older ones
        while self.next <= newest:
            self.held.append(self.take())
            self.next += 1
        rng = np.random.default_rng([self.chats.seed, step])
        count = len(self.held) * CHUNK
        drawn = rng.choice(count, self.rows, replace=count < self.rows)
        places = [divmod(int(i), CHUNK) for i in drawn]
        ids = np.stack([self.held[chunk][0][row] for chunk, row in places])
        kinds = np.stack([self.held[chunk][1][row] for chunk, row in places])
        return Examples.of(torch.from_numpy(ids), torch.from_numpy(kinds))

    def take(self) -> Chunk:
        """The next chunk; `AHEAD` more are asked for."""
        if self.pool is None:
            return self.chats.chunk(self.next, self.longest(self.next))
        while len(self.coming) <= AHEAD:
            index = self.next + len(self.coming)
            self.coming.append(self.pool.submit(work, index, self.longest(index)))
        return self.coming.popleft().result()

    def longest(self, chunk: int) -> int:
        return LENGTH if self.grown else min(LENGTH, 128 + chunk * self.every)
