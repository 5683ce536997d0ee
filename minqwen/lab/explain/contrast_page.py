"""A `Contrast` as one HTML page: what is right and what a mistake makes of it, side by side."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from minqwen.lab.explain.contrast import Contrast, First, Place
from minqwen.lab.explain.contrast_text import moved_heads, why_unseen
from minqwen.lab.explain.explain import Explanation, Prediction
from minqwen.lab.explain.page import (
    attention_table,
    bars,
    chip,
    heading,
    join,
    lines_of,
    linked,
    page,
    parts_table,
    prompt_of,
    scrolling,
    sum_of_parts,
    word,
)
from minqwen.lab.explain.text import place, several, share


def as_html(it: Contrast) -> str:
    """The whole page."""
    parts = [
        f"<h1>{html.escape(it.name)}</h1>",
        f"<p>{html.escape(it.symptom)}</p>",
        f'<p class="dim">Kind of mistake: {it.kind}. Source: {html.escape(it.source)}. '
        f"Shown in {html.escape(it.right.model)}, {it.right.dtype}, on "
        f"&ldquo;{prompt_of(it.right)}&rdquo;."
        "</p>",
        heading("next", "What comes next"),
        sides(bars(it.right.predictions), bars(it.wrong.predictions)),
        heading("first", "Where it is seen first"),
        *first_of(it),
        *what_becomes(it),
        heading("tokens", "What each says next, token by token"),
        token_by_token(it),
        *numbers_of_heads(it),
    ]
    links = [("next", "what comes next"), ("first", "where it is seen first")]
    links += [("becomes", "what becomes of it")] if it.first is not None else []
    links += [("tokens", "token by token")]
    links += [("heads", "heads")] if it.first is not None else []
    return page(f"minqwen explains a mistake: {html.escape(it.name)}", linked(links), parts)


def sides(right: str, wrong: str) -> str:
    """Two parts of the page beside each other; below each other on a narrow screen."""
    return (
        f'<div class="sides"><div class="right"><h3 class="good">right</h3>{right}</div>'
        f'<div class="wrong"><h3 class="bad">wrong</h3>{wrong}</div></div>'
    )


def of_both(it: Contrast, part: Callable[[Explanation], str]) -> str:
    return sides(part(it.right), part(it.wrong))


# ---- where it is --------------------------------------------------------------------------------


def first_of(it: Contrast) -> list[str]:
    """The first point that differs: its numbers and the code of both."""
    given = "".join(f"<p class=dim>with <code>{html.escape(g)}</code></p>" for g in it.given)
    mistake = lines_of(it.code, True) + given
    seen = it.first
    if seen is None:
        return [f"<p>{html.escape(why_unseen(it))}</p>", f"<h3>The mistake</h3>{mistake}"]
    token = it.right.tokens[seen.token]
    silent = f"<p>The logits do not move beyond rounding: {html.escape(it.silent)}.</p>"
    return [
        f"<p><b><code>{seen.point}</code></b>, {html.escape(seen.what)}, at "
        f"<code>{seen.at}</code>: token {seen.token}, {word(token.text)}. All that was computed "
        "before it is the same in every bit.</p>",
        sides(
            numbers(seen.right) + lines_of(seen.code, True),
            numbers(seen.wrong) + mistake,
        ),
        *([silent] if it.silent else []),
    ]


def numbers(values: Sequence[float]) -> str:
    return f'<p class="num">{"&ensp;".join(f"{x:.4g}" for x in values)}</p>'


# ---- what becomes of it -------------------------------------------------------------------------


def what_becomes(it: Contrast) -> list[str]:
    """After each layer: the likeliest tokens, the error, and the heads that read another token."""
    if it.first is None:
        return []
    errors = {each.point: each.size for each in it.points}
    rows = [
        "<thead><tr><th>after</th><th>right</th><th>wrong</th><th>error</th><th></th>"
        "<th>heads that read another token</th></tr></thead>"
    ]
    for i in range(-1, len(it.right.layers)):
        a, b = (s.embed_lens if i < 0 else s.layers[i].lens for s in (it.right, it.wrong))
        error = errors.get(a.point, math.nan)
        moved = "" if i < 0 else moved_heads(it, i)
        rows.append(
            f"<tr><th>{place(a)}</th>{said(a.predictions[0])}{said(b.predictions[0])}"
            f"{error_cells(error)}<td>{moved}</td></tr>"
        )
    table = scrolling(f"<table>{join(rows)}</table>", "after each layer")
    note = (
        "<p class=dim>The tokens are the likeliest after each layer (logit lens). Error: the root "
        "mean square of the residual stream's error, as a share of the stream.</p>"
    )
    return [heading("becomes", "What becomes of it"), table, note]


def said(prediction: Prediction) -> str:
    return f"<td>{word(prediction.text)} <small>{share(prediction.probability)}</small></td>"


def error_cells(error: float) -> str:
    """The number, and a bar that is full at 1."""
    if math.isnan(error):
        return "<td>-</td><td></td>"
    width = 8 * min(error, 1.0)
    bar = f'<span class="bar" style="width:{width:.2f}rem;background:rgb(var(--down))"></span>'
    return f"<td class=num>{error:.2g}</td><td>{bar if error else ''}</td>"


def token_by_token(it: Contrast) -> str:
    if not it.places:
        return of_both(it, prompt_in_chips)
    rows = [
        "<thead><tr><th>token</th><th>right says</th><th>wrong says</th>"
        "<th>largest change of a log probability</th></tr></thead>",
        *map(place_row, it.places),
    ]
    return scrolling(f"<table>{join(rows)}</table>", "token by token")


def place_row(each: Place) -> str:
    change = '<span class="good">the same bits</span>' if each.same else f"{each.change:.2g}"
    return (
        f"<tr><th>{each.position} {word(each.text)}</th>{said(each.right)}{said(each.wrong)}"
        f"<td class=num>{change}</td></tr>"
    )


def prompt_in_chips(of: Explanation) -> str:
    chips = join(chip(token.text, place_of=i) for i, token in enumerate(of.tokens))
    return f'<p>{several(len(of.tokens), "token")}</p><ol class="tokens"><li>{chips}</li></ol>'


def numbers_of_heads(it: Contrast) -> list[str]:
    """What heads add and read on both sides; the layer is the first wrong one."""
    if it.first is None:
        return []
    layer = layer_of(it.first, len(it.right.layers))
    return [
        heading("heads", "The heads"),
        "<h3>What each adds to the logit of the predicted token</h3>",
        of_both(it, lambda s: f"<p>Predicted: {word(s.predictions[0].text)}</p>" + added(s)),
        f"<h3>What each reads for the last token, layer {layer}</h3>",
        of_both(it, lambda s: attention_table(s, s.layers[layer])),
    ]


def added(side: Explanation) -> str:
    return sum_of_parts(side) + parts_table(side)


def layer_of(first: First, layers: int) -> int:
    """The layer of a point; the first one before the layers, the last one behind them."""
    if first.point.startswith("layers."):
        return int(first.point.split(".")[1])
    return 0 if first.point == "embed" else layers - 1
