"""What comes back: values with vLLM's names, which never change once they are handed out."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from minqwen.sampling.logprobs import Logprob

TokenLogprobs = dict[int, Logprob]  # {id: logprob} of the chosen token and of the likeliest ones


@dataclass(frozen=True)
class CompletionOutput:
    """One of a request's n completions, finished."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # nats
    logprobs: list[TokenLogprobs] | None = None  # for each token
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"
    stop_reason: int | str | None = None  # the stop token or string; None for end of text
    # What was asked for with `trace`, by name: [tokens, ...] of all that went through the model;
    # final_norm and logits where a token was drawn; scores and pattern as a list with a tensor
    # [H, T, L] for each step.
    trace: dict[str, Tensor | list[Tensor]] = field(default_factory=dict, repr=False)

    def finished(self) -> bool:
        """vLLM's method; here always true."""
        return self.finish_reason is not None


@dataclass
class Metrics:
    """Moments in seconds, by the clock of this process: only differences mean something.

    The names that end in `_time` or `_latency` are vLLM's for the same.
    """

    arrival: float
    first_token: float | None = None
    finished: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def arrival_time(self) -> float:
        return self.arrival

    @property
    def first_token_time(self) -> float | None:
        return self.first_token

    @property
    def finished_time(self) -> float | None:
        return self.finished

    @property
    def last_token_time(self) -> float | None:
        return self.finished

    @property
    def first_token_latency(self) -> float | None:
        return self.time_to_first_token

    def tokens_per_second(self, num_tokens: int) -> float | None:
        """Decode speed: tokens after the first, over the time after the first."""
        if self.first_token is None or self.finished is None:
            return None
        seconds = self.finished - self.first_token
        return (num_tokens - 1) / seconds if num_tokens > 1 and seconds > 0 else None


@dataclass(frozen=True)
class RequestOutput:
    """A whole request, finished."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: Metrics
    finished: bool = True
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # for each token; None for the first
    num_cached_tokens: int = 0  # prompt tokens whose keys and values came from the prefix cache
    error: str | None = None  # why it failed, in one line


@dataclass(frozen=True)
class Delta:
    """What is new of one completion: `step` returns these.

    All deltas of a completion together are the completion: texts joined, ids and logprobs one after
    another. A text holds never half a character and never a part of a stop string, so it may be
    empty although there is a new token. finish_reason comes with the completion's last delta, and
    `output` with the last delta of the whole request.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    output: RequestOutput | None = None
