"""Fast arithmetic: as near to the truth as native, and no weight is lost in packing."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from support.exact import build, random_model
from support.paged import random_chunks, run_paged
from support.qwen2 import error, tokens
from support.ranks import on_ranks

from minqwen import LLM, Qwen2, SamplingParams
from minqwen.errors import ConfigError
from minqwen.lab.compare import ROUNDING, rms
from minqwen.model.fast import Joined
from minqwen.model.packed import Blocked, Half, Whole, Widened, half_scale, multiplies_half
from minqwen.parallel import shard

SIXTEEN_BITS = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *SIXTEEN_BITS]


@pytest.fixture(params=[True, False], ids=["bfloat16 CPU", "other CPU"])
def cpu(request, monkeypatch):
    """Forms are chosen as on a CPU with and without instructions for products of bfloat16."""
    monkeypatch.setattr("minqwen.model.packed.multiplies_bfloat16", lambda: request.param)
    if not (torch.ops.mkldnn._is_mkldnn_bf16_supported() if request.param else multiplies_half()):
        pytest.skip("this CPU cannot")
    return request.param


def packed_layers(model):
    return [name for name, m in model.named_modules() if getattr(m, "packed", None) is not None]


def units(weights, dtype, ids, **kind):
    """Fast's error over native's, against float64, of the logits of these ids; dense and paged."""
    truth = build(weights, "native", torch.float64)(ids)
    native, fast = (build(weights, name, dtype) for name in ("native", "fast"))
    unit = rms(native(ids).double() - truth)
    paged = torch.stack(run_paged(fast, list(ids), chunk=random_chunks(1, 9)))
    return [rms(logits.double() - truth) / unit for logits in (fast(ids), paged)]


# ---- how near to the truth ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(hidden_size=300, intermediate_size=700, num_hidden_layers=3, tie_word_embeddings=True),
        dict(num_attention_heads=7, num_key_value_heads=1, head_dim=64, rope_theta=1e6),
    ],
    ids=["small", "wide, tied", "one KV head"],
)
def test_error_of_random_models_is_a_faithful_implementations(cpu, dtype, changes):
    weights = random_model(seed=3, bf16=dtype != torch.float16, **changes)
    ids = torch.randint(128, (2, 60), generator=torch.Generator().manual_seed(1))
    assert max(units(weights, dtype, ids)) < ROUNDING


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_of_the_embedded_model_is_a_faithful_implementations(cpu, dtype, embedded_weights):
    ids = torch.randint(2000, (2, 60), generator=torch.Generator().manual_seed(2))
    assert max(units(embedded_weights, dtype, ids)) < ROUNDING


@pytest.mark.parametrize("rows", [1, 7, 33])
def test_tiles_of_a_prompt_attend_to_what_came_before_them(rows, embedded_weights, monkeypatch):
    """And so many fit, because no scores are held: one for each pair counts, not one a head."""
    asked = set()

    def tile_rows(device, scores_per_row):
        asked.add(scores_per_row)
        return rows

    monkeypatch.setattr("minqwen.model.attention.tile_rows", tile_rows)
    ids = torch.randint(2000, (1, 60), generator=torch.Generator().manual_seed(3))
    truth = build(embedded_weights, "native", torch.float64)(ids)[0]
    for arithmetic, scores in (
        ("fast", 60),
        ("native", 60 * embedded_weights[0].num_attention_heads),
    ):
        asked.clear()
        [logits] = run_paged(build(embedded_weights, arithmetic, torch.float32), list(ids))
        assert error(logits, truth) < 1e-5
        assert asked == {scores}


def test_float64_is_the_truth_of_native(embedded_weights):
    ids = torch.randint(2000, (1, 40), generator=torch.Generator().manual_seed(2))
    native, fast = (build(embedded_weights, a, torch.float64) for a in ("native", "fast"))
    assert error(fast(ids), native(ids)) < 1e-12


def test_greedy_text_is_that_of_native_float32(embedded):
    prompts = ["And God said", "In the beginning", "The LORD is", "What is 47 + 38?"]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    texts = []
    for arithmetic in ("native", "fast"):
        model = Qwen2.from_pretrained(embedded, dtype="float32", arithmetic=arithmetic)
        llm = LLM(model, tokenizer=str(embedded), max_model_len=64, num_blocks=40, seed=0)
        texts.append([o.outputs[0].token_ids for o in llm.generate(prompts, params)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_that_lies_beyond_a_context_reaches_it(cpu, dtype):
    model = build(random_model(), "fast", dtype)
    sequences = [tokens(model, T, seed=T) for T in (1, 5, 23, 40)]
    runs = [
        run_paged(model, sequences, 8, random_chunks(3, 9), seed=3, stale=stale)
        for stale in (0.0, torch.nan)
    ]
    for clean, dirty in zip(*runs):
        assert dirty.isfinite().all()
        assert error(dirty, clean) < 0.05


def test_a_token_that_overflows_leaves_the_ones_before_it_alone(cpu):
    config, tensors = random_model()
    tensors["model.embed_tokens.weight"][77] = torch.inf
    model = build((config, tensors), "fast", torch.bfloat16)
    ids = torch.tensor([[3, 4, 5, 77, 6]])
    finite = model(ids).isfinite().all(-1)
    assert finite.tolist() == [[True, True, True, False, False]]


# ---- packed weights -----------------------------------------------------------------------------


def form_of(kind, weight):
    return Half(weight, half_scale(weight)) if kind is Half else kind(weight)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Blocked, torch.bfloat16),
        *((form, dtype) for form in (Half, Widened) for dtype in SIXTEEN_BITS),
    ],
    ids=str,
)
def test_a_packed_weight_has_every_bit(kind, dtype):
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(70, 50, generator=generator) * 0.02).to(dtype)
    weight[0, :6] = torch.tensor([0.0, -0.0, 6e-5, -6e-8, 1e-7, 0.9]).to(dtype)
    assert torch.equal(form_of(kind, weight).weight(), weight)
    x = torch.randn(5, 50, generator=generator).to(dtype)
    bias = torch.randn(70, generator=generator).to(dtype)
    truth = x.double() @ weight.double().t() + bias.double()
    for rows in (1, 3, 5):
        found = form_of(kind, weight).product(x[:rows], bias)
        assert found.shape == (rows, 70)
        assert error(found, truth[:rows]) < 0.01


def test_ordinary_bfloat16_weights_fit_float16_when_they_are_scaled():
    weight = (torch.randn(500, 500, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    assert not torch.equal(weight.half().bfloat16(), weight)  # small ones lose bits
    scale = half_scale(weight)
    assert torch.equal((weight.float() * scale).half().float() / scale, weight.float())


@pytest.mark.parametrize(
    "values", [[1e38, 1.0], [1.0, 1e-30], [torch.inf, 1.0], [torch.nan, 1.0]], ids=str
)
def test_weights_without_a_float16_value_are_kept_in_float32(values, monkeypatch):
    monkeypatch.setattr("minqwen.model.packed.multiplies_bfloat16", lambda: False)
    config, tensors = random_model()
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][0, :2] = torch.tensor(values)
    model = build((config, tensors), "fast", torch.bfloat16)
    forms = {name: type(model.get_submodule(name).packed.form) for name in packed_layers(model)}
    assert {n for n, form in forms.items() if form is Widened} == {name.removesuffix(".weight")}
    found = model.state_dict()[name]
    assert torch.equal(found.isnan(), tensors[name].isnan())
    assert torch.equal(found.nan_to_num(), tensors[name].nan_to_num())


@pytest.mark.parametrize("tied", [False, True])
def test_packed_weights_are_no_second_copy(cpu, tied):
    model = build(random_model(tie_word_embeddings=tied), "fast", torch.bfloat16)
    layers = packed_layers(model)
    assert len(layers) == 2 * 7 + 1
    for name in layers:
        own = dict(model.get_submodule(name)._parameters)
        assert ("weight" in own) == (tied and name == "lm_head")
    a = model.model.layers[0].self_attn
    assert a.q_proj.packed is a.k_proj.packed is a.v_proj.packed
    assert packed_layers(model) == layers  # looking has unpacked nothing


def test_the_memory_of_a_model_that_is_gone_is_free_at_once(cpu):
    gc.disable()
    try:
        model = build(random_model(), "fast", torch.bfloat16)
        forms = [weakref.ref(model.get_submodule(name).packed) for name in packed_layers(model)]
        del model
        assert len(forms) == 15 and not any(form() for form in forms)
    finally:
        gc.enable()


ASKS = {
    "state_dict": lambda model: model.state_dict(),
    "parameters": lambda model: list(model.parameters()),
    "another device": lambda model: model.to("cpu"),
    "a copy": copy.deepcopy,
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS.keys())
def test_whoever_asks_for_the_weights_gets_them(cpu, ask):
    weights = random_model()
    model = build(weights, "fast", torch.bfloat16)
    ids = tokens(model, 1, 20)
    before = model(ids)
    ask(model)
    assert not packed_layers(model)
    assert error(model(ids), before) < 0.03
    assert set(model.state_dict()) == set(weights[1])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[1][name])
    model.prepare()
    assert packed_layers(model)
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["lm_head", "model.layers.1.self_attn.k_proj"])
def test_a_weight_that_is_changed_counts(cpu, name, tied):
    weights = random_model(tie_word_embeddings=tied)
    fast, native = (build(weights, a, torch.bfloat16) for a in ("fast", "native"))
    ids = tokens(fast, 1, 20)
    old = fast(ids)
    for model in (fast, native):
        model.get_submodule(name).weight.mul_(-2)
    assert error(fast(ids), native(ids)) < 0.03 < error(fast(ids), old)
    fast.prepare()
    assert error(fast(ids), native(ids)) < 0.03


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_a_parameter_that_is_replaced_counts(cpu, leaf):
    weights = random_model()
    fast, native = (build(weights, a, torch.bfloat16) for a in ("fast", "native"))
    ids = tokens(fast, 1, 20)
    old = fast(ids)
    for model in (fast, native):
        layer = model.model.layers[0].self_attn.v_proj
        new = getattr(native.model.layers[0].self_attn.v_proj, leaf) * -2
        setattr(layer, leaf, torch.nn.Parameter(new if model is fast else new / -2 * -2, False))
    assert error(fast(ids), native(ids)) < 0.3 < error(fast(ids), old)


def test_a_bias_that_is_written_to_counts(cpu):
    fast, native = (build(random_model(), a, torch.bfloat16) for a in ("fast", "native"))
    ids = tokens(fast, 1, 20)
    for model in (fast, native):
        model.model.layers[0].self_attn.q_proj.bias.add_(3)
    assert packed_layers(fast)
    assert error(fast(ids), native(ids)) < 0.03


def test_it_is_saved_as_it_was(cpu, embedded, tmp_path):
    fast = Qwen2.from_pretrained(embedded, arithmetic="fast")
    assert packed_layers(fast)
    fast.save_pretrained(tmp_path / "saved")
    saved, source = (Qwen2.from_pretrained(p).state_dict() for p in (tmp_path / "saved", embedded))
    assert all(torch.equal(saved[name], x) for name, x in source.items())


# ---- seen from outside --------------------------------------------------------------------------


def test_a_hook_on_one_layer_sees_and_replaces_its_output(cpu):
    fast, native = (build(random_model(), a, torch.bfloat16) for a in ("fast", "native"))
    ids = tokens(fast, 1, 20)
    old = fast(ids)
    seen = []
    for model in (fast, native):
        k_proj = model.model.layers[0].self_attn.k_proj
        k_proj.register_forward_hook(lambda module, x, y: seen.append(y) or -y)
    new = fast(ids), native(ids)
    assert error(*seen) < 0.02
    assert error(*new) < 0.03 < error(new[0], old)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_point_can_be_traced(cpu, dtype):
    fast, native = (build(random_model(), a, dtype) for a in ("fast", "native"))
    ids = tokens(fast, 1, 20)
    names = ["*", "*.attn.result"]
    (logits, seen), (_, right) = (m.run_with_cache(ids, names=names) for m in (fast, native))
    assert list(seen) == list(right)
    assert error(logits, fast(ids)) < 0.03
    for name, x in seen.items():
        assert x.dtype == right[name].dtype
        finite = right[name].isfinite()
        assert torch.equal(x.isfinite(), finite)
        assert error(x[finite], right[name][finite]) < 0.05
    assert len(packed_layers(fast)) == (0 if dtype == torch.float32 else 15)


def test_a_pattern_that_is_replaced_counts(cpu):
    fast, native = (build(random_model(), a, torch.bfloat16) for a in ("fast", "native"))
    ids = tokens(fast, 1, 20)
    hook = ("layers.0.attn.pattern", lambda x, name: x.flip(1))
    changed = [m.run_with_hooks(ids, [hook]) for m in (fast, native)]
    assert error(*changed) < 0.03 < error(changed[0], fast(ids))


def test_gradients_are_refused():
    model = build(random_model(), "fast").requires_grad_()
    with torch.enable_grad(), pytest.raises(ConfigError, match="fast arithmetic has no gradients"):
        model(tokens(model, 1, 4))


@pytest.mark.parametrize("tied", [False, True])
def test_ranks_compute_together_what_one_does(cpu, tied):
    config, tensors = random_model(tie_word_embeddings=tied)
    ids = torch.randint(128, (1, 30), generator=torch.Generator().manual_seed(1))

    def part(mesh):
        def read(name, mine):
            x = tensors[name]
            return x if mine is None else x.narrow(mine.dim, mine.start, mine.stop - mine.start)

        model = Qwen2.from_tensors(config, read, dtype=torch.bfloat16, arithmetic="fast", mesh=mesh)
        assert shard("lm_head.weight", config, mesh.rank, mesh.size)
        assert len(packed_layers(model)) == 15
        return model(ids)

    whole = build((config, tensors), "fast", torch.bfloat16)(ids)
    for logits in on_ranks(2, part):
        assert error(logits, whole) < 0.03


@pytest.mark.parametrize("offload", ["memory", "disk"])
def test_weights_that_come_and_go_are_not_packed(cpu, embedded, offload):
    ids = torch.tensor([[5, 300, 41, 7]])
    model = Qwen2.from_pretrained(embedded, arithmetic="fast", offload=offload)
    seen = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(packed_layers(model)))
    native = Qwen2.from_pretrained(embedded)
    assert error(model(ids), native(ids)) < 0.03
    assert seen == [[]]


def test_several_weights_as_one_on_a_gpu():
    """What CUDA tensors are given, shown on a CPU."""
    weights = random_model()
    fast, native = (build(weights, a, torch.bfloat16) for a in ("fast", "native"))
    fast.state_dict()
    for group in [group for layer in fast.model.layers for group in layer.by_input()]:
        Joined(group, Whole(torch.cat([linear.weight for linear in group])))
    ids = tokens(fast, 1, 20)
    assert len(packed_layers(fast)) == 14
    assert error(fast(ids), native(ids)) < 0.03
    assert all(torch.equal(x, weights[1][name]) for name, x in fast.state_dict().items())


def test_more_heads_while_loading(cpu, embedded):
    ids = torch.tensor([[5, 300, 41, 7]])
    fast = Qwen2.from_pretrained(embedded, arithmetic="fast", num_attention_heads=32)
    native = Qwen2.from_pretrained(embedded, num_attention_heads=32)
    assert packed_layers(fast)
    assert error(fast(ids), native(ids)) < 0.03


# ---- int8 ---------------------------------------------------------------------------------------


def test_int8_is_near_and_no_more_and_a_token_does_not_depend_on_the_others(embedded_weights):
    ids = torch.randint(2000, (3, 50), generator=torch.Generator().manual_seed(2))
    native, int8 = (build(embedded_weights, a, torch.bfloat16) for a in ("native", "int8"))
    truth = build(embedded_weights, "native", torch.float64)(ids)
    unit = rms(native(ids).double() - truth)
    assert rms(int8(ids).double() - truth) / unit < 20
    layer = int8.model.layers[0].mlp.down_proj
    x = torch.randn(30, layer.in_features, generator=torch.Generator().manual_seed(1))
    x[3] *= 1000
    assert torch.equal(layer(x)[:3], layer(x[:3]))
    kl = (truth.log_softmax(-1) - int8(ids).double().log_softmax(-1)) * truth.softmax(-1)
    assert 0 < kl.sum(-1).mean() < 0.1


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS.keys())
def test_rounded_weights_are_not_given_out(ask):
    model = build(random_model(), "int8")
    ids = tokens(model, 1, 5)
    before = model(ids)
    with pytest.raises(ConfigError, match="int8 arithmetic has rounded the weights"):
        ask(model)
    assert torch.equal(model(ids), before)


def test_what_int8_cannot_do_is_refused(embedded):
    for options in (dict(dtype="float64"), dict(offload="disk")):
        with pytest.raises(ConfigError, match="int8"):
            Qwen2.from_pretrained(embedded, arithmetic="int8", **options)
    config, tensors = random_model()
    tensors["lm_head.weight"][3, 3] = torch.nan
    with pytest.raises(ConfigError, match="NaN"):
        build((config, tensors), "int8")
