#!/usr/bin/env python3
"""Complete prompts with a Qwen2.5 checkpoint.

  python tools/generate.py --prompt "In the beginning" --max-tokens 64
  torchrun --nproc-per-node 4 tools/generate.py --model DIR --chat --prompt "What is 47 + 38?"

A conversation (--chat, without a prompt, on a terminal) knows some commands: type /help.
Text goes to stdout as it comes; everything else goes to stderr. Sampling starts from the
checkpoint's generation_config.json; flags win.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from minqwen import LLM, Checkpoint, SamplingParams
from minqwen.checks import did_you_mean
from minqwen.cli import (
    Parser,
    engine_flags,
    engine_options,
    model_flags,
    model_options,
    read_flag,
    run,
    share_text,
)
from minqwen.config import GenerationDefaults
from minqwen.engine.failures import raise_failures
from minqwen.engine.in_order import Outputs
from minqwen.engine.outputs import Delta, RequestOutput
from minqwen.engine.sizing import EngineOptions
from minqwen.errors import MinqwenError, is_first_rank
from minqwen.files import lines_of, parse_json
from minqwen.sampling.logprobs import Logprob

SAMPLING_FLAGS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("stop", "logprobs", "max_tokens"),
)

CHAT_COMMANDS = ("/help", "/clear", "/system", "/quit")
CHAT_HELP = """/clear         forget what was said, but not the system message
/system TEXT   start again with this system message; without TEXT, with the template's own
/quit          end the conversation; so does Ctrl-D, and Ctrl-C while nothing is answered
/help          this list"""


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    prompt_flags(parser)
    model_flags(parser, arithmetic="fast")
    sampling_flags(parser)
    engine_flags(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--echo", action="store_true", help="print each prompt before its text")
    group.add_argument("--json", action="store_true", help="one JSON object per prompt on stdout")
    group.add_argument(
        "--no-stream", action="store_true", help="print each completion when it is whole"
    )
    args: argparse.Namespace = parser.parse_args()
    if args.system is not None and not args.chat:
        parser.error("--system is the system message of --chat: expected --chat too")
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
        "--max-tokens",
        type=int,
        metavar="N",
        help="most new tokens (default: what generation_config.json says, else 256)",
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
    """Of all sources. None is left only for a conversation, on a terminal."""
    prompts = [*(text for text in args.text if text != "-"), *args.prompt]
    if "" in prompts:
        raise MinqwenError("a prompt is empty: expected some text")
    if args.prompt_file:
        prompts += read_prompt_file(Path(args.prompt_file))
    on_a_terminal = sys.stdin.isatty()
    if "-" in args.text or not (args.prompt_file or prompts or on_a_terminal):
        prompts.append(sys.stdin.read())
    if prompts or (args.chat and on_a_terminal):
        return prompts
    raise MinqwenError(
        "no prompt: give a TEXT, --prompt-file F, or - for standard input (see --help)"
    )


def read_prompt_file(path: Path) -> list[str]:
    """The prompts of a text file or a .jsonl file, one a line; empty lines are skipped.

    Only a line feed ends a line, with or without a carriage return before it. U+2028, for example,
    may stand inside a JSON string. A byte order mark at the start is no text.
    """
    lines = lines_of(read_flag("--prompt-file", path))
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [prompt_of_json(line, f"{path} line {number}") for number, line in numbered]


def prompt_of_json(line: str, where: str) -> str:
    value = parse_json(line.encode(), where, MinqwenError)
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
    EngineOptions.of(engine_options(args)).check(config)
    return SamplingParams.from_defaults(defaults, ignore_eos=args.ignore_eos, **given)


def as_json(output: RequestOutput, index: int, prompt: str) -> str:
    """One line. index: the number of the prompt, from 0; after Ctrl-C some may be missing."""
    completion, metrics = output.outputs[0], output.metrics
    logprobs = None
    if completion.logprobs is not None:
        logprobs = [
            [{"id": i, **dataclasses.asdict(entry)} for i, entry in token.items()]
            for token in completion.logprobs
        ]
    found = {
        "index": index,
        "prompt": prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "error": output.error,
        "logprobs": logprobs,
        "time_to_first_token_s": metrics.time_to_first_token,
        "tokens_per_second": metrics.tokens_per_second(len(completion.token_ids)),
    }
    return json.dumps(found, ensure_ascii=False)


def show(text: str, end: str = "\n") -> None:
    """On stdout, from rank 0."""
    if is_first_rank():
        print(text, end=end, flush=True)


def say(text: str) -> None:
    """On stderr, from rank 0."""
    if is_first_rank():
        print(text, file=sys.stderr, flush=True)


def report(output: RequestOutput) -> None:
    """Sizes and speed, and a line for each token with logprobs, on stderr."""
    completion, metrics = output.outputs[0], output.metrics
    count = len(completion.token_ids)
    speed = metrics.tokens_per_second(count)
    then = f", then {speed:.1f} tokens/s" if speed else ""
    say(
        f"[{len(output.prompt_token_ids)} + {count} tokens, first after "
        f"{metrics.time_to_first_token or 0.0:.2f} s{then}, {completion.finish_reason}]"
    )
    for token, entries in zip(completion.token_ids, completion.logprobs or ()):
        say(logprobs_line(token, entries))


def logprobs_line(token: int, entries: dict[int, Logprob]) -> str:
    """The chosen token, and the others that were likely."""
    chosen = entries[token]
    others = (entry for i, entry in entries.items() if i != token)
    best = "  ".join(f"{entry.decoded_token!r} {entry.logprob:.4f}" for entry in others)
    return f"  {chosen.decoded_token!r} {chosen.logprob:.4f}   {best}"


def shown_deltas(llm: LLM, prompt: Any, params: SamplingParams) -> Iterator[Delta]:
    """Run one prompt, and show its text as it comes."""
    for delta in llm.stream_deltas(prompt, params):
        show(delta.text, end="")
        yield delta
    show("")


class Conversation:
    """A chat on a terminal. Rank 0 reads what the user types; every rank does the same with it."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        assert llm.tokenizer is not None
        self.llm, self.params, self.tokenizer = llm, params, llm.tokenizer
        self.interruptible = llm.mesh.world.size == 1
        self.interrupted = False
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system message."""
        system = self.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def run(self) -> None:
        """Read a line, answer it, remember both, until /quit or the end of input."""
        stop = "Ctrl-C ends an answer; " if self.interruptible else ""
        say(f"{stop}/help lists the commands; /quit, or Ctrl-D, ends the conversation.")
        while (line := share_text(self.llm.mesh.world, self.read_line())) is not None:
            if line.startswith("/"):
                if not self.command(line):
                    return
            elif line.strip():
                self.answer(line)

    def read_line(self) -> str | None:
        """What the user types; None at the end of input. Ctrl-C ends the program."""
        if not is_first_rank():
            return None
        self.llm.mesh.world.join_early()  # its user may think
        try:
            return input("> ")
        except (KeyboardInterrupt, SystemExit):
            print(file=sys.stderr)
            raise
        except EOFError:
            print(file=sys.stderr)
            return None

    def command(self, line: str) -> bool:
        """Do what a line that starts with / says. Returns whether the conversation goes on."""
        name, _, text = line.partition(" ")
        if name == "/quit":
            return False
        if name == "/help":
            say(CHAT_HELP)
        elif name == "/clear":
            self.clear()
            say("(a new conversation)")
        elif name == "/system":
            self.system = text.strip() or None
            self.clear()
            say("(a new conversation)")
        else:
            say(f"error: unknown command {name!r}{did_you_mean(name, CHAT_COMMANDS)}: /help")
        return True

    def answer(self, line: str) -> None:
        """Answer a message and remember both. What Ctrl-C leaves of an answer is remembered too."""
        question = {"role": "user", "content": line}
        try:
            prompt = self.tokenizer.encode_chat([*self.messages, question])
            text = self.stream(prompt)
        except MinqwenError as error:  # for example, the conversation has outgrown the context
            say(f"error: {error}; /clear starts a new conversation")
            return
        self.messages += [question, {"role": "assistant", "content": text}]

    def stream(self, prompt: list[int]) -> str:
        """Print an answer as it comes, to its end or to Ctrl-C, and return it."""
        pieces: list[str] = []
        with self.ctrl_c_ends_the_answer():
            for delta in shown_deltas(self.llm, prompt, self.params):
                pieces.append(delta.text)
                if self.interrupted:
                    self.llm.abort(delta.request_id)
        if self.interrupted:
            say("(interrupted)")
        return "".join(pieces)

    @contextlib.contextmanager
    def ctrl_c_ends_the_answer(self) -> Iterator[None]:
        """Ctrl-C only sets a flag, so that no step of the engine is cut off; once more, it ends the
        program.

        Under torchrun this changes nothing: Ctrl-C reaches torchrun too, which ends all ranks.
        """
        self.interrupted = False
        if not self.interruptible:
            yield
            return
        before = signal.signal(signal.SIGINT, self.interrupt)
        watched = signal.set_wakeup_fd(-1)  # or the process would end with the answer
        try:
            yield
        finally:
            signal.set_wakeup_fd(watched)
            signal.signal(signal.SIGINT, before)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True


def as_chats(llm: LLM, texts: list[str], system: str | None) -> list[list[int]]:
    """Each text as a user's message: the ids of the prompts."""
    assert llm.tokenizer is not None
    before = [{"role": "system", "content": system}] if system is not None else []
    chats = [[*before, {"role": "user", "content": text}] for text in texts]
    return [llm.tokenizer.encode_chat(chat) for chat in chats]


def complete(llm: LLM, texts: list[str], params: SamplingParams, args: argparse.Namespace) -> None:
    """Complete all prompts, and show what came."""
    prompts: list[Any] = as_chats(llm, texts, args.system) if args.chat else list(texts)
    if len(prompts) == 1 and not args.json and not args.no_stream:
        show(echo(texts[0], args), end="")
        *_, last = shown_deltas(llm, prompts[0], params)
        assert last.output is not None, "the last delta of a stream has the output"
        report(last.output)
        return
    show_all(llm.iterate(prompts, params), texts, args)


def show_all(outputs: Outputs, texts: list[str], args: argparse.Namespace) -> None:
    """Show each output when its turn comes; after Ctrl-C also those that are finished already.

    Raises RequestError at the end if a request has failed.
    """
    failed: list[RequestOutput] = []
    shown = 0
    try:
        for output in outputs:
            with signals_wait():
                show_output(output, shown, texts, args)
                shown += 1
            failed += [output] if output.error else []
    except (KeyboardInterrupt, SystemExit):  # the latter under torchrun
        with signals_wait():
            for index, output in sorted(outputs.finished.items()):
                show_output(output, index, texts, args)
            count = shown + len(outputs.finished)
            say(f"stopped: {count} of {len(texts)} prompts are finished and shown")
        raise
    raise_failures(failed)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Ctrl-C, and torchrun's signal, wait until what is within is done: no line is cut off."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {n: signal.signal(n, lambda number, frame: came.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def show_output(
    output: RequestOutput, index: int, texts: list[str], args: argparse.Namespace
) -> None:
    """The output of the prompt with this number."""
    if args.json:
        show(as_json(output, index, texts[index]))
    else:
        show(echo(texts[index], args) + output.outputs[0].text)
        report(output)


def echo(text: str, args: argparse.Namespace) -> str:
    """What to show before a completion."""
    if not args.echo:
        return ""
    return text + "\n" if args.chat else text


def main() -> int:
    args = parse()
    params = read_params(args)
    prompts = read_prompts(args) if is_first_rank() else []
    llm = LLM(
        args.model,
        **model_options(args),
        **engine_options(args),
        tensor_parallel_size=args.tensor_parallel_size,
        seed=args.seed,
        progress=True,
    )
    texts = json.loads(share_text(llm.mesh.world, json.dumps(prompts)) or "[]")
    if texts:
        complete(llm, texts, params, args)
    else:
        Conversation(llm, params, args.system).run()
    return 0


if __name__ == "__main__":
    run(main, exact=True)
