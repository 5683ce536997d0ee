"""An `Explanation` as text for a terminal of 100 columns, and what such texts are made of."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from minqwen.lab.explain.explain import Explanation, Head, Lens, Prediction, Step
from minqwen.lab.explain.sources import Code

WIDTH = 100
STRONGEST = 5  # heads that are listed of all layers
CELL = 24  # columns of a predicted token

Row = Sequence[str]


def as_text(it: Explanation, layer: int) -> str:
    """The whole story; `layer` in every detail, the others in two lines each."""
    lines = [*heading(it), *tokens(it), *title("From ids to numbers"), *steps([it.embed])]
    for i in range(len(it.layers)):
        lines += layer_in_detail(it, i) if i == layer else layer_in_short(it, i)
    lines += [*title("From numbers to a token"), *steps(it.after)]
    return "\n".join([*lines, *lens(it), *parts(it), *predictions(it)])


# ---- words --------------------------------------------------------------------------------------


def number(x: float) -> str:
    """Four digits, as wide as any."""
    return f"{x:11.4g}"


def numbers(values: Iterable[float]) -> str:
    return "".join(map(number, values))


def share(p: float) -> str:
    """ "27.0 %"; what is not zero is not shown as zero."""
    return "< 0.1 %" if 0 < p < 0.0005 else f"{100 * p:.1f} %"


def quoted(text: str, most: int = CELL - 10) -> str:
    """A token's text as Python writes it, on one line and not too long."""
    shown = repr(text)
    return shown if len(shown) <= most else shown[: most - 3] + "..." + shown[0]


def named(prediction: Prediction) -> str:
    return f"{quoted(prediction.text)} {share(prediction.probability)}"


def several(count: int, what: str) -> str:
    """ "1 token", "12 tokens"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def title(text: str, token: str = "") -> list[str]:
    return ["", (text.upper() + token).rstrip()]


def wrapped(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def table(rows: Sequence[Row], indent: str = "  ") -> list[str]:
    """Columns as wide as their widest cell; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
        lines.append((indent + cells).rstrip())
    return lines


def shape_of(it: Step) -> str:
    return f"[{it.shape}] = {' x '.join(map(str, it.sizes))}"


def coded(code: Code, indent: int = 4) -> list[str]:
    """The place, then the lines, as far to the right as they fit."""
    lines = code.text.splitlines()
    room = max(0, min(indent + 2, WIDTH - max(map(len, lines))))
    return [" " * indent + code.place, *((" " * room + line).rstrip() for line in lines)]


# ---- an explanation -----------------------------------------------------------------------------


def heading(it: Explanation) -> list[str]:
    best = it.predictions[0]
    said = (
        f"One forward pass of {it.model}: {it.dtype}, {it.arithmetic} arithmetic, "
        f"{several(len(it.layers), 'layer')}. After {several(len(it.tokens), 'token')} it predicts "
        f"{best.text!r}, with a probability of {share(best.probability)}. The numbers below are "
        "the first ones of the last token, which predicts; where there are heads, of head 0."
    )
    letters = "  ".join(f"{name}={value}" for name, value in it.letters.items())
    return [*wrapped(said, ""), "", f"Letters: {letters}"]


def tokens(it: Explanation) -> list[str]:
    """The prompt's tokens, block by block."""
    words = [f"{i} {quoted(token.text)}" for i, token in enumerate(it.tokens)]
    blocks = it.blocks
    if blocks is None:
        return [*title("Tokens"), *wrapped("   ".join(words))]
    lines = title("Tokens, and where their keys and values lie")
    for place, block in enumerate(blocks.table):
        own = "   ".join(words[place * blocks.size : (place + 1) * blocks.size])
        first, *rest = wrapped(own, " " * 12)
        lines += [f"  block {block:<4}{first[12:]}", *rest]
    said = (
        f"Keys and values take {blocks.token_bytes:,} bytes a token, {blocks.total_bytes:,} in "
        f"{several(len(blocks.table), 'block')} of {several(blocks.size, 'token')}. Every layer "
        "writes to these blocks of its own part of the pool, and reads all of them:"
    )
    return [*lines, *wrapped(said), *coded(blocks.write), *coded(blocks.read)]


def steps(several: Sequence[Step]) -> list[str]:
    """Operations one after another. Lines of code that the last one had are not shown again."""
    lines: list[str] = []
    shown: tuple[Code, ...] = ()
    for each in several:
        lines += [
            f"  {each.point:<24}{each.what}",
            f"    {shape_of(each)}",
            *wrapped(each.formula, "    "),
            f"    {each.at}{numbers(each.numbers)}",
        ]
        new = [code for code in each.code if code not in shown]
        lines += [line for code in new for line in coded(code)]
        lines += [""] if new else ["    by the lines above", ""]
        shown = each.code
    return lines[:-1]


def layer_in_detail(it: Explanation, number_of: int) -> list[str]:
    layer = it.layers[number_of]
    lines = [*title(f"Layer {number_of}, every operation"), *steps(layer.steps), ""]
    predicted = quoted(it.predictions[0].text)
    head = ("head", "KV", "reads most", "share", "block", f"adds to {predicted}")
    rows = [head_row(it, each) for each in layer.heads]
    return [*lines, *table([head, *rows]), *layer_in_short(it, number_of)[1:]]


def head_row(it: Explanation, head: Head) -> Row:
    block = "-" if head.block is None else str(head.block)
    word = f"{head.strongest} {quoted(it.tokens[head.strongest].text)}"
    most = share(head.pattern[head.strongest])
    return str(head.head), str(head.kv_head), word, most, block, f"{head.adds:+.4f}"


def layer_in_short(it: Explanation, number_of: int) -> list[str]:
    layer = it.layers[number_of]
    best = max(layer.heads, key=lambda head: abs(head.adds))
    word = quoted(it.tokens[best.strongest].text)
    predicted = quoted(it.predictions[0].text)
    attention = sum(head.adds for head in layer.heads) + layer.rest_adds
    said = (
        f"Layer {number_of}: attention adds {attention:+.3f} to {predicted} and the MLP "
        f"{layer.mlp_adds:+.3f}; most of all heads, head {best.head} adds {best.adds:+.3f}, which "
        f"reads most of {word}. The likeliest token is then {named(layer.lens.predictions[0])}"
    )
    said += "." if layer.lens.rank == 1 else f", and {predicted} is number {layer.lens.rank}."
    return ["", *wrapped(said, "")]


def lens(it: Explanation) -> list[str]:
    rows = [
        [place(each), *(named(p) for p in each.predictions[:3])]
        for each in (it.embed_lens, *(layer.lens for layer in it.layers))
    ]
    head = ["after", "likeliest", "second", "third"]
    lines = title("What it would say after each layer (logit lens)")
    return [*lines, *table([head, *rows])]


def place(it: Lens) -> str:
    """ "embed" or "layer 3"."""
    return it.point if it.point == "embed" else f"layer {it.point.split('.')[1]}"


def parts(it: Explanation) -> list[str]:
    """What adds up to the predicted token's logit."""
    heads = [(i, head) for i, layer in enumerate(it.layers) for head in layer.heads]
    strongest = sorted(heads, key=lambda pair: -abs(pair[1].adds))[:STRONGEST]
    attention = sum(head.adds for _, head in heads) + sum(x.rest_adds for x in it.layers)
    mlps = sum(layer.mlp_adds for layer in it.layers)
    said = (
        f"embedding {it.embed_adds:+.4f}, heads {attention:+.4f}, MLPs {mlps:+.4f}: together "
        f"{it.embed_adds + attention + mlps:.4f}. The model's own logit is {it.logit:.4f}."
    )
    rows: list[Row] = [("layer", "head", "reads most", "adds")]
    for i, head in strongest:
        word = f"{head.strongest} {quoted(it.tokens[head.strongest].text)}"
        rows.append((str(i), str(head.head), word, f"{head.adds:+.4f}"))
    above = title("Who adds to the logit of ", quoted(it.predictions[0].text))
    return [*above, *wrapped(said), *table(rows)]


def predictions(it: Explanation) -> list[str]:
    rows: list[Row] = [("next token", "id", "probability")]
    rows += [(quoted(p.text), str(p.id), share(p.probability)) for p in it.predictions]
    return [*title("What comes next"), *table(rows)]
