#!/usr/bin/env python3
"""Complete prompts with a Qwen2.5 checkpoint.

  python tools/generate.py --prompt "In the beginning" --max-tokens 64
  torchrun --nproc-per-node 4 tools/generate.py --model DIR --chat --prompt "What is 47 + 38?"

Text goes to stdout as it comes; everything else to stderr. Sampling starts from the checkpoint's
generation_config.json; flags win.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from minqwen import LLM, SamplingParams
from minqwen.cli import is_first_rank, model_flags, run, share_text
from minqwen.errors import MinqwenError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable")
    group.add_argument(
        "--prompt-file",
        metavar="F",
        help='one prompt a line (.jsonl: JSON strings or objects with a "prompt")',
    )
    group.add_argument(
        "stdin", nargs="?", choices=["-"], help="- reads one prompt from standard input, to its end"
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="prompts are a user's messages; without a prompt, on a terminal: a conversation",
    )
    group.add_argument("--system", metavar="TEXT", help="the system message of --chat")
    model_flags(parser)
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
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="most tokens of prompt and output"
    )
    group.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens per page of the cache"
    )
    group.add_argument("--json", action="store_true", help="one JSON object per prompt on stdout")
    group.add_argument(
        "--no-stream", action="store_true", help="print each completion when it is whole"
    )
    return parser.parse_args()


def read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt or [])
    if args.prompt_file:
        try:
            lines = Path(args.prompt_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise MinqwenError(f"--prompt-file {args.prompt_file}: cannot be read ({e})") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if args.prompt_file.endswith(".jsonl"):
                try:
                    line = json.loads(line)
                except ValueError as e:
                    raise MinqwenError(
                        f"{args.prompt_file} line {number}: not JSON ({e})"
                    ) from None
                line = line.get("prompt") if isinstance(line, dict) else line
                if not isinstance(line, str):
                    raise MinqwenError(
                        f'{args.prompt_file} line {number}: expected a string or {{"prompt": string}}'
                    )
            prompts.append(line)
    if args.stdin or not (prompts or args.prompt_file or sys.stdin.isatty()):
        prompts.append(sys.stdin.read())
    return prompts


def as_json(output, args: argparse.Namespace) -> str:
    completion = output.outputs[0]
    logprobs = completion.logprobs and [
        [{"id": i, **dataclasses.asdict(entry)} for i, entry in token.items()]
        for token in completion.logprobs
    ]
    metrics = output.metrics
    return json.dumps(
        {
            "prompt": output.prompt,
            "prompt_token_ids": output.prompt_token_ids,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "logprobs": logprobs,
            "time_to_first_token_s": metrics.time_to_first_token,
            "tokens_per_second": metrics.tokens_per_second(len(completion.token_ids)),
        },
        ensure_ascii=False,
    )


def report(output) -> None:
    count, metrics = len(output.outputs[0].token_ids), output.metrics
    speed = metrics.tokens_per_second(count)
    print(
        f"[{len(output.prompt_token_ids)} + {count} tokens, first after {metrics.time_to_first_token:.2f} s"
        + (f", then {speed:.1f} tokens/s" if speed else "")
        + f", {output.outputs[0].finish_reason}]",
        file=sys.stderr,
    )
    for token, entries in zip(output.outputs[0].token_ids, output.outputs[0].logprobs or ()):
        best = "  ".join(
            f"{e.decoded_token!r} {e.logprob:.4f}" for i, e in entries.items() if i != token
        )
        print(
            f"  {entries[token].decoded_token!r} {entries[token].logprob:.4f}   {best}",
            file=sys.stderr,
        )


def complete_streaming(llm: LLM, prompt, params: SamplingParams, speak: bool):
    """Run one prompt and print its text as it comes. Returns its output."""
    request_id, shown = llm.add_request(prompt, params), 0
    while True:
        for output in llm.step():
            text = output.outputs[0].text
            if speak:
                print(text[shown:], end="\n" if output.finished else "", flush=True)
            shown = len(text)
            if output.finished:
                if output.error:
                    raise MinqwenError(f"request {request_id}: {output.error}")
                return output


def converse(llm: LLM, params: SamplingParams, system: str | None) -> None:
    """Read a line, answer it, remember both; an empty line or the end of input ends it."""
    speak = llm.mesh.rank == 0
    messages = [{"role": "system", "content": system}] if system is not None else []
    while True:
        line = None
        if speak:
            try:
                line = input("> ")
            except EOFError:
                print(file=sys.stderr)
        line = share_text(llm.mesh, line)
        if not line:
            return
        messages.append({"role": "user", "content": line})
        try:
            output = complete_streaming(llm, llm.tokenizer.encode_chat(messages), params, speak)
        except MinqwenError as error:  # the conversation outgrew the context, say
            if speak:
                print(f"error: {error}", file=sys.stderr)
            return
        messages.append({"role": "assistant", "content": output.outputs[0].text})


def main() -> int:
    args = parse()
    speak = is_first_rank()
    prompts = read_prompts(args) if speak else []
    conversation = speak and args.chat and not prompts and sys.stdin.isatty()
    if speak and not prompts and not conversation:
        raise MinqwenError(
            "no prompt: give --prompt TEXT, --prompt-file F, or - for standard input"
        )
    llm = LLM(
        args.model,
        dtype=args.dtype,
        device=args.device,
        arithmetic=args.arithmetic,
        check_finite=args.check_finite,
        offload=args.offload,
        max_model_len=args.max_model_len,
        block_size=args.block_size,
        seed=args.seed,
        progress=True,
    )
    flags = {
        name: getattr(args, name)
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "stop",
            "logprobs",
        )
    }
    params = SamplingParams.from_defaults(
        llm.defaults,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        **{name: value for name, value in flags.items() if value is not None},
    )
    shared = json.loads(share_text(llm.mesh, json.dumps(None if conversation else prompts)))
    if shared is None:
        converse(llm, params, args.system)
        return 0
    texts = shared
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system is not None else []
        prompts = [
            llm.tokenizer.encode_chat(system + [{"role": "user", "content": text}])
            for text in texts
        ]
    else:
        prompts = texts
    if len(prompts) == 1 and not args.json and not args.no_stream:
        outputs = [complete_streaming(llm, prompts[0], params, speak)]
    else:
        outputs = llm.generate(prompts, params)
    for text, output in zip(texts, outputs):
        output.prompt = text
        if not speak:
            continue
        if args.json:
            print(as_json(output, args), flush=True)
        elif len(outputs) > 1 or args.no_stream:
            print(output.outputs[0].text, flush=True)
        if not args.json:
            report(output)
    return 0


if __name__ == "__main__":
    run(main)
