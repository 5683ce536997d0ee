"""A conversation with tools/generate.py on a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import runpy
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from support.paths import ROOT

from minqwen import SamplingParams
from minqwen.parallel import Mesh

LONG = ["--ignore-eos", "--max-tokens", "900", "--temperature", "0", "--dtype", "float32"]


class Chat:
    """What a user sees and types."""

    def __init__(self, *flags: str) -> None:
        self.keys, terminal = pty.openpty()
        command = [sys.executable, str(ROOT / "tools" / "generate.py"), "--chat", *flags]
        self.process = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "dumb"},
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # for Ctrl-C
        )
        os.close(terminal)
        self.unread = ""

    def type(self, keys: str) -> None:
        os.write(self.keys, keys.encode())

    def until(self, text: str) -> str:
        """What comes up to `text`."""
        while text not in self.unread:
            try:
                self.unread += os.read(self.keys, 4096).decode(errors="replace")
            except OSError:  # a terminal that no process has open any more
                raise AssertionError(f"it ended without {text!r}: {self.unread}") from None
        before, _, self.unread = self.unread.partition(text)
        return before

    def end(self) -> int:
        """The exit status. All that is printed is read first, so that the tool never waits."""
        try:
            while os.read(self.keys, 4096):
                pass
        except OSError:
            pass  # a terminal that no process has open any more
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.keys)


@pytest.fixture
def chat(request) -> Iterator[Chat]:
    found = Chat(*request.param)
    yield found
    found.close()


@pytest.mark.parametrize("chat", [["--temperature", "0"]], indirect=True)
def test_a_question_is_answered_and_commands_are_obeyed(chat):
    banner = chat.until("> ")
    assert "Ctrl-C ends an answer" in banner and "/help" in banner and "/quit" in banner
    chat.type("What is 47 + 38?\n")
    assert "85" in chat.until("\n> ")
    chat.type("/help\n")
    help_text = chat.until("\n> ")
    assert all(name in help_text for name in ("/clear", "/system TEXT", "/quit"))
    chat.type("/claer\n")
    assert "did you mean '/clear'?" in chat.until("\n> ")
    for command in ("/clear", "/system Be brief.", "/system"):
        chat.type(command + "\n")
        assert "(a new conversation)" in chat.until("\n> ")
    chat.type("\n")  # an empty line asks nothing
    chat.until("> ")
    chat.type("/quit\n")
    assert chat.end() == 0


@pytest.mark.parametrize("chat", [LONG], indirect=True)
def test_ctrl_c_ends_the_answer_and_not_the_program(chat):
    chat.until("> ")
    chat.type("What is 47 + 38?\n")
    chat.until("85")  # the answer goes on for 900 tokens
    chat.type("\x03")
    chat.until("(interrupted)")
    chat.until("> ")
    chat.type("/clear\n")
    chat.until("> ")
    chat.type("What is 47 + 38?\n")  # the engine and the template go on
    chat.until("85")
    chat.type("\x03")
    chat.until("(interrupted)")
    chat.until("> ")
    chat.type("\x04")
    assert chat.end() == 0


@pytest.mark.parametrize(("key", "ends"), [(KeyboardInterrupt, True), (EOFError, False)])
def test_ctrl_c_at_the_prompt_ends_the_program(key, ends, monkeypatch):
    def interrupted(prompt: str) -> str:
        raise key

    monkeypatch.setattr("builtins.input", interrupted)
    tool = runpy.run_path(str(ROOT / "tools" / "generate.py"))
    nobody = SimpleNamespace(mesh=Mesh(), tokenizer=object())  # nothing is asked of the model
    conversation = tool["Conversation"](nobody, SamplingParams(), None)
    with pytest.raises(KeyboardInterrupt) if ends else contextlib.nullcontext():
        conversation.run()
