"""Many requests at once on a cache that is too small, against every one of them alone.

Prompts share beginnings, come while others run, are sampled in every way, and one in five is
aborted at a random moment. In exact arithmetic whatever survives has the tokens, text and logprobs
of its solo run in every bit, and whatever was aborted has a prefix of its tokens. In native float32
it has the same tokens, or greedy's first difference is a tie within float32's rounding, as exact
arithmetic's logits show.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from minqwen.engine.blocks import BlockPool
from minqwen.engine.llm import LLM
from minqwen.engine.outputs import RequestOutput
from minqwen.model import Qwen2
from minqwen.sampling.draw import Row, transform
from minqwen.sampling.params import SamplingParams
from minqwen.tokenizer import Tokenizer

TEXT = (
    "And God said, Let there be light: and there was light. And the LORD spake unto Moses, saying, "
    "Speak unto the children of Israel, and say unto them, When ye be come into the land of your "
    "habitations, which I give unto you, What is 47 + 38? He maketh me to lie down in green "
    "pastures: he leadeth me beside the still waters."
)
LONGEST = 33  # tokens of a prompt and its output
OPTIONS: dict[str, Any] = {
    "max_model_len": LONGEST,
    "block_size": 2,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 96,
    "seed": 0,
}
TIE = 2.0**-18  # of the largest logit: 32 float32 roundings of it
WAITING = 5  # so many requests wait at a time
ABORTED = 5  # one in so many is aborted


@dataclass
class Job:
    prompt: list[int]
    params: SamplingParams
    salt: str | None


def make_jobs(count: int, tokenizer: Tokenizer, seed: int = 0) -> list[Job]:
    """`count` requests that share a few beginnings and differ in everything else."""
    r = random.Random(seed)
    text = tokenizer.encode(TEXT)
    beginnings = [text[at : at + length] for at, length in ((0, 3), (11, 6), (23, 9), (40, 14))]
    jobs = []
    for i in range(count):
        start = r.randrange(len(text) - 8)
        prompt = r.choice([[], *beginnings]) + text[start : start + r.randint(1, 8)]
        params = _random_params(r, seed=i, biased_token=text[0])
        salt = "ab"[i % 2] if r.random() < 0.1 else None
        jobs.append(Job(prompt, params, salt))
    return jobs


def _random_params(r: random.Random, seed: int, biased_token: int) -> SamplingParams:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.5},
        {"temperature": 1.3, "min_p": 0.05, "frequency_penalty": 0.3},
        {"temperature": 1.0, "logit_bias": {biased_token: 2.0}},
    ]
    longest = r.randint(3, 11)
    return SamplingParams(
        seed=seed,
        max_tokens=longest,
        min_tokens=r.randint(0, longest) if r.random() < 0.2 else 0,
        n=r.choice([1] * 6 + [2, 3]),
        ignore_eos=r.random() < 0.5,
        stop=r.choice([(), (), (), " the", ",", ["and ", "e o"]]),
        logprobs=r.choice([None, None, 0, 2]),
        prompt_logprobs=0 if r.random() < 0.03 else None,
        **r.choice(kinds),
    )


@dataclass
class Run:
    """What came of all jobs: for each its output, as far as it got if it was aborted."""

    llm: LLM
    outputs: list[RequestOutput | None] = field(default_factory=list)
    aborted: set[int] = field(default_factory=set)
    seconds: float = 0.0


def run_crowd(
    model: Qwen2,
    tokenizer: Tokenizer,
    jobs: list[Job],
    digest_bits: int,
    num_blocks: int = 17,
    pool_class: type[BlockPool] = BlockPool,
    seed: int = 0,
) -> Run:
    """All jobs through one engine, a few new ones in every step; a fifth of them aborted."""
    r = random.Random(seed)
    llm = LLM(model, tokenizer=tokenizer, num_blocks=num_blocks, **OPTIONS)
    llm.core.scheduler.pool = pool_class(num_blocks, OPTIONS["block_size"], digest_bits=digest_bits)
    run, alive = Run(llm), {}  # alive: request id -> job
    began, coming = time.perf_counter(), list(range(len(jobs)))
    while coming or llm.has_unfinished_requests:
        while coming and len(llm.core.scheduler.waiting) < WAITING:
            job = jobs[coming[0]]
            request_id = llm.add_request(job.prompt, job.params, cache_salt=job.salt)
            alive[request_id] = coming.pop(0)
            run.outputs.append(None)
        due = len(jobs) // ABORTED * len(run.outputs) // len(jobs)
        if alive and len(run.aborted) < due and (not coming or r.random() < 0.7):
            victim = r.choice(list(alive))
            request, i = llm.core.requests[victim], alive.pop(victim)
            llm.abort(victim)
            run.outputs[i] = request.output()
            run.aborted.add(i)
        for delta in llm.step():
            if delta.output is not None:
                run.outputs[alive.pop(delta.request_id)] = delta.output
    run.seconds = time.perf_counter() - began
    return run


def run_alone(
    model: Qwen2, tokenizer: Tokenizer, jobs: list[Job], crowds: Sequence[Run] = ()
) -> Run:
    """Every job on its own: no neighbours, no prefix cache, no lack of blocks.

    None for those that were aborted in all of `crowds` before they had a token.
    """
    llm = LLM(model, tokenizer=tokenizer, num_blocks=100, enable_prefix_caching=False, **OPTIONS)
    run, began = Run(llm), time.perf_counter()
    for i, job in enumerate(jobs):
        if not crowds or any(_has_tokens(crowd.outputs[i]) for crowd in crowds):
            run.outputs += llm.generate([job.prompt], job.params, use_tqdm=False)
        else:
            run.outputs.append(None)
    run.seconds = time.perf_counter() - began
    return run


def _has_tokens(output: RequestOutput | None) -> bool:
    return output is not None and any(c.token_ids for c in output.outputs)


def signature(output: RequestOutput | None) -> object:
    """All that a caller sees and that must not depend on the other requests."""
    if output is None:
        return None
    completions = [
        (c.token_ids, c.text, c.finish_reason, c.stop_reason, c.logprobs, c.cumulative_logprob)
        for c in output.outputs
    ]
    return output.prompt_logprobs, completions


@torch.inference_mode()
def margin(exact: Qwen2, job: Job, tokens: list[int], other: int) -> float:
    """By how much tokens[-1] is likelier than `other` after the prompt and tokens[:-1].

    By exact arithmetic, in units of the largest logit.
    """
    ids = job.prompt + tokens[:-1]
    logits: torch.Tensor = exact(torch.tensor([ids]))[0, -1:].float()
    row = Row(params=job.params, ids=ids, num_prompt=len(job.prompt), seed=0)
    scores = transform(logits.clone(), [row])[0]
    return abs(float(scores[tokens[-1]] - scores[other])) / float(logits.abs().max())


def compare(crowd: Run, solo: Run, jobs: list[Job], exact: Qwen2 | None = None) -> dict[str, int]:
    """Counts of completions (in exact arithmetic of whole requests); "wrong" must be 0.

    exact: the model that judges ties, for runs in native arithmetic; None: both runs were exact.
    """
    counts = dict.fromkeys(("same", "prefix", "tie", "sampled otherwise", "wrong"), 0)
    for i, job in enumerate(jobs):
        got, want = crowd.outputs[i], solo.outputs[i]
        if exact is None and i not in crowd.aborted:
            counts["same" if signature(got) == signature(want) else "wrong"] += 1
            continue
        assert got is not None
        for a, b in zip(got.outputs, (want or got).outputs, strict=True):
            verdict = _judge(a.token_ids, b.token_ids, job, i in crowd.aborted, exact)
            counts[verdict] += 1
    return counts


def _judge(got: list[int], want: list[int], job: Job, aborted: bool, exact: Qwen2 | None) -> str:
    """The name under which `compare` counts a completion's tokens beside those of its solo run."""
    length = len(got) if aborted else max(len(got), len(want))
    at = next((j for j in range(length) if got[j : j + 1] != want[j : j + 1]), None)
    if at is None:
        return "prefix" if aborted else "same"
    if exact is None or at >= min(len(got), len(want)):
        return "wrong"
    if job.params.temperature > 0:
        return "sampled otherwise"
    return "tie" if margin(exact, job, got[: at + 1], want[at]) <= TIE else "wrong"


def all_given_back(llm: LLM) -> bool:
    """No request is left, and no block is in use."""
    pool = llm.core.pool
    return not llm.core.requests and pool.num_free == pool.num_blocks and not any(pool.references)
