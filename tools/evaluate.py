#!/usr/bin/env python3
"""Run tasks of lm-evaluation-harness on a checkpoint.

python tools/evaluate.py --tasks sums,verses --include-path docs/tasks
torchrun --nproc-per-node 4 tools/evaluate.py --model DIR --tasks my_task.yaml --json
python tools/evaluate.py --model DIR --tasks hellaswag --num-fewshot 10 --limit 200

The table of results goes to stdout, from rank 0. The network is not used: a task's data lie on this
machine, in files that the task names or in the cache of Hugging Face's `datasets`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from minqwen import LLM, Checkpoint, Mesh
from minqwen.checks import integer, number
from minqwen.cli import (
    Parser,
    check_writable,
    engine_flags,
    engine_options,
    model_flags,
    model_options,
    run,
)
from minqwen.engine.sizing import EngineOptions
from minqwen.errors import MinqwenError, is_first_rank
from minqwen.files import write_text
from minqwen.lab.together import end, follow

# Hugging Face's libraries read these when they are imported.
os.environ.update({f"HF_{name}_OFFLINE": "1" for name in ("HUB", "DATASETS", "EVALUATE")})
MISSING = None  # the package without which --help alone works
if is_first_rank():  # the other ranks know nothing of tasks
    try:
        from minqwen.lab.evaluate import EngineLM
        from minqwen.lab.harness import Tasks, as_json, as_table, evaluate
    except ModuleNotFoundError as missing:
        MISSING = missing.name


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("tasks")
    add = group.add_argument
    add("--tasks", required=True, metavar="A,B", help="names of tasks or groups, or YAML files")
    add("--include-path", metavar="DIR", help="a directory of task files, besides the harness's")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question")
    add("--limit", type=float, metavar="N", help="first N questions; below 1 a share of them")
    add(
        "--apply-chat-template",
        action="store_true",
        help="each question is a chat with the checkpoint's template",
    )
    add("--system-instruction", metavar="TEXT", help="the system message of these chats")
    add("--gen-kwargs", metavar="A=1,B=2", help="change the generation_kwargs of all tasks")
    add("--max-length", type=int, metavar="N", help="truncate to N tokens (default: the context)")
    add("--seed", type=int, default=1234, metavar="N", help="of examples and samples")
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="all results as JSON, not as a table")
    group.add_argument(
        "--output-path", metavar="FILE", help="write the results and every answer there as JSON"
    )
    model_flags(parser)
    engine_flags(parser)
    args: argparse.Namespace = parser.parse_args()
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse, before a weight is read, what cannot work."""
    if args.output_path is not None:
        check_writable(args.output_path, "--output-path")
    if args.limit is not None:
        number("--limit", args.limit, 0)
    if args.num_fewshot is not None:
        integer("--num-fewshot", args.num_fewshot, 0)
    integer("--seed", args.seed, 0)
    EngineOptions.of(engine_options(args)).check(Checkpoint(args.model).config)


def report(args: argparse.Namespace, llm: LLM, tasks: Tasks) -> None:
    """Evaluate, and print."""
    results = evaluate(
        EngineLM(llm, args.max_length),
        tasks,
        args.seed,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        system_instruction=args.system_instruction,
        gen_kwargs=args.gen_kwargs,
    )
    if args.output_path is not None:
        write_text(Path(args.output_path), as_json(results, samples=True) + "\n", MinqwenError)
    print(as_json(results) if args.json else as_table(results))


def main() -> int:
    args = parse()
    if MISSING is not None:
        raise MinqwenError(f'this tool needs {MISSING}: pip install "minqwen[eval]"')
    check(args)
    mesh = Mesh.from_env(args.device, tensor_parallel_size=args.tensor_parallel_size)
    names = [name for name in args.tasks.split(",") if name]
    tasks = Tasks(names, args.include_path) if is_first_rank() else None
    mesh.world.broadcast_bytes(b"", patient=True)  # the others wait for the tasks' data
    llm = LLM(
        args.model,
        **{**model_options(args), "device": None},
        **engine_options(args),
        mesh=mesh,
        seed=args.seed,
        progress=True,
    )
    if tasks is None:
        follow(llm)
    else:
        report(args, llm, tasks)
        end(llm)
    return 0


if __name__ == "__main__":
    run(main)
