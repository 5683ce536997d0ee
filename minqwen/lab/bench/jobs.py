"""What is timed: requests of random tokens, the same ones for every contestant."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

KINDS = ("prefill", "decode", "mixed")


class Ask(NamedTuple):
    """One request: the prompt's token ids, and how many tokens are made after it."""

    prompt: list[int]
    new: int


@dataclass(frozen=True)
class Job:
    """`batch` requests that come at the same time.

    prefill: the time to the first token counts. decode: the time of a step in which every request
    gets a token. mixed: the time until all have ended; prompts have from an eighth of `prompt`
    tokens to all of them, and an eighth of `new` tokens or more is made of each.
    """

    kind: str  # one of KINDS
    batch: int
    prompt: int  # tokens of each prompt; of a mixed job, the most
    new: int  # tokens made after each; of a mixed job, the most

    @property
    def name(self) -> str:
        if self.kind == "prefill":
            return f"prefill {self.prompt:,}" + (f" x {self.batch}" if self.batch > 1 else "")
        if self.kind == "decode":
            return f"decode B{self.batch} at {self.prompt:,}"
        return f"{self.batch} ragged requests"

    @property
    def longest(self) -> int:
        """Tokens of the longest request, with its prompt."""
        return self.prompt + self.new

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt tokens, new tokens) of each request. Those of a mixed job never change."""
        if self.kind != "mixed":
            return [(self.prompt, self.new)] * self.batch
        draw = random.Random(0)
        return [
            (
                draw.randint(-(-self.prompt // 8), self.prompt),
                draw.randint(-(-self.new // 8), self.new),
            )
            for _ in range(self.batch)
        ]

    def asks(self, vocab_size: int, seed: int) -> list[Ask]:
        """The requests of one round, whose tokens depend on the seed."""
        draw = random.Random(seed)
        ids = range(vocab_size)
        return [Ask(draw.choices(ids, k=prompt), new) for prompt, new in self.lengths()]


def decode_job(batch: int, context: int, steps: int, step_tokens: int) -> Job:
    """`steps` decode steps in which all take part, after `context` tokens each.

    An engine whose step has at most `step_tokens` tokens starts some requests later than others.
    Those that wait for the last one make more tokens.
    """
    waiting = -(-batch * context // step_tokens) - 1
    return Job("decode", batch, context, 1 + steps + waiting)
