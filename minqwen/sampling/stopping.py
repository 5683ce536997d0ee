"""Where a text stops: stop strings in a text that comes in pieces."""

from __future__ import annotations

from minqwen.sampling.params import SamplingParams


class StopChecker:
    """Finds stop strings in a text that comes in pieces; holds back what may be the start of one.

    The text stops at the first character at which any stop string is complete; where two are, at
    the longer one. This does not depend on where the pieces were cut, and no text that has been
    shown ever has to be taken back.
    """

    def __init__(self, params: SamplingParams):
        self.stop = sorted(params.stop, key=len, reverse=True)
        self.include = params.include_stop_str_in_output
        self.held = ""

    def push(self, text: str, final: bool = False, search: bool = True) -> tuple[str, str | None]:
        """The text that can be shown now, and the stop string if it was found.

        Nothing may follow once one was found. final: no more text will come. search=False: this
        piece can neither hold a stop string nor begin one (min_tokens).
        """
        text, self.held = self.held + text, ""
        if not search or not self.stop:
            return text, None
        found = self._first(text)
        if found:
            end, string = found
            return text[: end if self.include else end - len(string)], string
        if not final:
            self.held = self._possible_start(text)
        return text[: len(text) - len(self.held)], None

    def _first(self, text: str) -> tuple[int, str] | None:
        """The stop string that is complete first, and the place after it."""
        found = None
        for string in self.stop:  # the longest first, so that of two with the same end it is taken
            at = text.find(string)
            end = at + len(string)
            if at >= 0 and (found is None or end < found[0]):
                found = end, string
        return found

    def _possible_start(self, text: str) -> str:
        """The longest end of the text with which a stop string begins; "" if there is none."""
        longest = len(self.stop[0]) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(string.startswith(text[start:]) for string in self.stop):
                return text[start:]
        return ""
