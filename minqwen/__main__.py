"""`python -m minqwen COMMAND` is the installed command `minqwen`; also for `torchrun -m`."""

from __future__ import annotations

import runpy

from minqwen.commands import TOOLS

runpy.run_path(str(TOOLS / "_minqwen.py"), run_name="__main__")
