"""The forward pass gives the logits of transformers in every bit, and its gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.paths import EMBEDDED
from support.qwen2 import (
    CONFIGURATIONS,
    OFFICIAL,
    cast,
    differences,
    error,
    oracle,
    ours,
    tokens,
    yarn,
)
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

from minqwen.model import Qwen2

# A call of transformers fills a cache unless told not to, and with one query head to each key/value
# head its keys then lie in memory as no others do; use_cache=False gives other bits in a tenth of
# such float32 cases.
MULTI_HEAD = pytest.param(
    2,
    dict(num_attention_heads=3, num_key_value_heads=3, head_dim=128, hidden_size=64),
    3,
    3,
    id="one-query-head-per-group",
)


@pytest.mark.parametrize(
    "i, changes, B, T",
    [*(pytest.param(i, *c[1:], id=c[0]) for i, c in enumerate(CONFIGURATIONS)), MULTI_HEAD],
)
def test_logits_are_transformers_in_every_bit(i, changes, B, T):
    original = oracle(seed=B * T, **changes)
    for dtype in (torch.float32, torch.bfloat16):
        hf = cast(original, dtype)
        model, ids = ours(hf), tokens(hf, B, T)
        for threads in (1, 2) if i % 4 == 0 else (1,):
            torch.set_num_threads(threads)
            assert not (found := differences(hf, model, ids)), (
                f"{dtype}, {threads} threads: {found}"
            )


@pytest.mark.skipif(not (EMBEDDED / "model.safetensors").exists(), reason="no embedded model yet")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_embedded_model_is_transformers_in_every_bit(dtype):
    hf = Qwen2ForCausalLM.from_pretrained(EMBEDDED, dtype=dtype, attn_implementation="eager").eval()
    assert hf.model.rotary_emb.inv_freq.dtype == torch.float32
    model = Qwen2.from_pretrained(EMBEDDED, dtype=dtype)
    for B, T in ((1, 1), (1, 128), (4, 50)):
        assert not (found := differences(hf, model, tokens(hf, B, T))), found


def test_every_module_gives_what_transformers_module_gives():
    """A forward hook means what it means in transformers, name by name, but on packed tokens."""
    hf = oracle()
    model, ids = ours(hf), tokens(hf, 2, 9)
    seen = {}

    def watch(root, key):
        for name, module in root.named_modules():

            def hook(module, args, out, name=name):
                out = out[0] if isinstance(out, tuple) else getattr(out, "logits", out)
                if isinstance(out, torch.Tensor):
                    seen.setdefault(name, {})[key] = out.reshape(-1, out.shape[-1])

            module.register_forward_hook(hook)

    watch(hf, "theirs"), watch(model, "mine")
    hf(ids), model(ids)
    both = {name: v for name, v in seen.items() if len(v) == 2}
    only = {name.rpartition(".")[2] for name, v in seen.items() if len(v) == 1}
    assert only == {"act_fn", "model", "rotary_emb"} & only, only
    assert (
        len(both) == 1 + 1 + 2 * (1 + 2 + 1 + 4 + 1 + 3) + 1 + 1
    )  # whole, embedding, layers, norm, head
    del both[""]
    for name, v in both.items():
        assert torch.equal(v["mine"], v["theirs"]), name


def test_a_hook_may_change_what_a_module_gives():
    hf = oracle()
    model, ids = ours(hf), tokens(hf, 2, 9)
    before = model(ids)
    for root in (hf, model):
        gate = root.get_submodule("model.layers.1.mlp.gate_proj")
        gate.register_forward_hook(lambda module, args, out: out * 2)
    assert not differences(hf, model, ids) and not torch.equal(model(ids), before)


def test_llama_by_name_is_the_same_function():
    """attention_bias gives Llama's o_proj a bias, which has to be zero in a Qwen2 model."""
    hf = oracle(kind=LlamaForCausalLM, config=LlamaConfig, attention_bias=True)
    for name, p in hf.named_parameters():
        if name.endswith("o_proj.bias"):
            p.zero_()
    for dtype in (torch.float32, torch.bfloat16):
        theirs = cast(hf, dtype)
        assert not (found := differences(theirs, ours(theirs), tokens(hf, 2, 33))), found


def test_repeats_itself_on_other_shapes_in_between():
    """The only state is the rotary table, which grows: short, long and short again are the same."""
    hf = oracle(rope_parameters=yarn(4.0, original=64))
    model = ours(hf)
    for T in (3, 150, 7, 64, 3):
        assert not differences(hf, model, tokens(hf, 2, T))
    as_bfloat16 = copy.deepcopy(model).to(torch.bfloat16)
    assert not differences(cast(hf, torch.bfloat16), as_bfloat16, tokens(hf, 2, 20))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_are_transformers(tied):
    hf = oracle(tie_word_embeddings=tied, rope_parameters=yarn(2.0))
    model, ids = ours(hf), tokens(hf, 2, 33)
    assert not any(p.requires_grad for p in model.parameters())
    with (
        torch.inference_mode()
    ):  # what it leaves behind, the rotary table, must not stop a backward pass
        model(ids)
    with torch.enable_grad():
        for m in (hf, model.requires_grad_(True)):
            logits = getattr(m(ids), "logits", None) if m is hf else m(ids)
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs, mine = dict(hf.named_parameters()), dict(model.named_parameters())
    assert theirs.keys() == mine.keys()
    for name, p in theirs.items():
        assert p.grad.abs().max() > 0 and error(mine[name].grad, p.grad) < 1e-5, name


def test_every_official_shape_is_compared():
    assert len(CONFIGURATIONS) >= 60 and len(OFFICIAL) >= 7
