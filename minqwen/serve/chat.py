"""/v1/chat/completions: the answer, whole or in pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from minqwen.engine.outputs import CompletionOutput, Delta, RequestOutput, TokenLogprobs
from minqwen.serve.answers import Heading, Spelling, Usage, chat_logprobs, prompt_logprobs
from minqwen.serve.front import Ticket
from minqwen.serve.reports import Begun
from minqwen.serve.requests import ChatRequest
from minqwen.serve.tool_calls import CallParser, CallPiece, Piece
from minqwen.tokenizer import Tokenizer

KIND, CHUNK = "chat.completion", "chat.completion.chunk"


class Chat:
    """One request to /v1/chat/completions and what is told of it.

    prompt: the ids of the chat. finds_calls: whether the text may hold calls of tools.
    """

    def __init__(
        self,
        body: ChatRequest,
        heading: Heading,
        tokenizer: Tokenizer,
        prompt: list[int],
        finds_calls: bool,
    ):
        self.body, self.heading, self.prompt, self.finds_calls = body, heading, prompt, finds_calls
        self.spelling = Spelling(tokenizer, bool(body.return_tokens_as_token_ids))
        self.usage = Usage(prompt=len(prompt))
        self.parsers: dict[int, CallParser] = {}  # of each choice that streams

    # ---- whole ----------------------------------------------------------------------------------

    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        (output,) = outputs
        self.usage.cached += output.num_cached_tokens
        choices = [self.choice(one) for one in output.outputs]
        of_prompt = self.of_prompt(output.prompt_logprobs)
        return self.heading.of(KIND, choices, usage=self.usage.as_json(), **of_prompt)

    def choice(self, one: CompletionOutput) -> dict[str, Any]:
        self.usage.completion += len(one.token_ids)
        message, called = self.message(one.text)
        choice = {
            "index": one.index,
            "message": message,
            "logprobs": self.logprobs_of(one.token_ids, one.logprobs),
            "finish_reason": reason_of(one.finish_reason, called),
            "stop_reason": one.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = one.token_ids
        return choice

    def message(self, text: str) -> tuple[dict[str, Any], bool]:
        """The assistant's message, and whether it calls a tool."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if not self.finds_calls:
            return message, False
        content, calls = "", list[dict[str, Any]]()
        for piece in CallParser().push(text, final=True):
            if isinstance(piece, str):
                content += piece
            elif piece.name is not None:
                calls.append(whole_call(piece))
            else:
                calls[-1]["function"]["arguments"] += piece.arguments
        message["content"] = content if content or not calls else None
        if calls:
            message["tool_calls"] = calls
        return message, bool(calls)

    # ---- in pieces ------------------------------------------------------------------------------

    async def pieces(self, ticket: Ticket) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream. The last one has the usage, if that is wanted."""
        begun = None
        started = set[int]()
        async for event in ticket.events():
            if isinstance(event, Begun):
                begun = event
                self.usage.cached += event.num_cached_tokens
                continue
            if event.index not in started:
                first = not started
                started.add(event.index)
                of_prompt = self.of_prompt(begun.prompt_logprobs if begun else None)
                yield self.chunk(self.first_piece(event.index), **(of_prompt if first else {}))
            for choice in self.choices_of(event):
                yield self.chunk(choice)
        options = self.body.stream_options
        if options is not None and options.include_usage:
            yield self.heading.of(CHUNK, [], usage=self.usage.as_json())

    def chunk(self, choice: dict[str, Any], **others: Any) -> dict[str, Any]:
        options = self.body.stream_options
        if options is not None and options.continuous_usage_stats:
            others["usage"] = self.usage.as_json()
        return self.heading.of(CHUNK, [choice], **others)

    def first_piece(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choices_of(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunks that one delta makes; the first of them has its tokens."""
        self.usage.completion += len(delta.token_ids)
        final = delta.finish_reason is not None
        pieces = self.pieces_of(delta, final)
        told: dict[str, Any] = {"logprobs": self.logprobs_of(delta.token_ids, delta.logprobs)}
        if self.body.return_token_ids:
            told["token_ids"] = delta.token_ids
        choices = [self.piece(delta.index, delta_of(piece)) for piece in pieces]
        if final:
            called = self.finds_calls and self.parsers[delta.index].calls > 0
            reason = reason_of(delta.finish_reason, called)
            last = self.piece(delta.index, {})
            choices.append({**last, "finish_reason": reason, "stop_reason": delta.stop_reason})
        elif not choices and any(told.values()):  # tokens whose text is not certain yet
            choices.append(self.piece(delta.index, {}))
        if choices:
            choices[0].update(told)
        return choices

    def pieces_of(self, delta: Delta, final: bool) -> list[Piece]:
        if not self.finds_calls:
            return [delta.text] if delta.text else []
        parser = self.parsers.setdefault(delta.index, CallParser())
        return parser.push(delta.text, final)

    @staticmethod
    def piece(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    # ---- parts ----------------------------------------------------------------------------------

    def logprobs_of(
        self, ids: Sequence[int], entries: list[TokenLogprobs] | None
    ) -> dict[str, Any] | None:
        if not self.body.logprobs or not ids:
            return None
        return chat_logprobs(ids, entries or [], self.body.top_logprobs or 0, self.spelling)

    def of_prompt(self, entries: list[TokenLogprobs | None] | None) -> dict[str, Any]:
        """vLLM's fields about the prompt, where they were asked for."""
        found: dict[str, Any] = {}
        if self.body.prompt_logprobs is not None:
            most = self.body.prompt_logprobs
            found["prompt_logprobs"] = prompt_logprobs(entries, most, self.spelling)
        if self.body.return_token_ids:
            found["prompt_token_ids"] = self.prompt
        return found


def whole_call(piece: CallPiece) -> dict[str, Any]:
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"id": piece.id, "type": "function", "function": function}


def delta_of(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, str):
        return {"content": piece}
    return {"tool_calls": [piece.as_delta()]}


def reason_of(reason: str | None, called: bool) -> str | None:
    """OpenAI's word for the end of a text that calls tools."""
    return "tool_calls" if called and reason == "stop" else reason
