"""Outputs in the order of the prompts, each when its turn comes; and what Ctrl-C leaves of them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from support.engine import idle
from support.paths import ROOT
from support.torchrun import environment, marked

from minqwen import LLM, SamplingParams


def params(*lengths: int) -> list[SamplingParams]:
    return [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]


def test_an_output_comes_when_its_turn_comes_and_not_later(embedded_model):
    llm = LLM(embedded_model, max_model_len=64, num_blocks=64)
    prompts = [[1, 2], [3], [4, 5, 6]]
    whole = llm.generate(prompts, params(3, 1, 30), use_tqdm=False)
    outputs = llm.iterate(prompts, params(3, 1, 30), use_tqdm=False)
    first = next(outputs)
    assert list(outputs.finished) == [1] and llm.has_unfinished_requests
    second = next(outputs)
    assert llm.has_unfinished_requests
    (third,) = outputs
    assert [o.outputs for o in (first, second, third)] == [o.outputs for o in whole]
    assert idle(llm)


def test_who_closes_early_drops_the_rest_and_nothing_else(embedded_model):
    llm = LLM(embedded_model, max_model_len=64, num_blocks=64)
    other = llm.add_request([7], params(9)[0])
    outputs = llm.iterate([[1, 2], [3]], params(1, 30), use_tqdm=False)
    next(outputs)
    outputs.close()
    assert list(outputs) == [] and list(llm.core.requests) == [other]
    llm.iterate([[1, 2]], params(2), use_tqdm=False).close()  # before the first step
    assert list(llm.core.requests) == [other]


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--nproc-per-node", "2"]])
def test_ctrl_c_leaves_all_that_is_finished_written(tmp_path, launcher):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(f"And God said {i}") + "\n" for i in range(2000)))
    flags = ["--max-tokens", "8", "--temperature", "0", "--json", "--ignore-eos"]
    if launcher:
        flags += ["--tensor-parallel-size", "1"]
    mark = tmp_path.name
    errors = tmp_path / "errors"
    process = subprocess.Popen(
        [sys.executable, *launcher, ROOT / "tools/generate.py", "--prompt-file", file, *flags],
        stdout=subprocess.PIPE,
        stderr=errors.open("w"),
        text=True,
        env=environment(mark, {}),
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and so do their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        first = process.stdout.readline()  # the run is on its way
        process.send_signal(signal.SIGINT)
        out = first + process.stdout.read()
        process.wait()
    finally:
        for left in marked(mark):
            left.kill()
    err = errors.read_text()
    found = [json.loads(line) for line in out.split("\n")[:-1]]
    numbers = [one["index"] for one in found]
    assert numbers == sorted(set(numbers)) and 0 < len(numbers) < 2000
    assert all(one["finish_reason"] == "length" for one in found)
    assert all(one["prompt"] == f"And God said {one['index']}" for one in found)
    assert f"stopped: {len(found)} of 2000 prompts are finished and shown" in err
    assert process.returncode != 0 and "generate.py" not in err  # no traceback of ours


def test_what_is_finished_out_of_turn_is_there_when_a_caller_stops(embedded_model):
    """The second prompt ends at once; the first has not ended when the caller is interrupted."""
    llm = LLM(embedded_model, max_model_len=64, num_blocks=64)
    step, steps = llm.core.step, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(*args)

    llm.core.step = interrupted
    outputs = llm.iterate([[1, 2], [3]], params(30, 1), use_tqdm=False)
    with pytest.raises(KeyboardInterrupt):
        next(outputs)
    assert list(outputs.finished) == [1] and outputs.finished[1].prompt_token_ids == [3]
    assert not llm.has_unfinished_requests  # what was not finished is dropped
