"""One prompt from a command line, and the mistake that is put into the model or into its tokens.

tools/trace.py and tools/explain.py ask for both in the same way.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minqwen.checkpoint.embedded import EMBEDDED
from minqwen.config import ModelConfig
from minqwen.errors import MinqwenError
from minqwen.heads.view import load_pretrained
from minqwen.lab.faults import Fault, find
from minqwen.lab.faults.load import load_mistaken
from minqwen.model import Qwen2
from minqwen.parallel import Mesh
from minqwen.tokenizer import Tokenizer


def prompt_flags(parser: argparse.ArgumentParser) -> None:
    """The text, what it is, ids in its place, and a mistake."""
    parser.add_argument("text", nargs="?")
    parser.add_argument("--chat", action="store_true", help="the text is a user's message")
    parser.add_argument(
        "--ids", type=integers, metavar="ID,ID,...", help="token ids in place of the text"
    )
    parser.add_argument(
        "--fault",
        metavar="NAME",
        help="a mistake to put into the model, from the catalogue: tools/trace.py faults",
    )


def integers(text: str) -> list[int]:
    """The ids of "1,2,3"."""
    return [int(part) for part in text.split(",")]


def check_prompt(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit unless there is one text, or ids in its place."""
    if args.ids is None and args.text is None:
        parser.error("nothing to look at: give a text, or token ids as in --ids 5,300,17")
    if args.ids is not None and args.text is not None:
        parser.error("--ids and a text: give one of them")
    if args.ids is not None and args.chat:
        parser.error("--chat makes a prompt of a text: --ids is one already")


def chosen_fault(args: argparse.Namespace, config: ModelConfig) -> Fault | None:
    """The mistake that the command asks for. Raises MinqwenError if it cannot be made here."""
    if args.fault is None:
        return None
    fault = find(args.fault)
    if fault.encode is not None and not args.chat:
        raise MinqwenError(f"--fault {fault.name} is in the tokens of a chat: add --chat")
    fault.check(config)
    return fault


def read_prompt(
    args: argparse.Namespace, config: ModelConfig, fault: Fault | None
) -> tuple[list[int], str | None]:
    """The ids to look at, and their text if it was given."""
    if args.ids is not None:
        wrong = [id for id in args.ids if not 0 <= id < config.vocab_size]
        if wrong:
            raise MinqwenError(f"--ids has {wrong[0]}, expected 0 to {config.vocab_size - 1}")
        return args.ids, None
    tokenizer, text = Tokenizer.from_dir(args.model), args.text
    chat = [{"role": "user", "content": text}]
    if fault is not None and fault.encode is not None:
        ids = fault.ids(tokenizer, chat)
        return ids, tokenizer.decode(ids)
    if args.chat:
        text = tokenizer.apply_chat_template(chat)
    ids = tokenizer.encode(text, add_special_tokens=not args.chat)
    if not ids:
        raise MinqwenError("the text has no tokens: give at least one")
    return ids, text


def speller(args: argparse.Namespace) -> Callable[[int], str]:
    """An id's text; ids alone need no tokenizer."""
    try:
        tokenizer = Tokenizer.from_dir(args.model)
    except MinqwenError:
        if args.ids is None:
            raise
        return lambda id: f"#{id}"
    return lambda id: tokenizer.decode([id])


def name_of(args: argparse.Namespace) -> str:
    """What a page calls the model."""
    same = Path(args.model).resolve() == Path(EMBEDDED).resolve()
    return "the embedded model" if same else str(args.model)


def load_model(path: str, mesh: Mesh, fault: Fault | None, **options: Any) -> Qwen2:
    """The model in `path`, with the mistake in it if it is one of the model."""
    if fault is None or not fault.in_model:
        return load_pretrained(path, mesh=mesh, **options)
    return load_mistaken(fault, path, mesh=mesh, **options)
