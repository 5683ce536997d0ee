"""Structured output in the engine: what finishes fits, and what goes wrong stays one request's."""

import json

import pytest
from support.engine import GREEDY, PROMPTS, idle, run_to_end

from minqwen import LLM, SamplingParams
from minqwen.errors import RequestError, SamplingError
from minqwen.model import Qwen2
from minqwen.sampling.structured import StructuredOutputs

# llguidance's dates have a 29th of February in every year; jsonschema's have not.
NO_DAY = StructuredOutputs(json={"type": "string", "format": "date", "pattern": "^2023-02-29$"})
NUMBERS = StructuredOutputs(json={"type": "array", "items": {"enum": [1, 20, 300]}, "maxItems": 3})


DEAD_END = StructuredOutputs(grammar='start: "x" T\nT: /a/ & /b/')


@pytest.fixture
def llm(embedded_model, embedded_tokenizer):
    return LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=128, num_blocks=80)


def structured(spec, **fields):
    return SamplingParams(structured_outputs=spec, **{"seed": 1, "max_tokens": 40, **fields})


def test_a_text_that_finishes_parses(llm):
    output = llm.generate(PROMPTS[0], structured(NUMBERS), use_tqdm=False)[0].outputs[0]
    assert output.finish_reason == "stop" and isinstance(json.loads(output.text), list)


@pytest.mark.parametrize("n", [1, 2])
def test_a_text_that_does_not_fit_is_an_error_of_its_request_alone(llm, oracle, n):
    good = llm.add_request(PROMPTS[0], structured(NUMBERS))
    bad = llm.add_request(PROMPTS[1], structured(NO_DAY, n=n))
    plain = llm.add_request(PROMPTS[0], SamplingParams(max_tokens=24, **GREEDY))
    outputs = run_to_end(llm)
    assert "the finished text does not fit its schema at $: '2023-02-29'" in outputs[bad].error
    assert "\n" not in outputs[bad].error
    assert {c.finish_reason for c in outputs[bad].outputs} == {"error"}
    assert outputs[good].error is None and json.loads(outputs[good].outputs[0].text) is not None
    assert outputs[plain].outputs[0].token_ids == oracle[0] and idle(llm)


@pytest.mark.parametrize(
    "spec, why", [(DEAD_END, "dead end: no token can follow"), (NO_DAY, "does not fit its schema")]
)
def test_generate_keeps_the_outputs_of_those_beside_it(llm, oracle, spec, why):
    plain = SamplingParams(max_tokens=24, **GREEDY)
    params = [plain, structured(spec), structured(NUMBERS)]
    with pytest.raises(RequestError, match=why) as error:
        llm.generate([PROMPTS[0], PROMPTS[1], PROMPTS[2]], params, use_tqdm=False)
    first, second, third = error.value.outputs
    assert first.outputs[0].token_ids == oracle[0] and first.error is None
    assert why in second.error and "\n" not in second.error
    assert isinstance(json.loads(third.outputs[0].text), list) and third.error is None
    assert idle(llm)


def test_a_text_that_is_cut_is_not_checked(llm):
    output = llm.generate(PROMPTS[0], structured(NO_DAY, max_tokens=2), use_tqdm=False)[0]
    assert output.outputs[0].finish_reason == "length" and output.error is None


def test_a_stop_token_that_ends_a_structured_text_is_no_part_of_it(llm, embedded_tokenizer):
    mark = embedded_tokenizer.token_to_id("!")
    spec = StructuredOutputs(json={"type": "integer", "minimum": 0})
    params = structured(spec, stop_token_ids=[mark], logit_bias={mark: 100})
    output = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0]
    assert output.token_ids[-1] == mark and output.stop_reason == mark
    assert output.text == str(json.loads(output.text))


def test_a_tokenizer_of_more_tokens_than_the_model_has_rows(
    embedded_model, embedded_tokenizer, oracle
):
    """2,038 tokens and 2,030 rows. That stopped every request once."""
    tensors = dict(embedded_model.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:2030]
    config = embedded_model.config.replace(vocab_size=2030)
    model = Qwen2.from_tensors(config, lambda name, shard: tensors[name])
    llm = LLM(model, tokenizer=embedded_tokenizer, max_model_len=128, num_blocks=80)
    good = llm.add_request(PROMPTS[0], structured(NUMBERS))
    plain = llm.add_request(PROMPTS[0], SamplingParams(max_tokens=24, **GREEDY))
    outputs = run_to_end(llm)
    assert outputs[good].error is None and isinstance(
        json.loads(outputs[good].outputs[0].text), list
    )
    assert outputs[plain].outputs[0].token_ids == oracle[0]


def test_a_schema_that_no_text_fits_is_refused_before_it_is_queued(llm):
    for schema in ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, {"enum": []}):
        with pytest.raises(SamplingError, match="^structured_outputs.json"):
            llm.add_request(PROMPTS[0], structured(StructuredOutputs(json=schema)))
    assert not llm.has_unfinished_requests
