"""What the answers of both kinds have in common: usage, tokens and their logprobs as JSON."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from minqwen.engine.outputs import TokenLogprobs
from minqwen.sampling.logprobs import Logprob
from minqwen.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # what JSON has for minus infinity, as OpenAI's server writes it


@dataclass(frozen=True)
class Heading:
    """What every piece of one answer begins with."""

    id: str
    model: str
    fingerprint: str
    created: int

    @classmethod
    def new(cls, prefix: str, model: str, fingerprint: str) -> Heading:
        return cls(f"{prefix}-{secrets.token_hex(16)}", model, fingerprint, int(time.time()))

    def of(self, kind: str, choices: Sequence[dict[str, Any]], **others: Any) -> dict[str, Any]:
        """An answer or a part of one; kind: OpenAI's name for what it is."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
            **others,
        }


@dataclass
class Usage:
    """Tokens of all prompts of one request, and of all their samples."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Spelling:
    """How tokens are written in answers; as_ids: as "token_id:17", which no two tokens share."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False):
        self.tokenizer, self.as_ids = tokenizer, as_ids

    def text(self, id: int) -> str:
        """The token's text; bytes that are no whole character are spelled out, as OpenAI does."""
        if self.as_ids:
            return f"token_id:{id}"
        token = self.tokenizer.token_bytes(id)
        try:
            return token.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)

    def bytes(self, id: int) -> list[int]:
        return list(self.tokenizer.token_bytes(id))


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def likeliest(entry: TokenLogprobs, most: int) -> list[tuple[int, Logprob]]:
    """The `most` likeliest tokens of an entry, which also has the one that was drawn."""
    ordered = sorted(entry.items(), key=lambda item: (-item[1].logprob, item[0]))
    return ordered[:most]


# ---- logprobs of a chat -------------------------------------------------------------------------


def chat_logprobs(
    ids: Sequence[int], entries: Sequence[TokenLogprobs], most: int, spelling: Spelling
) -> dict[str, Any]:
    """{"content": [...]} for the tokens `ids`, each with the `most` likeliest in its place."""
    content = []
    for id, entry in zip(ids, entries):
        top = [_of_chat(i, found, spelling) for i, found in likeliest(entry, most)]
        content.append({**_of_chat(id, entry[id], spelling), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _of_chat(id: int, found: Logprob, spelling: Spelling) -> dict[str, Any]:
    logprob = finite(found.logprob)
    return {"token": spelling.text(id), "logprob": logprob, "bytes": spelling.bytes(id)}


# ---- logprobs of a completion -------------------------------------------------------------------


class Offsets:
    """Where each token's text begins in the text that is shown.

    start: where the first one's does.
    """

    def __init__(self, tokenizer: Tokenizer, start: int, skip_special_tokens: bool):
        self.at = start
        self._decoder = tokenizer.decoder(skip_special_tokens)

    def next(self, id: int) -> int:
        """The place of one more token. Half a character has no width yet."""
        at = self.at
        self.at += len(self._decoder.push([id]))
        return at


def text_logprobs(
    ids: Sequence[int],
    entries: Iterable[TokenLogprobs | None],
    most: int,
    spelling: Spelling,
    offsets: Offsets,
) -> dict[str, Any]:
    """The older shape, four lists.

    The first token of a prompt has no entry. Beside the `most` likeliest is the token itself. Where
    two tokens have the same text, the likelier one is shown.
    """
    tokens: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    places: list[int] = []
    for id, entry in zip(ids, entries):
        tokens.append(spelling.text(id))
        logprobs.append(None if entry is None else finite(entry[id].logprob))
        tops.append(None if entry is None else _top_of_text(id, entry, most, spelling))
        places.append(offsets.next(id))
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": places,
    }


def _top_of_text(id: int, entry: TokenLogprobs, most: int, spelling: Spelling) -> dict[str, float]:
    top: dict[str, float] = {}
    for i, found in [*likeliest(entry, most), (id, entry[id])]:
        top.setdefault(spelling.text(i), finite(found.logprob))
    return top


# ---- vLLM's prompt_logprobs ---------------------------------------------------------------------


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None] | None, most: int, spelling: Spelling
) -> list[dict[str, Any] | None] | None:
    """For each token of the prompt {id: {"logprob", "rank", "decoded_token"}}; None for the first.

    most: how many were asked for; echo may have asked for more.
    """
    if entries is None:
        return None
    return [None if entry is None else _of_prompt(entry, most, spelling) for entry in entries]


def _of_prompt(entry: TokenLogprobs, most: int, spelling: Spelling) -> dict[str, Any]:
    own = next(iter(entry))  # the prompt's token comes first
    kept = {own: entry[own], **dict(likeliest(entry, most))}
    return {
        str(id): {
            "logprob": finite(found.logprob),
            "rank": found.rank,
            "decoded_token": spelling.text(id),
        }
        for id, found in kept.items()
    }
