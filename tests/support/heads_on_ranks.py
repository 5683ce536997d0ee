"""Which rank holds which heads of the 7B: a table and a picture for docs/parallel.md.

Both are made of the shards that `minqwen/parallel.py` cuts. After a change there:

    PYTHONPATH=tests python -m support.heads_on_ranks
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from minqwen.heads.layout import Layout, extended_config, layout
from minqwen.lab.shapes import official_config
from minqwen.parallel import PLAN, shard
from support.paths import ROOT

CONFIG = official_config("7B")
SVG = ROOT / "docs" / "heads-on-ranks.svg"
PAGE = ROOT / "docs" / "parallel.md"
CASES = ((28, 4), (32, 8))  # query heads, ranks
ATTENTION = "model.layers.0.self_attn."
COLOURS = ("#9ecae9", "#ffbf79", "#a5d99b", "#d4b9e8")  # of KV heads; their numbers stand there too
SIDE, GAP, LEFT, TOP = 34, 4, 80, 62  # of a square, between squares, of the first square


@dataclass(frozen=True)
class Held:
    """What a rank holds. slots: of query heads, as the model numbers them; kv_heads: likewise."""

    rank: int
    slots: range
    kv_heads: range


def held(heads: int, ranks: int) -> list[Held]:
    """What each rank holds of the 7B, read off its rows of q_proj and k_proj."""
    config = extended_config(CONFIG, layout(CONFIG, heads))

    def of(rank: int, name: str) -> range:
        piece = shard(f"{ATTENTION}{name}.weight", config, rank, ranks)
        assert piece is not None and piece.start % config.head_dim == 0
        return range(piece.start // config.head_dim, piece.stop // config.head_dim)

    return [Held(rank, of(rank, "q_proj"), of(rank, "k_proj")) for rank in range(ranks)]


def label(slots: Layout, slot: int) -> str:
    """The source's head in a slot, in brackets if it is a copy that adds nothing."""
    return f"{slots.heads[slot]}" if slots.shares[slot] else f"[{slots.heads[slot]}]"


# ---- the tables ---------------------------------------------------------------------------------


def span(numbers: range) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def table(heads: int, ranks: int) -> str:
    """A row for each rank."""
    slots = layout(CONFIG, heads)
    rows = [
        f"| {it.rank} | {span(it.slots)} | {' '.join(label(slots, j) for j in it.slots)} "
        f"| {span(it.kv_heads)} |"
        for it in held(heads, ranks)
    ]
    first = f"| rank of {ranks} | slots of {heads} | the checkpoint's query heads | KV head |"
    return "\n".join([first, "|---|---|---|---|", *rows])


SPLIT = {
    (0, "vocabulary"): "rows; the embedding's are added up over the ranks, the logits gathered",
    (0, "query heads"): "rows, in whole query heads",
    (0, "kv heads"): "rows, in whole KV heads",
    (0, "intermediate"): "rows, the MLP's channels",
    (1, "query heads"): "columns, in whole query heads; then a sum over the ranks",
    (1, "intermediate"): "columns, the MLP's channels; then a sum over the ranks",
}


def table_of_the_plan() -> str:
    """A row for each way to split."""
    names: dict[tuple[int, str], list[str]] = {}
    for name, how in PLAN.items():
        names.setdefault(how, []).append(f"`{name}`")
    rows = [f"| {', '.join(names[how])} | {SPLIT[how]} |" for how in names]
    return "\n".join(["| parameters | split by |", "|---|---|", *rows])


# ---- the picture --------------------------------------------------------------------------------


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{words}</text>'


def square(x: float, y: float, fill: str, words: str, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{SIDE}" height="{SIDE}" rx="4" fill="{fill}" '
        f'stroke="#333"{dash}/>' + text(x + SIDE / 2, y + SIDE / 2 + 4, words)
    )


def row(slots: Layout, it: Held, top: float, most: int) -> str:
    """One rank: its query heads, then its KV head. most: query heads of a rank."""
    parts = [text(LEFT - 14, top + SIDE / 2 + 4, f"rank {it.rank}", anchor="end")]
    for i, slot in enumerate(it.slots):
        kv_head, adds = slots.reads(slot), bool(slots.shares[slot])
        assert kv_head in it.kv_heads  # a rank holds what its heads read
        fill = COLOURS[kv_head] if adds else "#ffffff"
        x = LEFT + i * (SIDE + GAP)
        parts.append(square(x, top, fill, f"{slots.heads[slot]}", dashed=not adds))
    for kv_head in it.kv_heads:
        x = LEFT + most * (SIDE + GAP) + 24
        parts.append(square(x, top, COLOURS[kv_head], f"{kv_head}"))
    return "\n".join(parts)


def panel(heads: int, ranks: int, top: float) -> tuple[str, float]:
    """The ranks of one case under each other, and where the panel ends."""
    slots, ranks_held = layout(CONFIG, heads), held(heads, ranks)
    most = len(ranks_held[0].slots)
    kv_x = LEFT + most * (SIDE + GAP) + 24 + SIDE / 2
    parts = [
        text(16, top + 18, f"{heads} query heads on {ranks} ranks", 16, "start"),
        text(LEFT, top + 48, "query heads", anchor="start"),
        text(kv_x, top + 48, "KV head"),
    ]
    parts += [row(slots, it, top + TOP + it.rank * (SIDE + 8), most) for it in ranks_held]
    return "\n".join(parts), top + TOP + ranks * (SIDE + 8) + 18


def picture() -> str:
    """The SVG: a panel for each case."""
    end, panels = 12.0, []
    for heads, ranks in CASES:
        body, end = panel(heads, ranks, end)
        panels.append(body)
    notes = (
        "A colour is a KV head. On 8 ranks each KV head is held twice.",
        "Dashed: a copied head whose columns of o_proj are zero; it adds nothing.",
    )
    panels += [text(16, end + 12 + 20 * i, note, anchor="start") for i, note in enumerate(notes)]
    size = f'width="510" height="{end + 48:g}" viewBox="0 0 510 {end + 48:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" role="img">\n'
        "<title>Which rank holds which heads of Qwen2.5-7B</title>\n"
        '<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(panels) + "\n</svg>\n"
    )


def renewed(page: str) -> str:
    """The page with the tables as they are now. It has one with each first row."""
    for new in (table_of_the_plan(), *(table(*case) for case in CASES)):
        first = new.partition("\n")[0]
        (old,) = re.findall(rf"^{re.escape(first)}\n(?:\|.*\n)*", page, re.M)
        page = page.replace(old, f"{new}\n")
    return page


if __name__ == "__main__":
    SVG.write_text(picture())
    PAGE.write_text(renewed(PAGE.read_text()))
