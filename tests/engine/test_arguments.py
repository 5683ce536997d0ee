"""What an LLM is made with: names of other engines are told what to use, and it says what it is."""

from __future__ import annotations

import pytest
from support.checkpoints import refusal

from minqwen import LLM, Qwen2, SamplingParams, Tokenizer

SMALL = {"max_model_len": 64, "num_blocks": 16}
HINTS = [
    ("torch_dtype", "float16", "use dtype='float16'"),
    ("device_map", "auto", "use device='cpu' or device='cuda'"),
    ("load_in_8bit", True, "dtype='bfloat16' or offload='memory'"),
    ("quantization", "awq", "dtype='bfloat16' or offload='memory'"),
    ("tensor_parallel_size", 2, "torchrun --nproc-per-node 2"),
    ("cpu_offload_gb", 4, "use offload='memory'"),
    ("attn_implementation", "eager", "leave it out"),
    ("trust_remote_code", True, "leave it out"),
    ("revision", "main", "downloads nothing"),
    ("max_seq_len", 64, "did you mean 'max_model_len'?"),
    ("dtpye", "float16", "did you mean 'dtype'?"),
]


# An LLM takes trust_remote_code, as test_vllm_arguments.py shows.
REFUSED = [hint for hint in HINTS if hint[0] != "trust_remote_code"]


@pytest.mark.parametrize("name, value, hint", REFUSED, ids=lambda x: str(x))
def test_an_argument_of_another_engine_is_told_what_to_use(embedded, name, value, hint):
    assert hint in refusal(lambda: LLM(embedded, **{name: value}), name)


@pytest.mark.parametrize("name, value, hint", HINTS, ids=lambda x: str(x))
def test_so_it_is_where_a_model_is_loaded(embedded, name, value, hint):
    if name in ("max_seq_len", "cpu_offload_gb"):
        hint = ""  # max_model_len is the engine's
    assert hint in refusal(lambda: Qwen2.from_pretrained(embedded, **{name: value}), repr(name))


def test_a_tokenizer_may_be_a_directory(embedded, embedded_model, embedded_tokenizer):
    params = SamplingParams(temperature=0, max_tokens=4)
    want = LLM(embedded_model, tokenizer=embedded_tokenizer, **SMALL).generate(
        "In the beginning", params, use_tqdm=False
    )
    for model in (embedded_model, embedded):
        for path in (embedded, str(embedded)):
            llm = LLM(
                model, tokenizer=path, dtype="float32" if model is embedded else "auto", **SMALL
            )
            assert isinstance(llm.tokenizer, Tokenizer)
            output = llm.generate("In the beginning", params, use_tqdm=False)
            assert output[0].outputs[0].text == want[0].outputs[0].text


@pytest.mark.parametrize("tokenizer", [5, True, object(), ["weights"]])
def test_what_is_no_tokenizer_is_refused_before_a_weight_is_read(
    embedded, embedded_model, tokenizer
):
    for model in (embedded, embedded_model):
        words = ("tokenizer", "expected a Tokenizer or the directory of one")
        refusal(lambda model=model: LLM(model, tokenizer=tokenizer, **SMALL), *words)


def test_what_is_no_model_is_refused(embedded_model):
    for model in (None, 5, embedded_model.model, [embedded_model]):
        refusal(lambda model=model: LLM(model), "model", "expected a directory or a Qwen2")


def test_a_missing_directory_is_told_as_such(embedded_model, tmp_path):
    refusal(lambda: LLM(embedded_model, tokenizer=tmp_path / "nothing", **SMALL), "nothing")


def test_an_engine_that_loads_is_fast_and_a_model_keeps_its_own_arithmetic(
    embedded, embedded_model, embedded_tokenizer
):
    assert LLM(embedded, **SMALL).model.ops.name == "fast"
    assert LLM(embedded, arithmetic="native", **SMALL).model.ops.name == "native"
    loaded = LLM(embedded_model, tokenizer=embedded_tokenizer, **SMALL)
    assert loaded.model.ops.name == Qwen2.from_pretrained(embedded).ops.name == "native"


def test_an_engine_says_what_it_is(embedded, embedded_model):
    assert repr(LLM(embedded, dtype="bfloat16", arithmetic="exact", **SMALL)) == (
        f"LLM({embedded.name}: 7,116,992 parameters, bfloat16 on cpu, exact arithmetic; "
        "context of 64 tokens, cache of 16 blocks of 16)"
    )
    assert repr(LLM(embedded_model, num_blocks=9, block_size=4)) == (
        "LLM(7,116,992 parameters, float32 on cpu, native arithmetic; "
        "context of 36 tokens, cache of 9 blocks of 4; no tokenizer)"
    )
