#!/usr/bin/env python3
"""torchrun, which says in one line what ends a run.

  python tools/torchrun.py --nproc-per-node 4 tools/generate.py --prompt "In the beginning"

It takes torchrun's arguments and does what torchrun does. But where torchrun prints a traceback, or
a report of 45 lines after the line of the rank that failed, it prints one line or nothing; and its
exit status is that of the first rank that failed, 130 after Ctrl-C, and 143 after SIGTERM.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator

from minqwen.cli import run  # before torch, for Ctrl-C

# isort: split
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import parse_args
from torch.distributed.run import run as launch

from minqwen.errors import MinqwenError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torchrun logs, at the level of errors, of each rank that has ended."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def status_of(failed: ChildFailedError) -> int:
    """The exit status of the first rank that failed, as a shell shows it."""
    _, first = failed.get_first_failure()
    return 128 - first.exitcode if first.exitcode < 0 else first.exitcode


def said_nothing(failed: ChildFailedError) -> str:
    """A line about a rank that a signal has ended before it met the others; "" for others."""
    rank, first = failed.get_first_failure()
    if first.exitcode >= 0:
        return ""
    return f"rank {rank} (pid {first.pid}) was ended by {first.signal_name()}"


def main() -> int:
    args = parse_args(sys.argv[1:])
    signal.set_wakeup_fd(-1)  # torchrun waits for its ranks after a signal, for 30 s at most
    try:
        with quiet():
            launch(args)
    except SignalException as error:
        # The ranks have ended. To take torch down in good order would last another second or two.
        os._exit(128 + error.sigval)
    except ChildFailedError as error:
        line = said_nothing(error)
        if line:
            print(f"error: {line}", file=sys.stderr)
        return status_of(error)
    except (DistError, RendezvousError, OSError) as error:
        port = f" --master-port {args.master_port}" if args.master_port else ""
        why = str(error.__cause__ or error).splitlines()[0]
        raise MinqwenError(
            f"torchrun{port}: {why} (is the port taken? Without --master-port a free one is found)"
        ) from None
    return 0


if __name__ == "__main__":
    run(main)
