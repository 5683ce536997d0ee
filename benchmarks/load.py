#!/usr/bin/env python3
"""A thousand clients at once on a server whose cache is too small; a fifth of them goes away.

  python benchmarks/load.py    # three times a thousand
  python benchmarks/load.py --requests 40 --pause 15 --minutes 60    # an hour

tools/serve.py serves the model in exact arithmetic, with a cache in which hardly three requests
have room. Texts, chats and schemas are asked for, whole and as streams. Every answer that
came whole must be, to the last bit of each logprob, what the same request gets from an engine that
it has for itself. After each wave nothing may be left of it: no request, block, file descriptor,
thread or process; and after the first waves no memory. Exits with 1 if anything is wrong. Needs the
extra [test].
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from minqwen import LLM, StructuredOutputs, Tokenizer
from minqwen.cli import EMBEDDED, Parser, run
from minqwen.engine.outputs import RequestOutput, TokenLogprobs
from minqwen.lab import soak
from minqwen.lab.server_process import server_process

SERVE = Path(__file__).parents[1] / "tools" / "serve.py"
OPTIONS: dict[str, Any] = {**soak.OPTIONS, "max_model_len": 64}
BLOCKS = 34  # of two tokens: few more than one request of the longest kind needs
LEAVING = 0.2  # the share of clients that goes away
WORKERS = 40  # threads that the library keeps for what must not hold up its event loop
MOST_GROWTH = 0.01  # of memory, after warm-up
SAME = (  # the fields of SamplingParams that servers have under the same names
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "max_tokens", "min_tokens", "ignore_eos", "prompt_logprobs"),
)
SECONDS = 3600  # in which a wave ends, whatever happens
KING = {
    "type": "object",
    "properties": {"king": {"enum": ["David", "Saul"]}, "years": {"type": "integer"}},
    "required": ["king", "years"],
    "additionalProperties": False,
}

# ---- what is asked ------------------------------------------------------------------------------


class Ask(NamedTuple):
    """A request: its job for an engine, and its address and fields for a server."""

    job: soak.Job
    path: str
    fields: dict[str, Any]


def make_asks(count: int, tokenizer: Tokenizer, seed: int) -> list[Ask]:
    """Most are completions; one in eight is a chat, and one in eight a chat with a schema."""
    r = random.Random(seed)
    asks = []
    for i, job in enumerate(soak.make_jobs(count, tokenizer, seed)):
        if i % 8 < 2:
            question = f"What is {r.randint(10, 99)} + {r.randint(10, 99)}?"
            asks.append(chat(job, tokenizer, question, with_schema=i % 8 == 1))
        else:
            fields = {"prompt": job.prompt, "logprobs": job.params.logprobs}
            asks.append(Ask(job, "/v1/completions", {**common_fields(job), **fields}))
    return asks


def chat(job: soak.Job, tokenizer: Tokenizer, question: str, with_schema: bool) -> Ask:
    messages = [{"role": "user", "content": question}]
    params = replace(job.params, prompt_logprobs=None)
    fields: dict[str, Any] = {"messages": messages}
    if with_schema:
        wanted = StructuredOutputs(json=KING)
        params = replace(params, structured_outputs=wanted, stop=(), min_tokens=0, max_tokens=20)
        schema = {"name": "king", "schema": KING}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if params.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": params.logprobs}
    job = soak.Job(tokenizer.encode_chat(messages), params, job.salt)
    return Ask(job, "/v1/chat/completions", {**common_fields(job), **fields})


def common_fields(job: soak.Job) -> dict[str, Any]:
    """All that the two addresses have in common, written out: a server has defaults of its own."""
    params = job.params
    bias = {str(token): value for token, value in (params.logit_bias or {}).items()}
    return {
        **{name: getattr(params, name) for name in SAME},
        "stop": list(params.stop),
        "logit_bias": bias or None,
        "cache_salt": job.salt,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


# ---- what comes of it ---------------------------------------------------------------------------

Tops = list[dict[str, float]]  # for each token the logprobs of "token_id:N"


class Choice(NamedTuple):
    """All of an answer's choice that must not depend on who else is served."""

    ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    tops: Tops


class Answer(NamedTuple):
    choices: list[Choice]
    of_prompt: list[dict[str, float] | None] | None  # its logprobs, where they were asked for


def alone(llm: LLM, ask: Ask) -> Answer:
    """What an engine that has nothing else to do says."""
    (output,) = llm.generate([ask.job.prompt], ask.job.params, use_tqdm=False)
    return answer_of_output(output)


def answer_of_output(output: RequestOutput) -> Answer:
    choices = []
    for one in output.outputs:
        tops = [top_of(entry) for entry in one.logprobs or ()]
        choices.append(Choice(one.token_ids, one.text, one.finish_reason, one.stop_reason, tops))
    if output.prompt_logprobs is None:
        return Answer(choices, None)
    return Answer(choices, [None if e is None else top_of(e) for e in output.prompt_logprobs])


def top_of(entry: TokenLogprobs) -> dict[str, float]:
    return {f"token_id:{token}": max(one.logprob, -9999.0) for token, one in entry.items()}


def answer_of_pieces(pieces: Sequence[dict[str, Any]]) -> Answer:
    """From the chunks of a stream; a whole answer is one chunk."""
    choices: dict[int, Choice] = {}
    of_prompt = None
    for piece in pieces:
        for choice in piece["choices"]:
            place = choice["index"]
            choices[place] = longer(choices.get(place, Choice([], "", None, None, [])), choice)
            if choice.get("prompt_logprobs") is not None:
                of_prompt = [e and prompt_top(e) for e in choice["prompt_logprobs"]]
    return Answer([choices[place] for place in sorted(choices)], of_prompt)


def longer(so_far: Choice, choice: dict[str, Any]) -> Choice:
    said = choice.get("message") or choice.get("delta") or {}
    return Choice(
        so_far.ids + choice.get("token_ids", []),
        so_far.text + (choice.get("text") or said.get("content") or ""),
        choice["finish_reason"],
        choice.get("stop_reason"),
        so_far.tops + tops_of(choice["logprobs"] or {}),
    )


def tops_of(logprobs: dict[str, Any]) -> Tops:
    """In either shape, that of completions and that of chats."""
    if "content" in logprobs:
        entries = [[one, *one["top_logprobs"]] for one in logprobs["content"]]
        return [{one["token"]: one["logprob"] for one in entry} for entry in entries]
    return list(logprobs.get("top_logprobs", []))


def prompt_top(entry: dict[str, Any]) -> dict[str, float]:
    return {f"token_id:{token}": one["logprob"] for token, one in entry.items()}


# ---- the clients --------------------------------------------------------------------------------

GONE_WAITING, GONE_READING = "went away while they waited", "went away in the midst of a stream"
Outcome = Answer | str  # why there is no answer


class Crowd:
    """All clients at once. Who goes away does so after some chunks, or once some others are done.

    So nothing depends on the clock.
    """

    def __init__(self, asks: Sequence[Ask], seed: int):
        r = random.Random(seed)
        self.asks, self.done = asks, 0
        self.streams = [r.random() < 0.5 for _ in asks]
        self.chunks: dict[int, int] = {}  # after so many a reader goes away
        self.others: dict[int, int] = {}  # when so many are done a client goes away
        for i in sorted(r.sample(range(len(asks)), round(len(asks) * LEAVING))):
            if self.streams[i] and r.random() < 0.6:
                self.chunks[i] = r.randint(1, 4)
            else:
                self.others[i] = r.randint(0, max(0, int(0.7 * i)))
        self.tasks: list[asyncio.Task[Outcome]] = []

    async def come(self, url: str) -> list[Outcome]:
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            base_url=url, limits=unlimited, timeout=SECONDS, trust_env=False
        ) as http:
            self.tasks = [asyncio.create_task(self._one(http, i)) for i in range(len(self.asks))]
            for task in self.tasks:
                task.add_done_callback(self._ends)
            coming = asyncio.gather(*self.tasks, return_exceptions=True)
            outcomes = await asyncio.wait_for(coming, SECONDS)
        return [why_not(found) if isinstance(found, BaseException) else found for found in outcomes]

    async def _one(self, http: httpx.AsyncClient, i: int) -> Outcome:
        ask = self.asks[i]
        fields = {name: value for name, value in ask.fields.items() if value is not None}
        if self.streams[i]:
            return await self._read(http, ask.path, fields, self.chunks.get(i))
        response = await http.post(ask.path, json=fields)
        if response.status_code != 200:
            return f"{response.status_code}: {response.text}"
        return answer_of_pieces([response.json()])

    async def _read(
        self, http: httpx.AsyncClient, path: str, fields: dict[str, Any], chunks: int | None
    ) -> Outcome:
        """A stream, or its first chunks."""
        pieces: list[dict[str, Any]] = []
        async with http.stream("POST", path, json={**fields, "stream": True}) as response:
            if response.status_code != 200:
                return f"{response.status_code}: {(await response.aread()).decode()}"
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return answer_of_pieces(pieces)
                if line:
                    pieces.append(json.loads(line.removeprefix("data: ")))
                    if "error" in pieces[-1]:
                        return f"in a stream: {pieces[-1]}"
                if len(pieces) == chunks:
                    return GONE_READING
        return "a stream had no end"

    def _ends(self, task: asyncio.Task[Outcome]) -> None:
        self.done += 1
        for i in [i for i, others in self.others.items() if others <= self.done]:
            del self.others[i]
            self.tasks[i].cancel()


async def one_by_one(url: str, asks: Sequence[Ask]) -> None:
    """One of each kind, so that the server has what it needs for them."""
    for ask in asks:
        await Crowd([ask], seed=0).come(url)


def why_not(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return GONE_WAITING
    return f"{type(error).__name__}: {error}"


# ---- the server ---------------------------------------------------------------------------------


class State(NamedTuple):
    """What a server's process holds. preemptions, dropped requests: so far."""

    open: float
    running: float
    waiting: float
    blocks_used: float
    preemptions: float
    dropped: float
    descriptors: int
    threads: int
    processes: int
    megabytes: float

    @property
    def idle(self) -> bool:
        return not (self.open or self.running or self.waiting or self.blocks_used)


def state_of(url: str, process: psutil.Process) -> State:
    text = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).text
    values = defaultdict[str, float](float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("minqwen_")
            values[name] += sample.value
            values[f"{name} {sample.labels.get('finish_reason')}"] += sample.value
    with process.oneshot():
        return State(
            open=values["open"],
            running=values["running"],
            waiting=values["waiting"],
            blocks_used=values["blocks_used_ratio"],
            preemptions=values["preemptions_total"],
            dropped=values["requests_total abort"],
            descriptors=process.num_fds(),
            threads=process.num_threads(),
            processes=len(process.children(recursive=True)),
            megabytes=process.memory_info().rss / 1e6,
        )


def settled(url: str, process: psutil.Process, before: State | None = None) -> State:
    """The state when all is given back that was not there before, or after a minute.

    A connection is closed a moment after its client has left.
    """
    for _ in range(600):
        state = state_of(url, process)
        if not left_over(before or state, state):
            break
        time.sleep(0.1)
    return state


def command(model: str, requests: int) -> list[str]:
    """Of a server that takes so many requests at a time, on a free port."""
    words = [sys.executable, str(SERVE), "--model", model, "--port", "0"]
    words += ["--dtype", "float32", "--arithmetic", "exact"]
    flags = {**OPTIONS, "num_blocks": BLOCKS, "max_requests": requests}
    for name, value in {**flags, "max_queue_seconds": SECONDS}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


# ---- waves --------------------------------------------------------------------------------------


def differing(
    asks: Sequence[Ask], outcomes: Sequence[Outcome], solo: Sequence[Answer]
) -> list[str]:
    """What is wrong, for each client that should have had its solo answer."""
    wrong = []
    for i, (ask, outcome, expected) in enumerate(zip(asks, outcomes, solo, strict=True)):
        if outcome not in (expected, GONE_WAITING, GONE_READING):
            wrong.append(f"request {i} ({ask.path}): {outcome}, alone: {expected}")
    return wrong


def left_over(before: State, after: State) -> list[str]:
    """What a wave has left behind, that was not there before."""
    wrong = [] if after.idle else ["not all requests and blocks are given back"]
    if after.descriptors > before.descriptors:
        wrong.append(f"{after.descriptors - before.descriptors} file descriptors are left")
    if after.threads > before.threads + WORKERS:
        wrong.append(f"{after.threads - before.threads} threads are left")
    if after.processes > before.processes:
        wrong.append(f"{after.processes - before.processes} processes are left")
    return wrong


def told(number: int, outcomes: Sequence[Outcome], before: State, after: State) -> str:
    """A line about a wave."""
    whole = sum(isinstance(outcome, Answer) for outcome in outcomes)
    return (
        f"wave {number}: {whole} answered, {outcomes.count(GONE_WAITING)} {GONE_WAITING}, "
        f"{outcomes.count(GONE_READING)} {GONE_READING}; "
        f"{after.dropped - before.dropped:.0f} dropped, "
        f"{after.preemptions - before.preemptions:.0f} preemptions; "
        f"then {after.open:.0f} requests, {after.blocks_used:.0%} of the blocks, "
        f"{after.descriptors} descriptors, {after.threads} threads, {after.processes} processes, "
        f"{after.megabytes:.1f} MB"
    )


def growth(megabytes: Sequence[float]) -> float:
    """The share by which memory has grown after warm-up, the first tenth (at least one wave)."""
    rest = megabytes[max(1, len(megabytes) // 10) :]
    if len(rest) < 2:
        return 0.0
    few = max(1, len(rest) // 10)
    return statistics.median(rest[-few:]) / statistics.median(rest[:few]) - 1


def waves(args: argparse.Namespace, asks: Sequence[Ask], solo: Sequence[Answer]) -> list[str]:
    """Wave after wave; returns what is wrong."""
    wrong, megabytes = list[str](), list[float]()
    began = time.monotonic()
    with server_process(command(args.model, args.requests)) as (url, pid):
        process = psutil.Process(pid)
        asyncio.run(one_by_one(url, asks[:3]))  # a process for chat templates begins with a chat
        number, first = 0, settled(url, process)
        while number < args.waves or time.monotonic() - began < args.minutes * 60:
            before = settled(url, process)
            outcomes = asyncio.run(Crowd(asks, args.seed + number).come(url))
            after = settled(url, process, first)
            number += 1
            print(f"{time.monotonic() - began:6.0f} s, {told(number, outcomes, before, after)}")
            sys.stdout.flush()
            wrong += differing(asks, outcomes, solo) + left_over(first, after)
            megabytes.append(after.megabytes)
            time.sleep(args.pause)
    grown = growth(megabytes)
    print(f"memory after warm-up: {grown:+.2%} in {len(megabytes)} waves")
    if grown > MOST_GROWTH:
        wrong.append(f"memory has grown by {grown:.1%}")
    return wrong


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(EMBEDDED), metavar="DIR", help="default: the embedded one")
    add("--requests", type=int, default=1000, metavar="N", help="of a wave (default: 1000)")
    add("--waves", type=int, default=3, metavar="N", help="at least (default: 3)")
    add("--minutes", type=float, default=0, metavar="X", help="go on for so long")
    add("--pause", type=float, default=0, metavar="S", help="seconds after each wave (default: 0)")
    add("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_dir(args.model)
    asks = make_asks(args.requests, tokenizer, args.seed)
    llm = LLM(
        args.model,
        dtype="float32",
        arithmetic="exact",
        num_blocks=200,
        enable_prefix_caching=False,
        **OPTIONS,
    )
    solo = [alone(llm, ask) for ask in asks]
    print(f"{len(asks)} requests at once, a cache of {BLOCKS} blocks of 2 tokens", flush=True)
    wrong = waves(args, asks, solo)
    for line in wrong[:20]:
        print(f"WRONG: {line[:2000]}")
    print(f"{len(wrong)} things are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
