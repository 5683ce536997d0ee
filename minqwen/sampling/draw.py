"""From a batch of logits to tokens: what changes the logits of each row, then the choice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minqwen.model.arithmetic import Native
from minqwen.sampling.kernels import draw_many, partition, put, take
from minqwen.sampling.logprobs import NATIVE, Logprob, logprobs_of, wide
from minqwen.sampling.params import SamplingParams
from minqwen.sampling.warp import INF, uniform


@dataclass(eq=False, kw_only=True)
class Row:
    """One sequence as the sampler sees it. Keep it as long as the sequence lives: it counts ids.

    The place of the next token among the generated ones is `num_output`: with `seed` and `index`
    it decides which random number draws that token.
    """

    params: SamplingParams
    ids: list[int]  # prompt and output; only ever appended to
    num_prompt: int  # how many of ids are the prompt
    seed: int  # params.seed or, where that is None, one that the engine drew, the same on all ranks
    index: int = 0  # which of the request's n samples
    eos_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()  # from bad_word_ids()
    mask: Tensor | None = None  # bool [V], True where a token may come next
    # For the penalties: the ids in prompt and output, how often each is in the output, and how
    # many of `ids` these two cover. A step looks at the new ids only, not at the prompt again.
    _seen: dict[int, None] = field(default_factory=dict, init=False, repr=False)
    _counts: Counter[int] = field(default_factory=Counter, init=False, repr=False)
    _counted: int = field(default=0, init=False, repr=False)

    @property
    def num_output(self) -> int:
        """How many tokens have been generated."""
        return len(self.ids) - self.num_prompt

    @property
    def forced(self) -> int | None:
        """The token that comes next whatever the logits are, if there is one."""
        ids = self.params.forced_ids
        if ids is None or self.num_output >= len(ids):
            return None
        return ids[self.num_output]

    @property
    def greedy(self) -> bool:
        return self.params.temperature == 0

    @property
    def penalised(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0

    @property
    def plain(self) -> bool:
        """Greedy, and nothing changes the logits."""
        p = self.params
        return not (
            p.temperature != 0
            or p.logit_bias
            or self.bad_words
            or self.mask is not None
            or (p.min_tokens and self.num_output < p.min_tokens)
            or self.penalised
        )

    def count(self) -> None:
        """Count the ids that have come since the last call."""
        self._seen.update(dict.fromkeys(self.ids[self._counted :]))
        self._counts.update(self.ids[max(self._counted, self.num_prompt) :])
        self._counted = len(self.ids)

    def banned(self) -> list[int]:
        """Ids that would complete a bad word, and those that end the text before min_tokens."""
        banned: list[int] = []
        if self.num_output < self.params.min_tokens:
            banned += self.params.stop_token_ids
            if not self.params.ignore_eos:
                banned += self.eos_token_ids
        banned += [last for *head, last in self.bad_words if self._output_ends_with(head)]
        return banned

    def _output_ends_with(self, head: list[int]) -> bool:
        start = len(self.ids) - len(head)
        return start >= self.num_prompt and self.ids[start:] == head


def bad_word_ids(
    words: Iterable[str], encode: Callable[[str], Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Token sequences to ban: each word as it stands and after a space, however long each is.

    vLLM bans the one after a space only if it is as long as the other: then most words of Qwen2.5's
    vocabulary, one token after a space and several without, may still be written. Only these two
    tokenisations are banned: a model may still spell a word with other tokens.
    """
    found: dict[tuple[int, ...], None] = {}  # an ordered set
    for word in words:
        found[tuple(encode(word.lstrip()))] = None
        found[tuple(encode(" " + word.lstrip()))] = None
    return tuple(found)


def sample(
    logits: Tensor, rows: Sequence[Row], ops: Native = NATIVE
) -> tuple[list[int], list[dict[int, Logprob] | None] | None]:
    """One token per row. logits [B, V], any float dtype and device, are not changed.

    ops: the arithmetic of what is summed. Under exact arithmetic tokens and logprobs follow from
    the logits in the same way on every machine.

    Returns the ids, and the logprobs: None if no row asks for them, else None for each row that
    does not. An id is -1 where none can be drawn: the row's scores hold NaN or +inf, or nothing is
    allowed, or the row forces or changes an id outside the logits. No row raises an error: that
    would stop its neighbours too.
    """
    tokens = [-1] * len(rows)
    plain, changed = [], []
    for i, row in enumerate(rows):
        forced = row.forced
        if forced is not None:
            tokens[i] = forced if forced < logits.shape[1] else -1
        elif row.plain:
            plain.append(i)
        else:
            changed.append(i)
    if plain:
        put(tokens, plain, _greedy(wide(take(logits, plain))))
    if changed:
        some = [rows[i] for i in changed]
        put(tokens, changed, _choose(transform(_copied(logits, changed), some), some, ops))
    return tokens, _logprobs(logits, rows, tokens, ops)


def _copied(logits: Tensor, at: list[int]) -> Tensor:
    """Some rows in a wide dtype, contiguous, and not the caller's memory."""
    x = wide(take(logits, at))
    return x.clone() if x.data_ptr() == logits.data_ptr() else x.contiguous()


def _logprobs(
    logits: Tensor, rows: Sequence[Row], tokens: list[int], ops: Native
) -> list[dict[int, Logprob] | None] | None:
    """The logprobs that rows ask for, where a token was found."""
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return None
    found: list[dict[int, Logprob] | None] = [None] * len(rows)
    drawn = [i for i in asked if tokens[i] >= 0]
    if drawn:
        ids = [tokens[i] for i in drawn]
        nums = [rows[i].params.logprobs or 0 for i in drawn]
        put(found, drawn, logprobs_of(take(logits, drawn), ids, nums, ops))
    return found


def _choose(x: Tensor, rows: Sequence[Row], ops: Native) -> list[int]:
    """A token for each row of transformed logits x [R, V]: the largest, or a drawn one."""
    greedy, random = partition(row.greedy for row in rows)
    tokens = [-1] * len(rows)
    if greedy:
        put(tokens, greedy, _greedy(take(x, greedy)))
    if random:
        put(tokens, random, _random(take(x, random), [rows[i] for i in random], ops))
    return tokens


def _random(x: Tensor, rows: Sequence[Row], ops: Native) -> list[int]:
    """A token drawn for each row of x [R, V], each with its own random number."""
    u = [uniform(row.seed, row.index, row.num_output) for row in rows]
    return draw_many(x, [row.params for row in rows], u, ops)


def _greedy(x: Tensor) -> list[int]:
    """The largest entry of each row of x [R, V], of equals the first; -1 if it is not finite."""
    # On a CPU numpy's argmax takes a twentieth of torch's time. Both find NaN before any number.
    best = torch.from_numpy(x.numpy().argmax(-1)) if x.device.type == "cpu" else x.argmax(-1)
    usable = x.gather(1, best[:, None])[:, 0].isfinite()
    ids: list[int] = torch.where(usable, best, -1).tolist()
    return ids


class Entries:
    """Entries of logits x [R, V] and a number for each: collected row by row, changed at once."""

    def __init__(self, x: Tensor):
        self.x, self.width = x, x.shape[1]
        self.places: list[NDArray[np.int64]] = []
        self.parts: list[NDArray[np.float64]] = []

    def add(self, row: int, ids: Collection[int], numbers: NDArray[np.float64]) -> None:
        """Some ids of a row. An id outside the logits makes the row NaN: it has no token then."""
        if not ids:
            return
        if max(ids) >= self.width:
            self.x[row] = math.nan
            return
        places = np.fromiter(ids, np.int64, len(ids))
        self.places.append(places + row * self.width)
        self.parts.append(numbers)

    @property
    def found(self) -> bool:
        return bool(self.places)

    def where(self) -> Tensor:
        """The places of all the entries in x.view(-1): int64 [N]."""
        return torch.from_numpy(np.concatenate(self.places)).to(self.x.device)

    def numbers(self) -> Tensor:
        """The number of each entry [N], in x's dtype."""
        return torch.from_numpy(np.concatenate(self.parts)).to(self.x.device, self.x.dtype)


def transform(x: Tensor, rows: Sequence[Row]) -> Tensor:
    """Penalties, bias and bans on x [R, V], in place: only the entries concerned are touched.

    x is contiguous. A row that changes an id outside the logits becomes NaN.
    """
    for row in rows:
        if row.penalised:
            row.count()
    _penalise_repetition(x, rows)
    _penalise_frequency(x, rows)
    _add_bias(x, rows)
    _ban(x, rows)
    _mask(x, rows)
    return x


def _penalise_repetition(x: Tensor, rows: Sequence[Row]) -> None:
    """Ids in the prompt or the output: divided by the penalty, or multiplied if negative."""
    entries = Entries(x)
    for r, row in enumerate(rows):
        penalty = row.params.repetition_penalty
        if penalty != 1:
            entries.add(r, row._seen, np.full(len(row._seen), penalty))
    if entries.found:
        flat, where, factor = x.view(-1), entries.where(), entries.numbers()
        scores = flat[where]
        flat[where] = torch.where(scores < 0, scores * factor, scores / factor)


def _penalise_frequency(x: Tensor, rows: Sequence[Row]) -> None:
    """Ids in the output: less frequency_penalty times their count, and less presence_penalty."""
    entries = Entries(x)
    for r, row in enumerate(rows):
        p, counts = row.params, row._counts
        if p.frequency_penalty or p.presence_penalty:
            times = np.fromiter(counts.values(), np.float64, len(counts))
            entries.add(r, counts, p.frequency_penalty * times + p.presence_penalty)
    if entries.found:
        x.view(-1)[entries.where()] -= entries.numbers()


def _add_bias(x: Tensor, rows: Sequence[Row]) -> None:
    entries = Entries(x)
    for r, row in enumerate(rows):
        bias = row.params.logit_bias
        if bias:
            entries.add(r, bias, np.fromiter(bias.values(), np.float64, len(bias)))
    if entries.found:
        x.view(-1)[entries.where()] += entries.numbers()


def _ban(x: Tensor, rows: Sequence[Row]) -> None:
    entries = Entries(x)
    for r, row in enumerate(rows):
        # The model cannot choose what it has no logit for, such as an eos id beyond its vocabulary.
        banned = [i for i in row.banned() if i < x.shape[1]]
        entries.add(r, banned, np.full(len(banned), -INF))
    if entries.found:
        x.view(-1)[entries.where()] = -INF


def _mask(x: Tensor, rows: Sequence[Row]) -> None:
    for r, row in enumerate(rows):
        if row.mask is not None:
            x[r].masked_fill_(~row.mask.to(x.device), -INF)
