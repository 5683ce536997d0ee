"""Text to token ids and back, and chats to prompts.

A token is a byte string. Encoding cuts a text into pieces and each piece into tokens. Decoding
joins the tokens' bytes and reads them as UTF-8, and that is all: see `Tokenizer.token_bytes` and
`IncrementalDecoder`. backends.py holds the two libraries that do the cutting, chat.py and its
neighbours what chats need, special_tokens.py what a checkpoint says of tokens such as <|im_end|>,
added_tokens.py the search for them.
"""

from __future__ import annotations

import codecs
import functools
import operator
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minqwen.checks import boolean
from minqwen.errors import TokenizerError, a_kind
from minqwen.tokenizer.added_tokens import encode_between, finder, mark, without_marks
from minqwen.tokenizer.backends import ByteLevelBPE, SentencePiece, load_backend
from minqwen.tokenizer.chat import (
    Message,
    check_messages,
    check_objects,
    check_variables,
    generation_prompt,
    read_templates,
    refuse_unknown,
    select_template,
)
from minqwen.tokenizer.chat_template import ChatRenderer
from minqwen.tokenizer.continuation import Tagged, tag_final_message
from minqwen.tokenizer.special_tokens import read_if_there, read_token_config, register_tokens

LONG = 20_000  # characters, which take some milliseconds to encode


class IncrementalDecoder:
    """Tokens in, text out as soon as it is certain: never half a character.

    The pieces that `push` and `flush` return join to exactly `Tokenizer.decode` of all ids. Each
    token costs its own bytes, however long the text. U+FFFD appears only for bytes that no later
    byte can complete.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._restart()

    def _restart(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._invented_spaces = self._tokenizer.invented_spaces

    def push(self, ids: int | Iterable[int]) -> str:
        """The text that `ids` (one or several) complete. TokenizerError for an id out of range."""
        new = []
        for id in ids if isinstance(ids, Iterable) else [ids]:
            token = self._tokenizer.token_bytes(id)
            if int(id) not in self._skipped:
                new.append(self._without_invented_space(token))
        text = self._utf8.decode(b"".join(new))
        # Python waits for a third byte after half of a surrogate, though none can complete it.
        pending = self._utf8.getstate()[0]
        if pending[:1] == b"\xed" and pending[1:] >= b"\xa0":
            text += self._utf8.decode(b"", final=True)
        return text

    def left_out(self, id: int) -> str:
        """The text of a special token that `push` leaves out; "" for any other token."""
        if id not in self._skipped:
            return ""
        return self._tokenizer.token_bytes(id).decode("utf-8", "replace")

    def _without_invented_space(self, token: bytes) -> bytes:
        """The token without the space that encoding put before the text, if it begins the text."""
        if self._invented_spaces and token[:1] == b" ":
            token = token[1:]
            if self._invented_spaces == 1:
                self._invented_spaces = 0  # one space only; 2 is one on every piece at the start
        if token:
            self._invented_spaces = 0
        return token

    def flush(self) -> str:
        """The text that is left when no token follows: U+FFFD for half a character.

        The decoder is then ready for another text.
        """
        rest = self._utf8.decode(b"", final=True)
        self._restart()
        return rest


class Tokenizer:
    """Text <-> ids for one checkpoint directory. Threads may share it. Raises TokenizerError.

    vocab_size         tokens the tokenizer knows; their ids are 0 .. vocab_size - 1
    padded_vocab_size  rows of the model's embedding (config.json's vocab_size) if there are more;
                       the rest decode to ""
    bos_token_id, eos_token_id, pad_token_id, unk_token_id
                       int, or None if tokenizer_config.json names none
    added_tokens       {content: id} of the tokens matched in a text before anything else is done
    special_ids        those of them that `skip_special_tokens` leaves out
    named_tokens       {"eos_token": "<|im_end|>", ...}, which chat templates can read
    chat_templates     {name: Jinja source}; the only one of a checkpoint is called "default"
    """

    def __init__(
        self,
        backend: ByteLevelBPE | SentencePiece,
        config: Mapping[str, Any] | None = None,
        chat_templates: dict[str, str] | None = None,
        padded_vocab_size: int = 0,
    ):
        """config: the contents of tokenizer_config.json and of the older files beside it.

        `from_dir` reads all four.
        """
        config = config or {}
        self._backend = backend
        self._where = backend.source.parent / "tokenizer_config.json"
        self.named_tokens = register_tokens(backend, config)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.pad_token_id = self._named_id("pad_token")
        self.unk_token_id = self._named_id("unk_token")
        added = backend.added()
        self.added_tokens = {token.content: id for id, token in added.items()}
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.vocab_size = backend.size
        self.padded_vocab_size = max(backend.size, padded_vocab_size)
        self.invented_spaces = backend.invented_spaces
        self.chat_templates = chat_templates or {}
        self._prefix, self._suffix = self._affixes(config)
        self._find_added = finder(self.added_tokens)
        self._bytes: dict[int, bytes] = {}
        self._renderer = ChatRenderer()

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """From a directory's tokenizer.json, or vocab.json and merges.txt, or tokenizer.model.

        It also reads tokenizer_config.json, the files that special_tokens.py names, chat templates,
        and config.json's vocab_size.
        """
        path = Path(path)
        config = read_token_config(path)
        backend = load_backend(path, bool(config.get("add_prefix_space")))
        rows = read_if_there(path / "config.json").get("vocab_size")
        templates = read_templates(path, config)
        return cls(backend, config, templates, rows if isinstance(rows, int) else 0)

    def __repr__(self) -> str:
        rows, special = self.padded_vocab_size, len(self.special_ids)
        return (
            f"Tokenizer({self._backend.kind} of {self.vocab_size} tokens"
            + (f" in {rows} rows" if rows > self.vocab_size else "")
            + "".join(f", {name} {token!r}" for name, token in self.named_tokens.items())
            + f", {special} special token{'s' if special != 1 else ''}, {self._backend.source})"
        )

    def _named_id(self, name: str) -> int | None:
        token = self.named_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def _affixes(self, config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids before and after a text.

        As in Hugging Face, add_bos_token and add_eos_token decide if tokenizer_config.json has one
        of them, and the tokenizer's own file otherwise.
        """
        if "add_bos_token" not in config and "add_eos_token" not in config:
            return self._backend.affixes
        bos = self.bos_token_id if config.get("add_bos_token") else None
        eos = self.eos_token_id if config.get("add_eos_token") else None
        return [] if bos is None else [bos], [] if eos is None else [eos]

    # ---- text to ids

    def encode(
        self, text: str, allow_special: bool = True, add_special_tokens: bool = True
    ) -> list[int]:
        """Ids of `text`.

        allow_special       match added tokens such as <|im_end|> in the text, as Hugging Face does.
                            False is for text from people you do not trust: there the same
                            characters are plain text.
        add_special_tokens  put BOS and EOS around the text if the checkpoint wants them; Qwen2.5
                            does not
        """
        return self.encode_batch([text], allow_special, add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], allow_special: bool = True, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` for several texts, on all cores."""
        for text in texts:
            _check_text(text)
        if allow_special:
            batch = self._backend.encode(texts)
        else:
            batch = [self._encode_plain(text) for text in texts]
        if add_special_tokens:
            batch = [self._prefix + ids + self._suffix for ids in batch]
        return batch

    def fewest_tokens(self, text: str) -> int:
        """A number that `encode` does not go below, known without encoding; 0: not known.

        A text of megabytes takes seconds to encode. The tokens of byte-level BPE have all bytes of
        the text in Unicode's form NFC, and none has more than the longest.
        """
        strips = any(token.lstrip or token.rstrip for token in self._backend.added().values())
        if strips or not isinstance(self._backend, ByteLevelBPE):
            return 0
        _check_text(text)
        size = min(len(form.encode()) for form in (text, unicodedata.normalize("NFC", text)))
        return -(-size // self._longest)

    @functools.cached_property
    def _longest(self) -> int:
        """Bytes of the longest token."""
        return max(len(self.token_bytes(i)) for i in range(self.vocab_size))

    def _encode_plain(self, text: str) -> list[int]:
        ids = self._backend.encode_plain(text)
        for id in set(ids).intersection(self.added_tokens.values()):
            raise TokenizerError(
                f"{self._backend.source}: the model itself makes {self.id_to_token(id)!r} "
                "from plain text, so allow_special=False cannot be granted"
            )
        return ids

    # ---- ids to text

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD.

        decode(encode(text)) is the text in Unicode's form NFC.
        """
        decoder = self.decoder(skip_special_tokens)
        return decoder.push(ids) + decoder.flush()

    def decoder(self, skip_special_tokens: bool = False) -> IncrementalDecoder:
        """A decoder for one text, whose tokens arrive one by one."""
        return IncrementalDecoder(self, skip_special_tokens)

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for; b"" for the model's padding rows.

        TokenizerError for an id beyond those.
        """
        id = self._check_id(id)
        if id not in self._bytes:
            self._bytes[id] = self._backend.token_bytes(id) if id < self.vocab_size else b""
        return self._bytes[id]

    def id_to_token(self, id: int) -> str | None:
        """The token as the vocabulary spells it; None for the model's padding rows."""
        return self._backend.id_to_token(id) if self._check_id(id) < self.vocab_size else None

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None if there is none."""
        return self._backend.token_to_id(token)

    def _check_id(self, id: int) -> int:
        try:
            id = operator.index(id)
        except TypeError:
            raise TokenizerError(f"a token id must be an integer, not {a_kind(id)}") from None
        if not 0 <= id < self.padded_vocab_size:
            raise TokenizerError(
                f"token id {id} does not exist; {self._backend.source} has 0 to "
                f"{self.padded_vocab_size - 1}"
            )
        return id

    # ---- chats

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        add_generation_prompt: bool | None = None,
        system: str | None = None,
        chat_template: str | None = None,
        *,
        documents: Sequence[Message] | None = None,
        continue_final_message: bool | str = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenize: bool = False,
        **unknown: Any,
    ) -> str:
        """The prompt for a chat, exactly as Hugging Face renders it.

        messages       [{"role": ..., "content": ..., ...}]; a key whose value is None is left out
        tools          JSON schemas of the functions that the model may call
        add_generation_prompt
                       open the assistant's next turn; None: unless the last message is continued
        system         a system message to put first; refused if the messages begin with one
        chat_template  the name of one of `chat_templates`, or Jinja source to use instead
        documents      [{"title": ..., "text": ...}], for templates that read them
        continue_final_message
                       end the prompt where the last message ends, so that the model goes on with
                       it; a string names the field to continue, such as "reasoning_content"
        chat_template_kwargs
                       whatever else the template reads
        tokenize       only False, which callers of transformers write; see `encode_chat`

        Raises TokenizerError for any other keyword, if there is no template, or if it refuses these
        messages, fails, or needs more time or memory than it may have.
        """
        refuse_unknown([*unknown, "tokenize"] if tokenize else unknown)
        check_objects("tools", tools)
        check_objects("documents", documents)
        directory = self._where.parent
        source = select_template(directory, self.chat_templates, chat_template, tools)
        opens_turn = generation_prompt(add_generation_prompt, continue_final_message)
        chat = Tagged(check_messages(messages, system), "")
        if continue_final_message:
            chat = tag_final_message(chat.messages, continue_final_message, source)
        variables = {
            **self.named_tokens,
            **check_variables(chat_template_kwargs),
            "documents": documents,
            "tools": tools,
            "messages": chat.messages,
            "add_generation_prompt": opens_turn,
        }
        try:
            prompt = self._renderer.render(source, variables)
            _check_text(prompt)
        except TokenizerError as error:
            raise TokenizerError(f"{directory}: chat template: {error}") from None
        return chat.cut(prompt) if continue_final_message else prompt

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        add_generation_prompt: bool | None = None,
        system: str | None = None,
        chat_template: str | None = None,
        allow_special: bool = True,
        check_fewest: Callable[[int], None] | None = None,
        **options: Any,
    ) -> list[int]:
        """Ids of `apply_chat_template`'s prompt, without BOS: the template writes its own.

        allow_special  False encodes added tokens inside messages, tools, documents and variables as
                       plain characters: no message can end its turn and begin another. Those that
                       the template writes are still tokens.
        check_fewest   is told `fewest_tokens` before a long prompt is encoded; it may raise
        options        the other keywords of `apply_chat_template`
        """
        if not boolean("allow_special", allow_special, error=TokenizerError):
            messages, system = mark(check_messages(messages, system), self._find_added), None
            tools = mark(tools, self._find_added)
            for name in ("documents", "chat_template_kwargs"):
                options[name] = mark(options.get(name), self._find_added)
        prompt = self.apply_chat_template(
            messages, tools, add_generation_prompt, system, chat_template, **options
        )
        if check_fewest is not None and len(prompt) > LONG:
            check_fewest(self.fewest_tokens(without_marks(prompt)))
        if allow_special:
            return self.encode(prompt, add_special_tokens=False)
        return encode_between(prompt, self._find_added, self.added_tokens, self._encode_plain)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"text must be a str, not {a_kind(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character "
            f"{error.start}; decode the bytes it came from as UTF-8"
        ) from None
