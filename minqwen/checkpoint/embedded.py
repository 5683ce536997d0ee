"""Where the embedded model is: weights/embedded of the repository, or its copy in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_INSTALLED, _IN_REPOSITORY = _PACKAGE / "embedded", _PACKAGE.parent / "weights" / "embedded"
EMBEDDED = _INSTALLED if _INSTALLED.is_dir() else _IN_REPOSITORY
