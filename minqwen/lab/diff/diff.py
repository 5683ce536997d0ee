"""Is another engine right, and if not, where does it go wrong first?

The engine's intermediates (a *candidate*) are held against float64, point by point in the order of
computation (lab/compare.py). Each point has two errors in units of a faithful implementation's: the
whole one, and what was added since the points before it, which is the operation repeated in float64
on the candidate's own inputs. What is *added* decides. A point is wrong if it adds more than
rounding (`limit`); a point that only passes on what it was given has inherited its error.

Every error is added somewhere: the first points are computed from the ids. So a candidate agrees if
no point adds more than rounding, however few points it has.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from minqwen.checks import dtype_name
from minqwen.config import ModelConfig
from minqwen.errors import MinqwenError
from minqwen.lab.compare import (
    POINT_ROUNDING,
    ROUNDING,
    LogitMeasure,
    Measure,
    faithful,
    in_units,
    measure,
    measure_logits,
    pooled,
    recompute,
)
from minqwen.lab.faults import Weights, build
from minqwen.model import Qwen2
from minqwen.model.trace import BY_NAME, point_names, point_of

Verdict = Literal["agree", "diverge", "refused"]
PointVerdict = Literal["rounding", "inherited", "wrong"]
Tensors = Mapping[str, Tensor]

OPERATIONS = {
    "embed": "embedding",
    "resid_pre": "residual stream",
    "norm1.normalized": "input_layernorm before its weight",
    "norm1": "input_layernorm",
    "attn.q": "q_proj",
    "attn.k": "k_proj",
    "attn.v": "v_proj",
    "attn.rot_q": "rotary embedding of queries",
    "attn.rot_k": "rotary embedding of keys",
    "attn.scores": "attention scores",
    "attn.pattern": "attention pattern",
    "attn.z": "attention's weighted values",
    "attn.result": "each head's share of o_proj",
    "attn.out": "o_proj",
    "resid_mid": "residual stream after attention",
    "norm2.normalized": "post_attention_layernorm before its weight",
    "norm2": "post_attention_layernorm",
    "mlp.gate": "gate_proj",
    "mlp.up": "up_proj",
    "mlp.act": "MLP's activation",
    "mlp.out": "down_proj",
    "resid_post": "residual stream after the MLP",
    "final_norm.normalized": "final norm before its weight",
    "final_norm": "final norm",
    "logits": "lm_head",
}
# Points of the same layer that are computed before another one, but not for it.
BESIDE = {
    "attn.k": ("attn.q",),
    "attn.v": ("attn.q", "attn.k"),
    "attn.rot_q": ("attn.k", "attn.v"),
    "attn.rot_k": ("attn.v", "attn.rot_q"),
    "mlp.up": ("mlp.gate",),
}
# What lies between two points and is no operation that anybody would miss.
UNNAMED = {"resid_pre", "norm1.normalized", "norm2.normalized", "final_norm.normalized"}


class Candidate(Protocol):
    """What another engine computed: several forward passes. `lab/diff/dumps.py: Dump` is one."""

    @property
    def passes(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def ids(self, n: int) -> list[int] | None: ...

    def positions(self, n: int) -> list[int] | None: ...

    def names(self, n: int) -> list[str]: ...

    def read(self, n: int, name: str) -> Tensor: ...


class Prompt(Protocol):
    @property
    def ids(self) -> list[int]: ...


class Golden(Protocol):
    """What our own runs gave: `packs/pack.py: Pack` is one. Names are those of all its prompts."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def prompts(self) -> Sequence[Prompt]: ...

    @property
    def runs(self) -> Sequence[str]: ...

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def full_logits(self) -> bool: ...

    def read(self, run: str, prompt: int, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Text:
    """One forward pass of the candidate: its prompt's number and ids [T], and what it computed."""

    prompt: int
    ids: Tensor
    seen: dict[str, Tensor]


@dataclass(frozen=True)
class PointReport:
    """One point, over all texts.

    units: the whole error. added: that of the operation alone. The rest is of the text in which it
    is worst, and of the whole error.
    """

    point: str
    units: float
    added: float
    verdict: PointVerdict
    prompt: int
    worst: Measure

    @property
    def layer(self) -> int | None:
        return layer_of(self.point)


@dataclass(frozen=True)
class TokenErrors:
    """One text's tokens: for each layer's last point and the model's, each token's whole error."""

    prompt: int
    ids: list[int]
    names: list[str]
    units: list[list[float]]  # a row for each name, a number for each token


@dataclass(frozen=True)
class First:
    """The first wrong point, with the operation that is to blame."""

    layer: int | None
    operation: str
    point: str
    units: float  # added


@dataclass(frozen=True)
class Explanation:
    """A mistake of the catalogue that gives what the candidate has, to so many units."""

    name: str
    units: float
    symptom: str


@dataclass
class Report:
    """What was found."""

    verdict: Verdict
    dtype: str
    points: list[PointReport] = field(default_factory=list)
    first: First | None = None
    explained_by: Explanation | None = None
    also: list[Explanation] = field(default_factory=list)
    tokens: list[TokenErrors] = field(default_factory=list)
    logits: LogitMeasure | None = None  # of the text in which they are worst

    def sentence(self) -> str:
        """The verdict in one line."""
        if self.first is None:
            last = self.points[-1]
            return (
                f"agrees: {self.dtype} rounding at every point "
                f"({last.point} at {figure(last.units)} units)"
            )
        first = self.first
        if first.point == "input_ids" and self.explained_by is not None:
            return (
                f"first wrong: {first.operation}; just these ids come of `{self.explained_by.name}`"
            )
        where = "" if first.layer is None else f"layer {first.layer}, "
        said = f"first wrong: {where}{first.operation} ({figure(first.units)} units, added there); "
        if self.explained_by is None:
            return said + "none of the catalogue's mistakes explains it"
        others = f", as {', '.join(e.name for e in self.also)} would" if self.also else ""
        return (
            f"{said}most like `{self.explained_by.name}` "
            f"(explains the dump to {self.explained_by.units:.2f} units{others})"
        )


def figure(units: float) -> str:
    """1.02, 37, 8.2e3, infinite."""
    if not math.isfinite(units):
        return "infinite"
    return f"{units:.3g}" if units < 1000 else f"{units:.1e}".replace("e+0", "e").replace("e+", "e")


def layer_of(name: str) -> int | None:
    found = re.match(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def limit(name: str) -> float:
    """The units up to which what is added at a point is rounding."""
    return ROUNDING if name == "logits" else POINT_ROUNDING


# ---- what is compared ----------------------------------------------------------------------------


def read_texts(golden: Golden, candidate: Candidate) -> list[Text]:
    """The candidate's forward passes over whole prompts, each with its prompt.

    Raises MinqwenError for a pass that fits no prompt, and for one without any point.
    """
    texts: list[Text] = []
    known = point_names(golden.config.num_hidden_layers)
    for n in range(candidate.passes):
        if texts and goes_on(golden, candidate, n):
            continue
        prompt = find_prompt(golden, candidate, n)
        has = set(candidate.names(n))
        names = [name for name in known if name in has]
        if not names:
            raise MinqwenError(f"pass {n} of the dump has no point that a trace has")
        ids = torch.tensor(golden.prompts[prompt].ids)
        seen = {name: shown(name, candidate.read(n, name)) for name in names}
        texts.append(Text(prompt, ids, seen))
    if not texts:
        raise MinqwenError("the dump has no forward pass: run the model inside `with dump(...)`")
    return texts


def goes_on(golden: Golden, candidate: Candidate, n: int) -> bool:
    """Whether pass n decodes tokens after a prompt, which no prompt of the pack can show."""
    positions, ids = candidate.positions(n), candidate.ids(n)
    if not positions or positions[0] == 0:
        return False
    return all(list(prompt.ids) != ids for prompt in golden.prompts)


def shown(name: str, x: Tensor) -> Tensor:
    """A candidate's tensor, hidden scores as -inf: many engines add a very large number instead."""
    if point_of(name).name == "attn.scores":
        return x.masked_fill(x <= torch.finfo(x.dtype).min / 2, -math.inf)
    return x


class UnknownPrompt(MinqwenError):
    """A forward pass whose ids are no prompt of the pack."""

    def __init__(self, n: int, ids: list[int]):
        super().__init__(
            f"pass {n} of the dump has {len(ids)} ids that are no prompt of the pack, beginning "
            f"{ids[:6]}: give the engine the ids of the pack's manifest.json, one prompt at a time"
        )
        self.ids = ids


def find_prompt(golden: Golden, candidate: Candidate, n: int) -> int:
    """The number of the prompt that pass n is of.

    By its ids, or where the dump has none: the only prompt of its length, or the n-th one if every
    pass has a prompt of its length. Raises MinqwenError if there is none.
    """
    prompts = [list(prompt.ids) for prompt in golden.prompts]
    ids = candidate.ids(n)
    if ids is not None:
        if ids not in prompts:
            raise UnknownPrompt(n, ids)
        return prompts.index(ids)
    length = length_of(candidate, n)
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
    if len(fitting) == 1 or (n in fitting and candidate.passes == len(prompts)):
        return fitting[0] if len(fitting) == 1 else n
    raise MinqwenError(
        f"pass {n} of the dump has no input_ids, and {len(fitting)} of the pack's prompts have its "
        f"{length} tokens: add input_ids to the dump"
    )


def length_of(candidate: Candidate, n: int) -> int:
    """The tokens of a pass."""
    for name in candidate.names(n):
        shape = BY_NAME[re.sub(r"^layers\.\d+\.", "", name)].shape.split()
        return candidate.read(n, name).shape[shape.index("T")]
    return 0


@dataclass(frozen=True)
class Pair:
    """A model in the candidate's dtype, and in float64."""

    native: Qwen2
    truth: Qwen2

    @classmethod
    def of(cls, make: Callable[[torch.dtype], Qwen2], dtype: torch.dtype) -> Pair:
        """make: the model in a dtype. In float64 the faithful one adds in another order."""
        truth = make(torch.float64)
        return cls(faithful(truth) if dtype == torch.float64 else make(dtype), truth)

    def recomputed(self, text: Text, names: Sequence[str]) -> tuple[Tensors, Tensors]:
        """What the candidate's own inputs give at each of `names`: faithful, and in float64."""
        seen = {name: text.seen[name] for name in names}
        return recompute(self.native, text.ids, seen), recompute(self.truth, text.ids, seen)


def right_pair(config: ModelConfig, weights: Weights, dtype: torch.dtype) -> Pair:
    return Pair.of(lambda d: build(config, weights, d), dtype)


@dataclass(frozen=True)
class Reference:
    """What is right of each prompt: out of the pack where it is there, or else computed."""

    golden: Golden
    pair: Pair

    def whole(self, text: Text) -> tuple[Tensors, Tensors]:
        """Every point that the candidate has: of a faithful implementation, and in float64."""
        dtype = dtype_name("dtype", self.pair.native.dtype)
        truth = self._run(self.pair.truth, "float64", text)
        native = self._run(self.pair.native, f"native-{dtype}", text)
        exact = f"exact-{dtype}"
        return {name: self._same(text, exact, name, x) for name, x in native.items()}, truth

    def _run(self, model: Qwen2, run: str, text: Text) -> Tensors:
        held = set(self._held(run))
        missing = [name for name in text.seen if name not in held]
        found = {
            name: self.golden.read(run, text.prompt, name) for name in text.seen if name in held
        }
        if missing:
            _, seen = model.run_with_cache(text.ids[None], missing)
            found |= {name: seen[name][0] for name in missing}
        return {name: _last_rows(found[name], x) for name, x in text.seen.items()}

    def _held(self, run: str) -> list[str]:
        """The points that the pack has of a run."""
        if run not in self.golden.runs:
            return []
        return [name for name in self.golden.names if name != "logits" or self.golden.full_logits]

    def _same(self, text: Text, exact: str, name: str, native: Tensor) -> Tensor:
        """The run of ours that the candidate is equal to in every bit, or else the native one.

        Exact arithmetic is a faithful implementation too, with an error of its own. A candidate
        that has just these bits, in its own dtype, makes that error: 1 unit.
        """
        if name in self._held(exact):
            x = text.seen[name]
            other = _last_rows(self.golden.read(exact, text.prompt, name), x)
            if torch.equal(x, other.to(x.dtype)):
                return other
        return native


def _last_rows(whole: Tensor, part: Tensor) -> Tensor:
    """As much of a tensor as the candidate has: engines may give the last tokens' logits only."""
    return whole[-len(part) :]


# ---- the comparison ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A point's measures: one for each text, of the whole error and of what was added."""

    whole: dict[int, Measure]
    added: list[Measure]

    def report(self, name: str) -> PointReport:
        units, added = pooled(self.whole.values()), pooled(self.added)
        worst = max(self.whole, key=lambda i: self.whole[i].units)
        verdict: PointVerdict = "rounding"
        if not added <= limit(name):
            verdict = "wrong"
        elif not units <= limit(name):
            verdict = "inherited"
        return PointReport(name, units, added, verdict, worst, self.whole[worst])


@torch.inference_mode()
def compare(reference: Reference, texts: Sequence[Text], dtype: str) -> Report:
    """Every point of the candidate, without a diagnosis."""
    found: dict[str, Found] = {}
    tokens, logits = [], []
    for text in texts:
        check_shapes(text, reference.golden.config)
        right = reference.whole(text)
        again = reference.pair.recomputed(text, list(text.seen))
        for name, x in text.seen.items():
            at = found.setdefault(name, Found({}, []))
            at.whole[text.prompt] = measure(x, right[0][name], right[1][name])
            at.added.append(measure(x, again[0][name], again[1][name]))
        tokens.append(token_errors(text, *right))
        if "logits" in text.seen:
            three = (text.seen["logits"], right[0]["logits"], right[1]["logits"])
            logits.append(measure_logits(*three, text.ids[-len(three[0]) :]))
    order = point_names(reference.golden.config.num_hidden_layers)
    points = [found[name].report(name) for name in order if name in found]
    wrong = next((point for point in points if point.verdict == "wrong"), None)
    report = Report("diverge" if wrong else "agree", dtype, points, tokens=tokens)
    report.logits = max(logits, key=lambda found: found.measure.units, default=None)
    if wrong is not None:
        operation = operation_at(wrong.point, list(found))
        report.first = First(wrong.layer, operation, wrong.point, wrong.added)
    return report


def check_shapes(text: Text, config: ModelConfig) -> None:
    """Raise MinqwenError for a tensor that does not fit the pack's config and prompt."""
    for name, x in text.seen.items():
        wanted = shape_at(name, config, len(text.ids))
        fewer_rows = name == "logits" and 0 < len(x) <= wanted[0] and x.shape[1:] == wanted[1:]
        if tuple(x.shape) != wanted and not fewer_rows:
            raise MinqwenError(
                f"{name} of the dump is {list(x.shape)}, the pack's model and prompt give "
                f"{list(wanted)}: dump one prompt at a time, without padding, of the same model"
            )


def shape_at(name: str, config: ModelConfig, length: int) -> tuple[int, ...]:
    """The shape of a point's tensor for one prompt."""
    sizes = {
        "T": length,
        "L": length,
        "D": config.hidden_size,
        "H": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "d": config.head_dim,
        "I": config.intermediate_size,
        "V": config.vocab_size,
    }
    return tuple(sizes[letter] for letter in point_of(name).shape.split())


def token_errors(text: Text, right: Tensors, truth: Tensors) -> TokenErrors:
    """Each token's whole error at the last point of each layer and at those behind the layers."""
    last = {layer_of(name): name for name in text.seen if _by_token(name)}
    behind = [name for name in ("final_norm", "logits") if name in text.seen]
    names = [name for layer, name in last.items() if layer is not None] + behind
    rows = [units_by_token(text.seen[n], right[n], truth[n]) for n in names]
    return TokenErrors(text.prompt, text.ids.tolist(), names, rows)


def _by_token(name: str) -> bool:
    return point_of(name).shape.startswith("T")


def units_by_token(candidate: Tensor, right: Tensor, truth: Tensor) -> list[float]:
    """The error of each row, in units of a faithful implementation's in all rows."""
    unit = measure(right, right, truth).error
    rows = (candidate.double() - truth.double()).flatten(1).square().mean(1).sqrt()
    return [in_units(error, unit) for error in rows.tolist()]


# ---- words ---------------------------------------------------------------------------------------


def operation_at(name: str, has: Sequence[str]) -> str:
    """The operation that computes a point; where others before it were not dumped, all of them.

    has: the points that were dumped.
    """
    layers = 1 + max(layer_of(other) or 0 for other in (name, *has))
    order, point = point_names(layers), point_of(name).name
    before = [other for other in order[: order.index(name)] if not _beside(other, name)]
    known = [other for other in before if other in has]
    start = before.index(known[-1]) + 1 if known else 0
    missing = [other for other in before[start:] if point_of(other).name not in UNNAMED]
    if not missing:
        return OPERATIONS[point]
    part = {"attn": "attention", "mlp": "MLP"}.get(point.partition(".")[0], OPERATIONS[point])
    if point == "attn.z" and known and point_of(known[-1]).name == "attn.v":
        return "attention (between q, k, v and z)"
    return f"{part} (between {known[-1] if known else 'the tokens'} and {name})"


def _beside(other: str, name: str) -> bool:
    """Whether a point before `name` in the order of computation is no input of it."""
    same_layer = layer_of(other) == layer_of(name)
    return same_layer and point_of(other).name in BESIDE.get(point_of(name).name, ())


# ---- JSON ----------------------------------------------------------------------------------------


def as_json(report: Report) -> str:
    """null stands for what is infinite or not a number."""
    first = report.first
    value: dict[str, Any] = {
        "verdict": report.verdict,
        "sentence": report.sentence(),
        "dtype": report.dtype,
        "first": None if first is None else vars(first),
        "explained_by": None if report.explained_by is None else vars(report.explained_by),
        "also": [vars(other) for other in report.also],
        "logits": None if report.logits is None else vars(report.logits.difference),
        "points": [_point_as_json(point) for point in report.points],
    }
    return json.dumps(_finite(value), indent=1) + "\n"


def refused_as_json(reason: str) -> str:
    """What is written where nothing could be compared."""
    value = {"verdict": "refused", "reason": reason, "first": None, "explained_by": None}
    return json.dumps({**value, "points": []}, indent=1) + "\n"


def _point_as_json(point: PointReport) -> dict[str, Any]:
    worst = point.worst
    return {
        "point": point.point,
        "layer": point.layer,
        "verdict": point.verdict,
        "units": point.units,
        "added": point.added,
        "prompt": point.prompt,
        "max_abs": worst.max_abs,
        "at": list(worst.at),
        "relative_l2": worst.relative_l2,
        "cosine": worst.cosine,
        "ulps": worst.ulps,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
