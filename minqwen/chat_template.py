"""Chat templates, rendered in a small process of their own where the operating system enforces the limits.

A chat template is a program that arrives with the weights. jinja2's immutable sandbox keeps it away from
Python, but not from `'a' * 10**10`, `'%1000000000d'` or loops without end, and nothing inside a Python
process can stop a C function that runs for minutes. So `ChatRenderer` runs this very file as a script,
`python -I -S chat_template.py`, which may use CPU_SECONDS of processor time per chat (the kernel then ends
it, wherever it is), MEMORY_BYTES of memory, and no files, sockets or processes at all. It starts in a tenth
of a second, once, and then renders a chat in a fraction of a millisecond.

One request a line on its stdin, {"template": str, "variables": object}; one reply a line on its stdout,
{"text": str} or {"error": str}.
"""

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

if __name__ != "__main__":
    from minqwen.errors import TokenizerError

CPU_SECONDS = 0.5
MEMORY_BYTES = 1 << 30
MAX_CHARACTERS = 8_000_000  # of rendered text: far more than any context window holds
CLOCK_SECONDS = 30.0  # until the asker ends the process: for systems without a processor-time limit
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
    """The asking end: one process, started at the first render and after a failure. Threads may share it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process = None

    def render(self, template: str, variables: dict) -> str:
        """Raises TokenizerError, in one line, for whatever the template did instead of rendering."""
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

    def _exchange(self, request: bytes) -> dict:
        if self._process is None or self._process.poll() is not None:
            self._process = _start()
            weakref.finalize(self, _end, self._process)
        process, reply = self._process, b""
        clock = threading.Timer(CLOCK_SECONDS, process.kill)
        clock.daemon = True
        clock.start()
        try:
            with contextlib.suppress(OSError):  # a broken pipe: the process is gone
                process.stdin.write(request)
                process.stdin.flush()
                reply = process.stdout.readline()
        finally:
            clock.cancel()
            if not reply.endswith(
                b"\n"
            ):  # dead; or we were interrupted, and its answer must not come later
                self._process = None
                _end(process)
        if reply.endswith(b"\n"):
            return json.loads(reply)
        if process.returncode == -getattr(signal, "SIGPROF", 0):
            return {"error": f"it needs more than {CPU_SECONDS:g} s of processor time"}
        return {"error": f"the process that rendered it ended with status {process.returncode}"}


def _start() -> subprocess.Popen:
    path = json.dumps([str(entry) for entry in sys.path])
    kept = {
        name: os.environ[name]
        for name in ("TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")
        if name in os.environ
    }
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


def _end(process: subprocess.Popen) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()
    process.wait()


# What follows runs in the rendering process.


def _environment():
    """The jinja2 environment that Hugging Face renders chat templates in: its options, filters, globals."""
    from jinja2 import ext, nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(ext.Extension):
        """{% generation %}...{% endgeneration %} marks what the assistant wrote; it renders as its body."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

        def body(self, caller):
            return caller()

    class PublicNamespace(Namespace):
        """A namespace without underscore names, which Python code that is handed one might call by itself."""

        def __init__(*args, **kwargs):  # no named `self`: namespace(self=1) is a legal template
            for name in dict(*args[1:], **kwargs):
                PublicNamespace.check(name)
            Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name, value):
            PublicNamespace.check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def check(name):
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace attribute cannot be called {name!r}")

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message):
        raise TemplateError(message)

    def strftime_now(format):
        return datetime.datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, namespace=PublicNamespace
    )
    return environment


def _confine() -> None:
    """Give up, for good, what rendering does not need."""
    for module in LATER_IMPORTS:  # while files can still be opened
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
    limit_processor = getattr(signal, "setitimer", lambda *_: None)
    timer = getattr(signal, "ITIMER_PROF", None)
    _confine()
    for request in sys.stdin.buffer:
        limit_processor(timer, CPU_SECONDS)  # its signal, SIGPROF, ends the process
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
        limit_processor(timer, 0)
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
