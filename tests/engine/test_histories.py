"""One request in all the ways an engine can get to its tokens: cached, preempted, forked."""

from __future__ import annotations

import pytest
import torch
from support.arithmetics import Ordered
from support.engine import GREEDY, PROMPTS, all_logprobs, idle, ragged, run_to_end
from support.paths import EMBEDDED

from minqwen import LLM, Checkpoint, Qwen2, SamplingParams
from minqwen.engine.blocks import BlockPool
from minqwen.model import Native

SIZE = 4  # tokens of a block
PROMPT = [(7 * i * i + 3) % 2000 for i in range(13)]
EVERY = SamplingParams(max_tokens=9, logprobs=-1, **GREEDY)


class Histories:
    """One request, with 9 tokens to come: token ids and all logprobs, by every history."""

    def __init__(self, make, model):
        self.make, self.model = make, model

    def engine(self, **options) -> LLM:
        options = {"block_size": SIZE, "num_blocks": 64, "max_model_len": 64, **options}
        return self.make(self.model, None, **options)

    def run(self, llm: LLM, params: SamplingParams = EVERY) -> list:
        out = llm.generate([PROMPT], params, use_tqdm=False)[0]
        self.cached = out.num_cached_tokens
        return [(c.token_ids, all_logprobs(c)) for c in out.outputs]

    def plain(self):
        return self.run(self.engine(enable_prefix_caching=False))[0]

    def full_hit(self):
        llm = self.engine()
        self.run(llm)
        return self.run(llm)[0]

    def partial_hit(self, length: int):
        """After a request that shares `length` tokens with this one."""
        llm = self.engine()
        llm.generate([[*PROMPT[:length], 1999]], SamplingParams(max_tokens=1), use_tqdm=False)
        return self.run(llm)[0]

    def evicted(self):
        llm = self.engine(num_blocks=16)
        self.run(llm)
        llm.generate([[i] * 50 for i in range(4)], SamplingParams(max_tokens=2), use_tqdm=False)
        return self.run(llm)[0]

    def samples(self, n: int) -> list:
        return self.run(self.engine(), SamplingParams(max_tokens=9, logprobs=-1, n=n, **GREEDY))

    def preempted(self, after: int, caching: bool):
        """Chunks of 5 tokens; after `after` steps it loses its blocks, and others may get them."""
        llm = self.engine(
            enable_prefix_caching=caching, max_num_batched_tokens=5, max_num_seqs=4, num_blocks=16
        )
        request_id = llm.add_request(PROMPT, EVERY)
        completion = llm.core.requests[request_id].completions[0]
        for _ in range(after):
            llm.step()
        assert not completion.finished
        llm.core.scheduler.make_room(completion)
        assert not completion.blocks
        if after % 2:
            llm.generate([[after] * 40], SamplingParams(max_tokens=1), use_tqdm=False)
        output = run_to_end(llm)[request_id].outputs[0]
        assert idle(llm)
        return output.token_ids, all_logprobs(output)

    def all(self):
        """(name, (token ids, logprobs)) of every history."""
        yield "full hit", self.full_hit()
        for length in (2 * SIZE - 1, 2 * SIZE, 2 * SIZE + 1):
            yield f"hit {length}", self.partial_hit(length)
        yield "evicted", self.evicted()
        for i, sample in enumerate(self.samples(3)):
            yield f"sample {i}", sample
        for caching in (True, False):
            for after in range(1, 11):  # 3 steps of prefill, 8 of decode
                yield f"preempted after {after}", self.preempted(after, caching)


def short(arithmetic: str | Native) -> Qwen2:
    """Two layers of the embedded model: what a history changes it changes in the first."""
    checkpoint = Checkpoint(EMBEDDED)
    config = checkpoint.config.replace(num_hidden_layers=2)
    return Qwen2.from_tensors(
        config, lambda name, _: checkpoint.read(name), dtype=torch.float32, arithmetic=arithmetic
    )


def test_preemption_changes_no_token(make, embedded_model, embedded_tokenizer, oracle):
    llm = make(embedded_model, embedded_tokenizer, block_size=4, num_blocks=20, max_model_len=64)
    outputs = llm.generate(PROMPTS * 4, SamplingParams(max_tokens=24, **GREEDY), use_tqdm=False)
    assert llm.core.scheduler.num_preemptions > 0
    assert [o.outputs[0].token_ids for o in outputs] == oracle * 4 and idle(llm)


def test_no_history_changes_a_bit_of_exact_arithmetic(make):
    histories = Histories(make, short("exact"))
    want = histories.plain()
    for name, got in histories.all():
        assert got == want, name


def test_no_history_changes_a_token_natively(make):
    histories = Histories(make, short("native"))
    want = histories.plain()
    for name, got in histories.all():
        assert got[0] == want[0], name


def test_control_other_bits_are_seen(make):
    """Where a sum's order depends on the batch, as native kernels may choose, bits do differ."""
    histories = Histories(make, short(Ordered()))
    want = histories.plain()
    assert any(got != want for _, got in histories.all())


def test_hits_are_whole_blocks_and_never_the_last_token(embedded_model):
    histories = Histories(lambda model, tokenizer, **o: LLM(model, seed=0, **o), embedded_model)
    for length, cached in ((2 * SIZE - 1, SIZE), (2 * SIZE, 2 * SIZE), (2 * SIZE + 1, 2 * SIZE)):
        histories.partial_hit(length)
        assert histories.cached == cached
    histories.full_hit()
    assert histories.cached == 12  # of 13
    histories.evicted()
    assert histories.cached == 0
    llm = histories.engine()
    for _ in range(2):  # 12 tokens are 3 whole blocks; the last is computed again, for its logits
        out = llm.generate([PROMPT[:12]], SamplingParams(max_tokens=1), use_tqdm=False)[0]
    assert out.num_cached_tokens == 8


def test_samples_share_the_prompt_and_do_not_depend_on_neighbours(
    make, embedded_model, embedded_tokenizer
):
    params = SamplingParams(
        n=4, temperature=1.0, seed=7, max_tokens=12, logprobs=1, ignore_eos=True
    )
    alone = make(embedded_model, embedded_tokenizer).generate(PROMPTS[2], params, use_tqdm=False)[0]
    llm = make(embedded_model, embedded_tokenizer, block_size=4, enable_prefix_caching=False)
    crowd = llm.generate(PROMPTS + PROMPTS, [params] * 6, use_tqdm=False)[2]
    assert [c.token_ids for c in alone.outputs] == [c.token_ids for c in crowd.outputs]
    assert len({tuple(c.token_ids) for c in alone.outputs}) == 4
    request_id = llm.add_request(PROMPTS[2], params)
    request = llm.core.requests[request_id]
    while not request.forked:
        llm.step()
    parent, *children = request.completions
    shared = (parent.num_prompt - 1) // 4
    assert shared and all(child.blocks[:shared] == parent.blocks[:shared] for child in children)
    llm.abort(request_id)
    assert idle(llm)


class Trusting(BlockPool):
    """Believes that two texts with the same digest are the same."""

    def holds(self, found, parent, tokens, salt):
        return True


@pytest.mark.parametrize("pool_class", [BlockPool, Trusting])
def test_collisions_occur_and_are_not_served(
    embedded_model, oracle, embedded_tokenizer, pool_class
):
    """Every block has one of 16 digests; with a pool that trusts them alone, tokens go wrong."""
    prompts = [embedded_tokenizer.encode(p) for p in PROMPTS]
    others = ragged(embedded_tokenizer, lengths=[9, 14, 22, 30], each=4)
    llm = LLM(embedded_model, num_blocks=200, block_size=2, max_model_len=128, seed=0)
    llm.core.scheduler.pool = pool_class(200, 2, digest_bits=4)
    llm.generate(others, SamplingParams(max_tokens=2, **GREEDY), use_tqdm=False)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=24, **GREEDY), use_tqdm=False)
    tokens = [output.outputs[0].token_ids for output in outputs]
    assert (tokens == oracle) == (pool_class is BlockPool)
    assert (llm.core.pool.collisions > 0) == (pool_class is BlockPool)
