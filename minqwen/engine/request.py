"""A request and its completions: everything that the engine knows of them while they run."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minqwen.engine.blocks import CachedBlock
from minqwen.engine.outputs import (
    CompletionOutput,
    Delta,
    Metrics,
    RequestOutput,
    TokenLogprobs,
)
from minqwen.model.trace import Hook, Seen
from minqwen.sampling.draw import Row
from minqwen.sampling.params import SamplingParams
from minqwen.sampling.stopping import StopChecker
from minqwen.sampling.structured import Constraint
from minqwen.tokenizer import IncrementalDecoder


@dataclass(eq=False, kw_only=True)
class Request:
    """One prompt and what was asked for it."""

    request_id: str
    params: SamplingParams
    prompt_ids: list[int]
    prompt: str | None = None
    arrival: int = 0  # how many requests came before
    salt: str | None = None  # prefixes are shared only with requests of the same salt
    trace: set[str] = field(default_factory=set)  # the points that the caller wants to see
    hooks: list[tuple[set[str], Hook]] = field(default_factory=list)  # called at these points
    metrics: Metrics = field(default_factory=lambda: Metrics(time.perf_counter()))
    completions: list[Completion] = field(default_factory=list)
    forked: bool = False  # whether the completions after the first have joined the queue
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(self.prompt_ids)

    def facts(self) -> dict[str, object]:
        """What must be the same on every rank, besides hooks: names and values, without those that
        are as usual."""
        found: dict[str, object] = {"the prompt": self.prompt_ids, "seed": self.completions[0].seed}
        for one in dataclasses.fields(self.params):
            value = getattr(self.params, one.name)
            if one.name != "seed" and value != one.default:
                found[one.name] = value
        optional = {"cache_salt": self.salt, "trace": sorted(self.trace)}
        return found | {name: value for name, value in optional.items() if value}

    @property
    def reads_prefix_cache(self) -> bool:
        """Not if something is wanted that only computing the prompt's tokens gives."""
        return self.params.prompt_logprobs is None and not self.trace and not self.hooks

    @property
    def writes_prefix_cache(self) -> bool:
        """Not if its keys and values are not what the model alone computes."""
        return not self.hooks

    @property
    def finished(self) -> bool:
        return all(completion.finished for completion in self.completions)

    def output(self, traced: bool = True) -> RequestOutput:
        """The finished request as its caller sees it. traced=False: without what was traced."""
        completions = self.completions
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            outputs=[one.output() if traced else one.untraced_output() for one in completions],
            metrics=self.metrics,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.completions[0].num_cached,
            error=self.error,
        )


class Ending(NamedTuple):
    """Why a completion is finished."""

    reason: str  # "stop", "length", "abort" or "error"
    stop: int | str | None = None  # the stop token or string; None for end of text


@dataclass(eq=False, kw_only=True)
class Completion(Row):
    """One completion of a request, in the making: the only object that stands for it.

    The sampler sees it as a `Row`: `ids` are prompt and output together. The scheduler writes
    `blocks`, `computed`, `records` and the two counts. Nothing else than `append` and `end` decides
    that it is finished.
    """

    request: Request
    max_model_len: int = 1 << 62  # most tokens of prompt and output
    decoder: IncrementalDecoder | None = None
    constraint: Constraint | None = None

    # Where its keys and values are.
    blocks: list[int] = field(default_factory=list)
    computed: int = 0  # of how many ids the keys and values are in the cache
    records: list[CachedBlock] = field(default_factory=list)  # of the full blocks others may find
    num_cached: int = 0  # prompt tokens that came from the prefix cache at first admission
    num_preemptions: int = 0

    # What has come of it.
    text: str = ""
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    ending: Ending | None = None
    trace: dict[str, list[Tensor]] = field(default_factory=dict)

    # How much of it earlier deltas have told: generated ids, characters, and that it is finished.
    told_ids: int = 0
    told_text: int = 0
    told_end: bool = False

    def __post_init__(self) -> None:
        self.stops = StopChecker(self.params)
        if self.params.logprobs is not None:
            self.logprobs, self.cumulative_logprob = [], 0.0

    @property
    def key(self) -> tuple[int, int]:
        """The order of service: by the request's arrival, then by the sample."""
        return self.request.arrival, self.index

    @property
    def finished(self) -> bool:
        return self.ending is not None

    @property
    def missing(self) -> int:
        """How many ids have no keys and values in the cache."""
        return len(self.ids) - self.computed

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the next step's logits are wanted for all its tokens, not for the last only."""
        wanted = self.request.prompt_logprobs is not None
        return wanted and self.index == 0 and self.computed < self.num_prompt

    def take_mask(self) -> None:
        """Let the sampler know which tokens the grammar allows next."""
        if self.constraint is not None:
            self.mask = self.constraint.mask()

    def append(self, token: int, logprobs: TokenLogprobs | None) -> None:
        """Take the next token, extend the text, and decide whether this is the end.

        Raises SamplingError for a token that the grammar does not allow, and for a finished text
        that does not fit its schema.
        """
        if self.constraint is not None:
            self.constraint.accept(token)
        self.ids.append(token)
        if self.logprobs is not None and logprobs is not None:
            self.logprobs.append(logprobs)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + logprobs[token].logprob
        ending = self._ending_of(token)
        text, stop = self._text_of(token, ending)
        self.text += text
        if self.constraint is not None and ending is not None and ending.reason == "stop":
            self.constraint.check(self.text)
        self.ending = ending if stop is None else Ending("stop", stop)

    def end(self, reason: str) -> None:
        """Finish from outside, by "abort" or "error"; a completion that is finished stays so."""
        self.ending = self.ending or Ending(reason)

    def delta(self) -> Delta:
        """What no delta has told yet, and whether that was the end of it and of its request."""
        return self.rest(self.request.output() if self.request.finished else None)

    def rest(self, output: RequestOutput | None) -> Delta:
        """What no delta has told yet, with the output of its request if that is finished."""
        ids, text = self.ids[self.num_prompt + self.told_ids :], self.text[self.told_text :]
        logprobs = None if self.logprobs is None else self.logprobs[self.told_ids :]
        self.told_ids, self.told_text = self.num_output, len(self.text)
        self.told_end = self.finished
        reason, stop = self.ending or (None, None)
        request_id = self.request.request_id
        return Delta(request_id, self.index, text, ids, logprobs, reason, stop, output)

    def output(self) -> CompletionOutput:
        """The finished completion as its caller sees it."""
        return dataclasses.replace(self.untraced_output(), trace=joined_trace(self.trace))

    def untraced_output(self) -> CompletionOutput:
        """The finished completion without what was traced."""
        reason, stop = self.ending or (None, None)
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=self.ids[self.num_prompt :],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=self.logprobs,
            finish_reason=reason,
            stop_reason=stop,
        )

    def _ending_of(self, token: int) -> Ending | None:
        """Why `token`, the last id, ends the completion, if it does; stop strings come later."""
        if self.num_output > self.params.min_tokens:
            if token in self.eos_token_ids and not self.params.ignore_eos:
                return Ending("stop")
            if token in self.params.stop_token_ids:
                return Ending("stop", token)
        if self.constraint is not None and self.constraint.finished:
            return Ending("stop")
        if self.num_output == self.params.max_tokens or len(self.ids) >= self.max_model_len:
            return Ending("length")
        return None

    def _text_of(self, token: int, ending: Ending | None) -> tuple[str, str | None]:
        """The text that `token` lets a reader see, and the stop string that it completes.

        A token that ends the completion as end of text, or the text of a grammar, is no part of it.
        """
        if self.decoder is None:
            return "", None
        text = special = ""
        ends_text = ending == Ending("stop") and token in self.eos_token_ids
        if not (ends_text or (self.constraint is not None and self.constraint.ended)):
            text, special = self.decoder.push([token]), self.decoder.left_out(token)
        if ending is not None:
            text += self.decoder.flush()
        early = self.num_output <= self.params.min_tokens
        return self.stops.push(text, special, final=ending is not None, search=not early)


def joined_trace(trace: dict[str, list[Tensor]]) -> Seen[Tensor | list[Tensor]]:
    """The tensors of all steps as one for each point.

    Scores and patterns stay a list: each step's have another width.
    """
    joined: Seen[Tensor | list[Tensor]] = Seen()
    for name, steps in trace.items():
        by_context = name.endswith(("attn.scores", "attn.pattern"))
        joined[name] = steps if by_context else torch.cat(steps)
    return joined
