"""Several ranks share the model: rank 0 takes the jobs, and all make the same steps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from support.engine import PROMPTS, idle
from support.ranks import on_ranks
from support.serving import NAME, engine, served

from minqwen import Qwen2, SamplingParams
from minqwen.serve.errors import ApiError
from minqwen.serve.loop import EngineLoop, Failed, follow
from minqwen.serve.orders import Job

SAMPLED = {"max_tokens": 5, "temperature": 1.0, "logprobs": 2, "ignore_eos": True}


def params(**fields) -> SamplingParams:
    return SamplingParams(**{**SAMPLED, **fields})


@pytest.fixture(scope="module")
def exact(embedded):
    return Qwen2.from_pretrained(embedded, dtype="float32", arithmetic="exact")


def test_two_ranks_serve_the_bits_that_one_does(exact, embedded, embedded_tokenizer):
    """Jobs, one that is refused on both ranks, and one that is dropped on the way."""
    ids = [embedded_tokenizer.encode(prompt) for prompt in PROMPTS]

    def serve(mesh):
        model = Qwen2.from_pretrained(embedded, dtype="float32", arithmetic="exact", mesh=mesh)
        llm = engine(model, embedded_tokenizer)
        if mesh.rank:
            follow(llm)
            return idle(llm)
        loop, outputs, failed = EngineLoop(llm), {}, []

        def listen(event):
            if isinstance(event, Failed):
                failed.append((event.request_id, event.error.status))
            if getattr(event, "output", None):
                outputs[event.request_id] = event.output
            if getattr(event, "index", None) == 0 and event.request_id == "0":
                loop.abort("dropped", ApiError(503, "gone"))
            if len(outputs) == len(ids) and len(failed) == 2:
                loop.end()

        loop.submit(Job("dropped", ids[0], params(max_tokens=90)), listen)
        loop.submit(Job("wrong", ids[0], params(logit_bias={9999: 1})), listen)
        for i, prompt in enumerate(ids):
            loop.submit(Job(str(i), prompt, params(seed=i)), listen)
        loop.run()
        return outputs, failed, idle(llm)

    (outputs, failed, clean), follower_clean = on_ranks(2, serve)
    assert sorted(failed) == [("dropped", 503), ("wrong", 400)] and clean and follower_clean
    alone = engine(exact, embedded_tokenizer)
    for i, prompt in enumerate(ids):
        (expected,) = alone.generate([prompt], params(seed=i), use_tqdm=False)
        got = outputs[str(i)].outputs[0]
        assert got.token_ids == expected.outputs[0].token_ids
        assert got.logprobs == expected.outputs[0].logprobs  # every bit


def test_exact_answers_do_not_depend_on_who_else_is_served(exact, embedded_tokenizer):
    asked = {"model": NAME, "prompt": PROMPTS[2], "seed": 4, "return_token_ids": True, **SAMPLED}
    with served(engine(exact, embedded_tokenizer)) as running, ThreadPoolExecutor() as pool:

        def answer(**fields):
            return running.post("/v1/completions", **{**asked, **fields}).json()["choices"][0]

        alone = answer()
        crowd = [pool.submit(answer, prompt=p, seed=i) for i, p in enumerate([*PROMPTS] * 2)]
        beside = [pool.submit(answer) for _ in range(2)]
        assert all(found.result() == alone for found in beside)
        assert all(found.result()["token_ids"] for found in crowd)
