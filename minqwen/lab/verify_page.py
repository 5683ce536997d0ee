"""A report of lab/verify.py as one HTML page without scripts.

It shows the verdict, the rules, the slot map of one layer, and errors by layer and head.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

from minqwen.lab.compare import ROUNDING, Verdict
from minqwen.lab.verify import LayerMap, Report

GREEN, RED = "var(--good)", "var(--bad)"
VIEWPORT = '<meta name="viewport" content="width=device-width">'  # on a telephone
NOTHING = 1e-3  # a share of o_proj's columns below this counts as none

# Also of the pages of diff and audit. --red is that of heat maps, which has an opacity.
STYLE = """
:root{color-scheme:light dark;font-size:clamp(15px,.62vw + 8px,24px);
--text:#1f2328;--dim:#57606a;--back:#fff;--panel:#f3f4f6;
--line:#d0d7de;--good:#1a7f37;--bad:#b42318;--red:180 35 24}
@media (prefers-color-scheme:dark){:root{--text:#e6edf3;--dim:#9da7b3;--back:#0d1117;
--panel:#21262d;--line:#3d444d;--good:#56d364;--bad:#ff7b72;--red:248 81 73}
.live,.bad{color:#1f2328}}
body{font:1rem/1.5 system-ui,sans-serif;color:var(--text);background:var(--back);
max-width:68rem;margin:1.5rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse}
th{text-align:left;font-weight:500;padding:.15rem .8rem .15rem 0;white-space:nowrap}
td{padding:.15rem .5rem}small{color:var(--dim)}td,th{vertical-align:top}
.map td{border:1px solid var(--line);text-align:center;min-width:1.6rem}
.live{background:#ddf4e4}.new{background:var(--panel);color:var(--dim)}.bad{background:#ffd7d5}
.heat td{width:1.25rem;min-width:1.25rem;height:1.25rem;padding:0;border:1px solid var(--line)}
@media (max-width:40rem){th{white-space:normal}.heat th{font-size:.85rem;line-height:1.2}}
""".strip()


def as_html(report: Report, title: str) -> str:
    """The whole page. title: names the two models; it is escaped."""
    parts = [
        _head(title, report.verdict),
        f"<p>{report.dtype}, {report.arithmetic} arithmetic. "
        "The unit is the error that the original itself makes against float64.</p>",
        f"<table>{_facts(report)}</table>",
        f"<h2>Configs and rules</h2><ul>{_said(report)}</ul>",
    ]
    if report.layers:
        parts += [*_slot_map(_most_telling(report.layers)), *_heat_map(report.head_errors)]
    return "\n".join(parts) + "\n"


def unlike_as_html(settings: list[str], title: str) -> str:
    """The page on two checkpoints that cannot be run side by side."""
    said = _join(f"<li>{html.escape(text)}</li>" for text in settings)
    return f"{_head(title, 'different')}\n<h2>config.json</h2><ul>{said}</ul>\n"


def _head(title: str, verdict: Verdict) -> str:
    title, color = html.escape(title), RED if verdict == "different" else GREEN
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{VIEWPORT}<title>{title}</title>\n'
        f"<style>{STYLE}strong{{color:{color}}}</style>\n"
        f"<h1>{title}: <strong>{verdict}</strong></h1>"
    )


def _facts(report: Report) -> str:
    macs = report.attention_macs.items()
    first = "none"
    if report.first_stage is not None:
        first = f"layer {report.first_layer}, {report.first_stage}"
    rows = [
        ("verdict", report.verdict),
        ("outputs on this text", report.outputs),
        ("error, in units of the original's own", f"{report.units:.3g}"),
        ("largest difference of logits", f"{report.max_abs:.3g}"),
        ("KL, nats per token", f"{report.kl:.3g}"),
        ("KL, of 99 in 100 tokens at most; of all", f"{report.kl_p99:.3g}; {report.kl_max:.3g}"),
        ("top-1 agreement; top-5", f"{report.top1:.2%}; {report.top5:.2%}"),
        ("perplexity ratio", f"{report.perplexity_ratio:.4g}"),
        ("greedy text the same", "yes" if report.greedy_match else "no"),
        ("first difference", first),
        ("mean difference of logits; cosine", f"{report.mean_abs:.3g}; {report.cosine:.9f}"),
        ("attention's multiply-adds", ", ".join(f"{x - 1:+.1%} at {n:,}" for n, x in macs)),
        ("parameters added", f"{report.parameters:+,}"),
        ("KV cache, bytes per token", f"{report.kv_bytes:,}"),
    ]
    return _join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )


def _said(report: Report) -> str:
    said = report.reasons or ["the configs mean one function, and every rule is kept"]
    said = said + [f"not shown by the outputs: {limit}" for limit in report.not_exposed]
    return _join(f"<li>{html.escape(text)}</li>" for text in said)


def _most_telling(layers: list[LayerMap]) -> LayerMap:
    """The first layer that is wrong, or else the first."""
    return next((layer for layer in layers if not layer.right), layers[0])


def _slot_map(layer: LayerMap) -> list[str]:
    group = len(layer.heads) // len(layer.kv)
    rows = []
    for s, source in enumerate(layer.kv):
        holds = "dead" if source is None else f"head {source}"
        cells = _join(_cell(layer, slot) for slot in range(s * group, (s + 1) * group))
        rows.append(f"<tr><th>KV {s} = {holds}</th>{cells}</tr>")
    return [
        f"<h2>Slot map, layer {layer.layer}</h2>",
        f'<table class="map">{_join(rows)}</table>',
        "<p><small>Green: a head of the original. Grey: a new slot that adds nothing. "
        "Red: a rule is broken.</small></p>",
    ]


def _cell(layer: LayerMap, slot: int) -> str:
    head, share = layer.heads[slot], layer.shares[slot]
    kind = "new" if abs(share) < NOTHING else "live"
    if _breaks_a_rule(layer, slot):
        kind = "bad"
    name = "&middot;" if head is None else str(head)
    part = f"<small>&times;{share:.3g}</small>"
    if abs(share) < NOTHING or abs(share - 1) < NOTHING:
        part = ""
    return f'<td class="{kind}">{name}{part}</td>'


def _breaks_a_rule(layer: LayerMap, slot: int) -> bool:
    head, kv_slot = layer.heads[slot], slot * len(layer.kv) // len(layer.heads)
    adds = abs(layer.shares[slot]) > NOTHING
    return (
        (head is not None and adds and layer.kv[kv_slot] != head // _source_group(layer))
        or head in layer.wrong_sum
        or slot in layer.wrong_bias
        or kv_slot in layer.wrong_kv_bias
        or slot in layer.stray
    )


def _source_group(layer: LayerMap) -> int:
    """Query heads per KV head of the original, by the heads that were found."""
    heads = max((h for h in layer.heads if h is not None), default=0) + 1
    kv_heads = max((k for k in layer.kv if k is not None), default=0) + 1
    return max(heads // kv_heads, 1)


def _heat_map(head_errors: list[list[float]]) -> list[str]:
    rows = []
    for layer, errors in enumerate(head_errors):
        cells = _join(
            f'<td title="layer {layer}, head {head}: {error:.3g}" '
            f'style="background:rgb(var(--red)/{strength(error):.2f})"></td>'
            for head, error in enumerate(errors)
        )
        rows.append(f"<tr><th>{layer}</th>{cells}</tr>")
    return [
        "<h2>Error of each head's output, by layer (rows) and head of the original (columns)</h2>",
        f'<table class="heat">{_join(rows)}</table>',
        f"<p><small>No colour: at most {ROUNDING} times the original's own error. "
        "Red: more, on a logarithmic scale.</small></p>",
    ]


def strength(units: float, rounding: float = ROUNDING) -> float:
    """The opacity of red, 0 to 1: none up to `rounding`, full at 10,000 times that.

    A fifth, which a projector still shows, just above `rounding`.
    """
    if units <= rounding:
        return 0.0
    if not math.isfinite(units):
        return 1.0
    return min(1.0, 0.2 + 0.2 * math.log10(units / rounding))


def _join(parts: Iterable[str]) -> str:
    return "".join(parts)
