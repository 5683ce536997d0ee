"""Stop strings in a text that comes in pieces."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from minqwen.sampling.params import SamplingParams
from minqwen.sampling.stopping import StopChecker


def test_the_text_ends_before_the_stop_string():
    checker = StopChecker(SamplingParams(stop=["END"]))
    assert checker.push("one two E") == ("one two ", None)  # the E may be the beginning of END
    assert checker.push("ND three") == ("", "END")


def test_a_special_token_is_searched_but_not_shown():
    checker = StopChecker(SamplingParams(stop=["<end>"]))
    assert checker.push("one") == ("one", None)
    assert checker.push("", special="<pad>") == ("", None)
    assert checker.push(" two") == (" two", None)
    assert checker.push("", special="<end>") == ("", "<end>")


def test_a_stop_string_may_begin_in_text_and_end_in_a_special_token_and_the_reverse():
    checker = StopChecker(SamplingParams(stop=["85<end>", "<end>\nuser"]))
    assert checker.push("is 85") == ("is ", None)
    assert checker.push("", special="<pad>") == ("", None)
    assert checker.push("", special="<end>") == ("", None)  # <pad> came between
    assert checker.push("\nus") == ("85", None)
    assert checker.push("ed") == ("\nused", None)
    assert checker.push(" 85") == (" ", None)
    assert checker.push("", special="<end>") == ("", "85<end>")


def test_what_is_shown_never_holds_a_stop_string_although_a_special_token_stands_in_it():
    checker = StopChecker(SamplingParams(stop=["abc"]))
    assert checker.push("xa") == ("x", None)
    assert checker.push("", special="<end>") == ("", None)
    assert checker.push("bcd") == ("", "abc")


def test_a_stop_string_that_is_included_is_included_whole():
    include = dict(include_stop_str_in_output=True)
    checker = StopChecker(SamplingParams(stop=["85<end>"], **include))
    assert checker.push("", special="<end>") == ("", None)
    assert checker.push("a 85") == ("a ", None)
    assert checker.push("", special="<end>") == ("85<end>", "85<end>")
    checker = StopChecker(SamplingParams(stop=["ab"], **include))
    assert checker.push("a") == ("", None)
    assert checker.push("", special="<end>") == ("", None)
    assert checker.push("bc") == ("ab", "ab")


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


def naive_stop_with_special_tokens(pieces, stops, include):
    """The same for a text of (text, is it a special token?): prefix by prefix, both texts."""
    marked = [(character, special) for text, special in pieces for character in text]
    for end in range(len(marked) + 1):
        whole = "".join(character for character, _ in marked[:end])
        shown = "".join(character for character, special in marked[:end] if not special)
        for s in sorted(stops, key=len, reverse=True):
            if whole.endswith(s):
                before = "".join(c for c, special in marked[: end - len(s)] if not special)
                return before + s if include else before, s
            if shown.endswith(s) and not marked[end - 1][1]:
                return shown if include else shown[: -len(s)], s
    return "".join(text for text, special in pieces if not special), None


@settings(max_examples=800, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.text("ab<>", max_size=4), st.just(False)),
            st.tuples(st.sampled_from(["<a>", "<b>", "<"]), st.just(True)),
        ),
        max_size=7,
    ),
    st.lists(st.text("ab<>", min_size=1, max_size=5), min_size=1, max_size=3),
    st.booleans(),
)
def test_stop_strings_among_special_tokens(pieces, stops, include):
    want, found = naive_stop_with_special_tokens(pieces, stops, include)
    checker = StopChecker(SamplingParams(stop=stops, include_stop_str_in_output=include))
    shown, reason = "", None
    for i, (text, special) in enumerate([*pieces, ("", False)]):
        args = {"special": text} if special else {"text": text}
        piece, reason = checker.push(**{"text": "", **args}, final=i == len(pieces))
        shown += piece
        assert want.startswith(shown)  # nothing is shown that would have to be taken back
        if reason is not None:
            break
    assert (shown, reason) == (want, found)
