"""What errors and warnings say: a user's mistake as it stands, any other with its kind."""

from __future__ import annotations

import warnings

import pytest

from minqwen.errors import ConfigError, a_kind, kind_and_words, told, warn


def test_a_users_mistake_is_told_as_it_stands_and_any_other_with_its_kind():
    assert told(ConfigError("x is 1, expected 2")) == "x is 1, expected 2"
    assert told(KeyError("x")) == "KeyError: 'x'"


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("no such token\nsecond line"), "ValueError: no such token"),
        (ValueError("\n  first words\nmore"), "ValueError: first words"),
        (RuntimeError(), "RuntimeError"),
        (MemoryError(), "MemoryError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_of_a_long_message_the_first_line_is_told(error, words):
    assert kind_and_words(error) == words


@pytest.mark.parametrize(
    "value, said",
    [
        *[(1, "an int"), (1.5, "a float"), ([], "a list"), ("x", "a str"), (None, "None")],
        *[(ValueError(), "a ValueError"), (OSError(), "an OSError")],
    ],
)
def test_a_type_has_its_article(value, said):
    assert a_kind(value) == said


@pytest.mark.parametrize("rank, said", [(None, 1), ("0", 1), ("1", 0)])
def test_only_the_first_rank_warns(monkeypatch, rank, said):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("two\nlines", 1)
    assert [str(one.message) for one in caught] == ["two\\nlines"] * said
    assert all(one.filename == __file__ for one in caught)
