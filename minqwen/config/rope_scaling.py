"""YaRN's parameters, checked. model/rope.py computes with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minqwen.checks import boolean, integer, number, wrong

# The largest that are taken for true; beside them what models in use have.
MAX_CONTEXT = 1 << 27  # tokens; 10,485,760: Llama 4 Scout
MAX_FACTOR = 4096.0  # 64: Kimi K2's YaRN
BETAS = (1e-3, 1e4)  # rotations; 32 and 1, which YaRN's authors chose
SCALES = (1e-3, 1e3)  # of cos and sin; 1.2 at factor 8


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071), the only RoPE scaling that Qwen2.5 uses.

    The names are transformers'. Raises ConfigError.

    factor                            context extension, at least 1
    original_max_position_embeddings  positions seen in training
    attention_factor                  multiplies cos and sin; None derives it from factor, mscale
                                      and mscale_all_dim
    beta_fast, beta_slow              rotations over the original context that bound the ramp
    mscale, mscale_all_dim            0 means unset, as in transformers
    truncate                          round the ends of the ramp outwards to whole dimensions
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ROPE_FIELDS}
        for name, value in checked_fields("RopeScaling", given).items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @classmethod
    def from_fields(cls, where: str, given: Mapping[str, Any]) -> RopeScaling:
        """From fields under their names, where errors call the place `where`.

        `given` must hold the two fields that have no default.
        """
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        return cls(**checked_fields(where, defaults | dict(given)))


ROPE_FIELDS = tuple(field.name for field in dataclasses.fields(RopeScaling))


def checked_fields(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All of RopeScaling's fields, numbers as floats; ConfigError that begins with `where`."""
    fields = dict(given)
    fields["factor"] = number(f"{where}.factor", fields["factor"], 1.0, MAX_FACTOR, open_low=False)
    key = "original_max_position_embeddings"
    fields[key] = integer(f"{where}.{key}", fields[key], 1, MAX_CONTEXT)
    if fields["factor"] * fields[key] > MAX_CONTEXT:
        expected = f"at most {MAX_CONTEXT:,} tokens in all, over {fields[key]:,} original ones"
        raise wrong(f"{where}.factor", fields["factor"], expected)
    for key in ("beta_fast", "beta_slow"):
        fields[key] = number(f"{where}.{key}", fields[key], *BETAS, open_low=False)
    if fields["beta_fast"] < fields["beta_slow"]:
        expected = f"at least beta_slow ({fields['beta_slow']:g})"
        raise wrong(f"{where}.beta_fast", fields["beta_fast"], expected, "exchange the two")
    key = "attention_factor"
    if fields[key] is not None:
        fields[key] = number(f"{where}.{key}", fields[key], *SCALES, open_low=False)
    for key in ("mscale", "mscale_all_dim"):
        if fields[key] is not None:
            fields[key] = number(f"{where}.{key}", fields[key], 0.0, SCALES[1], open_low=False)
    boolean(f"{where}.truncate", fields["truncate"])
    return fields
