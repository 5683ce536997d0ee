"""The same calls with TransformerLens itself, where it is installed: names, shapes, values.

`pip install "transformer-lens<4" "transformers>=5"`: from 4 on there is no HookedTransformer. The
package knows models by name only, so it is told that our checkpoint is Qwen2.5-0.5B's.
"""

from __future__ import annotations

import pytest
import torch
from support.paths import EMBEDDED
from transformers import AutoModelForCausalLM, AutoTokenizer

from minqwen.lab.transformer_lens import HookedTransformer, utils

package = pytest.importorskip("transformer_lens.HookedTransformer")
TEXTS = ["In the beginning God created", "And God said unto"]
NAMES = [
    "blocks.1.hook_resid_pre",
    "blocks.2.attn.hook_v",
    "blocks.2.attn.hook_rot_k",
    "blocks.3.attn.hook_attn_scores",
    "blocks.3.attn.hook_pattern",
    "blocks.0.attn.hook_z",
    "blocks.1.attn.hook_result",
    "blocks.1.hook_attn_out",
    "blocks.2.ln2.hook_normalized",
    "blocks.3.mlp.hook_pre",
    "blocks.3.mlp.hook_pre_linear",
    "blocks.3.mlp.hook_post",
    "blocks.3.hook_mlp_out",
    "ln_final.hook_normalized",
]


@pytest.fixture(scope="module")
def theirs():
    import transformer_lens.loading_from_pretrained as loading

    hf = AutoModelForCausalLM.from_pretrained(
        EMBEDDED, dtype=torch.float32, attn_implementation="eager"
    )
    hf.config.rope_theta = hf.config.rope_parameters["rope_theta"]  # where the package looks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading.AutoConfig, "from_pretrained", lambda *a, **k: hf.config)
        return package.HookedTransformer.from_pretrained_no_processing(
            "Qwen/Qwen2.5-0.5B",
            hf_model=hf,
            tokenizer=AutoTokenizer.from_pretrained(EMBEDDED),
            device="cpu",
            dtype=torch.float32,
        )


@pytest.fixture(scope="module")
def ours():
    return HookedTransformer.from_pretrained_no_processing(EMBEDDED)


@pytest.fixture(params=["tokens", "result"])
def both(ours, theirs, request):
    for model in (ours, theirs):
        model.set_use_attn_result(request.param == "result")
    return ours, theirs


def close(a, b, name=""):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4, msg=lambda text: f"{name}: {text}")


@torch.no_grad()
def test_caches_have_the_same_names_shapes_and_values(both):
    caches = []
    for model in both:
        logits, cache = model.run_with_cache(model.to_tokens(TEXTS))
        caches.append({**cache.cache_dict, "logits": logits})
    assert list(caches[0]) == list(caches[1])
    for name in caches[0]:
        close(*(cache[name] for cache in caches), name)


@torch.no_grad()
def test_what_is_replaced_at_a_point_changes_the_same(ours, theirs):
    tokens = ours.to_tokens(TEXTS[0])
    for model in (ours, theirs):
        model.set_use_attn_result(True)

    def change(x, hook):
        assert hook.name.startswith("ln_final") or hook.layer() == int(hook.name[7])
        x[:, 2] = x[:, 2] * 0.5  # in place, as scripts do
        return x

    for name in NAMES:
        changed = [m.run_with_hooks(tokens, fwd_hooks=[(name, change)]) for m in (ours, theirs)]
        close(*changed, name)
        assert (changed[0] - ours(tokens)).abs().max() > 1e-3, name
    for model in (ours, theirs):
        model.set_use_attn_result(False)


def every_stack(model, cache):
    """{call: (tensor, labels)}"""
    layers = model.cfg.n_layers
    stacks = {
        "accumulated": cache.accumulated_resid(return_labels=True),
        "mid": cache.accumulated_resid(2, incl_mid=True, apply_ln=True, return_labels=True),
        "mlp": cache.accumulated_resid(1, mlp_input=True, pos_slice=-1, return_labels=True),
        "decompose": cache.decompose_resid(layers, return_labels=True),
        "attn": cache.decompose_resid(2, mode="attn", mlp_input=True, return_labels=True),
        "slice": cache.decompose_resid(mode="mlp", pos_slice=(1, 3), return_labels=True),
        "heads": cache.stack_head_results(return_labels=True, apply_ln=True, pos_slice=-1),
        "rest": cache.stack_head_results(3, return_labels=True, incl_remainder=True),
        "neurons": cache.stack_neuron_results(
            2, neuron_slice=(0, 5), pos_slice=-1, return_labels=True, incl_remainder=True
        ),
        "full": cache.get_full_resid_decomposition(
            expand_neurons=False, return_labels=True, apply_ln=True
        ),
        "activation": (cache.stack_activation("pattern"), []),
    }
    heads = stacks["heads"][0]
    last, other = model.to_single_token(" the"), model.to_single_token(" of")
    attrs = {
        "logit": cache.logit_attrs(heads * 1, " the", pos_slice=-1),
        "difference": cache.logit_attrs(heads, last, other, pos_slice=-1),
        "one": cache.logit_attrs(heads, last, pos_slice=-1, batch_slice=0),
    }
    return stacks | {name: (x, []) for name, x in attrs.items()}


@torch.no_grad()
def test_sums_of_the_residual_stream_are_the_same(ours, theirs):
    found = []
    for model in (ours, theirs):
        _, cache = model.run_with_cache(model.to_tokens(TEXTS))
        found.append(every_stack(model, cache))
    for name, (stack, labels) in found[0].items():
        close(stack, found[1][name][0], name)
        assert labels == found[1][name][1], name


@torch.no_grad()
def test_weights_have_the_same_shapes_and_values(ours, theirs):
    names = "W_E W_U W_Q W_K W_V W_O b_Q b_K b_V b_O W_in W_gate W_out b_in b_out b_U".split()
    for name in names:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("_W_K", "_W_V", "W_K", "W_O", "b_V"):
        a, b = (getattr(m.blocks[1].attn, name) for m in (ours, theirs))
        assert torch.equal(a, b), name
    x = torch.randn(2, 3, ours.cfg.d_model)
    close(ours.unembed(ours.ln_final(x)), theirs.unembed(theirs.ln_final(x)))
    assert torch.equal(ours.blocks[2].ln2.w, theirs.blocks[2].ln2.w)


def test_text_and_tokens_are_the_same(ours, theirs):
    for call in (
        lambda m: m.to_tokens(TEXTS).tolist(),
        lambda m: m.to_tokens(TEXTS[0], prepend_bos=True).tolist(),
        lambda m: m.to_string(m.to_tokens(TEXTS)),
        lambda m: m.to_string(m.to_tokens(TEXTS[0])[0]),
        lambda m: m.to_single_token(" God"),
        lambda m: m.get_token_position(" God", TEXTS[0]),
        lambda m: m.all_head_labels(),
        lambda m: m.accumulated_bias(2).tolist(),
    ):
        assert call(ours) == call(theirs)
    # The package's own to_str_tokens gives one text with transformers 5.
    ids = theirs.to_tokens(TEXTS[0])[0]
    assert ours.to_str_tokens(TEXTS[0]) == [theirs.to_string(id) for id in ids]
    for name in ours.cfg.to_dict():
        if name not in ("model_name", "n_ctx", "n_params", "device", "rotary_base"):
            assert getattr(ours.cfg, name) == getattr(theirs.cfg, name), name


def test_losses_gradients_and_backward_hooks_are_the_same(ours, theirs):
    tokens = ours.to_tokens(TEXTS[0])
    with torch.enable_grad():
        found = [
            m.run_with_cache(tokens, return_type="loss", incl_bwd=True) for m in (ours, theirs)
        ]
    close(found[0][0].detach(), found[1][0].detach())
    names = [name for name in found[1][1] if not name.endswith("hook_scale_grad")]
    assert list(found[0][1]) == names
    for name in names:
        if name.endswith("ln1.hook_normalized_grad"):
            continue  # the package norms for q, k and v one by one, and keeps one of the gradients
        close(found[0][1][name] * 100, found[1][1][name] * 100, name)
    with torch.no_grad():
        per_token = [m(tokens, return_type="loss", loss_per_token=True) for m in (ours, theirs)]
    close(*per_token)
    assert utils.lm_accuracy(ours(tokens), tokens) == package.utils.lm_accuracy(
        theirs(tokens), tokens
    )


@torch.no_grad()
def test_stopping_early_and_generating_are_the_same(ours, theirs):
    for layer in (0, 1, -1, ours.cfg.n_layers):
        close(*(m(TEXTS[0], stop_at_layer=layer) for m in (ours, theirs)))
    texts = [
        m.generate(TEXTS[0], max_new_tokens=12, do_sample=False, verbose=False)
        for m in (ours, theirs)
    ]
    assert texts[0] == texts[1]
