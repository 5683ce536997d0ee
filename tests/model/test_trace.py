"""Intermediates by name: against transformers' hidden states and attentions, and as hooks."""

from __future__ import annotations

import pytest
import torch
from support.compiled import CONFIG
from support.forked import forked
from support.ranks import on_ranks
from transformers import AutoModelForCausalLM

from minqwen import LLM, SamplingParams
from minqwen.lab.shapes import random_model
from minqwen.model.trace import TraceError, alias_of, point_names, point_of

IDS = torch.tensor([[5, 300, 17, 42, 900, 11, 7], [1, 2, 3, 4, 5, 6, 7]])


@pytest.fixture(scope="module")
def oracle(embedded):
    model = AutoModelForCausalLM.from_pretrained(
        embedded, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(IDS, output_hidden_states=True, output_attentions=True)


def test_residuals_and_patterns_are_transformers_in_every_bit(embedded_model, oracle):
    logits, seen = embedded_model.run_with_cache(IDS)
    assert torch.equal(logits, oracle.logits) and torch.equal(seen["logits"], logits)
    layers = embedded_model.config.num_hidden_layers
    assert torch.equal(seen["embed"], oracle.hidden_states[0])
    for i in range(layers):
        assert torch.equal(seen[f"layers.{i}.attn.pattern"], oracle.attentions[i])
        assert torch.equal(seen[f"layers.{i}.resid_pre"], oracle.hidden_states[i])
        if i + 1 < layers:
            assert torch.equal(seen[f"layers.{i}.resid_post"], oracle.hidden_states[i + 1])
    # transformers' last hidden state is normed; here the last residual and its norm have two names
    assert torch.equal(seen["final_norm"], oracle.hidden_states[-1])
    assert not torch.equal(seen[f"layers.{layers - 1}.resid_post"], seen["final_norm"])


def test_points_are_consistent_with_each_other(embedded_model):
    _, seen = embedded_model.run_with_cache(IDS, per_query_head=True)
    c = embedded_model.config
    assert (
        list(seen) == point_names(c.num_hidden_layers) and len(seen) == 4 + 20 * c.num_hidden_layers
    )
    letters = {
        "T": 7,
        "L": 7,
        "D": c.hidden_size,
        "H": c.num_attention_heads,
        "K": c.num_attention_heads,
        "d": c.head_dim,
        "I": c.intermediate_size,
        "V": c.vocab_size,
    }
    for name, x in seen.items():
        point = point_of(name)
        assert tuple(x.shape) == (2, *(letters[letter] for letter in point.shape.split())), name
        if alias_of(name):
            assert seen[alias_of(name)] is x
    p = "layers.2."
    z = torch.einsum("bhts,bshd->bthd", seen[p + "attn.pattern"], seen[p + "attn.v"])
    torch.testing.assert_close(z, seen[p + "attn.z"])
    scores = (
        torch.einsum("bthd,bshd->bhts", seen[p + "attn.rot_q"], seen[p + "attn.rot_k"])
        * c.head_dim**-0.5
    )
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    torch.testing.assert_close(scores.masked_fill(hidden, -torch.inf), seen[p + "attn.scores"])
    torch.testing.assert_close(seen[p + "resid_pre"] + seen[p + "attn.out"], seen[p + "resid_mid"])
    torch.testing.assert_close(seen[p + "resid_mid"] + seen[p + "mlp.out"], seen[p + "resid_post"])
    act = torch.nn.functional.silu(seen[p + "mlp.gate"]) * seen[p + "mlp.up"]
    torch.testing.assert_close(act, seen[p + "mlp.act"])


def test_hooks_replace_and_names_select(embedded_model):
    plain = embedded_model(IDS)
    calls = []
    same = embedded_model.run_with_hooks(IDS, [("*.attn.q", lambda x, name: calls.append(name))])
    assert torch.equal(same, plain) and calls == [f"layers.{i}.attn.q" for i in range(4)]
    removed = embedded_model.run_with_hooks(IDS, [("blocks.1.attn.hook_z", lambda z, name: z * 0)])
    model_hook = embedded_model.model.layers[1].self_attn.o_proj.register_forward_hook(
        lambda m, a, out: out * 0
    )
    try:  # PyTorch's own hooks on the modules say the same
        assert torch.equal(removed, embedded_model(IDS)) and not torch.equal(removed, plain)
    finally:
        model_hook.remove()
    _, seen = embedded_model.run_with_cache(IDS, names=lambda name: name.endswith("mlp.out"))
    assert len(seen) == 4
    _, seen = embedded_model.run_with_cache(IDS, names=["embed", "blocks.*.hook_resid_post"])
    assert len(seen) == 5
    for bad in ("layers.9.attn.q", "attn", "blocks.0.hook_nothing"):
        with pytest.raises(TraceError):
            embedded_model.run_with_cache(IDS, bad)
    with pytest.raises(TraceError):
        embedded_model.run_with_hooks(IDS, [("embed", lambda x, name: x[0])])


def test_the_engine_shows_prefill_and_decode(embedded_model, embedded_tokenizer):
    llm = LLM(
        embedded_model,
        tokenizer=embedded_tokenizer,
        num_blocks=40,
        block_size=4,
        max_model_len=64,
        max_num_batched_tokens=6,
        max_num_seqs=3,
    )
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    prompts = ["In the beginning God created the heaven", "And it came to pass"]
    names = ["*.attn.pattern", "*.resid_mid", "*.rot_k", "final_norm", "logits"]
    plain = llm.generate(prompts, params, use_tqdm=False)
    traced = llm.generate(prompts, params, trace=names, use_tqdm=False)
    for a, b in zip(plain, traced):
        completion = b.outputs[0]
        assert a.outputs[0].token_ids == completion.token_ids and not a.outputs[0].trace
        ids = torch.tensor([b.prompt_token_ids + completion.token_ids[:-1]])
        _, whole = embedded_model.run_with_cache(ids)
        for name in ("layers.3.resid_mid", "blocks.1.attn.hook_rot_k"):
            torch.testing.assert_close(completion.trace[name], whole[name][0], rtol=1e-4, atol=1e-4)
        assert completion.trace["logits"].argmax(-1).tolist() == completion.token_ids
        at = 0
        for part in completion.trace["layers.2.attn.pattern"]:  # [H, new tokens, context] a step
            rows, context = part.shape[1:]
            torch.testing.assert_close(
                part,
                whole["layers.2.attn.pattern"][0, :, at : at + rows, :context],
                rtol=1e-4,
                atol=1e-5,
            )
            at += rows
        assert at == ids.shape[1]


def test_ranks_gather_what_they_hold(embedded):
    code = f"""
import torch
from minqwen import Mesh, Qwen2
mesh = Mesh.from_env("cpu")
model = Qwen2.from_pretrained({str(embedded)!r}, dtype="float32", mesh=mesh)
ids = torch.tensor({IDS.tolist()})
_, seen = model.run_with_cache(ids)
whole = Qwen2.from_pretrained({str(embedded)!r}, dtype="float32")
_, truth = whole.run_with_cache(ids)
assert list(seen) == list(truth)
for name in truth:
    torch.testing.assert_close(seen[name], truth[name], rtol=1e-4, atol=1e-4, msg=name)
_, mine = model.run_with_cache(ids, "layers.0.attn.q", gather=False)
assert torch.equal(mine["layers.0.attn.q"], seen["layers.0.attn.q"].chunk(2, dim=2)[mesh.rank])
half = lambda x, name: x * 0.5
for name in ("layers.1.attn.k", "layers.1.mlp.act", "layers.0.attn.pattern", "layers.2.resid_mid"):
    halved = [m.run_with_hooks(ids, [(name, half)]) for m in (model, whole)]
    torch.testing.assert_close(*halved, rtol=1e-3, atol=1e-3)
print("ok", mesh.rank)
"""
    result = forked(2, code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ok") == 2


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ["attn.k", "attn.z", "mlp.act", "resid_mid", "logits"])
def test_what_a_hook_writes_into_a_point_counts_on_several_ranks_too(name, inference):
    name = name if name == "logits" else f"layers.1.{name}"
    ids = torch.tensor([[5, 30, 17, 42, 90, 11, 7]])

    def write(x, name):
        x[:, 2:4, 1] += 0.5

    def run(mesh):
        model = random_model(CONFIG, dtype=torch.float32, arithmetic="exact", mesh=mesh)
        with torch.inference_mode(inference):
            return model.run_with_hooks(ids, [(name, write)]), model(ids)

    ((alone, plain),) = on_ranks(1, run)
    assert not torch.equal(alone, plain)
    for changed, unchanged in on_ranks(2, run):
        assert torch.equal(changed, alone) and torch.equal(unchanged, plain)
