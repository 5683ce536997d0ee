"""The calls that people paste from articles and from vLLM's documentation, and what comes back."""

from __future__ import annotations

import pytest
from support.checkpoints import refusal
from support.engine import PROMPTS, idle

from minqwen import LLM, SamplingParams, TextPrompt, TokensPrompt
from minqwen.engine.arguments import OF_CALLS

GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=1)
QUESTION = [{"role": "user", "content": "What is 47 + 38?"}]

# An article about the 7B: as it stands, and with the numbers that fit this model on one rank.
ARTICLE = {
    "tensor_parallel_size": 4,
    "dtype": "bfloat16",
    "gpu_memory_utilization": 0.95,
    "max_model_len": 131072,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "enable_prefix_caching": True,
    "block_size": 128,
    "max_num_seqs": 64,
    "seed": 42,
    "trust_remote_code": False,
    "enforce_eager": True,
    "quantization": None,
    "swap_space": 4,
}
HERE = {"tensor_parallel_size": 1, "max_model_len": 1024}


@pytest.fixture(scope="module")
def llm(embedded_model, embedded_tokenizer):
    return LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=128, num_blocks=64)


def test_the_call_of_an_article_runs(embedded):
    with pytest.warns(UserWarning, match=r"^trust_remote_code .* make no difference here$"):
        llm = LLM(model=str(embedded), **{**ARTICLE, **HERE})
    params = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        max_tokens=64,
        stop=["</s>"],
        include_stop_str_in_output=False,
        skip_special_tokens=True,
        spaces_between_special_tokens=True,
        detokenize=True,
    )
    outputs = llm.generate(["In the beginning", "And God said"], params)
    for output in outputs:
        prompt, generated_text = output.prompt, output.outputs[0].text
        assert prompt in ("In the beginning", "And God said") and generated_text
    assert llm.config.num_attention_heads == 32
    with LLM(str(embedded), seed=42, block_size=128, num_attention_heads=32) as other:
        again = other.generate([output.prompt for output in outputs], params)
    assert [output.outputs for output in again] == [output.outputs for output in outputs]


def test_as_it_stands_each_of_its_numbers_is_refused_with_what_to_do(embedded):
    remedies = {
        "max_model_len": "lower it",
        "tensor_parallel_size": "torchrun --nproc-per-node 4",
    }
    options = dict(ARTICLE)
    for name, remedy in remedies.items():
        refusal(lambda options=dict(options): LLM(embedded, **options), name, remedy)
        options[name] = HERE[name]


def test_the_call_of_qwens_documentation_runs(embedded):
    llm = LLM(model=str(embedded))
    tokenizer = llm.get_tokenizer()
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    params = SamplingParams(temperature=0.7, top_p=0.8, repetition_penalty=1.05, max_tokens=32)
    outputs = llm.generate([text], params)
    assert outputs[0].prompt == text and outputs[0].outputs[0].text
    (chat,) = llm.chat(messages, sampling_params=params, add_generation_prompt=True)
    assert chat.prompt == text and chat.prompt_token_ids == outputs[0].prompt_token_ids


def test_a_prompt_may_be_a_dict(llm, embedded_tokenizer):
    text = PROMPTS[0]
    ids = embedded_tokenizer.encode(text)
    want = llm.generate(text, GREEDY, use_tqdm=False)[0]
    forms = {
        text: [{"prompt": text}, TextPrompt(prompt=text), {"prompt": text, "cache_salt": None}],
        None: [{"prompt_token_ids": ids}, TokensPrompt(prompt_token_ids=tuple(ids)), ids],
        "shown": [{"prompt_token_ids": ids, "prompt": "shown", "multi_modal_data": None}],
    }
    for shown, prompts in forms.items():
        for prompt in prompts:
            for given in (prompt, [prompt]):
                (output,) = llm.generate(given, GREEDY, use_tqdm=False)
                assert (output.prompt, output.prompt_token_ids) == (shown, ids)
                assert output.outputs == want.outputs
    mixed = llm.generate([{"prompt": text}, text, ids], GREEDY, use_tqdm=False)
    assert [output.outputs[0].text for output in mixed] == [want.outputs[0].text] * 3
    assert "".join(llm.stream({"prompt": text}, GREEDY)) == want.outputs[0].text
    assert llm.score({"prompt": text}) == llm.score(text)


def test_the_salt_of_a_prompt_is_its_own(llm):
    text = "And the LORD spake unto Moses, saying, Speak unto the children of Israel. " * 2

    def cached(**salt):
        (output,) = llm.generate({"prompt": text, **salt}, GREEDY, use_tqdm=False)
        return output.num_cached_tokens

    assert cached(cache_salt="a") == 0 and cached(cache_salt="a") > 0
    assert cached(cache_salt="b") == 0 and cached() == 0
    refusal(lambda: llm.generate({"prompt": text, "cache_salt": 5}), "cache_salt")


@pytest.mark.parametrize(
    "prompt, words",
    [
        ({"prompt": "x", "multi_modal_data": {"image": 1}}, "prompts are text or token ids"),
        ({"prompt_embeds": [[0.5]]}, "prompts are text or token ids"),
        ({"encoder_prompt": "x", "decoder_prompt": "y"}, "has no encoder"),
        ({"promt": "x"}, "did you mean 'prompt'?"),
        ({"prompt_ids": [1]}, "did you mean 'prompt_token_ids'?"),
        ({"cache_salt": "a"}, 'without "prompt" and "prompt_token_ids"'),
    ],
)
def test_a_dict_that_is_no_prompt_says_what_it_lacks(llm, prompt, words):
    refusal(lambda: llm.generate([prompt]), "the prompt", words)
    assert idle(llm)


def test_what_comes_back_has_vllms_fields(llm):
    (output,) = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    completion, metrics = output.outputs[0], output.metrics
    assert output.prompt.startswith("<|im_start|>") and output.finished and output.request_id
    assert completion.finished() and completion.index == 0
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    entries = [entry[i] for entry, i in zip(completion.logprobs, completion.token_ids)]
    assert completion.cumulative_logprob == sum(entry.logprob for entry in entries)
    assert [entry.rank for entry in entries] == [1] * 8
    assert "".join(entry.decoded_token for entry in entries) == completion.text
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time
    assert metrics.last_token_time == metrics.finished_time
    assert metrics.first_token_latency == metrics.first_token_time - metrics.arrival_time
    (again,) = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    assert 0 < again.num_cached_tokens < len(again.prompt_token_ids)


def test_keywords_of_vllm_that_change_nothing_are_taken(llm):
    want = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs
    for name, only in OF_CALLS.items():
        for value in only.values:
            (output,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False, **{name: value})
            assert output.outputs == want
            assert llm.chat(QUESTION, GREEDY, use_tqdm=False, **{name: value})


@pytest.mark.parametrize("name", OF_CALLS)
def test_one_that_would_change_the_result_is_refused(llm, name):
    for call in (llm.generate, llm.add_request, llm.chat):
        given = QUESTION if call == llm.chat else PROMPTS[0]
        refusal(lambda call=call, given=given: call(given, **{name: 3}), name, "expected")
    assert idle(llm)


def test_an_unknown_keyword_is_refused_with_the_nearest(llm):
    for call in (llm.generate, llm.add_request, llm.stream_deltas):
        with pytest.raises(Exception, match="no keyword 'cache_slat'.*did you mean 'cache_salt'"):
            list(call("x", cache_slat="a"))
        with pytest.raises(Exception, match=r"give SamplingParams\(max_tokens=...\)"):
            list(call("x", max_tokens=4))
    refusal(lambda: llm.generate(prompt_token_ids=[[1, 2]]), "generate([[1, 2], [3]])")
    refusal(llm.generate, "the prompt")
    assert idle(llm)
