"""Where a text stops: stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Iterator

from minqwen.sampling.params import SamplingParams


class StopChecker:
    """Finds stop strings in a text that comes in pieces; holds back what may be the start of one.

    There are two texts: the one that is shown, without special tokens, and the whole one, in which
    each special token stands as it is spelled. The text stops at the first character at which any
    stop string is complete in either of them; where two are, at the longer one. This does not
    depend on where the pieces were cut, and no text that has been shown ever has to be taken back.
    """

    def __init__(self, params: SamplingParams):
        self.stop = sorted(params.stop, key=len, reverse=True)
        self.include = params.include_stop_str_in_output
        self.held = ""  # the end of the shown text that is not shown yet
        # The end of the whole text with which a stop string may begin, and for each of its
        # characters whether it is one of the shown text too.
        self.whole, self.marks = "", list[bool]()

    def push(
        self, text: str, special: str = "", final: bool = False, search: bool = True
    ) -> tuple[str, str | None]:
        """The text that can be shown now, and the stop string if it was found.

        Nothing may follow once one was found. special: a special token that came before `text`.
        final: no more text will come. search=False: this piece can neither hold a stop string nor
        begin one (min_tokens). The shown text ends before the stop string; where that is included,
        it ends with all of it, special tokens too.
        """
        if not search or not self.stop:
            return text, None
        self.whole += special + text
        self.marks += [False] * len(special) + [True] * len(text)
        text = self.held + text
        found = self._first(text)
        if found:
            start, string = found
            return text[:start] + (string if self.include else ""), string
        start = len(text) if final else self._possible_start(text)
        self.held = text[start:]
        return text[:start], None

    def _first(self, text: str) -> tuple[int, str] | None:
        """The stop string that is complete first, and its place in the shown text."""
        found, most = None, -1
        for string in self.stop:  # the longest first, so that of two with the same end it is taken
            for left, start in self._places(string, text):
                if left > most:
                    found, most = (start, string), left
        return found

    def _places(self, string: str, text: str) -> Iterator[tuple[int, int]]:
        """Where a stop string is in either text.

        How many characters follow it, and how many of the shown text `text` come before it. It ends
        in the last piece, of which both texts have the same characters after a special token.
        """
        at = self.whole.find(string)
        if at >= 0:
            yield len(self.whole) - at - len(string), len(text) - sum(self.marks[at:])
        at = text.find(string)
        if at >= 0:
            yield len(text) - at - len(string), at

    def _possible_start(self, text: str) -> int:
        """From where the shown text must be held back, because a stop string may begin there."""
        start = self._beginning_in(self.whole)
        self.whole, self.marks = self.whole[start:], self.marks[start:]
        return min(self._beginning_in(text), len(text) - sum(self.marks))

    def _beginning_in(self, text: str) -> int:
        """The first place from which on a text is the beginning of a stop string."""
        longest = len(self.stop[0]) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(string.startswith(text[start:]) for string in self.stop):
                return start
        return len(text)
