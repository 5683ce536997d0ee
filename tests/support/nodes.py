"""Two nodes on one machine: two network namespaces that a virtual cable joins.

Each node has its own interfaces, its own loopback and its own process numbers. As on many machines,
the name of the host is a loopback address on both.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from support.torchrun import environment, marked

ADDRESSES = ("10.213.77.1", "10.213.77.2")
INTERFACE = "cable0"  # what the end of the cable is called on both nodes
PORT = 29500  # nothing else listens in a new namespace
GENEROUS = 300  # seconds in which a loaded machine does what takes a few


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that start with "error: "."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Nodes:
    """torchrun on both nodes; node 0 has the store. `folder` holds what they print."""

    def __init__(self, namespaces: Sequence[str], folder: Path) -> None:
        self.namespaces, self.folder = namespaces, folder
        self.marks = [uuid.uuid4().hex for _ in namespaces]
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, script: str | Path, args: Sequence[object] = (), **env: str) -> None:
        """`script` (Python source, or the Path of a file) on two ranks of each node, over gloo."""
        path = script
        if isinstance(script, str):
            path = self.folder / "snippet.py"
            path.write_text(script)
        for node in range(2):
            self._start_node(node, [str(path), *map(str, args)], env)

    def _start_node(self, node: int, command: list[str], env: dict[str, str]) -> None:
        enter = ["ip", "netns", "exec", self.namespaces[node]]
        enter += ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        launcher = [sys.executable, "-m", "torch.distributed.run"]
        launcher += ["--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(node)]
        launcher += ["--master-addr", ADDRESSES[0], "--master-port", str(PORT)]
        with open(self._file(node, "out"), "wb") as out, open(self._file(node, "err"), "wb") as err:
            process = subprocess.Popen(
                enter + launcher + command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment(self.marks[node], {"GLOO_SOCKET_IFNAME": None, **env}),
                start_new_session=True,
            )
        self.processes.append(process)

    def _file(self, node: int, stream: str) -> Path:
        return self.folder / f"node{node}.{stream}"

    def wait_for_output(self, node: int) -> None:
        """Returns when `node` has printed a line."""
        deadline = time.monotonic() + GENEROUS
        while b"\n" not in self._file(node, "out").read_bytes():
            ended = self.processes[node].poll() is not None or time.monotonic() > deadline
            assert not ended, self._file(node, "err").read_text()
            time.sleep(0.05)

    def kill(self, node: int) -> None:
        """Ends every process of a node at once, torchrun too."""
        for process in marked(self.marks[node]):
            with contextlib.suppress(Exception):
                process.kill()

    def cut(self) -> None:
        """Pulls the cable out. Neither node is told."""
        _ip("-n", self.namespaces[0], "link", "set", INTERFACE, "down")

    def ended(self, node: int) -> Ended:
        """How torchrun ends on `node`."""
        code = self.processes[node].wait(GENEROUS)
        return Ended(code, self._file(node, "out").read_text(), self._file(node, "err").read_text())


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    """Skips the test where the machine does not allow namespaces; leaves nothing behind."""
    names = [f"minqwen-{uuid.uuid4().hex[:8]}" for _ in ADDRESSES]
    nodes = Nodes(names, folder)
    _check_commands()
    try:
        _join_by_cable(names)
        yield nodes
    finally:
        for node, process in enumerate(nodes.processes):
            nodes.kill(node)
            process.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _check_commands() -> None:
    for command in ("ip", "unshare"):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is missing: install iproute2 and util-linux")
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")


def _join_by_cable(names: Sequence[str]) -> None:
    try:
        for name in names:
            _ip("netns", "add", name)
        ends = [["name", INTERFACE, "netns", name] for name in names]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(names, ADDRESSES):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", INTERFACE, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine allows no network namespaces: {error.stderr.strip()}")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
