"""What a step holds: by hand, and against PyTorch's own allocator on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support.allocator import MLP_BOUND, STEPS, peak_bytes, peak_of_step
from support.paths import ROOT

from minqwen.lab.shapes import official_config
from minqwen.model import memory

SEVEN = official_config("7B")


def predicted(name: str, dtype: str, copies_products: bool | None = None) -> tuple[int, str]:
    """(bytes, phase) of the peak of a step's forward pass on a CPU."""
    config, queries, contexts, _ = STEPS[name]
    phases = memory.step_phases(
        config,
        queries,
        contexts,
        dtype=dtype,
        device="cpu",
        logit_rows=sum(queries) if name == "logits" else None,
        copies_products=copies_products,
    )
    del phases["rotary table"], phases["sampling"]  # before and after the forward pass
    return max((held, phase) for phase, held in phases.items())


# ---- by hand ------------------------------------------------------------------------------------


def test_a_block_holds_the_keys_and_values_of_its_tokens_in_all_layers():
    # 16 tokens, keys and values, 28 layers, 4 heads of 128 numbers, 2 bytes each
    assert memory.block_bytes(SEVEN, 1, 16, "bfloat16") == 16 * 2 * 28 * 4 * 128 * 2
    assert memory.block_bytes(SEVEN, 4, 16, "bfloat16") == 16 * 2 * 28 * 1 * 128 * 2
    wide = SEVEN.replace(num_attention_heads=32)  # on 8 ranks each head is held twice
    assert memory.block_bytes(wide, 8, 16, "float32") == 16 * 2 * 28 * 1 * 128 * 4


# A prefill of 1024 tokens: 128 dimensions, 8 query and 2 KV heads of 16, an MLP of 768 channels.
TABLES = 2 * 1024 * 16 * 2  # cos and sin
BATCH = 8 * (4 * 1024 + 3 + 64) + 2 * 1024 * 16 * 2  # ids and so on, 64 blocks; cos and sin
GATHERED = 2 * 1024 * 2 * 16 * 2
ALWAYS = TABLES + BATCH + GATHERED
X, GATE = 1024 * 128 * 2, 1024 * 768 * 2  # bytes in 16 bits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_mlp_by_hand_on_a_cpu_that_rounds_a_product_at_once(dtype):
    down = 3 * GATE + X  # gate, up, their product and down_proj's result
    assert predicted("prefill", dtype, copies_products=False) == (ALWAYS + 3 * X + down, "MLP")


def test_the_mlp_by_hand_on_a_cpu_that_computes_a_product_in_a_float32_copy():
    gate_and_up = 2 * GATE + 1024 * 768 * 4  # while up_proj is computed
    expected = ALWAYS + 3 * X + gate_and_up
    assert predicted("prefill", "bfloat16", copies_products=True) == (expected, "MLP")
    assert gate_and_up > 3 * GATE + X + 1024 * 128 * 4  # while down_proj is


@pytest.mark.parametrize("copies, copy", [(False, 0), (True, 300 * 20_000 * 4)])
def test_logits_by_hand_on_both_kinds_of_cpu(copies, copy):
    batch = 8 * (4 * 300 + 3 + 19) + 2 * 300 * 16 * 2
    always = 2 * 512 * 16 * 2 + batch + 2 * 19 * 16 * 2 * 16 * 2
    logits = 300 * (64 + 20_000) * 2
    expected = (always + logits + copy, "logits")
    assert predicted("logits", "bfloat16", copies_products=copies) == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wide_product_is_never_copied(dtype):
    assert predicted("prefill", dtype, True) == predicted("prefill", dtype, False)


def test_a_gpu_never_copies_a_product():
    phases = [
        memory.step_phases(SEVEN, (9,), (9,), dtype="bfloat16", copies_products=copies)
        for copies in (True, False, None)
    ]
    assert phases[0] == phases[1] == phases[2]


# ---- against the allocator ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", STEPS)
def test_activations_against_the_allocator(name, dtype):
    held, where = predicted(name, dtype)
    assert where == STEPS[name][3]
    measured = peak_of_step(name, dtype, count_scratch=memory.cpu_copies_products(dtype))
    assert held == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_this_cpu_copies_products_if_the_memory_model_says_so(dtype):
    """The copy grows with the product. A library's scratch memory does not."""

    def beside_the_result(rows: int) -> int:
        x, weight = (torch.ones(n, 64, dtype=getattr(torch, dtype)) for n in (rows, 2048))
        torch.nn.functional.linear(x, weight)
        return peak_bytes(lambda: torch.nn.functional.linear(x, weight)) - 2 * rows * 2048

    copy = 4 * (2048 - 256) * 2048
    expected = copy if memory.cpu_copies_products(dtype) else 0
    grown = beside_the_result(2048) - beside_the_result(256)
    assert grown == pytest.approx(expected, abs=0.02 * copy)


@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="this CPU cannot act as one with plain AVX-512"
)
@pytest.mark.parametrize("name", ["prefill", "logits"])
def test_the_copy_against_the_allocator_where_onednn_is_kept_from_newer_instructions(name):
    """With ONEDNN_MAX_CPU_ISA a CPU that has AVX512_BF16 acts as one that does not."""
    code = f"from support.allocator import *; print(peak_of_step({name!r}, 'bfloat16', True))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    held, _ = predicted(name, "bfloat16", copies_products=True)
    assert held == pytest.approx(int(done.stdout), rel=0.02)


@pytest.mark.parametrize(
    "name, broken",
    [
        ("chunk", {"tile_rows": lambda device, scores: 32}),  # twice the scores at a time
        ("ragged", {"spans": lambda queries, _: [(i, 1) for i in range(len(queries))]}),
        ("prefill", {"BYTES_PER_ELEMENT": {"float32": 3}}),
        ("decode", {"BYTES_PER_ELEMENT": {"float32": 3}}),
    ],
)
def test_control_a_broken_term_is_seen(name, broken, monkeypatch):
    right = predicted(name, "float32")[0]
    for attribute, value in broken.items():
        monkeypatch.setattr(memory, attribute, value)
    assert predicted(name, "float32")[0] != pytest.approx(right, rel=0.05)


# ---- what is made of it -------------------------------------------------------------------------


def test_step_bytes_is_the_largest_phase_and_grows_linearly():
    at = [
        memory.step_bytes(SEVEN, (2048,), (n,), dtype="bfloat16")
        for n in (2**18, 2**19, 2**20, 2**21)
    ]
    steps = [b - a for a, b in zip(at, at[1:])]
    # Twice the tokens take at most twice the bytes.
    assert steps[1] < 2.01 * steps[0] and steps[2] < 2.01 * steps[1]
    phases = memory.step_phases(SEVEN, (5,), (9,), dtype="bfloat16")
    assert memory.step_bytes(SEVEN, (5,), (9,), dtype="bfloat16") == max(phases.values())


def test_the_worst_steps_are_all_decode_and_as_many_prompts_as_fit():
    decodes, prompts = memory.worst_steps(context=100, batch=4, tokens=250)
    assert decodes == ((1, 1, 1, 1), (99, 100, 100, 100))
    assert prompts == ((1, 100, 100, 49), (99, 100, 100, 100))  # 250 new tokens
    assert memory.worst_steps(10, 1, 2048) == [((1,), (10,)), ((10,), (10,))]


@pytest.mark.parametrize("room", [2_000_000, 20_000_000])
def test_one_block_more_than_fits_would_not_fit(room):
    bytes_per_block = memory.block_bytes(MLP_BOUND, 1, 16, "float32")
    load = {"max_num_batched_tokens": 256, "dtype": "float32"}
    blocks = memory.blocks_that_fit(
        MLP_BOUND, room, bytes_per_block, max_model_len=10**6, max_num_seqs=1, **load
    )

    def taken(blocks: int) -> int:
        steps = memory.worst_steps(16 * blocks, 1, 256)
        most = max(memory.step_bytes(MLP_BOUND, *step, dtype="float32") for step in steps)
        return blocks * bytes_per_block + most

    assert taken(blocks) <= room < taken(blocks + 1)


def test_not_one_block_fits_in_less_than_a_step():
    options = {"max_model_len": 100, "max_num_seqs": 2, "max_num_batched_tokens": 64}
    assert memory.blocks_that_fit(MLP_BOUND, 1000, 10, dtype="float32", **options) == 0


def test_largest_is_the_last_that_fits():
    assert memory.largest(lambda n: n <= 37, 1000) == 37
    assert memory.largest(lambda n: True, 1000) == 1000
    assert memory.largest(lambda n: False, 1000) == 0
