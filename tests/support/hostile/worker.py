"""Reads directories as the tools do, one after the other, in a process that measures itself.

One request a line on stdin, {"action", "path"}; one answer a line on stdout: {"kind", "text",
"megabytes", "printed"}. kind is "taken", "refused" (a MinqwenError) or the name of another
exception. printed: what a library wrote to stdout or stderr by itself.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path

from minqwen import LLM, Checkpoint, SamplingParams
from minqwen.errors import MinqwenError
from minqwen.heads.convert import extend, shrink
from minqwen.heads.layout import layout
from minqwen.tokenizer import chat_template, tokenizer

CPU_SECONDS = 5.0  # a directory that needs more ends the process
ADDRESSES = 6 << 30  # bytes of address space beyond what there is: the machine is in no danger

TEXT = "hell " + "a" * 64  # on which an expression can backtrack for ever


def load(path: Path) -> None:
    """Everything that a run reads: config, weights, tokenizer, template, generation config."""
    llm = LLM(path, check_finite=True, arithmetic="native", kv_cache_bytes=1 << 20)
    llm.chat([{"role": "user", "content": TEXT}], SamplingParams(max_tokens=1))


def widen(path: Path) -> None:
    out = path.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    extend(path, out, layout(Checkpoint(path).config, 8))


def back(path: Path) -> None:
    out = path.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    shrink(path, out)


ACTIONS = {"load": load, "extend": widen, "shrink": back}


def memory(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


def answer(action: str, path: Path) -> dict[str, object]:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again
    before = memory("VmRSS")
    kind, text = "taken", ""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        ACTIONS[action](path)
    except MinqwenError as error:
        kind, text = "refused", str(error)
    except BaseException as error:  # a panic of a library is no Exception
        kind, text = type(error).__name__, str(error)[:2000]
    signal.setitimer(signal.ITIMER_PROF, 0)
    return {"kind": kind, "text": text, "megabytes": (memory("VmHWM") - before) >> 10}


def main() -> None:
    answers = os.dup(1)
    noise = tempfile.TemporaryFile()
    os.dup2(noise.fileno(), 1)
    os.dup2(noise.fileno(), 2)
    warnings.simplefilter("ignore")
    renderer = chat_template.ChatRenderer()  # its process takes a tenth of a second to start
    tokenizer.ChatRenderer = lambda: renderer
    size = memory("VmSize") << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, resource.RLIM_INFINITY))
    for line in sys.stdin:
        request = json.loads(line)
        reply = answer(request["action"], Path(request["path"]))
        noise.seek(0)
        reply["printed"] = noise.read(2000).decode(errors="replace")
        noise.truncate(0)
        noise.seek(0)
        os.write(answers, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
