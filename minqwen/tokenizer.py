"""Text to token ids and back, and chats to prompts.

A token is a byte string. Encoding cuts a text into pieces and each piece into tokens; decoding joins the
tokens' bytes and reads them as UTF-8, and that is all: see `Tokenizer.token_bytes` and `IncrementalDecoder`.
Two libraries do the cutting, `tokenizers` (byte-level BPE, Qwen2.5's) and `sentencepiece`. chat_template.py
renders the templates.
"""

from __future__ import annotations

import codecs
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from minqwen.chat_template import ChatRenderer
from minqwen.errors import TokenizerError

# How Qwen2 cuts a text before BPE: contractions; words with one leading character; single digits; punctuation
# with a leading space; line ends; and white space, whose last blank is left to the word that follows.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Noncharacters, which no text holds: around added tokens that a user typed, see `Tokenizer.encode_chat`.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes, as printable characters, in the order of their token ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


class ByteLevelBPE:
    """The `tokenizers` library, from tokenizer.json or from vocab.json and merges.txt."""

    alphabet = _byte_alphabet()
    invented_spaces = 0

    def __init__(self, library: tokenizers.Tokenizer, source: Path):
        self.library, self.source = library, source
        decoder = json.loads(library.decoder.__getstate__())["type"] if library.decoder else None
        if decoder != "ByteLevel":
            raise TokenizerError(
                f"{source}: its decoder is {decoder}; only ByteLevel, Qwen2's, is supported"
            )
        if any(library.token_to_id(symbol) is None for symbol in self.alphabet):
            raise TokenizerError(
                f"{source}: the vocabulary lacks some of the 256 byte symbols, so texts "
                "would lose characters; train it with the whole byte alphabet"
            )
        library.no_truncation()
        library.no_padding()
        # What tokenizer.json's post-processor puts before and after a text; Qwen2.5's nothing.
        whole, bare = (library.encode("a", add_special_tokens=flag).ids for flag in (True, False))
        start = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
        self.affixes = whole[:start], whole[start + len(bare) :]
        self.plain = tokenizers.Tokenizer(library.model)  # the same model, but no added tokens
        self.plain.normalizer, self.plain.pre_tokenizer = library.normalizer, library.pre_tokenizer
        self.added, self.add = (
            library.get_added_tokens_decoder,
            lambda token: library.add_tokens([token]),
        )
        self.token_to_id, self.id_to_token = library.token_to_id, library.id_to_token

    @classmethod
    def from_json(cls, path: Path) -> ByteLevelBPE:
        backend = cls(_load(path, lambda: tokenizers.Tokenizer.from_file(str(path))), path)
        if any(backend.id_to_token(id) is None for id in range(backend.size)):
            raise TokenizerError(
                f"{path}: {backend.size} tokens, but their ids are not 0 to "
                f"{backend.size - 1}, one each; fetch the file again"
            )
        return backend

    @classmethod
    def from_vocab(cls, vocab: Path, merges: Path, add_prefix_space: bool) -> ByteLevelBPE:
        """Qwen2's pipeline around a vocabulary: Unicode's form NFC, the split above, bytes, BPE."""
        ids = _read_json(vocab).values()
        if any(type(id) is not int for id in ids) or sorted(ids) != list(range(len(ids))):
            raise TokenizerError(
                f"{vocab}: {len(ids)} tokens, but their ids are not 0 to {len(ids) - 1}, "
                "one each; fetch the file again"
            )
        library = tokenizers.Tokenizer(
            _load(merges, lambda: models.BPE.from_file(str(vocab), str(merges)))
        )
        library.normalizer = normalizers.NFC()
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
            ]
        )
        library.decoder = decoders.ByteLevel()
        return cls(library, vocab)

    @property
    def size(self) -> int:
        return self.library.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self.library.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_plain(self, text: str) -> list[int]:
        return self.plain.encode(text, add_special_tokens=False).ids

    def token_bytes(self, id: int) -> bytes:
        token = self.id_to_token(id)
        if all(symbol in self.alphabet for symbol in token):
            return bytes(self.alphabet[symbol] for symbol in token)
        return token.encode()  # an added token, spelled as it is


class SentencePiece:
    """The `sentencepiece` library, from tokenizer.model. Text between added tokens is encoded on its own."""

    affixes = [], []

    def __init__(self, path: Path):
        import sentencepiece

        self.source = path
        self.model = _load(path, lambda: sentencepiece.SentencePieceProcessor(model_file=str(path)))
        self.pieces = self.size = self.model.get_piece_size()
        self._added = {
            id: AddedToken(self.model.id_to_piece(id), special=True, normalized=False)
            for id in range(self.size)
            if self.model.is_control(id)
        }
        # Spaces that encoding may have put before a text: 0, 1, or 2 for one on every piece at the start.
        self.invented_spaces = 2 - len(self.model.decode([self.model.piece_to_id("\u2581")] * 2))

    def add(self, token: AddedToken) -> None:
        id = self.token_to_id(token.content)
        self._added[self.size if id is None else id] = token
        self.size = max(self.pieces, *(id + 1 for id in self._added))

    def added(self) -> dict[int, AddedToken]:
        return self._added

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        splitter = _splitter(token.content for token in self._added.values())
        return [
            _encode_between(text, splitter, self.token_to_id, self.encode_plain) for text in texts
        ]

    def encode_plain(self, text: str) -> list[int]:
        return self.model.encode(text)

    def token_to_id(self, token: str) -> int | None:
        for id, added in self._added.items():
            if added.content == token:
                return id
        id = self.model.piece_to_id(token)  # the unknown token's, for what is not a piece
        return id if self.model.id_to_piece(id) == token else None

    def id_to_token(self, id: int) -> str:
        return self._added[id].content if id in self._added else self.model.id_to_piece(id)

    def token_bytes(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].content.encode()
        if self.model.is_byte(id):
            return bytes([int(self.model.id_to_piece(id)[3:5], 16)])  # spelled <0x0A>
        if self.model.is_unknown(id):
            return "\u2047 ".encode()  # sentencepiece's sign for it
        return self.model.id_to_piece(id).replace("\u2581", " ").encode()


class IncrementalDecoder:
    """Tokens in, text out as soon as it is certain: never half a character.

    The pieces that `push` and `flush` return join to exactly `Tokenizer.decode` of all ids. Each token costs
    its own bytes, however long the text. U+FFFD appears only for bytes that no later byte can complete.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else ()
        self._restart()

    def _restart(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._invented_spaces = self._tokenizer.invented_spaces

    def push(self, ids: int | Iterable[int]) -> str:
        """The text that `ids` (one or several) complete. Raises TokenizerError for an id out of range."""
        joined = []
        for id in ids if isinstance(ids, Iterable) else [ids]:
            token = self._tokenizer.token_bytes(id)
            if int(id) in self._skipped:
                continue
            if self._invented_spaces and token[:1] == b" ":
                token, self._invented_spaces = token[1:], self._invented_spaces & 2
            if token:
                self._invented_spaces = 0
            joined.append(token)
        return self._utf8.decode(b"".join(joined))

    def flush(self) -> str:
        """What is left when no token follows: U+FFFD for half a character. The decoder then starts anew."""
        rest = self._utf8.decode(b"", final=True)
        self._restart()
        return rest


class Tokenizer:
    """Text <-> ids for one checkpoint directory. Threads may share it. Its one-line error: TokenizerError.

    vocab_size         tokens the tokenizer knows; their ids are 0 .. vocab_size - 1
    padded_vocab_size  rows of the model's embedding (config.json's vocab_size) if more; they decode to ""
    bos_token_id, eos_token_id, pad_token_id, unk_token_id: int, or None if tokenizer_config.json names none
    added_tokens       {content: id} of the tokens matched in a text before anything else is done to it
    special_ids        those of them that `skip_special_tokens` leaves out
    named_tokens       {"eos_token": "<|im_end|>", ...}, which chat templates can read
    chat_templates     {name: Jinja source}; the only one of a checkpoint is called "default"
    """

    def __init__(
        self,
        backend: ByteLevelBPE | SentencePiece,
        config: dict | None = None,
        chat_templates: dict[str, str] | None = None,
        padded_vocab_size: int = 0,
    ):
        config = config or {}
        self._backend, self.chat_templates = backend, chat_templates or {}
        self._where = backend.source.parent / "tokenizer_config.json"
        self._add_tokens(config.get("added_tokens_decoder") or {})
        self.named_tokens: dict[str, str] = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            setattr(self, f"{name}_id", self._name_token(name, config.get(name)))
        self.added_tokens = {token.content: id for id, token in backend.added().items()}
        self.special_ids = frozenset(id for id, token in backend.added().items() if token.special)
        self.vocab_size = backend.size
        self.padded_vocab_size = max(backend.size, padded_vocab_size)
        self.invented_spaces = backend.invented_spaces
        self._prefix, self._suffix = backend.affixes
        if (
            "add_bos_token" in config or "add_eos_token" in config
        ):  # then they decide, as in Hugging Face
            bos, eos = self.bos_token_id, self.eos_token_id
            self._prefix = [bos] if config.get("add_bos_token") and bos is not None else []
            self._suffix = [eos] if config.get("add_eos_token") and eos is not None else []
        self._splitter = _splitter(self.added_tokens)
        self._bytes: dict[int, bytes] = {}
        self._renderer = ChatRenderer()

    @classmethod
    def from_dir(cls, path: str | os.PathLike) -> Tokenizer:
        """From a directory's tokenizer.json, else its vocab.json and merges.txt, else its tokenizer.model."""
        path = Path(path)
        config = _read_json(path / "tokenizer_config.json", optional=True)
        if (path / "tokenizer.json").exists():
            backend = ByteLevelBPE.from_json(path / "tokenizer.json")
        elif (path / "vocab.json").exists() or (path / "merges.txt").exists():
            backend = ByteLevelBPE.from_vocab(
                path / "vocab.json", path / "merges.txt", bool(config.get("add_prefix_space"))
            )
        elif (path / "tokenizer.model").exists():
            backend = SentencePiece(path / "tokenizer.model")
        else:
            raise TokenizerError(
                f"{path}: no tokenizer here; expected a directory with tokenizer.json, or "
                "vocab.json and merges.txt, or tokenizer.model"
            )
        rows = _read_json(path / "config.json", optional=True).get("vocab_size")
        return cls(
            backend, config, _read_templates(path, config), rows if isinstance(rows, int) else 0
        )

    def _add_tokens(self, specs: dict[str, dict]) -> None:
        """Register tokenizer_config.json's added_tokens_decoder, {id: {content, special, ...}}."""
        try:
            tokens = {
                int(id): AddedToken(
                    **{key: value for key, value in spec.items() if key != "__type"}
                )
                for id, spec in specs.items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise TokenizerError(
                f"{self._where}: added_tokens_decoder must map ids to {{'content': ..., "
                f"'special': ..., ...}}: {error}"
            ) from None
        known = self._backend.added()
        for id, token in sorted(tokens.items()):
            if id not in known or known[id].content != token.content:
                self._backend.add(token)
            if (found := self._backend.token_to_id(token.content)) != id:
                raise TokenizerError(
                    f"{self._where}: added_tokens_decoder gives {token.content!r} the id "
                    f"{id}, {self._backend.source.name} {found}; the files do not match"
                )

    def _name_token(self, name: str, token: str | dict | None) -> int | None:
        """The id of tokenizer_config.json's eos_token (say), which is special from now on."""
        content = token.get("content") if isinstance(token, dict) else token
        if content is None:
            return None
        id = self._backend.token_to_id(content) if isinstance(content, str) else None
        if id is None:
            raise TokenizerError(
                f"{self._where}: {name} is {content!r}, which {self._backend.source.name} "
                "does not have; name a token that is there, or null"
            )
        if id not in self._backend.added() or not self._backend.added()[id].special:
            self._backend.add(AddedToken(content, special=True, normalized=False))
        self.named_tokens[name] = content
        return id

    def encode(
        self, text: str, allow_special: bool = True, add_special_tokens: bool = True
    ) -> list[int]:
        """Ids of `text`.

        allow_special       match added tokens such as <|im_end|> in the text, as Hugging Face does. False is
                            for text from people you do not trust: their spelling is then plain characters.
        add_special_tokens  put BOS and EOS around the text if the checkpoint wants them; Qwen2.5 does not
        """
        return self.encode_batch([text], allow_special, add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], allow_special: bool = True, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` for several texts, on all cores."""
        for text in texts:
            _check_text(text)
        prefix, suffix = (self._prefix, self._suffix) if add_special_tokens else ([], [])
        batch = self._backend.encode(texts) if allow_special else map(self._encode_plain, texts)
        return [prefix + ids + suffix for ids in batch]

    def _encode_plain(self, text: str) -> list[int]:
        ids = self._backend.encode_plain(text)
        for id in set(ids).intersection(self.added_tokens.values()):
            raise TokenizerError(
                f"{self._backend.source}: the model itself makes {self.id_to_token(id)!r} "
                "from plain text, so allow_special=False cannot be granted"
            )
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. decode(encode(t)) is NFC(t)."""
        decoder = self.decoder(skip_special_tokens)
        return decoder.push(ids) + decoder.flush()

    def decoder(self, skip_special_tokens: bool = False) -> IncrementalDecoder:
        return IncrementalDecoder(self, skip_special_tokens)

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for; b"" for the model's padding rows, TokenizerError beyond those."""
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
            raise TokenizerError(
                f"a token id must be an integer, not {type(id).__name__}"
            ) from None
        if not 0 <= id < self.padded_vocab_size:
            raise TokenizerError(
                f"token id {id} does not exist; {self._backend.source} has 0 to "
                f"{self.padded_vocab_size - 1}"
            )
        return id

    def apply_chat_template(
        self,
        messages: Sequence[dict],
        tools: Sequence[dict] | None = None,
        add_generation_prompt: bool = True,
        system: str | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a chat, exactly as Hugging Face renders it.

        messages       [{"role": ..., "content": ..., ...}]; a key whose value is None counts as absent
        tools          JSON schemas of the functions that the model may call
        system         a system message to put first; refused if the messages begin with one
        chat_template  the name of one of `chat_templates`, or Jinja source to use instead
        variables      whatever else the template reads
        Raises TokenizerError if there is no template, or it refuses these messages, fails, or asks too much.
        """
        if not isinstance(tools, (list, tuple, type(None))):
            raise TokenizerError(
                f"tools must be a list of JSON schemas, not {type(tools).__name__}"
            )
        source = self._select_template(chat_template, tools)
        variables = {
            "documents": None,
            **self.named_tokens,
            **variables,
            "tools": tools,
            "messages": _check_messages(messages, system),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            prompt = self._renderer.render(source, variables)
        except TokenizerError as error:
            raise TokenizerError(f"{self._where.parent}: chat template: {error}") from None
        _check_text(prompt)
        return prompt

    def encode_chat(
        self,
        messages: Sequence[dict],
        tools: Sequence[dict] | None = None,
        add_generation_prompt: bool = True,
        system: str | None = None,
        chat_template: str | None = None,
        allow_special: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Ids of `apply_chat_template`'s prompt, without BOS: the template writes its own.

        allow_special  False encodes added tokens inside messages, tools and variables as plain characters:
                       no message can end its turn and begin another. Those that the template writes count.
        """
        if allow_special:
            prompt = self.apply_chat_template(
                messages, tools, add_generation_prompt, system, chat_template, **variables
            )
            return self.encode(prompt, add_special_tokens=False)
        messages, tools, variables = self._enclose(
            [_check_messages(messages, system), tools, variables]
        )
        prompt = self.apply_chat_template(
            messages, tools, add_generation_prompt, None, chat_template, **variables
        )
        return _encode_between(prompt, self._splitter, self.token_to_id, self._encode_plain)

    def _enclose(self, value: Any) -> Any:
        """`value` with OPEN and CLOSE around every added token in its strings."""
        if isinstance(value, str):
            return self._splitter.sub(lambda match: OPEN + match[0] + CLOSE, _without_marks(value))
        if isinstance(value, dict):
            return {self._enclose(key): self._enclose(item) for key, item in value.items()}
        return (
            [self._enclose(item) for item in value] if isinstance(value, (list, tuple)) else value
        )

    def _select_template(self, wanted: str | None, tools: Sequence[dict] | None) -> str:
        if wanted is None:
            wanted = (
                "tool_use" if tools is not None and "tool_use" in self.chat_templates else "default"
            )
        source = self.chat_templates.get(wanted, wanted)
        if "{" not in source:
            raise TokenizerError(
                f"{self._where.parent}: there is no chat template {wanted!r}, only "
                f"{sorted(self.chat_templates)}; pass chat_template or a finished prompt"
            )
        return source


def _splitter(tokens: Iterable[str]) -> re.Pattern:
    """Finds added tokens, leftmost first and the longest there, with the marks around those a user typed."""
    longest_first = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    return re.compile(f"({OPEN}?(?:{longest_first or '(?!)'}){CLOSE}?)")


def _without_marks(text: str) -> str:
    return text.replace(OPEN, "").replace(CLOSE, "")


def _encode_between(
    text: str,
    splitter: re.Pattern,
    token_to_id: Callable[[str], int | None],
    encode_plain: Callable[[str], list[int]],
) -> list[int]:
    """Added tokens become their id, enclosed ones stay text, and the text between two is encoded at once."""
    ids, pending = [], ""
    for n, piece in enumerate(splitter.split(text)):  # text, token, text, token, ..., text
        if n % 2 and piece[0] != OPEN and piece[-1] != CLOSE:
            ids += encode_plain(pending) + [token_to_id(piece)]
            pending = ""
        else:
            pending += _without_marks(piece)
    return ids + encode_plain(pending)


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character "
            f"{error.start}; decode the bytes it came from as UTF-8"
        ) from None


def _check_messages(messages: Sequence[dict], system: str | None) -> list[dict]:
    """The messages to render: `system` in front, keys whose value is None left out."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TokenizerError(
            "messages must be a list of at least one {'role': ..., 'content': ...}"
        )
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TokenizerError(
                f"messages[{n}] must be an object with a 'role' string, not {str(message)[:80]!r}"
            )
    if system is not None:
        if messages[0]["role"] == "system":
            raise TokenizerError(
                "messages[0] is a system message already; leave out the other system text"
            )
        messages = [{"role": "system", "content": system}, *messages]
    return [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]


def _read_templates(path: Path, config: dict) -> dict[str, str]:
    """Chat templates by name: *.jinja files if there are any, else tokenizer_config.json's one or several."""
    files = (
        {"default": path / "chat_template.jinja"} if (path / "chat_template.jinja").exists() else {}
    )
    files |= {
        file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))
    }
    if files:
        return {
            name: _load(file, lambda: file.read_text(encoding="utf-8"))
            for name, file in files.items()
        }
    found = config.get("chat_template") or {}
    try:
        if not isinstance(found, (str, dict)):
            found = {entry["name"]: entry["template"] for entry in found}
        templates = {"default": found} if isinstance(found, str) else found
        if all(isinstance(source, str) for source in templates.values()):
            return templates
    except (TypeError, KeyError):
        pass
    raise TokenizerError(
        f"{path / 'tokenizer_config.json'}: chat_template must be a string or a list of "
        "{'name': ..., 'template': ...}"
    )


def _read_json(path: Path, optional: bool = False) -> dict:
    if optional and not path.exists():
        return {}
    value = _load(path, lambda: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _load(path: Path, read: Callable[[], Any]) -> Any:
    """read(), where a missing or damaged file becomes one line."""
    pointer = False
    try:
        with open(path, "rb") as file:
            pointer = file.read(23) == b"version https://git-lfs"
        if not pointer:
            return read()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the Rust library is not an Exception
        words = " ".join(str(error).split())[:200]
        raise TokenizerError(f"{path}: damaged: {words}; fetch the file again") from None
    raise TokenizerError(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull`")
