"""How much one client may ask for, and how much is served at a time."""

from __future__ import annotations

from dataclasses import dataclass

from minqwen.serve.errors import ApiError


@dataclass(frozen=True)
class Limits:
    """Whoever asks for more is refused before the engine sees the request.

    body_bytes: of a request. requests: prompts that run or wait, of all clients; beyond them a
    client is told to come again (429). queue_seconds: how long a prompt may wait before its first
    step (then 503); None: for ever. prompts: of one request. n: samples of each prompt. logprobs:
    likeliest tokens at each place. stops, stop_characters: stop strings and bad words of one
    request, and their length. biases: entries of logit_bias. tools: of one chat; messages: too.
    schema_characters: of a JSON schema, a regex, a grammar, or all parameters of tools.
    """

    body_bytes: int = 16 << 20
    requests: int = 256
    queue_seconds: float | None = 600
    prompts: int = 1024
    n: int = 128
    logprobs: int = 20
    stops: int = 32
    stop_characters: int = 1000
    biases: int = 1024
    tools: int = 128
    messages: int = 4096
    schema_characters: int = 64 << 10

    def check(self, name: str, count: int, most: int, what: str = "items") -> None:
        """Raise ApiError if there are more than `most` of what the field `name` has."""
        if count > most:
            raise ApiError(400, f"{name} has {count} {what}: expected at most {most}", param=name)
