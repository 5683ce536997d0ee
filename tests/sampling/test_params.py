"""Sampling parameters: what they become, and how a wrong one is told."""

import copy
import dataclasses
import inspect
import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from support.sampling import INF, NAN

from minqwen.config import GenerationDefaults
from minqwen.errors import SamplingError
from minqwen.sampling.params import SamplingParams
from minqwen.sampling.structured import StructuredOutputs


def test_the_defaults_are_vllms():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (p.max_tokens, p.min_tokens, p.seed) == (256, 0, None)
    assert (p.stop, p.stop_token_ids, p.bad_words) == ((), (), ())
    assert (p.forced_ids, p.logprobs) == (None, None)


def test_sequences_become_tuples_and_numbers_pythons_own():
    p = SamplingParams(
        stop="x",
        stop_token_ids=np.array([3]),
        bad_words=["a"],
        logit_bias={np.int64(3): 1},
        temperature=np.float32(0.5),
        top_k=np.int64(4),
        max_tokens=None,
    )
    assert (p.stop, p.stop_token_ids, p.bad_words, p.logit_bias) == (("x",), (3,), ("a",), {3: 1.0})
    assert type(p.temperature) is float and type(p.top_k) is int and p.max_tokens is None
    assert SamplingParams(top_k=-1).top_k == -1
    spec = StructuredOutputs(regex="a+")
    assert SamplingParams(structured_outputs=spec).structured_outputs.regex == "a+"


BAD = {
    "n": [0, -1, 1.0, True, "1", None],
    "temperature": [-0.1, NAN, INF, "1", True, None, 1e-6],
    "top_p": [0, -0.5, 1.1, NAN, "x", None],
    "top_k": [-2, 1.5, True, None],
    "min_p": [-0.1, 1.1, NAN, None],
    "repetition_penalty": [0, -1, NAN, INF, None],
    "presence_penalty": [-2.1, 2.1, NAN, None],
    "frequency_penalty": [-2.1, 2.1, "0", None],
    "seed": [-1, 2**64, 1.5, True, "7"],
    "stop": [[""], "", [1], 5, b"x", ["a", None]],
    "include_stop_str_in_output": [1, None, "yes"],
    "stop_token_ids": [[-1], [True], [1.0], "12", 5],
    "ignore_eos": [0, None],
    "max_tokens": [0, -1, 2.0, True],
    "min_tokens": [-1, 1.5, None, 257],
    "logprobs": [-2, 1.0, True],
    "prompt_logprobs": [-2, "1", False],
    "logit_bias": [[1], {1: NAN}, {-1: 0.0}, {"1": 2.0}, {1: 101}, {1: True}],
    "bad_words": [[""], [" \n"], [3], 7],
    "structured_outputs": ["json", {"json": {}}],
    "forced_ids": [[], [-1], "12", [1.5], 3],
    "detokenize": [0, None, "yes"],
    "skip_special_tokens": [1, None],
    "spaces_between_special_tokens": [0, None],
    "guided_decoding": ["json", {"json": {}}],
}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_bad_field_is_named_in_one_line(name, value):
    with pytest.raises(SamplingError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert name in message and "expected" in message and "\n" not in message


def test_a_name_that_is_no_field_is_told_with_the_nearest():
    with pytest.raises(SamplingError, match="no field 'temprature'; did you mean 'temperature'?"):
        SamplingParams(temprature=0)
    with pytest.raises(SamplingError, match="no field 'zzz': expected one of n, temperature, "):
        SamplingParams(zzz=1)
    with pytest.raises(SamplingError, match="did you mean 'max_tokens'"):
        SamplingParams.from_defaults(GenerationDefaults(), max_token=3)


def test_params_can_be_copied_and_pickled():
    p = SamplingParams(stop="x", logit_bias={3: 1.0})
    assert pickle.loads(pickle.dumps(p)) == copy.deepcopy(p) == p
    assert dataclasses.replace(p, seed=4) == SamplingParams(stop="x", logit_bias={3: 1.0}, seed=4)


def test_every_field_has_a_bad_value_in_this_test():
    assert set(BAD) == set(SamplingParams.__dataclass_fields__)


def test_forced_ids_set_the_length_and_exclude_stops():
    p = SamplingParams(forced_ids=torch.tensor([5, 6, 7]))
    assert p.forced_ids == (5, 6, 7) and p.max_tokens == 3 and p.ignore_eos
    spec = StructuredOutputs(regex="a")
    for other in (dict(stop="x"), dict(stop_token_ids=[1]), dict(structured_outputs=spec)):
        with pytest.raises(SamplingError, match="cannot be combined with forced_ids"):
            SamplingParams(forced_ids=[1], **other)
    for other in (dict(stop="x"), dict(min_tokens=1), dict(bad_words=["a"])):
        with pytest.raises(SamplingError, match="cannot be combined with structured_outputs"):
            SamplingParams(structured_outputs=spec, **other)


def test_what_the_caller_says_wins_over_the_checkpoints_defaults():
    d = GenerationDefaults(
        temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, max_new_tokens=2048
    )
    p = SamplingParams.from_defaults(d, top_p=1.0, max_tokens=5)
    assert (p.temperature, p.top_p, p.top_k, p.repetition_penalty) == (0.7, 1.0, 20, 1.05)
    assert p.max_tokens == 5
    assert SamplingParams.from_defaults(d).max_tokens == 2048
    nothing = GenerationDefaults()
    assert SamplingParams.from_defaults(nothing).temperature == 0
    assert SamplingParams.from_defaults(nothing, seed=3) == SamplingParams(temperature=0, seed=3)


def test_an_id_that_the_model_does_not_have_is_refused():
    SamplingParams(logit_bias={9: 1.0}, stop_token_ids=[9]).check_ids(10)
    for field in (dict(logit_bias={10: 1.0}), dict(stop_token_ids=[10]), dict(forced_ids=[10])):
        message = f"{next(iter(field))} names token 10: expected ids from 0"
        with pytest.raises(SamplingError, match=message):
            SamplingParams(**field).check_ids(10)


# ---- whatever a field is given ------------------------------------------------------------------

NUMERIC = [
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"),
]
ODD = [
    *(NAN, INF, -INF, None, True, False, "", "1", "nan", b"1", [], [1], {}, (1,), {1}, 1j, object),
    *(0, -0.0, 1, -1, 5e-324, 1e-310, 1e-5, 1e39, 1e300, 1.7e308, 2**63 - 1, 2**63, 2**64),
    *(10**30, 10**400, -(10**400), 10**5000, -(10**5000), Fraction(1, 3), Decimal("0.5")),
    *(np.float32(0.5), np.float64(NAN), np.int8(3), np.bool_(True), np.array(1), np.array([1.0])),
    *(torch.tensor(1.0), torch.tensor([1, 2])),
]


@pytest.mark.parametrize("name", NUMERIC)
def test_a_numeric_field_takes_a_number_or_is_refused_in_one_line(name):
    taken = 0
    for value in ODD:
        try:
            found = getattr(SamplingParams(**{"max_tokens": None, name: value}), name)
        except SamplingError as error:
            message = str(error)
            assert message.startswith(f"{name} is ") and "expected" in message
            assert "\n" not in message and len(message) < 300
            continue
        assert found is None or type(found) in (int, float)
        assert found is None or abs(found) < INF
        taken += 1
    assert taken >= 2


@pytest.mark.parametrize("name", ["stop_token_ids", "forced_ids", "logit_bias"])
def test_an_id_is_an_integer_or_is_refused_in_one_line(name):
    for value in ODD:
        if isinstance(value, (list, dict, set)):  # no key of a dict
            continue
        try:
            SamplingParams(**{name: {value: 1.0} if name == "logit_bias" else [value]})
        except SamplingError as error:
            assert name in str(error) and "\n" not in str(error) and len(str(error)) < 300
        except TypeError as error:
            assert "unhashable" in str(error)  # of the dict, not of ours


def test_numbers_too_long_to_spell_are_told_all_the_same():
    long = 10**5000
    told = "too long to show: expected|of too many digits to show: expected"
    for refused in (
        lambda: SamplingParams(min_tokens=long),
        lambda: SamplingParams(stop_token_ids=[long]).check_ids(9),
    ):
        with pytest.raises(SamplingError, match=told):
            refused()


def test_a_large_number_is_as_good_as_another():
    p = SamplingParams(temperature=1.7e308, repetition_penalty=1e300, logit_bias={3: -0.0})
    assert (p.temperature, p.repetition_penalty) == (1.7e308, 1e300)


def test_so_many_samples_that_they_alone_fill_the_memory_are_refused():
    assert SamplingParams(n=16384).n == 16384
    with pytest.raises(SamplingError, match="n is 16385, expected an integer from 1 to 16384"):
        SamplingParams(n=16385)


def test_the_signature_names_the_fields():
    signature = inspect.signature(SamplingParams)
    assert list(signature.parameters) == list(SamplingParams.__dataclass_fields__)
    assert str(signature).startswith("(n: int = 1, temperature: float = 1.0, top_p: float = 1.0, ")
    assert signature.parameters["max_tokens"].default == 256
    assert SamplingParams(2, 0.5).temperature == 0.5


def test_a_bias_is_from_minus_100_to_100():
    assert SamplingParams(logit_bias={1: -100, 2: 100}).logit_bias == {1: -100, 2: 100}
    for bias in (-100.5, 100.5):
        with pytest.raises(SamplingError, match=r"logit_bias\[3\]"):
            SamplingParams(logit_bias={3: bias})
