"""The check of a finished text: what it finds, and that it comes to an end."""

import json

import pytest

from minqwen.errors import SamplingError
from minqwen.sampling.text_check import affordable, text_check


def test_a_text_that_fits_passes_and_another_is_told_in_one_line():
    check = text_check({"type": "object", "properties": {"a": {"maximum": 3}}})
    check('{"a": 3}')
    with pytest.raises(SamplingError, match=r"^the finished text does not fit its schema at \$\.a"):
        check('{"a": 4}')


@pytest.mark.parametrize(
    "schema, text",
    [
        ({"pattern": "^a+$"}, '"b"'),
        ({"patternProperties": {"^a": {"type": "null"}}}, '{"ab": 1}'),
        ({"patternProperties": {"^a": {}}, "additionalProperties": False}, '{"b": 1}'),
        ({"format": "date"}, '"2023-02-29"'),
        ({"oneOf": [{"type": "integer"}, {"minimum": 1}]}, "2"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "const": 1}, "2"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}, "1"),
    ],
)
def test_a_text_that_does_not_fit_is_found(schema, text):
    with pytest.raises(SamplingError, match="does not fit its schema"):
        text_check(schema)(text)


def test_what_cannot_be_checked_is_told_in_one_line():
    for schema, text in (
        ({}, "[" * 5000 + "]" * 5000),
        ({}, "1" * 5000),
        ({"$ref": "http://localhost/never-fetched"}, "1"),
        ({}, "{"),
    ):
        with pytest.raises(SamplingError, match="^the finished text cannot be checked: ") as error:
            text_check(schema)(text)
        assert "\n" not in str(error.value)


def test_a_regex_that_takes_years_is_left_to_the_grammar():
    slow, name = "^(a+)+$", "a" * 60 + "!"
    text_check({"pattern": slow})(json.dumps(name))
    schema = {"patternProperties": {slow: {}}, "additionalProperties": False}
    text_check(schema)(json.dumps({name: 1}))
    text_check({"additionalProperties": {"pattern": slow}})(json.dumps({"b": name}))


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|aa)+", "(a*)*", "(a?){30}", "((a+))+", "(a{1,9}b?)*", "(x(a+)y)*", "(?:a+b)+c"],
)
def test_what_can_take_exponential_time_is_never_affordable(pattern):
    assert not affordable(f"^{pattern}$", "")


def test_what_is_affordable_depends_on_the_quantifiers_and_the_length():
    assert affordable(r"^[A-Z]{2}-\d{3}$", "x" * 10**6)
    assert affordable(r"^[a-z|(+]*\(\+$", "x" * 10**4)  # a class and escapes are no quantifiers
    assert not affordable("^a*$", "x" * (10**4 + 1))
    assert affordable("^a*b*c*$", "x" * 100) and not affordable("^a*b*c*$", "x" * 101)


def test_a_check_that_looks_at_the_same_text_again_and_again_is_ended():
    """Each level of this array is looked at twice: 2^40 times in all."""
    again = {"type": "array", "items": {"$ref": "#"}}
    schema = {"anyOf": [{**again, "minItems": 2}, {**again, "maxItems": 0}, {"const": 1}, again]}
    text_check(schema)("[" * 4 + "1" + "]" * 4)
    with pytest.raises(SamplingError, match="cannot be checked: SamplingError: more than 300000"):
        text_check(schema)("[" * 40 + "1" + "]" * 40)
