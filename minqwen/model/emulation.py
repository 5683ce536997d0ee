"""Whether float64 products on a GPU are computed in float64: cuBLAS can emulate them.

The emulation (CUDA 13.0 update 2 and later) cuts every number into integers of 8 bits and drops
what it thinks is not needed. Exact arithmetic needs every bit of a product.
"""

from __future__ import annotations

import os

from minqwen.errors import ConfigError

EMULATE = "CUBLAS_EMULATE_DOUBLE_PRECISION"
PREFIXES = ("CUBLAS_", "CUBLASLT_", "NVIDIA_TF32")  # what NVIDIA's libraries read at their start


def library_settings() -> dict[str, str]:
    """The environment variables by which somebody may have changed what a product computes."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(PREFIXES)}


def refuse_emulation() -> None:
    """Raise ConfigError if the environment tells cuBLAS to emulate float64."""
    value = os.environ.get(EMULATE, "").strip()
    if value not in ("", "0"):
        raise ConfigError(
            f"{EMULATE} is {value!r}: exact arithmetic needs true float64 products; unset it"
        )
