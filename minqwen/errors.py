"""A user's mistake, told in one line: what is wrong, where, what was expected, what to do.

Warnings too are one line, and come from one rank.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

from minqwen.commands import as_called_here

MAX_LINE = 480  # characters of a message, so that "error: " and its like fit into 500 with it


def printable(text: str) -> str:
    """The text in one line, in which nothing moves a terminal's cursor or turns its letters round.

    What Unicode does not call printable is spelled out: control and bidirectional characters, line
    ends, lone surrogates.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """The text as one printable line of at most MAX_LINE characters, whatever it quotes.

    What is cut out is the middle: a message begins with the place and ends with what to do.
    """
    line = printable(text[: 4 * MAX_LINE] + text[4 * MAX_LINE :][-MAX_LINE:])
    end = MAX_LINE // 3
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - end - 5]} ... {line[-end:]}"


class MinqwenError(ValueError):
    """Base of every error a user can cause. Command lines print it as one line and exit with 2.

    A message names tools as a checkout has them, `tools/heads.py`; it is read as they are called
    here. It quotes files and requests, so it is made one printable line here, once for all.
    """

    def __init__(self, *message: object):
        super().__init__(*(one_line(str(part)) for part in message))

    def __str__(self) -> str:
        return as_called_here(super().__str__())


class ConfigError(MinqwenError):
    """config.json or generation_config.json says something that cannot be."""


class CheckpointError(MinqwenError):
    """A weight file is missing, damaged, unsafe, or does not fit its config."""


class TokenizerError(MinqwenError):
    """A tokenizer or chat template cannot be loaded or applied."""


class ParallelError(MinqwenError):
    """A tensor-parallel degree that cannot work, or a rank that went away."""


class SamplingError(MinqwenError):
    """A sampling parameter or request that cannot be served."""


class RequestError(MinqwenError):
    """Some requests of one call failed.

    outputs: of all its requests, in the order of the prompts. Those that failed say why in their
    `error`; the others are as if they had been alone.
    """

    def __init__(self, message: str, outputs: Sequence[Any]):
        super().__init__(message)
        self.outputs = list(outputs)


class TraceError(MinqwenError):
    """A point that does not exist, or a replacement that does not fit."""


class DumpError(MinqwenError):
    """What another engine wrote of its tensors cannot be read, or does not fit the model."""


class PackError(MinqwenError):
    """A golden pack that cannot be written, is damaged, or is of another model."""


class HeadsError(MinqwenError):
    """A head count, recipe or checkpoint that head extension must refuse."""


def is_first_rank() -> bool:
    """Whether this process is the one that speaks: rank 0 of torchrun's, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def warn(text: str, stacklevel: int) -> None:
    """A warning from rank 0 alone. stacklevel: as in `warnings.warn`, counted from the caller."""
    if is_first_rank():
        warnings.warn(one_line(as_called_here(text)), stacklevel=stacklevel + 1)


def a_kind(value: object) -> str:
    """The type of a value with its article: "an int", "a list". None is "None"."""
    name = type(value).__name__
    return str(value) if value is None else f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def kind_and_words(error: BaseException) -> str:
    """The kind of an error that is not the user's, and the first line of what it says."""
    kind, words = type(error).__name__, str(error).strip().partition("\n")[0]
    return f"{kind}: {words}" if words else kind


def told(error: BaseException) -> str:
    """What an error says: a user's mistake as it stands, any other with its kind."""
    return str(error) if isinstance(error, MinqwenError) else kind_and_words(error)
