"""Several ranks share the model: rank 0 takes the jobs, and all make the same steps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from support.engine import PROMPTS, idle
from support.forked import forked
from support.ranks import on_ranks
from support.serving import NAME, engine, served

from minqwen import Mesh, Qwen2, SamplingParams
from minqwen.serve.errors import ApiError
from minqwen.serve.loop import EngineLoop
from minqwen.serve.orders import Job, Orders
from minqwen.serve.reports import Failed, joined
from minqwen.serve.worker import Worker, assigned, follow

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


SERVER = """
import os, signal, threading, time
import httpx, torch
from minqwen import LLM
from minqwen.serve.server import bound, ignore_signals, serve
from minqwen.serve.service import Service
from minqwen.serve.worker import follow

llm = LLM(max_model_len=64, num_blocks=64, dtype="float32")
ranks = llm.mesh.all_gather(torch.tensor([os.getpid()])).tolist()
listener = bound("127.0.0.1", 0)
asked = {"prompt": "And", "max_tokens": 6, "ignore_eos": True, "stream": True}

def read(response):
    lines = response.iter_lines()
    next(lines)
    for rank in ranks:
        os.kill(rank, signal.SIGTERM)
    time.sleep(2.5)  # the watch ends a process two seconds after a signal
    stepping.set()
    *_, last = [line for line in lines if line]
    os.write(1, last.encode())

def ask():
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
    transport = httpx.HTTPTransport(retries=100)  # until the server listens
    with httpx.Client(transport=transport, timeout=120) as client:
        with client.stream("POST", url, json=asked) as response:
            read(response)

if llm.mesh.rank:
    ignore_signals()
    follow(llm)
else:
    stepping, step, made = threading.Event(), llm.step, []
    def slow_step():
        if llm.has_unfinished_requests:
            made.append(1)
            if len(made) == 3:
                stepping.wait()
        return step()
    llm.step = slow_step
    client = threading.Thread(target=ask)
    client.start()
    serve(Service(llm), listener)
    client.join()
"""


def test_a_signal_to_all_ranks_lets_them_finish_what_runs():
    done = forked(2, SERVER)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("data: [DONE]")


# ---- replicas -----------------------------------------------------------------------------------


def test_a_job_goes_where_its_prefix_is_and_then_where_least_runs():
    assert assigned([[5, 0, 3], [0, 0, 2]]) == [1, 0]
    assert assigned([[0, 0, 0, 0], [1, 0, 0, 0]]) == [0, 0, 1]
    assert assigned([[9, 1], [0, 0]]) == [0]


def test_reports_come_back_from_bytes_as_they_were(exact, embedded_tokenizer):
    llm = engine(exact, embedded_tokenizer)
    worker = Worker(llm)
    wanted = params(max_tokens=2, prompt_logprobs=1)
    jobs = [Job("a", [5, 6, 7], wanted), Job("b", [5, 9999], wanted)]
    for orders in (Orders(jobs, []), Orders([], [])):
        (report,) = worker.turn(orders)
        (back,) = joined([b"", report.to_bytes()])
        assert [repr(event) for event in back.events if not isinstance(event, Failed)] == [
            repr(event) for event in report.events if not isinstance(event, Failed)
        ]
        failed = [event.error.body() for event in report.events if isinstance(event, Failed)]
        assert failed == [event.error.body() for event in back.events if isinstance(event, Failed)]
        assert (back.waiting, back.state) == (report.waiting, report.state)


def test_two_replicas_share_the_jobs(exact, embedded, embedded_tokenizer):
    """Each has half of them, and what is asked again goes where its prefix is cached."""
    prompts = [embedded_tokenizer.encode(prompt) * 3 for prompt in PROMPTS[:2]]

    def serve(world):
        mesh = Mesh()
        mesh.world, mesh.replica, mesh.replicas = world, world.rank, world.size
        model = Qwen2.from_pretrained(embedded, dtype="float32", arithmetic="exact", mesh=mesh)
        llm = engine(model, embedded_tokenizer)
        if world.rank:
            follow(llm)
            return idle(llm)
        loop, outputs, failed = EngineLoop(llm), [], []

        def listen(event):
            if isinstance(event, Failed):
                failed.append(event.request_id)
            if getattr(event, "output", None):
                outputs.append(event.output)
                if len(outputs) == 2:  # again, the other way round
                    for i in (1, 0):
                        loop.submit(Job(f"again {i}", prompts[i], params(seed=i)), listen)
            if len(outputs) == 4:
                loop.end()

        loop.submit(Job("wrong", prompts[0], params(logit_bias={9999: 1})), listen)
        for i in (0, 1):
            loop.submit(Job(str(i), prompts[i], params(seed=i)), listen)
        loop.run()
        return outputs, failed, idle(llm), loop.metrics.text().decode()

    (outputs, failed, clean, metrics), follower_clean = on_ranks(2, serve)
    assert clean and follower_clean and failed == ["wrong"]
    alone = engine(exact, embedded_tokenizer)
    found = {output.request_id: output for output in outputs}
    for i, prompt in enumerate(prompts):
        (expected,) = alone.generate([prompt], params(seed=i), use_tqdm=False)
        for name, cached in ((str(i), False), (f"again {i}", True)):
            got = found[name].outputs[0]
            assert got.token_ids == expected.outputs[0].token_ids
            assert got.logprobs == expected.outputs[0].logprobs
            assert (found[name].num_cached_tokens > 0) == cached
    for replica in (0, 1):
        assert f'minqwen_running{{replica="{replica}"}} 0.0' in metrics
