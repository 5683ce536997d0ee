"""Pictures of one forward pass: attention patterns, the logit lens of every token, who adds what.

`picture` computes them, `as_html` draws one page without scripts. It is read like the page of
`lab/explain/page.py`, and by keyboard too: Tab goes from map to map and makes each of them large.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minqwen.errors import MinqwenError
from minqwen.lab.explain.explain import Explanation, Prediction, Run, Spell, likeliest, run, tell
from minqwen.lab.explain.page import (
    bars,
    chip,
    heading,
    join,
    linked,
    page,
    parts_table,
    prompt_of,
    scrolling,
    sum_of_parts,
    visible,
    word,
)
from minqwen.lab.explain.text import several, share
from minqwen.model import Qwen2

MOST_TOKENS = 128  # a map has a square for each pair of tokens
LEVELS = 12  # of colour
NAMED = 3  # tokens that a row's description names

STYLE = """
.maps{display:grid;gap:.6rem;grid-template-columns:repeat(auto-fill,minmax(8rem,1fr))}
figure{margin:0;padding:.3rem;border:1px solid var(--line);border-radius:.4rem;cursor:zoom-in}
figure svg{display:block;width:100%;max-width:36rem;aspect-ratio:1;background:var(--panel);
overflow:visible}
figcaption{font-size:.8em;color:var(--dim)}
figure path{fill:rgb(var(--up))}figure rect{fill:none;pointer-events:all}
.names{display:none;font:var(--letter) ui-monospace,monospace;fill:var(--text)}
figure:focus{grid-column:1/-1;cursor:default;padding:var(--label) 1rem 1rem var(--label)}
figure:focus .names{display:inline}
.steps td{min-width:4.5rem;max-width:9rem;overflow:hidden;text-overflow:ellipsis}
.steps td.last{outline:1px solid var(--good)}
"""


@dataclass(frozen=True)
class Picture:
    """What is drawn. patterns: of each of `layers`, [H, T, T].

    lens: the likeliest tokens after the embedding and after each layer, for every token.
    """

    story: Explanation
    layers: tuple[int, ...]
    patterns: tuple[Tensor, ...]
    lens: tuple[tuple[str, tuple[tuple[Prediction, ...], ...]], ...]


def picture(
    model: Qwen2,
    ids: Sequence[int],
    spell: Spell,
    name: str,
    layers: Sequence[int] | None = None,
) -> Picture:
    """The pictures of one forward pass on `ids`. layers: whose patterns; None: of all.

    Under tensor parallelism every rank calls it. Raises MinqwenError for too many tokens and for a
    layer that is not there, before anything is computed.
    """
    count = model.config.num_hidden_layers
    shown = tuple(range(count)) if layers is None else tuple(layers)
    for layer in shown:
        if not 0 <= layer < count:
            raise MinqwenError(f"--layers has {layer}, expected 0 to {count - 1}")
    if len(ids) > MOST_TOKENS:
        raise MinqwenError(
            f"the prompt has {len(ids)} tokens, expected at most {MOST_TOKENS}: a map has a square "
            "for each pair of them; `trace.py save` writes patterns of any length"
        )
    it = run(model, ids, None)
    patterns = tuple(it.seen[f"layers.{layer}.attn.pattern"][0] for layer in shown)
    streams = ["embed", *(f"layers.{i}.resid_post" for i in range(count))]
    lens = tuple((point, lens_of_tokens(it, point, spell)) for point in streams)
    return Picture(tell(it, spell, name), shown, patterns, lens)


@torch.inference_mode()
def lens_of_tokens(it: Run, point: str, spell: Spell) -> tuple[tuple[Prediction, ...], ...]:
    """For every token what would come next if the layers ended at `point`."""
    logits = it.seen.logits_after(point)[0].double()
    return tuple(likeliest(row, spell) for row in logits.log_softmax(-1))


# ---- drawing ------------------------------------------------------------------------------------


def as_html(it: Picture) -> str:
    """The whole page."""
    story = it.story
    best = story.predictions[0]
    words = [token.text for token in story.tokens]
    links = [("next", "what comes next"), ("parts", "who adds"), ("lens", "after each layer")]
    links += [(f"layer{i}", f"layer {i}") for i in it.layers]
    parts = [
        f"<style>{STYLE}{sizes(words)}</style>",
        f"<h1>{prompt_of(story)} &rarr; {chip(best.text, 'token says')}</h1>",
        f"<p>{html.escape(story.model)}: {story.dtype}, {story.arithmetic} arithmetic, "
        f"{several(len(story.layers), 'layer')}, {several(len(words), 'token')}.</p>",
        heading("next", "What comes next"),
        bars(story.predictions),
        heading("parts", f"Who adds to the logit of {word(best.text)}"),
        sum_of_parts(story),
        parts_table(story),
        heading("lens", "What it would say after each layer"),
        "<p class=dim>The logit lens: the residual stream at each token, through the final norm "
        "and the head. Stronger colour, more probable; framed, what the model says in the end.</p>",
        lens_of_all(it, words),
        heading("patterns", "What each head reads"),
        "<p class=dim>A row is a token, and its columns are the tokens that it reads; stronger "
        "colour, a larger share. Click on a map, or go to it with Tab, to see it large.</p>",
        labels(words),
        *(maps(it, i, words) for i in range(len(it.layers))),
    ]
    return page(f"minqwen: {prompt_of(story)}", linked(links), parts)


def sizes(words: Sequence[str]) -> str:
    """The size of the tokens' names beside a large map, in its squares, and the room for them."""
    letter = min(0.6, len(words) / 30)
    rem_of_square = 36 / len(words)
    longest = max(len(visible(text)) for text in words)
    room = 1 + 0.65 * longest * letter * rem_of_square
    return f":root{{--letter:{letter:.2f}px;--label:{room:.1f}rem}}"


def lens_of_all(it: Picture, words: Sequence[str]) -> str:
    """Rows are layers, columns the prompt's tokens."""
    final = [predictions[0].id for predictions in it.lens[-1][1]]
    columns = join(f"<th>{i} {visible(text)}</th>" for i, text in enumerate(words))
    rows = [f"<thead><tr><th></th>{columns}</tr></thead>"]
    for point, by_token in it.lens:
        place = "embedding" if point == "embed" else f"layer {point.split('.')[1]}"
        cells = join(lens_cell(p, p[0].id == last) for p, last in zip(by_token, final))
        rows.append(f"<tr><th>{place}</th>{cells}</tr>")
    table = f'<table class="lens steps">{join(rows)}</table>'
    return scrolling(table, "the likeliest token after each layer")


def lens_cell(predictions: Sequence[Prediction], is_last: bool) -> str:
    best = predictions[0]
    said = html.escape(", ".join(f"{p.text!r} {share(p.probability)}" for p in predictions))
    kind = "up last" if is_last else "up"
    return (
        f'<td class="{kind}" style="--p:{0.6 * best.probability**0.5:.2f}" title="{said}">'
        f"{visible(best.text)} <small>{share(best.probability)}</small></td>"
    )


def labels(words: Sequence[str]) -> str:
    """The tokens' names, once, for all maps that are large."""
    rows = join(
        f'<text x="-.3" y="{i + 0.7}" text-anchor="end">{visible(text)}</text>'
        f'<text transform="translate({i + 0.7} -.3) rotate(-90)">{visible(text)}</text>'
        for i, text in enumerate(words)
    )
    svg = (
        f'<svg width="0" height="0" aria-hidden="true"><defs><g id="names">{rows}</g></defs></svg>'
    )
    return f'<div style="position:absolute">{svg}</div>'


def maps(it: Picture, i: int, words: Sequence[str]) -> str:
    """The maps of all heads of one layer."""
    layer, pattern = it.layers[i], it.patterns[i].float()
    figures = join(
        head_map(layer, h, rows, words, it.story.layers[layer].heads[h].adds)
        for h, rows in enumerate(pattern)
    )
    state = " open" if i == 0 else ""
    summary = f"<summary>Layer {layer} <span>{several(len(pattern), 'head')}</span></summary>"
    return f'<details id="layer{layer}"{state}>{summary}<div class="maps">{figures}</div></details>'


def head_map(layer: int, head: int, pattern: Tensor, words: Sequence[str], adds: float) -> str:
    """One head's pattern [T, T]: a row for each token, described in words."""
    rows = pattern.tolist()
    count = len(rows)
    lines = join(map_row(i, row, words) for i, row in enumerate(rows))
    said = html.escape(f"layer {layer}, head {head}. The last token: {reads(rows[-1], words)}")
    return (
        f'<figure tabindex="0"><svg viewBox="0 0 {count} {count}" role="img" aria-label="{said}">'
        f'{lines}<use href="#names" class="names"/></svg>'
        f"<figcaption>head {head} <span class=num>{adds:+.2f}</span></figcaption></figure>"
    )


def map_row(i: int, row: Sequence[float], words: Sequence[str]) -> str:
    """The squares of one token, those of one colour as one path."""
    squares: dict[int, list[str]] = {}
    for j, value in enumerate(row[: i + 1]):
        level = round(LEVELS * value**0.5)  # so that small shares are seen
        if level:
            squares.setdefault(level, []).append(f"M{j} {i}h1v1h-1z")
    paths = join(
        f'<path opacity="{level / LEVELS:.2f}" d="{join(parts)}"/>'
        for level, parts in sorted(squares.items())
    )
    said = html.escape(f"{i} {words[i]!r}: {reads(row, words)}")
    return f'<g><title>{said}</title><rect y="{i}" width="{i + 1}" height="1"/>{paths}</g>'


def reads(row: Sequence[float], words: Sequence[str]) -> str:
    """The tokens that a row reads most, in words."""
    most = sorted(range(len(row)), key=lambda j: -row[j])[:NAMED]
    return ", ".join(told(most, row, words))


def told(most: Iterable[int], row: Sequence[float], words: Sequence[str]) -> Iterable[str]:
    return (f"{j} {words[j]!r} {share(row[j])}" for j in most if row[j] > 0)
