"""Many requests at once on a cache that is too small, against every one of them alone."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import torch

from minqwen.engine.blocks import BlockPool
from minqwen.engine.llm import LLM
from minqwen.engine.outputs import RequestOutput
from minqwen.model import Qwen2
from minqwen.sampling.draw import Row, transform
from minqwen.sampling.params import SamplingParams
from minqwen.tokenizer import Tokenizer

TEXT = (
    "And God said, Let there be light: and there was light. And the LORD spake unto Moses, saying, Speak unto the "
    "children of Israel, and say unto them, When ye be come into the land of your habitations, which I give unto "
    "you, What is 47 + 38? He maketh me to lie down in green pastures: he leadeth me beside the still waters."
)


LONGEST = 33  # tokens of a prompt and its output


OPTIONS = {
    "max_model_len": LONGEST,
    "block_size": 2,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 96,
    "seed": 0,
}


TIE = 2.0**-18  # of the largest logit: 32 float32 roundings of it


@dataclass
class Job:
    prompt: list[int]
    params: SamplingParams
    salt: str | None


def make_jobs(count: int, tokenizer: Tokenizer, seed: int = 0) -> list[Job]:
    r = random.Random(seed)
    text = tokenizer.encode(TEXT)
    beginnings = [
        text[start : start + length] for start, length in ((0, 3), (11, 6), (23, 9), (40, 14))
    ]
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.5},
        {"temperature": 1.3, "min_p": 0.05, "frequency_penalty": 0.3},
        {"temperature": 1.0, "logit_bias": {text[0]: 2.0}},
    ]
    jobs = []
    for i in range(count):
        start = r.randrange(len(text) - 8)
        prompt = r.choice([[], *beginnings]) + text[start : start + r.randint(1, 8)]
        longest = r.randint(3, 11)
        options = {
            "seed": i,
            "max_tokens": longest,
            "min_tokens": r.randint(0, longest) if r.random() < 0.2 else 0,
            "n": r.choice([1] * 6 + [2, 3]),
            "ignore_eos": r.random() < 0.5,
            "stop": r.choice([None, None, None, " the", ",", ["and ", "e o"]]),
            "logprobs": r.choice([None, None, 0, 2]),
            "prompt_logprobs": 0 if r.random() < 0.03 else None,
        }
        salt = "ab"[i % 2] if r.random() < 0.1 else None
        jobs.append(Job(prompt, SamplingParams(**r.choice(kinds), **options), salt))
    return jobs


@dataclass
class Run:
    outputs: list[RequestOutput | None]
    aborted: set[int] = field(default_factory=set)
    seconds: float = 0.0
    llm: LLM | None = None


def run_crowd(
    model: Qwen2,
    tokenizer: Tokenizer,
    jobs: list[Job],
    digest_bits: int,
    num_blocks: int = 17,
    pool_class=BlockPool,
    seed: int = 0,
) -> Run:
    """All jobs through one engine, a few new ones in every step; a fifth of them aborted."""
    r, run = random.Random(seed), Run([])
    run.llm = llm = LLM(model, tokenizer=tokenizer, num_blocks=num_blocks, **OPTIONS)
    llm.pool = llm.scheduler.pool = pool_class(
        num_blocks, OPTIONS["block_size"], digest_bits=digest_bits
    )
    began, coming, alive = time.perf_counter(), list(range(len(jobs))), {}
    while coming or llm.has_unfinished_requests:
        while coming and len(llm.scheduler.waiting) < 5:
            i = coming.pop(0)
            alive[i] = llm.add_request(jobs[i].prompt, jobs[i].params, cache_salt=jobs[i].salt)
            run.outputs.append(llm.requests[alive[i]].output)
        alive = {i: key for i, key in alive.items() if not run.outputs[i].finished}
        due = len(jobs) // 5 * len(run.outputs) // len(jobs)
        if alive and len(run.aborted) < due and (not coming or r.random() < 0.7):
            victim = r.choice(list(alive))
            llm.abort(alive.pop(victim))
            run.aborted.add(victim)
        llm.step()
    run.seconds = time.perf_counter() - began
    return run


def run_alone(model: Qwen2, tokenizer: Tokenizer, jobs: list[Job], crowds: list[Run] = ()) -> Run:
    """Every job on its own: no neighbours, no prefix cache, no lack of blocks. None for those that were aborted in
    all of `crowds` before they had a token."""
    run = Run(
        [],
        llm=LLM(model, tokenizer=tokenizer, num_blocks=100, enable_prefix_caching=False, **OPTIONS),
    )
    began = time.perf_counter()
    for i, job in enumerate(jobs):
        wanted = not crowds or any(
            c.token_ids for crowd in crowds for c in crowd.outputs[i].outputs
        )
        run.outputs += (
            run.llm.generate([job.prompt], job.params, use_tqdm=False) if wanted else [None]
        )
    run.seconds = time.perf_counter() - began
    return run


def signature(output: RequestOutput):
    """All that a caller sees and that must not depend on the others."""
    return output.prompt_logprobs, [
        (c.token_ids, c.text, c.finish_reason, c.stop_reason, c.logprobs, c.cumulative_logprob)
        for c in output.outputs
    ]


@torch.inference_mode()
def margin(exact: Qwen2, job: Job, tokens: list[int], other: int) -> float:
    """By how much tokens[-1] is likelier than `other` after the prompt and tokens[:-1], in units of the largest logit,
    by exact arithmetic."""
    logits = exact(torch.tensor([job.prompt + tokens[:-1]]))[0, -1:].float()
    ids = job.prompt + tokens[:-1]
    row = Row(params=job.params, ids=ids, num_prompt=len(job.prompt), seed=0)
    scores = transform(logits.clone(), [row])[0]
    return abs(float(scores[tokens[-1]] - scores[other])) / float(logits.abs().max())


def compare(crowd: Run, solo: Run, jobs: list[Job], exact: Qwen2 | None = None) -> dict[str, int]:
    """Counts of completions ("same" in exact arithmetic: of whole requests). "wrong" must be 0. exact: a model that
    judges ties, for native arithmetic."""
    counts = dict.fromkeys(("same", "prefix", "tie", "sampled otherwise", "wrong"), 0)
    for i, (job, got, want) in enumerate(zip(jobs, crowd.outputs, solo.outputs, strict=True)):
        if exact is None and i not in crowd.aborted:
            counts["same" if signature(got) == signature(want) else "wrong"] += 1
            continue
        for a, b in zip(got.outputs, want.outputs if want else got.outputs, strict=True):
            length = (
                len(a.token_ids) if i in crowd.aborted else max(len(a.token_ids), len(b.token_ids))
            )
            at = next(
                (j for j in range(length) if a.token_ids[j : j + 1] != b.token_ids[j : j + 1]), None
            )
            if at is None:
                counts["prefix" if i in crowd.aborted else "same"] += 1
            elif exact is None or max(at, 0) >= min(len(a.token_ids), len(b.token_ids)):
                counts["wrong"] += 1
            elif job.params.temperature > 0:
                counts["sampled otherwise"] += 1
            else:
                tie = margin(exact, job, a.token_ids[: at + 1], b.token_ids[at]) <= TIE
                counts["tie" if tie else "wrong"] += 1
    return counts


def all_given_back(llm: LLM) -> bool:
    return (
        not llm.requests
        and llm.pool.num_free == llm.pool.num_blocks
        and not any(llm.pool.references)
    )
