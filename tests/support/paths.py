"""The directories that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "weights" / "embedded"
DATA = ROOT / "tests" / "data"
