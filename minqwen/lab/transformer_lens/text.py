"""Text to tokens and back, under TransformerLens' names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minqwen.errors import MinqwenError
from minqwen.lab.transformer_lens.config import HookedTransformerConfig
from minqwen.tokenizer import Tokenizer

Tokens = Tensor | np.ndarray | Sequence[Any] | int


class Text:
    """What `HookedTransformer` has of text."""

    cfg: HookedTransformerConfig
    tokenizer: Tokenizer | None

    def need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise MinqwenError("this HookedTransformer has no tokenizer: give it one, or tokens")
        return self.tokenizer

    @property
    def end_id(self) -> int:
        """The id that ends a text, and that stands for a beginning where it is asked for."""
        id = self.need_tokenizer().eos_token_id
        if id is None:
            raise MinqwenError("the tokenizer has no eos_token: leave prepend_bos and padding out")
        return id

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Tensor:
        """Ids [B, T] of one text or of several; shorter ones are padded on the right.

        A token does not see what is after it, so that padding changes nothing before it. Qwen has
        no BOS; prepend_bos puts the token that ends a text in its place, as TransformerLens does.
        """
        if padding_side not in (None, "right"):
            raise MinqwenError(
                f"padding_side is {padding_side!r}, expected 'right': there is no mask here, and "
                "tokens do not see what is after them"
            )
        texts = [input] if isinstance(input, str) else list(input)
        rows = self.need_tokenizer().encode_batch(texts)
        if self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos:
            bos = self.need_tokenizer().bos_token_id
            rows = [[self.end_id if bos is None else bos, *row] for row in rows]
        if truncate:
            rows = [row[: self.cfg.n_ctx] for row in rows]
        longest = max((len(row) for row in rows), default=0)
        if any(len(row) < longest for row in rows):
            pad = self.need_tokenizer().pad_token_id
            pad = self.end_id if pad is None else pad
            rows = [row + [pad] * (longest - len(row)) for row in rows]
        device = self.cfg.device if move_to_device else "cpu"
        return torch.tensor(rows, dtype=torch.int64, device=device)

    def to_string(self, tokens: Tokens) -> str | list[str]:
        """The text of ids [T] or of one id; a list of texts of ids [B, T]."""
        ids = torch.as_tensor(tokens)
        if ids.dim() == 2:
            return [self.need_tokenizer().decode(row) for row in ids.tolist()]
        if ids.dim() > 2:
            raise MinqwenError(f"tokens have shape {tuple(ids.shape)}, expected [T] or [B, T]")
        return self.need_tokenizer().decode(ids.reshape(-1).tolist())

    def to_str_tokens(
        self,
        input: str | Tokens,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> list[Any]:
        """Each token as text: of a text, or of ids [T] or [1, T]; of a list, a list for each."""
        if isinstance(input, list):
            return [self.to_str_tokens(each, prepend_bos, padding_side) for each in input]
        if isinstance(input, str):
            ids = self.to_tokens(input, prepend_bos, padding_side)[0]
        else:
            ids = torch.as_tensor(input).squeeze()
        if ids.dim() > 1:
            raise MinqwenError(f"tokens have shape {tuple(ids.shape)}, expected [T] or [1, T]")
        return [self.need_tokenizer().decode([id]) for id in ids.reshape(-1).tolist()]

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token. Raises MinqwenError for any other."""
        ids = self.to_tokens(string, prepend_bos=False)[0].tolist()
        if len(ids) != 1:
            said = self.to_str_tokens(string, prepend_bos=False)
            raise MinqwenError(f"{string!r} is not a single token but {len(ids)}: {said}")
        return int(ids[0])

    def to_single_str_token(self, int_token: int) -> str:
        return self.need_tokenizer().decode([int_token])

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: str | Tensor,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Where a token stands in a text, or in ids [T] or [1, T]: its first or last place."""
        if mode not in ("first", "last"):
            raise MinqwenError(f"mode is {mode!r}, expected 'first' or 'last'")
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos, padding_side)
        if isinstance(single_token, str):
            single_token = self.to_single_token(single_token)
        places = (input.reshape(-1) == int(single_token)).nonzero().flatten().tolist()
        if not places:
            raise MinqwenError(f"the token {int(single_token)} does not occur in the prompt")
        return int(places[0 if mode == "first" else -1])
