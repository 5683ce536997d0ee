"""Pictures of a forward pass: what is drawn is what the model computes, on a page that is whole."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import pytest
import torch
from support.qwen2 import oracle, ours, tokens

from minqwen import MinqwenError
from minqwen.lab.explain.picture import LEVELS, as_html, picture

WORDS = ["a", "<b>", " c", "\n", '"']


def spell(id):
    return WORDS[id % len(WORDS)]


@pytest.fixture(scope="module")
def model():
    with torch.no_grad():
        return ours(oracle(), dtype=torch.float32)  # 6 heads, 2 layers


@pytest.fixture(scope="module")
def ids(model):
    return tokens(model, 1, 7)[0].tolist()


@pytest.fixture(scope="module")
def drawn(model, ids):
    return as_html(picture(model, ids, spell, "a <small> model"))


def test_a_map_has_the_squares_of_its_pattern(model, ids, drawn):
    with torch.no_grad():
        _, seen = model.run_with_cache(torch.tensor([ids]), "*.attn.pattern")
    figures = re.findall(r"<figure.*?</figure>", drawn, re.S)
    assert len(figures) == 2 * 6
    for figure, pattern in zip(figures, torch.cat([x[0] for x in seen.values()])):
        found = torch.zeros(7, 7)
        for opacity, squares in re.findall(r'<path opacity="([\d.]+)" d="([^"]+)"', figure):
            for j, i in re.findall(r"M(\d+) (\d+)h1v1h-1z", squares):
                found[int(i), int(j)] = float(opacity)
        # Half a level, and the two digits that are written.
        assert (found - pattern.sqrt()).abs().max() <= 0.5 / LEVELS + 0.0051


def test_rows_say_in_words_what_they_read(model, ids, drawn):
    with torch.no_grad():
        _, seen = model.run_with_cache(torch.tensor([ids]), "layers.1.attn.pattern")
    row = seen["layers.1.attn.pattern"][0, 5, 6]
    most = int(row.argmax())
    figure = re.findall(r"<figure.*?</figure>", drawn, re.S)[11]
    titles = [html.unescape(title) for title in re.findall(r"<title>(.*?)</title>", figure)]
    assert len(titles) == 7 and titles[6].startswith(f"6 {spell(ids[6])!r}: {most} ")
    assert f'aria-label="layer 1, head 5. The last token: {most} ' in html.unescape(figure)


def test_the_lens_has_every_token_after_every_layer(model, ids):
    it = picture(model, ids, spell, "model")
    with torch.no_grad():
        logits, seen = model.run_with_cache(torch.tensor([ids]))
    assert [point for point, _ in it.lens] == [
        "embed",
        "layers.0.resid_post",
        "layers.1.resid_post",
    ]
    for point, by_token in it.lens:
        expected = seen.logits_after(point)[0].softmax(-1).max(-1)
        assert [p[0].id for p in by_token] == expected.indices.tolist()
        found = torch.tensor([p[0].probability for p in by_token], dtype=torch.float32)
        torch.testing.assert_close(found, expected.values, rtol=1e-5, atol=1e-6)
    assert [p[0].id for p in it.lens[-1][1]] == logits[0].argmax(-1).tolist()


def test_the_page_is_whole_and_needs_nothing_else(drawn):
    class Balance(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.ids = [], []

        def handle_starttag(self, tag, attrs):
            self.ids += [value for name, value in attrs if name == "id"]
            if tag != "meta":
                self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            self.ids += [value for name, value in attrs if name == "id"]

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    balance = Balance()
    balance.feed(drawn)
    assert balance.open == [] and len(set(balance.ids)) == len(balance.ids)
    assert "<script" not in drawn and "http" not in drawn and "url(" not in drawn
    for link in re.findall(r'href="#(\w+)"', drawn):
        assert link in balance.ids
    assert "a &lt;small&gt; model" in drawn and "<b>:" not in drawn
    assert "prefers-color-scheme:dark" in drawn


def test_layers_can_be_chosen(model, ids):
    page = as_html(picture(model, ids, spell, "model", layers=[1]))
    assert 'id="layer1"' in page and 'id="layer0"' not in page
    assert len(re.findall("<figure", page)) == 6
    assert as_html(picture(model, ids[:1], spell, "model")).count("<figure") == 12


@pytest.mark.parametrize(
    "ids, layers, said",
    [([1, 2], [2], "--layers has 2, expected 0 to 1"), ([1] * 129, None, "129 tokens, expected")],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_computed(model, ids, layers, said):
    with pytest.raises(MinqwenError, match=said):
        picture(model, ids, spell, "model", layers)
