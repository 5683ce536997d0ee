"""One safetensors file that is no checkpoint: a golden pack's, an adapter's, a trace's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minqwen.errors import MinqwenError
from minqwen.files import check_replaceable_file, flush


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    error: type[MinqwenError],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file in one step: a reader sees the old one or the new one, never a part of it.

    Raises `error`, in one line, if it cannot be written; the old file is then as it was.
    """
    check_replaceable_file(path, error)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(dict(tensors), temporary, metadata=dict(metadata or {"format": "pt"}))
        flush(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:  # the library's own, for a full disk
        why = " ".join(str(e).removeprefix("Error while serializing: ").split())[:200]
        raise error(
            f"{path}: could not be written ({why}); what was there is as it was: make room or "
            "choose another place"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
