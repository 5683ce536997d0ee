"""What an engine said of its tokens: ids, and log probabilities of some of them.

A record is one text. The engine gave log probabilities of its own tokens, perhaps of a few more
tokens at the same places, or it only chose its tokens greedily. Records come from an endpoint
(lab/audit/client.py) or from a JSONL file (`read_jsonl`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from minqwen.checks import is_finite, is_id_text, is_integer
from minqwen.config import ModelConfig
from minqwen.errors import MinqwenError
from minqwen.files import and_more, lines_of, parse_json, quoted, read_text
from minqwen.tokenizer.chat import Message

IMPOSSIBLE = -9999.0  # what vLLM writes for a token that cannot be drawn; JSON has no infinity
MOST = 1e-2  # a log probability this far above 0 is still rounding
KEYS = ("prompt_token_ids", "token_ids", "logprobs")


class Entry(NamedTuple):
    """The log probability of one token at one place, after the tokens before it.

    position: an index into the record's ids, at least 1.
    """

    position: int
    token: int
    logprob: float  # at most 0, or -inf


@dataclass(frozen=True)
class Record:
    """One text of an engine.

    ids: the prompt's and the answer's. prompt: how many of them are the prompt's. greedy: whether
    each token of the answer is the one that the engine finds most probable. messages: the chat that
    the prompt was made of, where it is one. from_text: the answer was a text, and its tokens are
    those of our tokenizer. where: it in words, for errors.
    """

    ids: tuple[int, ...]
    prompt: int
    entries: tuple[Entry, ...]
    greedy: bool = False
    messages: tuple[Message, ...] | None = None
    from_text: bool = False
    where: str = "the record"

    def with_prompt(self, prompt: Sequence[int]) -> Record:
        """The same answer after another prompt. What was said of the prompt itself is dropped."""
        moved = len(prompt) - self.prompt
        entries = tuple(
            Entry(position + moved, token, logprob)
            for position, token, logprob in self.entries
            if position >= self.prompt
        )
        ids = (*prompt, *self.ids[self.prompt :])
        return replace(self, ids=ids, prompt=len(prompt), entries=entries)


def check_record(record: Record, config: ModelConfig) -> None:
    """Raise MinqwenError for ids that the model does not have, and for a text too long for it."""
    where = record.where
    tokens = dict.fromkeys([*record.ids, *(entry.token for entry in record.entries)])
    wrong = [id for id in tokens if not 0 <= id < config.vocab_size]
    if wrong:
        raise MinqwenError(
            f"{where}: token id {quoted(wrong[0], 40)}{and_more(wrong)}, expected 0 to "
            f"{config.vocab_size - 1}: are these the tokens of this model?"
        )
    if len(record.ids) > config.context_length:
        raise MinqwenError(
            f"{where}: {len(record.ids)} tokens, and the model's context is "
            f"{config.context_length}; leave the record out"
        )


def checked_logprob(where: str, value: Any) -> float:
    """A log probability out of JSON. Raises MinqwenError unless it can be one."""
    if isinstance(value, float) and value == -math.inf:
        return value
    if not is_finite(value):
        raise MinqwenError(
            f"{where} is {quoted(value, 40)}, expected a log probability: a number up to 0, or "
            "-Infinity"
        )
    if value > MOST:
        raise MinqwenError(
            f"{where} is {value:.6g}, expected a natural logarithm of a probability: at most 0"
        )
    return -math.inf if value <= IMPOSSIBLE else float(value)


def read_jsonl(path: Path, config: ModelConfig) -> list[Record]:
    """The records of a file, one JSON object in a line. Raises MinqwenError, which names the line.

    Keys: `prompt_token_ids`, `token_ids`, `logprobs` (of the token_ids). Optional:
    `prompt_logprobs` (as many as prompt_token_ids, the first null), `top_logprobs` (for each of the
    token_ids an object {token id: log probability}), `temperature` (0: the tokens are greedy),
    `messages` (the chat that the prompt was made of). Other keys are ignored.
    """
    records = []
    for number, line in enumerate(lines_of(read_text(path, MinqwenError)), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = as_record(parse_json(line.encode(), where, MinqwenError), where)
        check_record(record, config)
        records.append(record)
    if not records:
        raise MinqwenError(f"{path}: holds no record, expected one JSON object in each line")
    return records


def as_record(value: Any, where: str) -> Record:
    """The record that a JSON object describes, as `read_jsonl` says."""
    missing = [key for key in KEYS if not isinstance(value, dict) or key not in value]
    if missing:
        raise MinqwenError(f"{where}: no {missing[0]!r}, expected an object with {', '.join(KEYS)}")
    prompt = list_of_ids(f"{where}: prompt_token_ids", value["prompt_token_ids"])
    ids = list_of_ids(f"{where}: token_ids", value["token_ids"])
    if not prompt or not ids:
        raise MinqwenError(f"{where}: prompt_token_ids and token_ids must hold a token each")
    first = len(prompt)
    entries = [
        *given_entries(f"{where}: prompt_logprobs", value.get("prompt_logprobs"), prompt, 0),
        *given_entries(f"{where}: logprobs", value["logprobs"], ids, first),
        *top_entries(f"{where}: top_logprobs", value.get("top_logprobs"), ids, first),
    ]
    return Record(
        ids=(*prompt, *ids),
        prompt=first,
        entries=tuple(entries),
        greedy=value.get("temperature") == 0,
        messages=as_messages(f"{where}: messages", value.get("messages")),
        where=where,
    )


def list_of_ids(where: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(is_integer(id) for id in value):
        raise MinqwenError(f"{where} is {quoted(value, 60)}, expected a list of token ids")
    return value


def check_length(where: str, value: Any, count: int) -> None:
    if not isinstance(value, list) or len(value) != count:
        found = len(value) if isinstance(value, list) else quoted(value, 40)
        raise MinqwenError(f"{where}: {found}, expected a list of {count}, one for each token")


def given_entries(where: str, value: Any, ids: list[int], first: int) -> list[Entry]:
    """Entries of the tokens themselves; null, or no list at all, where nothing is known."""
    if value is None:
        return []
    check_length(where, value, len(ids))
    return [
        Entry(first + i, ids[i], checked_logprob(f"{where}[{i}]", each))
        for i, each in enumerate(value)
        if each is not None and first + i > 0
    ]


def top_entries(where: str, value: Any, ids: list[int], first: int) -> list[Entry]:
    """Entries of other tokens at the same places: {token id: log probability} for each token."""
    if value is None:
        return []
    check_length(where, value, len(ids))
    entries = []
    for i, each in enumerate(value):
        if not isinstance(each, dict) or not all(map(is_id_text, each)):
            raise MinqwenError(
                f"{where}[{i}] is {quoted(each, 60)}, expected an object {{token id: number}}"
            )
        for key, logprob in each.items():
            if int(key) != ids[i]:
                at = f"{where}[{i}][{key}]"
                entries.append(Entry(first + i, int(key), checked_logprob(at, logprob)))
    return entries


def as_messages(where: str, value: Any) -> tuple[Message, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise MinqwenError(f"{where} is {quoted(value, 60)}, expected a list of messages")
    return tuple(value)


def at_most(records: Sequence[Record], tokens: int) -> list[Record]:
    """The first records, as many as have up to `tokens` tokens together; one at least."""
    chosen: list[Record] = []
    total = 0
    for record in records:
        total += len(record.ids)
        if chosen and total > tokens:
            break
        chosen.append(record)
    return chosen
