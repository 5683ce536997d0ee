"""Grammars over single bytes: a tokenizer without merges, and walks through the mask."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from minqwen import Tokenizer
from minqwen.sampling.structured import Constraint, ConstraintCompiler, StructuredOutputs
from support.tokenizer import ALPHABET

END = 256  # the id of <|im_end|>, after the 256 bytes
WIDTH = 260  # the logits of the model


def byte_tokenizer(path: Path) -> Tokenizer:
    """A token for each byte, then <|im_end|>."""
    (path / "vocab.json").write_text(json.dumps(ALPHABET), encoding="utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    token = {"content": "<|im_end|>", "special": True, "normalized": False}
    config = {"added_tokens_decoder": {str(END): token}}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.from_dir(path)


class Writer:
    """Writes texts byte by byte through the constraints of a schema."""

    def __init__(self, tokenizer: Tokenizer):
        self.compiler = ConstraintCompiler(tokenizer, WIDTH, [END])
        self.tokenizer = tokenizer
        self.id_of = {tokenizer.token_bytes(i): i for i in range(256)}

    def begin(self, schema: dict[str, Any]) -> Constraint:
        return self.compiler.constraint(StructuredOutputs(json=schema))

    def lets_through(self, schema: dict[str, Any], *texts: str) -> list[str]:
        """Those of the texts that can be written and ended."""
        constraint = self.begin(schema)
        return [text for text in texts if self._fits(constraint, text)]

    def _fits(self, constraint: Constraint, text: str) -> bool:
        constraint.matcher.reset()
        for byte in text.encode():
            token = self.id_of[bytes([byte])]
            if not constraint.mask()[token]:
                return False
            constraint.accept(token)
        return bool(constraint.mask()[END]) or constraint.finished

    def walk(self, schema: dict[str, Any], seed: int, limit: int = 200) -> str | None:
        """A text of random bytes that the mask allows; None where it is cut at the limit.

        SamplingError at a dead end.
        """
        rng, constraint, ids = random.Random(seed), self.begin(schema), list[int]()
        closing = {self.id_of[mark] for mark in (b'"', b"}", b"]")} | {END}
        while not constraint.finished:
            allowed = constraint.mask().nonzero()[:, 0].tolist()
            if len(ids) == limit:
                return None
            ends = [token for token in allowed if token in closing]
            likely = ends if ends and len(ids) > 30 and rng.random() < 0.7 else allowed
            ids.append(rng.choice(likely))
            constraint.accept(ids[-1])
        return self.tokenizer.decode([token for token in ids if token != END])
