"""A report of lab/audit/audit.py as text for the terminal, and as one HTML page without scripts."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from minqwen.lab.audit.audit import Report, Token
from minqwen.lab.audit.explain import Tried
from minqwen.lab.audit.pairs import Pair
from minqwen.lab.compare import ROUNDING
from minqwen.lab.faults import FAULTS
from minqwen.lab.verify_page import GREEN, RED, STYLE, VIEWPORT

SHOWN = 8  # mistakes in the table
MOST_TOKENS = 2000  # on the page

MORE_STYLE = """
th{max-width:16rem;white-space:normal}td{padding:.15rem .8rem .15rem 0}
td{font-variant-numeric:tabular-nums}
.text{font-family:ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7}
.says{font-size:1.1rem}
""".strip()


# ---- the terminal


def as_text(report: Report) -> str:
    lines = [report.sentence, *(f"  {name}: {value}" for name, value in facts(report)[1:])]
    if report.tried:
        lines += [f"{nearest(report)}:", *(f"  {name}: {said}" for name, said in ranking(report))]
    if report.verdict == "diverge" and report.worst:
        lines.append("worst tokens:")
        lines += [f"  {' '.join(row)}" for row in worst_rows(report.worst)]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def pair_as_text(pair: Pair) -> str:
    lines = [pair.sentence, *(f"  {name}: {value}" for name, value in pair_facts(pair))]
    for side, report in (("trainer", pair.trainer), ("rollout", pair.rollout)):
        lines.append(f"the {side} {report.sentence}")
    return "\n".join(lines)


def facts(report: Report) -> list[tuple[str, str]]:
    """What was found, by name. Only what is known."""
    found: list[tuple[str, str]] = [("verdict", report.verdict)]
    if report.explained_by is not None:
        name = report.explained_by.name
        found.append((name, FAULTS[name].symptom))
    found.append(("claimed dtype", report.dtype))
    if report.offered:
        found.append(("asked for", f"{report.offered}, in {report.requests} requests"))
    texts = "1 text" if report.records == 1 else f"{report.records} texts"
    found.append(("judged", f"{report.numbers} log probabilities of {texts}"))
    if report.units is not None:
        found += [
            ("error", f"{report.rms_error:.3g} nats (root mean square)"),
            (
                "in units of a faithful error",
                f"{report.units:.3g}, 99% interval {report.low:.3g} to {report.high:.3g}",
            ),
            ("log probabilities", f"{report.reported}, printed in {report.printed}"),
        ]
    if report.impossible:
        found.append(("tokens called impossible", str(report.impossible)))
    if report.greedy_tokens:
        bugs = [flip for flip in report.flips if not flip.tie]
        found.append(
            (
                "greedy tokens that differ",
                f"{len(report.flips)} of {report.greedy_tokens}, {len(bugs)} by more than rounding"
                f" (margins up to {report.tie_margin:.3g} are ties)",
            )
        )
    return found


def nearest(report: Report) -> str:
    """What stands above the ranking. Where the engine is right it must not look like a finding."""
    if report.verdict == "agree":
        return "mistakes that were tried, the nearest first; none is needed to explain the engine"
    return "mistakes that were tried, the nearest first"


def ranking(report: Report) -> list[tuple[str, str]]:
    """The nearest mistakes, those that explain the engine first."""
    first = sorted(report.tried, key=lambda each: not each.explains)
    return [(each.name, described(each)) for each in first[:SHOWN]]


def described(each: Tried) -> str:
    text = f"distance {each.distance:.3g}"
    if each.units is not None:
        text += f", {each.units:.3g} units, {each.share:.0%} of its effect is there"
    if each.explains:
        text += ", explains it"
    return f"{text}, {each.what}" if each.what and each.explains else text


def worst_rows(tokens: Sequence[Token]) -> list[tuple[str, ...]]:
    return [
        (
            f"text {token.record}, token {token.position}",
            repr(token.text),
            f"{token.said:.4f}, truth {token.truth:.4f}",
            f"{token.units:.3g} units",
        )
        for token in tokens
    ]


def pair_facts(pair: Pair) -> list[tuple[str, str]]:
    apart = pair.apart
    return [
        ("verdict", pair.verdict),
        (
            "difference, in units of two faithful engines' difference",
            f"{apart.units:.3g}, 99% interval {apart.low:.3g} to {apart.high:.3g}",
        ),
        ("nearer the truth", f"{pair.nearer} (trainer in {pair.sure:.1%} of bootstrap samples)"),
        (
            "probability ratio, trainer / rollout",
            f"mean {pair.ratio_mean:.5g}; the furthest from 1 is {pair.ratio_most:.5g}",
        ),
    ]


# ---- the page


def as_html(report: Report, title: str) -> str:
    """The whole page. title: names the endpoint or the file; it is escaped."""
    return "\n".join([head(title, report.verdict), *body(report)]) + "\n"


def pair_as_html(pair: Pair, title: str) -> str:
    parts = [head(title, pair.verdict), sentence(pair.sentence), table(pair_facts(pair))]
    for side, report in (("Trainer", pair.trainer), ("Rollout", pair.rollout)):
        parts += [f"<h1>{side}</h1>", *body(report)]
    return "\n".join(parts) + "\n"


def head(title: str, verdict: str) -> str:
    title, color = html.escape(title), GREEN if verdict == "agree" else RED
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{VIEWPORT}<title>{title}</title>\n'
        f"<style>{STYLE}{MORE_STYLE}strong{{color:{color}}}</style>\n"
        f"<h1>{title}: <strong>{html.escape(verdict)}</strong></h1>"
    )


def body(report: Report) -> list[str]:
    parts = [sentence(report.sentence), table(facts(report))]
    if report.tried:
        parts += [f"<h2>{nearest(report).capitalize()}</h2>", table(ranking(report))]
    if report.worst:
        parts += ["<h2>Worst tokens</h2>", table(worst_rows(report.worst))]
        parts += ["<h2>Errors by token</h2>", *strips(report.tokens)]
    if report.notes:
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
        parts += ["<h2>Notes</h2>", f"<ul>{notes}</ul>"]
    return parts


def sentence(text: str) -> str:
    return f'<p class="says">{html.escape(text)}</p>'


def table(rows: Iterable[Sequence[str]]) -> str:
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
        lines.append(f"<tr><th>{html.escape(first)}</th>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def strips(tokens: Sequence[Token]) -> list[str]:
    """Each text as one paragraph, its tokens red where the error is large."""
    texts: dict[int, dict[int, Token]] = {}
    for token in tokens[:MOST_TOKENS]:
        texts.setdefault(token.record, {}).setdefault(token.position, token)
    parts = [
        '<p class="text">' + "".join(map(colored, by_position.values())) + "</p>"
        for by_position in texts.values()
    ]
    legend = (
        f"No colour: up to {ROUNDING * 2:g} times the faithful error of a token as sure as it. "
        "Red: more, on a logarithmic scale. Point at a token to read its numbers."
    )
    return [*parts, f"<p><small>{legend}</small></p>"]


def colored(token: Token) -> str:
    numbers = f"{token.said:.4f}, truth {token.truth:.4f}, {token.units:.3g} units"
    return (
        f'<span title="{numbers}" style="background:rgb(var(--red)/{strength(token.units):.2f})">'
        f"{html.escape(token.text)}</span>"
    )


def strength(units: float) -> float:
    """The opacity of red, full at 1,000 times what is white. On 0.6 of it a text can be read."""
    white = ROUNDING * 2
    return 0.0 if not units > white else min(0.6, 0.15 + 0.15 * math.log10(units / white))
