"""tools/generate.py as a user runs it: on one process, under torchrun, and with mistakes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from support.forked import forked_torchrun
from support.naive import greedy
from support.paths import EMBEDDED, ROOT
from support.tool import run_tool, run_tool_here

from minqwen import LLM, Checkpoint, SamplingParams
from minqwen.lab.tasks import heldout_questions

PROMPTS = ["In the beginning", "And it came to pass"]
TWO_PROMPTS = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
FLAGS = ["--dtype", "float32", "--temperature", "0", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def one_process() -> list[dict]:
    result = run_tool("generate.py", *TWO_PROMPTS, "--json", "--logprobs", 2, *FLAGS)
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def test_text_comes_on_stdout(one_process):
    result = run_tool("generate.py", "In the beginning", *FLAGS)
    assert result.code == 0 and result.out == one_process[0]["text"] + "\n"
    assert "tokens/s" in result.err


def test_json_has_everything_and_the_naive_loops_tokens(
    one_process, embedded_model, embedded_tokenizer
):
    for prompt, out in zip(PROMPTS, one_process, strict=True):
        ids = embedded_tokenizer.encode(prompt)
        want = greedy(embedded_model, ids, 12)
        assert out["prompt"] == prompt and out["prompt_token_ids"] == ids
        assert out["token_ids"] == want[: len(out["token_ids"])]
        assert out["finish_reason"] in ("length", "stop")
        assert out["text"] == embedded_tokenizer.decode(out["token_ids"], skip_special_tokens=True)
        assert [entries[0]["id"] for entries in out["logprobs"]] == out["token_ids"]
        assert out["time_to_first_token_s"] > 0


def test_four_ranks_say_the_same_and_rank_0_speaks(one_process):
    result = forked_torchrun(4, ROOT / "tools" / "generate.py", [*TWO_PROMPTS, "--json", *FLAGS])
    assert result.returncode == 0, result.stderr
    outputs = [json.loads(line) for line in result.stdout.splitlines()]
    assert [o["token_ids"] for o in outputs] == [o["token_ids"] for o in one_process]


def test_prompts_from_standard_input_and_from_a_file(one_process, tmp_path):
    piped = run_tool("generate.py", "-", "--no-stream", *FLAGS, stdin="In the beginning")
    assert piped.out == one_process[0]["text"] + "\n" and "tokens/s" in piped.err
    file = tmp_path / "prompts.jsonl"
    file.write_text('"In the beginning"\n{"prompt": "And it came to pass"}\n')
    both = run_tool_here("generate.py", "--prompt-file", file, *FLAGS)
    assert both.out == "".join(o["text"] + "\n" for o in one_process)


def test_echo_shows_the_prompts_before_their_texts(one_process):
    both = run_tool_here("generate.py", *TWO_PROMPTS, "--echo", *FLAGS)
    assert both.out == "".join(o["prompt"] + o["text"] + "\n" for o in one_process)
    one = run_tool_here("generate.py", PROMPTS[0], "--echo", *FLAGS)
    assert one.out == one_process[0]["prompt"] + one_process[0]["text"] + "\n"


@pytest.mark.parametrize("limit, new", [("max_new_tokens", 5), ("max_length", 1)])
def test_generation_config_may_say_how_many_tokens(tmp_path, limit, new):
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED, model)
    (model / "generation_config.json").write_text(json.dumps({limit: 5}))
    done = run_tool_here("generate.py", PROMPTS[0], "--model", model, "--json", "--ignore-eos")
    assert len(json.loads(done.out)["token_ids"]) == new  # 4 of the prompt and 1 are 5


# ---- mistakes -----------------------------------------------------------------------------------


class WeightIsReadError(Exception):
    pass


@pytest.fixture
def unreadable_weights(monkeypatch):
    """Whoever reads a weight gets a WeightIsReadError."""

    def read(*args, **options):
        raise WeightIsReadError

    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.setattr(Checkpoint, "check_finite", read)


def test_control_a_weight_that_is_read_is_seen(unreadable_weights):
    with pytest.raises(WeightIsReadError):
        run_tool_here("generate.py", "x")


@pytest.mark.parametrize(
    "args, says",
    [
        (["x", "--model", "/nowhere"], "/nowhere"),
        (["x", "--temprature", "0"], "did you mean '--temperature'"),
        (["x", "--temperature", "-1"], "temperature"),
        (["x", "--temperature", "warm"], "--temperature"),
        (["x", "--top-p", "2"], "top_p"),
        (["x", "--top-k", "-2"], "top_k"),
        (["x", "--min-p", "1.5"], "min_p"),
        (["x", "--repetition-penalty", "0"], "repetition_penalty"),
        (["x", "--max-tokens", "0"], "max_tokens"),
        (["x", "--logprobs", "-2"], "logprobs"),
        (["x", "--stop", ""], "stop"),
        (["x", "--seed", "-1"], "seed"),
        (["x", "--max-model-len", "99999999"], "max_model_len"),
        (["x", "--max-model-len", "1"], "max_model_len"),
        (["x", "--block-size", "0"], "block_size"),
        (["x", "--block-size", "257"], "block_size"),
        (["x", "--arithmetic", "exakt"], "--arithmetic"),
        (["x", "--arithmetic", "exact", "--dtype", "float64"], "float64"),
        (["x", "--device", "gpu"], "--device"),
        (["x", "--dtype", "int3"], "--dtype"),
        (["x", "--offload", "cloud"], "--offload"),
        (["--prompt-file", "/nowhere.txt"], "/nowhere.txt"),
        (["x", "--system", "Be brief."], "expected --chat"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line_and_exit_2_before_a_weight_is_read(unreadable_weights, args, says):
    result = run_tool_here("generate.py", *args)
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert says in result.err


@pytest.mark.parametrize(
    "text, line, says",
    [
        ('"x"\n{"prompt": 5}\n', 2, "expected a string"),
        ('\n\n"x\n', 3, "not valid JSON"),
        ("5\n", 1, "expected a string"),
    ],
)
def test_a_line_of_a_prompt_file_that_is_no_prompt(tmp_path, unreadable_weights, text, line, says):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    result = run_tool_here("generate.py", "--prompt-file", file)
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1
    assert f"{file} line {line}: " in result.err and says in result.err


@pytest.mark.parametrize("args", [["--prompt", ""], [""], ["x", "--prompt", ""]], ids=str)
def test_an_empty_prompt_is_refused_before_a_weight_is_read(unreadable_weights, args):
    result = run_tool_here("generate.py", *args)
    assert result.code == 2 and result.out == ""
    assert result.err == "error: a prompt is empty: expected some text\n"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_only_a_line_feed_ends_a_line_of_a_prompt_file(tmp_path, newline):
    prompts = ["In\u2028the", "begin\u2029ning", "of\u0085it"]
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps(prompt, ensure_ascii=False) + newline for prompt in prompts]
    file.write_bytes("".join(lines).encode("utf-8-sig"))
    result = run_tool_here("generate.py", "--prompt-file", file, "--json", "--max-tokens", "1")
    assert [json.loads(line)["prompt"] for line in result.out.split("\n")[:-1]] == prompts
    text = tmp_path / "prompts.txt"
    text.write_bytes(newline.join(prompts).encode("utf-8-sig"))
    result = run_tool_here("generate.py", "--prompt-file", text, "--json", "--max-tokens", "1")
    assert [json.loads(line)["prompt"] for line in result.out.split("\n")[:-1]] == prompts


# ---- skill --------------------------------------------------------------------------------------


def test_chat_answers_held_out_sums(embedded_tokenizer):
    """The embedded model's skill that can be checked: at least 95 % of sums it was never shown."""
    llm = LLM(EMBEDDED, dtype="float32", max_model_len=128, max_num_seqs=64)
    questions = heldout_questions()[::4]
    conversations = [[{"role": "user", "content": question.prompt}] for question in questions]
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=48), use_tqdm=False)
    right = sum(
        o.outputs[0].text.split()[-1:] == q.answer.split()[-1:] for q, o in zip(questions, outputs)
    )
    assert right >= 0.95 * len(questions), f"{right} of {len(questions)}"
    assert len(questions) > 180 and all(o.outputs[0].finish_reason == "stop" for o in outputs)


def test_what_fails_for_one_prompt_leaves_the_others_texts(monkeypatch, one_process):
    iterate = LLM.iterate

    def one_fails(llm, *args, **options):
        first, second = iterate(llm, *args, **options)
        return iter([first, dataclasses.replace(second, error="no such luck")])

    monkeypatch.setattr(LLM, "iterate", one_fails)
    done = run_tool_here("generate.py", *TWO_PROMPTS, "--json", *FLAGS)
    first, second = map(json.loads, done.out.splitlines())
    assert first["text"] == one_process[0]["text"] and first["error"] is None
    assert second["error"] == "no such luck"
    assert done.code == 2 and "request 1: no such luck" in done.err


ARTICLE = ["--temperature", "0.7", "--top-p", "0.9", "--max-tokens", "12", "--stop", "</s>"]
ARTICLE += ["--gpu-memory-utilization", "0.95", "--max-num-seqs", "64", "--seed", "1"]
ARTICLE += ["--block-size", "128", "--max-model-len", "1024", "--enable-prefix-caching"]


def test_the_flags_of_an_article_are_taken_and_what_makes_no_difference_is_told():
    plain = run_tool_here("generate.py", "In the beginning", *ARTICLE)
    idle = ["--trust-remote-code", "--enforce-eager", "--swap-space", "4"]
    with pytest.warns(UserWarning, match="^trust_remote_code .* make no difference here$"):
        result = run_tool_here("generate.py", "In the beginning", *ARTICLE, *idle)
    assert result.code == plain.code == 0 and result.out == plain.out != ""


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gpu-memory-utilization", "2"], "gpu_memory_utilization is 2"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--max-num-batched-tokens", "8"], "max_num_seqs is 64 and max_num_batched_tokens 8"),
    ],
)
def test_a_wrong_number_of_the_engine_is_one_line(flags, words):
    result = run_tool_here("generate.py", "x", *flags)
    assert result.code == 2 and result.err.startswith(f"error: {words}"), result.err
    assert result.err.count("\n") == 1
