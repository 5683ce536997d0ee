"""Is checkpoint B the same model as checkpoint A, with other heads? And if not, where and why not?

Two examinations. `inspect_heads` reads the weights: which head each slot of B holds, which keys it reads, what
its o_proj columns add up to: the three rules of lab/heads.py, with names. `compare` runs both: A in float64 is the
truth, A's own error in the dtype at hand is the unit, and B is the same model if its error is not larger than 1.5
units. No threshold is guessed.
"""

from __future__ import annotations

import html
import json
import math
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from minqwen.checkpoint import Checkpoint
from minqwen.config import ModelConfig
from minqwen.heads.proposals import cost
from minqwen.model import Qwen2

ROUNDING = 1.5  # units of the original's own error; two roundings of one size differ by up to 1.41


@dataclass
class LayerMap:
    """What one layer of B is made of, in A's heads."""

    layer: int
    heads: list[int | None]  # slot -> the query head of A whose q rows it has
    shares: list[float]  # slot -> its o_proj columns over that head's, least squares
    kv: list[int | None]  # KV slot -> the KV head of A
    wrong_kv: list[int]  # heads of A that contribute through another head's keys and values
    wrong_sum: dict[
        int, float
    ]  # head of A -> relative error of the sum of its slots' o_proj columns
    wrong_bias: list[int]  # slots whose q bias is not their head's
    wrong_kv_bias: list[int]  # KV slots whose k or v bias is not their head's
    stray: list[int]  # slots that hold no head of A but add to the output

    @property
    def right(self) -> bool:
        return not (
            self.wrong_kv or self.wrong_sum or self.wrong_bias or self.wrong_kv_bias or self.stray
        )


def inspect_layer(
    config_a: ModelConfig, config_b: ModelConfig, read_a, read_b, layer: int
) -> LayerMap:
    """Match B's slots with A's heads by their weights. read(name) -> tensor."""
    p = f"model.layers.{layer}.self_attn."
    d, H, H2 = config_a.head_dim, config_a.num_attention_heads, config_b.num_attention_heads
    K, K2 = config_a.num_key_value_heads, config_b.num_key_value_heads
    G, G2 = H // K, H2 // K2

    def parts(read, name: str, count: int) -> Tensor:
        return read(p + name).double().reshape(count, -1)

    keys = nearest(parts(read_b, "k_proj.weight", K2), parts(read_a, "k_proj.weight", K))
    values = nearest(parts(read_b, "v_proj.weight", K2), parts(read_a, "v_proj.weight", K))
    kv = [k if k == v else None for k, v in zip(keys, values)]
    # Of heads with equal q rows, the one whose keys the slot reads: two heads of a model may be copies.
    readers = [[h for h in range(H) if kv[j // G2] == h // G] for j in range(H2)]
    heads = nearest(parts(read_b, "q_proj.weight", H2), parts(read_a, "q_proj.weight", H), readers)
    wrong_kv_bias = sorted(
        {
            s
            for name in ("k_proj.bias", "v_proj.bias")
            for s, k in enumerate(kv)
            if k is not None and not close(parts(read_b, name, K2)[s], parts(read_a, name, K)[k])
        }
    )
    o_a = (
        read_a(p + "o_proj.weight").double().unflatten(1, (H, d)).transpose(0, 1).flatten(1)
    )  # [H, D d]
    o_b = read_b(p + "o_proj.weight").double().unflatten(1, (H2, d)).transpose(0, 1).flatten(1)
    bias_a, bias_b = parts(read_a, "q_proj.bias", H), parts(read_b, "q_proj.bias", H2)
    used = [bool(o.any()) for o in o_b]
    shares, sums = [], torch.zeros_like(o_a)
    for j, h in enumerate(heads):
        shares.append(
            0.0 if h is None else float(o_b[j] @ o_a[h] / (o_a[h] @ o_a[h]).clamp_min(1e-300))
        )
        if h is not None:
            sums[h] += o_b[j]
    return LayerMap(
        layer,
        heads,
        shares,
        kv,
        sorted(
            {h for j, h in enumerate(heads) if h is not None and used[j] and kv[j // G2] != h // G}
        ),
        {
            h: float((sums[h] - o_a[h]).norm() / o_a[h].norm())
            for h in range(H)
            if not close(sums[h], o_a[h])
        },
        [
            j
            for j, h in enumerate(heads)
            if h is not None and used[j] and not close(bias_b[j], bias_a[h])
        ],
        wrong_kv_bias,
        [j for j, h in enumerate(heads) if h is None and used[j]],
    )


def nearest(
    rows: Tensor, heads: Tensor, preferred: list[list[int]] | None = None
) -> list[int | None]:
    """For each row block the head it is a copy of, to a relative distance of 1 %, or None; `preferred` first."""
    gap = torch.cdist(rows, heads) / heads.norm(dim=1).clamp_min(1e-300)
    found: list[int | None] = []
    for j in range(len(rows)):
        first = [h for h in (preferred[j] if preferred else []) if float(gap[j, h]) < 0.01]
        best = min(first or range(len(heads)), key=lambda h: float(gap[j, h]))
        found.append(best if float(gap[j, best]) < 0.01 else None)
    return found


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to a bfloat16's rounding: what weighted shares may lose."""
    return float((a - b).norm()) <= 2.0**-8 * float(b.norm())


def inspect_heads(a: Checkpoint, b: Checkpoint) -> list[LayerMap]:
    return [
        inspect_layer(a.config, b.config, a.read, b.read, i)
        for i in range(a.config.num_hidden_layers)
    ]


@dataclass
class Report:
    """What `compare` found. error_a, error_b: root mean square of logits against float64; units: error_b / error_a."""

    dtype: str
    arithmetic: str
    verdict: str  # "bitwise", "equal to rounding" or "different"
    units: float
    error_a: float
    error_b: float
    max_abs: float
    mean_abs: float
    cosine: float
    kl: float  # nats per token, A from B
    top1: float
    perplexity_ratio: float
    greedy_match: bool
    first_layer: int | None
    first_stage: str | None  # "q", "kv", "attention", "o", "residual" or "logits"
    head_errors: list[list[float]]  # layer x head of A: error of z over A's own in this dtype
    parameters: int
    kv_bytes: int
    attention_macs: dict[int, float]
    layers: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return self.verdict != "different"


STAGES = (
    ("q", "attn.rot_q"),
    ("kv", "attn.rot_k"),
    ("kv", "attn.v"),
    ("attention", "attn.z"),
    ("o", "attn.out"),
    ("residual", "resid_post"),
)


@torch.inference_mode()
def compare(
    a: Qwen2, b: Qwen2, truth: Qwen2, ids: Tensor, maps: list[LayerMap], greedy_tokens: int = 16
) -> Report:
    """Run A, B and A in float64 on ids [B, T]. Greedy continuations are of the first sequence."""
    names = [f"*.{name}" for _, name in STAGES]
    logits, seen = zip(*(model.run_with_cache(ids, names) for model in (a, b, truth)))
    la, lb, lt = (x.double() for x in logits)
    unit = (
        2.0**-29 if a.dtype == torch.float64 else 1.0
    )  # float64 has no truth above it: its error is taken as
    if a.dtype == torch.float64:  # float32's, scaled by the ratio of their roundings
        single = Qwen2.from_tensors(a.config, reader(a), dtype=torch.float32)
        reference_logits, reference_seen = single.run_with_cache(ids, names)
        own_logits, own_seen = reference_logits.double(), reference_seen
    else:
        own_logits, own_seen = la, seen[0]
    error_a, error_b = rms(own_logits - lt) * unit, rms(lb - lt)
    first, head_errors = None, []
    for i, layer in enumerate(maps):
        live = [j for j, share in enumerate(layer.shares) if layer.heads[j] is not None and share]
        index = torch.tensor([layer.heads[j] for j in live], dtype=torch.int64)
        for stage, name in STAGES:
            full = f"layers.{i}.{name}"
            xa, xb, xt, xo = (s[full].double() for s in (*seen, own_seen))
            if stage in ("q", "attention"):
                xa, xt, xo = xa[:, :, index], xt[:, :, index], xo[:, :, index]
                xb = xb[:, :, live]
            elif stage == "kv":
                kept = [s for s, k in enumerate(layer.kv) if k is not None]
                source = torch.tensor([layer.kv[s] for s in kept], dtype=torch.int64)
                xa, xt, xo, xb = (
                    xa[:, :, source],
                    xt[:, :, source],
                    xo[:, :, source],
                    xb[:, :, kept],
                )
            if name == "attn.z":
                worst = torch.zeros(a.config.num_attention_heads)
                for n, head in enumerate(index.tolist()):
                    own = max(rms(xo[:, :, n] - xt[:, :, n]) * unit, 1e-300)
                    worst[head] = max(float(worst[head]), rms(xb[:, :, n] - xt[:, :, n]) / own)
                head_errors.append(worst.tolist())
            exact = a.ops.name == "exact"
            differs = (
                not torch.equal(xa, xb)
                if exact
                else not rms(xb - xt) <= 2 * rms(xo - xt) * unit + 1e-300
            )
            if first is None and differs and not (not exact and rms(xb - xa) == 0):
                first = (i, stage)
    bitwise = torch.equal(*logits[:2])
    units = error_b / error_a if error_a else (0.0 if bitwise else math.inf)
    verdict = "bitwise" if bitwise else "equal to rounding" if units < ROUNDING else "different"
    if first is None and verdict == "different":
        first = (a.config.num_hidden_layers, "logits")
    pa, pb = la.log_softmax(-1), lb.log_softmax(-1)
    nexts = ids[:, 1:, None]
    c = cost(a.config, b.config)
    return Report(
        str(a.dtype).removeprefix("torch."),
        a.ops.name,
        verdict,
        units,
        error_a,
        error_b,
        float((la - lb).abs().max()),
        float((la - lb).abs().mean()),
        float(torch.nn.functional.cosine_similarity(la.flatten(), lb.flatten(), dim=0)),
        float((pa.exp() * (pa - pb)).sum(-1).mean()),
        float((la.argmax(-1) == lb.argmax(-1)).double().mean()),
        float((pa[:, :-1].gather(-1, nexts) - pb[:, :-1].gather(-1, nexts)).mean().exp()),
        continue_greedily(a, ids[:1], greedy_tokens)
        == continue_greedily(b, ids[:1], greedy_tokens),
        None if first is None or verdict != "different" else first[0],
        None if first is None or verdict != "different" else first[1],
        head_errors,
        c.parameters,
        c.kv_bytes,
        c.attention_macs,
        [asdict(m) for m in maps],
        problems(maps),
    )


def reader(model: Qwen2):
    state = model.state_dict()
    return lambda name, shard: state[name]


def rms(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


def continue_greedily(model: Qwen2, ids: Tensor, count: int) -> list[int]:
    for _ in range(count):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    return ids[0, -count:].tolist()


def problems(maps: list[LayerMap]) -> list[str]:
    """The rules that are broken, in words, over all layers."""
    found = []
    wrong = sorted({h for m in maps for h in m.wrong_kv})
    if wrong:
        found.append(
            f"query heads {wrong} read another head's keys and values: new heads were not placed per KV group"
        )
    sums = sorted({h for m in maps for h in m.wrong_sum})
    if sums:
        found.append(
            f"the o_proj columns of query heads {sums} do not add up to the original's "
            f"(largest relative error {max(max(m.wrong_sum.values(), default=0) for m in maps):.2g})"
        )
    kv_bias = sorted({s for m in maps for s in m.wrong_kv_bias})
    if kv_bias:
        found.append(f"the k or v bias of KV slots {kv_bias} is not that of the head they hold")
    bias = sorted({j for m in maps for j in m.wrong_bias})
    if bias:
        found.append(f"the q bias of slots {bias} is not that of the head they hold")
    stray = sorted({j for m in maps for j in m.stray})
    if stray:
        found.append(f"slots {stray} hold none of the original's heads but add to the output")
    return found


def as_json(report: Report) -> str:
    return json.dumps(asdict(report), indent=1) + "\n"


def as_html(report: Report, title: str) -> str:
    """One page without scripts: the verdict, the slot map of the first layer, errors by layer and head."""
    colour = {"bitwise": "#1a7f37", "equal to rounding": "#1a7f37", "different": "#b42318"}[
        report.verdict
    ]
    rows = [
        ("verdict", report.verdict),
        ("error, in units of the original's own", f"{report.units:.3g}"),
        ("largest difference of logits", f"{report.max_abs:.3g}"),
        ("KL, nats per token", f"{report.kl:.3g}"),
        ("top-1 agreement", f"{report.top1:.2%}"),
        ("perplexity ratio", f"{report.perplexity_ratio:.4g}"),
        ("greedy text the same", "yes" if report.greedy_match else "no"),
        (
            "first difference",
            "none"
            if report.first_stage is None
            else f"layer {report.first_layer}, {report.first_stage}",
        ),
        ("mean difference of logits; cosine", f"{report.mean_abs:.3g}; {report.cosine:.9f}"),
        (
            "attention's multiply-adds",
            ", ".join(f"{x - 1:+.1%} at {int(n):,}" for n, x in report.attention_macs.items()),
        ),
        ("parameters added", f"{report.parameters:+,}"),
        ("KV cache, bytes per token", f"{report.kv_bytes:,}"),
    ]
    facts = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows
    )
    rules = ("wrong_kv", "wrong_sum", "wrong_bias", "wrong_kv_bias", "stray")
    layer = next(
        (m for m in report.layers if any(m[r] for r in rules)), report.layers[0]
    )  # the first that is wrong
    readers = (max(h for h in layer["heads"] if h is not None) + 1) // (
        max(k for k in layer["kv"] if k is not None) + 1
    )
    group = len(layer["heads"]) // len(layer["kv"])
    slots = ""
    for s, source in enumerate(layer["kv"]):
        cells = ""
        for j in range(s * group, (s + 1) * group):
            head, share = layer["heads"][j], layer["shares"][j]
            misplaced = head is not None and abs(share) > 1e-3 and source != head // readers
            bad = (
                misplaced
                or j in layer["wrong_bias"]
                or j in layer["stray"]
                or head in layer["wrong_sum"]
            )
            bad = bad or s in layer["wrong_kv_bias"]
            kind = "bad" if bad else "new" if abs(share) < 1e-3 else "live"
            name = "&middot;" if head is None else head
            part = (
                ""
                if abs(share) < 1e-3 or abs(share - 1) < 1e-3
                else f"<small>&times;{share:.3g}</small>"
            )
            cells += f'<td class="{kind}">{name}{part}</td>'
        slots += (
            f"<tr><th>KV {s} = {'dead' if source is None else f'head {source}'}</th>{cells}</tr>"
        )
    heat = ""
    for i, errors in enumerate(report.head_errors):
        cells = ""
        for h, e in enumerate(errors):
            strength = (
                min(1.0, max(0.0, math.log10(max(e, 1e-9) / ROUNDING) / 6)) if e > ROUNDING else 0.0
            )
            cells += f'<td title="layer {i}, head {h}: {e:.3g}" style="background:rgba(180,35,24,{strength:.2f})"></td>'
        heat += f"<tr><th>{i}</th>{cells}</tr>"
    said = (
        "".join(f"<li>{html.escape(p)}</li>" for p in report.problems)
        or "<li>every rule is kept</li>"
    )
    return f"""<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1f2328}}
h1{{font-size:1.3rem}}h2{{font-size:1.05rem;margin-top:2rem}}strong{{color:{colour}}}table{{border-collapse:collapse}}
th{{text-align:left;font-weight:500;padding:.15rem .8rem .15rem 0;white-space:nowrap}}td{{padding:.15rem .5rem}}
.map td{{border:1px solid #d0d7de;text-align:center;min-width:1.6rem}}.live{{background:#ddf4e4}}.new{{background:#f3f4f6;color:#8b949e}}
.bad{{background:#ffd7d5}}.heat td{{width:1.1rem;height:1.1rem;padding:0;border:1px solid #eaeef2}}small{{color:#57606a}}</style>
<h1>{html.escape(title)}: <strong>{report.verdict}</strong></h1>
<p>{report.dtype}, {report.arithmetic} arithmetic. The unit is the error that the original itself makes against float64.</p>
<table>{facts}</table><h2>Rules</h2><ul>{said}</ul>
<h2>Slot map, layer {layer["layer"]}</h2><table class="map">{slots}</table>
<p><small>Green: a head of the original. Grey: a new slot that adds nothing. Red: a rule is broken.</small></p>
<h2>Error of each head's output, by layer (rows) and head of the original (columns)</h2><table class="heat">{heat}</table>
<p><small>White: at most {ROUNDING} times the original's own error. Red: more, on a logarithmic scale.</small></p>
"""
