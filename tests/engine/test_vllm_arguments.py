"""What people paste from vLLM's documentation and from articles about this model runs here."""

from __future__ import annotations

import warnings

import pytest
from support.checkpoints import refusal

from minqwen import LLM, SamplingParams
from minqwen.engine.arguments import IDLE, ONLY

SMALL = {"max_model_len": 64, "num_blocks": 16}
GREEDY = SamplingParams(temperature=0, max_tokens=4)
# A value that vLLM allows and that would change the result, or that nothing here could do.
REFUSED = {
    "quantization": ["awq", "gptq", "fp8", True],
    "calculate_kv_scales": [True],
    "cpu_offload_gb": [4, 0.5],
    "pipeline_parallel_size": [2],
    "data_parallel_size": [2],
    "enable_expert_parallel": [True],
    "load_format": ["dummy", "gguf", "pt"],
    "tokenizer_mode": ["mistral"],
    "skip_tokenizer_init": [True],
    "model_impl": ["transformers"],
    "task": ["embed"],
    "runner": ["pooling"],
    "convert": ["classify"],
    "enable_lora": [True],
    "speculative_config": [{"model": "small", "num_speculative_tokens": 5}],
    "speculative_model": ["small"],
    "num_speculative_tokens": [5],
    "rope_scaling": [{"rope_type": "yarn", "factor": 4.0}],
    "rope_theta": [1e6],
    "hf_overrides": [{"rope_theta": 1e6}],
    "disable_sliding_window": [True],
    "generation_config": ["vllm", "/somewhere"],
    "override_generation_config": [{"temperature": 0}],
    "structured_outputs_config": [{"backend": "xgrammar"}],
    "logits_processors": [["module:Class"]],
    "logprobs_mode": ["processed_logprobs"],
    "scheduling_policy": ["priority"],
    "enable_sleep_mode": [True],
    "revision": ["main"],
    "code_revision": ["main"],
    "tokenizer_revision": ["main"],
}


def first_ids(llm: LLM) -> list[int]:
    return llm.generate("In the beginning", GREEDY, use_tqdm=False)[0].outputs[0].token_ids


@pytest.fixture(scope="module")
def loaded(embedded_model, embedded_tokenizer):
    """Makes an engine of a model that is loaded already."""
    return lambda **options: LLM(
        embedded_model, tokenizer=embedded_tokenizer, **{**SMALL, **options}
    )


@pytest.mark.parametrize("name", IDLE)
@pytest.mark.parametrize("value", [True, False, None, 4, "auto"], ids=repr)
def test_what_makes_no_difference_is_taken_with_a_warning(loaded, name, value):
    with pytest.warns(UserWarning) as caught:
        llm = loaded(**{name: value})
    (line,) = (str(warning.message) for warning in caught)
    assert line == f"{name} ({IDLE[name]}) makes no difference here"
    assert repr(llm) == repr(loaded())


def test_one_line_names_all_that_makes_no_difference(embedded):
    with pytest.warns(UserWarning) as caught:
        llm = LLM(embedded, trust_remote_code=False, disable_log_stats=True, swap_space=4, **SMALL)
    (line,) = (str(warning.message) for warning in caught)
    assert "trust_remote_code (" in line and ", swap_space (" in line and "\n" not in line
    assert first_ids(llm) == first_ids(LLM(embedded, **SMALL))


def test_only_one_rank_warns(loaded, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(trust_remote_code=True)


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, only in ONLY.items() for value in only.values], ids=repr
)
def test_a_value_that_says_what_happens_anyway_is_taken_in_silence(loaded, name, value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repr(loaded(**{name: value})) == repr(loaded())


@pytest.mark.parametrize(
    "name, value", [(name, value) for name in ONLY for value in REFUSED[name]], ids=repr
)
def test_a_value_that_would_change_the_result_is_refused_before_a_weight_is_read(
    embedded, name, value
):
    refusal(lambda: LLM(embedded, **{name: value}), repr(name), ONLY[name].instead)


def test_an_unknown_argument_is_refused_with_the_nearest_name(embedded):
    nearest = {
        "enforce_eagre": "enforce_eager",
        "gpu_memory_utilisation": "gpu_memory_utilization",
        "tensor_parallel": "tensor_parallel_size",
        "max_num_sequences": "max_num_seqs",
        "enable_prefix_cache": "enable_prefix_caching",
        "quantisation": "quantization",
    }
    for name, meant in nearest.items():
        refusal(lambda name=name: LLM(embedded, **{name: 1}), repr(name), f"did you mean {meant!r}")


GEOMETRY = {"tensor_parallel_size": 1, "num_attention_heads": 28, "num_key_value_heads": 4}


def test_the_numbers_of_ranks_and_heads_that_there_are_are_taken(embedded, loaded):
    none = dict.fromkeys(GEOMETRY)
    for llm in (LLM(embedded, **GEOMETRY, **SMALL), loaded(**none), loaded(tensor_parallel_size=1)):
        assert len(first_ids(llm)) == 4


def test_more_heads_are_made_while_loading(embedded):
    llm = LLM(embedded, num_attention_heads=32, num_key_value_heads=4, **SMALL)
    assert (llm.config.num_attention_heads, llm.config.num_key_value_heads) == (32, 4)
    assert first_ids(llm) == first_ids(LLM(embedded, **SMALL))


def test_other_numbers_of_heads_for_a_model_in_memory_are_refused(loaded):
    for name in ("num_attention_heads", "num_key_value_heads"):
        refusal(lambda name=name: loaded(**{name: 32}), name, "32", "give the directory")


def test_more_ranks_than_there_are_say_how_to_get_them(embedded, loaded):
    for make in (loaded, lambda **options: LLM(embedded, **options)):
        refusal(
            lambda make=make: make(tensor_parallel_size=4),
            *("tensor_parallel_size", "4", "torchrun --nproc-per-node 4"),
        )
        for wrong in (0, -1, True, "4", 1.5):
            refusal(lambda make=make, w=wrong: make(tensor_parallel_size=w), "tensor_parallel_size")


def test_a_context_beyond_the_models_says_how_to_get_one(embedded):
    refusal(lambda: LLM(embedded, max_model_len=131072), "max_model_len", "rope_scaling", "YaRN")
