"""Who gets which block, and which completion runs, in cases that are small enough to work out."""

from __future__ import annotations

import pytest

from minqwen import SamplingParams
from minqwen.engine.blocks import BlockPool
from minqwen.engine.request import Completion, Request
from minqwen.engine.scheduler import Scheduler

TEXT = [1, 2, 3, 4, 5, 6]


def filled(pool: BlockPool, tokens: list[int], salt: str | None = None) -> list[int]:
    """Blocks that hold a text, all of them full, registered and given back."""
    blocks = pool.allocate(len(tokens) // pool.block_size)
    assert blocks is not None
    record = None
    for i, block in enumerate(blocks):
        part = tokens[i * pool.block_size : (i + 1) * pool.block_size]
        record = pool.register(block, record, part, salt)
    pool.release(blocks)
    return blocks


def test_a_text_is_found_again_but_for_its_last_token():
    pool = BlockPool(8, 2)
    blocks = filled(pool, TEXT)
    assert pool.match([*TEXT, 7]) == blocks
    assert pool.match(TEXT) == blocks[:2]  # the last token must be computed
    assert pool.match(TEXT[:5]) == blocks[:2] and pool.match(TEXT[:4]) == blocks[:1]
    assert pool.match(TEXT[:2]) == pool.match([1]) == pool.match([]) == []
    assert pool.match([1, 2, 9, 9, 5, 6, 7]) == blocks[:1]
    assert pool.match([9, 9, 3, 4, 5]) == []
    assert (pool.collisions, pool.evictions, pool.num_free) == (0, 0, 8)


def test_without_a_prefix_cache_nothing_is_found():
    pool = BlockPool(8, 2, enable_prefix_caching=False)
    filled(pool, TEXT)
    assert pool.match([*TEXT, 7]) == []


def test_texts_with_different_salts_are_kept_beside_each_other():
    pool = BlockPool(8, 2)
    plain, salted, other = (filled(pool, TEXT[:4], salt) for salt in (None, "a", "b"))
    assert len({*plain, *salted, *other}) == 6
    for salt, blocks in ((None, plain), ("a", salted), ("b", other)):
        assert pool.match(TEXT, salt) == blocks
    assert pool.match(TEXT, "None") == []
    assert (pool.collisions, pool.evictions) == (0, 0)


def test_the_same_tokens_after_another_text_are_another_text():
    pool = BlockPool(8, 2)
    filled(pool, [1, 2, 5, 6])
    second = filled(pool, [3, 4, 5, 6])
    assert pool.match([3, 4, 5, 6, 7]) == second and pool.collisions == 0


def test_of_two_texts_with_one_digest_the_second_is_found_and_never_the_first():
    pool = BlockPool(8, 1, digest_bits=0)
    (first,) = filled(pool, [1])
    assert pool.match([1, 2]) == [first]
    assert pool.match([3, 2]) == [] and pool.collisions == 1
    assert pool.match([1, 2], "salt") == [] and pool.collisions == 2
    (second,) = filled(pool, [3])
    assert pool.match([3, 2]) == [second] != [first]
    assert pool.match([1, 2]) == [] and (pool.collisions, pool.evictions) == (3, 1)
    # Nothing can be found in the first block any more, so it is the next to be used.
    assert pool.allocate(1) == [first]


def test_a_digest_is_short_only_if_asked_for():
    digests = [BlockPool(1, 1, digest_bits=bits).digest(None, (7,), None) for bits in (256, 12)]
    assert [len(digest) for digest in digests] == [32, 32]
    assert int.from_bytes(digests[1], "big") == int.from_bytes(digests[0], "big") >> 244
    pool = BlockPool(1, 1)
    assert pool.digest(None, (7,), None) != pool.digest(None, (8,), None)


def test_so_many_blocks_hold_so_many_tokens():
    pool = BlockPool(3, 4)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_blocks_are_claimed_all_or_none_and_counted():
    pool = BlockPool(3, 4)
    assert pool.allocate(4) is None and pool.num_free == 3
    assert pool.allocate(0) == [] and pool.allocate(3) == [0, 1, 2]
    assert pool.num_free == 0 and pool.allocate(1) is None
    pool.share([1])
    assert pool.references == [1, 2, 1]
    pool.release([0, 1])
    assert pool.references == [0, 1, 1] and list(pool.unused) == [0]
    pool.release([1, 2])
    assert pool.references == [0, 0, 0] and pool.num_free == 3


def test_the_end_of_a_text_is_used_again_first_and_what_is_worth_nothing_before_it():
    pool = BlockPool(5, 1)
    blocks = pool.allocate(3)
    record = pool.register(blocks[0], None, [1])
    pool.register(blocks[1], record, [2])
    pool.release(blocks)  # the third holds nothing that is registered
    assert list(pool.unused) == [2, 3, 4, 1, 0]
    pool.share([0])
    assert list(pool.unused) == [2, 3, 4, 1] and pool.references[0] == 1
    assert pool.allocate(4) == [2, 3, 4, 1] and pool.evictions == 1
    assert pool.match([1, 2, 3]) == [0]


def test_a_text_that_is_there_already_keeps_its_older_block():
    pool = BlockPool(4, 1)
    a, b = pool.allocate(2)
    old = pool.register(a, None, [5])
    assert pool.register(b, None, [5]) is old and b not in pool.content
    assert old.serial == 1 and old.parent == -1 and old.tokens == (5,)
    child = pool.register(b, old, [6])
    assert (child.serial, child.parent) == (2, 1)


def test_the_cache_is_forgotten_when_nobody_uses_it():
    pool = BlockPool(4, 2)
    blocks = filled(pool, TEXT)
    pool.share(blocks)
    with pytest.raises(AssertionError):
        pool.reset_prefix_cache()
    pool.release(blocks)
    pool.reset_prefix_cache()
    assert pool.match([*TEXT, 7]) == [] and not pool.content and not pool.by_digest


# ---- who runs -----------------------------------------------------------------------------------


def queued(scheduler: Scheduler, arrival: int, tokens: int, salt: str | None = None) -> Completion:
    """A request of one completion, with its own prompt, in the scheduler's queue."""
    ids = [100 * arrival + n for n in range(tokens)]
    params = SamplingParams()
    request = Request(
        request_id=str(arrival), params=params, prompt_ids=ids, arrival=arrival, salt=salt
    )
    completion = Completion(
        request=request, params=params, ids=list(ids), num_prompt=tokens, seed=0
    )
    scheduler.add(completion)
    return completion


def fork(scheduler: Scheduler, parent: Completion, index: int) -> Completion:
    """Another completion of the parent's request, whose prompt is computed."""
    child = Completion(
        request=parent.request,
        params=parent.params,
        ids=list(parent.ids),
        num_prompt=parent.num_prompt,
        seed=0,
        index=index,
    )
    scheduler.fork(parent, child)
    return child


def step(scheduler: Scheduler) -> list[tuple[Completion, int]]:
    """One step, after which each completion that reached its end has another token."""
    parts = scheduler.schedule()
    for part in parts:
        ends = part.reaches_end
        assert part.end == part.completion.computed + part.count
        scheduler.computed(part.completion, part.count)
        if ends:
            part.completion.ids.append(7)
    return [(part.completion, part.count) for part in parts]


def test_where_the_pool_is_full_the_youngest_waits_and_the_others_go_on():
    scheduler = Scheduler(BlockPool(4, 2), max_num_seqs=3, max_num_batched_tokens=9)
    a, b, c = (queued(scheduler, n, 2) for n in range(3))
    assert step(scheduler) == [(a, 2), (b, 2), (c, 2)]  # a block each, and one is left
    assert step(scheduler) == [(a, 1), (b, 1)]  # b needs the block of c
    assert (c.num_preemptions, b.num_preemptions, scheduler.num_preemptions) == (1, 0, 1)
    assert scheduler.waiting == [c] and scheduler.running == [a, b]
    assert c.blocks == [] and c.records == [] and c.computed == 0
    assert step(scheduler) == [(a, 1), (b, 1)]
    scheduler.finish(b)
    assert scheduler.running == [a] and b.blocks == []
    # c comes back alone when a has the block that it needs next.
    assert step(scheduler)[0] == (a, 1)
    scheduler.finish(a)
    scheduler.finish(c)
    assert scheduler.waiting == scheduler.running == [] and scheduler.pool.num_free == 4


def test_one_that_has_no_room_beside_older_ones_takes_its_own_blocks():
    scheduler = Scheduler(BlockPool(3, 2), max_num_seqs=2, max_num_batched_tokens=9)
    a, b = queued(scheduler, 0, 3), queued(scheduler, 1, 2)
    assert step(scheduler) == [(a, 3), (b, 2)]
    assert step(scheduler) == [(a, 1)]  # b needs a second block and is itself the youngest
    assert b.num_preemptions == 1 and scheduler.waiting == [b]


def test_who_waits_with_blocks_of_a_prompt_loses_them_first_and_the_last_of_them():
    scheduler = Scheduler(BlockPool(6, 2), max_num_seqs=1, max_num_batched_tokens=9)
    parent = queued(scheduler, 0, 5)
    scheduler.schedule()
    scheduler.computed(parent, 5)
    first, second = (fork(scheduler, parent, index) for index in (1, 2))
    assert first.blocks == second.blocks == parent.blocks[:2]  # not that of the last token
    assert first.computed == first.num_cached == 4 and len(first.records) == 2
    assert scheduler.pool.references[parent.blocks[0]] == 3
    assert scheduler.waiting == [first, second]
    assert scheduler.make_room(parent)  # the youngest that waits gives, not the one that runs
    assert second.blocks == [] and second.computed == 0 and first.blocks
    assert parent.num_preemptions == second.num_preemptions == scheduler.num_preemptions == 0
    assert not scheduler.make_room()  # room for the first that waits: it keeps its own
    assert scheduler.make_room(parent) and first.blocks == []
    assert scheduler.make_room(parent) and scheduler.waiting[0] is parent
    assert parent.num_preemptions == 1 and scheduler.running == []
    assert scheduler.pool.num_free == 6 and not scheduler.make_room()


def test_who_reads_the_prefix_cache_and_who_does_not():
    """Prompt logprobs come of computing; and after a change nothing may be shared for a while."""
    scheduler = Scheduler(BlockPool(9, 2), max_num_seqs=1, max_num_batched_tokens=9)

    def found(**fields) -> int:
        """How many tokens of one and the same prompt of five the cache had."""
        params = SamplingParams(**fields)
        ids = [1, 2, 3, 4, 5]
        request = Request(request_id="r", params=params, prompt_ids=ids)
        completion = Completion(request=request, params=params, ids=ids, num_prompt=5, seed=0)
        scheduler.add(completion)
        (item,) = scheduler.schedule()
        scheduler.computed(completion, item.count)
        completion.end("stop")
        scheduler.finish(completion)
        return completion.num_cached

    assert (found(), found(), found(prompt_logprobs=0)) == (0, 4, 0)
    params = SamplingParams()
    request = Request(request_id="r", params=params, prompt_ids=[1, 2, 3, 4, 5])
    runs = Completion(request=request, params=params, ids=[1, 2, 3, 4, 5], num_prompt=5, seed=0)
    scheduler.add(runs)
    scheduler.schedule()
    assert (runs.num_cached, runs.computed) == (4, 4)
    scheduler.start_over(True)
    assert (runs.num_cached, runs.computed) == (0, 0), "what it had found does not count any more"
    scheduler.finish(runs)
    scheduler.start_over(False)
    assert (found(), found()) == (0, 0)
    scheduler.start_over(True)
    assert (found(prompt_logprobs=1), found(), found(prompt_logprobs=1)) == (0, 4, 0)


def test_who_is_first_gets_room_from_as_many_as_it_takes():
    """Two wait with the same two blocks: only the second that gives them up sets them free."""
    scheduler = Scheduler(BlockPool(4, 2), max_num_seqs=3, max_num_batched_tokens=9)
    parent = queued(scheduler, 1, 5)
    scheduler.schedule()
    scheduler.computed(parent, 5)
    for index in (1, 2):
        fork(scheduler, parent, index)
    parent.end("stop")
    scheduler.finish(parent)
    first = queued(scheduler, 0, 7)
    assert scheduler.waiting[0] is first and scheduler.pool.num_free == 2
    assert [item.completion for item in scheduler.schedule()] == [first]
    assert len(first.blocks) == 4 and scheduler.pool.num_free == 0


def test_a_fork_of_an_unfinished_prompt_shares_what_is_computed():
    scheduler = Scheduler(BlockPool(6, 2), max_num_seqs=1, max_num_batched_tokens=3)
    parent = queued(scheduler, 0, 6)
    scheduler.schedule()
    scheduler.computed(parent, 3)
    child = Completion(
        request=parent.request, params=parent.params, ids=list(parent.ids), num_prompt=6, seed=0
    )
    scheduler.fork(parent, child)
    assert child.blocks == parent.blocks[:1] and child.computed == 2


def test_a_prompt_that_the_cache_has_claims_only_what_is_missing():
    scheduler = Scheduler(BlockPool(3, 2), max_num_seqs=4, max_num_batched_tokens=9)
    first = queued(scheduler, 1, 5)
    assert step(scheduler) == [(first, 5)]
    scheduler.finish(first)
    again = queued(scheduler, 1, 5)
    # Three blocks are needed. Two are cached and free, one is free: exactly enough.
    assert step(scheduler) == [(again, 1)]
    assert again.num_cached == 4 and len(again.records) == 2
    late = queued(scheduler, 2, 1)
    assert step(scheduler) == [(again, 1)]  # no block is left, and nobody is overtaken
    assert late.blocks == []
    scheduler.finish(again)
    scheduler.finish(late)
    salted = queued(scheduler, 1, 5, salt="x")
    assert step(scheduler) == [(salted, 5)] and salted.num_cached == 0


def test_who_begins_again_after_losing_its_blocks_was_not_served_by_the_cache():
    scheduler = Scheduler(BlockPool(4, 2), max_num_seqs=2, max_num_batched_tokens=9)
    only = queued(scheduler, 0, 5)
    step(scheduler)
    scheduler.make_room(only)
    assert step(scheduler) == [(only, 2)] and only.num_cached == 0 and only.computed == 6


def test_at_most_so_many_run_and_so_many_tokens_are_in_a_step():
    scheduler = Scheduler(BlockPool(9, 2), max_num_seqs=2, max_num_batched_tokens=4)
    a, b, c = queued(scheduler, 0, 3), queued(scheduler, 1, 2), queued(scheduler, 2, 1)
    assert step(scheduler) == [(b, 1), (a, 3)]  # 4 tokens; parts of one token come first
    assert step(scheduler) == [(a, 1), (b, 1)]  # two run, and c waits although there is room
    scheduler.finish(a)
    assert step(scheduler) == [(b, 1), (c, 1)]


def test_after_starting_over_all_is_computed_again_in_the_old_order():
    scheduler = Scheduler(BlockPool(9, 2), max_num_seqs=2, max_num_batched_tokens=9)
    a, b, c = (queued(scheduler, n, 3) for n in range(3))
    step(scheduler)
    scheduler.start_over(shares_prefixes=True)
    assert scheduler.waiting == [a, b, c] and scheduler.running == []
    assert a.blocks == [] and a.computed == 0 and scheduler.pool.num_free == 9
    assert step(scheduler) == [(a, 4), (b, 4)] and a.num_cached == 0
    assert scheduler.shares_prefixes
    scheduler.start_over(shares_prefixes=False)
    assert not scheduler.shares_prefixes
    step(scheduler)
    assert not scheduler.pool.content  # nothing is registered of a model that is not shared
    uncached = Scheduler(BlockPool(9, 2, enable_prefix_caching=False), 2, 9)
    uncached.start_over(shares_prefixes=True)
    assert not uncached.shares_prefixes


def test_a_full_block_is_registered_with_its_own_tokens_after_the_one_before():
    scheduler = Scheduler(BlockPool(6, 2), max_num_seqs=1, max_num_batched_tokens=3)
    only = queued(scheduler, 1, 5)
    scheduler.schedule()
    scheduler.computed(only, 3)
    assert [record.tokens for record in only.records] == [(100, 101)]
    scheduler.schedule()
    scheduler.computed(only, 2)
    first, second = only.records
    assert second.tokens == (102, 103) and second.parent == first.serial and first.parent == -1
    assert [scheduler.pool.content[block] for block in only.blocks[:2]] == [first, second]
