"""The page at `/`: page.html, one file that asks this server only, and the headers that see to it.

The browser runs the script and the style whose hashes are in the headers and no others, connects to
no other host, and refuses to read any text as HTML.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("page.html")


def page_headers(text: str) -> dict[str, str]:
    """The headers for the page with this text. They need no change when the page changes."""
    policy = (
        "default-src 'none'",
        f"script-src {' '.join(hashes(text, 'script'))}",
        f"style-src {' '.join(hashes(text, 'style'))}",
        "connect-src 'self'",
        "img-src data:",  # the icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def hashes(text: str, element: str) -> list[str]:
    """What a policy calls the contents of the page's elements of this name."""
    contents = re.findall(rf"<{element}>(.*?)</{element}>", text, flags=re.DOTALL)
    digests = [hashlib.sha256(content.encode()).digest() for content in contents]
    return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
