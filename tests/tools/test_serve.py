"""tools/serve.py, the way a user runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from support.paths import ROOT
from support.tool import run_tool_here

if importlib.util.find_spec("uvicorn") is None:
    pytest.skip("a server needs the extra [serve]", allow_module_level=True)

import httpx

from minqwen import Checkpoint
from minqwen.serve.fingerprint import system_fingerprint, weights_digest


def test_it_serves_until_it_is_told_to_end(embedded):
    """SIGTERM in the midst of a stream: the stream comes to its end, and so does the process."""
    command = [sys.executable, str(ROOT / "tools" / "serve.py"), "--port", "0", "--grace", "60"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MINQWEN_API_KEY": "sesame"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = next(line for line in process.stderr if "http://" in line)
        url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        headers = {"Authorization": "Bearer sesame"}
        asked = {"prompt": "And God said", "max_tokens": 30, "ignore_eos": True, "stream": True}
        with httpx.Client(base_url=url, headers=headers, timeout=120) as http:
            with http.stream("POST", "/v1/completions", json=asked) as response:
                lines = response.iter_lines()
                first = json.loads(next(lines).removeprefix("data: "))
                process.send_signal(signal.SIGTERM)
                *_, last = [line for line in lines if line]
        assert last == "data: [DONE]"
        assert process.wait(120) == 128 + signal.SIGTERM and process.stderr.read() == ""
    finally:
        process.kill()
    config = Checkpoint(embedded).config
    digest = weights_digest(embedded)
    names = [
        system_fingerprint(digest, config, kind, "torch.bfloat16") for kind in ("native", "exact")
    ]
    assert first["system_fingerprint"] == names[0] != names[1]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--port", "70000"], "expected 0 to 65535"),
        (["--grace", "-1"], "--grace is -1"),
        (["--max-requests", "0"], "--max-requests is 0"),
        (["--api-key", ""], "is empty"),
        (["--model", "nowhere"], "no such directory"),
        (["--tensor-parallel-size", "2"], "torchrun --nproc-per-node 2"),
        (["--block-size", "0"], "block_size"),
        (["--num-blocks", "0"], "num_blocks"),
        (["--hots", "x"], "did you mean '--host'"),
    ],
)
def test_a_mistake_is_one_line(args, said):
    done = run_tool_here("serve.py", *args)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1


def test_a_port_that_is_taken_is_told_before_a_weight_is_read():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run_tool_here("serve.py", "--port", taken.getsockname()[1])
    assert done.code == 2 and "cannot listen there" in done.err and done.err.count("\n") == 1
