"""A `Contrast` as text for a terminal of 100 columns."""

from __future__ import annotations

from minqwen.lab.explain.contrast import Contrast, First
from minqwen.lab.explain.text import (
    Row,
    coded,
    named,
    numbers,
    place,
    quoted,
    several,
    table,
    title,
    wrapped,
)


def as_text(it: Contrast) -> str:
    """What the mistake is, where it is seen first, and what becomes of it."""
    lines = wrapped(f"{it.name}: {it.symptom} (Kind: {it.kind}. Source: {it.source}.)", "")
    lines += title("The mistake")
    for code in it.code:
        lines += coded(code)
    if it.given:
        lines += wrapped(f"with {', '.join(it.given)}", "    ")
    lines += first(it)
    if it.first is not None:
        lines += after_layers(it)
    return "\n".join([*lines, *token_by_token(it), *both_predictions(it)])


def first(it: Contrast) -> list[str]:
    lines = title("Where it is seen first")
    seen = it.first
    if seen is None:
        return [*lines, *wrapped(why_unseen(it))]
    token = quoted(it.right.tokens[seen.token].text)
    return [
        *lines,
        f"  {seen.point}, {seen.what}",
        f"  {seen.at}: token {seen.token} {token}; all before it is the same in every bit",
        f"  right {numbers(seen.right)}",
        f"  wrong {numbers(seen.wrong)}",
        *right_lines(seen),
        *(wrapped(f"The logits do not move beyond rounding: {it.silent}.") if it.silent else []),
    ]


def right_lines(seen: First) -> list[str]:
    if not seen.code:
        return []
    return ["  computed right:", *(line for code in seen.code for line in coded(code))]


def why_unseen(it: Contrast) -> str:
    """Why no point shows a mistake."""
    if it.kind == "logits":
        return "At no point: the model is right, and what is reported of its logits is not."
    reason = f" ({it.silent})" if it.silent else ""
    return f"At no point: on this prompt and in {it.right.dtype} no bit differs{reason}."


def after_layers(it: Contrast) -> list[str]:
    """The likeliest token after each layer, and how many heads read another token most."""
    rows: list[Row] = [("after", "right", "wrong", "error", "heads that read another token")]
    errors = {each.point: each.size for each in it.points}
    sides = (it.right, it.wrong)
    for i in range(-1, len(it.right.layers)):
        a, b = (side.layers[i].lens if i >= 0 else side.embed_lens for side in sides)
        error = f"{errors[a.point]:.2g}" if a.point in errors else "-"
        moved = moved_heads(it, i) if i >= 0 else "-"
        rows.append((place(a), named(a.predictions[0]), named(b.predictions[0]), error, moved))
    lines = title("What becomes of it")
    note = (
        "error: of the residual stream, as a share of its size. The tokens are the likeliest "
        "after each layer."
    )
    return [*lines, *table(rows), *wrapped(note)]


def moved_heads(it: Contrast, layer: int) -> str:
    """ "3 of 28", or "-" where the prompts differ."""
    a, b = (side.layers[layer].heads for side in (it.right, it.wrong))
    if it.right.tokens != it.wrong.tokens or len(a) != len(b):
        return "-"
    moved = sum(x.strongest != y.strongest for x, y in zip(a, b))
    return f"{moved} of {len(a)}"


def token_by_token(it: Contrast) -> list[str]:
    if not it.places:
        texts = [
            f"  {side}: {several(len(of.tokens), 'token')}, {''.join(t.text for t in of.tokens)!r}"
            for side, of in (("right", it.right), ("wrong", it.wrong))
        ]
        return [*title("The two prompts"), *(line for text in texts for line in wrapped(text))]
    rows: list[Row] = [("token", "right says", "wrong says", "change")]
    for each in it.places:
        change = "same bits" if each.same else f"{each.change:.2g}"
        word = f"{each.position} {quoted(each.text)}"
        rows.append((word, named(each.right), named(each.wrong), change))
    note = "change: the largest change of a log probability."
    return [*title("What each says next, token by token"), *table(rows), *wrapped(note)]


def both_predictions(it: Contrast) -> list[str]:
    rows: list[Row] = [("right", "wrong")]
    pairs = zip(it.right.predictions, it.wrong.predictions)
    rows += [(named(a), named(b)) for a, b in pairs]
    return [*title("What comes next"), *table(rows)]
