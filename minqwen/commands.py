"""Where the command lines are, and what a user calls them: tools/NAME.py, or minqwen NAME.

In a checkout they lie in tools/. A wheel has them beside this package, as `minqwen_tools`: a name
of its own, because `minqwen --help` would wait for torch if it had to import `minqwen`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_BESIDE = Path(__file__).resolve().parent.parent
INSTALLED = (_BESIDE / "minqwen_tools").is_dir()
TOOLS = _BESIDE / ("minqwen_tools" if INSTALLED else "tools")
_UNDER_TORCHRUN = re.compile(r"(\btorchrun\b[^\n]*? )tools/(\w+)\.py\b")
_TOOL = re.compile(r"(?<![\w/.-])(?:python )?tools/(\w+)\.py\b")


def as_called_here(text: str) -> str:
    """A text that names tools as a checkout has them, "tools/heads.py extend", as they are here.

    Outside a checkout, and in what was started by the command `minqwen`, that is "minqwen heads
    extend".
    """
    if not INSTALLED and not sys.argv[0].startswith("minqwen "):
        return text
    text = _UNDER_TORCHRUN.sub(lambda found: f"{found[1]}-m minqwen {_command(found[2])}", text)
    return _TOOL.sub(lambda found: f"minqwen {_command(found[1])}", text)


def _command(name: str) -> str:
    return name.replace("_", "-")


def forget_tools() -> None:
    """Python looks for modules beside the program that it runs first: no longer, if that is a tool.

    There `profile`, `trace` and others would be found in place of Python's own modules, which
    torch.compile imports, for one.
    """
    if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == TOOLS:
        del sys.path[0]
