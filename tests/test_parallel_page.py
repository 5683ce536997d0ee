"""The transcripts of docs/parallel.md say what the code says today."""

from __future__ import annotations

import re

import pytest
from support.heads_on_ranks import CASES, PAGE, SVG, held, picture, renewed
from support.paths import EMBEDDED, ROOT

from minqwen import LLM, MinqwenError, SamplingParams
from minqwen.parallel import Mesh


def blocks_of(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


BLOCKS = blocks_of("docs/parallel.md")
REFUSAL, EIGHT_RANKS, REPLICAS, DIGESTS, MANY, _, TWO_NODES = (
    text for language, text in BLOCKS if not language
)


def test_replicas_print_the_texts_of_one_process():
    (command,) = (text for _, text in BLOCKS if text.startswith("printf"))
    prompts = re.findall(r'"([^"]+)"| (Jesus)', command.splitlines()[0])
    llm = LLM(EMBEDDED, arithmetic="exact")
    params = SamplingParams.from_defaults(llm.defaults, temperature=0, max_tokens=8)
    outputs = llm.generate([a or b for a, b in prompts], params, use_tqdm=False)
    lines = [f"{i}|{o.prompt}|{o.outputs[0].text}" for i, o in enumerate(outputs)]
    assert REPLICAS.splitlines() == lines and len(lines) == 5


def test_eight_ranks_and_two_nodes_print_the_text_of_the_readme():
    text = next(text for language, text in blocks_of("README.md") if not language).splitlines()[0]
    assert EIGHT_RANKS.splitlines()[0] == TWO_NODES.splitlines()[0] == text


def test_eight_ranks_without_more_heads_are_refused_in_these_words():
    mesh = Mesh()
    mesh.size = 8
    with pytest.raises(MinqwenError) as refused:
        LLM(EMBEDDED, mesh=mesh)
    assert str(refused.value) in REFUSAL


def test_one_process_and_replicas_have_one_digest():
    one, several = DIGESTS.splitlines()
    assert one == several
    *_, first, second = MANY.splitlines()
    assert first == second


def test_the_picture_and_the_tables_are_those_of_the_plan():
    """If the plan has changed: PYTHONPATH=tests python -m support.heads_on_ranks"""
    page = PAGE.read_text()
    assert SVG.name in page and SVG.read_text() == picture()
    assert page == renewed(page)


@pytest.mark.parametrize("heads, ranks", CASES)
def test_every_head_is_held_once_and_every_kv_head_by_those_who_read_it(heads, ranks):
    slots = [slot for it in held(heads, ranks) for slot in it.slots]
    assert slots == [*range(heads)]
    for it in held(heads, ranks):
        assert {slot // (heads // 4) for slot in it.slots} == {*it.kv_heads}
