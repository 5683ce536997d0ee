"""/v1/completions, asked by OpenAI's own client: the answers are the engine's."""

from __future__ import annotations

import pytest
from support.engine import PROMPTS
from support.serving import FINGERPRINT, NAME

from minqwen import SamplingParams


def generated(oracle, prompts, **params):
    return oracle.generate(prompts, SamplingParams(**params), use_tqdm=False)


def test_a_completion_is_what_the_engine_generates(client, oracle):
    found = client.completions.create(model=NAME, prompt=PROMPTS[0], max_tokens=6, temperature=0)
    (expected,) = generated(oracle, PROMPTS[0], max_tokens=6, temperature=0)
    choice = found.choices[0]
    assert (choice.text, choice.finish_reason) == (expected.outputs[0].text, "length")
    assert found.model == NAME and found.system_fingerprint == FINGERPRINT
    assert found.object == "text_completion" and found.id.startswith("cmpl-")
    prompt = len(expected.prompt_token_ids)
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        *(prompt, 6),
        prompt + 6,
    )


def test_every_form_of_a_prompt(client, oracle, embedded_tokenizer):
    ids = [embedded_tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = [o.outputs[0].text for o in generated(oracle, ids, max_tokens=3, temperature=0)]
    for prompt, count in ((PROMPTS[0], 1), (ids[0], 1), (PROMPTS, 3), (ids, 3)):
        found = client.completions.create(model=NAME, prompt=prompt, max_tokens=3, temperature=0)
        assert [choice.text for choice in found.choices] == expected[:count]
        assert [choice.index for choice in found.choices] == list(range(count))


def test_samples_of_several_prompts_are_numbered_through(client, oracle):
    asked = {"n": 2, "max_tokens": 4, "temperature": 0.9, "seed": 5}
    found = client.completions.create(model=NAME, prompt=PROMPTS[:2], **asked)
    expected = generated(oracle, PROMPTS[:2], **asked)
    texts = [one.text for output in expected for one in output.outputs]
    assert [choice.text for choice in found.choices] == texts and len(set(texts)) > 1
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage.completion_tokens == sum(
        len(one.token_ids) for output in expected for one in output.outputs
    )


def test_without_max_tokens_there_are_sixteen_as_in_openai(client):
    found = client.completions.create(
        model=NAME, prompt="And", temperature=0, extra_body={"ignore_eos": True}
    )
    assert found.usage.completion_tokens == 16


@pytest.mark.parametrize("stop", [None, " the"])
def test_the_pieces_of_a_stream_join_to_the_completion(client, stop):
    asked = {"model": NAME, "prompt": PROMPTS[:2], "max_tokens": 12, "n": 2, "seed": 1}
    asked |= {"stop": stop, "logprobs": 1, "temperature": 1.0}
    whole = client.completions.create(**asked)
    texts, logprobs, reasons = [""] * 4, [[] for _ in range(4)], [None] * 4
    offsets = [[] for _ in range(4)]
    usage = None
    for chunk in client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        assert usage is None, "the usage comes last"
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.logprobs is not None:
                logprobs[choice.index] += choice.logprobs.token_logprobs
                offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert logprobs == [choice.logprobs.token_logprobs for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_stream_has_usage_only_if_it_is_wanted(client):
    asked = {"model": NAME, "prompt": "And", "max_tokens": 2, "stream": True}
    assert all(chunk.usage is None for chunk in client.completions.create(**asked))
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.completions.create(**asked, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 2 and not chunks[-1].choices


# ---- logprobs -----------------------------------------------------------------------------------


def test_logprobs_are_the_models(client, oracle, embedded_tokenizer):
    found = client.completions.create(
        model=NAME, prompt=PROMPTS[0], max_tokens=5, temperature=0, logprobs=3
    )
    (expected,) = generated(oracle, PROMPTS[0], max_tokens=5, temperature=0, logprobs=3)
    one, got = expected.outputs[0], found.choices[0].logprobs
    assert got.token_logprobs == [e[i].logprob for i, e in zip(one.token_ids, one.logprobs)]
    assert got.tokens == [embedded_tokenizer.decode([i]) for i in one.token_ids]
    tops = [{e.decoded_token: e.logprob for e in entry.values()} for entry in one.logprobs]
    assert got.top_logprobs == tops
    assert got.text_offset == [len("".join(got.tokens[:i])) for i in range(5)]


def test_echo_scores_the_prompt_as_an_evaluation_harness_reads_it(client, oracle):
    """max_tokens 0 and 1, a logprob for each token of the prompt but the first."""
    scores = oracle.score(PROMPTS[1], use_tqdm=False)[0]
    for max_tokens in (0, 1):
        found = client.completions.create(
            model=NAME, prompt=PROMPTS[1], max_tokens=max_tokens, echo=True, logprobs=1
        )
        got = found.choices[0].logprobs
        assert got.token_logprobs[0] is None and got.top_logprobs[0] is None
        assert got.token_logprobs[1 : len(scores) + 1] == scores
        assert len(got.tokens) == len(scores) + 1 + max_tokens
        assert found.choices[0].text.startswith(PROMPTS[1])
        assert found.usage.completion_tokens == max_tokens
        for value, top in zip(got.token_logprobs[1:], got.top_logprobs[1:]):
            assert value in top.values() and len(top) <= 2 and value <= max(top.values())
    assert found.choices[0].text.startswith("".join(got.tokens[:-1]))


def test_a_stream_echoes_the_prompt_first(client):
    asked = {"model": NAME, "prompt": PROMPTS[0], "echo": True, "logprobs": 0, "max_tokens": 3}
    whole = client.completions.create(**asked, temperature=0)
    chunks = list(client.completions.create(**asked, temperature=0, stream=True))
    assert chunks[0].choices[0].text == PROMPTS[0]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    joined = [p for chunk in chunks for p in chunk.choices[0].logprobs.token_logprobs]
    assert joined == whole.choices[0].logprobs.token_logprobs


def test_vllms_fields_about_the_prompt(client, oracle, embedded_tokenizer):
    body = {"prompt_logprobs": 2, "return_token_ids": True}
    (expected,) = generated(oracle, PROMPTS[0], max_tokens=2, temperature=0, prompt_logprobs=2)
    asked = {"model": NAME, "prompt": PROMPTS[0], "max_tokens": 2, "temperature": 0}
    whole = client.completions.create(**asked, extra_body=body).choices[0]
    assert whole.prompt_token_ids == embedded_tokenizer.encode(PROMPTS[0])
    assert whole.token_ids == expected.outputs[0].token_ids
    first, *others = whole.prompt_logprobs
    assert first is None and len(others) == len(expected.prompt_logprobs) - 1
    for got, entry in zip(others, expected.prompt_logprobs[1:]):
        assert {int(i): value["logprob"] for i, value in got.items()} == {
            i: value.logprob for i, value in entry.items()
        }
        assert all(got[str(i)]["rank"] == entry[i].rank for i in entry)
    chunks = list(client.completions.create(**asked, extra_body=body, stream=True))
    assert chunks[0].choices[0].prompt_logprobs == whole.prompt_logprobs
    assert chunks[0].choices[0].prompt_token_ids == whole.prompt_token_ids
    assert [i for chunk in chunks[1:] for i in chunk.choices[0].token_ids] == whole.token_ids


# ---- sampling -----------------------------------------------------------------------------------


def test_fields_of_sampling_reach_the_engine(client, oracle):
    def tokens(**fields):
        extra = {"return_token_ids": True, **fields.pop("extra", {})}
        asked = {"model": NAME, "prompt": PROMPTS[0], "max_tokens": 6, **fields}
        return client.completions.create(**asked, extra_body=extra).choices[0].token_ids

    assert tokens(temperature=0, logit_bias={"17": 100}) == [17] * 6
    assert tokens(seed=3) == tokens(seed=3)
    assert tokens(seed=-1) == tokens(seed=2**64 - 1)
    (greedy,) = generated(oracle, PROMPTS[0], max_tokens=6, temperature=0)
    assert tokens(extra={"top_k": 1}) == greedy.outputs[0].token_ids
    third = greedy.outputs[0].token_ids[2]
    got = tokens(temperature=0, extra={"stop_token_ids": [third]})
    assert got == greedy.outputs[0].token_ids[:3]


def test_a_token_that_is_half_a_character_is_spelled_by_its_bytes(client, embedded_tokenizer):
    half = embedded_tokenizer.encode("\u00e9\u4e16")[-1]  # the last byte of a Chinese character
    found = client.completions.create(
        model=NAME,
        prompt="And",
        max_tokens=1,
        logprobs=0,
        temperature=0,
        logit_bias={str(half): 100},
    )
    spelled = "".join(f"\\x{byte:02x}" for byte in embedded_tokenizer.token_bytes(half))
    assert found.choices[0].logprobs.tokens == [f"bytes:{spelled}"]
    named = client.completions.create(
        model=NAME,
        prompt="And",
        max_tokens=1,
        logprobs=0,
        extra_body={"return_tokens_as_token_ids": True, "top_k": 1},
    )
    assert named.choices[0].logprobs.tokens[0].startswith("token_id:")


def test_a_prompt_as_long_as_the_context_is_scored_whole(client, server, oracle):
    ids = (oracle.tokenizer.encode(" ".join(PROMPTS)) * 9)[: oracle.max_model_len]
    (scores,) = oracle.score([ids], use_tqdm=False)
    for room in (0, 1):
        asked = {"model": NAME, "prompt": ids, "max_tokens": room, "echo": True, "logprobs": 0}
        found = client.completions.create(temperature=0, **asked).choices[0]
        assert found.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(scores, abs=1e-5)
        assert len(found.logprobs.tokens) == len(ids) + room and found.finish_reason == "length"
        pieces = list(client.completions.create(stream=True, **asked))
        assert sum(len(p.choices[0].logprobs.tokens) for p in pieces if p.choices[0].logprobs) == (
            len(ids) + room
        )
    wrong = {"prompt": [*ids, 1], "max_tokens": 1, "echo": True, "logprobs": 0}
    for fields in (
        wrong,
        {"prompt": ids, "max_tokens": 1},
        {**wrong, "prompt": ids, "max_tokens": 2},
    ):
        refused = server.post("/v1/completions", model=NAME, **fields)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
