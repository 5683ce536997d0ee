#!/usr/bin/env python3
"""Real clients, unmodified, of servers of three shapes: what they get must be the same.

  python benchmarks/clients.py

OpenAI's client asks for texts, chats, streams, logprobs, a schema and tools; lm-evaluation-harness
asks for the log-likelihoods and texts of docs/tasks. The servers, of the embedded model in exact
arithmetic, are one process, four ranks that share a copy, and two replicas. What differs from the
first one's, be it the last bit of a logprob, is printed, and then the exit code is 1. Needs the
extras [test] and [eval], and "lm-eval[api]".
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from openai import OpenAI, OpenAIError

from minqwen.cli import EMBEDDED, Parser, run
from minqwen.errors import MinqwenError
from minqwen.lab.server_process import server_process

ROOT = Path(__file__).parents[1]
QWEN = ROOT / "tests" / "data" / "tokenizer" / "tokenizer_config.json"  # its template knows tools
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
SHAPES = {
    "one process": ([], []),
    "four ranks": ([*TORCHRUN, "4"], []),
    "two replicas": ([*TORCHRUN, "2"], ["--tensor-parallel-size", "1"]),
}
SUMS: Any = [{"role": "user", "content": "What is 47 + 38?"}]
KING = {
    "type": "object",
    "properties": {
        "king": {"enum": ["David", "Saul"]},
        "years": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["king", "years"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"enum": ["Ur", "Tyre"]}}, "required": ["city"]}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {**CITY, "additionalProperties": False}},
}
TASKS = ("sums", "texts", "verses")


def write_model(directory: Path) -> None:
    """The embedded model under Qwen2.5's own chat template."""
    for path in EMBEDDED.iterdir():
        if path.suffix in (".json", ".safetensors"):
            shutil.copy(path, directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = json.loads(QWEN.read_text())["chat_template"]
    path.write_text(json.dumps(config))


def command(model: Path, shape: str) -> list[str]:
    launcher, flags = SHAPES[shape]
    tool = [str(ROOT / "tools" / "serve.py"), "--model", str(model), *flags]
    exact = ["--dtype", "float32", "--arithmetic", "exact"]
    return [sys.executable, *launcher, *tool, *exact, "--port", "0", "--served-model-name", "it"]


# ---- OpenAI's client ----------------------------------------------------------------------------


def openai_transcript(url: str) -> dict[str, Any]:
    """What each kind of request gets, by its name."""
    client = OpenAI(base_url=f"{url}/v1", api_key="-", timeout=3600, max_retries=0)
    completions, chats = client.completions, client.chat.completions
    greedy: dict[str, Any] = {"model": client.models.list().data[0].id, "temperature": 0}
    told: dict[str, Any] = {}
    text = completions.create(prompt=["And God said", "The king"], max_tokens=12, n=2, **greedy)
    told["completions"] = [choice.text for choice in text.choices]
    told["usage"] = text.usage and text.usage.to_dict()
    told["fingerprint"] = text.system_fingerprint
    drawn = completions.create(
        **{**greedy, "temperature": 0.9}, prompt="And God said", seed=5, max_tokens=8
    )
    told["drawn"] = drawn.choices[0].text
    scored = completions.create(
        prompt="And God said", echo=True, logprobs=1, max_tokens=0, **greedy
    )
    told["echo"] = scored.choices[0].logprobs and scored.choices[0].logprobs.token_logprobs
    told["chat"] = chats.create(messages=SUMS, **greedy).choices[0].message.content
    told["stream"] = [
        chunk.choices[0].delta.content or ""
        for chunk in chats.create(messages=SUMS, stream=True, **greedy)
    ]
    tops = chats.create(messages=SUMS, max_tokens=3, logprobs=True, top_logprobs=2, **greedy)
    entries = tops.choices[0].logprobs and tops.choices[0].logprobs.content
    told["logprobs"] = [
        [(top.token, top.logprob) for top in entry.top_logprobs] for entry in entries or ()
    ]
    schema: Any = {"type": "json_schema", "json_schema": {"name": "king", "schema": KING}}
    king = chats.create(messages=SUMS, max_tokens=40, response_format=schema, **greedy)
    told["schema"] = king.choices[0].message.content
    told |= tools_transcript(client, greedy)
    try:
        chats.create(messages=SUMS, extra_body={"temprature": 0}, **greedy)
    except OpenAIError as error:
        told["a mistake"] = f"{type(error).__name__}: {getattr(error, 'body', None)}"
    return told


def tools_transcript(client: OpenAI, greedy: dict[str, Any]) -> dict[str, Any]:
    """A call that must come, whole and as a stream, and an answer to what it has found."""
    asked: dict[str, Any] = {**greedy, "messages": SUMS, "tools": [WEATHER]}
    named: Any = {"type": "function", "function": {"name": "weather"}}
    whole = client.chat.completions.create(**asked, tool_choice=named)
    message = whole.choices[0].message.to_dict()
    (call,) = message["tool_calls"]
    pieces = client.chat.completions.create(**asked, tool_choice="required", stream=True)
    deltas = [chunk.choices[0].delta for chunk in pieces]
    streamed = [c.function for delta in deltas for c in delta.tool_calls or () if c.function]
    found = {"role": "tool", "tool_call_id": call["id"], "content": "dry"}
    asked["messages"] = [*SUMS, message, found]
    after = client.chat.completions.create(**asked, max_tokens=8)
    return {
        "tools": [call["function"]["name"], call["function"]["arguments"]],
        "tools, streamed": [(part.name, part.arguments) for part in streamed],
        "finish reason": whole.choices[0].finish_reason,
        "after a tool": after.choices[0].message.content,
    }


# ---- lm-evaluation-harness ----------------------------------------------------------------------


def harness_transcript(url: str) -> dict[str, Any]:
    """Each task's results, and all that the harness was told of each of its documents."""
    arguments = f"model=it,base_url={url}/v1/completions,max_length=1025,num_concurrent=4"
    with tempfile.TemporaryDirectory() as directory:
        words = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
        words += ["--tasks", ",".join(TASKS), "--include_path", "docs/tasks", "--log_samples"]
        words += ["--model_args", arguments, "--output_path", directory]
        done = subprocess.run(
            words,
            cwd=ROOT,
            env={**os.environ, "HF_DATASETS_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise MinqwenError(f"lm_eval has failed: {done.stderr[-2000:]}")
        (results,) = Path(directory).rglob("results_*.json")
        told: dict[str, Any] = {}
        for task, values in json.loads(results.read_text())["results"].items():
            told[task] = {name: value for name, value in values.items() if "," in name}
            (samples,) = Path(directory).rglob(f"samples_{task}_*.jsonl")
            rows = sorted(map(json.loads, samples.open()), key=lambda row: int(row["doc_id"]))
            told[f"{task}, one by one"] = [row["resps"] for row in rows]
    return told


# ---- all ----------------------------------------------------------------------------------------


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    first: dict[str, Any] = {}
    differing = 0
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory))
        for shape in SHAPES:
            began = time.monotonic()
            with server_process(command(Path(directory), shape)) as (url, _):
                told = {**openai_transcript(url), **harness_transcript(url)}
            told = json.loads(json.dumps(told))
            print(f"{shape}: {len(told)} transcripts, {time.monotonic() - began:.0f} s", flush=True)
            for name, value in told.items():
                if not first or value != first[name]:
                    print(f"  {name}: {json.dumps(value)[:400]}", flush=True)
                differing += bool(first) and value != first[name]
            first = first or told
    print(f"{differing} of them differ from those of one process")
    return 1 if differing else 0


if __name__ == "__main__":
    run(main)
