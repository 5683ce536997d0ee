"""docs/transformer-lens.md: its blocks run in order, and what they say holds."""

from __future__ import annotations

import re

import pytest
import torch
from support.paths import ROOT

from minqwen import MinqwenError

PAGE = (ROOT / "docs" / "transformer-lens.md").read_text()


@pytest.fixture(scope="module")
def names():
    """What the page's blocks have defined at their end."""
    found = {}
    with torch.enable_grad():  # the blocks switch gradients off
        for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
            exec(compile(block, "docs/transformer-lens.md", "exec"), found)
    return found


def test_patching_all_of_the_first_layer_gives_the_whole_answer_back(names):
    patched = names["patched"]
    assert patched.shape == (4, names["clean"].shape[1])
    differs = (names["clean"] != names["corrupt"])[0]
    assert differs.sum() in (1, 2)
    assert patched[0, ~differs].abs().max() == 0  # the same tokens: nothing to give back
    # One of them by hand, with the model's own hooks.
    model, position = names["model"].model, int(differs.nonzero()[-1])
    clean = names["cache"]["resid_pre", 2]

    def patch(x, name):
        x[:, position] = clean[:, position]

    with torch.no_grad():
        logits = model.run_with_hooks(names["corrupt"], [("layers.2.resid_pre", patch)])
    share = (names["difference"](logits) - names["low"]) / (names["high"] - names["low"])
    torch.testing.assert_close(patched[2, position].item(), share, rtol=1e-4, atol=1e-4)


def test_the_lens_ends_at_the_answer_and_the_shares_are_its_logit(names):
    logits, answer = names["clean_logits"][0, -1], names["answer"]
    assert names["lens"][-1, 0].argmax() == answer
    torch.testing.assert_close(names["shares"].sum(), logits[answer], rtol=1e-4, atol=1e-3)
    assert len(names["names"]) == 4 * 28 and names["change"].abs().max() > 0


def test_what_the_page_says_is_refused_is_refused(names):
    model, clean = names["model"], names["clean"]
    for call in (
        lambda: type(model).from_pretrained(names["EMBEDDED"], fold_ln=True),
        lambda: model(clean, start_at_layer=1),
        lambda: model.to_tokens(["a", "b c"], padding_side="left"),
        lambda: model.add_hook("blocks.0.hook_attn_in", print),
    ):
        with pytest.raises(MinqwenError):
            call()
    assert model.cfg.n_ctx == model.model.config.context_length
