"""One check for each kind of value that a file or a caller can get wrong.

Each check returns the value, or raises `error` (ConfigError unless the caller names another class)
in one line: where, what was found, what was expected, what to do. `where` names the value for the
user: "/models/7b/config.json: vocab_size", or "top_p".
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from minqwen.errors import ConfigError, MinqwenError
from minqwen.files import printable
from minqwen.files import quoted as quoted  # the model's room takes it from here

ErrorClass = type[MinqwenError]
# Every dtype that weights and caches can have, under torch's name.
BYTES_PER_ELEMENT = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
MAX_TOKEN_ID = 2**31 - 1  # far beyond any vocabulary, and what every reader can hold
MAX_TOKEN_IDS = 100_000  # in one list
LONGEST_WORD = 100  # that is compared with others: for a megabyte that takes seconds
MAX_INTEGER = 2**63 - 1  # what torch and JSON readers in other languages can hold


def wrong(
    where: str,
    found: object,
    expected: str,
    remedy: str = "correct it",
    *,
    error: ErrorClass = ConfigError,
) -> MinqwenError:
    """The error to raise. Its text is one printable line, whatever a file holds."""
    return error(printable(f"{where} is {quoted(found, 100)}, expected {expected}; {remedy}"))


def is_integer(value: object) -> bool:
    """True for an integer of Python or numpy, but not for True and False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_id_text(text: str) -> bool:
    """Whether a key of JSON is a token id, written with the digits 0 to 9 and not endless."""
    return text.isascii() and text.isdigit() and len(text) < 20


def integer(
    where: str,
    value: Any,
    minimum: int,
    maximum: int = MAX_INTEGER,
    *,
    error: ErrorClass = ConfigError,
) -> int:
    """An integer from `minimum` to `maximum`, which is at most what fits in 64 bits."""
    if not is_integer(value) or not minimum <= value <= maximum:
        raise wrong(where, value, _range(minimum, maximum), error=error)
    return int(value)


def optional_integer(
    where: str,
    value: Any,
    minimum: int,
    maximum: int = MAX_INTEGER,
    *,
    error: ErrorClass = ConfigError,
) -> int | None:
    """None, or what `integer` takes."""
    if value is None:
        return None
    if not is_integer(value) or not minimum <= value <= maximum:
        raise wrong(where, value, f"{_range(minimum, maximum)} or null", error=error)
    return int(value)


def _range(minimum: int, maximum: int) -> str:
    above = "" if maximum == MAX_INTEGER else f" and at most {maximum:,}"
    return f"an integer of at least {minimum}{above}"


def number(
    where: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    *,
    open_low: bool = True,
    error: ErrorClass = ConfigError,
) -> float:
    """A finite number in (low, high], or in [low, high] where open_low is False.

    Integers are numbers too; the result is always a float.
    """
    if is_finite(value) and value <= high and (low < value or (low == value and not open_low)):
        return float(value)
    wanted = f"a finite number {'above' if open_low else 'of at least'} {low:g}"
    if high != math.inf:
        wanted += f" and at most {high:g}"
    raise wrong(where, value, wanted, error=error)


def is_finite(value: Any) -> bool:
    """True for a finite number of Python or numpy, but not for True and False."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # an integer that no float can hold
        return False


def boolean(where: str, value: Any, *, error: ErrorClass = ConfigError) -> bool:
    """True or False; not 1, not "true"."""
    if not isinstance(value, bool):
        raise wrong(where, value, "true or false", error=error)
    return value


def token_ids(where: str, value: Any, *, error: ErrorClass = ConfigError) -> tuple[int, ...]:
    """A token id, a list of them, or None, as a tuple without repeats."""
    if value is None:
        return ()
    ids = value if isinstance(value, (list, tuple)) else [value]
    if len(ids) > MAX_TOKEN_IDS or not all(
        is_integer(id) and 0 <= id <= MAX_TOKEN_ID for id in ids
    ):
        raise wrong(where, value, "a token id, a list of token ids, or null", error=error)
    return tuple(dict.fromkeys(int(id) for id in ids))


def one_of(
    where: str,
    value: Any,
    allowed: tuple[str, ...],
    remedy: str = "correct it",
    *,
    error: ErrorClass = ConfigError,
) -> str:
    """One of the `allowed` strings."""
    # A JSON value may be a list, which cannot be looked up in a set: compare one by one.
    if not isinstance(value, str) or value not in allowed:
        raise wrong(where, value, " or ".join(map(repr, allowed)), remedy, error=error)
    return value


def mapping(
    where: str,
    value: Any,
    expected: str = "an object",
    remedy: str = "correct it",
    *,
    error: ErrorClass = ConfigError,
) -> Mapping[str, Any]:
    """A JSON object: a mapping whose keys are names."""
    if not isinstance(value, Mapping):
        raise wrong(where, value, expected, remedy, error=error)
    return value


def dtype_name(where: str, value: Any, *, error: ErrorClass = ConfigError) -> str:
    """A dtype (its name, or a torch.dtype) as one of the names in BYTES_PER_ELEMENT."""
    name = str(value).removeprefix("torch.")
    if name not in BYTES_PER_ELEMENT:
        raise wrong(where, value, f"one of {', '.join(BYTES_PER_ELEMENT)}", error=error)
    return name


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """ "; did you mean 'exact'?" if one of the choices is close to the word, else ""."""
    if len(word) > LONGEST_WORD:
        return ""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# What people bring from transformers and vLLM, and what to do instead. {value} is what they gave.
UNQUANTISED = (
    "AWQ and GPTQ checkpoints are loaded as such, and dequantised: leave it out; to save room use "
    "dtype='bfloat16' or offload='memory'"
)
_ONE_WAY = "there is only one way here: leave it out"
_NO_DOWNLOAD = "minqwen downloads nothing: give the directory of a checkpoint"
OF_OTHERS = {
    "torch_dtype": "use dtype='{value}'",
    "device_map": "use device='cpu' or device='cuda'",
    "load_in_8bit": UNQUANTISED,
    "load_in_4bit": UNQUANTISED,
    "quantization": UNQUANTISED,
    "quantization_config": UNQUANTISED,
    "tensor_parallel_size": "start the script with torchrun --nproc-per-node {value}",
    "cpu_offload_gb": "use offload='memory'",
    "attn_implementation": _ONE_WAY,
    "enforce_eager": _ONE_WAY,
    "trust_remote_code": _ONE_WAY,
    "use_cache": _ONE_WAY,
    "revision": _NO_DOWNLOAD,
    "cache_dir": _NO_DOWNLOAD,
    "download_dir": _NO_DOWNLOAD,
    "token": _NO_DOWNLOAD,
}


def refuse_unknown_arguments(
    given: Mapping[str, object], known: Iterable[str], meant: Iterable[str] = ()
) -> None:
    """Raise ConfigError for a keyword argument that is not known: it says what to use instead.

    meant: names besides the known ones that a misspelled one may stand for.
    """
    names = sorted(known)
    for name, value in given.items():
        if name in OF_OTHERS and name not in names:
            hint = OF_OTHERS[name].format(value=printable(str(value).removeprefix("torch.")))
            raise ConfigError(f"there is no argument {name!r}: {hint}")
        if name not in names:
            raise ConfigError(
                f"there is no argument {name!r}, expected one of {', '.join(names)}"
                f"{did_you_mean(name, [*names, *meant])}"
            )


def refuse_unknown_fields(
    kind: type[Any], given: Iterable[str], instead: Mapping[str, str], error: ErrorClass
) -> None:
    """Raise `error` for a name that is no field of a dataclass: it says which one is meant.

    instead: what to do in place of fields that other engines have.
    """
    fields = [name for name in kind.__dataclass_fields__ if not name.startswith("_")]
    for name in given:
        if name in instead:
            raise error(f"{kind.__name__} has no field {name!r}: {instead[name]}")
        if name not in fields:
            hint = did_you_mean(name, fields) or f": expected one of {', '.join(fields)}"
            raise error(f"{kind.__name__} has no field {name!r}{hint}")
