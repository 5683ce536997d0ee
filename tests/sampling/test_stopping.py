"""Stop strings in a text that comes in pieces."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from minqwen.sampling.params import SamplingParams
from minqwen.sampling.stopping import StopChecker


def test_the_text_ends_before_the_stop_string():
    checker = StopChecker(SamplingParams(stop=["END"]))
    assert checker.push("one two E") == ("one two ", None)  # the E may be the beginning of END
    assert checker.push("ND three") == ("", "END")


def naive_stop(text, stops, include):
    """(what is shown, the stop string) of a whole text: character by character."""
    for end in range(len(text) + 1):
        for s in sorted(stops, key=len, reverse=True):
            if text[:end].find(s) >= 0:
                return text[: end if include else end - len(s)], s
    return text, None


words = st.text("ab\n\u00e9\U0001f600", min_size=1, max_size=4)


@settings(max_examples=600, deadline=None)
@given(
    st.text("ab\n\u00e9\U0001f600", max_size=14),
    st.lists(words, max_size=4),
    st.booleans(),
    st.lists(st.integers(0, 14), max_size=6),
)
@example("aab", ["ab"], False, [1, 2])
@example("abcbc", ["abcd", "bc"], False, [3])
@example("xabc", ["abc", "bc"], False, [2])
def test_stop_strings_at_every_split(text, stops, include, cuts):
    want, found = naive_stop(text, stops, include)
    checker = StopChecker(SamplingParams(stop=stops, include_stop_str_in_output=include))
    cuts = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    shown, reason = "", None
    for start, end in zip(cuts, cuts[1:] or [len(text)]):
        piece, reason = checker.push(text[start:end], final=end == len(text))
        shown += piece
        assert want.startswith(shown)  # nothing is shown that would have to be taken back
        if reason is not None:
            break
        if end < len(text):  # and nothing is held back without need
            rest = text[len(shown) : end]
            assert not rest or any(s.startswith(rest) and s != rest for s in stops)
    assert (shown, reason) == (want, found)


def test_stop_strings_before_min_tokens_are_text():
    checker = StopChecker(SamplingParams(stop=["ab"]))
    assert checker.push("xab a", search=False) == ("xab a", None)
    assert checker.push("b") == ("b", None)
    assert checker.push("ya") == ("y", None)
    assert checker.push("", final=True) == ("a", None)
    assert checker.push("cabd") == ("c", "ab")


def test_the_last_piece_gives_up_what_was_held():
    checker = StopChecker(SamplingParams(stop=["</s>"]))
    assert checker.push("a<") == ("a", None)
    assert checker.push("/s") == ("", None)
    assert checker.push("!<", final=True) == ("</s!<", None)
