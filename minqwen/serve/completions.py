"""/v1/completions: the answer, whole or in pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from minqwen.engine.outputs import CompletionOutput, Delta, RequestOutput, TokenLogprobs
from minqwen.serve.answers import (
    Heading,
    Offsets,
    Spelling,
    Usage,
    prompt_logprobs,
    text_logprobs,
)
from minqwen.serve.front import Ticket
from minqwen.serve.reports import Begun
from minqwen.serve.requests import CompletionRequest
from minqwen.tokenizer import Tokenizer

KIND = "text_completion"


class Completions:
    """One request to /v1/completions and what is told of it.

    texts: the prompts' texts, for echo.
    """

    def __init__(
        self,
        body: CompletionRequest,
        heading: Heading,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
        texts: Sequence[str],
    ):
        self.body, self.heading, self.prompts, self.texts = body, heading, prompts, texts
        self.spelling = Spelling(tokenizer, bool(body.return_tokens_as_token_ids))
        self.n = body.n or 1
        self.wants_tokens = body.max_tokens != 0
        self.usage = Usage(prompt=sum(map(len, prompts)))

    # ---- whole ----------------------------------------------------------------------------------

    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = []
        for place, output in enumerate(outputs):
            self.usage.cached += output.num_cached_tokens
            choices += [self.choice(place, output, one) for one in output.outputs]
        return self.heading.of(KIND, choices, usage=self.usage.as_json())

    def choice(self, place: int, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        ids, text, entries = one.token_ids, one.text, one.logprobs
        if not self.wants_tokens:
            ids, text, entries = [], "", []
        self.usage.completion += len(ids)
        logprobs = None
        if self.body.logprobs is not None:
            before = self.echoed(place, output.prompt_logprobs)
            logprobs = self.joined(
                before, self.logprobs_of(ids, entries or [], self.offsets(place))
            )
        choice = {
            "index": place * self.n + one.index,
            "text": self.echo(place) + text,
            "logprobs": logprobs,
            "finish_reason": one.finish_reason if self.wants_tokens else "length",
            "stop_reason": one.stop_reason if self.wants_tokens else None,
            **self.of_prompt(place, output.prompt_logprobs),
        }
        if self.body.return_token_ids:
            choice["token_ids"] = ids
        return choice

    # ---- in pieces ------------------------------------------------------------------------------

    async def pieces(self, ticket: Ticket) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream. The last one has the usage, if that is wanted."""
        offsets: dict[int, Offsets] = {}  # of each choice
        begun: dict[int, Begun] = {}
        async for event in ticket.events():
            place = ticket.place(event)
            if isinstance(event, Begun):
                begun[place] = event
                self.usage.cached += event.num_cached_tokens
                continue
            index = place * self.n + event.index
            if index not in offsets:
                offsets[index] = self.offsets(place)
                first = self.first_piece(place, index, begun[place])
                if first is not None:
                    yield self.chunk(first)
            piece = self.piece(index, event, offsets[index])
            if piece is not None:
                yield self.chunk(piece)
        options = self.body.stream_options
        if options is not None and options.include_usage:
            yield self.heading.of(KIND, [], usage=self.usage.as_json())

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        options = self.body.stream_options
        if options is not None and options.continuous_usage_stats:
            return self.heading.of(KIND, [choice], usage=self.usage.as_json())
        return self.heading.of(KIND, [choice])

    def first_piece(self, place: int, index: int, begun: Begun) -> dict[str, Any] | None:
        """What is told of the prompt; None where nothing is."""
        of_prompt = self.of_prompt(place, begun.prompt_logprobs)
        if not (self.body.echo or of_prompt):
            return None
        logprobs = self.echoed(place, begun.prompt_logprobs) or None
        return {
            "index": index,
            "text": self.echo(place),
            "logprobs": logprobs,
            "finish_reason": None,
            **of_prompt,
        }

    def piece(self, index: int, delta: Delta, offsets: Offsets) -> dict[str, Any] | None:
        """What one delta shows; None where it shows nothing."""
        text, ids, reason = delta.text, delta.token_ids, delta.finish_reason
        if not self.wants_tokens:
            text, ids, reason = "", [], "length" if reason else None
        self.usage.completion += len(ids)
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": reason,
            "stop_reason": delta.stop_reason if self.wants_tokens else None,
        }
        if self.body.logprobs is not None and ids:
            choice["logprobs"] = self.logprobs_of(ids, delta.logprobs or [], offsets)
        if self.body.return_token_ids:
            choice["token_ids"] = ids
        shows = text or reason or (ids and (choice["logprobs"] or self.body.return_token_ids))
        return choice if shows else None

    # ---- parts ----------------------------------------------------------------------------------

    def echo(self, place: int) -> str:
        return self.texts[place] if self.body.echo else ""

    def offsets(self, place: int) -> Offsets:
        """Of the new tokens in the choice's text."""
        skips = self.body.skip_special_tokens is not False
        return Offsets(self.spelling.tokenizer, len(self.echo(place)), skips)

    def echoed(self, place: int, entries: list[TokenLogprobs | None] | None) -> dict[str, Any]:
        """The logprobs of the prompt's tokens, if both are wanted."""
        if not self.body.echo or self.body.logprobs is None:
            return {}
        offsets = Offsets(self.spelling.tokenizer, 0, skip_special_tokens=False)
        return self.logprobs_of(self.prompts[place], entries or [], offsets)

    def logprobs_of(
        self, ids: Sequence[int], entries: Sequence[TokenLogprobs | None], offsets: Offsets
    ) -> dict[str, Any]:
        return text_logprobs(ids, entries, self.body.logprobs or 0, self.spelling, offsets)

    @staticmethod
    def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        return {name: first.get(name, []) + values for name, values in second.items()}

    def of_prompt(self, place: int, entries: list[TokenLogprobs | None] | None) -> dict[str, Any]:
        """vLLM's fields about the prompt, where they were asked for."""
        found: dict[str, Any] = {}
        if self.body.prompt_logprobs is not None:
            most = self.body.prompt_logprobs
            found["prompt_logprobs"] = prompt_logprobs(entries, most, self.spelling)
        if self.body.return_token_ids:
            found["prompt_token_ids"] = self.prompts[place]
        return found
