"""Two nodes on one machine: two network namespaces that a virtual cable joins.

Each node has its own interfaces, its own loopback and its own process numbers. As on many machines,
the name of the host is a loopback address on both.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from support.forked import Server
from support.torchrun import marked

ADDRESSES = ("10.213.77.1", "10.213.77.2")
INTERFACE = "cable0"  # what the end of the cable is called on both nodes
PORTS = itertools.count(29500)  # nothing else listens in a new namespace
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
    """A run under torchrun on both nodes; node 0 has the store. `folder` holds what they print."""

    def __init__(self, namespaces: Sequence[str], servers: Sequence[Server], folder: Path) -> None:
        self.namespaces, self.servers, self.folder = namespaces, servers, folder
        self.marks: list[str] = []  # of the runs that have been started
        self.codes: dict[int, int] = {}  # exit statuses of those that have ended
        _ip("-n", namespaces[0], "link", "set", INTERFACE, "up")  # a test before may have cut it

    def start(self, script: str | Path, args: Sequence[object] = (), **env: str) -> None:
        """`script` (Python source, or the Path of a file) on two ranks of each node, over gloo."""
        path = script
        if isinstance(script, str):
            path = self.folder / "snippet.py"
            path.write_text(script)
        port = next(PORTS)
        for node in range(2):
            self._start_node(node, [path, *args], env, port)

    def _start_node(self, node: int, words: list[object], env: dict[str, str], port: int) -> None:
        launcher = ["--nnodes", 2, "--nproc-per-node", 2, "--node-rank", node]
        launcher += ["--master-addr", ADDRESSES[0], "--master-port", port]
        files = self._file(node, "out"), self._file(node, "err")
        changes: dict[str, str | None] = {"GLOO_SOCKET_IFNAME": None, **env}
        self.marks.append(self.servers[node].start(2, words, changes, *files, launcher))

    def _file(self, node: int, stream: str) -> Path:
        return self.folder / f"node{node}.{stream}"

    def wait_for_output(self, node: int) -> None:
        """Returns when `node` has printed a line."""
        deadline = time.monotonic() + GENEROUS
        out = self._file(node, "out")
        while not out.exists() or b"\n" not in out.read_bytes():
            ended = self.servers[node].has_ended(0.05) or time.monotonic() > deadline
            assert not ended, self._file(node, "err").read_text()

    def wait_for_stop(self, node: int) -> psutil.Process:
        """The process of `node` that has been stopped, when one has."""
        while True:
            for process in self._running(node):
                if process.status() == psutil.STATUS_STOPPED:
                    return process

    def wait_for_end_of_others(self, node: int, rank: psutil.Process) -> None:
        """Returns when torchrun has no other rank than `rank` on `node`."""
        while len(torchrun_and_ranks := self._running(node)) > 2:
            pass
        assert rank in torchrun_and_ranks

    def _running(self, node: int) -> list[psutil.Process]:
        """The processes of a node, as long as its torchrun has not ended."""
        assert not self.servers[node].has_ended(0.05), self._file(node, "err").read_text()
        return marked(self.marks[node])

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
        out, err = self._file(node, "out"), self._file(node, "err")
        if node not in self.codes:
            assert self.servers[node].has_ended(GENEROUS), err.read_text()
            self.codes[node] = self.servers[node].code()
        return Ended(self.codes[node], out.read_text(), err.read_text())

    def end(self) -> None:
        """Leaves no process of the runs, and servers that can make the next one."""
        for node in range(len(self.marks)):
            self.kill(node)
            self.ended(node)
        assert not any(map(marked, self.marks))


@contextlib.contextmanager
def two_nodes() -> Iterator[Callable[[Path], Nodes]]:
    """What makes `Nodes` for one run, on two nodes that stay as long as the context.

    Skips the test where the machine does not allow namespaces; leaves nothing behind.
    """
    names = [f"minqwen-{uuid.uuid4().hex[:8]}" for _ in ADDRESSES]
    servers: list[Server] = []
    _check_commands()
    try:
        _join_by_cable(names)
        for name in names:
            enter = ["ip", "netns", "exec", name]
            enter += ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
            servers.append(Server(enter))
        yield lambda folder: Nodes(names, servers, folder)
    finally:
        for server in servers:
            server.close()
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
