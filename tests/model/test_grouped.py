"""Quantised weights that stay packed: no bit is lost, and the products are a faithful one's."""

from __future__ import annotations

import pytest
import torch
from support.paged import random_chunks, run_paged
from support.quantised import ACT, AWQ, GPTQ8, KINDS, LINEARS, checkpoint, tiny, write
from support.ranks import on_ranks
from torch import Tensor

from minqwen import LLM, Qwen2
from minqwen.lab.compare import ROUNDING, rms
from minqwen.lab.planner import rank_weights
from minqwen.model.grouped import MANY_ROWS, Grouped, Groups, Numbers, outputs_in_block

pytestmark = pytest.mark.skipif(
    outputs_in_block() is None, reason="torch has no fast packed product for this CPU"
)

SHAPE = dict(H=4, K=2, d=64, group=64, hidden=128, width=256)
BF16 = torch.bfloat16


def numbers(inputs: int, outputs: int, group: Tensor, bits: int, seed: int = 0) -> Numbers:
    g = torch.Generator().manual_seed(seed)
    groups = Groups.of(group)
    assert groups is not None
    rows = int(group.max()) + 1
    return Numbers(
        bits,
        groups,
        torch.randint(2**bits, (inputs, outputs), generator=g, dtype=torch.uint8),
        (torch.rand(rows, outputs, generator=g) * 0.03 + 1e-3).half(),
        torch.randint(2**bits, (rows, outputs), generator=g, dtype=torch.uint8),
    )


def by_hand(weight: Numbers) -> Tensor:
    """(q - z) s, one input after another, [outputs, inputs] in float64."""
    groups = weight.groups
    dense = torch.empty(len(weight.numbers), weight.scales.shape[1], dtype=torch.float64)
    for i, q in enumerate(weight.numbers):
        row = groups.rows[i // groups.size]
        where = i if groups.order is None else groups.order[i]
        dense[where] = (q.double() - weight.zeros[row].double()) * weight.scales[row].double()
    return dense.T


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("rows", [1, 7, MANY_ROWS - 1, MANY_ROWS, 150])
def test_a_product_is_that_of_the_weights(bits, shuffled, rows):
    group = torch.arange(192) // 64
    if shuffled:
        group = group[torch.randperm(192, generator=torch.Generator().manual_seed(3))]
    weights = [numbers(192, n, group, bits, seed=n) for n in (64, 192)]
    dense = torch.cat([by_hand(w) for w in weights])
    x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(256).bfloat16()
    truth = x.double() @ dense.T + bias.double()
    form = Grouped(weights, BF16)
    native = torch.nn.functional.linear(x, dense.half().bfloat16(), bias)
    assert rms(form.product(x, bias).double() - truth) < ROUNDING * rms(native.double() - truth)
    assert torch.equal(form.weight(), dense.half().bfloat16())
    assert form.product(x[:0], bias).shape == (0, 256)


@pytest.mark.parametrize(
    ("group", "size"),
    [
        (torch.zeros(256), 256),
        (torch.arange(256) // 128, 128),
        (torch.arange(64, 256) // 128, 64),  # a slice that begins in the middle of a group
        (torch.arange(96) // 96, 32),
        (torch.arange(256) // 128 % 2, 128),
        (torch.arange(48) // 16, None),
        (torch.arange(40), None),
        (torch.zeros(0), None),
    ],
)
def test_inputs_fall_into_the_largest_groups_that_torch_can_have(group, size):
    found = Groups.of(group.long())
    assert (found and found.size) == size


# ---- models -------------------------------------------------------------------------------------


def loaded(path, **options):
    return Qwen2.from_pretrained(path, arithmetic="fast", dtype="bfloat16", **options)


def forms(model: Qwen2) -> dict[str, Grouped]:
    """The packed weights, by the name of the first of their layers."""
    found = {}
    for name, module in model.named_modules():
        form = getattr(getattr(module, "packed", None), "form", None)
        if isinstance(form, Grouped) and form not in found.values():
            found[name] = form
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_keeps_its_numbers_and_errs_as_a_faithful_one(tmp_path, kind):
    config = tiny(quant=KINDS[kind], **SHAPE)
    tensors = checkpoint(tmp_path / "q", config, linears=LINEARS)
    if KINDS[kind]["bits"] == 8:
        # Numbers are up to 255. With the scales of 4 bits the scores would be in the hundreds, and
        # any rounding would decide which key a query sees.
        smaller = {n: x / 16 if n.endswith(".scales") else x for n, x in tensors.items()}
        write(tmp_path / "q", config, smaller, files=2)
    truth, native = (Qwen2.from_pretrained(tmp_path / "q", dtype=d) for d in ("float64", BF16))
    fast = loaded(tmp_path / "q")
    assert fast.quantised == "14 of 14 quantised weights stay packed"
    assert fast.quantised in repr(fast)
    ids = torch.randint(61, (2, 60), generator=torch.Generator().manual_seed(1))
    right = truth(ids)
    unit = rms(native(ids).double() - right)
    paged = torch.stack(run_paged(fast, list(ids), chunk=random_chunks(1, 9)))
    for logits in (fast(ids), paged):
        assert rms(logits.double() - right) < ROUNDING * unit
    # Whoever asks gets every bit of the weights.
    weights = native.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in fast.state_dict().items())
    assert not forms(fast)


def test_an_act_order_of_its_own_for_each_layer_takes_a_product_for_each(tmp_path):
    shared, own = tiny(quant=GPTQ8, **SHAPE), tiny(quant=ACT, **SHAPE)
    for name, config in (("shared", shared), ("own", own)):
        checkpoint(tmp_path / name, config, linears=LINEARS)
    assert len(forms(loaded(tmp_path / "shared"))) == 2 * 4
    assert len(forms(loaded(tmp_path / "own"))) == 2 * 7


@pytest.mark.parametrize("quant", [AWQ, GPTQ8], ids=["awq", "gptq8"])
@pytest.mark.parametrize("size", [1, 2])
def test_the_planner_counts_the_bytes_that_are_held(tmp_path, quant, size):
    config = tiny(quant=quant, **SHAPE)
    checkpoint(tmp_path / "q", config, linears=LINEARS)

    def held(mesh):
        found = forms(loaded(tmp_path / "q", mesh=mesh))
        return sum(form.nbytes for form in found.values()), len(found)

    planned = rank_weights(config, size, "bfloat16", grouped=True)
    for (nbytes, count), weights in zip(on_ranks(size, held), planned, strict=True):
        assert count == 8
        own = {n: b for n, b in weights.items() if n.endswith("_proj.weight")}
        assert nbytes == sum(own.values())


def test_ranks_keep_their_slices(tmp_path):
    checkpoint(tmp_path / "q", tiny(quant=AWQ, **SHAPE), linears=LINEARS)
    ids = torch.randint(61, (1, 40), generator=torch.Generator().manual_seed(1))
    whole = loaded(tmp_path / "q")(ids).float()

    def part(mesh):
        model = loaded(tmp_path / "q", mesh=mesh)
        assert model.quantised == "14 of 14 quantised weights stay packed"
        return model(ids).float()

    for logits in on_ranks(2, part):
        assert rms(logits - whole) < 0.02 * rms(whole)


def fast_and_native(path, **options):
    ids = torch.randint(61, (1, 30), generator=torch.Generator().manual_seed(1))
    models = loaded(path, **options), Qwen2.from_pretrained(path, dtype="bfloat16", **options)
    fast, native = (model(ids).float() for model in models)
    assert rms(fast - native) < 0.03 * rms(native)
    return models[0].quantised


def test_what_cannot_stay_packed_is_dequantised_and_the_model_says_why(tmp_path):
    checkpoint(tmp_path / "act", tiny(quant=ACT, **SHAPE), linears=LINEARS)
    ragged = tiny(quant=AWQ, **SHAPE | dict(width=192, group=16))
    checkpoint(tmp_path / "ragged", ragged, linears=LINEARS)
    checkpoint(tmp_path / "mixed", tiny(quant=AWQ, **SHAPE), linears=("q_proj", "down_proj"))
    assert fast_and_native(tmp_path / "ragged") == (
        "0 of 14 quantised weights stay packed; 14 do not: the inputs do not fall into whole "
        "groups of 32, 64, 128 or 256"
    )
    assert fast_and_native(tmp_path / "mixed") == (
        "2 of 4 quantised weights stay packed; 2 do not: a layer with the same input is not "
        "quantised"
    )
    assert fast_and_native(tmp_path / "act", offload="memory") == (
        "0 of 14 quantised weights stay packed: they come and go"
    )
    assert fast_and_native(tmp_path / "act", num_attention_heads=8) == (
        "6 of 14 quantised weights stay packed; 8 do not: they have other heads here than in "
        "their files"
    )


def test_other_dtypes_and_arithmetics_compute_with_weights(tmp_path):
    checkpoint(tmp_path / "q", tiny(quant=AWQ, **SHAPE), linears=LINEARS)
    half = Qwen2.from_pretrained(tmp_path / "q", arithmetic="fast")
    assert half.quantised == (
        "0 of 14 quantised weights stay packed; 14 do not: the dtype is float16, and torch's "
        "packed product is for bfloat16"
    )
    for arithmetic in ("native", "exact", "int8"):
        model = Qwen2.from_pretrained(tmp_path / "q", arithmetic=arithmetic, dtype="bfloat16")
        assert not model.quantised and not forms(model)


def test_a_cpu_without_the_product_computes_with_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("minqwen.checkpoint.words.outputs_in_block", lambda: None)
    checkpoint(tmp_path / "q", tiny(quant=AWQ, **SHAPE), linears=LINEARS)
    assert "no fast packed product for this CPU" in fast_and_native(tmp_path / "q")


def test_an_engine_says_what_it_has_loaded(tmp_path):
    checkpoint(tmp_path / "q", tiny(quant=AWQ, **SHAPE), linears=LINEARS)
    llm = LLM(loaded(tmp_path / "q"), max_model_len=32, num_blocks=4)
    assert "14 of 14 quantised weights stay packed" in repr(llm)
