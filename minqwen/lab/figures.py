"""Figures by matplotlib, which is an optional extra and comes without types."""

from __future__ import annotations

from typing import Any

from minqwen.errors import MinqwenError


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, in inches. Raises MinqwenError where matplotlib is missing.

    Called before the work whose results are drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        line = '--plot needs matplotlib: pip install "minqwen[plot]"'
        raise MinqwenError(line) from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, file: str) -> None:
    """Raises MinqwenError where the file's ending is unknown or it cannot be written."""
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise MinqwenError(
            f"{file}: the plot cannot be written ({error}); choose another file"
        ) from None
