"""Tokens that an endpoint tells as texts, as token ids of our tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minqwen.checks import is_id_text, is_integer
from minqwen.errors import MinqwenError
from minqwen.files import quoted
from minqwen.tokenizer import Tokenizer

AS_ID = "token_id:"  # vLLM's way with return_tokens_as_token_ids
LOST = "\ufffd"  # in the place of bytes that are no text by themselves


class Pieces:
    """The vocabulary by its tokens' bytes."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.tokenizer = tokenizer
        self.ids: dict[bytes, int] = {}
        for id in range(vocab_size):
            if id < tokenizer.padded_vocab_size and (spelled := tokenizer.token_bytes(id)):
                self.ids.setdefault(spelled, id)  # rows that only fill up have no bytes

    def id_of(self, piece: Any) -> int | None:
        """The token that a text, or an object with `id`, `bytes` or `token`, means; None if none.

        The objects are those of llama.cpp (`id`) and of OpenAI's chats (`bytes`).
        """
        if isinstance(piece, Mapping):
            if is_integer(piece.get("id")):
                return int(piece["id"])
            if isinstance(piece.get("bytes"), list):
                return self._of_bytes(piece["bytes"])
            piece = piece.get("token")
        if not isinstance(piece, str):
            return None
        if piece.startswith(AS_ID) and is_id_text(piece[len(AS_ID) :]):
            return int(piece[len(AS_ID) :])
        return self.ids.get(piece.encode("utf-8", "surrogatepass"))

    def _of_bytes(self, numbers: Sequence[Any]) -> int | None:
        if not all(is_integer(n) and 0 <= n < 256 for n in numbers):
            return None
        return self.ids.get(bytes(numbers))

    def ids_of(self, where: str, pieces: Sequence[Any], text: str) -> list[int]:
        """The tokens of all pieces. text: what they spell, for pieces that are parts of characters.

        Raises MinqwenError that names the first piece that is no token here.
        """
        found = [self.id_of(piece) for piece in pieces]
        ids = [id for id in found if id is not None]
        if len(ids) == len(pieces):
            return ids
        strange = [i for i, id in enumerate(found) if id is None and not is_part(pieces[i])]
        again = self.tokenizer.encode(text, add_special_tokens=False)
        fits = len(again) == len(pieces) and all(f in (None, id) for f, id in zip(found, again))
        if fits and not strange:
            return again
        first = strange[0] if strange else found.index(None)
        piece = pieces[first]
        shown = piece.get("token") if isinstance(piece, Mapping) else piece
        raise MinqwenError(
            f"{where}: token {first} of the answer is {quoted(shown, 40)}, which is no token of "
            "this model: does the endpoint have another tokenizer?"
        )


def is_part(piece: Any) -> bool:
    """Whether a text may be that of bytes that are no characters by themselves."""
    text = piece.get("token") if isinstance(piece, Mapping) else piece
    return isinstance(text, str) and (LOST in text or text.startswith("bytes:"))
