"""The two libraries that cut text into tokens, with the same methods around both.

`ByteLevelBPE` is the `tokenizers` library, which Qwen2.5 uses; `SentencePiece` is the library of
that name. `Tokenizer` adds what a checkpoint's other files say. Common to both:

kind             its name for people
source           the file that was read, for errors
size             number of tokens; their ids are 0 .. size - 1
adds_prefix_space
                 whether encoding puts a space before each piece of a text; None: not known here
affixes          ids that the file wants before and after a text
invented_spaces  spaces that encoding may have put before a text, which decoding has to take off:
                 0, 1, or 2 for one on every piece at the start of the text
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from minqwen.errors import TokenizerError
from minqwen.files import (
    check_directory,
    lines_of,
    quoted,
    read_json_object,
    read_small,
    read_text,
)
from minqwen.tokenizer.added_tokens import encode_between, finder

T = TypeVar("T")

# How Qwen2 cuts a text before BPE: contractions; words with one leading character; single digits;
# punctuation with a leading space; line ends; and white space, whose last blank is left to the word
# that follows.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRECOMPILED = re.compile(rb'"type"\s*:\s*"Precompiled"')
_AFFIX = re.compile(rb'"(continuing_subword_prefix|end_of_word_suffix)"\s*:\s*"[^"]')
SPACE = "\u2581"  # how sentencepiece spells a space


CANNOT_CUT = "cannot cut a text into tokens"


def load_backend(path: Path, add_prefix_space: bool) -> ByteLevelBPE | SentencePiece:
    """The tokenizer of a directory.

    It is read from tokenizer.json, else from vocab.json and merges.txt (which leave open whether a
    space is put before a text: add_prefix_space), else from tokenizer.model.
    """
    check_directory(path, TokenizerError)
    if os.path.lexists(path / "tokenizer.json"):
        return ByteLevelBPE.from_json(path / "tokenizer.json")
    if os.path.lexists(path / "vocab.json") or os.path.lexists(path / "merges.txt"):
        return ByteLevelBPE.from_vocab(path / "vocab.json", path / "merges.txt", add_prefix_space)
    if os.path.lexists(path / "tokenizer.model"):
        return SentencePiece(path / "tokenizer.model")
    raise TokenizerError(
        f"{path}: no tokenizer here; expected a directory with tokenizer.json, or "
        "vocab.json and merges.txt, or tokenizer.model"
    )


def _made_from(path: Path, make: Callable[[], T], fault: str = "damaged") -> T:
    """make(), a call of a library, in which whatever is raised about a damaged file is one line."""
    try:
        return make()
    except (KeyboardInterrupt, SystemExit, MemoryError, TokenizerError):
        raise
    except BaseException as error:  # a panic of the Rust library is not an Exception
        words = " ".join(str(error).split())[:200]
        raise TokenizerError(f"{path}: {fault}: {words}; fetch the file again") from None


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of merges.txt: two tokens in a line, with one space between them."""
    pairs = []
    for number, line in enumerate(lines_of(read_text(path, TokenizerError)), 1):
        left, space, right = line.partition(" ")
        if line.startswith("#version"):
            continue
        if not space or " " in right:
            raise TokenizerError(
                f"{path}: line {number} is {quoted(line, 80)}, expected two tokens and one space; "
                "fetch the file again"
            )
        pairs.append((left, right))
    return pairs


def _wrong_ids(path: Path, size: int) -> TokenizerError:
    return TokenizerError(
        f"{path}: {size} tokens, but their ids are not 0 to {size - 1}, one each; "
        "fetch the file again"
    )


# ---- byte-level BPE -----------------------------------------------------------------------------


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes, as printable characters, in the order of their ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _state(part: Any) -> dict[str, Any]:
    """What a part of the library's pipeline is made of, as tokenizer.json writes it."""
    state: dict[str, Any] = json.loads(part.__getstate__()) if part else {}
    return state


def _check_template(path: Path, post_processor: dict[str, Any]) -> None:
    """Raise TokenizerError if a post-processor writes tokens that it does not have.

    The library would panic, with several lines on stderr, at the first text.
    """
    for part in [post_processor, *post_processor.get("processors", [])]:
        known = part.get("special_tokens", {})
        pieces = [*part.get("single", []), *part.get("pair", [])]
        written = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
        missing = [token for token in written if token not in known]
        if part.get("type") == "TemplateProcessing" and missing:
            raise TokenizerError(
                f"{path}: damaged: its post_processor writes {quoted(missing[0])}, expected one of "
                "its special_tokens; fetch the file again"
            )


def _parts(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A part of the pipeline, or those of a Sequence of them."""
    yield state
    for name in ("pretokenizers", "normalizers"):
        for part in state.get(name, []):
            yield from _parts(part)


def _check_merges(path: Path, id_of: dict[str, int], pairs: list[tuple[str, str]]) -> None:
    """Raise TokenizerError for a merge of or to no token: the library may panic, on stderr."""
    for left, right in pairs:
        missing = next((x for x in (left, right, left + right) if x not in id_of), None)
        if missing is not None:
            raise TokenizerError(
                f"{path}: damaged: it merges {quoted(left, 80)} and {quoted(right, 80)}, and "
                f"{quoted(missing, 80)} is no token of vocab.json; fetch both again"
            )


def _adds_prefix_space(pre_tokenizer: dict[str, Any]) -> bool | None:
    """What the ByteLevel in a pre-tokenizer says of it, which may be one of a Sequence."""
    for part in [pre_tokenizer, *pre_tokenizer.get("pretokenizers", [])]:
        if part.get("type") == "ByteLevel":
            return bool(part["add_prefix_space"])
    return None


class ByteLevelBPE:
    """The `tokenizers` library, from tokenizer.json or from vocab.json and merges.txt."""

    kind = "byte-level BPE"
    alphabet = _byte_alphabet()
    invented_spaces = 0

    def __init__(self, library: tokenizers.Tokenizer, source: Path):
        self.library, self.source = library, source
        self._check_byte_level()
        _check_template(source, _state(library.post_processor))
        library.no_truncation()
        library.no_padding()
        self.affixes = self._post_processor_ids()
        self.adds_prefix_space = _adds_prefix_space(_state(library.pre_tokenizer))
        # The same pipeline without added tokens, for text from people who are not trusted.
        self._plain = tokenizers.Tokenizer(library.model)
        if library.normalizer is not None:
            self._plain.normalizer = library.normalizer
        if library.pre_tokenizer is not None:
            self._plain.pre_tokenizer = library.pre_tokenizer
        self._added_bytes = self._bytes_of_added()
        # Most vocabularies have all of them; SmolLM2's lacks 21.
        self._missing = frozenset(
            byte
            for symbol, byte in self.alphabet.items()
            if library.model.token_to_id(symbol) is None
        )

    @classmethod
    def from_json(cls, path: Path) -> ByteLevelBPE:
        """From a tokenizer.json, which says all of it."""
        data = read_small(path, TokenizerError).removeprefix(codecs.BOM_UTF8)
        if _PRECOMPILED.search(data):  # sentencepiece's; the library panics at a damaged one
            raise TokenizerError(
                f"{path}: its normalizer is Precompiled, expected one of a byte-level tokenizer, "
                "as Qwen2's; take another tokenizer"
            )
        affix = _AFFIX.search(data)
        if affix:  # tokens then have letters that no text has
            raise TokenizerError(
                f"{path}: {affix[1].decode()} is not null, expected a byte-level tokenizer, as "
                "Qwen2's, which has none; take another tokenizer"
            )
        backend = cls(_made_from(path, lambda: tokenizers.Tokenizer.from_buffer(data)), path)
        if any(backend.library.id_to_token(id) is None for id in range(backend.size)):
            raise _wrong_ids(path, backend.size)
        return backend

    @classmethod
    def from_vocab(cls, vocab: Path, merges: Path, add_prefix_space: bool) -> ByteLevelBPE:
        """Qwen2's pipeline around a vocabulary: Unicode's form NFC, QWEN2_SPLIT, bytes, BPE."""
        id_of = read_json_object(vocab, TokenizerError)
        ids = list(id_of.values())
        if any(type(id) is not int for id in ids) or sorted(ids) != list(range(len(ids))):
            raise _wrong_ids(vocab, len(ids))
        pairs = _read_merges(merges)
        _check_merges(merges, id_of, pairs)
        bpe = _made_from(merges, lambda: models.BPE(vocab=id_of, merges=pairs))
        library = tokenizers.Tokenizer(bpe)
        library.normalizer = normalizers.NFC()
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
            ]
        )
        library.decoder = decoders.ByteLevel()
        return cls(library, vocab)

    def _check_byte_level(self) -> None:
        kind = _state(self.library.decoder).get("type")
        if kind != "ByteLevel":
            raise TokenizerError(
                f"{self.source}: its decoder is {kind}; only ByteLevel, Qwen2's, is supported"
            )
        before = (self.library.normalizer, self.library.pre_tokenizer)
        spells = [part for each in before for part in _parts(_state(each))]
        count = sum(part.get("type") == "ByteLevel" for part in spells)
        if count != 1:  # the model would leave out what it does not know, without a word
            raise TokenizerError(
                f"{self.source}: its normalizer and pre_tokenizer spell a text's bytes {count} "
                "times (ByteLevel), expected once; fetch the file again"
            )
        if self.library.model.dropout:
            raise TokenizerError(
                f"{self.source}: its dropout is {self.library.model.dropout}, expected none: it "
                "would cut a text at random; remove it"
            )

    def _post_processor_ids(self) -> tuple[list[int], list[int]]:
        """What tokenizer.json's post-processor puts before and after a text; nothing in Qwen2.5."""
        whole, bare = (
            _made_from(
                self.source,
                partial(self.library.encode, "a", add_special_tokens=special),
                CANNOT_CUT,
            ).ids
            for special in (True, False)
        )
        starts = [n for n in range(len(whole)) if whole[n : n + len(bare)] == bare]
        start = starts[0] if starts else 0
        return whole[:start], whole[start + len(bare) :]

    @property
    def size(self) -> int:
        return self.library.get_vocab_size()

    def add(self, token: AddedToken) -> None:
        self.library.add_tokens([token])
        self._added_bytes = self._bytes_of_added()

    def added(self) -> dict[int, AddedToken]:
        return self.library.get_added_tokens_decoder()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return _made_from(self.source, lambda: self._encode(texts), CANNOT_CUT)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self._missing:
            find = finder(token.content for token in self.added().values())
            for text in texts:
                for between in find.split(text)[::2]:
                    self._check_nothing_is_lost(between)
        return [one.ids for one in self.library.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which added tokens are plain characters."""
        return _made_from(self.source, lambda: self._encode_plain(text), CANNOT_CUT)

    def _encode_plain(self, text: str) -> list[int]:
        self._check_nothing_is_lost(text)
        return self._model_ids(text)

    def _check_nothing_is_lost(self, text: str) -> None:
        """Raise TokenizerError for a character with a byte that the vocabulary lacks.

        The library would leave it out without a word.
        """
        if not self._missing:
            return
        normalizer = self.library.normalizer
        for character in normalizer.normalize_str(text) if normalizer else text:
            if not self._missing.isdisjoint(character.encode()):
                raise TokenizerError(
                    f"{self.source}: the vocabulary lacks {len(self._missing)} of the 256 bytes, "
                    f"so the text would lose {character!r} (U+{ord(character):04X}); leave it out"
                )

    def _model_ids(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def token_to_id(self, token: str) -> int | None:
        return self.library.token_to_id(token)

    def id_to_token(self, id: int) -> str:
        token = self.library.id_to_token(id)
        if token is None:
            raise TokenizerError(
                f"{self.source}: there is no token {id}; expected 0 to {self.size - 1}"
            )
        return token

    def token_bytes(self, id: int) -> bytes:
        if id in self._added_bytes:
            return self._added_bytes[id]
        token = self.id_to_token(id)
        if all(symbol in self.alphabet for symbol in token):
            return bytes(self.alphabet[symbol] for symbol in token)
        return token.encode()

    def _bytes_of_added(self) -> dict[int, bytes]:
        """The bytes of the added tokens, which are spelled as they are, whatever their letters."""
        return {
            id: token.content.encode()
            for id, token in self.added().items()
            if not self._is_made_by_model(id, token.content)
        }

    def _is_made_by_model(self, id: int, token: str) -> bool:
        """Whether the model makes the token of plain text, which it then spells byte by byte.

        "Ġthe" is " the", even if somebody has added it. (ASCII is spelled the same in both ways.)
        """
        if token.isascii() or any(symbol not in self.alphabet for symbol in token):
            return False
        if len(token) == 1:
            return True
        spelled = bytes(self.alphabet[symbol] for symbol in token)
        return self._model_ids(spelled.decode("utf-8", "replace")) == [id]


# ---- sentencepiece ------------------------------------------------------------------------------


class SentencePiece:
    """The `sentencepiece` library, from tokenizer.model.

    The library knows no added tokens, so the text between two of them is encoded on its own.
    """

    kind = "sentencepiece model"
    affixes: tuple[list[int], list[int]] = ([], [])
    adds_prefix_space = None

    def __init__(self, path: Path):
        data = read_small(path, TokenizerError)
        self.source = path
        self.model = _made_from(
            path, lambda: sentencepiece.SentencePieceProcessor(model_proto=data)
        )
        self.pieces: int = self.model.get_piece_size()
        self._added = {
            id: AddedToken(self.model.id_to_piece(id), special=True, normalized=False)
            for id in range(self.pieces)
            if self.model.is_control(id)
        }
        # Two spaces are decoded to two, one or no characters.
        two_spaces = [self.model.piece_to_id(SPACE)] * 2
        self.invented_spaces = 2 - len(self.model.decode(two_spaces))

    @property
    def size(self) -> int:
        return max([self.pieces, *(id + 1 for id in self._added)])

    def add(self, token: AddedToken) -> None:
        id = self.token_to_id(token.content)
        self._added[self.size if id is None else id] = token

    def added(self) -> dict[int, AddedToken]:
        return self._added

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        added = {token.content: id for id, token in self._added.items()}
        find = finder(added)
        return [encode_between(text, find, added, self.encode_plain) for text in texts]

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which added tokens are plain characters."""
        ids: list[int] = self.model.encode(text)
        return ids

    def token_to_id(self, token: str) -> int | None:
        for id, added in self._added.items():
            if added.content == token:
                return id
        id = self.model.piece_to_id(token)  # the unknown token's, for what is not a piece
        return id if self.model.id_to_piece(id) == token else None

    def id_to_token(self, id: int) -> str:
        token: str = self._added[id].content if id in self._added else self.model.id_to_piece(id)
        return token

    def token_bytes(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].content.encode()
        piece: str = self.model.id_to_piece(id)
        if self.model.is_byte(id):
            return bytes([int(piece[3:5], 16)])  # spelled <0x0A>
        if self.model.is_unknown(id):
            return "\u2047 ".encode()  # sentencepiece's sign for it
        return piece.replace(SPACE, " ").encode()
