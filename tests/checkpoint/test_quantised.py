"""AWQ and GPTQ checkpoints are read as the unquantised ones that they stand for, bit for bit.

The oracle is the dequantiser of support/quantised.py, which takes the numbers out of the words one
by one and is itself compared with vectors that AutoAWQ's and AutoGPTQ's code computed.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support.paths import DATA
from support.quantised import (
    ACT,
    AWQ,
    GPTQ,
    GPTQ8,
    KINDS,
    LINEARS,
    bits_equal,
    checkpoint,
    plain,
    read,
    tiny,
    write,
)
from support.ranks import on_ranks

from minqwen.checkpoint import Checkpoint
from minqwen.checkpoint.quantization import PackedWeight, Packing
from minqwen.checkpoint.reader import WeightDirectory
from minqwen.errors import CheckpointError, MinqwenError
from minqwen.heads.layout import layout
from minqwen.heads.packed import extend_packed
from minqwen.heads.tensors import extend_tensor
from minqwen.heads.view import open_weights
from minqwen.model import Qwen2
from minqwen.parallel import Shard, shard

GOLDEN = {
    "awq": AWQ,
    "gptq4_sym": GPTQ,
    "gptq8_sym": GPTQ8,
    "gptq4_asym": GPTQ,
    "gptq4_sym_desc_act": ACT,
}
# Heads of 12: what a rank of four holds begins in the middle of words of 8 and of groups of 16.
ODD = dict(H=4, K=2, d=12, width=48)
IDS = torch.arange(12)[None]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("case", GOLDEN)
def test_dequantised_as_autoawq_and_autogptq_do_it(case):
    golden = load_file(DATA / "quant_golden.safetensors")
    parts = {n.removeprefix(case + "."): t for n, t in golden.items() if n.startswith(case + ".")}
    expected, packing = (
        parts.pop("expected_weight"),
        Packing.read(GOLDEN[case] | {"group_size": 128}),
    )
    group = parts.pop("g_idx", packing.groups_of(256)).long()
    weight = PackedWeight(packing, tuple(expected.shape), **parts, group=group)
    assert bits_equal(weight.dequantise(torch.empty_like(expected)), expected)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_every_weight_and_every_slice_of_it(tmp_path, kind, monkeypatch):
    config = tiny(**ODD, quant=KINDS[kind])
    expected = plain(checkpoint(tmp_path / "a", config, linears=LINEARS), KINDS[kind])
    monkeypatch.setattr("minqwen.checkpoint.quantization.PIECE", 100)  # some rows at a time
    opened = Checkpoint(tmp_path / "a")
    opened.check()
    opened.check_finite()
    assert set(opened.names) == set(expected) == set(opened.config.parameter_shapes())
    assert opened.config.quantization_config is None
    for name, weight in expected.items():
        assert (opened.shape(name), opened.dtype(name)) == (tuple(weight.shape), torch.float16)
        assert bits_equal(opened.read(name), weight)
        assert same(opened.read(name, dtype=torch.float64), weight.double())
    for name in ("q_proj", "v_proj", "o_proj"):
        weight = expected[full := f"model.layers.1.self_attn.{name}.weight"]
        for dim in (0, 1):
            for start, stop in ((0, 5), (3, 19), (13, 24), (16, 24), (7, 7 + dim)):
                part = weight.narrow(dim, start, stop - start)
                assert bits_equal(opened.read(full, Shard(dim, start, stop)), part.contiguous())
                out = torch.empty(part.shape)
                assert opened.read(full, Shard(dim, start, stop), out=out) is out
                assert same(out, part.float())


def unquantised(config, tensors, **options) -> Qwen2:
    config = config.replace(quantization_config=None)
    return Qwen2.from_tensors(config, lambda name, mine: tensors[name], **options)


@pytest.mark.parametrize(
    "dtype, arithmetic", [("float32", "native"), ("float32", "exact"), ("float64", "native")]
)
@torch.no_grad()
def test_a_model_computes_with_the_dequantised_weights(tmp_path, dtype, arithmetic):
    config = tiny(**ODD, quant=ACT)
    expected = plain(checkpoint(tmp_path / "a", config, linears=LINEARS), ACT)
    model = unquantised(config, expected, dtype=getattr(torch, dtype), arithmetic=arithmetic)
    logits = model(IDS)
    for offload in (None, "disk"):
        options = {"dtype": dtype, "arithmetic": arithmetic, "offload": offload}
        assert same(Qwen2.from_pretrained(tmp_path / "a", **options)(IDS), logits)


def test_auto_is_the_dtype_of_the_config(tmp_path):
    checkpoint(tmp_path / "a", tiny(**ODD), linears=LINEARS)
    assert Qwen2.from_pretrained(tmp_path / "a").dtype == torch.float16


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_read_their_own_slices(tmp_path, kind, size, monkeypatch):
    """Of the weights in words too, but for the words and groups at a slice's ends."""
    config = tiny(**ODD, quant=KINDS[kind])
    expected = plain(checkpoint(tmp_path / "a", config, linears=LINEARS), KINDS[kind])
    whole, rows = WeightDirectory.read, []

    def noted(self, name, piece=None, *rest, **options):
        if name.endswith("qweight"):
            rows.append((name, self.shape(name), piece))
        return whole(self, name, piece, *rest, **options)

    monkeypatch.setattr(WeightDirectory, "read", noted)
    models = on_ranks(size, lambda mesh: Qwen2.from_pretrained(tmp_path / "a", mesh=mesh))
    for rank, model in enumerate(models):
        for name, value in model.state_dict().items():
            mine = shard(name, config, rank, size)
            weight = expected[name]
            if mine is not None:
                weight = weight.narrow(mine.dim, mine.start, mine.stop - mine.start).contiguous()
            assert bits_equal(value, weight), (rank, name)
    assert len(rows) == size * 7 * config.num_hidden_layers
    for name, shape, piece in rows:
        share = size if name.split(".")[-2] not in ("k_proj", "v_proj") else min(size, 2)
        assert piece is not None and piece.stop - piece.start <= shape[piece.dim] // share + 1


@torch.no_grad()
def test_a_row_parallel_slice_of_act_order_computes_the_same(tmp_path):
    config = tiny(**ODD, quant=ACT)
    checkpoint(tmp_path / "a", config, linears=LINEARS)
    load = lambda **options: Qwen2.from_pretrained(
        tmp_path / "a", dtype="float32", arithmetic="exact", **options
    )
    logits = load()(IDS)
    for got in on_ranks(4, lambda mesh: load(mesh=mesh)(IDS)):
        assert same(got, logits)


# ---- more heads ---------------------------------------------------------------------------------


def test_heads_while_loading_are_those_that_are_moved_in_words(tmp_path, kind):
    config = tiny(H=4, K=2, width=48, quant=KINDS[kind])
    checkpoint(tmp_path / "a", config, linears=LINEARS)
    extend_packed(tmp_path / "a", tmp_path / "b", layout(config, 6))
    view, written = open_weights(tmp_path / "a", 6), Checkpoint(tmp_path / "b")
    view.check()
    written.check()
    assert view.config.parameter_shapes() == written.config.parameter_shapes()
    for name in view.names:
        assert bits_equal(view.read(name), written.read(name)), name


def test_heads_while_loading_need_no_whole_groups(tmp_path):
    """On disk these are refused: a group of o_proj spans heads."""
    config = tiny(**ODD)
    expected = plain(checkpoint(tmp_path / "a", config, linears=LINEARS), GPTQ)
    view, to = open_weights(tmp_path / "a", 6), layout(config, 6)
    for name, weight in expected.items():
        assert bits_equal(view.read(name), extend_tensor(name, weight, to))


# ---- what is refused, and what is not -----------------------------------------------------------


def refusal(path) -> str:
    with pytest.raises(MinqwenError) as error:
        Qwen2.from_pretrained(path)
    assert "\n" not in str(error.value)
    return str(error.value)


Q = "model.layers.1.self_attn.q_proj"
DAMAGED = {
    "no scales": (GPTQ, lambda t: t.pop(Q + ".scales"), ["q_proj.scales is missing", "gptq 4-bit"]),
    "no g_idx": (ACT, lambda t: t.pop(Q + ".g_idx"), ["q_proj.g_idx is missing", "act-order"]),
    "no words": (AWQ, lambda t: t.pop(Q + ".qweight"), ["unexpected tensor", "q_proj.q"]),
    "a shape": (
        GPTQ,
        lambda t: t.update({Q + ".qzeros": t[Q + ".qzeros"][:1]}),
        ["q_proj.qzeros has shape (1, 6), expected (2, 6)", "groups of 16"],
    ),
    "a dtype": (
        AWQ,
        lambda t: t.update({Q + ".qweight": t[Q + ".qweight"].float()}),
        ["q_proj.qweight has dtype torch.float32, expected torch.int32"],
    ),
    "words as scales": (
        AWQ,
        lambda t: t.update({Q + ".scales": t[Q + ".scales"].int()}),
        ["q_proj.scales has dtype torch.int32, expected a float dtype"],
    ),
    "a group that is not there": (
        ACT,
        lambda t: t[Q + ".g_idx"].__setitem__(3, 2),
        ["q_proj.g_idx names groups 0 to 2, expected 0 to 1"],
    ),
    "an order of its own": (
        GPTQ,
        lambda t: t.update({Q + ".g_idx": t[Q + ".g_idx"].flip(0)}),
        ["q_proj.g_idx is not in order", "desc_act is false"],
    ),
    "g_idx in awq": (
        AWQ,
        lambda t: t.update({Q + ".g_idx": torch.zeros(32, dtype=torch.int32)}),
        ["unexpected tensor", "q_proj.g_idx", "awq"],
    ),
    "a norm in whole numbers": (
        AWQ,
        lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)}),
        ["model.norm.weight", "has dtype I32"],
    ),
    "twice": (
        GPTQ,
        lambda t: t.update({Q + ".weight": torch.zeros(48, 32).half()}),
        ["q_proj.weight", "as words and as weights"],
    ),
    "a bias that counts": (
        GPTQ,
        lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(48).half()}),
        ["up_proj.bias", "is not zero"],
    ),
    "an embedding in words": (
        GPTQ,
        lambda t: t.update(
            {
                "model.embed_tokens." + p: t[f"{Q}.{p}"].clone()
                for p in ("qweight", "qzeros", "scales")
            }
            | {"model.embed_tokens.weight": t.pop("model.embed_tokens.weight")}
        ),
        ["embed_tokens"],
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_refused_in_one_line(tmp_path, case):
    quant, damage, says = DAMAGED[case]
    config = tiny(**ODD, quant=quant)
    tensors = checkpoint(tmp_path / "a", config, files=1, linears=LINEARS)
    damage(tensors)
    write(tmp_path / "a", config, tensors, 1)
    said = refusal(tmp_path / "a")
    assert all(part in said for part in says), said


def test_scales_that_are_too_large_are_found_where_that_is_asked(tmp_path):
    config = tiny(**ODD)
    tensors = checkpoint(tmp_path / "a", config, files=1, linears=LINEARS)
    tensors[Q + ".scales"][1, 7] = 6e4
    write(tmp_path / "a", config, tensors, 1)
    with pytest.raises(MinqwenError, match="q_proj.weight.* infinite once they are dequantised"):
        Qwen2.from_pretrained(tmp_path / "a", check_finite=True)


@pytest.mark.parametrize(
    "quant, said",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
        ({"quant_method": "fp8"}, "quant_method 'fp8'"),
        ({"quant_method": "compressed-tensors"}, "quant_method 'compressed-tensors'"),
        ({"quant_method": ["awq"]}, "quant_method ['awq']"),
        ({}, "quant_method None"),
        (AWQ | {"version": "gemv"}, "'awq' 'gemv'"),
        (GPTQ | {"checkpoint_format": "marlin"}, "'gptq' 'marlin'"),
        (GPTQ | {"bits": 3}, "with 3 bits"),
        (AWQ | {"bits": 8}, "with 8 bits"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "quantization_config.dynamic"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path, quant, said):
    config = tiny(**ODD)
    checkpoint(tmp_path / "a", config)
    changed = config.to_dict() | {"quantization_config": {"group_size": 16} | quant}
    (tmp_path / "a" / "config.json").write_text(json.dumps(changed))
    assert said in refusal(tmp_path / "a")


def test_zero_biases_of_autogptq_are_left_out(tmp_path):
    config = tiny(**ODD)
    tensors = checkpoint(tmp_path / "a", config, files=1, linears=LINEARS)
    for i in range(config.num_hidden_layers):
        for name, length in (
            ("self_attn.o_proj", 32),
            ("mlp.gate_proj", 48),
            ("mlp.down_proj", 32),
        ):
            tensors[f"model.layers.{i}.{name}.bias"] = torch.zeros(length).half()
    write(tmp_path / "a", config, tensors, 1)
    opened = Checkpoint(tmp_path / "a")
    opened.check()
    assert set(opened.names) == set(config.parameter_shapes())


def test_layers_that_were_left_unquantised_are_read_as_they_are(tmp_path):
    """modules_to_not_convert: what lies in the file decides. So it does for the head."""
    config = tiny(**ODD, quant=AWQ).replace(vocab_size=64)
    expected = plain(checkpoint(tmp_path / "a", config, linears=("q_proj", "lm_head")), AWQ)
    opened = Checkpoint(tmp_path / "a")
    opened.check()
    for name, weight in expected.items():
        assert bits_equal(opened.read(name), weight)


def test_what_is_saved_again_is_unquantised(tmp_path):
    config = tiny(**ODD)
    expected = plain(checkpoint(tmp_path / "a", config, linears=LINEARS), GPTQ)
    Qwen2.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b/config.json").read_text())
    saved = read(tmp_path / "b")
    assert saved.keys() == expected.keys()
    assert all(bits_equal(saved[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("change", [torch.Tensor.long, lambda t: t.sum().int()], ids=["I64", "()"])
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_part_of_a_dtype_that_nobody_packs_in_and_a_scalar_are_refused(tmp_path, part, change):
    config = tiny()
    path = tmp_path / "model"
    tensors = checkpoint(path, config)
    name = next(name for name in tensors if name.endswith(part))
    write(path, config, {**tensors, name: change(tensors[name])}, 2)
    for reader in (Checkpoint, open_weights):
        with pytest.raises(CheckpointError, match="expected a weight vector or matrix") as error:
            reader(path)
        assert name in str(error.value)


def test_a_plain_tensor_of_a_quantised_checkpoint_must_be_a_weight_too(tmp_path):
    config = tiny()
    path = tmp_path / "model"
    tensors = checkpoint(path, config)
    name = "model.norm.weight"
    for odd in (tensors[name].long(), tensors[name].sum()):
        write(path, config, {**tensors, name: odd}, 2)
        with pytest.raises(CheckpointError, match="expected a weight vector or matrix") as error:
            Checkpoint(path)
        assert name in str(error.value)


@pytest.mark.parametrize("part", [(2, 0, 1), (0, 1, 10**6), (1, 5, 4), (0, -1, 3)])
def test_a_slice_that_a_quantised_weight_has_not_is_refused(tmp_path, part):
    path = tmp_path / "model"
    checkpoint(path, tiny())
    weights = Checkpoint(path)
    name = next(iter(weights.packed.parts))
    with pytest.raises(CheckpointError, match="expected one with a slice") as error:
        weights.read(name, Shard(*part))
    assert name in str(error.value)


def test_a_quantised_checkpoint_without_words_is_refused(tmp_path):
    path = tmp_path / "model"
    config = tiny()
    write(path, config, plain(checkpoint(path, config), GPTQ), 2)
    with pytest.raises(CheckpointError, match="no weight is in words"):
        Checkpoint(path)
