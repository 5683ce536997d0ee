"""A report of lab/diff/diff.py as text, and as one HTML page without scripts.

The page has the verdict, a heat map of points by layers and one of layers by tokens, the worst
tokens with their text, and every figure.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence

from minqwen.lab.diff.diff import (
    OPERATIONS,
    First,
    PointReport,
    Report,
    TokenErrors,
    figure,
    limit,
)
from minqwen.lab.verify_page import GREEN, RED, STYLE, VIEWPORT, strength
from minqwen.model.trace import POINTS, point_of

WORST = 12  # tokens
LONGEST = 400  # tokens of a text in the heat map

MORE_STYLE = """
.figures td{text-align:right;font-variant-numeric:tabular-nums;border-bottom:1px solid var(--line)}
.figures th{border-bottom:1px solid var(--line)}.figures td.wrong{color:var(--bad);font-weight:600}
.heat td.absent{background:var(--line)}.heat td.first{box-shadow:inset 0 0 0 3px var(--text)}
.heat td.most{width:auto;border:0;padding:0 .6rem;white-space:nowrap;vertical-align:middle}
.heat thead th{padding:0 0 .2rem;font-weight:400;text-align:center;vertical-align:bottom}
.heat .tokens th{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;
padding:.2rem 0 0;white-space:pre;font-size:.8rem;line-height:1.1}
.scroll{overflow-x:auto}.scroll th:first-child{position:sticky;left:0;background:var(--back)}
.says{font-size:1.1rem}code{background:var(--panel);padding:0 .2rem}
""".strip()

HEADER = ("point", "units", "added", "", "largest error", "at", "relative L2", "1 - cosine", "ULPs")


def as_text(report: Report) -> str:
    """A table of the points, and the verdict in one sentence."""
    rows = [HEADER, *(_figures(point) for point in report.points)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*(lines if report.points else []), *_logits(report), report.sentence()])


def _figures(point: PointReport) -> tuple[str, ...]:
    worst = point.worst
    return (
        point.point,
        figure(point.units),
        figure(point.added),
        point.verdict,
        f"{worst.max_abs:.2e}",
        f"prompt {point.prompt} {list(worst.at)}",
        f"{worst.relative_l2:.1e}",
        f"{1 - worst.cosine:.1e}",
        f"{worst.ulps:.3g}",
    )


def _logits(report: Report) -> list[str]:
    """What the logits' error means for the next token."""
    if report.logits is None:
        return []
    d = report.logits.difference
    return [
        f"logits: KL {d.kl:.3g} nats per token (99 of 100 below {d.kl_p99:.3g}, all {d.kl_max:.3g})"
        f", top-1 {d.top1:.2%}, top-5 {d.top5:.2%}, perplexity x {d.perplexity_ratio:.4g}"
    ]


def as_html(report: Report, title: str, text_of: Callable[[int], str]) -> str:
    """The whole page. title: names pack and candidate. text_of: a token's text."""
    color = RED if report.verdict == "diverge" else GREEN
    title = html.escape(title)
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8">{VIEWPORT}<title>{title}</title>',
        f"<style>{STYLE}{MORE_STYLE}strong{{color:{color}}}</style>",
        f"<h1>{title}: <strong>{report.verdict}</strong></h1>",
        f'<p class="says">{_marked(report.sentence())}</p>',
    ]
    if report.explained_by is not None:
        name, symptom = report.explained_by.name, report.explained_by.symptom
        parts.append(f"<p><code>{html.escape(name)}</code>: {html.escape(symptom)}</p>")
    parts += [f"<p>{html.escape(line)}</p>" for line in _logits(report)]
    if report.points:
        parts += [*_by_layer(report), *_by_token(report, text_of), *_table(report.points)]
    return "\n".join(parts) + "\n"


def _marked(text: str) -> str:
    """The text with what stands between backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _by_layer(report: Report) -> list[str]:
    """Rows are points, columns layers; points outside the layers stand in the first column."""
    at = {(point_of(point.point).name, point.layer): point for point in report.points}
    layers = sorted({point.layer for point in report.points if point.layer is not None})
    rows = []
    for point in POINTS:
        here = [at.get((point.name, layer)) for layer in (layers if point.layered else [None])]
        if any(here):
            title = f"{OPERATIONS[point.name]}: {point.name}"
            cells = [_point_cell(found, report.first) for found in here]
            rows.append(_row(title, [*cells, _most(here)]))
    return [
        "<h2>What each operation adds, by point (rows) and layer (columns)</h2>",
        _heat(_row("", [f"<th>{layer}</th>" for layer in layers]), rows),
        "<p><small>No colour: rounding. Red: more, on a logarithmic scale. Framed: the first "
        "wrong operation. Grey: not dumped. Errors that are only inherited are not shown.</small>"
        "</p>",
    ]


def _heat(header: str, rows: Sequence[str], kind: str = "layers") -> str:
    """A heat map that the arrow keys move where it is wider than the screen."""
    table = f"<thead class={kind}>{header}</thead>{''.join(rows)}"
    return f'<div class="scroll" tabindex="0"><table class="heat">{table}</table></div>'


def _most(points: Sequence[PointReport | None]) -> str:
    """What stands behind a row: the largest number of units that its wrong operations add."""
    wrong = [point.added for point in points if point is not None and point.verdict == "wrong"]
    if not wrong:
        return ""
    up_to = "up to " if len(wrong) > 1 else ""
    return f'<td class="most">{up_to}{figure(max(wrong))} units</td>'


def _point_cell(point: PointReport | None, first: First | None) -> str:
    if point is None:
        return '<td class="absent"></td>'
    said = (
        f"{point.point}: {figure(point.added)} units added, {figure(point.units)} in all, "
        f"{point.verdict}"
    )
    kind = "first" if first is not None and first.point == point.point else ""
    return _cell(said, strength(point.added, limit(point.point)), kind)


def _by_token(report: Report, text_of: Callable[[int], str]) -> list[str]:
    """The whole errors of the worst text's tokens, and the worst tokens of all texts."""
    texts = [text for text in report.tokens if text.names]
    if not texts:
        return []
    worst = max(texts, key=lambda text: max(max(row, default=0.0) for row in text.units))
    rows = []
    for name, units in zip(worst.names, worst.units):
        skipped = len(worst.ids) - len(units)
        cells = [_cell("no such row", 0.0)] * min(skipped, LONGEST)
        for i, error in enumerate(units[: max(0, LONGEST - skipped)]):
            token = html.escape(repr(text_of(worst.ids[skipped + i])))
            said = f"{name}, token {skipped + i} {token}: {figure(error)} units"
            cells.append(_cell(said, strength(error, limit(name))))
        rows.append(_row(name, cells))
    words = [repr(text_of(id))[1:-1] for id in worst.ids[:LONGEST]]
    header = _row("", [f"<th>{html.escape(text)}</th>" for text in words])
    return [
        f"<h2>Whole error, by layer (rows) and token (columns) of prompt {worst.prompt}</h2>",
        _heat(header, rows, "tokens"),
        "<h2>Worst tokens</h2>",
        f'<table class="figures">{_worst_tokens(texts, text_of)}</table>',
    ]


def _worst_tokens(texts: Sequence[TokenErrors], text_of: Callable[[int], str]) -> str:
    """The tokens with the largest errors at each text's last point."""
    found = []
    for text in texts:
        skipped = len(text.ids) - len(text.units[-1])
        for i, error in enumerate(text.units[-1]):
            found.append((error, text.prompt, skipped + i, text.ids[skipped + i], text.names[-1]))
    found.sort(key=lambda entry: -entry[0])
    rows = [_row("token", ["<td>units</td><td>prompt</td><td>position</td><td>at</td>"])]
    for error, prompt, position, id, name in found[:WORST]:
        cells = [f"<td>{cell}</td>" for cell in (figure(error), prompt, position, name)]
        rows.append(_row(f"{text_of(id)!r} ({id})", cells))
    return "".join(rows)


def _table(points: Sequence[PointReport]) -> list[str]:
    rows = [_row(HEADER[0], [f"<td>{name}</td>" for name in HEADER[1:]])]
    for point in points:
        kind = ' class="wrong"' if point.verdict == "wrong" else ""
        rows.append(_row(point.point, [f"<td{kind}>{cell}</td>" for cell in _figures(point)[1:]]))
    return [
        "<h2>Every point, in the order of computation</h2>",
        "<p><small>One unit is the error that a faithful implementation makes in this dtype. "
        "Added: by the operation alone, computed again in float64 on the candidate's own inputs. "
        "The other figures are of the whole error, in the text where it is worst.</small></p>",
        f'<div class="scroll" tabindex="0"><table class="figures">{"".join(rows)}</table></div>',
    ]


def _row(name: str, cells: Iterable[str]) -> str:
    return f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>"


def _cell(said: str, opacity: float, kind: str = "") -> str:
    marked = f' class="{kind}"' if kind else ""
    return f'<td{marked} title="{said}" style="background:rgb(var(--red)/{opacity:.2f})"></td>'
