#!/usr/bin/env python3
"""A thousand requests at once on a pool that is too small, against every one of them alone.

  python benchmarks/soak.py                             # 1,000 requests, exact and native, digests of 256 and 4 bits
  python benchmarks/soak.py --scheduler-steps 1000000   # allocator and scheduler alone, all invariants after each step

Prompts share beginnings, come while others run, are sampled in every way, and one in five is aborted at a random
moment. Exact arithmetic: whatever survives has the tokens, text and logprobs of its solo run in every bit, whatever was
aborted a prefix of its tokens. Native float32: the same tokens, or greedy's first difference is a tie within float32's
rounding, as exact arithmetic's logits show. Exits with 1 if anything differs that must not.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from minqwen import Qwen2, Tokenizer

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--scheduler-steps",
        type=int,
        metavar="N",
        help="no model: so many steps of the state machine",
    )
    args = parser.parse_args()
    if args.scheduler_steps:
        sys.path.insert(0, str(ROOT / "tests"))
        from scheduler_machine import long_run

        began, happened = time.perf_counter(), long_run(args.scheduler_steps, args.seed)
        print(
            ", ".join(f"{n} {what}s" for what, n in happened.items()),
            "and no rule broken,",
            f"{time.perf_counter() - began:.0f} s",
        )
        return 0
    tokenizer = Tokenizer.from_dir(ROOT / "weights" / "embedded")
    models = {
        a: Qwen2.from_pretrained(ROOT / "weights" / "embedded", dtype="float32", arithmetic=a)
        for a in ("exact", "native")
    }
    jobs, wrong = make_jobs(args.requests, tokenizer, args.seed), 0
    print(
        f"{len(jobs)} requests, {sum(job.params.n for job in jobs)} completions, one engine of 17 blocks of 2 tokens"
    )
    for arithmetic, model in models.items():
        crowds = {
            bits: run_crowd(model, tokenizer, jobs, bits, seed=args.seed) for bits in (256, 4)
        }
        solo = run_alone(model, tokenizer, jobs, list(crowds.values()))
        print(f"{arithmetic}, alone, one after another: {solo.seconds:.0f} s", flush=True)
        for digest_bits, crowd in crowds.items():
            counts = compare(crowd, solo, jobs, models["exact"] if arithmetic == "native" else None)
            llm, back = crowd.llm, all_given_back(crowd.llm)
            print(
                f"  {digest_bits:3} bits: "
                + ", ".join(f"{n} {what}" for what, n in counts.items())
                + f"; {len(crowd.aborted)} aborted, {llm.scheduler.num_preemptions} preemptions, "
                f"{sum(o.num_cached_tokens for o in crowd.outputs)} tokens from the prefix cache, "
                f"{llm.pool.evictions} evictions, {llm.pool.collisions} collisions, "
                f"{'all' if back else 'NOT ALL'} blocks free, {crowd.seconds:.0f} s",
                flush=True,
            )
            wrong += counts["wrong"] + (not back)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
