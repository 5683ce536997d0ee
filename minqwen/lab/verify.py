"""Is checkpoint B the same model as checkpoint A, with other heads? If not, where and why not?

Four examinations. verify_configs.py compares what no weight shows. `inspect_heads` reads the
attention's weights: which head of A each slot of B holds, which keys it reads, and what its o_proj
columns add up to. These are the three rules of heads/layout.py, and what breaks one is named.
verify_rest.py compares all other weights. `compare_models` runs both models and measures B's error
in units of A's own (lab/compare.py). No threshold is guessed. B is the same model only if no
examination says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from minqwen.checkpoint import Checkpoint, load_pretrained
from minqwen.checks import dtype_name
from minqwen.config import ModelConfig
from minqwen.heads.proposals import cost
from minqwen.lab.compare import (
    Compared,
    Verdict,
    faithful,
    first_difference,
    logit_difference,
    same_greedy_text,
)
from minqwen.lab.verify_configs import differing_settings, not_exposed
from minqwen.lab.verify_rest import differing_weights, not_compared
from minqwen.model import Qwen2
from minqwen.model.qwen2 import make_arithmetic
from minqwen.parallel import SINGLE

Read = Callable[[str], Tensor]  # a parameter's name -> its value

# ---- the weights ---------------------------------------------------------------------------------

COPY = 0.01  # relative distance up to which rows of q, k or v are a copy of a head's
TINY = 1e-300  # in place of a norm of zero


@dataclass
class LayerMap:
    """What one layer of B is made of, in A's heads."""

    layer: int
    heads: list[int | None]  # slot -> the query head of A whose q rows it has
    shares: list[float]  # slot -> its o_proj columns over that head's, least squares
    kv: list[int | None]  # KV slot -> the KV head of A
    wrong_kv: list[int]  # heads of A that contribute through another head's keys and values
    wrong_sum: dict[int, float]  # head of A -> relative error of its slots' summed o_proj columns
    wrong_bias: list[int]  # slots whose q bias is not their head's
    wrong_kv_bias: list[int]  # KV slots whose k or v bias is not their head's
    stray: list[int]  # slots that hold no head of A but add to the output

    @property
    def right(self) -> bool:
        broken = (self.wrong_kv, self.wrong_sum, self.wrong_bias, self.wrong_kv_bias, self.stray)
        return not any(broken)

    def contributing(self) -> list[tuple[int, int]]:
        """(slot, head of A) of every slot that gives a part of a head to the output."""
        return [
            (slot, head)
            for slot, (head, share) in enumerate(zip(self.heads, self.shares))
            if head is not None and share
        ]


@dataclass(frozen=True)
class HeadWeights:
    """One layer's attention weights, a row for each head, in float64."""

    q: Tensor  # [H, d D]
    q_bias: Tensor  # [H, d]
    k: Tensor  # [K, d D]
    k_bias: Tensor  # [K, d]
    v: Tensor  # [K, d D]
    v_bias: Tensor  # [K, d]
    o: Tensor  # [H, D d]

    @classmethod
    def read(cls, config: ModelConfig, read: Read, layer: int) -> HeadWeights:
        prefix = f"model.layers.{layer}.self_attn."
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

        def rows(name: str, count: int) -> Tensor:
            return read(prefix + name).double().reshape(count, -1)

        columns: Tensor = read(prefix + "o_proj.weight").double().unflatten(1, (heads, -1))
        return cls(
            q=rows("q_proj.weight", heads),
            q_bias=rows("q_proj.bias", heads),
            k=rows("k_proj.weight", kv_heads),
            k_bias=rows("k_proj.bias", kv_heads),
            v=rows("v_proj.weight", kv_heads),
            v_bias=rows("v_proj.bias", kv_heads),
            o=columns.transpose(0, 1).flatten(1),
        )

    @property
    def group_size(self) -> int:
        return len(self.q) // len(self.k)


@dataclass(frozen=True)
class Match:
    """B's slots and the heads of A that they hold, in one layer. Each rule is a method."""

    a: HeadWeights
    b: HeadWeights
    kv: list[int | None]
    heads: list[int | None]

    @classmethod
    def of(cls, a: HeadWeights, b: HeadWeights) -> Match:
        keys, values = nearest(b.k, a.k), nearest(b.v, a.v)
        kv = [k if k == v else None for k, v in zip(keys, values)]
        # Two heads of A may have equal q rows. Then a slot holds the one whose keys it reads.
        readers = [
            [h for h in range(len(a.q)) if kv[j // b.group_size] == h // a.group_size]
            for j in range(len(b.q))
        ]
        return cls(a, b, kv, nearest(b.q, a.q, readers))

    def used(self) -> Iterator[tuple[int, int | None]]:
        """(slot, head) of every slot with columns of o_proj that are not zero."""
        for slot, head in enumerate(self.heads):
            if self.b.o[slot].any():
                yield slot, head

    def shares(self) -> list[float]:
        """The factor on the head's o_proj columns in each slot, by least squares."""
        found = []
        for slot, head in enumerate(self.heads):
            if head is None:
                found.append(0.0)
            else:
                own = self.a.o[head]
                found.append(float(self.b.o[slot] @ own / (own @ own).clamp_min(TINY)))
        return found

    def wrong_kv(self) -> list[int]:
        """Rule 1: heads of A that contribute through another head's keys and values."""
        wrong = set()
        for slot, head in self.used():
            if head is not None and self.kv[slot // self.b.group_size] != head // self.a.group_size:
                wrong.add(head)
        return sorted(wrong)

    def wrong_sum(self) -> dict[int, float]:
        """Rule 2: heads of A whose slots' o_proj columns do not add up, and the relative error."""
        sums = torch.zeros_like(self.a.o)
        for slot, head in enumerate(self.heads):
            if head is not None:
                sums[head] += self.b.o[slot]
        return {
            head: float((total - own).norm() / own.norm())
            for head, (total, own) in enumerate(zip(sums, self.a.o))
            if not close(total, own)
        }

    def wrong_bias(self) -> list[int]:
        """Rule 3 for q: slots whose bias is not their head's."""
        return [
            slot
            for slot, head in self.used()
            if head is not None and not close(self.b.q_bias[slot], self.a.q_bias[head])
        ]

    def wrong_kv_bias(self) -> list[int]:
        """Rule 3 for k and v: KV slots whose bias is not their head's."""
        return [s for s, k in enumerate(self.kv) if k is not None and not self._same_kv_bias(s, k)]

    def _same_kv_bias(self, slot: int, head: int) -> bool:
        a, b = self.a, self.b
        return close(b.k_bias[slot], a.k_bias[head]) and close(b.v_bias[slot], a.v_bias[head])

    def stray(self) -> list[int]:
        """Slots that hold no head of A but add to the output."""
        return [slot for slot, head in self.used() if head is None]


def inspect_layer(
    config_a: ModelConfig, config_b: ModelConfig, read_a: Read, read_b: Read, layer: int
) -> LayerMap:
    """Match B's slots with A's heads by their weights."""
    match = Match.of(
        HeadWeights.read(config_a, read_a, layer), HeadWeights.read(config_b, read_b, layer)
    )
    return LayerMap(
        layer=layer,
        heads=match.heads,
        shares=match.shares(),
        kv=match.kv,
        wrong_kv=match.wrong_kv(),
        wrong_sum=match.wrong_sum(),
        wrong_bias=match.wrong_bias(),
        wrong_kv_bias=match.wrong_kv_bias(),
        stray=match.stray(),
    )


def inspect_layers(
    config_a: ModelConfig, config_b: ModelConfig, read_a: Read, read_b: Read
) -> list[LayerMap]:
    """Every layer's map, from the first to the last."""
    return [
        inspect_layer(config_a, config_b, read_a, read_b, layer)
        for layer in range(config_a.num_hidden_layers)
    ]


def inspect_heads(a: Checkpoint, b: Checkpoint) -> list[LayerMap]:
    """The same for two checkpoints. They must be equal in layers, hidden_size and head_dim."""
    return inspect_layers(a.config, b.config, a.read, b.read)


def nearest(
    rows: Tensor, heads: Tensor, preferred: list[list[int]] | None = None
) -> list[int | None]:
    """For each of `rows` the one of `heads` that it is a copy of, or None. `preferred` come first.

    rows [n, w], heads [m, w]. A copy is nearer than 1 % of the head's norm.
    """
    gaps = torch.cdist(rows, heads) / heads.norm(dim=1).clamp_min(TINY)
    found: list[int | None] = []
    for j, gap in enumerate(gaps.tolist()):
        wanted = preferred[j] if preferred else []
        candidates = [h for h in wanted if gap[h] < COPY] or range(len(gap))
        best = min(candidates, key=gap.__getitem__)
        found.append(best if gap[best] < COPY else None)
    return found


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to a rounding in bfloat16, which is what weighted shares may lose."""
    return float((a - b).norm()) <= 2.0**-8 * float(b.norm())


def problems(maps: list[LayerMap]) -> list[str]:
    """The rules that are broken, in words, over all layers."""
    found = []
    if wrong := _all(m.wrong_kv for m in maps):
        found.append(
            f"query heads {wrong} read another head's keys and values: "
            "new heads were not placed per KV group"
        )
    if sums := _all(m.wrong_sum for m in maps):
        worst = max(error for m in maps for error in m.wrong_sum.values())
        found.append(
            f"the o_proj columns of query heads {sums} do not add up to the original's "
            f"(largest relative error {worst:.2g})"
        )
    if kv_bias := _all(m.wrong_kv_bias for m in maps):
        found.append(f"the k or v bias of KV slots {kv_bias} is not that of the head they hold")
    if bias := _all(m.wrong_bias for m in maps):
        found.append(f"the q bias of slots {bias} is not that of the head they hold")
    if stray := _all(m.stray for m in maps):
        found.append(f"slots {stray} hold none of the original's heads but add to the output")
    return found


def _all(layers: Iterable[Iterable[int]]) -> list[int]:
    return sorted({number for layer in layers for number in layer})


# ---- the outputs ---------------------------------------------------------------------------------


@dataclass
class Report:
    """What the examinations found.

    outputs: the verdict on the logits alone. error_a, error_b: root mean square of the logits'
    errors against float64; error_a is that of a faithful implementation of A. units: error_b /
    error_a. The logits' differences are those of compare.LogitDifference.
    """

    dtype: str
    arithmetic: str
    outputs: Verdict
    units: float
    error_a: float
    error_b: float
    max_abs: float
    mean_abs: float
    cosine: float
    kl: float  # nats per token, A from B
    kl_p99: float
    kl_max: float
    top1: float
    top5: float
    perplexity_ratio: float
    greedy_match: bool
    first_layer: int | None
    first_stage: str | None  # "q", "kv", "attention", "o", "residual" or "logits"
    head_errors: list[list[float]]  # layer x head of A: error of z in units
    parameters: int
    kv_bytes: int
    attention_macs: dict[int, float]
    layers: list[LayerMap] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)  # by which the configs mean two functions
    problems: list[str] = field(default_factory=list)  # what is wrong with B's weights
    not_exposed: list[str] = field(default_factory=list)  # what the outputs cannot show

    @property
    def verdict(self) -> Verdict:
        """That on the outputs, unless configs or weights show a difference that they do not."""
        return "different" if self.settings or self.problems else self.outputs

    @property
    def same(self) -> bool:
        return self.verdict != "different"

    @property
    def reasons(self) -> list[str]:
        """Why B is another model, apart from its outputs; settings come first."""
        return [f"config.json: {text}" for text in self.settings] + self.problems


STAGES = (  # (stage, point) in the order of computation
    ("q", "attn.rot_q"),
    ("kv", "attn.rot_k"),
    ("kv", "attn.v"),
    ("attention", "attn.z"),
    ("o", "attn.out"),
    ("residual", "resid_post"),
)


@dataclass(frozen=True)
class Run:
    """A model's logits [B, T, V] in float64, and what passed the points of STAGES."""

    logits: Tensor
    seen: dict[str, Tensor]

    @classmethod
    def of(cls, model: Qwen2, ids: Tensor) -> Run:
        logits, seen = model.run_with_cache(ids, [f"*.{point}" for _, point in STAGES])
        return cls(logits.double(), seen)

    def at(self, point: str, heads: list[int] | None = None) -> Tensor:
        """The tensor at a point, float64; only these heads of [B, T, heads, d] where given."""
        x = self.seen[point].double()
        return x if heads is None else x[:, :, heads]


@dataclass(frozen=True)
class Runs:
    """The same text through A, B, a faithful implementation of A, and A in float64."""

    original: Run
    candidate: Run
    faithful: Run
    truth: Run

    @classmethod
    def of(cls, a: Qwen2, b: Qwen2, truth: Qwen2, ids: Tensor) -> Runs:
        original, second = Run.of(a, ids), faithful(a)
        return cls(
            original=original,
            candidate=Run.of(b, ids),
            faithful=original if second is a else Run.of(second, ids),
            truth=Run.of(truth, ids),
        )

    def logits(self) -> Compared:
        runs = (self.original, self.candidate, self.faithful, self.truth)
        return Compared(*(run.logits for run in runs))

    def at(
        self, point: str, heads_a: list[int] | None = None, heads_b: list[int] | None = None
    ) -> Compared:
        """One point; where heads are given, head n of heads_b beside head n of heads_a."""
        return Compared(
            original=self.original.at(point, heads_a),
            candidate=self.candidate.at(point, heads_b),
            faithful=self.faithful.at(point, heads_a),
            truth=self.truth.at(point, heads_a),
        )


@torch.inference_mode()
def compare_models(
    a: Qwen2, b: Qwen2, truth: Qwen2, ids: Tensor, maps: list[LayerMap], greedy_tokens: int = 16
) -> Report:
    """Run A, B and A in float64 (`truth`) on ids [B, T].

    maps: from `inspect_heads`; without them no head and no layer is compared. Greedy continuations
    are of the first sequence.
    """
    runs = Runs.of(a, b, truth, ids)
    logits = runs.logits()
    difference = logit_difference(logits.original, logits.candidate, ids)
    costs = cost(a.config, b.config)
    outputs = logits.verdict
    first_layer, first_stage = None, None
    if outputs == "different":
        found = first_difference(_stages(runs, maps), a.ops.order_free)
        first_layer, first_stage = found or (a.config.num_hidden_layers, "logits")
    return Report(
        dtype=dtype_name("dtype", a.dtype),
        arithmetic=a.ops.name,
        outputs=outputs,
        units=logits.units,
        error_a=logits.unit,
        error_b=logits.error,
        **asdict(difference),
        greedy_match=same_greedy_text(a, b, ids[:1], greedy_tokens),
        first_layer=first_layer,
        first_stage=first_stage,
        head_errors=[_head_errors(runs, m, a.config.num_attention_heads) for m in maps],
        parameters=costs.parameters,
        kv_bytes=costs.kv_bytes,
        attention_macs=costs.attention_macs,
        layers=maps,
        problems=problems(maps),
    )


def _stages(runs: Runs, maps: list[LayerMap]) -> Iterator[tuple[tuple[int, str], Compared]]:
    """((layer, stage), tensors) in the order of computation. B's heads are put in A's order."""
    for i, layer in enumerate(maps):
        slots = layer.contributing()
        kv_slots = [(slot, head) for slot, head in enumerate(layer.kv) if head is not None]
        for stage, point in STAGES:
            name = f"layers.{i}.{point}"
            if stage in ("q", "attention"):
                compared = runs.at(name, *_both(slots))
            elif stage == "kv":
                compared = runs.at(name, *_both(kv_slots))
            else:
                compared = runs.at(name)
            yield (i, stage), compared


def _both(slots: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """(A's heads, B's slots)."""
    return [head for _, head in slots], [slot for slot, _ in slots]


def _head_errors(runs: Runs, layer: LayerMap, heads: int) -> list[float]:
    """For each head of A the error of its output z, in units; of its slots in B the worst."""
    worst = [0.0] * heads
    point = f"layers.{layer.layer}.attn.z"
    for slot, head in layer.contributing():
        z = runs.at(point, [head], [slot])
        worst[head] = max(worst[head], z.error / max(z.unit, TINY))
    return worst


def verify_checkpoints(
    a: Checkpoint, b: Checkpoint, ids: Tensor, dtype: torch.dtype, arithmetic: str
) -> Report:
    """All examinations of two checkpoints, on ids [B, T], in one dtype and arithmetic.

    They must be equal in `differing_sizes`. What `arithmetic` cannot compute is refused first.
    """
    for checkpoint in (a, b):
        make_arithmetic(arithmetic).check(checkpoint.config, dtype, SINGLE)
    maps = inspect_heads(a, b)
    report = compare_models(
        load_pretrained(a.path, dtype=dtype, arithmetic=arithmetic),
        load_pretrained(b.path, dtype=dtype, arithmetic=arithmetic),
        load_pretrained(a.path, dtype=torch.float64),
        ids,
        maps,
    )
    report.settings = differing_settings(a, b)
    report.problems += differing_weights(a, b)
    report.not_exposed = not_exposed(ids, dtype) + not_compared(a, b)
    return report


def as_json(report: Report) -> str:
    return json.dumps({"verdict": report.verdict, **asdict(report)}, indent=1) + "\n"


def unlike_as_json(settings: list[str]) -> str:
    """The report on two checkpoints that cannot be run side by side."""
    return json.dumps({"verdict": "different", "settings": settings}, indent=1) + "\n"
