"""Chat templates render as in transformers, also the hostile ones that must not."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from support.paths import ROOT
from support.tokenizer import (
    USER,
    one_line,
)

from minqwen.errors import TokenizerError
from minqwen.tokenizer.chat_template import ChatRenderer

POSIX = pytest.mark.skipif(os.name != "posix", reason="the kernel's limits are POSIX")


def test_a_template_is_rendered_with_its_variables():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    assert ChatRenderer().render(template, {"messages": USER}) == "user: hi"


TEMPLATES = [
    (
        "{% for m in messages %}\n  {% if loop.first %}\n  x{% endif %}\n{{ m.content }}"
        " \n{% endfor %}\n"
    ),
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ '<é&>' | tojson }}",
    (
        "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}"
        "{{ 'é' | tojson(true) }}"
    ),
    (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% continue %}"
        "{% endfor %}done"
    ),
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    (
        "{% set n = namespace(n=0, self=1) %}{% for m in messages %}{% set n.n = n.n + 1 %}"
        "{% endfor %}{{ n.n }}"
    ),
    (
        "{% macro f(x, y='d') %}[{{ x }}{{ y }}{{ varargs }}{{ kwargs }}]{% endmacro %}"
        "{{ f(1, 2, 3, z=4) }}"
    ),
    "{% macro m() %}<{{ caller(1) }}>{% endmacro %}{% call(u) m() %}{{ u }}{% endcall %}",
    "{% filter upper %}abc{% endfilter %}{% set x %}block{% endset %}{{ x }}",
    "{{ messages[0].content.split('i')[0] | trim | upper }}{{ 'a\tb\\u00e9\\n' }}{{ 'abc'[::-1] }}",
    (
        "{{ none }}{{ undefined }}{{ undefined is defined }}{{ true }}{{ 1.0 }}{{ [1, 'a'] }}"
        "{{ {'a': none} }}"
    ),
    (
        "{{ '%s-%05.1f' % ('a', 2) }}{{ '{:>5}|{a}'.format(1, a='b') }}{{ 2 ** 9 // 3 }}"
        "{{ 7 % 4 }}{{ 'a' ~ 1 }}"
    ),
    (
        "{{ range(5) | list }}{{ dict(a=1).items() | list }}{{ cycler('a', 'b').next() }}"
        "{{ joiner(',')() }}"
    ),
    (
        "{{ ['b', 'a'] | sort | join(', ') }}{{ [1, 2, 3] | sum }}{{ 'x' | center(5) }}"
        "{{ [3] | pprint }}"
    ),
    (
        "{{ 'a b' | wordwrap(1) }}{{ '<b>&amp; x</b>' | striptags }}{{ '<' | e }}"
        "{{ 'a b' | urlencode }}"
    ),
    (
        "{{ 'http://x.y' | urlize }}{{ 5000 | filesizeformat }}{{ 'x' | indent(2, true) }}"
        "{{ 'é' | length }}"
    ),
    (
        "{{ messages | map(attribute='role') | unique | list }}"
        "{{ messages | groupby('role') | length }}"
    ),
    (
        "{{ messages | selectattr('role', 'equalto', 'user') | list }}"
        "{{ [1, 2, 3] | reject('odd') | first }}"
    ),
    (
        "{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}"
        "{{ 'ab' | replace('b', 'x') }}"
    ),
    "{{ strftime_now('%d %B %Y') }}{{ 3.7 | round | int }}{{ '7' | int + 1 }}{{ lipsum(n=0) }}",
    (
        "{{ '' | attr('__class__') }}{{ messages.__class__ }}"
        "{{ ['a'] | map(attribute='__class__') | list }}"
    ),
    "{{ raise_exception('only\nusers') }}",
    "{{ messages.append(1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{% for %}",
    "{% include 'x' %}",
    "{{ 1 + 'a' }}",
    "{{ messages | nosuchfilter }}",
    "{{ tools[0].x.y }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(qwen, hf, template):
    messages = [*USER, {"role": "assistant", "content": " Grüße 🙂 <x> "}, *USER]
    try:
        expected = hf.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception as refused:
        with pytest.raises(TokenizerError) as error:
            qwen.apply_chat_template(messages, chat_template=template, add_generation_prompt=False)
        assert " ".join(str(refused).split()) in one_line(error)
    else:
        got = qwen.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=False
        )
        assert got == expected


def nested(shape: str, times: int) -> str:
    return (
        "{% set ns = namespace(x=['aa']) %}{% for i in range("
        + str(times)
        + ") %}{% set ns.x = "
        + shape
        + " %}{% endfor %}"
    )


ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% continue %}{% endfor %}{% endfor %}"
)
ATTACKS = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested ranges": ENDLESS,
    "string times n": "{{ 'a' * 10**10 }}",
    "list times n": "{{ ([0] * 10**9) | length }}",
    "join": "{{ (['a' * 10000] * 10**6) | join }}",
    "replace": "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
    "percent padding": "{{ '%1000000000d' % 1 }}",
    "star padding": "{{ '%*d' % (10**9, 1) }}",
    "nested format": "{{ '{:{}}'.format('a', 10**9) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "indent": "{{ [1] | tojson(indent=10**10) }}",
    "macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(200) }}",
    "recursive loop": "{% for x in [messages] recursive %}{{ loop(messages * 9) }}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "doubling": nested("ns.x + ns.x", 60),
    "shared tree": nested("[ns.x, ns.x]", 60) + "{{ ns.x }}",
    "deep list": nested("[ns.x]", 90000) + "{{ ns.x }}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long sum": "{{ " + "1+" * 50000 + "1 }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "deep loops": "{% for i in [1] %}" * 200 + "{% endfor %}" * 200,
    "too much text": "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    "huge error": "{{ raise_exception('x' * 10**8) }}",
    "class": "{{ ''.__class__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "template": "{{ self.__init__.__globals__ }}",
    "frame": "{{ ((1 for x in []) if false else messages).gi_frame.f_back }}",
    "format class": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "format map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "file": "{% include '/etc/passwd' %}",
}


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer()


def started_renderer() -> tuple[ChatRenderer, psutil.Process]:
    """A renderer and the process that it has started."""
    others = psutil.Process().children()
    renderer = ChatRenderer()
    assert renderer.render("x", {}) == "x"
    (process,) = (child for child in psutil.Process().children() if child not in others)
    return renderer, process


@POSIX
@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_templates_end_in_one_line(renderer, name):
    assert renderer.render("{{ 6 * 7 }}", {}) == "42"  # also after the attack before this one
    with pytest.raises(TokenizerError) as error:
        renderer.render(ATTACKS[name], {"messages": USER})
    text = one_line(error)
    assert "root:" not in text
    # A process that its limit of processor time or memory does not end is ended by the asker, after
    # CLOCK_SECONDS, and then the line says this.
    assert "ended with status" not in text


@POSIX
def test_the_rendering_process_has_given_up_files_and_memory():
    renderer, process = started_renderer()
    assert process.rlimit(psutil.RLIMIT_NOFILE) == (0, 0)
    assert 0 < process.rlimit(psutil.RLIMIT_AS)[1] <= 1 << 30
    assert set(process.environ()) <= {"TZ", "LD_LIBRARY_PATH", "LC_CTYPE"}
    assert renderer.render("{{ ('a' * 10**8) | length }}", {}) == "100000000"
    assert process.memory_info().rss < 300 << 20
    # Control-C goes to every process of a terminal. This one outlives it.
    process.send_signal(signal.SIGINT)
    with pytest.raises(TokenizerError) as error:
        renderer.render("{{ 'a' * 8000001 }}", {})
    assert "8,000,001 characters" in one_line(error) and process.is_running()
    del renderer, error  # the error holds the frames it passed through
    gc.collect()
    assert not psutil.pid_exists(process.pid)


def test_threads_share_one_tokenizer(qwen):
    results = {}

    def work(n):
        try:
            messages = [{"role": "user", "content": f"n{n}"}]
            results[n] = qwen.apply_chat_template(
                messages, chat_template=ENDLESS if n == 3 else None
            )
        except TokenizerError as error:
            results[n] = str(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert "processor time" in results.pop(3) and len(results) == 11
    assert all(f"user\nn{n}<|im_end|>" in text for n, text in results.items())


@POSIX
def test_an_interrupted_render_leaves_no_stale_answer():
    def interrupt(*_):
        raise KeyboardInterrupt

    renderer, process = started_renderer()
    process.suspend()  # no answer can come before the interrupt
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            renderer.render("stale", {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.resume()
    assert renderer.render("fresh", {}) == "fresh"


@POSIX
def test_renderers_that_are_killed_leave_no_file_open():
    me = psutil.Process()
    others = me.children()
    renderer, process = started_renderer()
    before = me.num_fds()
    for _ in range(5):
        process.kill()
        process.wait()
        assert renderer.render("x", {}) == "x"
        (process,) = (child for child in me.children() if child not in others)
    assert me.num_fds() == before


@POSIX
def test_a_killed_parent_leaves_no_process():
    code = (
        "import os, psutil, signal\n"
        "from minqwen.tokenizer.chat_template import ChatRenderer\n"
        "renderer = ChatRenderer()\n"
        "renderer.render('x', {})\n"
        "print(psutil.Process().children()[0].pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, give_up = int(done.stdout), time.monotonic() + 300

    def ended() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    while not ended() and time.monotonic() < give_up:
        time.sleep(0.05)
    assert ended()
