"""attn.result: what each head adds to the residual stream."""

from __future__ import annotations

import pytest
import torch
from support.exact import STORAGE, build, more_heads, random_model, same
from support.qwen2 import error, oracle, ours, tokens
from support.ranks import on_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from minqwen import LLM, Qwen2, SamplingParams
from minqwen.model.trace import every_name, point_names, select

NAMES = ["*.attn.result", "*.attn.out", "*.attn.z"]
RESULT, Z, OUT = "layers.1.attn.result", "layers.1.attn.z", "layers.1.attn.out"


@pytest.fixture(scope="module")
def tiny():
    with torch.no_grad():
        return ours(oracle(), dtype=torch.float64)  # 6 heads of 10, 24 wide


def parts_of(weights, mesh, **options):
    """This rank's part of a model."""
    config, tensors = weights

    def read(name, mine):
        x = tensors[name]
        return x if mine is None else x.narrow(mine.dim, mine.start, mine.stop - mine.start)

    return Qwen2.from_tensors(config, read, mesh=mesh, **options)


def test_a_share_is_a_heads_z_times_its_columns_of_o_proj(tiny):
    _, seen = tiny.run_with_cache(tokens(tiny, 2, 5), NAMES)
    weight = tiny.model.layers[1].self_attn.o_proj.weight
    assert seen[RESULT].shape == (2, 5, 6, 24) and seen["blocks.1.attn.hook_result"] is seen[RESULT]
    for h in range(6):
        share = seen[Z][:, :, h] @ weight[:, 10 * h : 10 * h + 10].T
        torch.testing.assert_close(seen[RESULT][:, :, h], share, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[RESULT].sum(2), seen[OUT], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_native_shares_add_up_to_rounding(dtype):
    model = ours(oracle(), dtype=dtype)
    ids = tokens(model, 2, 9)
    logits, seen = model.run_with_cache(ids, NAMES)
    assert torch.equal(logits, model(ids))  # watching changes no bit
    assert seen[RESULT].dtype == dtype
    # Every product is rounded once to its dtype, after sums in float32, and shares may cancel.
    total, largest = seen[RESULT].double().sum(2), seen[RESULT].double().abs().sum(2).max()
    assert (total - seen[OUT].double()).abs().max() <= 4 * largest * torch.finfo(dtype).eps


def test_shares_that_round_nowhere_add_up_in_every_bit():
    """Native: the only difference between the sum of the shares and attn.out is rounding."""
    model = ours(oracle(), dtype=torch.float32)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.copy_(torch.randint(-8, 9, (24, 60)).float())
    hooks = [("*.attn.z", lambda z, name: (z * 4).round())]  # small integers
    seen = {}
    watch = (["blocks.1.attn.hook_result", OUT], lambda x, name: seen.update({name: x}))
    model.run_with_hooks(tokens(model, 2, 9), [*hooks, watch])
    assert seen[RESULT].abs().max() > 0 and torch.equal(seen[RESULT].sum(2), seen[OUT])


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_exact_shares_add_up_in_every_bit_in_any_order(dtype, bf16):
    model = build(random_model(bf16=bf16), "exact", dtype)
    ids = tokens(model, 2, 9)
    logits, seen = model.run_with_cache(ids, NAMES)
    assert same([logits], [model(ids)])
    shares = seen[RESULT]
    assert shares.dtype == torch.float64 and seen[OUT].dtype == dtype
    for order in (range(6), reversed(range(6)), [3, 0, 5, 1, 4, 2]):
        total = torch.zeros_like(shares[:, :, 0])
        for h in order:
            total = total + shares[:, :, h]
        assert same([total.to(dtype) + 0.0], [seen[OUT]])


def test_a_bias_of_o_proj_belongs_to_no_head():
    llama = oracle(kind=LlamaForCausalLM, config=LlamaConfig, attention_bias=True)
    for arithmetic in ("native", "exact"):
        model = ours(llama, arithmetic=arithmetic)
        ids = tokens(model, 1, 5)
        logits, seen = model.run_with_cache(ids, NAMES)
        bias = model.model.layers[1].self_attn.o_proj.bias
        assert bias.abs().max() > 0.1
        total = seen[RESULT].sum(2) + bias
        if arithmetic == "exact":
            assert torch.equal(total.to(torch.float32), seen[OUT])
        assert error(total, seen[OUT]) < 1e-6
        replaced = model.run_with_hooks(ids, [(RESULT, lambda x, name: x.clone())])
        assert error(replaced, logits) < 1e-5


@pytest.mark.parametrize("arithmetic", ["native", "exact"])
@pytest.mark.parametrize("size, heads", [(2, 6), (4, 8)])
def test_ranks_gather_the_shares_of_all_heads(arithmetic, size, heads):
    weights = random_model(num_attention_heads=heads, vocab_size=61)
    whole = build(weights, arithmetic)
    ids = tokens(whole, 2, 7)
    expected, seen = whole.run_with_cache(ids, NAMES)
    zeroed = [(RESULT, lambda x, name: x.index_fill(2, torch.tensor([1, heads - 1]), 0.0))]
    ablated = whole.run_with_hooks(ids, zeroed)

    def run(mesh):
        part = parts_of(weights, mesh, arithmetic=arithmetic)
        logits, theirs = part.run_with_cache(ids, NAMES)
        _, own = part.run_with_cache(ids, RESULT, gather=False)
        return logits, theirs[RESULT], own[RESULT], part.run_with_hooks(ids, zeroed)

    for rank, (logits, gathered, own, changed) in enumerate(on_ranks(size, run)):
        assert own.shape[2] == heads // size
        # Ranks are added in a random order, so native has other last bits in every run.
        torch.testing.assert_close(own, gathered.chunk(size, 2)[rank], rtol=1e-4, atol=1e-4)
        if arithmetic == "exact":
            assert torch.equal(own, gathered.chunk(size, 2)[rank])
            assert same([logits, gathered, changed], [expected, seen[RESULT], ablated])
        torch.testing.assert_close(gathered, seen[RESULT], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(changed, ablated, rtol=1e-3, atol=1e-3)


def test_padded_heads_share_nothing_and_move_no_bit():
    weights = random_model()
    small, large = (build(w, "exact") for w in (weights, more_heads(weights, 5)))  # 3 in a group
    ids = tokens(small, 1, 6)
    shares = [m.run_with_cache(ids, NAMES)[1][RESULT].unflatten(2, (2, -1)) for m in (small, large)]
    assert same([shares[1][..., :3, :]], [shares[0]])
    assert not shares[1][..., 3:, :].any()


@pytest.mark.parametrize("names", ["*", None, "layers.1.*", "*.attn.*", "blocks.*"])
def test_a_pattern_that_does_not_end_in_its_name_leaves_it_out(names):
    assert RESULT not in select(names, 2)


@pytest.mark.parametrize(
    "names",
    [RESULT, "*.attn.result", "*result", "*.hook_result", "blocks.1.attn.hook_result"]
    + [["*", "*.attn.result"], lambda name: name.endswith("hook_result")],
    ids=lambda names: "a predicate" if callable(names) else str(names),
)
def test_its_name_and_a_predicate_ask_for_it(names):
    assert RESULT in select(names, 2)


def test_it_has_its_place_in_the_order_of_computation(tiny):
    _, seen = tiny.run_with_cache(tokens(tiny, 1, 3), ["*", "*.attn.result"])
    names = every_name(2)
    assert list(seen) == names and set(names) - set(point_names(2)) == {
        "layers.0.attn.result",
        "layers.1.attn.result",
    }


def test_what_takes_its_place_is_summed(tiny):
    """A head without its share is a head without its z, and a share can be given to a head."""
    ids = tokens(tiny, 2, 5)

    def without_head_2(x, name):
        return x.index_fill(2, torch.tensor(2), 0.0)

    by_share, by_z = (tiny.run_with_hooks(ids, [(n, without_head_2)]) for n in (RESULT, Z))
    torch.testing.assert_close(by_share, by_z, rtol=1e-12, atol=1e-12)
    assert error(by_share, tiny(ids)) > 1e-3
    doubled = tiny.run_with_hooks(ids, [(RESULT, lambda x, name: x * 2)])
    expected = tiny.run_with_hooks(ids, [(OUT, lambda x, name: x * 2)])
    torch.testing.assert_close(doubled, expected, rtol=1e-12, atol=1e-12)


def test_what_is_written_into_it_is_summed_too(tiny):
    ids = tokens(tiny, 2, 5)

    def halve(x, name):
        x[:, 2] *= 0.5

    written = tiny.run_with_hooks(ids, [(RESULT, halve)])
    given = tiny.run_with_hooks(
        ids, [(RESULT, lambda x, name: torch.where(torch.arange(5)[:, None, None] == 2, x / 2, x))]
    )
    assert torch.equal(written, given) and not torch.equal(written, tiny(ids))
    with torch.inference_mode():  # there tensors do not count how often they were written to
        assert torch.equal(tiny.run_with_hooks(ids, [(RESULT, halve)]), written)


def test_it_has_gradients(tiny):
    kept = []

    def keep(x, name):
        kept.append(x.requires_grad_())

    with torch.enable_grad():
        tiny.run_with_hooks(tokens(tiny, 1, 4), [(RESULT, keep)]).pow(2).sum().backward()
    assert kept[0].grad.shape == (1, 4, 6, 24) and kept[0].grad.abs().max() > 0


def test_a_request_of_an_engine_sees_its_own_shares(tiny):
    model = ours(oracle(), dtype=torch.float32)
    llm = LLM(
        model,
        num_blocks=40,
        block_size=4,
        max_model_len=40,
        max_num_batched_tokens=5,
        max_num_seqs=2,
    )
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    prompts = [tokens(model, n, seed=n).tolist() for n in (7, 3)]
    for output in llm.generate(prompts, params, trace=RESULT, use_tqdm=False):
        completion = output.outputs[0]
        ids = torch.tensor([output.prompt_token_ids + completion.token_ids[:-1]])
        _, whole = model.run_with_cache(ids, RESULT)
        torch.testing.assert_close(completion.trace[RESULT], whole[RESULT][0], rtol=1e-4, atol=1e-4)
