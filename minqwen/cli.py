"""What the command lines in tools/ share: the model's flags, one-line errors, output of rank 0."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

import torch.distributed as dist

from minqwen.checkpoint.embedded import EMBEDDED as EMBEDDED  # tools import it from here
from minqwen.checks import did_you_mean
from minqwen.commands import as_called_here, forget_tools
from minqwen.errors import MinqwenError, kind_and_words, one_line, printable
from minqwen.files import read_text
from minqwen.heads.layout import RECIPES
from minqwen.interrupts import end_on_signals
from minqwen.model.kv_cache import KV_DTYPES
from minqwen.parallel import Mesh, says_why_it_ends

ENGINE_FLAGS = (
    *("max_model_len", "block_size", "num_blocks", "kv_cache_bytes"),
    *("gpu_memory_utilization", "max_num_seqs"),
    *("max_num_batched_tokens", "enable_prefix_caching", "kv_cache_dtype"),
    *("trust_remote_code", "enforce_eager", "swap_space"),
)
MAX_TEXT = 256 << 20  # bytes of a file of prompts or text that a flag names


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake in one line, with the flag that was probably meant.

    A flag must be written out: with abbreviations, a flag that is added later changes the meaning
    of a script.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.commands: dict[str, Parser] = {}

    def add_command(self, name: str, **kwargs: Any) -> Parser:
        """One of several commands, `tools/heads.py NAME`; its name is in `args.command`."""
        if not self.commands:
            self._subparsers_action = self.add_subparsers(dest="command", required=True)
        command: Parser = self._subparsers_action.add_parser(name, **kwargs)
        self.commands[name] = command
        return command

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return found

    def _unknown(self, words: Sequence[str]) -> str:
        """One line about arguments that nobody expects."""
        flag = next((word for word in words if word.startswith("-")), words[0])
        return f"unexpected argument {flag!r}{did_you_mean(flag.split('=')[0], self.flags())}"

    def format_help(self) -> str:
        return as_called_here(super().format_help())

    def flags(self) -> set[str]:
        """Every flag of this command line and of its commands."""
        helps = [self.format_help(), *(command.format_help() for command in self.commands.values())]
        return {flag for text in helps for flag in re.findall(r"--[\w-]+", text)}

    def error(self, message: str) -> NoReturn:
        mistyped = re.search(r"argument command: invalid choice: '(.*?)'", message)
        if mistyped:
            message += did_you_mean(mistyped[1], self.commands)
        say_mistake(f"{message} (see --help)")
        self.exit(2)


def model_flags(parser: argparse.ArgumentParser, arithmetic: str = "native") -> None:
    """--model and what `Qwen2.from_pretrained` takes besides it. arithmetic: the default."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=str(EMBEDDED),
        metavar="DIR",
        help="a Hugging Face safetensors directory (default: the embedded model)",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16", "float64"],
        help="of weights, activations and logits (default: the checkpoint's own)",
    )
    group.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: GPUs if there is one for each rank"
    )
    group.add_argument(
        "--arithmetic",
        default=arithmetic,
        choices=["native", "fast", "int8", "exact"],
        help="native: Hugging Face's roundings; fast: the same model in packed weights; int8: its "
        "linear layers rounded to 8 bits; exact: the same bits whatever the batch, the degree, the "
        f"machine (default: {arithmetic})",
    )
    group.add_argument(
        "--offload",
        choices=["memory", "disk"],
        help="layers' weights stay there and come when needed: for a device that is too small",
    )
    group.add_argument(
        "--check-finite", action="store_true", help="refuse weights that hold NaN or infinity"
    )
    heads_flags(parser)


def heads_flags(parser: argparse.ArgumentParser) -> None:
    """Other numbers of heads than the checkpoint has."""
    group = parser.add_argument_group("heads")
    group.add_argument(
        "--num-attention-heads",
        type=int,
        metavar="N",
        help="query heads in memory, the same function (default: the checkpoint's)",
    )
    group.add_argument(
        "--num-key-value-heads",
        type=int,
        metavar="N",
        help="KV heads in memory (default: the checkpoint's)",
    )
    group.add_argument(
        "--head-recipe",
        default="ghost",
        choices=list(RECIPES),
        help="what the new heads hold (default: ghost); docs/head-extension.md",
    )


def heads_options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of `heads_flags`, as keyword arguments of LLM and of `Qwen2.from_pretrained`."""
    return {
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": args.num_key_value_heads,
        "head_recipe": args.head_recipe,
    }


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of `model_flags`, as keyword arguments of LLM and of `Qwen2.from_pretrained`."""
    return {
        **heads_options(args),
        "dtype": args.dtype,
        "device": args.device,
        "arithmetic": args.arithmetic,
        "offload": args.offload,
        "check_finite": args.check_finite,
    }


def engine_flags(parser: argparse.ArgumentParser) -> None:
    """LLM's options, most with vLLM's names. Those that are not given are not in the arguments."""
    group = parser.add_argument_group("engine", argument_default=argparse.SUPPRESS)
    add = group.add_argument
    add("--max-model-len", type=int, metavar="N", help="most tokens of prompt and output")
    add("--block-size", type=int, metavar="N", help="tokens per block of the cache (default: 16)")
    add("--num-blocks", type=int, metavar="N", help="of the cache (default: what fits)")
    add("--kv-cache-bytes", type=int, metavar="N", help="of the cache, on each rank")
    add("--gpu-memory-utilization", type=float, metavar="X", help="share of a GPU (default: 0.9)")
    add("--max-num-seqs", type=int, metavar="N", help="most sequences of a step (default: 64)")
    add(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="most tokens of a step (default: 2048)",
    )
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="share keys and values of common prefixes (default: yes)",
    )
    add(
        "--kv-cache-dtype",
        choices=KV_DTYPES,
        help="int8: keys and values in half of the memory, less exact (default: the model's)",
    )
    add(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        help="no: compiled steps and CUDA graphs on a GPU, not measured yet (default: yes)",
    )
    add("--trust-remote-code", action="store_true", help="makes no difference here")
    add(
        "--tensor-parallel-size",
        type=int,
        default=None,
        metavar="N",
        help="ranks that share a copy of the model (default: all of torchrun's); several copies "
        "share the prompts",
    )
    add("--swap-space", type=float, metavar="X", help="makes no difference here")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of `engine_flags` that were given, as keyword arguments of LLM."""
    given = vars(args)
    return {name: given[name] for name in ENGINE_FLAGS if name in given}


def check_writable(path: str | Path, flag: str) -> None:
    """Raise MinqwenError, before any work is done, if `flag` names a file that cannot be written.

    Nothing is created. A file that exists may be replaced; its directory must exist.
    """
    path = Path(path)
    if path.is_dir():
        problem = "is a directory, expected the name of a file"
    elif path.exists() and not path.is_file():
        problem = "is not a regular file, expected the name of one; choose another"
    elif not path.parent.is_dir():
        problem = f"has no directory to lie in ({path.parent}); create that, or choose another"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = "cannot be written (permission denied); choose another"
    else:
        return
    raise MinqwenError(f"{flag} {path}: {problem}")


def read_flag(flag: str, path: str | Path) -> str:
    """The text of the file that `flag` names. Raises MinqwenError, in one line with the flag."""
    try:
        return read_text(Path(path), MinqwenError, MAX_TEXT)
    except MinqwenError as error:
        raise MinqwenError(f"{flag} {error}") from None


def say_mistake(text: str) -> None:
    """One line about a user's mistake, on stderr, from one rank.

    Every rank tells torchrun: if another is faster, torchrun may end rank 0 before it speaks.
    """
    text = one_line(as_called_here(text))  # argparse quotes what was typed
    tell_torchrun(f"error: {text}")
    if says_why_it_ends():
        print(f"error: {own_name()}{text}", file=sys.stderr, flush=True)


def own_name() -> str:
    """Which rank this process is, to begin a line with; "" where it is the only one."""
    size = os.environ.get("WORLD_SIZE", "1")
    return f"rank {os.environ.get('RANK', '0')} of {size} (pid {os.getpid()}): " * (size != "1")


def tell_torchrun(line: str) -> None:
    """Let torchrun end its report with this line, as the root cause.

    When a rank fails, torchrun prints a traceback and a report, 45 lines that hide ours. The form
    is that of torch.distributed.elastic.multiprocessing.errors.ErrorHandler.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    details = {"py_callstack": line, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}))


class Shown:
    """A text stream in which nothing moves a terminal's cursor: names may come out of files.

    Only line ends and tabs pass as they are.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """How many characters of `text` were written, which is all."""
        self._stream.write(re.sub(r"[^\n\t]+", lambda part: printable(part[0]), text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run(main: Callable[[], int | None], exact: bool = False) -> None:
    """Run a command line: a user's mistake is one line on stderr, from one rank; exit code 2.

    After Ctrl-C it is 130, after SIGTERM 143, and what is finished is written. What it prints is
    printable (`Shown`). exact: on a terminal only. What goes to a file or to another program is a
    model's own text.
    """
    forget_tools()
    end_on_signals()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(str(message))}\n"
    out = sys.stdout
    if not exact or out.isatty():
        sys.stdout = cast(TextIO, Shown(out))
    try:
        sys.exit(main())
    except MinqwenError as error:
        if dist.is_initialized():  # the watch of the ranks has put its own hook here
            sys.excepthook(type(error), error, None)
            tell_torchrun(f"error: {error}")
        else:
            say_mistake(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if own_name() and not dist.is_initialized():
            say_mistake(f"it raised {kind_and_words(error)}")
        raise
    finally:
        sys.stdout = out


def share_text(mesh: Mesh, text: str | None) -> str | None:
    """Rank 0's text on every rank. None, the end of input, is shared too."""
    raw = None if text is None else text.encode("utf-8", "surrogatepass")
    shared = mesh.broadcast_bytes(raw)
    return None if shared is None else shared.decode("utf-8", "surrogatepass")
