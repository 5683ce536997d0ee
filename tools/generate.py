#!/usr/bin/env python3
"""Complete prompts with a Qwen2.5 checkpoint.

  python tools/generate.py --prompt "In the beginning" --max-tokens 64
  torchrun --nproc-per-node 4 tools/generate.py --model DIR --chat --prompt "What is 47 + 38?"

Text goes to stdout as it comes; everything else goes to stderr. Sampling starts from the
checkpoint's generation_config.json; flags win.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from minqwen import LLM, Checkpoint, SamplingParams
from minqwen.cli import Parser, is_first_rank, model_flags, model_options, run, share_text
from minqwen.config import GenerationDefaults
from minqwen.engine.outputs import RequestOutput
from minqwen.engine.sizing import EngineOptions
from minqwen.errors import MinqwenError

SAMPLING_FLAGS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("stop", "logprobs"),
)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    prompt_flags(parser)
    model_flags(parser)
    sampling_flags(parser)
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="most tokens of prompt and output"
    )
    group.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens per block of the cache"
    )
    group.add_argument("--json", action="store_true", help="one JSON object per prompt on stdout")
    group.add_argument(
        "--no-stream", action="store_true", help="print each completion when it is whole"
    )
    args: argparse.Namespace = parser.parse_args()
    return args


def prompt_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "text",
        nargs="*",
        metavar="TEXT",
        help="a prompt; - reads one prompt from standard input, to its end",
    )
    group.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="the same; repeatable"
    )
    group.add_argument(
        "--prompt-file",
        metavar="F",
        help='one prompt a line (.jsonl: JSON strings or objects with a "prompt")',
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="prompts are a user's messages; without a prompt, on a terminal: a conversation",
    )
    group.add_argument("--system", metavar="TEXT", help="the system message of --chat")


def sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="most new tokens (default 256)"
    )
    group.add_argument("--temperature", type=float, metavar="X", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="X")
    group.add_argument("--top-k", type=int, metavar="N")
    group.add_argument("--min-p", type=float, metavar="X")
    group.add_argument("--repetition-penalty", type=float, metavar="X")
    group.add_argument(
        "--seed", type=int, metavar="N", help="of the first prompt; the next has N + 1, ..."
    )
    group.add_argument(
        "--stop", action="append", metavar="S", help="end before this text; repeatable"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end of text")
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="show each token's log probability and the N best"
    )


def read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = [*(text for text in args.text if text != "-"), *args.prompt]
    if args.prompt_file:
        prompts += read_prompt_file(Path(args.prompt_file))
    nothing_given = not (prompts or args.prompt_file or sys.stdin.isatty())
    if "-" in args.text or nothing_given:
        prompts.append(sys.stdin.read())
    return prompts


def read_prompt_file(path: Path) -> list[str]:
    """The prompts of a text file or a .jsonl file, one a line; empty lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise MinqwenError(f"--prompt-file {path}: cannot be read ({e})") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [prompt_of_json(line, f"{path} line {number}") for number, line in numbered]


def prompt_of_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as e:
        raise MinqwenError(f"{where}: not JSON ({e})") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise MinqwenError(f'{where}: expected a string or {{"prompt": string}}')
    return prompt


def read_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling flags over generation_config.json, all checked before any weight is read."""
    config = Checkpoint(args.model).config
    defaults = GenerationDefaults.from_dir(args.model, config)
    flags = {name: getattr(args, name) for name in SAMPLING_FLAGS}
    given = {name: value for name, value in flags.items() if value is not None}
    EngineOptions(max_model_len=args.max_model_len, block_size=args.block_size).check(config)
    return SamplingParams.from_defaults(
        defaults, max_tokens=args.max_tokens, ignore_eos=args.ignore_eos, **given
    )


def as_json(output: RequestOutput, prompt: str) -> str:
    completion, metrics = output.outputs[0], output.metrics
    logprobs = None
    if completion.logprobs is not None:
        logprobs = [
            [{"id": i, **dataclasses.asdict(entry)} for i, entry in token.items()]
            for token in completion.logprobs
        ]
    found = {
        "prompt": prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "logprobs": logprobs,
        "time_to_first_token_s": metrics.time_to_first_token,
        "tokens_per_second": metrics.tokens_per_second(len(completion.token_ids)),
    }
    return json.dumps(found, ensure_ascii=False)


def report(output: RequestOutput) -> None:
    """Sizes and speed, and a line for each token with logprobs, on stderr."""
    completion, metrics = output.outputs[0], output.metrics
    count = len(completion.token_ids)
    speed = metrics.tokens_per_second(count)
    then = f", then {speed:.1f} tokens/s" if speed else ""
    print(
        f"[{len(output.prompt_token_ids)} + {count} tokens, first after "
        f"{metrics.time_to_first_token or 0.0:.2f} s{then}, {completion.finish_reason}]",
        file=sys.stderr,
    )
    for token, entries in zip(completion.token_ids, completion.logprobs or ()):
        chosen = entries[token]
        others = (entry for i, entry in entries.items() if i != token)
        best = "  ".join(f"{entry.decoded_token!r} {entry.logprob:.4f}" for entry in others)
        print(f"  {chosen.decoded_token!r} {chosen.logprob:.4f}   {best}", file=sys.stderr)


def complete_streaming(llm: LLM, prompt: Any, params: SamplingParams, speak: bool) -> RequestOutput:
    """Run one prompt and print its text as it comes. Returns its output."""
    output = None
    for delta in llm.stream_deltas(prompt, params):
        output = delta.output
        if speak:
            print(delta.text, end="" if output is None else "\n", flush=True)
    assert output is not None, "the last delta of a stream has the output"
    return output


def converse(llm: LLM, params: SamplingParams, system: str | None) -> None:
    """Read a line, answer it, remember both; an empty line or the end of input ends it."""
    speak = llm.mesh.rank == 0
    assert llm.tokenizer is not None
    messages = [{"role": "system", "content": system}] if system is not None else []
    while line := share_text(llm.mesh, read_line() if speak else None):
        messages.append({"role": "user", "content": line})
        try:
            prompt = llm.tokenizer.encode_chat(messages)
            output = complete_streaming(llm, prompt, params, speak)
        except MinqwenError as error:  # for example, the conversation has outgrown the context
            if speak:
                print(f"error: {error}", file=sys.stderr)
            return
        messages.append({"role": "assistant", "content": output.outputs[0].text})


def read_line() -> str | None:
    """What the user types; None at the end of input."""
    try:
        return input("> ")
    except EOFError:
        print(file=sys.stderr)
        return None


def as_chats(llm: LLM, texts: list[str], system: str | None) -> list[list[int]]:
    """Each text as a user's message: the ids of the prompts."""
    assert llm.tokenizer is not None
    before = [{"role": "system", "content": system}] if system is not None else []
    chats = [[*before, {"role": "user", "content": text}] for text in texts]
    return [llm.tokenizer.encode_chat(chat) for chat in chats]


def complete(llm: LLM, texts: list[str], params: SamplingParams, args: argparse.Namespace) -> None:
    """Complete all prompts, and print what came, on rank 0."""
    speak = llm.mesh.rank == 0
    prompts: list[Any] = as_chats(llm, texts, args.system) if args.chat else list(texts)
    streams = len(prompts) == 1 and not args.json and not args.no_stream
    if streams:
        outputs = [complete_streaming(llm, prompts[0], params, speak)]
    else:
        outputs = llm.generate(prompts, params)
    for text, output in zip(texts, outputs):
        if not speak:
            continue
        if args.json:
            print(as_json(output, text), flush=True)
            continue
        if not streams:
            print(output.outputs[0].text, flush=True)
        report(output)


def main() -> int:
    args = parse()
    speak = is_first_rank()
    params = read_params(args)
    prompts = read_prompts(args) if speak else []
    conversation = speak and args.chat and not prompts and sys.stdin.isatty()
    if speak and not prompts and not conversation:
        raise MinqwenError(
            "no prompt: give a TEXT, --prompt-file F, or - for standard input (see --help)"
        )
    llm = LLM(
        args.model,
        **model_options(args),
        max_model_len=args.max_model_len,
        block_size=args.block_size,
        seed=args.seed,
        progress=True,
    )
    shared = share_text(llm.mesh, json.dumps(None if conversation else prompts))
    texts = json.loads(shared or "null")
    if texts is None:
        converse(llm, params, args.system)
    else:
        complete(llm, texts, params, args)
    return 0


if __name__ == "__main__":
    run(main)
