"""lm-evaluation-harness: our engine, a server of it and the harness's own model agree."""

from __future__ import annotations

import importlib
import json

import pytest
from support.checkpoints import refusal
from support.paths import ROOT
from support.ranks import on_ranks
from support.serving import served

from minqwen import LLM, SamplingParams
from minqwen.lab.together import end, follow

for needed in ("lm_eval", "accelerate", "tenacity"):
    pytest.importorskip(needed, reason='needs pip install "minqwen[eval]" accelerate tenacity')
evaluated = importlib.import_module("support.evaluated")
EngineLM = importlib.import_module("minqwen.lab.evaluate").EngineLM
harness = importlib.import_module("minqwen.lab.harness")


@pytest.fixture(scope="module")
def ours(embedded):
    return EngineLM(evaluated.engine(embedded))


@pytest.fixture(scope="module")
def theirs(embedded):
    return evaluated.hugging_face(embedded)


def near(total: float):
    """1e-5; of a sum above 84, float32's own precision."""
    return pytest.approx(total, abs=1e-5, rel=2**-23)


def assert_agree(found, expected):
    """Both are what `evaluated.answers` returns."""
    for (score, greedy), (wanted, greedily) in zip(found[0], expected[0], strict=True):
        assert score == near(wanted) and greedy == greedily
    for total, wanted in zip(found[1], expected[1], strict=True):
        assert total == near(wanted)
    assert found[2] == expected[2]


def test_scores_and_texts_are_those_of_hugging_face(ours, theirs):
    """Contexts of none to more tokens than there is room for, and texts of any language."""
    assert_agree(evaluated.answers(ours), evaluated.answers(theirs))


def test_whether_a_continuation_is_greedy_is_too(ours, theirs):
    pairs = []
    for context in ("And God said", "The LORD", evaluated.LONG[:90]):
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        text = ours.llm.generate([context], params, use_tqdm=False)[0].outputs[0].text
        pairs += [(context, text), (context, text + " x"), (context, " x" + text)]
    asked = evaluated.instances("loglikelihood", pairs)
    found = [greedy for _, greedy in ours.loglikelihood(asked, disable_tqdm=True)]
    assert found == [greedy for _, greedy in theirs.loglikelihood(asked, disable_tqdm=True)]
    assert found[0] and not found[1] and not found[2]


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer_backend": "huggingface"},
        {"tokenizer_backend": "remote", "batch_size": 4, "num_concurrent": 3},
        {"tokenizer_backend": "huggingface", "tokenized_requests": False},
    ],
)
def test_a_server_gives_the_same(embedded, ours, options, monkeypatch):
    """Over HTTP a text of n tokens is n tokens of context: the last one is not only looked up.

    Prompts of texts that are written are cut alike.
    """
    if options["tokenizer_backend"] == "huggingface":
        options = {**options, "tokenizer": str(embedded)}
    if options.get("tokenized_requests") is False:  # the client cuts neither texts nor characters
        monkeypatch.setattr(evaluated, "GENERATIONS", evaluated.GENERATIONS[:4])
        monkeypatch.setattr(evaluated, "TEXTS", evaluated.TEXTS[:4])
    shorter = EngineLM(ours.llm, evaluated.CONTEXT - 1)
    with served(evaluated.engine(embedded)) as running:
        found = evaluated.answers(evaluated.over_http(running, **options))
    assert_agree(found, (*evaluated.answers(shorter)[:2], evaluated.answers(ours)[2]))


def test_two_ranks_give_the_same(embedded, ours):
    """Rank 0 knows the questions, and the other one computes what it is asked."""

    def evaluate(mesh):
        llm = evaluated.engine(embedded, mesh=mesh)
        if mesh.rank:
            return follow(llm)
        found = evaluated.answers(EngineLM(llm))
        end(llm)
        return found

    assert_agree(on_ranks(2, evaluate)[0], evaluated.answers(ours))


def test_tasks_have_the_same_results(ours, theirs, monkeypatch):
    """Choices, texts and perplexity, as chats, with examples that do not fit the context."""
    monkeypatch.chdir(ROOT)  # the tasks name their data from there
    options = {"num_fewshot": 1, "apply_chat_template": True, "bootstrap_iters": 0}
    tasks = harness.Tasks(["sums", "verses", "texts"], "docs/tasks")
    found = harness.evaluate(ours, tasks, **options)
    wanted = harness.evaluate(theirs, tasks, **options)
    for name, samples in wanted["samples"].items():
        for mine, other in zip(found["samples"][name], samples, strict=True):
            assert mine["arguments"] == other["arguments"]
            for one, two in zip(mine["resps"], other["resps"], strict=True):
                assert agreed(one[0], two[0]), (name, mine["arguments"])
    assert found["config"]["model"] == "minqwen embedded"
    line = harness.as_table(found).splitlines()[2]
    assert line.split("|")[1].strip() == "sums"
    assert "samples" not in json.loads(harness.as_json(found))


def agreed(one, two) -> bool:
    """Whether two answers are the same text, or the same score."""
    if isinstance(two, tuple):
        return one[1] == two[1] and one[0] == near(two[0])
    return one == (two if isinstance(two, str) else near(two))


def test_a_chat_over_http_is_the_chat_of_the_harness(embedded, ours, monkeypatch):
    monkeypatch.chdir(ROOT)
    tasks = harness.Tasks(["sums"], "docs/tasks")
    options = {"apply_chat_template": True, "bootstrap_iters": 0}
    roomy = EngineLM(evaluated.engine(embedded, max_model_len=128))
    expected = harness.evaluate(roomy, tasks, **options)["samples"]["sums"]
    with served(roomy.llm) as running:
        client = evaluated.over_http_chat(running)
        found = harness.evaluate(client, tasks, **options)["samples"]["sums"]
    assert [one["resps"] for one in found] == [one["resps"] for one in expected]


def test_what_cannot_be_evaluated_is_refused(ours):
    def score(*pair):
        return ours.loglikelihood(evaluated.instances("loglikelihood", [pair]), disable_tqdm=True)

    refusal(lambda: score("a", evaluated.LONG), "continuation", str(evaluated.CONTEXT))
    refusal(lambda: score("a", ""), "continuation has 0 tokens")
    for options, *words in (
        ({"max_gen_toks": evaluated.CONTEXT}, "max_gen_toks", "context"),
        ({"num_beams": 2, "max_gen_toks": 4}, "num_beams", "beam"),
        ({"temperature": -1.0, "do_sample": True, "max_gen_toks": 4}, "temperature"),
    ):
        asked = evaluated.instances("generate_until", [("a", options)])
        refusal(lambda a=asked: ours.generate_until(a, disable_tqdm=True), *words)
    refusal(lambda: EngineLM(ours.llm, evaluated.CONTEXT + 1), "max_length")
    refusal(lambda: ours.chat_template("other"), "other")
    assert not ours.llm.has_unfinished_requests


def test_sampling_takes_the_seed_of_the_engine(embedded):
    asked = evaluated.instances(
        "generate_until", [("And God said", {"temperature": 1.0, "max_gen_toks": 12})] * 2
    )
    first, again, other = (
        EngineLM(evaluated.engine(embedded, seed=seed)).generate_until(asked, disable_tqdm=True)
        for seed in (1, 1, 2)
    )
    assert first == again != other and first[0] != first[1]


def test_an_engine_without_a_tokenizer_is_refused(embedded_model):
    refusal(lambda: EngineLM(LLM(embedded_model)), "tokenizer")
