#!/usr/bin/env python3
"""Serve a Qwen2.5 checkpoint to OpenAI's clients.

  python tools/serve.py --model DIR
  torchrun --nproc-per-node 4 tools/serve.py --model DIR --arithmetic exact

Then OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-") completes and chats. Needs the extra
[serve]. SIGTERM, or Ctrl-C, ends it when the requests that run are done; a second one at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

from minqwen import LLM, Checkpoint
from minqwen.checks import integer, number
from minqwen.cli import (
    Parser,
    engine_flags,
    engine_options,
    model_flags,
    model_options,
    run,
    say_mistake,
)
from minqwen.config import GenerationDefaults
from minqwen.engine.sizing import EngineOptions
from minqwen.errors import MinqwenError, is_first_rank, warn

try:
    from minqwen.serve.fingerprint import system_fingerprint, weights_digest
    from minqwen.serve.limits import Limits
    from minqwen.serve.server import bound, ignore_signals, is_loopback, serve
    from minqwen.serve.service import Service
    from minqwen.serve.worker import follow, warm_up
except ModuleNotFoundError as missing:
    say_mistake(f'a server needs {missing.name}: pip install "minqwen[serve]"')
    sys.exit(2)

KEY = "MINQWEN_API_KEY"


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="the address to listen at (default: this machine only)")
    add("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    add("--served-model-name", metavar="NAME", help="default: the name of the directory")
    add(
        "--api-key",
        metavar="KEY",
        default=os.environ.get(KEY),
        help=f"what clients must send (default: the variable {KEY}, which others cannot see)",
    )
    add(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which clients may call a server on loopback; repeatable",
    )
    add("--grace", type=float, default=3, metavar="S", help="seconds to finish in (default: 3)")
    limits = parser.add_argument_group("limits")
    for flag, what in LIMITS.items():
        default = getattr(Limits, flag)
        limits.add_argument(
            name_of(flag),
            type=type(default),
            default=default,
            metavar="N",
            help=f"{what} (default: {default})",
        )
    model_flags(parser)
    engine_flags(parser)
    parser.add_argument("--seed", type=int, metavar="N", help="of requests that have none")
    args: argparse.Namespace = parser.parse_args()
    return args


LIMITS = {
    "requests": "prompts that run or wait, of all clients",
    "queue_seconds": "seconds that a prompt may wait for its first step",
    "body_bytes": "of a request",
    "prompts": "of one request",
    "n": "samples of a prompt",
    "logprobs": "likeliest tokens at each place",
    "schema_characters": "of a JSON schema or a grammar",
}


def name_of(flag: str) -> str:
    return "--max-" + flag.replace("_", "-")


def read_limits(args: argparse.Namespace) -> Limits:
    given = {flag: getattr(args, "max_" + flag) for flag in LIMITS}
    for flag, value in given.items():
        number(name_of(flag), value, 0, open_low=True)
    return dataclasses.replace(Limits(), **given)


def listen(args: argparse.Namespace) -> socket.socket | None:
    """Rank 0's socket, had before a weight is read."""
    number("--grace", args.grace, 0, open_low=False)
    if not 0 <= integer("--port", args.port, 0) < 2**16:
        raise MinqwenError(f"--port is {args.port}: expected 0 to 65535")
    if args.api_key == "":
        raise MinqwenError(f"--api-key, or {KEY}, is empty: expected a key")
    if not is_first_rank():
        return None
    listener = bound(args.host, args.port)
    if not is_loopback(listener) and args.api_key is None:
        warn(f"--host {args.host}: whoever reaches this machine may ask; give --api-key", 2)
    return listener


def main() -> int:
    args = parse()
    limits = read_limits(args)
    config = Checkpoint(args.model).config
    GenerationDefaults.from_dir(args.model, config)
    EngineOptions.of(engine_options(args)).check(config)
    listener = listen(args)
    with ThreadPoolExecutor(1) as pool:  # the weights are hashed while they are read
        digest = pool.submit(weights_digest, args.model) if listener else None
        llm = LLM(
            args.model,
            **model_options(args),
            **engine_options(args),
            tensor_parallel_size=args.tensor_parallel_size,
            seed=args.seed,
            progress=True,
        )
    warm_up(llm)
    if listener is None or digest is None:
        ignore_signals()
        follow(llm)
        return 0
    fingerprint = system_fingerprint(digest.result(), llm.config, args.arithmetic, llm.model.dtype)
    service = Service(llm, args.served_model_name, limits, fingerprint, args.seed)
    hosts = args.allowed_host
    came = serve(service, listener, api_key=args.api_key, hosts=hosts, grace=args.grace)
    return 128 + came if came else 0  # as a shell counts the ends by signals


if __name__ == "__main__":
    run(main)
