"""vLLM's fields of SamplingParams: special tokens in the text, no text, guided decoding by name."""

from __future__ import annotations

import warnings

import pytest
from support.engine import GREEDY

import minqwen
from minqwen import LLM, SamplingParams, StructuredOutputs
from minqwen.errors import SamplingError
from minqwen.sampling import params as params_module
from minqwen.sampling import structured as structured_module

QUESTION = [{"role": "user", "content": "What is 47 + 38?"}]


@pytest.fixture(scope="module")
def llm(embedded_model, embedded_tokenizer):
    return LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=128, num_blocks=40)


def answer(llm, **fields):
    params = SamplingParams(**{"temperature": 0, "max_tokens": 30, **fields})
    return llm.chat(QUESTION, params, use_tqdm=False)[0].outputs[0]


def test_what_an_article_writes_gives_what_it_gives_without_the_defaults(llm):
    usual = answer(llm)
    written_out = answer(
        llm,
        stop=["</s>"],
        include_stop_str_in_output=False,
        skip_special_tokens=True,
        spaces_between_special_tokens=True,
        detokenize=True,
        guided_decoding=None,
    )
    assert written_out == usual and usual.text == "7+8=15, 4+3+1=8: 85"


def test_special_tokens_can_be_shown(llm, embedded_tokenizer):
    on = {"ignore_eos": True}
    hidden, shown = answer(llm, **on), answer(llm, skip_special_tokens=False, **on)
    assert shown.token_ids == hidden.token_ids and "<|im_end|>" not in hidden.text
    assert shown.text == embedded_tokenizer.decode(shown.token_ids)
    assert shown.text.startswith("7+8=15, 4+3+1=8: 85<|im_end|>")
    pieces = llm.stream(
        embedded_tokenizer.encode_chat(QUESTION),
        SamplingParams(max_tokens=30, skip_special_tokens=False, **GREEDY),
    )
    assert "".join(pieces) == shown.text


def test_the_token_that_ends_the_text_is_never_shown(llm):
    found = answer(llm, skip_special_tokens=False)
    assert found.text == "7+8=15, 4+3+1=8: 85" and found.finish_reason == "stop"


@pytest.mark.parametrize("include", [True, False])
def test_a_shown_special_token_stops_the_text(llm, include):
    fields = {"stop": "<|im_end|>", "include_stop_str_in_output": include, "ignore_eos": True}
    found = answer(llm, skip_special_tokens=False, **fields)
    assert found == answer(llm, **fields)
    assert (found.text.endswith("<|im_end|>"), found.stop_reason) == (include, "<|im_end|>")


def test_without_detokenize_there_are_ids_only(llm):
    with_text, without = answer(llm), answer(llm, detokenize=False)
    assert without.token_ids == with_text.token_ids and without.text == ""
    assert without.finish_reason == "stop"


@pytest.mark.parametrize(
    "fields", [{"stop": "x"}, {"structured_outputs": StructuredOutputs(regex="a")}], ids=repr
)
def test_what_needs_the_text_cannot_be_without_it(fields):
    with pytest.raises(SamplingError, match=f"{[*fields][0]} needs the text: leave detokenize"):
        SamplingParams(detokenize=False, **fields)


def test_spaces_between_special_tokens_make_no_difference(llm):
    with pytest.warns(UserWarning, match="^spaces_between_special_tokens makes no difference here"):
        SamplingParams(spaces_between_special_tokens=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert answer(llm, spaces_between_special_tokens=False) == answer(llm)


def test_of_several_ranks_one_warns(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SamplingParams(spaces_between_special_tokens=False)


def test_guided_decoding_is_structured_outputs_under_its_older_name(llm):
    spec = minqwen.GuidedDecodingParams(choice=["85", "86"])
    assert minqwen.StructuredOutputsParams is minqwen.GuidedDecodingParams is StructuredOutputs
    params = SamplingParams(guided_decoding=spec)
    assert params == SamplingParams(structured_outputs=spec)
    assert answer(llm, guided_decoding=spec) == answer(llm, structured_outputs=spec)
    with pytest.raises(SamplingError, match="older name of structured_outputs"):
        SamplingParams(guided_decoding=spec, structured_outputs=spec)


@pytest.mark.parametrize("name, hint", params_module.OF_OTHERS.items())
def test_a_field_of_another_engine_says_what_to_do(name, hint):
    with pytest.raises(SamplingError) as error:
        SamplingParams(**{name: None})
    assert str(error.value) == f"SamplingParams has no field {name!r}: {hint}"


@pytest.mark.parametrize(
    "name, hint", [*structured_module.OF_OTHERS.items(), ("jsonn", "did you mean 'json'?")]
)
def test_so_does_a_field_of_a_grammar(name, hint):
    with pytest.raises(SamplingError) as error:
        StructuredOutputs(**{name: None})
    line = str(error.value)
    assert line.startswith(f"StructuredOutputs has no field {name!r}") and line.endswith(hint)
