"""What the command lines share: a user's mistake is one line and exit code 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.forked import forked_torchrun
from support.paths import ROOT
from support.tool import run_tool_here

from minqwen.cli import Parser, check_writable, model_flags, model_options, run, share_text
from minqwen.errors import MinqwenError
from minqwen.parallel import Mesh


def parser() -> Parser:
    main = Parser(prog="tool")
    model_flags(main.add_command("show", help="show it"))
    save = main.add_command("save", help="save it")
    save.add_argument("out")
    save.add_argument("--temperature", type=float)
    return main


def said(capsys, arguments: list[str]) -> str:
    """What the parser says of wrong arguments, which is one line."""
    with pytest.raises(SystemExit) as end:
        parser().parse_args(arguments)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    return line


def test_right_arguments_are_parsed():
    args = parser().parse_args(["save", "x", "--temperature", "0"])
    assert (args.command, args.out, args.temperature) == ("save", "x", 0.0)
    args = parser().parse_args(["show", "--dtype", "float32", "--num-attention-heads", "32"])
    assert model_options(args) == {
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_recipe": "ghost",
        "dtype": "float32",
        "device": None,
        "arithmetic": "native",
        "offload": None,
        "check_finite": False,
    }


@pytest.mark.parametrize(
    "arguments, meant",
    [
        (["save", "x", "--temprature", "0"], "'--temperature'"),
        (["save", "x", "--temprature=0"], "'--temperature'"),
        (["show", "--offlaod", "disk"], "'--offload'"),
        (["sav", "x"], "'save'"),
    ],
)
def test_what_was_meant_is_said(capsys, arguments, meant):
    assert f"did you mean {meant}?" in said(capsys, arguments)


def test_what_nothing_is_close_to_is_said_plainly(capsys):
    line = said(capsys, ["save", "x", "--zzz"])
    assert "unexpected argument '--zzz'" in line and "mean" not in line
    assert "unexpected argument 'y'" in said(capsys, ["save", "x", "y"])


def test_a_flag_must_be_written_out(capsys):
    assert "unexpected argument '--temp'" in said(capsys, ["save", "x", "--temp", "0"])


def test_other_ranks_say_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        parser().parse_args(["save"])
    assert end.value.code == 2 and capsys.readouterr().err == ""


def test_run_turns_a_users_mistake_into_one_line(capsys):
    def main() -> int:
        raise MinqwenError("block_size is 0, expected at least 1")

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: block_size is 0, expected at least 1\n"


def test_run_leaves_our_own_mistakes_their_traceback():
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)


def test_run_ends_with_what_main_returns():
    with pytest.raises(SystemExit) as end:
        run(lambda: 1)
    assert end.value.code == 1


def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path):
    check_writable(tmp_path / "new", "--json")
    (tmp_path / "old").write_text("")
    check_writable(tmp_path / "old", "--json")
    assert not (tmp_path / "new").exists()
    os.mkfifo(tmp_path / "pipe")
    for path, problem in (
        (tmp_path, "is a directory"),
        (tmp_path / "a" / "b", "no directory"),
        (tmp_path / "pipe", "is not a regular file"),
        (Path("/dev/null"), "is not a regular file"),
    ):
        with pytest.raises(MinqwenError, match=f"--json .*{problem}"):
            check_writable(path, "--json")


@pytest.mark.parametrize("text", ["", "Ü\ud800 \n", None])
def test_one_rank_shares_text_with_itself(text):
    assert share_text(Mesh(), text) == text


@pytest.mark.parametrize(
    "command",
    [
        ("generate.py", "x", "--model", "MODEL"),
        ("trace.py", "show", "x", "--model", "MODEL"),
        ("plan.py", "MODEL"),
        ("heads.py", "plan", "MODEL", "--tp", "8"),
        ("heads.py", "extend", "MODEL", "OUT", "--num-attention-heads", "32"),
        ("heads.py", "verify", "MODEL", "MODEL"),
        ("heads.py", "shrink", "MODEL", "OUT"),
        ("heads.py", "explain", "MODEL"),
        ("heads.py", "demo", "--model", "MODEL"),
        ("heads.py", "extend-adapter", "MODEL", "OUT", "--base", "MODEL"),
        ("golden.py", "fingerprint", "MODEL"),
        ("make_checkpoint.py", "--config", "MODEL", "OUT"),
        ("make_checkpoint.py", "--size", "0.5B", "--tokenizer", "MODEL", "OUT"),
        ("train_embedded", "--evaluate", "--out", "MODEL"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(
    "model, says",
    [
        ("Qwen/Qwen2.5-7B-Instruct", "hf download Qwen/Qwen2.5-7B-Instruct --local-dir DIR"),
        ("/nowhere", "/nowhere: no such directory, expected one with config.json"),
    ],
)
def test_every_tool_says_first_that_there_is_no_such_directory(command, model, says, tmp_path):
    words = {"MODEL": model, "OUT": str(tmp_path / "out")}
    done = run_tool_here(*(words.get(word, word) for word in command))
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1
    assert says in done.err


@pytest.mark.parametrize(
    "args, says",
    [(["--top-p", "2"], "top_p is 2.0"), (["--topp", "2"], "did you mean '--top-p'?")],
)
def test_torchruns_report_ends_with_the_users_mistake(args, says):
    """torchrun prints a traceback and a report of 45 lines when a rank fails."""
    done = forked_torchrun(2, ROOT / "tools" / "generate.py", ["x", *args])
    assert done.returncode == 1  # torchrun's own, whatever the ranks' status is
    *_, last, border = done.stderr.splitlines()
    assert " error: " in last and says in last and set(border) == {"="}


def test_every_rank_tells_torchrun_and_only_rank_0_the_user(capsys, monkeypatch, tmp_path):
    def main() -> int:
        raise MinqwenError("top_p is 2.0")

    for rank, printed in (("0", "error: top_p is 2.0\n"), ("1", "")):
        file = tmp_path / rank
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        with pytest.raises(SystemExit):
            run(main)
        assert capsys.readouterr().err == printed
        assert json.loads(file.read_text())["message"]["message"] == "error: top_p is 2.0"


SWALLOWED = """
import importlib.abc, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

class Swallows(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch.nn":
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:  # as some code does that runs while torch is imported
                print("swallowed", flush=True)

sys.meta_path.insert(0, Swallows())
sys.argv = [r"{path}", "--help"]
import runpy
runpy.run_path(r"{path}", run_name="__main__")
"""


TOOLS = sorted(path.name for path in (ROOT / "tools").iterdir() if path.name[0] not in "._")


def interrupted_import(program) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SWALLOWED.format(path=program)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("tool", TOOLS)
def test_ctrl_c_while_torch_is_imported_ends_a_tool(tool):
    """At once: nothing is there to swallow it."""
    done = interrupted_import(ROOT / "tools" / tool)
    assert (done.stdout, done.stderr) == ("", "") and done.returncode == -signal.SIGINT


def test_ctrl_c_while_torch_is_imported_is_an_exception_in_a_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import minqwen")
    done = interrupted_import(script)
    assert done.stdout == "swallowed\n" and done.stderr.endswith("KeyboardInterrupt\n")
    assert done.returncode == -signal.SIGINT


ENDINGS = """
import os, signal, sys, time
from minqwen.cli import run

signal.signal(signal.SIGINT, signal.default_int_handler)

def quick():
    signal.raise_signal(number)
    time.sleep(10**6)

def stubborn():
    while True:
        try:
            quick()
        except BaseException:
            time.sleep(10**6)

for main in (quick, stubborn):
    for number in (signal.SIGINT, signal.SIGTERM):
        pid = os.fork()
        if pid == 0:
            run(main)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_ctrl_c_and_sigterm_end_a_tool_that_swallows_them_too():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ENDINGS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.stdout.split(), done.stderr) == (["130", "143"] * 2, "")


def test_a_rank_obeys_ctrl_c_where_a_shells_background_job_ignores_it():
    """torchrun obeys it there, and passes it on."""
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import minqwen; "
    code += "assert signal.getsignal(signal.SIGINT) == signal.default_int_handler"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "x"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("handler", ["default_int_handler", "SIG_IGN"])
def test_after_the_import_ctrl_c_is_what_it_was(handler):
    """Python's own, or ignored, as in a shell's background job."""
    code = f"import signal; signal.signal(signal.SIGINT, signal.{handler}); import minqwen; "
    code += f"assert signal.getsignal(signal.SIGINT) == signal.{handler}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
