"""Chat templates, rendered in a small process of their own, which the operating system limits.

A chat template is a program that arrives with the weights. jinja2's immutable sandbox keeps it away
from Python, but not from `'a' * 10**10`, `'%1000000000d'` or loops without end, and nothing inside
a Python process can stop a C function that runs for minutes. So `ChatRenderer` runs this very file
as a script, `python -I -S chat_template.py`. That process may use CPU_SECONDS of processor time per
chat (the kernel then ends it, whatever it is doing) and MEMORY_BYTES of memory, and no files,
sockets or processes at all. It starts once, in a tenth of a second, and then renders a chat in a
fraction of a millisecond.

One request a line on its stdin, {"template": str, "variables": object}; one reply a line on its
stdout, {"text": str} or {"error": str}.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

if __name__ != "__main__":  # as a script this file has no package around it
    from minqwen.errors import TokenizerError

if TYPE_CHECKING:
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 0.5
MEMORY_BYTES = 1 << 30
MAX_CHARACTERS = 8_000_000  # of rendered text: far more than any context window holds
CLOCK_SECONDS = 30.0  # then the process is ended, for systems that cannot limit processor time
LATER_IMPORTS = (
    "encodings.ascii",
    "encodings.unicode_escape",
    "html",
    "jinja2.constants",
    "jinja2.debug",
    "pprint",
    "textwrap",
)  # what jinja2 imports only when a template needs it


class ChatRenderer:
    """The asking end of one process, which starts at the first render and again after a failure.

    Threads may share it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end_process: Callable[[], object] = _nothing

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The rendered text. Whatever else the template did is a TokenizerError of one line."""
        try:
            request = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise TokenizerError(
                f"messages, tools and variables must be JSON values: {error}"
            ) from None
        with self._lock:
            reply = self._exchange(request)
        if "error" in reply:
            raise TokenizerError(reply["error"])
        return reply["text"]

    def _exchange(self, request: bytes) -> dict[str, str]:
        process = self._running_process()
        reply = b""
        clock = threading.Timer(CLOCK_SECONDS, process.kill)
        clock.daemon = True
        clock.start()
        try:
            reply = _ask(process, request)
        finally:
            clock.cancel()
            # Without a whole reply the process is dead, or this thread was interrupted. Then the
            # reply must not come later, as the answer to another request.
            if not reply.endswith(b"\n"):
                self._end_process()
        if reply.endswith(b"\n"):
            parsed: dict[str, str] = json.loads(reply)
            return parsed
        return {"error": _why_it_ended(process)}

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end_process()  # somebody may have killed it: its pipes are still open
            self._process = _start()
            # It also runs when nobody has this renderer any more. A second call does nothing.
            self._end_process = weakref.finalize(self, _end, self._process)
        return self._process


def _nothing() -> None:
    """There is no process to end yet."""


def _start() -> subprocess.Popen[bytes]:
    path = json.dumps([str(entry) for entry in sys.path])
    names = ("TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), path],
            env=kept,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except (OSError, TypeError) as error:
        raise TokenizerError(f"cannot start {sys.executable} to render it: {error}") from None


def _ask(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """The line that the process replies; without a line end if the process is gone."""
    assert process.stdin is not None and process.stdout is not None  # both are pipes
    try:
        process.stdin.write(request)
        process.stdin.flush()
        return process.stdout.readline()
    except OSError:  # a broken pipe
        return b""


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()


def _why_it_ended(process: subprocess.Popen[bytes]) -> str:
    if process.returncode == -getattr(signal, "SIGPROF", 0):
        return f"it needs more than {CPU_SECONDS:g} s of processor time"
    return f"the process that rendered it ended with status {process.returncode}"


# ---- what follows runs in the rendering process -------------------------------------------------


def _environment() -> ImmutableSandboxedEnvironment:
    """The jinja2 environment of Hugging Face's chat templates: its options, filters, globals."""
    # Imported here, because the process that asks does not need jinja2.
    from jinja2 import ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation_extension(), ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        namespace=_public_namespace(),
    )
    return environment


def _generation_extension() -> type[Any]:
    from jinja2 import ext, nodes

    class Generation(ext.Extension):
        """{% generation %}...{% endgeneration %} marks what the assistant wrote.

        It renders as its body.
        """

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

        def body(self, caller: Callable[[], str]) -> str:
            return caller()

    return Generation


def _public_namespace() -> type[Any]:
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: object) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace attribute cannot be called {name!r}")

    class PublicNamespace(Namespace):
        """A namespace without names that begin with an underscore.

        Python code that is given an object may look for such names and call what it finds, as
        markupsafe does with __html__.
        """

        # There is no parameter `self`, because namespace(self=1) is a legal template.
        def __init__(*args: Any, **kwargs: Any) -> None:
            for name in dict(*args[1:], **kwargs):
                check(name)
            Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            Namespace.__setitem__(self, name, value)

    return PublicNamespace


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _confine() -> None:
    """Give up, for good, what rendering does not need."""
    for module in LATER_IMPORTS:  # afterwards no file can be opened
        importlib.import_module(module)
    time.localtime()  # reads the time zone
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    for name, limit in (("AS", MEMORY_BYTES), ("NOFILE", 0), ("NPROC", 0), ("CORE", 0)):
        number = getattr(resource, f"RLIMIT_{name}")
        allowed = resource.getrlimit(number)[1]
        limit = limit if allowed == resource.RLIM_INFINITY else min(limit, allowed)
        with contextlib.suppress(OSError, ValueError):  # macOS cannot limit memory
            resource.setrlimit(number, (limit, limit))


def _describe(error: BaseException) -> str:
    """One line about whatever a template raised."""
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"
    if isinstance(error, RecursionError):
        return "it recurses too deeply"
    words = " ".join(str(error)[:500].split())
    if type(error).__module__ == "builtins" or not words:
        words = f"{type(error).__name__}: {words}"
    line = getattr(error, "lineno", None)  # of a syntax error
    return f"line {line}: {words}" if line else words


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # control-C is for the process that asked
    sys.path[:] = json.loads(sys.argv[1])  # the asker's, so that both find the same jinja2
    compiled = functools.lru_cache(maxsize=8)(_environment().from_string)
    _confine()
    for request in sys.stdin.buffer:
        _limit_processor_time(CPU_SECONDS)
        try:
            question = json.loads(request)
            text = compiled(question["template"]).render(question["variables"])
            if len(text) > MAX_CHARACTERS:
                raise ValueError(
                    f"it renders {len(text):,} characters; the limit is {MAX_CHARACTERS:,}"
                )
            reply = json.dumps({"text": text})
        except BaseException as error:
            reply = json.dumps({"error": _describe(error)})
        _limit_processor_time(0)
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit_processor_time(seconds: float) -> None:
    """After so many seconds of work a signal, SIGPROF, ends this process. 0 means no limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    _serve()
