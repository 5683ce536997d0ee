#!/usr/bin/env python3
"""A thousand requests at once on a cache that is too small, against every one of them alone.

  python benchmarks/soak.py     # exact and native arithmetic, digests of 256 and of 4 bits

What must be equal, and what may be a tie, is said in minqwen/lab/soak.py. Exits with 1 if anything
differs that must not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minqwen import Qwen2, Tokenizer
from minqwen.cli import EMBEDDED, Parser, run
from minqwen.lab.soak import Job, Run, all_given_back, compare, make_jobs, run_alone, run_crowd

DIGEST_BITS = (256, 4)


def soak(
    arithmetic: str, model: Qwen2, exact: Qwen2, tokenizer: Tokenizer, jobs: list[Job], seed: int
) -> int:
    """Run all jobs in one arithmetic, print what came of it, and count what is wrong."""
    crowds = {bits: run_crowd(model, tokenizer, jobs, bits, seed=seed) for bits in DIGEST_BITS}
    solo = run_alone(model, tokenizer, jobs, list(crowds.values()))
    print(f"{arithmetic}, alone, one after another: {solo.seconds:.0f} s", flush=True)
    wrong = 0
    for bits, crowd in crowds.items():
        counts = compare(crowd, solo, jobs, exact if arithmetic == "native" else None)
        wrong += counts["wrong"] + (not all_given_back(crowd.llm))
        report(bits, crowd, counts)
    return wrong


def report(bits: int, crowd: Run, counts: dict[str, int]) -> None:
    scheduler, pool = crowd.llm.core.scheduler, crowd.llm.core.pool
    cached = sum(output.num_cached_tokens for output in crowd.outputs if output is not None)
    back = "all" if all_given_back(crowd.llm) else "NOT ALL"
    print(
        f"  {bits:3} bits: {', '.join(f'{n} {what}' for what, n in counts.items())}; "
        f"{len(crowd.aborted)} aborted, {scheduler.num_preemptions} preemptions, {cached} tokens "
        f"from the prefix cache, {pool.evictions} evictions, {pool.collisions} collisions, "
        f"{back} blocks free, {crowd.seconds:.0f} s",
        flush=True,
    )


def load(arithmetic: str, path: Path) -> Qwen2:
    return Qwen2.from_pretrained(path, dtype="float32", arithmetic=arithmetic)


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_dir(EMBEDDED)
    exact, native = load("exact", EMBEDDED), load("native", EMBEDDED)
    jobs = make_jobs(args.requests, tokenizer, args.seed)
    completions = sum(job.params.n for job in jobs)
    print(f"{len(jobs)} requests, {completions} completions, one engine of 17 blocks of 2 tokens")
    wrong = soak("exact", exact, exact, tokenizer, jobs, args.seed)
    wrong += soak("native", native, exact, tokenizer, jobs, args.seed)
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
