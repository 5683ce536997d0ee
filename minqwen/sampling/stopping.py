"""Where a text stops: stop strings in a text that comes in pieces."""

from __future__ import annotations

from minqwen.sampling.params import SamplingParams


class StopChecker:
    """Finds stop strings in a text that comes in pieces, and holds back what may be the beginning of one.

    The text stops at the first character at which any stop string is complete (the longest, where two are):
    wherever the pieces were cut, and before anything that a reader was shown would have to be taken back.
    """

    def __init__(self, params: SamplingParams):
        self.stop = sorted(params.stop, key=len, reverse=True)
        self.include = params.include_stop_str_in_output
        self.held = ""

    def push(self, text: str, final: bool = False, search: bool = True) -> tuple[str, str | None]:
        """The text that can be shown now, and the stop string if it was found (then nothing more may follow).

        final: no more text will come. search=False: this piece can neither hold nor begin one (min_tokens).
        """
        text, self.held = self.held + text, ""
        if not search or not self.stop:
            return text, None
        found = [(at + len(s), -len(s), s) for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            end, _, s = min(found)
            return text[: end if self.include else end - len(s)], s
        if not final:
            for n in range(min(len(text), len(self.stop[0]) - 1), 0, -1):
                if any(s.startswith(text[-n:]) for s in self.stop):
                    self.held = text[-n:]
                    return text[:-n], None
        return text, None
