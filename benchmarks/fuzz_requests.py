#!/usr/bin/env python3
"""A hundred thousand request bodies, mutated from sound ones, against the server in this process.

  python benchmarks/fuzz_requests.py                   # all
  python benchmarks/fuzz_requests.py --from 500 --count 1   # one of them, again
  python benchmarks/fuzz_requests.py --count 5000 --at-once 1   # how long refusals take, each alone

Each body follows from its number: minqwen/lab/request_fuzz.py. No answer may be a 5xx that is not
meant, an error without OpenAI's shape, or late; and at the end the engine must be idle, and answer
as it did before. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time

from minqwen import LLM
from minqwen.cli import Parser, run
from minqwen.lab.request_fuzz import TEMPLATE, Asgi, Outcome, ask, fuzz, request
from minqwen.serve.app import make_app
from minqwen.serve.service import Service

CONTROL = {"prompt": "In the beginning", "max_tokens": 12, "temperature": 0, "logprobs": 3}
PIECE = 2000  # requests between two lines of progress
PROMISED = 0.1  # seconds until a refusal


async def control(app: Asgi) -> object:
    """What a sound request is answered with, as far as it does not depend on the time."""
    _, answer = await ask(app, "/v1/completions", json.dumps(CONTROL).encode())
    return json.loads(answer)["choices"]


async def send_all(app: Asgi, numbers: range, at_once: int) -> int:
    """Send all requests; returns how many had a wrong answer."""
    start = time.monotonic()
    before = await control(app)
    outcome = Outcome()
    for first in range(numbers.start, numbers.stop, PIECE):
        piece = range(first, min(first + PIECE, numbers.stop))
        found = await fuzz(app, piece, at_once)
        outcome.add(found)
        for number, why in found.wrong.items():
            print(f"request {number}: {why}", flush=True)
        done, wrong = piece.stop - numbers.start, len(outcome.wrong)
        told = ", ".join(f"{n} of {status}" for status, n in sorted(outcome.statuses.items()))
        seconds = time.monotonic() - start
        print(f"{done} requests in {seconds:.0f} s: {told}; {wrong} wrong", flush=True)
    tell_refusals(outcome.refused, at_once)
    if await control(app) != before:
        print("the control request has another answer than before")
        return len(outcome.wrong) + 1
    return len(outcome.wrong)


def tell_refusals(refused: dict[int, float], at_once: int) -> None:
    """How long refusals took, in milliseconds, and which took the longest."""
    if not refused:
        return
    slowest = sorted(refused, key=lambda number: -refused[number])
    at = [slowest[int(share * (len(slowest) - 1))] for share in (0.5, 0.01, 0.001)]
    median, hundredth, thousandth = (f"{1000 * refused[number]:.1f}" for number in at)
    late = sum(seconds > PROMISED for seconds in refused.values())
    print(
        f"{len(refused)} refusals, {at_once} at once: median {median} ms, one in a hundred above "
        f"{hundredth} ms, one in a thousand above {thousandth} ms, {late} above "
        f"{1000 * PROMISED:.0f} ms"
    )
    for number in slowest[:10]:
        path, body = request(number)
        start = body[:120].decode(errors="replace")
        print(f"  {1000 * refused[number]:.0f} ms: request {number}, {path} {start!r}")


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="N")
    parser.add_argument("--count", type=int, default=100_000, metavar="N")
    parser.add_argument("--at-once", type=int, default=16, metavar="N")
    args = parser.parse_args()
    with LLM(dtype="float32", arithmetic="exact", max_model_len=200, num_blocks=200) as llm:
        if llm.tokenizer is not None:
            llm.tokenizer.chat_templates["default"] = TEMPLATE
        service = Service(llm, "fuzzed")
        stepping = threading.Thread(target=service.loop.run)
        stepping.start()
        numbers = range(args.first, args.first + args.count)
        try:
            wrong = asyncio.run(send_all(make_app(service), numbers, args.at_once))
        finally:
            service.loop.end()
            stepping.join()
        pool = llm.core.pool
        if llm.has_unfinished_requests or pool.num_free != pool.num_blocks:
            print("the engine is not idle")
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
