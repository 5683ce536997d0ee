"""Several replicas of a model complete the prompts of one call as one replica would."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.checkpoints import refusal
from support.forked import forked, forked_torchrun
from support.paths import EMBEDDED

from minqwen import LLM
from minqwen.engine.outputs import CompletionOutput, Metrics, RequestOutput
from minqwen.engine.replicas import from_bytes, to_bytes
from minqwen.parallel import Mesh
from minqwen.sampling.logprobs import Logprob

# What every rank has of some calls is written to a file with the number of the rank.
CALLS = """
import os, pathlib, sys
from minqwen import LLM, SamplingParams

TEXTS = ["In the beginning", "And God said", "The LORD", "Blessed are", "Jesus wept"]

def plain(output):
    ones = [
        (o.text, o.token_ids, o.logprobs, o.cumulative_logprob, o.finish_reason, o.stop_reason)
        for o in output.outputs
    ]
    traces = [{name: x.tolist() for name, x in o.trace.items()} for o in output.outputs]
    return output.prompt, output.prompt_token_ids, output.prompt_logprobs, ones, traces

def answers(llm):
    random = SamplingParams(temperature=1.0, max_tokens=6, n=2, logprobs=2)
    chosen = SamplingParams(temperature=1.0, max_tokens=3, seed=5, prompt_logprobs=1)
    greedy = SamplingParams(temperature=0, max_tokens=4, stop=[" the"])
    outputs = llm.generate(TEXTS, random, use_tqdm=False)
    outputs += llm.generate(TEXTS, [chosen, greedy, None, greedy, chosen], use_tqdm=False)
    outputs += llm.generate(TEXTS[:3], greedy, trace="logits", use_tqdm=False)
    outputs += llm.generate(TEXTS[0], random, use_tqdm=False)
    assert llm.generate([], greedy, use_tqdm=False) == []
    streamed = "".join(llm.stream(TEXTS[0], greedy))
    return [plain(output) for output in outputs], llm.score(TEXTS), streamed

options = dict(arithmetic="exact", max_model_len=64, num_blocks=64, seed=3)
llm = LLM(tensor_parallel_size=int(sys.argv[1]), **options)
world = llm.mesh.world
pathlib.Path(sys.argv[2], str(world.rank)).write_text(repr(answers(llm)))
few = SamplingParams(max_tokens=2)
ordered = [output.prompt for output in llm.iterate(TEXTS, few, use_tqdm=False)]
assert ordered == (TEXTS if world.rank == 0 else []), ordered
line = f"{world.rank} {llm.mesh.replica} {llm.mesh.rank}\\n"
os.write(1, line.encode())  # in one piece: all ranks write to one file
"""


@pytest.fixture(scope="module")
def answers_of_one(tmp_path_factory) -> str:
    """What one replica, of one rank, has of CALLS."""
    folder = tmp_path_factory.mktemp("one")
    done = forked(1, CALLS, [1, folder])
    assert done.returncode == 0, done.stderr
    return (folder / "0").read_text()


@pytest.mark.parametrize("start, ranks, size", [(forked_torchrun, 4, 2), (forked, 3, 1)])
def test_several_replicas_give_what_one_gives_in_every_bit(
    answers_of_one, tmp_path, start, ranks, size
):
    done = start(ranks, CALLS, [size, tmp_path])
    assert done.returncode == 0, done.stderr
    for rank in range(ranks):
        assert (tmp_path / str(rank)).read_text() == answers_of_one, rank
    found = sorted(tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert found == [(r, r // size, r % size) for r in range(ranks)]


def test_ranks_that_cannot_be_divided_say_what_can(monkeypatch):
    for size in (2, 3, 100):
        refusal(
            lambda size=size: LLM(tensor_parallel_size=size),
            *(f"tensor_parallel_size is {size}, but 1 rank", f"torchrun --nproc-per-node {size}"),
        )
    done = forked(4, "from minqwen import LLM\nLLM(tensor_parallel_size=3)")
    assert done.returncode != 0
    assert "tensor_parallel_size is 3, but 4 ranks were started, expected 1, 2, 4" in done.stderr


def test_a_degree_that_does_not_fit_names_heads_and_replicas():
    mesh = Mesh()
    mesh.size = 8
    refusal(
        lambda: LLM(EMBEDDED, mesh=mesh),
        *("--num-attention-heads 32", "tensor_parallel_size 4: 2 replicas", "each on 4 ranks"),
    )


def test_an_output_travels_whole():
    nan = float("nan")
    rows = [None, {7: Logprob(-0.1, 1, "\udce2"), 9: Logprob(float("-inf"), 2, None)}]
    trace = {"logits": torch.randn(3, 5)[:, ::2], "scores": [torch.ones(2), torch.ones(1).half()]}
    ones = [
        CompletionOutput(0, "a\u2028\0", [7], -0.1, rows[1:], "stop", 7, trace=trace),
        CompletionOutput(1, "", [], None, None, "error", "x"),
    ]
    outputs = [
        RequestOutput("r", None, [1, 2], ones, Metrics(0.1, None, 1 / 3), prompt_logprobs=rows),
        RequestOutput("s", "p", [3], [], Metrics(nan), num_cached_tokens=4, error="why"),
    ]
    (i, first), (j, second) = from_bytes(to_bytes(list(enumerate(outputs))), torch.device("cpu"))
    assert (i, j) == (0, 1)
    found = first.outputs[0].trace
    assert torch.equal(found["logits"], trace["logits"])
    assert [x.dtype for x in found["scores"]] == [torch.float32, torch.float16]
    assert second.metrics.arrival != second.metrics.arrival
    for output, wanted in ((first, outputs[0]), (second, outputs[1])):
        for one in [*output.outputs, *wanted.outputs]:
            one.trace.clear()
        calm = {"metrics": Metrics(0)} if wanted is outputs[1] else {}
        assert dataclasses.replace(output, **calm) == dataclasses.replace(wanted, **calm)


# ---- what becomes of a run that loses a replica -------------------------------------------------

WAITS = """
import os, signal, sys, time
from minqwen import LLM, SamplingParams
llm = LLM(tensor_parallel_size=1, max_model_len=64, num_blocks=64)
llm.generate("one step, so that nobody is loading", SamplingParams(max_tokens=1), use_tqdm=False)
def deed(x, name):
    if llm.mesh.replica == 1:
        exec(sys.argv[1])
hooks = [("layers.0.resid_pre", deed)] if llm.mesh.replica == 1 else []
params = SamplingParams(temperature=0, max_tokens=4)
llm.generate(["In the beginning", "And God said"], params, hooks=hooks, use_tqdm=False)
os.write(1, b"done\\n")
"""


@pytest.mark.parametrize(
    "start, deed, reason",
    [
        (forked, "while True: pass", "has not joined the others for 2 s (it is busy at"),
        (
            forked_torchrun,
            "os.kill(os.getpid(), signal.SIGKILL)",
            "killed, crashed or out of memory)",
        ),
    ],
    ids=["runs in a circle", "is killed"],
)
def test_a_lost_replica_ends_all(start, deed, reason):
    done = start(2, WAITS, [deed], env={"MINQWEN_TIMEOUT": "2"})
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: rank 1 of 2 (pid ") and reason in error
    assert done.returncode != 0 and "done" not in done.stdout


def test_a_slow_replica_is_waited_for_while_it_goes_on():
    """Its four steps together take half as long again as the timeout."""
    done = forked(2, WAITS, ["time.sleep(3)"], env={"MINQWEN_TIMEOUT": "8"})
    assert done.returncode == 0 and done.stdout == "done\ndone\n", done.stderr
