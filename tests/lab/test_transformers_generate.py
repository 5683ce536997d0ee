"""`generate` in transformers' shape: its ids, its padding, its settings, its refusals."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
import transformers
from support.qwen2 import cast, oracle, ours, tokens
from transformers import AutoModelForCausalLM as Theirs

from minqwen import MinqwenError, Tokenizer
from minqwen.lab.transformers import AutoModelForCausalLM, GenerationConfig, Qwen2ForCausalLM

DTYPES = (torch.float32, torch.bfloat16)
TEXTS = ["In the beginning", "And God said unto Moses, Speak unto the", "What is 4 + 3?", "Amen"]
PAD = 0
# transformers says that it takes its default length.
pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")


def left_padded(rows, pad=PAD):
    """Rows of ids as transformers' tokenizers pad them, and the mask."""
    T = max(map(len, rows))
    ids = torch.tensor([[pad] * (T - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
    return dict(input_ids=ids, attention_mask=mask)


@pytest.fixture(scope="module")
def pair():
    """transformers' model and ours, random, float32."""
    with torch.no_grad():
        hf = oracle()
        return hf, Qwen2ForCausalLM(ours(hf))


@pytest.fixture(scope="module")
def ragged(pair):
    """Four prompts of 9, 4, 1 and 6 tokens."""
    ids = tokens(pair[0], 4, 9).tolist()
    return left_padded([row[:n] for row, n in zip(ids, (9, 4, 1, 6))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_ids_of_ragged_prompts_are_transformers(pair, ragged, dtype):
    hf = cast(pair[0], dtype)
    model = Qwen2ForCausalLM(ours(hf))
    expected = hf.generate(**ragged, max_new_tokens=12, pad_token_id=PAD)
    found = model.generate(**ragged, max_new_tokens=12, pad_token_id=PAD)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert found.shape == (4, 9 + 12) and torch.equal(found[:, :9], ragged["input_ids"])


def test_ends_and_the_padding_after_them_are_transformers(pair, ragged):
    hf, model = pair
    free = model.generate(**ragged, max_new_tokens=12)[:, 9:]
    ends = [[int(free[0, 2])], [int(free[1, 1]), int(free[2, 5])], [int(x) for x in free[:, 3]]]
    lengths = set()
    for eos in (*ends, ends[0][0], [*ends[0], 10_000]):
        for pad in (PAD, None):
            options = dict(max_new_tokens=12, eos_token_id=eos, pad_token_id=pad)
            found = model.generate(**ragged, **options)
            assert torch.equal(found, hf.generate(**ragged, **options)), options
            lengths.add(found.shape[1])
    assert min(lengths) < 9 + 12  # all had ended


def test_the_models_own_end_and_context_count_as_there(pair, ragged):
    free = pair[1].generate(**ragged, max_new_tokens=7)
    end = int(free[0, 10])
    with torch.no_grad():
        hf = oracle(eos_token_id=end, max_position_embeddings=16)
        model = Qwen2ForCausalLM(ours(hf))
    expected = hf.generate(**ragged, pad_token_id=PAD)  # to the end of the context
    assert torch.equal(model.generate(**ragged, pad_token_id=PAD), expected)
    assert (expected[0, 11:] == PAD).all() and expected.shape == (4, 16)
    endless = model.generate(**ragged, pad_token_id=PAD, eos_token_id=None)
    assert torch.equal(endless, free)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_embedded_models_texts_are_transformers(embedded, dtype):
    tokenizer = Tokenizer.from_dir(embedded)
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=dtype)
    hf = Theirs.from_pretrained(embedded, dtype=dtype, attn_implementation="eager")
    batch = left_padded(tokenizer.encode_batch(TEXTS), pad=2016)
    options = dict(do_sample=False, max_new_tokens=16)  # the penalty is the directory's
    expected = hf.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options), expected)
    plain = model.generate(**batch, **options, repetition_penalty=1.0)
    assert not torch.equal(plain, expected[:, : plain.shape[1]])


@pytest.mark.parametrize(
    "options",
    [
        {},  # 20 new tokens
        dict(max_length=14),  # with the padding
        dict(max_new_tokens=3, max_length=14),
        dict(max_new_tokens=9, repetition_penalty=1.7),
        dict(max_new_tokens=9, repetition_penalty=None, temperature=None, top_k=None),
        dict(max_new_tokens=9, use_cache=False, num_beams=1, stop_strings=None),
    ],
    ids=str,
)
def test_settings_mean_what_they_mean_there(pair, ragged, options):
    hf, model = pair
    expected = hf.generate(**ragged, pad_token_id=PAD, **options)
    assert torch.equal(model.generate(**ragged, pad_token_id=PAD, **options), expected)


def test_a_least_number_of_new_tokens(pair, ragged):
    hf, model = pair
    eos = model.generate(**ragged, max_new_tokens=4)[:, 9].tolist()
    for least in (None, 3, 6):
        options = dict(max_new_tokens=8, min_new_tokens=least, eos_token_id=eos, pad_token_id=PAD)
        found = model.generate(**ragged, **options)
        assert torch.equal(found, hf.generate(**ragged, **options))
        assert found.shape[1] >= 9 + (least or 1)


def test_padding_is_guessed_as_in_transformers(pair):
    hf, model = pair
    ids = tokens(hf, 2, 6).clamp(min=1)
    ids[0, :3] = PAD
    for options in (dict(pad_token_id=PAD), dict(pad_token_id=PAD, eos_token_id=PAD), {}):
        expected = hf.generate(ids, max_new_tokens=6, **options)
        assert torch.equal(model.generate(ids, max_new_tokens=6, **options), expected)


def test_a_generation_config_counts_before_the_models_and_after_arguments(pair, ragged):
    hf, model = pair
    theirs = transformers.GenerationConfig(max_new_tokens=7, pad_token_id=PAD, eos_token_id=5)
    expected = hf.generate(**ragged, generation_config=theirs)
    given = dict(max_new_tokens=7, pad_token_id=PAD, eos_token_id=5)
    for config in (theirs, GenerationConfig(**given), given):
        assert torch.equal(model.generate(**ragged, generation_config=config), expected)
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig(max_new_tokens=3, pad_token_id=PAD)
        assert model.generate(**ragged).shape[1] == 9 + 3
        assert model.generate(**ragged, generation_config={"max_new_tokens": 4}).shape[1] == 9 + 4
        assert model.generate(**ragged, max_new_tokens=5).shape[1] == 9 + 5
    finally:
        model.generation_config = own


def near(ours, theirs):
    """But for the pad token, which older versions of transformers take for one that was said."""
    assert PAD == 0
    torch.testing.assert_close(ours[:, 1:], theirs[:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_logits_and_scores_of_every_step(pair, ragged, penalty):
    hf, model = pair
    options = dict(
        max_new_tokens=8,
        eos_token_id=[3, 4],
        pad_token_id=PAD,
        repetition_penalty=penalty,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    found, expected = model.generate(**ragged, **options), hf.generate(**ragged, **options)
    assert torch.equal(found.sequences, expected.sequences)
    new = found.sequences[:, 9:]
    running = (new.eq(3) | new.eq(4)).cumsum(1).sub((new.eq(3) | new.eq(4)).int()).eq(0)
    for name in ("logits", "scores"):
        steps = list(zip(found[name], expected[name], strict=True))
        for t, (a, b) in enumerate(steps):
            assert a.dtype == b.dtype == torch.float32
            near(a[running[:, t]], b[running[:, t]])
            assert a[~running[:, t]].abs().sum() == 0
    assert found.scores[1].equal(found.logits[1]) == (penalty == 1)
    only = model.generate(**ragged, **options | dict(output_logits=None))
    assert list(only) == ["sequences", "scores"] and only[0] is only.sequences


@pytest.mark.parametrize("narrowed", [dict(temperature=0.7, top_k=20, top_p=0.9), {}], ids=str)
def test_scores_that_are_drawn_from_are_transformers(pair, ragged, narrowed):
    hf, model = pair
    options = dict(
        max_new_tokens=1,
        do_sample=True,
        repetition_penalty=1.2,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        **narrowed,
    )
    found, expected = model.generate(**ragged, **options), hf.generate(**ragged, **options)
    near(found.scores[0], expected.scores[0])
    assert found.scores[0].isinf().any()  # 50 of the 61 tokens, where nothing is said
    drawn = found.scores[0].gather(1, found.sequences[:, 9:])
    assert drawn.isfinite().all()


def test_sampling_is_by_torchs_seed(pair, ragged):
    _, model = pair
    options = dict(max_new_tokens=6, do_sample=True, num_return_sequences=3, pad_token_id=PAD)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.generate(**ragged, **options))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert runs[0].shape == (12, 15)
    prompts = ragged["input_ids"].repeat_interleave(3, 0)
    assert torch.equal(runs[0][:, :9], prompts)
    assert not torch.equal(runs[0][0], runs[0][1])
    torch.manual_seed(1)
    likeliest = model.generate(**ragged, max_new_tokens=6, do_sample=True, top_k=1)
    assert torch.equal(likeliest, model.generate(**ragged, max_new_tokens=6))


def test_a_seed_that_draws_does_not_depend_on_gradients_or_the_batch_size(pair):
    _, model = pair
    ids = tokens(model, 70, 3)  # more than run at a time
    with torch.enable_grad():
        found = model.generate(ids, max_new_tokens=2)
    assert found.shape == (70, 5) and not found.requires_grad
    assert torch.equal(found[67:], model.generate(ids[67:], max_new_tokens=2))


def test_settings_of_the_directory_are_transformers(embedded, tmp_path):
    shutil.copytree(embedded, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    batch = left_padded([[5, 6, 7], [8, 9]], pad=2016)
    for said in ({"eos_token_id": 2018, "max_new_tokens": 4}, {"max_length": 9}, None):
        file.write_text(json.dumps(said)) if said else file.unlink()
        hf = Theirs.from_pretrained(tmp_path / "model", dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
        assert torch.equal(model.generate(**batch), hf.generate(**batch))
    (tmp_path / "model" / "generation_config.json").write_text('{"num_beams": 4}')
    with pytest.raises(MinqwenError, match="num_beams is 4"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_sampling_settings_without_sampling_are_warned_of(pair, ragged):
    _, model = pair
    with pytest.warns(UserWarning, match="do_sample is false: temperature, top_p changes nothing"):
        model.generate(**ragged, max_new_tokens=2, temperature=0.5, top_p=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**ragged, max_new_tokens=2, temperature=1.0, do_sample=False)


REFUSED = {
    "beams": (dict(num_beams=4), "num_beams is 4, not taken: there is no beam search"),
    "a cache": (dict(past_key_values=object()), "the engine has a cache of its own"),
    "a streamer": (dict(streamer=object()), "use LLM.stream"),
    "stop strings": (dict(stop_strings=["x"], tokenizer=1), "use LLM with stop"),
    "hidden states": (dict(output_hidden_states=True), "output_hidden_states is True"),
    "vLLM's name": (dict(max_tokens=4), "it is called max_new_tokens here"),
    "a slip": (dict(max_new_token=4), "no argument 'max_new_token' here.*max_new_tokens"),
    "temperature 0": (dict(do_sample=True, temperature=0.0), "give do_sample=False"),
    "many greedy texts": (dict(num_return_sequences=2), "all would be the same"),
    "no token": (dict(max_new_tokens=0), "max_new_tokens is 0"),
    "no room": (dict(max_length=9), "max_length is 9: give max_new_tokens"),
    "beyond the context": (dict(max_new_tokens=99_999), "context is 32768: give max_new_tokens"),
    "an end that is text": (dict(eos_token_id="</s>"), "eos_token_id is '</s>', expected an id"),
    "a config of beams": (dict(generation_config={"num_beams": 2}), "no beam search"),
    "a config that is none": (dict(generation_config=3), "generation_config is a int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_taken_is_one_line(pair, ragged, case):
    _, model = pair
    options, message = REFUSED[case]
    with pytest.raises(MinqwenError, match=message) as error:
        model.generate(**ragged, **options)
    assert "\n" not in str(error.value)


def test_prompts_that_end_in_padding_are_refused(pair, ragged):
    _, model = pair
    mask = ragged["attention_mask"].flip(1)
    with pytest.raises(MinqwenError, match="hides the last token of row 1.*pad on the left"):
        model.generate(ragged["input_ids"], attention_mask=mask, max_new_tokens=2)
    with pytest.raises(MinqwenError, match="generate has no input_ids"):
        model.generate(max_new_tokens=2)
    with pytest.raises(MinqwenError, match="ids are .*expected a tensor"):
        model.generate([[1, 2]], max_new_tokens=2)
