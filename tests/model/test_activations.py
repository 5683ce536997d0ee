"""What can be read off a cache: hidden states, the logit lens, contributions to a logit."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from support.exact import build, random_model, same
from support.paths import ROOT
from support.qwen2 import cast, oracle, ours, tokens
from support.ranks import on_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from minqwen import MinqwenError, Qwen2
from minqwen.errors import TraceError
from minqwen.model.activations import CONTRIBUTORS, Activations
from minqwen.model.trace import Seen, hidden_state_names

LAYERS = 3


@pytest.fixture(scope="module")
def truth():
    with torch.no_grad():
        return ours(oracle(num_hidden_layers=LAYERS), dtype=torch.float64)


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_states_are_transformers_in_every_bit(dtype, changes):
    hf = cast(oracle(**({"num_hidden_layers": LAYERS} | changes)), dtype)
    model = ours(hf)
    ids = tokens(hf, 2, 9)
    expected = hf(ids, output_hidden_states=True).hidden_states
    _, cache = model.run_with_cache(ids, hidden_state_names(model.config.num_hidden_layers))
    found = cache.hidden_states()
    assert len(found) == len(expected) == model.config.num_hidden_layers + 1
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype == dtype and torch.equal(mine, theirs)
    # The last one is the final norm's output, and the last layer's own output is not among them.
    _, cache = model.run_with_cache(ids)
    last = cache[f"layers.{model.config.num_hidden_layers - 1}.resid_post"]
    assert torch.equal(found[-1], cache["final_norm"]) and not torch.equal(found[-1], last)


@pytest.mark.parametrize("arithmetic", ["native", "exact"])
def test_after_the_last_layer_the_lens_shows_the_models_logits(arithmetic):
    model = ours(oracle(num_hidden_layers=LAYERS), arithmetic=arithmetic)
    logits, cache = model.run_with_cache(tokens(model, 2, 9))
    assert same([cache.logits_after(f"blocks.{LAYERS - 1}.hook_resid_post")], [logits])
    names, ids, values = cache.logit_lens(top=4)
    assert names == ["embed", *(f"layers.{i}.resid_post" for i in range(LAYERS))]
    assert ids.shape == values.shape == (LAYERS + 1, 2, 9, 4)
    order = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values[-1], order.values[..., :4])
    assert torch.equal(ids[-1], order.indices[..., :4])


def test_the_lens_norms_each_residual_stream_by_itself(truth):
    ids = tokens(truth, 2, 9)
    _, cache = truth.run_with_cache(ids)
    x = cache["layers.0.resid_mid"]
    normed = x / (x.pow(2).mean(-1, keepdim=True) + truth.config.rms_norm_eps).sqrt()
    expected = (normed * truth.model.norm.weight) @ truth.lm_head.weight.T
    found = cache.logits_after("layers.0.resid_mid")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    # So it is what the model would say without the layers above.
    above = [f"layers.{i}.{part}.out" for i in (1, 2) for part in ("attn", "mlp")]
    cut = truth.run_with_hooks(ids, [(above, lambda x, name: x * 0)])
    torch.testing.assert_close(
        cache.logits_after("layers.0.resid_post"), cut, rtol=1e-10, atol=1e-10
    )


def test_the_lens_of_one_token_is_that_of_all(truth):
    _, cache = truth.run_with_cache(tokens(truth, 2, 9), ["*.resid_post"])
    every, one = cache.logit_lens(top=100), cache.logit_lens(top=100, position=-2)
    assert every.names == one.names == [f"layers.{i}.resid_post" for i in range(LAYERS)]
    assert one.ids.shape == (LAYERS, 2, 1, 61)  # the whole vocabulary
    assert torch.equal(one.ids[:, :, 0], every.ids[:, :, -2])
    torch.testing.assert_close(one.logits[:, :, 0], every.logits[:, :, -2])


def test_of_equal_logits_the_lens_shows_the_lower_id_first(truth):
    model = copy.deepcopy(truth)
    model.lm_head.weight[7] = model.lm_head.weight[3]
    model.lm_head.weight[5] = model.lm_head.weight[3]
    _, cache = model.run_with_cache(tokens(model, 1, 9))
    ids = cache.logit_lens(top=61).ids.flatten(0, 2)
    assert all([i for i in row.tolist() if i in (3, 5, 7)] == [3, 5, 7] for row in ids)


@pytest.mark.parametrize("kind", ["qwen2", "llama with a bias of o_proj"])
def test_contributions_add_up_to_the_logit(kind):
    options = {}
    if kind != "qwen2":
        options = dict(kind=LlamaForCausalLM, config=LlamaConfig, attention_bias=True)
    model = ours(oracle(num_hidden_layers=LAYERS, **options), dtype=torch.float64)
    logits, cache = model.run_with_cache(tokens(model, 2, 9), CONTRIBUTORS)
    for token, position in ((5, -1), (60, 0), (torch.tensor([3, 17]), 4)):
        parts = cache.head_contributions(token, position)
        assert parts.embed.shape == (2,) and parts.heads.shape == (2, LAYERS, 6)
        assert parts.rest.shape == parts.mlps.shape == (2, LAYERS)
        at = torch.as_tensor(token).expand(2)
        torch.testing.assert_close(
            parts.total(), logits[range(2), position, at], rtol=1e-12, atol=1e-12
        )
        bias = parts.rest.abs().max()
        assert bias < 1e-12 if kind == "qwen2" else bias > 1e-3


def test_a_contribution_is_what_the_logit_loses_without_the_head(truth):
    """At the scale of the full residual stream, and without what later layers make of the head."""
    logits, cache = truth.run_with_cache(tokens(truth, 1, 9), CONTRIBUTORS)
    x, share = cache["layers.2.resid_post"][0, -1], cache["layers.0.attn.result"][0, -1, 4]
    scale = (x.pow(2).mean() + truth.config.rms_norm_eps).sqrt()

    def logit(x):
        return (x / scale * truth.model.norm.weight) @ truth.lm_head.weight[11]

    torch.testing.assert_close(logit(x), logits[0, -1, 11])
    parts = cache.head_contributions(11)
    torch.testing.assert_close(parts.heads[0, 0, 4], logit(x) - logit(x - share))


@pytest.mark.parametrize("arithmetic", ["native", "exact"])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-4), (torch.bfloat16, 0.3)], ids=str)
def test_in_narrower_dtypes_contributions_add_up_to_rounding(arithmetic, dtype, most):
    model = ours(oracle(num_hidden_layers=LAYERS), dtype=dtype, arithmetic=arithmetic)
    logits, cache = model.run_with_cache(tokens(model, 2, 9), CONTRIBUTORS)
    parts = cache.head_contributions(11)
    assert parts.heads.dtype == torch.float64
    assert (parts.total() - logits[:, -1, 11].double()).abs().max() < most


@pytest.mark.parametrize("tied", [True, False])
def test_ranks_read_off_what_one_process_does(tied):
    """The vocabulary of 61 rows is spread over 4 ranks, the last of which holds fewer."""
    shape = dict(num_attention_heads=8, vocab_size=61, tie_word_embeddings=tied)
    config, weights = random_model(**shape)
    whole = build((config, weights))
    ids = tokens(whole, 2, 7)
    names = [*CONTRIBUTORS, "final_norm"]

    def read(name, mine):
        x = weights[name]
        return x if mine is None else x.narrow(mine.dim, mine.start, mine.stop - mine.start)

    def outcomes(model):
        _, cache = model.run_with_cache(ids, names)
        lens = cache.logit_lens(top=61)
        contributions = [cache.head_contributions(token) for token in (0, 20, 60)]
        return [lens.ids.double(), lens.logits, *cache.hidden_states(), *sum(contributions, ())]

    expected = outcomes(whole)

    def run(mesh):
        part = Qwen2.from_tensors(config, read, mesh=mesh, arithmetic="exact")
        _, mine = part.run_with_cache(ids, CONTRIBUTORS, gather=False)
        with pytest.raises(TraceError, match="gather=True"):
            mine.head_contributions(20)
        return outcomes(part)

    for found in on_ranks(4, run):
        assert same(found, expected)


def test_what_the_page_on_traces_shows_runs():
    page = (ROOT / "docs" / "traces.md").read_text()
    model = ours(oracle(num_hidden_layers=4, vocab_size=1000), dtype=torch.float64)
    names = {"model": model, "ids": tokens(model, 2, 6)}
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 4
    for block in blocks[:-1]:
        exec(compile(block, "traces.md", "exec"), names)
    torch.testing.assert_close(names["parts"].total()[0], names["logits"][0, -1].max())
    exec(compile(blocks[-1], "traces.md", "exec"), names)
    shapes = [tuple(x.shape) for x in names["logits"]]
    assert shapes == [(1, 3, 1000), (1, 2, 1000)]


def test_what_was_not_traced_or_is_not_there_is_told(truth):
    ids = tokens(truth, 1, 4)
    _, cache = truth.run_with_cache(ids)
    _, full = truth.run_with_cache(ids, CONTRIBUTORS)
    _, logits_only = truth.run_with_cache(ids, "logits")
    for use, says in (
        (lambda: cache.head_contributions(5), "layers.0.attn.result was not traced"),
        (lambda: logits_only.hidden_states(), "embed was not traced"),
        (lambda: logits_only.logit_lens(), "no residual stream"),
        (lambda: logits_only.logits_after("layers.0.resid_post"), "was not traced"),
        (lambda: cache.logits_after("layers.0.mlp.out"), "is no residual stream"),
        (lambda: cache.logits_after("nothing"), "nothing was not traced"),
        (lambda: cache.logit_lens(top=0), "top is 0"),
        (lambda: cache.logit_lens(position=4), "position is 4, expected -4 to 3"),
        (lambda: full.head_contributions(61), "expected 0 to 60"),
        (lambda: full.head_contributions(torch.tensor([1, 2])), "token has 2 ids"),
    ):
        with pytest.raises(MinqwenError) as caught:
            use()
        assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_copied_or_pickled_cache_is_its_tensors_without_the_model(truth):
    _, cache = truth.run_with_cache(tokens(truth, 1, 4), "*.resid_post")
    assert isinstance(cache, Activations)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for again in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), loaded):
        assert type(again) is Seen and list(again) == list(cache)
        assert torch.equal(again["blocks.1.hook_resid_post"], cache["layers.1.resid_post"])
