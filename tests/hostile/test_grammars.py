"""A grammar, however hostile, is followed or refused in one line; no other process ends of it."""

from __future__ import annotations

import threading
from typing import Any

import psutil
import pytest
from support.hostile.values import refusal

from minqwen import LLM, MinqwenError, SamplingParams
from minqwen.errors import SamplingError
from minqwen.sampling.structured import SECONDS, ConstraintCompiler, StructuredOutputs

pytest.importorskip("llguidance")


def nested(levels: int, word: str = "items") -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema} if word == "items" else {"allOf": [schema]}
    return schema


def rules(count: int, name: str = "r") -> str:
    """A chain of rules, each of which leads to the next."""
    chain = [f'{name}{i}: "a" {name}{i + 1}' for i in range(count)]
    return "\n".join([f"start: {name}0", *chain, f'{name}{count}: "b"'])


PATTERNS = [{"pattern": f"^.*{i}.*$"} for i in range(500)]
BUSY = [[{"properties": {f"{i}{j}": {"type": "null"}}} for j in range(6)] for i in range(10)]
REFUSED: dict[str, tuple[str, Any]] = {
    "110 levels": ("json", nested(110)),
    "990 levels": ("json", nested(990)),
    "5,000 levels of allOf": ("json", nested(5000, "allOf")),
    "50,000 levels as text": ("json", '{"items":' * 20_000 + "{}" + "}" * 20_000),
    "500 patterns in allOf": ("json", {"type": "string", "allOf": PATTERNS}),
    "products of anyOf": ("json", {"allOf": [{"anyOf": each} for each in BUSY]}),
    "100,000 choices": ("choice", [f"choice {i}" for i in range(100_000)]),
    "a choice of a megabyte": ("choice", ["a" * 10**6]),
    "a million repetitions": ("regex", "(a{1000}){1000}"),
    "behind a harmless beginning": ("regex", "b|(a{1000}){1000}"),
    "100,000 repetitions": ("regex", "a{100000}"),
    "a literal of a megabyte": ("regex", "a" * 10**6),
    "30,000 groups": ("regex", "(" * 30_000 + "a" + ")" * 30_000),
    "half a pair": ("regex", "a\udc00"),
    "half a pair in a schema": ("json", {"const": ["\ud800"]}),
    "half a pair in a choice": ("choice", ["a", "\ud800"]),
    "an enum of two megabytes": ("json", {"enum": ["a" * 2 * 10**6]}),
    "20,000 rules": ("grammar", rules(20_000)),
    "10,000 rules": ("grammar", rules(10_000)),
    "5,000 terminals": ("grammar", rules(5_000, "R")),
    "25,000 brackets": ("grammar", "start: " + "(" * 25_000 + '"a"' + ")" * 25_000),
    "a rule that is not there": ("grammar", "start: nothing"),
    "a number": ("json", 5),
}
TAKEN: dict[str, tuple[str, Any]] = {
    "40 levels": ("json", nested(40)),
    "1,000 choices": ("choice", [f"choice {i}" for i in range(1000)]),
    "repetitions in repetitions": ("regex", "(a+)+(b|bb)*c"),
    "Unicode's letters": ("regex", r"[\p{L}\p{N}]{0,1000}"),
    "very many items": ("json", {"type": "array", "items": {}, "maxItems": 10**9}),
    "1,000 rules": ("grammar", rules(1000)),
    "a special token": ("grammar", 'start: "a" <|im_start|>'),
}


@pytest.fixture(scope="module")
def compiler(embedded_tokenizer, embedded_model) -> ConstraintCompiler:
    end = embedded_tokenizer.eos_token_id
    return ConstraintCompiler(embedded_tokenizer, embedded_model.config.vocab_size, [end])


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_grammar_is_refused_in_one_line(compiler, name):
    kind, value = REFUSED[name]
    line = refusal(lambda: compiler.check(StructuredOutputs(**{kind: value}), 0.5), SamplingError)
    assert line is not None and f"structured_outputs.{kind}" in line, line


@pytest.mark.parametrize("name", TAKEN)
def test_a_large_but_sound_grammar_is_followed(compiler, name):
    kind, value = TAKEN[name]
    constraint = compiler.constraint(StructuredOutputs(**{kind: value}))
    for _ in range(5):
        if not constraint.finished:
            constraint.accept(int(constraint.mask().nonzero()[0]))


def test_a_grammar_is_compiled_elsewhere_once(compiler, monkeypatch):
    spec = StructuredOutputs(regex="once [0-9]{3}")
    compiler.constraint(spec)
    monkeypatch.setattr(compiler.confined, "ask", None)
    compiler.constraint(StructuredOutputs(regex="once [0-9]{3}"))
    with pytest.raises(TypeError):
        compiler.constraint(StructuredOutputs(regex="once [0-9]{4}"))


def test_the_process_that_compiles_has_given_up_files_and_memory(embedded_tokenizer):
    before = {child.pid for child in psutil.Process().children()}
    compiler = ConstraintCompiler(embedded_tokenizer, 2048, [1])
    (process,) = (c for c in psutil.Process().children() if c.pid not in before)
    compiler.constraint(StructuredOutputs(regex="a"))
    assert process.rlimit(psutil.RLIMIT_NOFILE) == (0, 0)
    assert 0 < process.rlimit(psutil.RLIMIT_AS)[1] <= 1 << 30
    process.kill()
    process.wait()
    compiler.constraint(StructuredOutputs(regex="b"))  # in another one
    with pytest.raises(SamplingError, match=f"more than {SECONDS / 1000:g} s of processor time"):
        compiler.check(StructuredOutputs(regex="a{5000}b{5000}"), SECONDS / 1000)


def test_threads_may_check_grammars_while_others_are_compiled(embedded_model, embedded_tokenizer):
    llm = LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=64, num_blocks=20)
    wrong: list[object] = []

    def check(i: int) -> None:
        try:
            for j in range(5):
                grammar = StructuredOutputs(regex=f"[a-c]{{{i + 1}}}{j}")
                llm.check_grammar(SamplingParams(structured_outputs=grammar))
                bad = SamplingParams(structured_outputs=StructuredOutputs(grammar="start: x"))
                assert refusal(lambda bad=bad: llm.check_grammar(bad), MinqwenError)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=check, args=[i]) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
