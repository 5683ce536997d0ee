"""A refusal as OpenAI's clients read it, without the server's own paths."""

from __future__ import annotations

import re
from typing import Any

from minqwen.files import printable

# An absolute path, of which the last part is kept. "#/properties/age" is no path, nor is "and/or".
DIRECTORIES = re.compile(r"(?<![\w.#/~%-])(?:~|[A-Za-z]:)?(?:/[^\s/:'\"()]+)*/(?=[^\s/:'\"()]*)")
# Where in our code something failed: "(/usr/lib/python3/minqwen/engine/core.py:12)".
PLACE = re.compile(r"\s*\([^()]*\.py:\d+\)")
KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
MOST_CHARACTERS = 1000


class ApiError(Exception):
    """What a client is told instead of an answer.

    status: of HTTP. param: the field of the request that is to blame. code: one word for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message = status, without_paths(message)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "error": {
                "message": self.message,
                "type": KINDS.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def without_paths(text: str) -> str:
    """One printable line in which no directory of this machine is named."""
    text = DIRECTORIES.sub("", PLACE.sub("", text))
    return printable(text)[:MOST_CHARACTERS]


def of_failed_request(why: str) -> ApiError:
    """The error of a request that the engine has ended: its own fault, or ours.

    The engine names a place in the code for what is nobody's mistake.
    """
    ours = PLACE.search(why) is not None or "logits are not finite" in why
    return ApiError(500 if ours else 422, why, code="request_failed")
