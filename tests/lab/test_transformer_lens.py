"""TransformerLens' idiom on our model: against our own traces, transformers, and by hand.

test_transformer_lens_package.py compares with the package itself.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from support.qwen2 import oracle, ours, tokens

from minqwen import MinqwenError, Qwen2
from minqwen.lab.transformer_lens import ActivationCache, HookedTransformer, Slice, utils
from minqwen.model.trace import alias_of, canonical, every_name

TEXT = "In the beginning God created"


@pytest.fixture(autouse=True)
def without_gradients():
    """As scripts begin, with torch.set_grad_enabled(False)."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def hooked():
    """6 query heads on 2 KV heads, 2 layers, float64, no tokenizer."""
    with torch.no_grad():
        return HookedTransformer(ours(oracle(), dtype=torch.float64))


@pytest.fixture(scope="module")
def embedded_hooked(embedded):
    return HookedTransformer.from_pretrained_no_processing(embedded)


@pytest.fixture
def ids(hooked):
    return tokens(hooked.model, 2, 5)


def near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_cache_holds_what_the_models_own_trace_holds(hooked, ids):
    logits, cache = hooked.run_with_cache(ids)
    expected, seen = hooked.model.run_with_cache(ids)
    assert torch.equal(logits, expected)
    for name in seen:
        if alias_of(name):
            assert torch.equal(cache[alias_of(name)], seen[name]), name
    scales = [name for name in cache if name.endswith("hook_scale")]
    assert len(scales) == 5 and len(cache) == len(scales) + sum(map(bool, map(alias_of, seen)))
    x = seen["layers.1.resid_mid"]
    near(cache["scale", 1, "ln2"], (x.pow(2).mean(-1, keepdim=True) + hooked.cfg.eps).sqrt())
    near(x / cache["scale", 1, "ln2"], cache["normalized", 1, "ln2"])


def test_residual_streams_are_transformers_hidden_states():
    hf = oracle().eval()
    model = HookedTransformer(ours(hf, dtype=torch.float32))
    ids = tokens(model.model, 2, 5)
    with torch.no_grad():
        out = hf(ids, output_hidden_states=True, output_attentions=True)
        logits, cache = model.run_with_cache(ids)
        assert torch.equal(logits, out.logits)
        assert torch.equal(cache["resid_pre", 0], out.hidden_states[0])
        assert torch.equal(cache["resid_post", 0], out.hidden_states[1])
        assert torch.equal(model.ln_final(cache["resid_post", -1]), out.hidden_states[2])
        assert torch.equal(cache["pattern", -1], out.attentions[1])


def test_a_cache_is_asked_by_every_spelling(hooked, ids):
    _, cache = hooked.run_with_cache(ids)
    pattern = cache["blocks.1.attn.hook_pattern"]
    for key in (("pattern", 1), ("pattern", -1), ("attn", 1), "pattern1", ("pattern", 1, "attn")):
        assert cache[key] is pattern and key in cache
    assert cache["embed"] is cache["hook_embed"] and cache["scale"] is cache["ln_final.hook_scale"]
    assert ("result", 0) not in cache
    with pytest.raises(KeyError, match="did you mean 'blocks.1.attn.hook_pattern'"):
        cache["blocks.1.attn.hook_patern"]
    assert utils.get_act_name("normalized", 1, "ln2") == "blocks.1.ln2.hook_normalized"
    assert utils.get_act_name("mlp_post", 1) == "blocks.1.mlp.hook_post"
    names = [alias_of(name) for name in every_name(2) if alias_of(name)]
    assert all(canonical(name) != name for name in names) and set(names) <= set(hooked.hook_dict)


def test_a_hook_sees_its_point_and_what_it_returns_or_writes_goes_on(hooked, ids):
    seen = []

    def ablate(z, hook):
        seen.append((hook.name, hook.layer(), tuple(z.shape)))
        z[:, :, 3] = 0
        return z

    changed = hooked.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", ablate)])
    assert seen == [("blocks.1.attn.hook_z", 1, (2, 5, 6, 10))]

    def without(z, name):
        return z.index_fill(2, torch.tensor(3), 0)

    assert torch.equal(changed, hooked.model.run_with_hooks(ids, [("layers.1.attn.z", without)]))
    assert torch.equal(hooked(ids), hooked.model(ids))  # the hook is gone


def test_hooks_stay_until_they_are_reset(hooked, ids):
    calls = []

    def note(x, hook):
        calls.append(hook.name)
        hook.ctx["seen"] = True

    hooked.add_hook(lambda name: name.endswith("hook_q"), note)
    hooked.blocks[0].attn.hook_v.add_hook(note, is_permanent=True)
    with hooked.hooks([("hook_embed", note)]):
        hooked(ids)
        order = ["hook_embed", "blocks.0.attn.hook_q", "blocks.0.attn.hook_v"]
        assert calls == [*order, "blocks.1.attn.hook_q"]
    calls.clear()
    hooked(ids)
    assert calls == ["blocks.0.attn.hook_q", "blocks.0.attn.hook_v", "blocks.1.attn.hook_q"]
    hooked.reset_hooks()
    calls.clear()
    hooked(ids)
    assert calls == ["blocks.0.attn.hook_v"] and not hooked.hook_dict["hook_embed"].ctx
    hooked.reset_hooks(including_permanent=True)
    hooked(ids)
    assert len(calls) == 1


def test_a_stream_is_the_sum_of_its_parts(hooked, ids):
    _, cache = hooked.run_with_cache(ids)
    final = cache["resid_post", -1]
    parts, names = cache.decompose_resid(return_labels=True)
    assert names == ["embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    near(parts.sum(0), final)
    heads, names = cache.stack_head_results(return_labels=True, incl_remainder=True)
    assert names[:7] == ["L0H0", "L0H1", "L0H2", "L0H3", "L0H4", "L0H5", "L1H0"]
    assert names[-1] == "remainder" and heads.shape == (13, *final.shape)
    near(heads.sum(0), final)
    near(cache.stack_head_results(1).sum(0), cache["attn_out", 0])
    streams, names = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert names == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    assert torch.equal(streams[3], cache["resid_mid", 1])
    neurons = cache.stack_neuron_results(pos_slice=-1)
    assert neurons.shape == (80, 2, 24)
    near(neurons[40:].sum(0), cache["mlp_out", 1][:, -1])
    for expand in (True, False):
        whole = cache.get_full_resid_decomposition(expand_neurons=expand)
        near(whole.sum(0), final)


def test_direct_attributions_add_up_to_the_logits(hooked, ids):
    """With the final norm's weight in the stack, which TransformerLens has folded into W_U."""
    logits, cache = hooked.run_with_cache(ids)
    answers, wrong = torch.tensor([3, 7]), torch.tensor([5, 1])
    parts = cache.decompose_resid(pos_slice=-1) * hooked.ln_final.w
    attrs = cache.logit_attrs(parts, answers, wrong, pos_slice=-1)
    last = logits[:, -1]
    rows = torch.arange(2)
    near(attrs.sum(0), last[rows, answers] - last[rows, wrong])
    one = cache.logit_attrs(parts, 3, pos_slice=-1)
    near(one.sum(0), last[:, 3])
    scaled = cache.apply_ln_to_stack(cache["resid_pre", 1][None], layer=1)
    near(scaled[0], cache["normalized", 1, "ln1"])


def test_the_lens_of_the_last_stream_is_the_models_own(hooked, ids):
    logits, cache = hooked.run_with_cache(ids)
    lens = hooked.unembed(hooked.ln_final(cache.accumulated_resid()))
    assert lens.shape == (3, *logits.shape)
    near(lens[-1], logits)
    near(cache["resid_post", -1] / cache["scale"] * hooked.ln_final.w @ hooked.W_U, logits)


def test_weights_have_their_shapes_and_compute_what_the_points_hold(hooked, ids):
    _, cache = hooked.run_with_cache(ids)
    x = cache["normalized", 1, "ln1"] * hooked.blocks[1].ln1.w
    heads = torch.einsum("btd,hde->bthe", x, hooked.W_Q[1]) + hooked.b_Q[1]
    near(heads, cache["q", 1])
    keys = torch.einsum("btd,hde->bthe", x, hooked.W_K[1]) + hooked.b_K[1]
    near(keys, cache["k", 1].repeat_interleave(3, 2))
    out = torch.einsum("bthe,hed->btd", cache["z", 1], hooked.W_O[1]) + hooked.b_O[1]
    near(out, cache["attn_out", 1])
    x = cache["normalized", 1, "ln2"] * hooked.blocks[1].ln2.w
    near(x @ hooked.W_gate[1], cache["pre", 1])
    near(x @ hooked.W_in[1] + hooked.b_in[1], cache["pre_linear", 1])
    near(cache["post", 1] @ hooked.W_out[1] + hooked.b_out[1], cache["mlp_out", 1])
    assert torch.equal(hooked.embed(ids), cache["embed"])
    shapes = {"W_E": (61, 24), "W_U": (24, 61), "W_V": (2, 6, 24, 10), "b_V": (2, 6, 10)}
    assert {name: tuple(getattr(hooked, name).shape) for name in shapes} == shapes
    c = hooked.cfg
    assert (c.n_layers, c.n_heads, c.n_key_value_heads, c.d_head, c.d_mlp) == (2, 6, 2, 10, 40)
    assert (c.d_model, c.d_vocab, c.normalization_type) == (24, 61, "RMS")


def test_slices_take_what_they_say(hooked, ids):
    x = torch.arange(24).reshape(2, 3, 4)
    for given, expected in (
        (None, x),
        (1, x[:, 1]),
        ((1, 3), x[:, 1:3]),
        ([0, 2], x[:, [0, 2]]),
        (torch.tensor([2]), x[:, [2]]),
    ):
        assert torch.equal(Slice(given).apply(x, dim=1), expected)
    _, cache = hooked.run_with_cache(ids, pos_slice=-1)
    _, whole = hooked.run_with_cache(ids)
    assert torch.equal(cache["rot_q", 1], whole["rot_q", 1][:, -1:])
    assert torch.equal(cache["pattern", 1], whole["pattern", 1][:, :, -1:])
    with pytest.raises(MinqwenError, match="a slice is 'last'"):
        Slice("last")


def test_a_cache_of_one_sequence_drops_its_batch(hooked, ids):
    _, cache = hooked.run_with_cache(ids[:1])
    _, flat = hooked.run_with_cache(ids[0], remove_batch_dim=True)
    assert torch.equal(flat["z", 1], cache["z", 1][0])
    kept = cache.decompose_resid(apply_ln=True)
    assert torch.equal(flat.decompose_resid(apply_ln=True), kept[:, 0])
    assert torch.equal(cache.remove_batch_dim()["z", 1], flat["z", 1])
    _, both = hooked.run_with_cache(ids)
    one = both.apply_slice_to_batch_dim(1)
    assert isinstance(one, ActivationCache) and torch.equal(one["z", 0], both["z", 0][1])
    with pytest.raises(MinqwenError, match="2 sequences, expected one"):
        both.remove_batch_dim()


def test_losses_and_gradients(hooked, ids):
    logits, loss = hooked(ids, return_type="both")
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    near(loss, expected.mean())
    near(hooked(ids, return_type="loss", loss_per_token=True).flatten(), expected)
    assert hooked(ids, return_type=None) is None
    with torch.enable_grad():
        loss, cache = hooked.run_with_cache(ids, return_type="loss", incl_bwd=True)
        step, grads = 1e-6, {}
        hooked.add_hook("blocks.0.hook_mlp_out", lambda g, hook: grads.update(g=g), "bwd")
        hooked(ids, return_type="loss").backward()
        hooked.reset_hooks()
    gradient = cache["blocks.0.hook_mlp_out_grad"]
    assert torch.equal(grads["g"], gradient)
    up, down = (
        hooked.run_with_hooks(
            ids,
            return_type="loss",
            fwd_hooks=[("blocks.0.hook_mlp_out", lambda x, hook, s=s: x + s * gradient)],
        )
        for s in (step, -step)
    )
    torch.testing.assert_close((up - down) / (2 * step), gradient.pow(2).sum(), rtol=1e-5, atol=0)
    hooked.zero_grad()


def test_stopping_early_gives_the_stream_before_a_layer(hooked, ids):
    _, cache = hooked.run_with_cache(ids)
    assert torch.equal(hooked(ids, stop_at_layer=0), cache["embed"])
    assert torch.equal(hooked(ids, stop_at_layer=-1), cache["resid_pre", 1])
    assert torch.equal(hooked(ids, stop_at_layer=2), cache["resid_post", 1])
    _, part = hooked.run_with_cache(ids, stop_at_layer=1)
    assert ("resid_post", 0) in part and ("resid_pre", 1) not in part


def test_results_are_computed_where_the_model_is_told_to(hooked, ids):
    name = "blocks.0.attn.hook_result"
    with pytest.raises(MinqwenError, match=r"call set_use_attn_result\(True\) first"):
        hooked.run_with_hooks(ids, fwd_hooks=[(name, print)])
    hooked.set_use_attn_result(True)
    _, cache = hooked.run_with_cache(ids)
    hooked.set_use_attn_result(False)
    _, later = hooked.run_with_cache(ids)
    later.compute_head_results()
    near(cache[name], later[name])


def test_text_becomes_tokens_and_text_again(embedded_hooked, embedded_tokenizer):
    model = embedded_hooked
    ids = embedded_tokenizer.encode(TEXT)
    assert model.to_tokens(TEXT).tolist() == [ids]
    assert model.to_string(ids) == TEXT and model.to_string(torch.tensor([ids])) == [TEXT]
    assert "".join(model.to_str_tokens(TEXT)) == TEXT
    assert model.to_str_tokens(torch.tensor([ids])) == model.to_str_tokens(TEXT)
    end = embedded_tokenizer.eos_token_id
    assert model.to_tokens(TEXT, prepend_bos=True)[0].tolist() == [end, *ids]
    padded = model.to_tokens([TEXT, "In the"])
    assert padded.shape == (2, len(ids))
    with torch.no_grad():  # padding on the right changes nothing before it
        alone = model("In the")
        torch.testing.assert_close(model([TEXT, "In the"])[1:, : alone.shape[1]], alone)
    token = model.to_single_token(" God")
    assert model.to_single_str_token(token) == " God"
    assert model.get_token_position(" God", TEXT) == ids.index(token)
    twice = f"{TEXT} and God"
    assert model.get_token_position(" God", twice) == ids.index(token)
    assert (
        model.get_token_position(" God", twice, mode="last") == model.to_tokens(twice).shape[1] - 1
    )
    assert model.to_tokens(TEXT * 400).shape[1] == model.cfg.n_ctx == 1024
    with pytest.raises(MinqwenError, match="is not a single token but"):
        model.to_single_token(TEXT)


def test_the_embedded_model_answers_what_scripts_ask(embedded_hooked):
    model, head = embedded_hooked, 5
    tokens = model.to_tokens(TEXT)
    logits, cache = model.run_with_cache(tokens)
    _, seen = model.model.run_with_cache(tokens)
    last = model.cfg.n_layers - 1
    assert last == 3 and torch.equal(cache["pattern", 3], seen["layers.3.attn.pattern"])
    assert torch.equal(cache["resid_post", -1], seen["layers.3.resid_post"])
    assert torch.equal(model.W_E[tokens], cache["embed"])
    god = model.to_single_token(" God")
    normed = model.ln_final(cache["resid_post", -1])
    torch.testing.assert_close(normed @ model.W_U[:, god], logits[..., god])
    outs = []

    def ablate(z, hook):
        z[:, :, head] = 0

    hooks = [(utils.get_act_name("z", last), ablate)]
    hooks.append((utils.get_act_name("attn_out", last), lambda x, hook: outs.append(x)))
    ablated = model.run_with_hooks(tokens, fwd_hooks=hooks)
    share = cache["z", last][:, :, head] @ model.W_O[last, head]
    torch.testing.assert_close(outs[0], cache["attn_out", last] - share, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ablated, logits, rtol=1e-3)


def test_generate_hands_on_how_to_sample_and_fills_up_with_the_first_end(embedded_hooked):
    model = embedded_hooked
    quiet = {"max_new_tokens": 12, "verbose": False}
    greedy = model.generate(TEXT, do_sample=False, **quiet)
    assert model.generate(TEXT, top_k=1, temperature=5.0, **quiet) == greedy
    assert model.generate(TEXT, top_p=1e-9, temperature=5.0, **quiet) == greedy
    tokens = model.to_tokens([TEXT, TEXT + " " + TEXT])
    once = model.generate(tokens, do_sample=False, freq_penalty=2.0, return_type="tokens", **quiet)
    new = once[0, tokens.shape[1] :].tolist()
    assert len(set(new)) == 12  # each token lowers its own logit by 2 from then on
    plain = model.generate(tokens, do_sample=False, return_type="tokens", **quiet)
    first, second = plain[:, tokens.shape[1] :].tolist()
    ends = [second[-1], first[2]]
    found = model.generate(
        tokens, do_sample=False, eos_token_id=ends, return_type="tokens", **quiet
    )
    for row, whole in zip(found[:, tokens.shape[1] :].tolist(), (first, second)):
        end = next(i for i, token in enumerate(whole) if token in ends)
        assert row == whole[: end + 1] + [ends[0]] * (len(row) - end - 1)


def test_generate_is_greedy_or_sampled_by_torchs_seed(embedded_hooked):
    model, start = embedded_hooked, embedded_hooked.to_tokens([TEXT, "And God said unto"])
    said = model.generate(
        start, max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False
    )
    with torch.no_grad():
        naive = start
        for _ in range(6):
            naive = torch.cat([naive, model(naive)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(said, naive)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(model.generate(TEXT, max_new_tokens=8, temperature=1.5, verbose=False))
    assert drawn[0] == drawn[1] and drawn[0].startswith(TEXT)
    end = int(said[0, start.shape[1] + 1])  # as if the second new token ended a text
    ended = model.generate(
        start, max_new_tokens=6, do_sample=False, eos_token_id=end, verbose=False
    )
    row = ended[0, start.shape[1] :].tolist()
    assert row[row.index(end) :] == [end] * (len(row) - row.index(end))
    with model.hooks([("hook_embed", lambda x, hook: None)]):
        with pytest.raises(MinqwenError, match="generate has no hooks"):
            model.generate(TEXT)


@pytest.mark.parametrize(
    "option",
    ["fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"],
)
def test_processing_of_weights_is_refused_by_name(embedded, option, monkeypatch):
    monkeypatch.setattr(Qwen2, "from_pretrained", None)  # before any weight is read
    with pytest.raises(MinqwenError, match=rf"^{option} is not done here: it would .*=False$"):
        HookedTransformer.from_pretrained(embedded, **{option: True})


def test_a_tokenizer_of_another_library_is_refused(embedded, monkeypatch):
    monkeypatch.setattr(Qwen2, "from_pretrained", None)
    with pytest.raises(MinqwenError, match="tokenizer is a dict, expected its directory"):
        HookedTransformer.from_pretrained_no_processing(embedded, tokenizer={})


def test_from_pretrained_says_once_what_it_does_not_do(embedded):
    with pytest.warns(UserWarning, match="without TransformerLens' fold_ln, center_writing"):
        HookedTransformer.from_pretrained(embedded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HookedTransformer.from_pretrained_no_processing(embedded, fold_ln=False, n_devices=1)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m, x: m(x, start_at_layer=1), "start_at_layer is not taken"),
        (lambda m, x: m(x, attention_mask=x), "attention_mask is not taken: pad on the right"),
        (lambda m, x: m(x, nonsense=1), "no argument 'nonsense'"),
        (lambda m, x: m(x, return_type="logit"), "return_type is 'logit', expected"),
        (lambda m, x: m(x, stop_at_layer=3), "stop_at_layer is 3, expected -2 to 2"),
        (lambda m, x: m.run_with_hooks(x, fwd_hooks=[("hook_pos_embed", print)]), "hook_rot_q"),
        (lambda m, x: m.add_hook("blocks.0.attn.hook_patern", print), "did you mean"),
        (lambda m, x: m.add_hook("blocks.0.hook_mlp_in", print), "hook ln2.hook_normalized"),
        (lambda m, x: m.add_hook(lambda name: False, print), "true for no hook point"),
        (lambda m, x: m.add_hook("blocks.0.ln1.hook_scale", print, "bwd"), "way back"),
        (lambda m, x: m.set_use_split_qkv_input(True), "there is no hook_q_input"),
        (lambda m, x: m.to_tokens("text"), "has no tokenizer"),
        (
            lambda m, x: m.run_with_hooks(x, fwd_hooks=[("hook_embed", lambda x, hook: x[0])]),
            r"the hook on hook_embed returned \(5, 24\), expected None or a tensor \(2, 5, 24\)",
        ),
        (
            lambda m, x: m.run_with_hooks(
                x, fwd_hooks=[("blocks.0.ln1.hook_scale", lambda x, hook: x)]
            ),
            "can be seen but not replaced",
        ),
    ],
)
def test_what_is_not_here_is_refused_in_one_line(hooked, ids, call, said):
    with pytest.raises(MinqwenError, match=said) as refusal:
        call(hooked, ids)
    assert "\n" not in str(refusal.value)
    hooked.reset_hooks()
