"""What explain says of a forward pass is what transformers computes; the code shown does it."""

from __future__ import annotations

import ast
import dataclasses
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from support.heads import build, random_model
from support.paths import ROOT
from support.qwen2 import oracle, ours, tokens
from support.ranks import on_ranks
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from minqwen.errors import MinqwenError
from minqwen.lab.explain import contrast_page, contrast_text
from minqwen.lab.explain import page as explain_page
from minqwen.lab.explain import text as explain_text
from minqwen.lab.explain.contrast import code_of_mistake, contrast, distance
from minqwen.lab.explain.explain import IN_LAYER, explain
from minqwen.lab.explain.sources import Code, between, statement
from minqwen.lab.faults import FAULTS
from minqwen.model import Native, Qwen2, arithmetic
from minqwen.model.qwen2 import Layer

LAYERS, HEADS, KV_HEADS, d = 3, 6, 2, 10
STRANGE = '<b>"&\n'  # a token's text that a page must escape


def spell(id):
    return STRANGE if id % 2 else f" w{id}"


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class Theirs:
    """transformers' model on one prompt: the inputs and outputs of its modules."""

    def __init__(self, hf, ids):
        self.hf, self.inputs, self.outputs = hf, {}, {}
        for name, module in hf.named_modules():
            module.register_forward_hook(self.keep(name))
        self.all = hf(ids, output_hidden_states=True, output_attentions=True)

    def keep(self, name):
        def hook(module, inputs, output):
            self.inputs.setdefault(name, inputs)  # the test of the lens calls some of them again
            self.outputs.setdefault(name, output)

        return hook

    def output(self, name):
        return self.outputs[name][0]  # of the one prompt


@pytest.fixture(scope="module")
def theirs():
    hf = oracle(num_hidden_layers=LAYERS)
    return Theirs(hf, tokens(hf, 1, 11))


@pytest.fixture(scope="module")
def model(theirs):
    return ours(theirs.hf)


@pytest.fixture(scope="module")
def ids(theirs):
    return tokens(theirs.hf, 1, 11)[0].tolist()


@pytest.fixture(scope="module")
def told(model, ids):
    return explain(model, ids, spell, "a small model", block_size=4)


def close(found, expected):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64), expected.double(), rtol=1e-4, atol=1e-5
    )


# ---- numbers ------------------------------------------------------------------------------------


def expected_points(theirs, i):
    """{point: what transformers computes, of our shape} of layer i."""
    layer, out = f"model.layers.{i}", theirs.output
    heads = {
        "attn.q": out(f"{layer}.self_attn.q_proj").unflatten(-1, (HEADS, d)),
        "attn.k": out(f"{layer}.self_attn.k_proj").unflatten(-1, (KV_HEADS, d)),
        "attn.v": out(f"{layer}.self_attn.v_proj").unflatten(-1, (KV_HEADS, d)),
    }
    cos, sin = theirs.outputs["model.rotary_emb"]
    q, k = (heads[f"attn.{x}"].transpose(0, 1)[None] for x in "qk")
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    repeated = k[0].repeat_interleave(HEADS // KV_HEADS, 0)
    hidden = torch.ones(11, 11, dtype=torch.bool).triu(1)
    scores = (q[0] @ repeated.transpose(1, 2) / d**0.5).masked_fill(hidden, -torch.inf)
    x = theirs.all.hidden_states[i][0]
    middle = x + out(f"{layer}.self_attn.o_proj")
    return heads | {
        "norm1": out(f"{layer}.input_layernorm"),
        "attn.rot_q": q[0].transpose(0, 1),
        "attn.rot_k": k[0].transpose(0, 1),
        "attn.scores": scores,
        "attn.pattern": theirs.all.attentions[i][0],
        "attn.z": theirs.inputs[f"{layer}.self_attn.o_proj"][0][0].unflatten(-1, (HEADS, d)),
        "attn.out": out(f"{layer}.self_attn.o_proj"),
        "resid_mid": middle,
        "norm2": out(f"{layer}.post_attention_layernorm"),
        "mlp.gate": out(f"{layer}.mlp.gate_proj"),
        "mlp.up": out(f"{layer}.mlp.up_proj"),
        "mlp.act": theirs.inputs[f"{layer}.mlp.down_proj"][0][0],
        "mlp.out": out(f"{layer}.mlp.down_proj"),
        "resid_post": middle + out(f"{layer}.mlp.down_proj"),
    }


def first_numbers(x, shape):
    """The first four of the last token, of head 0."""
    if shape.startswith("H T"):
        return x[0, -1, :4]
    return x[-1, 0, :4] if x.dim() == 3 else x[-1, :4]


def test_every_operations_numbers_are_transformers(told, theirs):
    outside = {
        "embed": theirs.output("model.embed_tokens"),
        "final_norm": theirs.output("model.norm"),
        "logits": theirs.output("lm_head"),
    }
    steps = {step.point: step for step in (told.embed, *told.after)}
    assert steps.keys() == outside.keys()
    for i, layer in enumerate(told.layers):
        mine = {step.point: step for step in layer.steps}
        assert [*mine] == [f"layers.{i}.{op.point}" for op in IN_LAYER]
        steps |= mine
        outside |= {f"layers.{i}.{p}": x for p, x in expected_points(theirs, i).items()}
    assert steps.keys() == outside.keys()
    for name, step in steps.items():
        assert step.sizes == tuple(outside[name].shape), name
        assert step.sizes == tuple(told.letters[letter] for letter in step.shape.split()), name
        close(step.numbers, first_numbers(outside[name], step.shape))


def test_heads_read_what_transformers_attentions_say(told, theirs):
    for layer, attention in zip(told.layers, theirs.all.attentions, strict=True):
        close([head.pattern for head in layer.heads], attention[0, :, -1])
        for head, row in zip(layer.heads, attention[0, :, -1], strict=True):
            assert head.strongest == int(row.argmax()) and head.kv_head == head.head // 3
            assert head.block == told.blocks.table[head.strongest // 4]


def test_the_lens_is_transformers_norm_and_head_on_its_hidden_states(told, theirs):
    hf, last = theirs.hf, f"model.layers.{LAYERS - 1}"
    streams = [*(x[0, -1] for x in theirs.all.hidden_states[:-1]), theirs.output(last)[-1]]
    chosen = told.predictions[0].id
    for lens, x in zip((told.embed_lens, *(y.lens for y in told.layers)), streams, strict=True):
        p = hf.lm_head(hf.model.norm(x)).double().softmax(-1)
        best = p.sort(descending=True)
        assert [each.id for each in lens.predictions] == best.indices[:5].tolist()
        close([each.probability for each in lens.predictions], best.values[:5])
        assert lens.rank == 1 + int((p > p[chosen]).sum())
        close(lens.probability, p[chosen])
    assert told.layers[-1].lens.rank == 1


def test_what_the_parts_add_is_computed_from_transformers_modules(told, theirs):
    hf, chosen = theirs.hf, told.predictions[0].id
    logits = theirs.all.logits[0, -1]
    assert chosen == int(logits.argmax()) and told.logit == pytest.approx(logits.max().item(), 1e-5)
    x = theirs.output(f"model.layers.{LAYERS - 1}")[-1].double()
    u = hf.lm_head.weight[chosen].double() * hf.model.norm.weight.double()
    u = u / (x.pow(2).mean() + hf.config.rms_norm_eps).sqrt()
    total = told.embed_adds
    close(told.embed_adds, theirs.output("model.embed_tokens")[-1].double() @ u)
    for i, layer in enumerate(told.layers):
        name = f"model.layers.{i}"
        z = theirs.inputs[f"{name}.self_attn.o_proj"][0][0, -1].double().unflatten(-1, (HEADS, d))
        w = hf.get_submodule(f"{name}.self_attn.o_proj").weight.double().unflatten(-1, (HEADS, d))
        close([head.adds for head in layer.heads], torch.einsum("hd,ehd,e->h", z, w, u))
        close(layer.mlp_adds, theirs.output(f"{name}.mlp.down_proj")[-1].double() @ u)
        total += sum(h.adds for h in layer.heads) + layer.mlp_adds + layer.rest_adds
    assert total == pytest.approx(told.logit, rel=1e-5)


def test_the_blocks_hold_the_keys_and_values_of_their_tokens(model, ids, theirs, monkeypatch):
    caches, make = [], model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda *args: caches.append(make(*args)) or caches[-1])
    blocks = explain(model, ids, spell, "m", block_size=4).blocks
    (cache,) = caches
    assert len(blocks.table) == 3 and cache.block_size == 4
    for i in range(LAYERS):
        rotated, values = (expected_points(theirs, i)[p] for p in ("attn.rot_k", "attn.v"))
        for position in range(len(ids)):
            place = (i, slice(None), blocks.of(position), position % 4)
            close(cache.pool[place], torch.stack((rotated[position], values[position])))
    assert blocks.total_bytes == cache.pool.numel() * cache.pool.element_size()


def test_two_ranks_tell_what_one_does(ids, theirs, told):
    weights = theirs.hf.state_dict()

    def run(mesh):
        def read(name, mine):
            x = weights[name]
            return x if mine is None else x.narrow(mine.dim, mine.start, mine.stop - mine.start)

        part = Qwen2.from_tensors(ours(theirs.hf).config, read, mesh=mesh)
        return explain(part, ids, spell, "a small model", block_size=4)

    for found in on_ranks(2, run):
        assert [p.id for p in found.predictions] == [p.id for p in told.predictions]
        assert (found.letters, found.blocks) == (told.letters, told.blocks)
        for a, b in zip(found.layers, told.layers, strict=True):
            close([h.adds for h in a.heads], torch.tensor([h.adds for h in b.heads]))
            close([h.pattern for h in a.heads], torch.tensor([h.pattern for h in b.heads]))
            assert [s.sizes for s in a.steps] == [s.sizes for s in b.steps]


# ---- code ---------------------------------------------------------------------------------------

HOLDS = {  # what the lines that call, and those that compute, must hold
    "embed": ("self.model.embed_tokens(ids)", "F.embedding(ids, weight)"),
    "norm1": ("self.input_layernorm(x", "torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)"),
    "attn.q": ("self.q_proj", "F.linear(x, linear.weight, linear.bias)"),
    "attn.k": ("self.k_proj", "F.linear(x, linear.weight, linear.bias)"),
    "attn.v": ("self.v_proj", "F.linear(x, linear.weight, linear.bias)"),
    "attn.rot_q": ("self.ops.rotate(q, cos, sin)", "x * cos + rotate_half(x) * sin"),
    "attn.rot_k": ("self.ops.rotate(k, cos, sin)", "x * cos + rotate_half(x) * sin"),
    "attn.scores": ("attend_paged(", "head_matmul(q, k.transpose(-1, -2)).mul_(scale)"),
    "attn.pattern": ("attend_paged(", "torch.softmax(scores"),
    "attn.z": ("attend_paged(", "weighted_values(head_matmul, pattern, v, hidden)"),
    "attn.out": ("self.o_proj(z.flatten(-2))", "mesh.all_reduce(y", "F.linear(x, linear.weight)"),
    "resid_mid": ('x = x + tap("attn.out"',),
    "norm2": ("self.post_attention_layernorm(x", "torch.rsqrt(wide.pow(2)"),
    "mlp.gate": ("self.gate_proj", "F.linear(x, linear.weight, linear.bias)"),
    "mlp.up": ("self.up_proj", "F.linear(x, linear.weight, linear.bias)"),
    "mlp.act": ("self.ops.silu_mul(gate, up)", "F.silu(gate).mul_(up)"),
    "mlp.out": ("self.down_proj(", "mesh.all_reduce(y", "F.linear(x, linear.weight)"),
    "resid_post": ('x = x + tap("mlp.out"',),
    "final_norm": ("self.model.norm(x", "torch.rsqrt(wide.pow(2)"),
    "logits": ("self.lm_head(x)", "F.linear(x, linear.weight, linear.bias)"),
}


def stands_there(code):
    """Whether the file has these lines at that place, whatever their indentation."""
    lines = (ROOT / code.file).read_text().splitlines()[code.line - 1 :]
    shown = code.text.splitlines()
    return [x.strip() for x in lines[: len(shown)]] == [x.strip() for x in shown]


def test_each_shown_line_stands_where_it_is_said_and_holds_the_operation(told):
    steps = [told.embed, *told.layers[1].steps, *told.after]
    shown = {step.point.removeprefix("layers.1."): step.code for step in steps}
    assert shown.keys() == HOLDS.keys()
    for point, code in shown.items():
        assert len(code) == len(HOLDS[point])
        assert len(ast.parse(code[0].text).body) == 1, "the statement that calls, and no more"
        for each, holds in zip(code, HOLDS[point]):
            assert holds in each.text and stands_there(each), (point, each)
    assert "cache.write(" in told.blocks.write.text and stands_there(told.blocks.write)
    assert "cache.read(" in told.blocks.read.text and stands_there(told.blocks.read)


def test_control_a_line_elsewhere_is_seen(told):
    code = told.embed.code[0]
    assert not stands_there(dataclasses.replace(code, line=code.line + 1))


def computed(texts, names):
    """What lines of arithmetic.py return, run by themselves with these names."""
    body = "\n".join(texts).replace("\n", "\n    ")
    scope = {**vars(arithmetic), **names}
    exec(f"def run():\n    {body}", scope)
    return scope["run"]()


@pytest.mark.parametrize("op", IN_LAYER, ids=lambda op: op.point)
def test_the_shown_lines_of_the_arithmetic_compute_the_operation(model, ids, told, op):
    """They are run by themselves, on the inputs that a trace shows."""
    _, seen = model.run_with_cache(torch.tensor([ids]))
    at = {point: seen[f"layers.1.{point}"][0] for point in HOLDS if f"layers.1.{point}" in seen}
    layer = model.model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    inputs = {
        "norm1": dict(x=seen["layers.1.resid_pre"][0], weight=layer.input_layernorm.weight),
        "norm2": dict(x=at["resid_mid"], weight=layer.post_attention_layernorm.weight),
        "attn.q": dict(x=at["norm1"], linear=attention.q_proj),
        "attn.k": dict(x=at["norm1"], linear=attention.k_proj),
        "attn.v": dict(x=at["norm1"], linear=attention.v_proj),
        "attn.rot_q": dict(x=at["attn.q"]),
        "attn.rot_k": dict(x=at["attn.k"]),
        "attn.out": dict(x=at["attn.z"].flatten(-2), linear=attention.o_proj),
        "mlp.gate": dict(x=at["norm2"], linear=mlp.gate_proj),
        "mlp.up": dict(x=at["norm2"], linear=mlp.up_proj),
        "mlp.act": dict(gate=at["mlp.gate"], up=at["mlp.up"]),
        "mlp.out": dict(x=at["mlp.act"], linear=mlp.down_proj),
    }
    steps = {step.point: step for step in told.layers[1].steps}
    if op.point not in inputs:
        return  # additions are one line of the layer; attention is below
    cos, sin = (table[:11, None] for table in model.ops.rotary_table(model.config, 11, model.dtype))
    names = dict(eps=model.config.rms_norm_eps, cos=cos, sin=sin, mesh=model.mesh)
    _, text, *product = [code.text for code in steps[f"layers.1.{op.point}"].code]
    if product:  # called as a method: it is run by itself too
        names["self"] = SimpleNamespace(
            product=lambda x, linear: computed(product, dict(x=x, linear=linear))
        )
    result = computed([text], names | inputs[op.point])
    close(result.flatten(1) if result.dim() == 2 else result, at[op.point].view(result.shape))


def test_the_three_parts_of_attention_are_one_function_and_compute_it(model, ids, told):
    _, seen = model.run_with_cache(torch.tensor([ids]))
    q, k, v, z = (seen[f"layers.1.attn.{p}"][0] for p in ("rot_q", "rot_k", "v", "z"))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    shown = [step.code[1] for step in told.layers[1].steps if step.point.endswith(HEAD_POINTS)]
    whole = between(Native.attend)
    assert "\n".join(code.text for code in shown) == whole.text
    names = dict(
        q=q.transpose(0, 1)[None],
        k=k.transpose(0, 1)[None],
        v=v.transpose(0, 1)[None],
        hidden=torch.ones(11, 11, dtype=torch.bool).triu(1),
        scale=model.ops.attention_scale(d),
        tap=lambda name, x: x,
    )
    close(computed([code.text for code in shown], names)[0].transpose(0, 1), z)


HEAD_POINTS = ("attn.scores", "attn.pattern", "attn.z")


def test_code_that_is_not_there_is_an_error():
    with pytest.raises(MinqwenError, match="no statement of .* holds 'attn.nothing'"):
        statement(Layer.forward, "attn.nothing")
    with pytest.raises(MinqwenError, match="no statement holds 'attn.nothing'"):
        between(Native.attend, until="attn.nothing")
    with pytest.raises(MinqwenError, match="is not in a file"):
        between(eval("lambda x: x"))


# ---- text and page ------------------------------------------------------------------------------


def test_the_text_fits_a_terminal_and_shows_one_layer_in_detail(told):
    text = explain_text.as_text(told, layer=1)
    assert max(map(len, text.splitlines())) <= 100
    for step in (told.embed, *told.layers[1].steps, *told.after):
        assert f"  {step.point}" in text and step.code[0].text.splitlines()[0] in text
    for step in (*told.layers[0].steps, *told.layers[2].steps):
        assert f"  {step.point}" not in text
    assert [f"\nLayer {i}: attention adds" in text for i in range(LAYERS)] == [True] * LAYERS
    assert "block 2   " in text and "[T H d] = 11 x 6 x 10" in text


class Reader(HTMLParser):
    """Checks that what is opened is closed, and collects texts and attributes."""

    VOID = ("meta", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.attributes, self.texts, self.ids = [], [], [], []
        self.feed(page)
        assert self.open == [], self.open

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.texts.append(data)


def check_page(page):
    """It is one file by itself, without scripts, and its links lead to what is there."""
    read = Reader(page)
    assert page.startswith("<!doctype html>") and "<script" not in page and "http" not in page
    assert "url(" not in page and "@import" not in page
    assert not [a for a in read.attributes if a[1] in ("src", "srcset", "onclick")]
    links = [value for tag, name, value in read.attributes if name == "href"]
    assert links and all(link.startswith("#") and link[1:] in read.ids for link in links)
    assert len(set(read.ids)) == len(read.ids)
    assert STRANGE.strip() not in page and "<b>&quot;" not in page
    assert "prefers-color-scheme:dark" in page and ":focus-visible" in page
    return "".join(read.texts)


def test_the_page_says_what_the_explanation_says(told):
    page = explain_page.as_html(told)
    text = check_page(page)
    for step in (told.embed, *(s for layer in told.layers for s in layer.steps), *told.after):
        assert step.point in text and step.formula in text
        assert all(code.text in text and code.place in text for code in step.code)
        assert all(f"{x:.4g}" in text for x in step.numbers)
    for prediction in told.predictions:
        assert repr(prediction.text) in text
    assert f"The model's own logit is {told.logit:.4f}" in text
    cells = re.findall(r'title="head (\d+), [^"]*: ([\d.<]+)', page)
    assert len(cells) == LAYERS * HEADS * 11
    assert page.count("<details id=") == LAYERS and page.count(" open>") == 1


# ---- mistakes -----------------------------------------------------------------------------------

IDS = torch.randint(0, 97, (20,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def original():
    """14 query and 2 KV heads, and its config and weights."""
    config, weights = random_model(14, 2)
    return build(config, weights, dtype=torch.float32), config, weights


def contrasted(original, name, ids=None):
    right, config, weights = original
    fault = FAULTS[name]
    wrong = fault.model(config, weights)
    ids = IDS if ids is None else ids
    return contrast(fault, right, wrong, ids, ids, spell, "a small model")


@pytest.mark.parametrize(
    "name, token",
    [("rope-interleaved", 1), ("heads-tiled", 0), ("stale-block", 16), ("gelu", 0)],
)
def test_a_mistake_is_seen_first_where_the_catalogue_says(original, name, token):
    it = contrasted(original, name)
    assert it.first.point == FAULTS[name].first and it.first.token == token
    assert it.first.right != it.first.wrong and len(it.first.right) == 4
    errors = {each.point: each.size for each in it.points}
    before = [*errors][: [*errors].index(it.first.point)]
    assert all(errors[point] == 0 for point in before) and errors[it.first.point] > 0
    # Before the first wrong token all is right, and every later token is wrong.
    assert [place.same for place in it.places] == [i < token for i in range(len(IDS))]


def test_the_numbers_right_and_wrong_are_those_of_two_rotations(original):
    it = contrasted(original, "rope-interleaved")
    model, config, _ = original
    _, seen = model.run_with_cache(torch.tensor([IDS]))
    q = seen["layers.0.attn.q"][0, 1, 0].double()  # position 1, head 0
    angle = config.rope_theta ** (-torch.arange(0, 8, 2).double() / 8)
    a, b = q[:4], q[4:]
    close(it.first.right, a * angle.cos() - b * angle.sin())
    even, odd = q[0::2], q[1::2]
    turned = torch.stack(
        (even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()), -1
    )
    close(it.first.wrong, turned.flatten()[:4])
    assert it.first.at == "[1, 0, 0:4]"
    assert "rotate_half" in it.first.code[1].text and "x[..., 0::2]" in it.code[0].text


def test_both_sides_are_told_by_their_own_models(original):
    it = contrasted(original, "gelu")
    right, config, weights = original
    for side, model in ((it.right, right), (it.wrong, FAULTS["gelu"].model(config, weights))):
        p = model(torch.tensor([IDS]))[0, -1].double().softmax(-1)
        assert [each.id for each in side.predictions] == p.topk(5).indices.tolist()
        close([each.probability for each in side.predictions], p.topk(5).values)


def test_a_mistake_in_what_is_reported_is_at_no_point(original):
    it = contrasted(original, "logprobs-of-temperature")
    logits = original[0](torch.tensor([IDS]))[0, -1].double()
    assert it.first is None and {each.size for each in it.points} == {0.0}
    close([p.probability for p in it.wrong.predictions], (logits / 0.7).softmax(-1).topk(5).values)
    close([p.probability for p in it.right.predictions], logits.softmax(-1).topk(5).values)
    assert "what is reported of its logits is not" in contrast_text.as_text(it)
    check_page(contrast_page.as_html(it))


def test_a_mistake_that_this_prompt_does_not_show_is_said_not_to_show(original):
    it = contrasted(original, "stale-block", IDS[:16])
    assert it.first is None and all(place.same for place in it.places)
    text = contrast_text.as_text(it)
    assert "At no point: on this prompt and in float32 no bit differs." in text


def test_a_silent_mistake_says_why(original):
    it = contrasted(original, "positions-from-one")
    assert it.first.point == "layers.0.attn.rot_q"
    for text in (contrast_text.as_text(it), check_page(contrast_page.as_html(it))):
        assert FAULTS["positions-from-one"].silent in re.sub(r"\s+", " ", text)


def test_prompts_that_differ_are_shown_beside_each_other(original):
    fault = FAULTS["bos-twice"]
    model = original[0]
    it = contrast(fault, model, model, IDS, [IDS[0], *IDS], spell, "a small model")
    assert it.first.point == "embed" and it.points == () and it.places == ()
    assert len(it.wrong.tokens) == len(IDS) + 1
    assert "20 tokens" in contrast_text.as_text(it) and "21 tokens" in contrast_text.as_text(it)
    assert "21 tokens" in check_page(contrast_page.as_html(it))


@pytest.mark.parametrize("name", ["rope-interleaved", "heads-tiled"])
def test_text_and_page_of_a_mistake(original, name):
    it = contrasted(original, name)
    text, page = contrast_text.as_text(it), check_page(contrast_page.as_html(it))
    assert max(map(len, text.splitlines())) <= 100
    for shown in (re.sub(r"\s+", " ", text), re.sub(r"\s+", " ", page)):
        assert FAULTS[name].symptom in shown and it.first.point in shown and it.first.at in shown
        assert all(f"{x:.4g}" in shown for x in (*it.first.right, *it.first.wrong))
        assert all(code.place in shown for code in (*it.code, *it.first.code))


@pytest.mark.parametrize("name", FAULTS)
def test_the_code_of_every_mistake_is_shown(name):
    code, given = code_of_mistake(FAULTS[name])
    assert code and all(isinstance(each, Code) and stands_there(each) for each in code)
    assert all(" at 0x" not in each for each in given)


def test_what_a_general_mistake_is_given_is_shown():
    code, given = code_of_mistake(FAULTS["q-bias-missing"])
    assert given == ("change = zeros_like", "suffixes = ('q_proj.bias',)")
    code, given = code_of_mistake(FAULTS["final-norm-missing"])
    assert [c.text.split("(")[0] for c in code] == ["def drop_final_norm", "class NoNorm"]


def test_distances_between_hidden_scores():
    x = torch.tensor([1.0, -torch.inf])
    assert distance(x, x) == 0
    assert distance(x, torch.tensor([2.0, -torch.inf])) == pytest.approx(1.0)
    assert distance(x, torch.tensor([1.0, 0.0])) == float("inf")
    assert distance(x, torch.tensor([1.0, torch.nan])) == float("inf")
    assert distance(x, x[:1]) == float("inf")
