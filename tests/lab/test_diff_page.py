"""A comparison with another engine as a table and as one page."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from minqwen.lab.compare import Measure, measure_logits
from minqwen.lab.diff.diff import Explanation, First, PointReport, Report, TokenErrors
from minqwen.lab.diff.page import as_html, as_text


def point(name, units, added, verdict):
    worst = Measure(units * 1e-6, 1e-6, 10, 0.5, (2, 1), 1e-3, 1 - 1e-6, 77.0)
    return PointReport(name, units, added, verdict, 0, worst)


@pytest.fixture
def report():
    points = [
        point("embed", 0.0, 0.0, "rounding"),
        point("layers.0.mlp.act", 1.0, 1.0, "rounding"),
        point("layers.0.resid_post", 1.1, 1.0, "rounding"),
        point("layers.1.mlp.act", 900.0, 8234.5, "wrong"),
        point("layers.1.resid_post", 300.0, 1.0, "inherited"),
        point("logits", math.inf, 1.0, "inherited"),
    ]
    rows = [[1.0, 1.2, 0.9], [1.0, 250.0, 3e7]]
    tokens = TokenErrors(0, [5, 6, 7], ["layers.0.resid_post", "layers.1.resid_post"], rows)
    return Report(
        "diverge",
        "float32",
        points,
        First(1, "MLP's activation", "layers.1.mlp.act", 8234.5),
        Explanation("gelu", 1.02, "GELU, not <SiLU>."),
        tokens=[tokens],
    )


def text_of(id):
    return {5: "In", 6: " <b>", 7: "\n"}[id]


def test_the_table_ends_with_one_sentence(report):
    lines = as_text(report).splitlines()
    assert lines[0].split()[:3] == ["point", "units", "added"]
    assert (
        lines[4].split()
        == "layers.1.mlp.act 900 8.2e3 wrong 5.00e-01 prompt 0 [2, 1] 1.0e-03 1.0e-06 77".split()
    )
    assert lines[-1] == (
        "first wrong: layer 1, MLP's activation (8.2e3 units, added there); most like `gelu` "
        "(explains the dump to 1.02 units)"
    )


class Page(HTMLParser):
    """What a page has: its tags, its text, and the red of the cells by what they say."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.red = [], "", {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        if "title" in given:
            self.red[given["title"]] = float(re.search(r"([\d.]+)\)$", given["style"])[1])

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_what_is_wrong_in_red(report):
    page = Page(as_html(report, "dump against pack", text_of))
    red = {said.split(":")[0]: value for said, value in page.red.items()}
    assert red["layers.1.mlp.act"] > 0.5
    assert red["layers.0.mlp.act"] == red["layers.1.resid_post"] == red["logits"] == 0
    assert red["layers.1.resid_post, token 1 ' <b>'"] > 0.3
    assert red["layers.1.resid_post, token 2 '\\n'"] == 1
    assert red["layers.0.resid_post, token 2 '\\n'"] == 0
    assert "dump against pack: diverge" in page.text
    assert "first wrong: layer 1, MLP's activation" in page.text
    assert "GELU, not <SiLU>." in page.text  # as text
    worst = page.text[page.text.index("Worst tokens") :]
    assert worst.index("'\\n' (7)") < worst.index("' <b>' (6)") < worst.index("'In' (5)")


def test_heat_maps_name_their_columns_and_frame_the_first_wrong_operation(report):
    text = as_html(report, "dump against pack", text_of)
    framed = re.findall(r'<td class="first" title="([^"]*)"', text)
    assert framed == ["layers.1.mlp.act: 8.2e3 units added, 900 in all, wrong"]
    assert "MLP&#x27;s activation: mlp.act" in text and '<td class="most">8.2e3 units</td>' in text
    assert "<th>In</th><th> &lt;b&gt;</th><th>\\n</th>" in text


def test_the_page_needs_nothing_from_outside_and_nothing_in_it_is_run(report):
    text = as_html(report, "<script>alert(1)</script>", text_of)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "b"} & set(page.tags)
    assert "http" not in text and "url(" not in text


def test_a_report_without_points_or_tokens_has_a_page_too(report):
    tokens = First(None, "the prompt's tokens", "input_ids", math.inf)
    bare = dataclasses.replace(report, points=[], tokens=[], first=tokens)
    assert "just these ids come of gelu" in Page(as_html(bare, "x", text_of)).text
    assert as_text(bare) == bare.sentence()
    assert "Worst tokens" not in as_html(dataclasses.replace(report, tokens=[]), "x", text_of)


def test_what_the_logits_mean_for_the_next_token_is_told(report):
    truth = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
    report.logits = measure_logits(truth * 1.1, truth + 1e-6, truth, torch.tensor([1, 2, 3]))
    line = as_text(report).splitlines()[-2]
    assert re.fullmatch(r"logits: KL 0\.\S+ nats .* top-1 100.00%, top-5 .*, perplexity x .*", line)
    assert line in Page(as_html(report, "x", text_of)).text
