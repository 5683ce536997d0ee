"""Models that change between requests and under them, and hooks by name: never from the cache."""

from __future__ import annotations

import functools

import pytest
import torch
from support.checkpoints import refusal
from support.engine import GREEDY, PROMPTS, idle, run_to_end
from support.naive import greedy
from torch import nn
from torch.nn.utils import parametrize

from minqwen import LLM, MinqwenError, Qwen2, SamplingParams

IDS = list(range(100, 140))
NEXT = SamplingParams(max_tokens=1, logprobs=2, **GREEDY)
FEW = SamplingParams(max_tokens=12, **GREEDY)


@pytest.fixture
def llm(embedded, embedded_tokenizer) -> LLM:
    """An engine with a model of its own, which tests may change."""
    model = Qwen2.from_pretrained(embedded, dtype="float32")
    return LLM(model, tokenizer=embedded_tokenizer, max_model_len=128, num_blocks=60, seed=0)


def first_logprob(llm: LLM) -> float:
    """Of the token that the engine puts after IDS; checked against the model without an engine."""
    completion = llm.generate([IDS], NEXT, use_tqdm=False)[0].outputs[0]
    found = completion.logprobs[0][completion.token_ids[0]].logprob
    with torch.no_grad():
        truth = torch.log_softmax(llm.model(torch.tensor([IDS]))[0, -1].double(), -1)
    assert found == pytest.approx(float(truth.max()), abs=1e-4)
    return found


def num_cached(llm: LLM) -> int:
    return llm.generate([IDS], NEXT, use_tqdm=False)[0].num_cached_tokens


def halve(module, args, output):
    return output * 0.5


def test_a_hook_that_was_there_leaves_nothing_behind(llm):
    layer = llm.model.model.layers[1].mlp
    plain = first_logprob(llm)
    handle = layer.register_forward_hook(halve)
    hooked = first_logprob(llm)
    assert num_cached(llm) == 0, "what a hook does may change at any time"
    handle.remove()
    assert first_logprob(llm) == pytest.approx(plain, abs=1e-6) != hooked
    assert num_cached(llm) == 32 and idle(llm)


@torch.no_grad()
def write_zeros(model):
    model.model.layers[0].self_attn.o_proj.weight.zero_()


def write_zeros_in_inference_mode(model):
    with torch.inference_mode():
        model.model.layers[0].self_attn.o_proj.weight.zero_()


def load_another(model):
    model.load_state_dict({name: x * 0.9 for name, x in model.state_dict().items()})


def replace_a_parameter(model):
    weight = model.model.layers[0].mlp.down_proj.weight
    model.set_parameter("model.layers.0.mlp.down_proj.weight", weight * 0)


def assign_data_twice(model):
    """The memory of the first weights is free when the second are made: often the same place."""
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data = weight.data * 2
    weight.data = weight.data * 2


def write_data_and_prepare(model):
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model.prepare()


def patch_a_forward(model):
    norm = model.model.layers[0].input_layernorm
    norm.forward = lambda x, *_: norm.ops.rms_norm(x, norm.weight * 1.5, norm.eps)


def hook_an_input(model):
    model.model.layers[2].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 2, args[1]))


def replace_a_module(model):
    """By another that has the same weights."""
    layer = model.model.layers[1]
    attention = layer.self_attn

    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = attention

        def forward(self, x, *others):
            return torch.zeros_like(x)

    layer.self_attn = Silent()


def change_an_epsilon(model):
    model.model.layers[0].input_layernorm.eps = 0.5


def take_an_optimizer_step(model):
    weight = model.model.layers[1].mlp.up_proj.weight.requires_grad_()
    model(torch.tensor([IDS])).logsumexp(-1).sum().backward()
    torch.optim.SGD([weight], lr=0.01).step()


def add_a_parametrization(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    parametrize.register_parametrization(model.model.layers[0].mlp.down_proj, "weight", Doubled())


CHANGES = [
    *(write_zeros, write_zeros_in_inference_mode, load_another, replace_a_parameter),
    *(assign_data_twice, write_data_and_prepare, patch_a_forward, hook_an_input),
    *(replace_a_module, change_an_epsilon, take_an_optimizer_step, add_a_parametrization),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_the_model_makes_older_blocks_unreachable(llm, change):
    before = first_logprob(llm)
    change(llm.model)
    assert abs(first_logprob(llm) - before) > 1e-3, "the change is to be seen"


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_running_requests_are_computed_again_with_the_changed_model(llm, change):
    """After the change every token is what the model, as it is now, puts after the text."""
    request_id = llm.add_request(IDS, FEW)
    both = llm.add_request(IDS, SamplingParams(n=2, max_tokens=12, **GREEDY))
    for _ in range(4):
        llm.step()
    begun = {
        (i, completion.index): list(completion.ids)
        for i in (request_id, both)
        for completion in llm.core.requests[i].completions
    }
    change(llm.model)
    outputs = run_to_end(llm)
    for (i, index), ids in begun.items():
        assert len(ids) > len(IDS), "it runs already"
        more = greedy(llm.model, ids, len(IDS) + 12 - len(ids))
        assert IDS + outputs[i].outputs[index].token_ids == ids + more
    assert idle(llm)


def test_a_forward_hook_that_changes_the_model_itself_is_noticed(llm):
    """In the midst of one `generate`, where nobody else can touch the model."""
    layer = llm.model.model.layers[0]
    seen = []

    def third_time(module, args):
        seen.append(module)
        if len(seen) == 3:
            layer.mlp.down_proj.weight.zero_()

    layer.register_forward_pre_hook(third_time)
    ids = llm.generate([IDS], FEW, use_tqdm=False)[0].outputs[0].token_ids
    assert ids[3:] == greedy(llm.model, IDS + ids[:3], 9)


def test_a_hook_on_all_modules_is_noticed(llm):
    plain = first_logprob(llm)

    def steer_norms(module, args, output):
        return output * 1.5 if type(module).__name__ == "RMSNorm" else None

    with torch.nn.modules.module.register_module_forward_hook(steer_norms):
        assert abs(first_logprob(llm) - plain) > 1e-3
    assert first_logprob(llm) == pytest.approx(plain, abs=1e-6)


def test_a_model_may_have_another_dtype_between_requests(llm):
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        llm.model.to(dtype)
        want = greedy(llm.model, IDS, 12)
        assert llm.generate([IDS], FEW, use_tqdm=False)[0].outputs[0].token_ids == want
    assert idle(llm)


def test_what_nobody_can_see_is_told_by_resetting(llm):
    before = first_logprob(llm)
    llm.model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    llm.reset_prefix_cache()
    assert abs(first_logprob(llm) - before) > 1e-3


def test_a_model_made_in_inference_mode_is_watched_too(embedded, embedded_tokenizer):
    with torch.inference_mode():
        llm = LLM(embedded, dtype="float32", max_model_len=128, num_blocks=60)
    before = first_logprob(llm)
    write_zeros_in_inference_mode(llm.model)
    assert abs(first_logprob(llm) - before) > 1e-3


def test_nothing_is_shared_while_writes_to_a_weight_are_not_counted(llm):
    weight = llm.model.model.layers[0].self_attn.o_proj.weight
    with torch.inference_mode():
        llm.model.set_parameter("model.layers.0.self_attn.o_proj.weight", weight * 1)
    before = first_logprob(llm)
    write_zeros_in_inference_mode(llm.model)
    assert abs(first_logprob(llm) - before) > 1e-3 and num_cached(llm) == 0


def test_offloaded_layers_that_come_and_go_are_no_change(embedded):
    llm = LLM(embedded, dtype="float32", offload="memory", max_model_len=128, num_blocks=60)
    assert [num_cached(llm) for _ in range(3)] == [0, 32, 32]


def test_the_prefix_cache_can_be_reset_at_any_time(llm):
    want = greedy(llm.model, IDS, 12)
    assert [num_cached(llm) for _ in range(2)] == [0, 32]
    request_id = llm.add_request(IDS, FEW)
    for _ in range(3):
        llm.step()
    llm.reset_prefix_cache()
    output = run_to_end(llm)[request_id]
    assert output.outputs[0].token_ids == want and output.num_cached_tokens == 0
    llm.reset_prefix_cache()
    assert num_cached(llm) == 0 and idle(llm)


# ---- hooks by name ------------------------------------------------------------------------------


def steer(x, name):
    """Another value everywhere; what is masked among scores stays masked."""
    return x * 2 if name.endswith("attn.scores") else x + 3.0 * x.roll(1, -1)


def naive_with_hooks(model: Qwen2, ids: list[int], count: int, hooks) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        logits = model.run_with_hooks(torch.tensor([ids]), hooks)
        ids.append(int(logits[0, -1].argmax()))
    return ids[-count:]


@pytest.fixture(scope="module")
def steered(embedded_model, embedded_tokenizer):
    """The 10 tokens that the naive loop puts after each of PROMPTS with `steer` at these names."""

    @functools.cache
    def tokens(names: str) -> list[list[int]]:
        ids = [embedded_tokenizer.encode(prompt) for prompt in PROMPTS]
        return [naive_with_hooks(embedded_model, own, 10, [(names, steer)]) for own in ids]

    return tokens


POINTS = ["layers.1.resid_post", "layers.2.attn.z", "*.attn.scores", "layers.*.attn.rot_k"]


@pytest.mark.parametrize("names", [*POINTS, "logits", "final_norm*", "embed"])
@pytest.mark.parametrize("tokens", [64, 7], ids=["whole prompts", "chunks"])
def test_generation_with_hooks_is_the_naive_loops_with_them(
    make, embedded_model, embedded_tokenizer, oracle, steered, names, tokens
):
    """Beside requests without hooks, which do not notice, and with what they left in the cache."""
    llm = make(embedded_model, embedded_tokenizer, max_num_batched_tokens=tokens, max_num_seqs=6)
    params = SamplingParams(max_tokens=10, **GREEDY)
    want = steered(names)
    for _ in range(2):
        others = [llm.add_request(prompt, params) for prompt in PROMPTS]
        hooked = llm.generate(PROMPTS, params, hooks=[(names, steer)], use_tqdm=False)
        assert [o.outputs[0].token_ids for o in hooked] == want
        assert all(o.num_cached_tokens == 0 for o in hooked)
        plain = run_to_end(llm)
        assert [plain[i].outputs[0].token_ids for i in others] == [ids[:10] for ids in oracle]
    assert idle(llm)


def test_hooks_hold_for_what_is_added_in_their_context(llm):
    hooks = [("layers.1.resid_post", steer)]
    want = naive_with_hooks(llm.model, IDS, 12, hooks)
    with llm.hooks(hooks):
        inside = llm.generate([IDS], FEW, use_tqdm=False)[0]
        stream = llm.stream_deltas(IDS, FEW)
        begun = next(stream).token_ids
    assert inside.outputs[0].token_ids == want
    outside = llm.generate([IDS], FEW, use_tqdm=False)[0]
    assert outside.outputs[0].token_ids == greedy(llm.model, IDS, 12) != want
    assert begun + [i for delta in stream for i in delta.token_ids] == want and idle(llm)


def test_a_hook_may_write_into_what_it_sees_and_the_trace_shows_it(llm):
    seen = []

    def write(x, name):
        seen.append((name, tuple(x.shape)))
        x[..., 5] = 0

    output = llm.generate(
        [IDS],
        SamplingParams(max_tokens=3, **GREEDY),
        hooks=[("layers.1.resid_mid", write)],
        trace="layers.1.resid_mid",
        use_tqdm=False,
    )[0].outputs[0]
    D = llm.config.hidden_size
    assert seen == [("layers.1.resid_mid", (1, T, D)) for T in (40, 1, 1)]
    trace = output.trace["layers.1.resid_mid"]
    assert trace.shape == (42, D) and not trace[:, 5].any() and trace[:, 4].all()


def test_a_hook_that_fails_ends_its_own_request(llm):
    def broken(x, name):
        if x.shape[1] == 1:
            raise IndexError("no such feature")

    other = llm.add_request(IDS, FEW)
    failed = llm.add_request(IDS, FEW, hooks=[("layers.0.mlp.out", broken)])
    misshapen = llm.add_request(IDS, FEW, hooks=[("layers.0.mlp.out", lambda x, name: x[0])])
    outputs = run_to_end(llm)
    assert outputs[other].outputs[0].token_ids == greedy(llm.model, IDS, 12)
    error = outputs[failed].error
    assert "layers.0.mlp.out failed: IndexError: no such feature" in error and __file__ in error
    assert len(outputs[failed].outputs[0].token_ids) == 1
    assert "expected None or a tensor (1, 40, " in outputs[misshapen].error and idle(llm)


@pytest.mark.parametrize(
    "answer",
    [
        lambda x, name: x.resize_(3),
        lambda x, name: x.to("meta"),
        lambda x, name: x.tolist(),
        lambda x, name: x.to_sparse(),
        lambda x, name: next(iter(())),
        lambda x, name: x * float("nan"),
    ],
)
def test_whatever_a_hook_hands_back_concerns_its_own_request(llm, answer):
    other = llm.add_request(IDS, FEW)
    failed = llm.add_request(IDS, FEW, hooks=[("layers.0.mlp.out", answer)])
    outputs = run_to_end(llm)
    assert outputs[other].outputs[0].token_ids == greedy(llm.model, IDS, 12)
    completion = outputs[failed].outputs[0]
    assert (completion.finish_reason == "error") == bool(outputs[failed].error) and idle(llm)
    assert completion.finish_reason == "error" or len(completion.token_ids) == 12


@pytest.mark.parametrize(
    "hooks", [("embed", steer), [("embed",)], [("nothing", steer)], [("embed", 5)], steer]
)
def test_what_is_no_list_of_hooks_is_refused(llm, hooks):
    refusal(lambda: llm.generate([IDS], FEW, hooks=hooks, use_tqdm=False))
    assert idle(llm)


def test_a_model_that_changes_in_every_step_is_an_error_and_no_endless_run(embedded):
    """A hook that writes to a weight leaves no keys and values that the next chunk could use."""
    llm = LLM(
        embedded,
        dtype="float32",
        max_model_len=64,
        max_num_batched_tokens=4,
        max_num_seqs=2,
        seed=0,
    )
    weight = llm.model.model.layers[2].mlp.up_proj.weight

    def write(*_):
        weight.mul_(1)

    handle = llm.model.register_forward_pre_hook(write)
    prompt = list(range(100, 110))
    few = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with pytest.raises(MinqwenError, match="changed before each of"):
        llm.generate([prompt], few, use_tqdm=False)
    handle.remove()
    assert len(llm.generate([prompt], few, use_tqdm=False)[0].outputs[0].token_ids) == 3
