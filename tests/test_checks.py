"""Checks: a good value comes back, a wrong one is an error of the caller's class in one line."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy
import pytest
import torch

from minqwen.checks import (
    BYTES_PER_ELEMENT,
    boolean,
    did_you_mean,
    dtype_name,
    integer,
    mapping,
    number,
    one_of,
    optional_integer,
    token_ids,
    wrong,
)
from minqwen.errors import ConfigError, SamplingError


def test_a_good_value_comes_back_and_a_wrong_one_is_one_line():
    assert integer("n", 3, 1) == 3
    with pytest.raises(ConfigError) as error:
        integer("config.json: n", 0, 1)
    assert str(error.value) == (
        "config.json: n is 0, expected an integer of at least 1; correct it"
    )


def test_the_caller_chooses_the_class_of_the_error():
    for call in (
        lambda: integer("x", "a", 1, error=SamplingError),
        lambda: optional_integer("x", "a", 1, error=SamplingError),
        lambda: number("x", "a", error=SamplingError),
        lambda: boolean("x", "a", error=SamplingError),
        lambda: token_ids("x", "a", error=SamplingError),
        lambda: one_of("x", "a", ("b", "c"), error=SamplingError),
        lambda: mapping("x", "a", error=SamplingError),
        lambda: dtype_name("x", "a", error=SamplingError),
    ):
        with pytest.raises(SamplingError, match="^x is 'a', expected .*; correct it$"):
            call()


def test_an_error_is_one_short_printable_line():
    text = str(wrong("odd\nname", "x\n" * 500, "a word", "write one"))
    assert text.isprintable() and text.startswith("odd\\nname is 'x\\nx") and len(text) < 200
    assert text.endswith("..., expected a word; write one")


def test_integers_of_numpy_become_pythons():
    for value in (integer("n", numpy.int64(7), 0), optional_integer("n", numpy.uint8(7), 0)):
        assert value == 7 and type(value) is int
    assert [type(i) for i in token_ids("ids", [numpy.int32(7)])] == [int]
    assert optional_integer("n", None, 0) is None


@pytest.mark.parametrize("value", [True, False, 1.0, "1", None, [1], 2**63, -1, numpy.bool_(True)])
def test_what_is_not_an_integer_in_range_is_refused(value):
    with pytest.raises(ConfigError, match="expected an integer of at least 0"):
        integer("n", value, 0)


def test_numbers_become_floats():
    for value in (1, 1.0, numpy.float32(1), Fraction(1)):
        found = number("x", value)
        assert found == 1.0 and type(found) is float
    assert number("x", 0, open_low=False) == 0 and number("x", 1, high=1.0) == 1


@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan, math.inf, 10**400, True, "1", None, [1]])
def test_what_is_not_a_number_in_range_is_refused(value):
    with pytest.raises(ConfigError, match="expected a finite number above 0 and at most 1;"):
        number("x", value, 0.0, 1.0)


def test_token_ids_are_a_tuple_without_repeats():
    assert token_ids("ids", None) == () and token_ids("ids", 5) == (5,)
    assert token_ids("ids", [3, 1, 3]) == (3, 1)
    for value in (-1, [1, None], True, 1.5, "a", {}):
        with pytest.raises(ConfigError, match="a token id, a list of token ids, or null"):
            token_ids("ids", value)


def test_every_dtype_that_is_known_has_torchs_size():
    for name, size in BYTES_PER_ELEMENT.items():
        dtype = getattr(torch, name)
        assert dtype.itemsize == size and dtype_name("dtype", dtype) == name
    with pytest.raises(ConfigError, match="expected one of bfloat16, float16, float32, float64"):
        dtype_name("dtype", torch.int8)


def test_one_of_several_words_and_what_was_meant():
    assert one_of("arithmetic", "exact", ("native", "exact")) == "exact"
    for value in ("exakt", ["exact"], None):
        with pytest.raises(ConfigError, match="expected 'native' or 'exact'; correct it"):
            one_of("arithmetic", value, ("native", "exact"))
    assert did_you_mean("exakt", ("native", "exact")) == "; did you mean 'exact'?"
    assert did_you_mean("x", ("native", "exact")) == ""
