"""What an endpoint is asked, and the records that its answers make.

It is asked for the most telling thing first: log probabilities of a text that we choose (vLLM's
`prompt_logprobs`, or `echo`). If that is not offered: log probabilities of what it writes itself,
in a completion or in a chat, and at last greedy text alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minqwen.checks import is_id_text, is_integer
from minqwen.errors import MinqwenError
from minqwen.files import quoted
from minqwen.lab.audit.client import Endpoint, NotOffered
from minqwen.lab.audit.evidence import Original
from minqwen.lab.audit.pieces import LOST, Pieces
from minqwen.lab.audit.records import Entry, Record, checked_logprob, list_of_ids
from minqwen.tokenizer import Tokenizer

TOKENS = 300  # of the texts whose log probabilities are asked for
LONGEST = 150  # tokens of one text
STARTS = 3  # texts that the endpoint continues
START = 24  # tokens of each
WRITTEN = 100  # tokens that it writes after each
CHATTED = 48  # tokens of each of its answers in a chat
TOP = 5  # tokens at each place of a chat, the most that OpenAI's own interface gave for long

QUESTIONS = (
    "What is 47 + 38?",
    "Tell me a story of a shepherd who lost a sheep and found it again.",
    "List the numbers from one to twenty, and say which of them are prime.",
)

TEXT = """\
On the morning of the third day the ship came round the northern cape, and those who stood on the
wall counted her sails twice before they believed it. "She was to carry 240 barrels of oil," the
harbour master said, "and I see nine men and a goat." Nobody laughed. The river had risen 3.5 metres
since Sunday, the bridge at Aldmoor was gone, and the price of bread stood at 17 pence.

A function that sorts a list in place may be written in a few lines:

    def insertion_sort(items):
        for i in range(1, len(items)):
            j = i
            while j > 0 and items[j - 1] > items[j]:
                items[j - 1], items[j] = items[j], items[j - 1]
                j -= 1

It needs about n * n / 4 comparisons on average, so that 1,000 items take 250,000 of them. In the
beginning this does not matter; in the end it is all that matters. The old woman put the letter
back into the drawer, turned the key, and went down to the water, where the children were throwing
stones at the moon. And it came to pass, when the days were accomplished, that the king called his
servants together, and said unto them, Who among you hath kept the gate this night? Then answered
the youngest, Lord, it was I; and behold, I have seen a light upon the hills. "Wie spät ist es?"
asked the traveller; es war halb sieben. Water boils at 100 degrees Celsius (212 degrees
Fahrenheit) at sea level, and at 93 degrees on a mountain of 2,100 metres.
"""


@dataclass
class Answers:
    """What came back.

    texts: records of completions. chats: records of chats. offered: how log probabilities were
    got, in words. notes: what else was seen. prompts_differ: whether the endpoint makes other
    tokens of a text than our tokenizer.
    """

    texts: list[Record] = field(default_factory=list)
    chats: list[Record] = field(default_factory=list)
    offered: str = ""
    notes: list[str] = field(default_factory=list)
    prompts_differ: bool = False


def ask(
    endpoint: Endpoint, original: Original, name: str | None = None, text: str = TEXT
) -> Answers:
    """Ask an endpoint what it offers, and for that.

    name: the model's name there; None: the first that it lists. text: what to ask about. Raises
    MinqwenError for an endpoint that offers nothing, or whose answers cannot be.
    """
    if original.tokenizer is None:
        raise MinqwenError(f"{original.path}: no tokenizer, and an endpoint reads texts")
    return Asking(endpoint, original, original.tokenizer, name, text).all()


class Asking:
    """One conversation with an endpoint."""

    def __init__(
        self,
        endpoint: Endpoint,
        original: Original,
        tokenizer: Tokenizer,
        name: str | None,
        text: str,
    ):
        self.endpoint, self.original, self.tokenizer = endpoint, original, tokenizer
        self.pieces = Pieces(tokenizer, original.config.vocab_size)
        self.answers = Answers()
        self.name = name or self.first_model()
        self.text = text
        self.ids = tokenizer.encode(text, add_special_tokens=False)[:TOKENS]
        if len(self.ids) < 2 * START:
            raise MinqwenError(f"the text has {len(self.ids)} tokens, expected {2 * START} or more")

    def first_model(self) -> str:
        """The name of the first model that the endpoint lists; "default" where it lists none."""
        try:
            listed = self.endpoint.get("/models").get("data")
        except NotOffered:
            listed = None
        if isinstance(listed, list) and listed and isinstance(listed[0], dict):
            name = listed[0].get("id")
            if isinstance(name, str) and name:
                return name
        self.answers.notes.append("the endpoint lists no models: --name tells it which one")
        return "default"

    def all(self) -> Answers:
        self.ask_about_texts()
        if not self.answers.texts:
            self.ask_for_continuations()
        self.check_tokens_of_text()
        self.ask_for_chats()
        if not self.answers.texts and not self.answers.chats:
            raise MinqwenError(
                f"{self.endpoint.base}: it offers neither completions nor chats: "
                f"{'; '.join(self.answers.notes) or 'it refused all questions'}"
            )
        return self.answers

    # ---- log probabilities of our texts

    def ask_about_texts(self) -> None:
        for offered, extra, read in (
            ("prompt_logprobs", {"prompt_logprobs": 1}, self.read_prompt_logprobs),
            ("echo", {"echo": True, "logprobs": 1}, self.read_echo),
        ):
            records = []
            for ids in self.texts():
                answer = self.complete(ids, extra, 1)
                record = None if answer is None else read(ids, answer)
                if record is None:
                    break
                records.append(record)
            else:
                self.answers.texts, self.answers.offered = records, f"completions with {offered}"
                return

    def texts(self) -> list[list[int]]:
        longest = min(LONGEST, self.original.config.context_length - 1)
        return [self.ids[i : i + longest] for i in range(0, len(self.ids), longest)]

    def complete(self, ids: list[int], extra: Mapping[str, Any], count: int) -> Any:
        """The first choice of a completion of `ids`; None where the endpoint refuses the question.

        Greedy, so that what the endpoint's sampler does is not reported.
        """
        body = {"model": self.name, "prompt": ids, "max_tokens": count, "temperature": 0, **extra}
        try:
            return self.choice(self.endpoint.post("/completions", body))
        except NotOffered as refusal:
            self.note_once(f"refused: {', '.join(extra) or 'completions'} ({refusal})")
            return None

    def note_once(self, note: str) -> None:
        if note not in self.answers.notes:
            self.answers.notes.append(note)

    def choice(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """choices[0], with what some servers put beside `choices`."""
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise MinqwenError(
                f"{self.endpoint.base}: the answer's choices are {quoted(choices, 60)}, expected "
                "a list with an object"
            )
        beside = {key: answer.get(key) for key in ("prompt_logprobs", "prompt_token_ids", "usage")}
        return {**{k: v for k, v in beside.items() if v is not None}, **choices[0]}

    def where(self, what: str) -> str:
        return f"{self.endpoint.base}: {what}"

    def read_prompt_logprobs(self, ids: list[int], answer: Mapping[str, Any]) -> Record | None:
        """vLLM's: for each token but the first an object {token id: {"logprob": number, ...}}."""
        given = answer.get("prompt_logprobs")
        if given is None:
            return None
        self.check_count("prompt_logprobs", given, len(ids))
        entries: list[Entry] = []
        for position in range(1, len(ids)):
            where = self.where(f"prompt_logprobs[{position}]")
            each = given[position]
            if not isinstance(each, dict) or str(ids[position]) not in each:
                raise MinqwenError(
                    f"{where} is {quoted(each, 60)}, expected an object with token "
                    f"{ids[position]}: it is the next one of the text"
                )
            for key, value in each.items():
                logprob = value.get("logprob") if isinstance(value, dict) else value
                if not is_id_text(key):
                    raise MinqwenError(f"{where}: {quoted(key, 40)}, expected a token id")
                entries.append(Entry(position, int(key), checked_logprob(where, logprob)))
        return Record(tuple(ids), len(ids), tuple(entries), where=self.where("the echoed text"))

    def read_echo(self, ids: list[int], answer: Mapping[str, Any]) -> Record | None:
        """The older interface: `tokens` and `token_logprobs` of the prompt and what follows."""
        given = answer.get("logprobs")
        if not isinstance(given, dict) or "token_logprobs" not in given:
            return None
        tokens, logprobs = given.get("tokens"), given["token_logprobs"]
        if not isinstance(logprobs, list) or not isinstance(tokens, list):
            raise MinqwenError(
                self.where(f"token_logprobs is {quoted(logprobs, 60)}, expected a list with tokens")
            )
        if len(logprobs) <= 1:
            return None  # those of the one token that it wrote: echo was ignored
        if len(tokens) != len(logprobs) or len(logprobs) < len(ids):
            raise MinqwenError(
                self.where(
                    f"{len(tokens)} tokens and {len(logprobs)} token_logprobs, expected "
                    f"{len(ids)} of the prompt and one more"
                )
            )
        self.compare_pieces(ids, tokens)
        entries = [
            Entry(i, ids[i], checked_logprob(self.where(f"token_logprobs[{i}]"), logprobs[i]))
            for i in range(1, len(ids))
        ]
        return Record(tuple(ids), len(ids), tuple(entries), where=self.where("the echoed text"))

    def check_count(self, what: str, given: Any, count: int) -> None:
        if not isinstance(given, list) or len(given) != count:
            found = f"{len(given)} of them" if isinstance(given, list) else quoted(given, 40)
            raise MinqwenError(self.where(f"{what}: {found}, expected {count}, one for each token"))

    def compare_pieces(self, ids: list[int], tokens: Sequence[Any]) -> None:
        """Say so if the echoed text is of other tokens than those that were asked about."""
        for i, (id, piece) in enumerate(zip(ids, tokens)):
            found = self.pieces.id_of(piece)
            if found not in (None, id):
                self.answers.prompts_differ = True
                self.note_once(
                    f"token {i} of the echoed text is {quoted(piece, 40)}, and was "
                    f"{quoted(self.tokenizer.decode([id]), 40)}: another tokenizer"
                )
                return

    # ---- what the endpoint writes

    def ask_for_continuations(self) -> None:
        """Greedy continuations, with log probabilities if they are given."""
        step = max(1, (len(self.ids) - START) // STARTS)
        room = self.original.config.context_length - START
        for i in range(STARTS):
            ids = self.ids[i * step : i * step + START]
            count = min(WRITTEN, room)
            answer = self.complete(ids, {"logprobs": 1}, count)
            if answer is None:
                answer = self.complete(ids, {}, count)
            if answer is None:
                return
            record = self.written(ids, answer, answer.get("text"))
            if record is not None:
                self.answers.texts.append(record)
        given = any(record.entries for record in self.answers.texts)
        self.answers.offered = f"completions with {'logprobs' if given else 'greedy text alone'}"

    def written(
        self,
        prompt: Sequence[int],
        answer: Mapping[str, Any],
        text: Any,
        messages: tuple[dict[str, Any], ...] | None = None,
    ) -> Record | None:
        """The record of a greedy answer to `prompt`; None if nothing was written."""
        if not isinstance(text, str):
            raise MinqwenError(self.where(f"the text is {quoted(text, 60)}, expected a string"))
        tokens, logprobs, tops = self.told(answer.get("logprobs"))
        if tokens:
            ids = self.ids_given(answer) or self.pieces.ids_of(self.endpoint.base, tokens, text)
            if len(ids) != len(tokens):
                raise MinqwenError(self.where(f"{len(ids)} token_ids and {len(tokens)} tokens"))
        else:
            ids = self.ids_given(answer) or self.tokens_of(text)
        entries = [
            Entry(len(prompt) + i, ids[i], checked_logprob(self.where(f"logprobs[{i}]"), value))
            for i, value in enumerate(logprobs)
        ]
        for i, others in enumerate(tops):
            entries += self.others(len(prompt) + i, ids[i], others)
        record = Record(
            (*prompt, *ids),
            len(prompt),
            tuple(entries),
            greedy=True,
            messages=messages,
            from_text=not tokens and self.ids_given(answer) is None,
            where=self.where("what it wrote"),
        )
        return record if ids else None

    def tokens_of(self, text: str) -> list[int]:
        """Our tokens of what it wrote. A character may have been cut off at the end."""
        return self.tokenizer.encode(text.rstrip(LOST), add_special_tokens=False)

    def ids_given(self, answer: Mapping[str, Any]) -> list[int] | None:
        """The answer's tokens as vLLM gives them with return_token_ids."""
        ids = answer.get("token_ids")
        return None if ids is None else list_of_ids(self.where("token_ids"), ids)

    def told(self, given: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """Tokens, their log probabilities, and others at the same places, in either interface."""
        if not isinstance(given, dict):
            return [], [], []
        if given.get("content") is not None:
            return self.told_by_place(given["content"])
        tokens, logprobs = given.get("tokens") or [], given.get("token_logprobs") or []
        if not isinstance(tokens, list):
            raise MinqwenError(self.where(f"tokens is {quoted(tokens, 60)}, expected a list"))
        self.check_count("token_logprobs", logprobs, len(tokens))
        return tokens, logprobs, []

    def told_by_place(self, content: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """As chats tell it, and llama.cpp's completions: one object for each place."""
        if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
            raise MinqwenError(self.where(f"logprobs are {quoted(content, 60)}, expected a list"))
        tops = [each.get("top_logprobs") or [] for each in content]
        return content, [each.get("logprob") for each in content], tops

    def others(self, position: int, chosen: int, given: Any) -> list[Entry]:
        """Entries of the other tokens at a place, those that are tokens of ours."""
        if not isinstance(given, list):
            raise MinqwenError(self.where(f"top_logprobs is {quoted(given, 60)}, expected a list"))
        entries = {}
        for each in given:
            id = self.pieces.id_of(each)
            if id is not None and id != chosen and isinstance(each, dict):
                logprob = checked_logprob(self.where("top_logprobs"), each.get("logprob"))
                entries[id] = Entry(position, id, logprob)
        return list(entries.values())

    # ---- the prompt's tokens

    def check_tokens_of_text(self) -> None:
        """Whether the endpoint counts as many tokens in a text as our tokenizer."""
        text = self.tokenizer.decode(self.ids[:START])
        ours = len(self.tokenizer.encode(text))
        body = {"model": self.name, "prompt": text, "max_tokens": 1, "temperature": 0}
        try:
            answer = self.choice(self.endpoint.post("/completions", body))
        except NotOffered:
            return
        self.compare_counts("a text", answer, ours)

    def compare_counts(self, what: str, answer: Mapping[str, Any], ours: int) -> None:
        usage = answer.get("usage")
        theirs = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if is_integer(theirs) and theirs != ours:
            self.answers.prompts_differ = True
            self.note_once(f"{what} has {quoted(theirs, 30)} tokens there and {ours} here")

    def ask_for_chats(self) -> None:
        for question in QUESTIONS:
            messages: tuple[dict[str, Any], ...] = ({"role": "user", "content": question},)
            try:
                prompt = self.tokenizer.encode_chat(list(messages))
            except MinqwenError as error:
                self.note_once(f"chats are not asked for: {error}")
                return
            if len(prompt) + CHATTED > self.original.config.context_length:
                return
            answer = self.chat(messages)
            if answer is None:
                return
            self.compare_counts("a chat", answer, len(prompt))
            message = answer.get("message")
            text = message.get("content") if isinstance(message, dict) else None
            record = self.written(prompt, answer, "" if text is None else text, messages)
            if record is not None:
                self.answers.chats.append(record)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """The first choice, with log probabilities if they are given; None if chats are refused."""
        body = {
            "model": self.name,
            "messages": list(messages),
            "max_tokens": CHATTED,
            "temperature": 0,
        }
        for extra in ({"logprobs": True, "top_logprobs": TOP}, {}):
            try:
                return self.choice(self.endpoint.post("/chat/completions", {**body, **extra}))
            except NotOffered as refusal:
                self.note_once(f"refused: chats{' with logprobs' if extra else ''} ({refusal})")
        return None
