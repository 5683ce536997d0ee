"""Stop strings that name special tokens, in the engine: the text has none, but they stop it."""

import pytest
from support.engine import GREEDY

from minqwen import LLM, SamplingParams
from minqwen.errors import SamplingError

ANSWER = "7+8=15, 4+3+1=8: 85"


@pytest.fixture(scope="module")
def llm(embedded_model, embedded_tokenizer):
    return LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=128, num_blocks=40)


@pytest.fixture(scope="module")
def question(embedded_tokenizer):
    return embedded_tokenizer.encode_chat([{"role": "user", "content": "What is 47 + 38?"}])


def complete(llm, prompt, **fields):
    params = SamplingParams(max_tokens=30, **GREEDY, **fields)
    return llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]


def test_a_special_token_stops_the_text_that_would_go_on_without_it(llm, question):
    assert complete(llm, question).text != ANSWER  # the end token is ignored: it goes on
    found = complete(llm, question, stop=["<|im_end|>"])
    assert (found.text, len(found.token_ids)) == (ANSWER, 20)
    assert (found.finish_reason, found.stop_reason) == ("stop", "<|im_end|>")


@pytest.mark.parametrize("stop, text", [("85<|im_end|>", ANSWER[:-2]), ("85", ANSWER[:-2])])
def test_a_stop_string_of_text_and_special_token(llm, question, stop, text):
    assert complete(llm, question, stop=stop).text == text
    included = complete(llm, question, stop=stop, include_stop_str_in_output=True)
    assert included.text == text + stop


def test_a_stream_shows_the_same(llm, question):
    for stop, text in (("<|im_end|>", ANSWER), ("85<|im_end|><|im_end|>", ANSWER[:-2])):
        params = SamplingParams(max_tokens=30, stop=stop, **GREEDY)
        pieces = list(llm.stream(question, params))
        assert "".join(pieces) == text and len(pieces) > 4


def test_a_stop_string_without_a_tokenizer_is_refused_in_one_line(embedded_model, question):
    llm = LLM(embedded_model, max_model_len=64, num_blocks=10)
    for call in (llm.generate, llm.add_request):
        with pytest.raises(SamplingError, match="^stop needs a tokenizer: this LLM was made with"):
            call(question, SamplingParams(stop="x"))
    assert not llm.has_unfinished_requests
