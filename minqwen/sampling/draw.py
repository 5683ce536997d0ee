"""From a batch of logits to tokens: `warp` and `draw` for many rows at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from minqwen.errors import SamplingError
from minqwen.sampling.logprobs import BLOCK, Logprob, largest, logprobs_of, take, wide
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
    def greedy(self) -> bool:
        return self.params.temperature == 0

    @property
    def penalised(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0

    @property
    def plain(self) -> bool:
        """Greedy, and nothing changes the logits."""
        changed = (
            self.penalised
            or self.params.logit_bias
            or self.num_output < self.params.min_tokens
            or self.bad_words
            or self.mask is not None
        )
        return self.greedy and not changed

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
    words: Sequence[str], encode: Callable[[str], Sequence[int]]
) -> list[tuple[int, ...]]:
    """Token sequences to ban: each word as it stands and, where that starts otherwise, after a space (vLLM).

    Only these tokenisations are banned: a model may still spell a word with other tokens.
    """
    out = {}
    for word in words:
        bare, spaced = tuple(encode(word.lstrip())), tuple(encode(" " + word.lstrip()))
        out[bare] = out[spaced if len(spaced) == len(bare) and spaced[0] != bare[0] else bare] = (
            None
        )
    return list(out)


def sample(
    logits: Tensor, rows: Sequence[Row]
) -> tuple[list[int], list[dict[int, Logprob] | None] | None]:
    """One token per row. logits [B, V], any float dtype and device, are not changed.

    Returns the ids, and the logprobs: None if no row asks for them, else None for each row that does not. An
    id is -1 where none can be drawn: the row's logits hold NaN or +inf, or nothing is allowed.
    """
    tokens: list[int] = [-1] * len(rows)
    plain, other = [], []
    for i, row in enumerate(rows):
        forced, at = row.params.forced_ids, row.num_output
        if forced is not None and at < len(forced):
            tokens[i] = forced[at]
        else:
            (plain if row.plain else other).append(i)
    if plain:
        _put(tokens, plain, _greedy(wide(take(logits, plain))))
    if other:
        x = wide(take(logits, other))
        x = x.clone() if x.data_ptr() == logits.data_ptr() else x.contiguous()
        x = transform(x, [rows[i] for i in other])
        for choose, some in (
            (_greedy, [j for j, i in enumerate(other) if rows[i].greedy]),
            (_random, [j for j, i in enumerate(other) if not rows[i].greedy]),
        ):
            if some:
                at = [other[j] for j in some]
                _put(tokens, at, choose(take(x, some), [rows[i] for i in at]))
    if all(row.params.logprobs is None for row in rows):
        return tokens, None
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None and tokens[i] >= 0]
    logprobs: list[dict[int, Logprob] | None] = [None] * len(rows)
    if asked:
        nums = [rows[i].params.logprobs for i in asked]
        _put(logprobs, asked, logprobs_of(take(logits, asked), [tokens[i] for i in asked], nums))
    return tokens, logprobs


def _put(target: list, at: list[int], values: list) -> None:
    for i, value in zip(at, values, strict=True):
        target[i] = value


def _greedy(x: Tensor, rows: Any = None) -> list[int]:
    # On a CPU numpy's argmax takes a twentieth of torch's time. Both find the first of equals, and NaN first.
    best = torch.from_numpy(x.numpy().argmax(-1)) if x.device.type == "cpu" else x.argmax(-1)
    usable = x.gather(1, best[:, None])[:, 0].isfinite()
    return torch.where(usable, best, -1).tolist()


def transform(x: Tensor, rows: list[Row]) -> Tensor:
    """Penalties, bias and bans on x [R, V], in place, touching only the entries concerned."""
    width, flat = x.shape[1], x.view(-1)

    def entries(parts: list[tuple[int, Any, Any]]) -> tuple[Tensor, Tensor]:
        """(row, ids, a value or one per id) for some rows -> positions in flat, and values, of them all."""
        ids = [np.fromiter(some, np.int64, len(some)) for _, some, _ in parts]
        values = [
            np.full(len(i), v) if isinstance(v, float) else np.fromiter(v, np.float64, len(i))
            for i, (_, _, v) in zip(ids, parts)
        ]
        if (largest := max(i.max() for i in ids)) >= width:
            raise SamplingError(
                f"token id {largest} in a request: expected ids from 0 to {width - 1}"
            )
        at = np.concatenate([i + r * width for i, (r, _, _) in zip(ids, parts)])
        return tuple(
            torch.from_numpy(a).to(x.device, d)
            for a, d in ((at, torch.int64), (np.concatenate(values), x.dtype))
        )

    repeated, subtracted, bias, banned = [], [], [], []
    for r, row in enumerate(rows):
        p = row.params
        if row.penalised:
            row.count()
        if p.repetition_penalty != 1 and row._seen:
            repeated.append((r, row._seen, p.repetition_penalty))
        if (p.frequency_penalty or p.presence_penalty) and row._counts:
            subtracted.append(
                (
                    r,
                    row._counts,
                    [p.frequency_penalty * n + p.presence_penalty for n in row._counts.values()],
                )
            )
        if p.logit_bias:
            bias.append((r, p.logit_bias, p.logit_bias.values()))
        if ban := row.banned():
            banned.append((r, ban, -INF))
    if repeated:
        at, penalty = entries(repeated)
        flat[at] = torch.where(flat[at] < 0, flat[at] * penalty, flat[at] / penalty)
    for parts, sign in ((subtracted, -1), (bias, 1)):
        if parts:
            at, value = entries(parts)
            flat[at] += sign * value
    if banned:
        flat[entries(banned)[0]] = -INF
    for r, row in enumerate(rows):
        if row.mask is not None:
            x[r].masked_fill_(~row.mask.to(x.device), -INF)
    return x


def _random(x: Tensor, rows: list[Row]) -> list[int]:
    """draw(warp(row), u) for a batch x [R, V]. What is decided from a few numbers is decided on the CPU."""
    if x.shape[1] % BLOCK:
        x = pad(x, (0, -x.shape[1] % BLOCK), value=-INF)
    t = torch.tensor([[row.params.temperature] for row in rows], dtype=x.dtype)
    u = torch.tensor(
        [[uniform(row.seed, row.index, row.num_output)] for row in rows],
        dtype=torch.float64,
    )
    top = x.amax(-1, keepdim=True).cpu()
    usable = top[:, 0].isfinite().tolist()
    cuts = [p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in (row.params for row in rows)]
    whole = [i for i in range(len(rows)) if usable[i] and not cuts[i]]
    some = [i for i in range(len(rows)) if usable[i] and cuts[i]]
    ids = [-1] * len(rows)
    if whole:
        _put(ids, whole, _from_whole(take(x, whole), t[whole], top[whole], u[whole]))
    if some:
        params = [rows[i].params for i in some]
        size = max(64, *(2 * p.top_k + 32 for p in params))
        _put(ids, some, _from_largest(take(x, some), t[some], top[some], u[some], params, size))
    return ids


def _pick(w: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First index [R, 1] where the running sum of w [R, N] exceeds target [R, 1]; target less what is before.

    On the CPU the running sum is taken one by one: it never falls, and it grows at weights above 0 only, so
    the index found never has weight 0. Entries of weight 0 more or less change nothing, not even a rounding.
    """
    running = w.cumsum(-1)
    target = torch.minimum(target, torch.nextafter(running[:, -1:], torch.zeros_like(target)))
    i = torch.searchsorted(running, target, right=True)
    return i, target - pad(running, (1, 0)).gather(1, i)


def _block_sums(x: Tensor, t: Tensor, top: Tensor) -> Tensor:
    """Sums by block of exp(x/t - top/t), float64: x [R, V]; t, top [R, 1] -> [R, V / BLOCK] on the CPU."""
    step = 1 if x.device.type == "cpu" else 32  # one row of float64 stays in a CPU's cache
    y = torch.empty_like(x[:step])
    z = torch.empty_like(y, dtype=torch.float64)
    sums = []
    for some, s, limit in zip(
        x.split(step), t.to(x.device).split(step), (top / t).to(x.device).split(step)
    ):
        y, z = y[: len(some)], z[: len(some)]
        z.copy_(torch.div(some, s, out=y)).sub_(limit).exp_()
        sums.append(z.view(len(z), -1, BLOCK).sum(-1).cpu())
    return torch.cat(sums)


def _from_whole(x: Tensor, t: Tensor, top: Tensor, u: Tensor) -> list[int]:
    """No cut: the block first, then the token in it. x [R, V]; t, top (rows' maxima), u [R, 1] on the CPU."""
    sums = _block_sums(x, t, top)
    block, rest = _pick(sums, u * sums.cumsum(-1)[:, -1:])
    at = block * BLOCK + torch.arange(BLOCK)
    w = ((x.gather(1, at.to(x.device)).cpu() / t).double() - top / t).exp()
    return at.gather(1, _pick(w, rest)[0])[:, 0].tolist()


def _from_largest(
    x: Tensor, t: Tensor, top: Tensor, u: Tensor, params: list[SamplingParams], m: int
) -> list[int]:
    """A cut: look at the m largest entries, and, in rows whose cut is not among them, at more.

    x [R, V] before temperature; t, top, u [R, 1] on the CPU. m decides nothing but whether it was enough.
    """
    width = x.shape[1]
    m = min(m, width)
    k = torch.tensor([[p.top_k if 0 < p.top_k < width else width] for p in params])
    cut = torch.tensor([[1 - p.top_p] for p in params], dtype=x.dtype)
    min_p = torch.tensor([[p.min_p] for p in params], dtype=x.dtype)
    values, ids = largest(x, m)
    values = values / t  # keeps the order, but may make equals of neighbours
    last = values.amin(-1, keepdim=True)  # every entry above this one is here
    ids, order = ids.sort()
    values, order = values.gather(1, order).sort(
        descending=True, stable=True
    )  # equals by rising id
    kth = torch.where(k <= m, values.gather(1, (k - 1).clamp(max=m - 1)), -INF)
    w = (values.double() - values[:, :1].double()).exp() * (values >= kth)
    running = w.cumsum(-1)
    total = running[:, -1:].clone()
    if whole := [i for i, p in enumerate(params) if p.top_p < 1 and k[i] == width]:
        total[whole] = _block_sums(take(x, whole), t[whole], top[whole]).cumsum(-1)[:, -1:]
    rest = (
        total - (running - w)
    ) / total  # the probability of a token and all that are less likely
    keep = (w > 0) & ((rest.to(x.dtype) > cut) | (cut == 0)) & (w.to(x.dtype) >= min_p)
    keep[:, 0] = True
    lowest = values.masked_fill(~keep, INF).amin(-1, keepdim=True)
    enough = (
        (lowest > last) & ((kth > last) | (k == width)) | (last == -INF)
    ).tolist()  # -inf: all is here

    w = torch.zeros_like(w).scatter(1, order, w * keep)  # back in the order of ids
    out = ids.gather(1, _pick(w, u * w.cumsum(-1)[:, -1:])[0])[:, 0].tolist()
    if m < width and (more := [i for i, (ok,) in enumerate(enough) if not ok]):
        params = [params[i] for i in more]
        _put(out, more, _from_largest(take(x, more), t[more], top[more], u[more], params, 16 * m))
    return out
