"""Starts a server and ends it: the socket, the thread that serves, the thread that steps, signals.

The engine steps in the main thread, where the watch of the ranks looks and where a GPU was chosen.
uvicorn serves in a thread of its own.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from minqwen.errors import MinqwenError, one_line
from minqwen.serve.app import LOOPBACK, make_app
from minqwen.serve.errors import ApiError
from minqwen.serve.service import Service

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AFTER_GRACE = 1  # second in which the last answers leave, once the engine has ended them


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address; port 0 takes a free one. Raises MinqwenError if there is none."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, proto)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        why = f"{error.strerror if isinstance(error, OSError) else error}"
        raise MinqwenError(f"--host {host} --port {port}: cannot listen there ({why})") from None
    return bound


def is_loopback(listener: socket.socket) -> bool:
    address = str(listener.getsockname()[0])
    return address.startswith("127.") or address == "::1"


class Server:
    """uvicorn in a thread of its own.

    grace: seconds that running requests have to finish once `end` is called.
    """

    def __init__(self, service: Service, app: FastAPI, listener: socket.socket, grace: float):
        self.service, self.listener, self.grace = service, listener, grace
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(grace) + AFTER_GRACE,
            server_header=False,
            lifespan="off",
            ws="none",
        )
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self._serve, name="minqwen-serve", daemon=True)
        self.error: BaseException | None = None
        self._timer: threading.Timer | None = None

    def start(self) -> None:
        """Returns when clients can connect."""
        self.thread.start()
        while self.thread.is_alive() and not self.uvicorn.started:
            time.sleep(0.01)

    def end(self) -> None:
        """Take no new requests; let those that run finish, for at most `grace` seconds."""
        if self._timer is None:
            self.service.front.closing = self.uvicorn.should_exit = True
            self._timer = threading.Timer(self.grace, self._end_all)
            self._timer.daemon = True
            self._timer.start()

    def _end_all(self) -> None:
        why = f"the server ends, and this request was not done within {self.grace:g} s"
        self.service.loop.abort_all(ApiError(503, why, code="ending"))

    def _serve(self) -> None:
        try:
            self.uvicorn.run(sockets=[self.listener])
        except BaseException as error:  # the main thread raises it
            self.error = error
        finally:  # whatever has ended it, the engine ends too
            self.service.loop.end()

    def join(self) -> None:
        """Wait until the last answer has left. Raises what has ended the thread that serves."""
        self.thread.join()
        if self._timer is not None:
            self._timer.cancel()
        if self.error is not None:
            raise self.error


def serve(
    service: Service,
    listener: socket.socket,
    *,
    api_key: str | None = None,
    hosts: Sequence[str] = (),
    grace: float = 3,
) -> int | None:
    """Serve until SIGTERM or Ctrl-C, on rank 0, in the main thread. A second signal ends at once.

    Returns the number of the signal that came.
    hosts: names by which clients may call a server on loopback, besides those of loopback.
    """
    allowed = [*LOOPBACK, *hosts] if is_loopback(listener) or hosts else ["*"]
    app = make_app(service, api_key, allowed)
    server = Server(service, app, listener, grace)
    with signals_end(server) as came:
        server.start()
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        where = one_line(f"serving {service.name} at http://{shown}:{port}")
        print(where, file=sys.stderr, flush=True)
        try:
            service.loop.run()
        except KeyboardInterrupt:  # the second signal
            server.uvicorn.force_exit = True
            raise
        finally:
            server.end()
            server.join()
    return came[0] if came else None


@contextlib.contextmanager
def signals_end(server: Server) -> Iterator[list[int]]:
    """The first signal lets the server end, a second one raises KeyboardInterrupt.

    Yields a list in which the number of the first one will be.
    """
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        server.end()

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    # Under torchrun the watch reads signals here, and ends the process two seconds after one.
    watched = signal.set_wakeup_fd(-1)
    try:
        yield came
    finally:
        signal.set_wakeup_fd(watched)
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """On the other ranks: they end when rank 0 does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
