"""What comes back: vLLM's shapes and names."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CompletionOutput:
    """One of a request's n completions, so far or finished."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict] | None = None  # per token: {id: Logprob}
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"; None while it runs
    stop_reason: int | str | None = None  # the stop token or string; None for end of text
    # What was asked for with `trace`, by name: [tokens, ...] of all that went through the model; final_norm and
    # logits where a token was drawn; scores and pattern as a list with a tensor [H, T, L] for each step.
    trace: dict = field(default_factory=dict, repr=False)


@dataclass
class Metrics:
    """Seconds, by the clock of this process."""

    arrival: float
    first_token: float | None = None
    finished: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    def tokens_per_second(self, num_tokens: int) -> float | None:
        """Decode speed: tokens after the first, over the time after the first."""
        if (
            self.first_token is None
            or self.finished is None
            or num_tokens < 2
            or self.finished == self.first_token
        ):
            return None
        return (num_tokens - 1) / (self.finished - self.first_token)


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: Metrics
    prompt_logprobs: list[dict | None] | None = None  # per prompt token; None for the first
    num_cached_tokens: int = 0  # prompt tokens whose keys and values came from the prefix cache
    error: str | None = None
