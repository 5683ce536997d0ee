"""A golden pack, computed again: the same bits here, the same to rounding on another machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.packs import elsewhere, forge, model, one_bit, pack, prompts, sign

from minqwen.lab.packs.check import Checker
from minqwen.lab.packs.pack import Pack
from minqwen.model import Native

RUNS = ("float64", "native-float32", "native-bfloat16", "exact-float32")
LONG = dict(
    vocab_size=301, hidden_size=64, intermediate_size=96, num_attention_heads=6, head_dim=16
)


def in_halves(self, x, linear):
    """Native's linear layer as another library might add it up."""
    half = x.shape[-1] // 2
    first = F.linear(x[..., :half], linear.weight[:, :half])
    return first + F.linear(x[..., half:], linear.weight[:, half:], linear.bias)


def verdicts(pack, run, **options):
    return {p.name: p.verdict for p in Checker(pack, **options).check(run).points}


@pytest.mark.parametrize("top_k", [None, 7])
def test_on_the_machine_that_made_it_every_bit_is_the_same(tmp_path, top_k):
    found = pack(tmp_path, runs=RUNS, top_k=top_k)
    checker = Checker(found)
    assert checker.same_machine
    for run in RUNS:
        check = checker.check(run)
        assert check.good and check.same_bits and len(check.having("bitwise")) == 44, run


@pytest.mark.parametrize("runs", [RUNS, ("native-float32", "exact-float32")])
def test_another_order_of_sums_on_another_machine_is_rounding(tmp_path, monkeypatch, runs):
    """The second pack has no float64 run: the truth is computed."""
    model(tmp_path / "model", **LONG)
    ids = torch.arange(3 * 40).mul(37).remainder(301).view(3, 40).tolist()
    with monkeypatch.context() as patched:
        patched.setattr(Native, "linear", in_halves)
        path = pack(tmp_path, runs=runs, prompts=prompts(ids)).path
    here = Checker(Pack.open(path)).check("native-float32")
    assert not here.good and here.same_bits  # the same machine must give the same bits
    elsewhere(path)
    checker = Checker(Pack.open(path))
    for run in runs:
        check = checker.check(run)
        rounded = check.having("equal to rounding")
        assert check.good and check.same_bits == (run == "exact-float32"), (run, check)
        assert bool(rounded) != check.same_bits
        assert all(0 < point.units <= 2 for point in rounded)


def test_what_is_more_than_rounding_is_a_difference_on_any_machine(tmp_path):
    path = pack(tmp_path, runs=RUNS).path
    for run in ("float64", "native-float32"):
        forge(path, run, 2, "layers.1.mlp.act", lambda x: x * 1.01)
    elsewhere(path)
    for run in ("float64", "native-float32"):
        check = Checker(Pack.open(path)).check(run)
        (wrong,) = check.having("different")
        assert wrong.name == "layers.1.mlp.act" and wrong.units > 2 and not check.good
    assert Checker(Pack.open(path)).check("native-bfloat16").good


def test_one_bit_of_an_exact_run_is_a_difference_on_any_machine(tmp_path):
    path = pack(tmp_path, runs=RUNS).path
    elsewhere(path)
    forge(path, "exact-float32", 0, "layers.0.attn.q", one_bit)
    found = verdicts(Pack.open(path), "exact-float32")
    assert [name for name, verdict in found.items() if verdict != "bitwise"] == ["layers.0.attn.q"]
    assert found["layers.0.attn.q"] == "different"


def test_a_score_that_is_hidden_on_one_side_only_is_a_difference(tmp_path):
    path = pack(tmp_path, runs=("float64", "native-float32")).path

    def shows_the_future(scores):
        scores = scores.clone()
        scores[0, 0, 1] = 0.0
        return scores

    forge(path, "native-float32", 0, "layers.0.attn.scores", shows_the_future)
    elsewhere(path)
    assert verdicts(Pack.open(path), "native-float32")["layers.0.attn.scores"] == "different"


def test_a_row_of_logits_that_changed_outside_of_the_kept_tokens_is_a_difference(tmp_path):
    path = pack(tmp_path, top_k=3).path

    def other_row(content):
        content["runs"]["float64"]["prompts"][1]["logit_rows"][0] = "0" * 64

    sign(path, other_row)
    found = verdicts(Pack.open(path), "float64")
    assert [name for name, verdict in found.items() if verdict != "bitwise"] == ["logits.values"]


def test_a_pack_of_a_model_in_memory_is_that_of_a_streamed_one(tmp_path):
    found = pack(tmp_path, runs=RUNS)
    assert all(Checker(found, streamed=True).check(run).good for run in RUNS)
    streamed = pack(tmp_path, "streamed", runs=RUNS, streamed=True)
    assert streamed.recorded == found.recorded and Checker(streamed).streamed


def test_the_model_may_lie_elsewhere(tmp_path):
    found = pack(tmp_path)
    (tmp_path / "model").rename(tmp_path / "moved")
    assert Checker(found, tmp_path / "moved").check("float64").good
