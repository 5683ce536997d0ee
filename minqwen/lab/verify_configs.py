"""Do two configs describe one function? And what can outputs on a text not show?

A setting such as rms_norm_eps is in no weight, and a short text in bfloat16 may show nothing of it.
So the configs are compared too, and what differs there is told first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minqwen.checkpoint import Checkpoint
from minqwen.checkpoint.reader import EMBEDDING, HEAD
from minqwen.checks import dtype_name
from minqwen.config import ModelConfig

# What two models with other heads must share. Without these they cannot be run side by side.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")
FUNCTION = ("rms_norm_eps", "rope_theta", "rope_scaling")  # settings that no weight shows


def differing_sizes(a: ModelConfig, b: ModelConfig) -> list[str]:
    """ "hidden_size 448 and 512" for every one of SIZES that differs."""
    return _differing(a, b, SIZES)


def differing_settings(a: Checkpoint, b: Checkpoint) -> list[str]:
    """What else the configs differ in by which the two compute different functions.

    The heads are compared if one config ties them to the embedding and the other does not.
    """
    found = _differing(a.config, b.config, FUNCTION)
    ties = [c.config.tie_word_embeddings for c in (a, b)]
    if ties[0] != ties[1] and not _same_values(_head(a), _head(b)):
        found.append(f"tie_word_embeddings {ties[0]} and {ties[1]}")
    return [f"{text}: not the same function" for text in found]


def _differing(a: ModelConfig, b: ModelConfig, names: tuple[str, ...]) -> list[str]:
    return [
        f"{name} {getattr(a, name)} and {getattr(b, name)}"
        for name in names
        if getattr(a, name) != getattr(b, name)
    ]


def _head(checkpoint: Checkpoint) -> Tensor:
    return checkpoint.read(EMBEDDING if checkpoint.config.tie_word_embeddings else HEAD)


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Equal in every value, in the wider of the two dtypes."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(dtype), b.to(dtype))


def not_exposed(ids: Tensor, dtype: torch.dtype) -> list[str]:
    """What a comparison of outputs on ids [B, T] in this dtype cannot show."""
    length = ids.shape[-1]
    found = [f"a text of {length} tokens shows nothing of positions from {length} on"]
    if dtype.itemsize < 4:
        name, error = dtype_name("dtype", dtype), torch.finfo(dtype).eps / 2
        found.append(
            f"{name} rounds every value to {error:.2g} of it, and hides what is smaller: "
            "compare in float32 or float64 as well"
        )
    return found
