"""docs/model.md: its quotes are the code, every operation is on it, and its numbers are right."""

from __future__ import annotations

import math
import re

import pytest
from support.paths import EMBEDDED, ROOT
from support.quoted_code import mended, quotes

from minqwen.config import ModelConfig
from minqwen.config.rope_scaling import RopeScaling
from minqwen.lab.explain.explain import AFTER, BEFORE, IN_LAYER, run, tell
from minqwen.lab.shapes import official_config
from minqwen.model.rope import yarn_attention_factor, yarn_range

PAGE = (ROOT / "docs" / "model.md").read_text()
CONFIG = official_config("7B")
TABLES = [
    {row[0]: row[1:] for row in (re.split(r" *\| *", line)[1:-1] for line in table.splitlines())}
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.M)
]


def test_every_quote_is_in_its_file_at_that_line():
    """If code has only moved: PYTHONPATH=tests python -m support.quoted_code docs/model.md"""
    assert len([*quotes(PAGE)]) > 20
    assert PAGE == mended(PAGE)


def test_a_wrong_line_number_is_mended_and_a_wrong_quote_is_told():
    line = next(quotes(PAGE)).line
    assert mended(PAGE.replace(f".py:{line}\n", ".py:1\n", 1)) == PAGE
    with pytest.raises(AssertionError, match="no longer has these 3 lines"):
        mended(PAGE.replace("for i, layer in", "for j, layer in"))


def test_every_operation_that_explain_tells_is_on_the_page(embedded_model):
    """The calling statement and the operation itself, each at its own line."""
    story = tell(run(embedded_model, [5, 300, 17], None), str, "embedded")
    steps = [story.embed, *story.layers[0].steps, *story.after]
    assert len(steps) == len([BEFORE, *IN_LAYER, *AFTER])
    shown = {
        (quote.file, quote.line + i): text.strip()
        for quote in quotes(PAGE)
        for i, text in enumerate(quote.lines)
    }
    for step in steps:
        for code in step.code:
            for i, text in enumerate(code.text.splitlines()):
                assert shown.get((code.file, code.line + i)) == text.strip(), step.point


def sizes(config: ModelConfig) -> list[str]:
    """A column of the table of letters."""
    c = config
    heads = f"{c.num_attention_heads}, {c.num_key_value_heads}, {c.group_size}"
    eps = f"{c.rms_norm_eps:g}".replace("e-0", "e-")
    widths = (c.head_dim, c.intermediate_size, c.vocab_size)
    return [
        str(c.num_hidden_layers),
        f"{c.hidden_size:,}",
        heads,
        *(f"{width:,}" for width in widths),
        f"{eps}, {c.rope_theta:,.0f}",
    ]


def test_the_letters_have_the_sizes_of_the_configs():
    _, _, *rows = TABLES[0].values()
    assert [row[1] for row in rows] == sizes(CONFIG)
    assert [row[2] for row in rows] == sizes(ModelConfig.from_json(EMBEDDED / "config.json"))


def test_the_numbers_of_the_7b_follow_from_its_config():
    c, shapes = CONFIG, CONFIG.parameter_shapes()
    layer = {name: math.prod(shapes[name]) for name in shapes if ".layers.0." in name}

    def one(*parts: str) -> int:
        """The size that the matrices of all these parts of a layer have."""
        ends = tuple(f"{part}.weight" for part in parts)
        (size,) = {n for name, n in layer.items() if name.endswith(ends)}
        return size

    q, k, mlp = one("q_proj", "o_proj"), one("k_proj", "v_proj"), one("gate_proj", "down_proj")
    biases = sum(n for name, n in layer.items() if name.endswith("bias"))
    norms = sum(n for name, n in layer.items() if "norm" in name)
    base = c.flops_per_token(0)
    told = [row[1] for row in TABLES[1].values()][2:]
    assert told == [
        f"{math.prod(shapes['lm_head.weight']):,} each",
        f"{q:,} each",
        f"{k:,} each",
        f"{mlp:,} each",
        f"{biases:,}; {norms:,}",
        f"{sum(layer.values()):,}",
        f"{c.num_parameters():,}",
        f"{c.weight_bytes('bfloat16'):,}",
        f"{c.kv_bytes_per_token('bfloat16'):,} bytes",
        f"{base:,} + {c.flops_per_token(1) - base:,} n",
    ]


def test_the_formulas_of_the_table_give_its_numbers():
    """Each formula is computed with the letters' sizes."""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    letters = {letter: getattr(CONFIG, name) for letter, name in zip("LDHK", names)}
    letters |= {"d": CONFIG.head_dim, "I": CONFIG.intermediate_size, "V": CONFIG.vocab_size, "n": 0}
    for what, (formula, told) in [*TABLES[1].items()][2:]:
        if "each" in formula or "sum" in formula or "layers" in formula:
            continue  # words
        formula = re.sub(r"\(k, v\)|bytes|·", "", formula)
        for term, value in zip(formula.split(";"), re.findall(r"\d[\d,]*", told)):
            factors = re.sub(r"(?<=[\w)])\s+(?=[\w(])", " * ", term.strip())
            assert eval(factors, {}, letters) == int(value.replace(",", "")), what


def test_yarns_numbers_are_those_of_the_code():
    scaling = RopeScaling(factor=4.0, original_max_position_embeddings=32768)
    low, high = yarn_range(CONFIG.head_dim, CONFIG.rope_theta, scaling)
    said = f"low {low}, high {high}, factor {yarn_attention_factor(scaling):.4f}"
    assert said in " ".join(PAGE.split())


def test_it_fits_on_two_sheets():
    assert len(PAGE.splitlines()) <= 200
    assert all(len(line) <= 100 for line in PAGE.splitlines() if not line.startswith("|"))
