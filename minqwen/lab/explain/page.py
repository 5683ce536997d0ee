"""An `Explanation` as one HTML page without scripts, to be opened in class; and its parts.

It needs nothing from outside, follows the reader's light or dark colours, grows with the screen,
and is used by keyboard alone: Tab goes through links, layers and wide tables, Enter opens.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from minqwen.lab.explain.explain import (
    Blocks,
    Explanation,
    Head,
    LayerStory,
    Lens,
    Prediction,
    Step,
)
from minqwen.lab.explain.sources import Code
from minqwen.lab.explain.text import place, several, share

STYLE = """
:root{color-scheme:light dark;font-size:clamp(15px,.62vw + 8.5px,24px);
--text:#1f2328;--dim:#57606a;--back:#fff;--panel:#f6f8fa;
--line:#d0d7de;--up:9 105 218;--down:188 76 0;--good:#1a7f37;--bad:#b42318}
@media (prefers-color-scheme:dark){:root{--text:#e6edf3;--dim:#9da7b3;--back:#0d1117;
--panel:#161b22;--line:#3d444d;--up:76 154 255;--down:240 136 62;--good:#56d364;--bad:#ff7b72}}
*{box-sizing:border-box}
body{font:1rem/1.5 system-ui,sans-serif;color:var(--text);
background:var(--back);max-width:82rem;margin:0 auto;padding:1rem clamp(.8rem,2vw,2rem) 4rem}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.2rem;margin:2.2rem 0 .6rem}h3{font-size:1rem;margin:1.4rem 0 .4rem}
p{margin:.4rem 0;max-width:60rem}small,.dim{color:var(--dim);font-size:.85em}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;padding:.5rem 0;
border-bottom:1px solid var(--line)}
a{color:rgb(var(--up))}:focus-visible{outline:3px solid rgb(var(--up));outline-offset:2px}
code,pre,.num{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{background:var(--panel);border:1px solid var(--line);border-radius:.4rem;padding:.5rem .7rem;
margin:.3rem 0;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85em;line-height:1.45}
.wide{overflow-x:auto;max-width:100%}
table{border-collapse:collapse}th{text-align:left;font-weight:600}
td code,th code{white-space:pre}
td,th{padding:.25rem .9rem .25rem 0;vertical-align:top}thead th{border-bottom:1px solid var(--line)}
.tokens{display:flex;flex-wrap:wrap;gap:.5rem;list-style:none;padding:0;margin:.6rem 0}
.tokens>li{display:flex;flex-wrap:wrap;gap:.3rem;border:1px dashed var(--line);border-radius:.5rem;
padding:.3rem;align-items:flex-end}.tokens small{width:100%}
.token{background:var(--panel);border:1px solid var(--line);border-radius:.35rem;
padding:.1rem .45rem;white-space:pre;font-size:1.05em}.token sub{color:var(--dim);font-size:.65em;
margin-left:.3em}.says{border:2px solid var(--good);font-weight:600}
.bars td{padding:.15rem .8rem .15rem 0;white-space:pre}.bar{display:block;height:1.1em;
background:rgb(var(--up)/.75);border-radius:.2em;min-width:2px}
.bars td:last-child{width:min(26rem,45vw)}
.heat{border-spacing:2px;border-collapse:separate}.heat td{width:1.45rem;min-width:1.45rem;
height:1.45rem;padding:0;border:1px solid var(--line);border-radius:.15rem;text-align:center}
.heat th{padding:0 .5rem 0 0;font-weight:400;white-space:pre;font-size:.8em;line-height:1.2}
.heat thead th{writing-mode:vertical-rl;transform:rotate(180deg);padding:0;border:0;text-align:left;
height:auto}.heat .sum{width:auto;padding:0 .4rem;font-size:.8em}
.up{background:rgb(var(--up)/var(--p))}.down{background:rgb(var(--down)/var(--p))}
.lens th{white-space:pre}.lens td{border-radius:.3rem;padding:.2rem .6rem;white-space:pre}
.lens td small{color:inherit}
.sides .heat td{width:.8rem;min-width:.8rem}.sides .heat{border-spacing:1px}
details{border:1px solid var(--line);border-radius:.5rem;margin:.6rem 0;padding:0 1rem}
summary{cursor:pointer;padding:.6rem 0;font-weight:600}summary span{font-weight:400}
details[open]{padding-bottom:1rem}
details.lines{border:0;padding:0;margin:.2rem 0}details.lines summary{padding:.1rem 0;
font-weight:400;color:var(--dim);font-size:.85em}
.op{display:grid;grid-template-columns:minmax(14rem,2fr) 3fr;gap:.2rem 1.5rem;padding:.8rem 0;
border-top:1px solid var(--line)}.op>*{min-width:0}.op b{font-size:1.05em}
.formula{font-style:italic}.sides{display:grid;gap:1rem 2rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}.sides>*{min-width:0}
.right{border-left:.35rem solid var(--good);padding-left:.8rem}
.wrong{border-left:.35rem solid var(--bad);padding-left:.8rem}
.good{color:var(--good)}.bad{color:var(--bad)}
@media (max-width:700px){.op{grid-template-columns:1fr}}
@media print{details{break-inside:avoid}nav{display:none}}
""".strip()


def as_html(it: Explanation) -> str:
    """The whole page."""
    best = it.predictions[0]
    parts = [
        f"<h1>{prompt_of(it)} &rarr; {chip(best.text, 'token says')}</h1>",
        f"<p>One forward pass of {html.escape(it.model)}: {it.dtype}, {it.arithmetic} arithmetic, "
        f"{several(len(it.layers), 'layer')}. All numbers are of the last token, which predicts "
        "the next one.</p>",
        legend(it),
        heading("next", "What comes next"),
        bars(it.predictions),
        heading("lens", "What it would say after each layer"),
        "<p class=dim>The logit lens: the residual stream after each layer, through the final norm "
        "and the head. Stronger colour, more probable.</p>",
        lens_table([it.embed_lens, *(layer.lens for layer in it.layers)]),
        heading("parts", f"Who adds to the logit of {word(best.text)}"),
        sum_of_parts(it),
        parts_table(it),
        *cache_of(it),
        heading("layers", "Every operation"),
        op(it.embed, True),
        *(layer_details(it, i, i == 0) for i in range(len(it.layers))),
        *(op(step, True) for step in it.after),
    ]
    return page(f"minqwen explains: {prompt_of(it)}", navigation(it), parts)


def page(title: str, links: str, parts: Iterable[str]) -> str:
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{title}</title><style>{STYLE}</style>",
            links,
            "<main>",
            *parts,
            "</main></html>\n",
        ]
    )


def navigation(it: Explanation) -> str:
    links = [("next", "what comes next"), ("lens", "after each layer"), ("parts", "who adds")]
    links += [("cache", "KV cache")] if it.blocks is not None else []
    links += [("layers", "every operation")]
    return linked(links + [(f"layer{i}", f"layer {i}") for i in range(len(it.layers))])


def linked(links: Sequence[tuple[str, str]]) -> str:
    anchors = join(f'<a href="#{name}">{text}</a>' for name, text in links)
    return f"<nav>{anchors}</nav>"


# ---- words --------------------------------------------------------------------------------------


def join(parts: Iterable[str]) -> str:
    return "".join(parts)


def heading(name: str, text: str) -> str:
    return f'<h2 id="{name}">{text}</h2>'


def word(text: str) -> str:
    """A token's text, escaped, as Python writes it."""
    return f"<code>{html.escape(repr(text), quote=False)}</code>"


def visible(text: str) -> str:
    """A token's text, escaped, on one line: a line's end is shown, and so is an empty text."""
    shown = text.replace("\n", "\u23ce").replace("\t", "\u21e5")
    return html.escape(shown) if shown.strip() else "\u2423" * max(1, len(shown))


def chip(text: str, kind: str = "token", place_of: int | None = None) -> str:
    small = "" if place_of is None else f"<sub>{place_of}</sub>"
    return f'<span class="{kind}">{visible(text)}{small}</span>'


def prompt_of(it: Explanation) -> str:
    """The prompt, escaped, its beginning left out if it is long."""
    text = join(token.text for token in it.tokens)
    return html.escape(text if len(text) <= 90 else "\u2026" + text[-90:])


def scrolling(table: str, label: str) -> str:
    """A table that may be wider than the screen; the arrow keys move it."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{label}">{table}</div>'


def signed(x: float) -> str:
    return f"{x:+.4f}"


# ---- the parts ----------------------------------------------------------------------------------


def legend(it: Explanation) -> str:
    """The letters of the shapes."""
    named = {
        "T": "tokens",
        "D": "width",
        "H": "query heads",
        "K": "KV heads",
        "G": "query heads for each KV head",
        "d": "width of a head",
        "I": "width of the MLP",
        "V": "tokens that there are",
        "L": "tokens of context",
        "P": "blocks of the cache",
        "S": "tokens for each block",
    }
    letters = [f"<b>{k}</b>&nbsp;=&nbsp;{n:,} {named[k]}" for k, n in it.letters.items()]
    return f'<p class="dim">{", ".join(letters)}</p>'


def bars(predictions: Sequence[Prediction]) -> str:
    rows = [
        f"<tr><td>{word(p.text)}</td><td class=num>{share(p.probability)}</td>"
        f'<td><span class="bar" style="width:{100 * p.probability:.1f}%"></span></td></tr>'
        for p in predictions
    ]
    return f'<table class="bars">{join(rows)}</table>'


def lens_table(lenses: Sequence[Lens]) -> str:
    rows = []
    for each in lenses:
        cells = join(
            f'<td class="up" style="--p:{0.6 * p.probability**0.5:.2f}">'
            f"{word(p.text)} <small>{share(p.probability)}</small></td>"
            for p in each.predictions
        )
        rows.append(f"<tr><th>{place(each)}</th>{cells}</tr>")
    return scrolling(f'<table class="lens">{join(rows)}</table>', "after each layer")


def sum_of_parts(it: Explanation) -> str:
    heads = sum(h.adds for layer in it.layers for h in layer.heads)
    heads += sum(layer.rest_adds for layer in it.layers)
    mlps = sum(layer.mlp_adds for layer in it.layers)
    total = it.embed_adds + heads + mlps
    return (
        f"<p>Embedding {signed(it.embed_adds)}, heads {signed(heads)}, MLPs {signed(mlps)}: "
        f"together {total:.4f}. The model's own logit is {it.logit:.4f}. "
        '<small><span class="up" style="--p:.5">&emsp;</span> adds, '
        '<span class="down" style="--p:.5">&emsp;</span> takes away; columns are heads.</small></p>'
    )


def parts_table(it: Explanation) -> str:
    """A row for each layer: what each head adds, then all of them, then the MLP."""
    most = max((abs(h.adds) for layer in it.layers for h in layer.heads), default=0) or 1
    numbers = join(f"<th>{h.head}</th>" for h in it.layers[0].heads)
    rows = [f"<thead><tr><th></th>{numbers}<th>heads</th><th>MLP</th></tr></thead>"]
    for i, layer in enumerate(it.layers):
        cells = join(added_cell(it, i, h, most) for h in layer.heads)
        attention = sum(h.adds for h in layer.heads) + layer.rest_adds
        sums = f'<td class="sum num">{attention:+.2f}</td><td class="sum num">'
        rows.append(f"<tr><th>layer {i}</th>{cells}{sums}{layer.mlp_adds:+.2f}</td></tr>")
    return scrolling(f'<table class="heat">{join(rows)}</table>', "what each head adds")


def added_cell(it: Explanation, layer: int, head: Head, most: float) -> str:
    read = repr(it.tokens[head.strongest].text)
    said = f"layer {layer}, head {head.head}: {signed(head.adds)}, reads most of {read}"
    kind = "up" if head.adds >= 0 else "down"
    return (
        f'<td class="{kind}" style="--p:{0.9 * abs(head.adds) / most:.2f}" '
        f'title="{html.escape(said)}"></td>'
    )


def cache_of(it: Explanation) -> list[str]:
    """Where the keys and values lie."""
    if it.blocks is None:
        return []
    blocks = it.blocks
    return [
        heading("cache", "Where keys and values are kept"),
        chips_by_block(it, blocks),
        f"<p>{blocks.token_bytes:,} bytes a token: keys and values of {it.letters['K']} KV heads "
        f"of {it.letters['d']} numbers in {several(len(it.layers), 'layer')}; "
        f"{blocks.total_bytes:,} bytes in {several(len(blocks.table), 'block')} of "
        f"{several(blocks.size, 'token')}. Every layer writes to these blocks of its own part of "
        "the pool and reads all of them:</p>",
        lines_of((blocks.write, blocks.read), True),
    ]


def chips_by_block(it: Explanation, blocks: Blocks) -> str:
    items = []
    for i, block in enumerate(blocks.table):
        first = i * blocks.size
        own = it.tokens[first : first + blocks.size]
        chips = join(chip(token.text, place_of=first + j) for j, token in enumerate(own))
        items.append(f"<li><small>block {block}</small>{chips}</li>")
    return f'<ol class="tokens">{join(items)}</ol>'


def lines_of(code: Sequence[Code], opened: bool) -> str:
    """Lines of code under the places where they stand."""
    if opened:
        return join(
            f'<div class="dim"><code>{html.escape(each.place)}</code></div>'
            f"<pre>{html.escape(each.text)}</pre>"
            for each in code
        )
    places = ", ".join(html.escape(each.place) for each in code)
    lines = lines_of(code, True)
    return f'<details class="lines"><summary><code>{places}</code></summary>{lines}</details>'


def op(step: Step, opened: bool) -> str:
    """One operation. opened: with its lines of code in sight."""
    numbers = "&ensp;".join(f"{x:.4g}" for x in step.numbers)
    letters = html.escape(step.shape)
    sizes = " &times; ".join(f"{n:,}" for n in step.sizes)
    return (
        f'<div class="op"><div><b><code>{step.point}</code></b><br>{html.escape(step.what)}<br>'
        f'<span class="dim">[{letters}] = {sizes}</span></div>'
        f'<div><span class="formula">{html.escape(step.formula)}</span><br>'
        f'<span class="num"><small>{step.at}</small> {numbers} &hellip;</span>'
        f"{lines_of(step.code, opened)}</div></div>"
    )


def layer_details(it: Explanation, i: int, opened: bool) -> str:
    layer = it.layers[i]
    attention = sum(h.adds for h in layer.heads) + layer.rest_adds
    predicted = word(it.predictions[0].text)
    best = layer.lens.predictions[0]
    said = (
        f"attention adds {attention:+.2f} to {predicted}, the MLP {layer.mlp_adds:+.2f}; "
        f"then it would say {word(best.text)}, {share(best.probability)}"
    )
    inner = [
        "<h3>What each head reads for the last token</h3>",
        attention_table(it, layer),
        strongest_table(it, layer),
        *(op(step, opened) for step in layer.steps),
    ]
    state = " open" if opened else ""
    summary = f"<summary>Layer {i} <span>{said}</span></summary>"
    return f'<details id="layer{i}"{state}>{summary}{join(inner)}</details>'


def attention_table(it: Explanation, layer: LayerStory) -> str:
    """Rows are heads, columns the prompt's tokens."""
    words = join(f"<th>{visible(token.text)}</th>" for token in it.tokens)
    rows = [f"<thead><tr><th></th>{words}</tr></thead>"]
    for head in layer.heads:
        cells = join(
            f'<td class="up" style="--p:{p**0.5:.2f}" '
            f'title="head {head.head}, {html.escape(repr(it.tokens[j].text))}: {share(p)}"></td>'
            for j, p in enumerate(head.pattern)
        )
        rows.append(f"<tr><th>head {head.head}, KV {head.kv_head}</th>{cells}</tr>")
    return scrolling(f'<table class="heat">{join(rows)}</table>', "what each head reads")


def strongest_table(it: Explanation, layer: LayerStory) -> str:
    """The same in words, for whoever does not see the colours."""
    rows = []
    for head in layer.heads:
        block = "" if head.block is None else f"<td>{head.block}</td>"
        token = it.tokens[head.strongest]
        rows.append(
            f"<tr><td>{head.head}</td><td>{head.kv_head}</td>"
            f"<td>{head.strongest} {word(token.text)}</td>"
            f"<td class=num>{share(head.pattern[head.strongest])}</td>{block}"
            f"<td class=num>{signed(head.adds)}</td></tr>"
        )
    column = "" if it.blocks is None else "<th>block</th>"
    predicted = word(it.predictions[0].text)
    head_row = (
        "<thead><tr><th>head</th><th>KV head</th><th>reads most</th><th>share</th>"
        f"{column}<th>adds to {predicted}</th></tr></thead>"
    )
    table = scrolling(f"<table>{head_row}{join(rows)}</table>", "heads in numbers")
    summary = "<summary>the heads in numbers</summary>"
    return f'<details class="lines">{summary}{table}</details>'
