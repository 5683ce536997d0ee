"""From a batch of logits to tokens: what changes the logits of each row, then the choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minqwen.errors import SamplingError
from minqwen.sampling.kernels import draw_many, put, take
from minqwen.sampling.logprobs import Logprob, logprobs_of, wide
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
        for *head, last in self.bad_words:
            n = len(head)
            if n <= self.num_output and (n == 0 or self.ids[-n:] == head):
                banned.append(last)
        return banned


def bad_word_ids(
    words: Iterable[str], encode: Callable[[str], Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Token sequences to ban: each word as it stands and after a space (vLLM's rule).

    The one after a space counts only if it is as long and begins with another token. Only these
    tokenisations are banned: a model may still spell a word with other tokens.
    """
    found: dict[tuple[int, ...], None] = {}  # an ordered set
    for word in words:
        bare, spaced = tuple(encode(word.lstrip())), tuple(encode(" " + word.lstrip()))
        found[bare] = None
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            found[spaced] = None
    return tuple(found)


def sample(
    logits: Tensor, rows: Sequence[Row]
) -> tuple[list[int], list[dict[int, Logprob] | None] | None]:
    """One token per row. logits [B, V], any float dtype and device, are not changed.

    Returns the ids, and the logprobs: None if no row asks for them, else None for each row that
    does not. An id is -1 where none can be drawn: the row's logits hold NaN or +inf, or nothing is
    allowed. Raises SamplingError for a row that names an id outside the logits.
    """
    tokens = [-1] * len(rows)
    plain, changed = [], []
    for i, row in enumerate(rows):
        forced = row.forced
        if forced is not None:
            tokens[i] = forced
        elif row.plain:
            plain.append(i)
        else:
            changed.append(i)
    if plain:
        put(tokens, plain, _greedy(wide(take(logits, plain))))
    if changed:
        some = [rows[i] for i in changed]
        put(tokens, changed, _choose(transform(_copied(logits, changed), some), some))
    return tokens, _logprobs(logits, rows, tokens)


def _copied(logits: Tensor, at: list[int]) -> Tensor:
    """Some rows in a wide dtype, contiguous, and not the caller's memory."""
    x = wide(take(logits, at))
    return x.clone() if x.data_ptr() == logits.data_ptr() else x.contiguous()


def _logprobs(
    logits: Tensor, rows: Sequence[Row], tokens: list[int]
) -> list[dict[int, Logprob] | None] | None:
    """The logprobs that rows ask for, where a token was found."""
    nums = [row.params.logprobs for row in rows]
    if all(num is None for num in nums):
        return None
    found: list[dict[int, Logprob] | None] = [None] * len(rows)
    asked = [i for i, num in enumerate(nums) if num is not None and tokens[i] >= 0]
    if asked:
        ids, some = [tokens[i] for i in asked], [nums[i] or 0 for i in asked]
        for i, entry in zip(asked, logprobs_of(take(logits, asked), ids, some), strict=True):
            found[i] = entry
    return found


def _choose(x: Tensor, rows: list[Row]) -> list[int]:
    """A token for each row of transformed logits x [R, V]: the largest, or a drawn one."""
    greedy = [i for i, row in enumerate(rows) if row.greedy]
    random = [i for i, row in enumerate(rows) if not row.greedy]
    tokens = [-1] * len(rows)
    if greedy:
        put(tokens, greedy, _greedy(take(x, greedy)))
    if random:
        some = [rows[i] for i in random]
        u = [uniform(row.seed, row.index, row.num_output) for row in some]
        put(tokens, random, draw_many(take(x, random), [row.params for row in some], u))
    return tokens


def _greedy(x: Tensor) -> list[int]:
    """The largest entry of each row of x [R, V], of equals the first; -1 if it is not finite."""
    # On a CPU numpy's argmax takes a twentieth of torch's time. Both find NaN before any number.
    best = torch.from_numpy(x.numpy().argmax(-1)) if x.device.type == "cpu" else x.argmax(-1)
    usable = x.gather(1, best[:, None])[:, 0].isfinite()
    ids: list[int] = torch.where(usable, best, -1).tolist()
    return ids


def transform(x: Tensor, rows: Sequence[Row]) -> Tensor:
    """Penalties, bias and bans on x [R, V], in place: only the entries concerned are touched.

    x is contiguous. Raises SamplingError for an id outside the logits.
    """
    for row in rows:
        if row.penalised:
            row.count()
    _penalise_repetition(x, rows)
    _penalise_frequency(x, rows)
    _add_bias(x, rows)
    _ban(x, rows)
    return x


def _penalise_repetition(x: Tensor, rows: Sequence[Row]) -> None:
    at, penalties = [], []
    for r, row in enumerate(rows):
        penalty, seen = row.params.repetition_penalty, row._seen
        if penalty != 1 and seen:
            at.append((r, seen))
            penalties.append(np.full(len(seen), penalty))
    if at:
        flat, where, factor = x.view(-1), _positions(x, at), _numbers(x, penalties)
        scores = flat[where]
        flat[where] = torch.where(scores < 0, scores * factor, scores / factor)


def _penalise_frequency(x: Tensor, rows: Sequence[Row]) -> None:
    """frequency_penalty times the count in the output, and presence_penalty."""
    at, penalties = [], []
    for r, row in enumerate(rows):
        p, counts = row.params, row._counts
        if (p.frequency_penalty or p.presence_penalty) and counts:
            at.append((r, counts))
            times = np.fromiter(counts.values(), np.float64, len(counts))
            penalties.append(p.frequency_penalty * times + p.presence_penalty)
    if at:
        x.view(-1)[_positions(x, at)] -= _numbers(x, penalties)


def _add_bias(x: Tensor, rows: Sequence[Row]) -> None:
    at, biases = [], []
    for r, row in enumerate(rows):
        bias = row.params.logit_bias
        if bias:
            at.append((r, bias))
            biases.append(np.fromiter(bias.values(), np.float64, len(bias)))
    if at:
        x.view(-1)[_positions(x, at)] += _numbers(x, biases)


def _ban(x: Tensor, rows: Sequence[Row]) -> None:
    """What a row bans, and all that its mask does not allow."""
    banned = [(r, row.banned()) for r, row in enumerate(rows)]
    at = [(r, ids) for r, ids in banned if ids]
    if at:
        x.view(-1)[_positions(x, at)] = -INF
    for r, row in enumerate(rows):
        if row.mask is not None:
            x[r].masked_fill_(~row.mask.to(x.device), -INF)


def _positions(x: Tensor, at: Sequence[tuple[int, Collection[int]]]) -> Tensor:
    """Where the ids of some rows, [(row, ids), ...], lie in x.view(-1): int64 [N]."""
    width = x.shape[1]
    parts = []
    for r, ids in at:
        part = np.fromiter(ids, np.int64, len(ids))
        if part.max() >= width:
            raise SamplingError(
                f"token id {part.max()} in a request: expected ids from 0 to {width - 1}"
            )
        parts.append(part + r * width)
    return torch.from_numpy(np.concatenate(parts)).to(x.device)


def _numbers(x: Tensor, parts: list[NDArray[np.float64]]) -> Tensor:
    """All the numbers, rounded to x's dtype, on its device."""
    return torch.from_numpy(np.concatenate(parts)).to(x.device, x.dtype)
