"""Fingerprints and company of one model: what is alike holds, what is not is told."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import write

from minqwen.lab.device_model import fingerprints, in_any_company, on_ranks
from minqwen.lab.golden import fingerprint


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    write(path)
    return path


def test_a_fingerprint_is_compared_with_the_frozen_one(model_dir):
    right = fingerprint(model_dir, "float32")
    frozen = {"float32": right, "bfloat16": "0" * 64}
    single, half, other = fingerprints(model_dir, "cpu", frozen)
    assert single.note == right and single.holds and single.against == ["the frozen one"]
    assert half.differences == [f"the frozen one: {'0' * 64}, not {half.note}"]
    assert other.against == [] and other.name == "float16"
    assert len({single.note, half.note, other.note}) == 3


def test_exact_logits_are_the_same_in_any_company_and_native_is_the_control(model_dir):
    exact, native = in_any_company(model_dir, "cpu")
    assert exact.against == ["together", "in pieces"] and exact.holds
    assert native.name.startswith("control") and native.holds and native.against == []
    assert native.note


def test_two_ranks_give_the_fingerprint_of_one(model_dir):
    exact, native = on_ranks(model_dir)
    assert exact.holds and exact.against == ["2 ranks"], exact
    assert native.name == "control: native float32 on 2 ranks" and not native.against
    assert native.note.startswith("2 ranks: ")


def test_ranks_that_cannot_run_are_a_difference(model_dir):
    exact, _ = on_ranks(model_dir, module="no.such.module")
    assert exact.differences[0].startswith("2 ranks: none, not ") and exact.note


def test_the_control_says_so_where_nothing_differs(model_dir, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: torch.zeros_like(x))
    _, native = in_any_company(model_dir, "cpu")
    assert native.note == "no difference, though one was expected"
