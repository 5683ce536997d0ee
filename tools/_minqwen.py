"""The command `minqwen`: each of its commands is a program that lies beside this file.

minqwen COMMAND --help     what a command does
python -m minqwen COMMAND  the same, and so is `python tools/COMMAND.py` in a checkout
torchrun --nproc-per-node 4 -m minqwen COMMAND

This file imports nothing of minqwen, so that the list of commands does not wait for torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent


def commands() -> dict[str, Path]:
    """The program of every command, by name."""
    files = [path for path in HERE.glob("*.py") if not path.name.startswith("_")]
    folders = [path.parent for path in HERE.glob("*/__main__.py")]
    return {path.stem.replace("_", "-"): path for path in sorted(files + folders)}


def summary(program: Path) -> str:
    """The first line of what a program says of itself."""
    source = program / "__main__.py" if program.is_dir() else program
    text = ast.get_docstring(ast.parse(source.read_text("utf-8"))) or ""
    return text.partition("\n")[0]


def usage() -> str:
    found = commands()
    width = max(map(len, found))
    lines = [f"  {name:{width}}  {summary(program)}" for name, program in found.items()]
    head = "usage: minqwen COMMAND ...\n       minqwen [--help | --version]\n\ncommands:"
    return "\n".join([head, *lines, "\n`minqwen COMMAND --help` says more of each."])


def version() -> str:
    """The version of what lies here: of a checkout if this is one, else of what is installed."""
    project = HERE.parent / "pyproject.toml"
    if HERE.name == "tools" and project.is_file():
        found = re.search(r'^version = "(.*)"', project.read_text("utf-8"), re.M)
        number = found[1] if found else "of a checkout"
    else:
        number = importlib.metadata.version("minqwen")
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "not installed"
    return f"minqwen {number} (torch {torch}, Python {platform.python_version()})"


def say(text: str) -> None:
    """Print it. The reader of our output may go away, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refuse(command: str) -> int:
    """One line about a command that is not there, from rank 0; exit code 2."""
    close = difflib.get_close_matches(command, commands(), n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    line = f"error: there is no command {command!r}{meant} (see minqwen --help)"
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
    return 2


def run(program: Path) -> None:
    """Run it as Python runs a script or a folder. (runpy would put its path into sys.argv.)"""
    if program.is_dir():
        sys.path.insert(0, str(program))
        program = program / "__main__.py"
    module = ModuleType("__main__")
    module.__file__ = str(program)
    sys.modules["__main__"] = module
    exec(compile(program.read_bytes(), program, "exec"), module.__dict__)


def main() -> int:
    command, *arguments = sys.argv[1:] or [""]
    if not command:
        print(usage(), file=sys.stderr)
        return 2
    if command in ("-h", "--help", "-V", "--version"):
        say(version() if command in ("-V", "--version") else usage())
        return 0
    program = commands().get(command.replace("_", "-"))
    if program is None:
        return refuse(command)
    sys.argv = [f"minqwen {command}", *arguments]  # the name that argparse and our messages give
    run(program)
    return 0


if __name__ == "__main__":
    sys.exit(main())
