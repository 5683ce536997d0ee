"""Chat templates, rendered in a small process of their own, which the operating system limits.

A chat template is a program that arrives with the weights. jinja2's immutable sandbox keeps it away
from Python, but not from `'a' * 10**10`, `'%1000000000d'` or loops without end. So `ChatRenderer`
has this very file run by `minqwen/confined.py`, which gives it CPU_SECONDS of processor time for a
chat, a gigabyte, and no files, sockets or processes. Rendering takes a fraction of a millisecond
there. The question is {"template": str, "variables": object}, the answer {"text": str}.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

if __name__ != "confined":  # in that process this file has no package around it
    from minqwen.confined import Confined, Gone
    from minqwen.errors import TokenizerError

if TYPE_CHECKING:
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 0.5
MAX_CHARACTERS = 8_000_000  # of rendered text: far more than any context window holds
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
    """Asks the process that renders. Threads may share it."""

    def __init__(self) -> None:
        self._confined = Confined(__file__, "rendered")

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The rendered text. Whatever else the template did is a TokenizerError of one line."""
        question = {"template": template, "variables": variables}
        try:
            text: str = self._confined.ask(question, CPU_SECONDS)["text"]
        except Gone as error:
            raise TokenizerError(str(error)) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise TokenizerError(
                f"messages, tools and variables must be JSON values: {error}"
            ) from None
        return text


# ---- what follows runs in the rendering process -------------------------------------------------


def prepare() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function that renders. All that it may need is imported: later no file can be opened."""
    compiled = functools.lru_cache(maxsize=8)(_environment().from_string)
    for module in LATER_IMPORTS:
        importlib.import_module(module)
    time.localtime()  # reads the time zone

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        text = compiled(question["template"]).render(question["variables"])
        if len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"it renders {len(text):,} characters; the limit is {MAX_CHARACTERS:,}"
            )
        return {"text": text}

    return answer


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
