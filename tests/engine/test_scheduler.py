"""Blocks and scheduler without a model: played at random, against their rules; broken ones fail."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import scheduler_machine

from minqwen import SamplingParams
from minqwen.engine.blocks import BlockPool
from minqwen.engine.request import Completion, Request
from minqwen.engine.scheduler import Scheduler


def queued(scheduler: Scheduler, arrival: int, prompt_ids: list[int]) -> Completion:
    """A request of one completion, in the scheduler's queue."""
    params = SamplingParams()
    request = Request(
        request_id=str(arrival), params=params, prompt_ids=prompt_ids, arrival=arrival
    )
    completion = Completion(
        request=request, params=params, ids=list(prompt_ids), num_prompt=len(prompt_ids), seed=0
    )
    scheduler.add(completion)
    return completion


def test_one_token_of_many_goes_beside_a_chunk_of_a_prompt():
    """In order of arrival, 6 tokens in a step; within it the parts of one token come first."""
    scheduler = Scheduler(BlockPool(8, 4), max_num_seqs=3, max_num_batched_tokens=6)
    first, second = queued(scheduler, 0, [1] * 9), queued(scheduler, 1, [5])
    third = queued(scheduler, 2, [2] * 4)

    def step() -> list[tuple[Completion, int]]:
        parts = [(item.completion, item.count) for item in scheduler.schedule()]
        for completion, count in parts:
            scheduler.computed(completion, count)
            if not completion.missing:
                completion.ids.append(0)
        return parts

    assert step() == [(first, 6)]
    assert step() == [(second, 1), (first, 3), (third, 2)]
    assert step() == [(first, 1), (second, 1), (third, 2)]
    assert step() == [(first, 1), (second, 1), (third, 1)]
    assert scheduler.pool.num_free == 8 - 3 - 1 - 2  # 11, 3 and 5 tokens in blocks of 4


WORDS = st.binary(min_size=8 * 201, max_size=8 * 201).map(
    struct.Struct("201Q").unpack
)  # one draw, so it is cheap


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(WORDS, st.sampled_from([4, 256]))
def test_scheduler_keeps_its_rules(words, digest_bits):
    """200 actions on a small pool, and after every one all of `Machine.check`."""
    scheduler_machine.run(words, digest_bits)


def test_the_machine_sees_what_it_is_for():
    happened = scheduler_machine.long_run(5000)
    for what in ("fork", "abort", "preemption", "eviction", "collision"):
        assert happened[what] > 50, happened


# ---- broken ones --------------------------------------------------------------------------------


class Trusting(BlockPool):
    def holds(self, found, parent, tokens, salt):
        """Two texts with the same digest count as the same."""
        return True


class Forgetful(BlockPool):
    def forget(self, block):
        """A block that is written anew can still be found."""


class Newest(BlockPool):
    def release(self, blocks):
        """What was given back last is used again first."""
        super().release(blocks)
        for block in blocks:
            if block in self.unused:
                self.unused.move_to_end(block, last=False)


class Whole(BlockPool):
    def match(self, ids, salt=None):
        """All of a text may be matched, its last token too."""
        return super().match([*ids, 0], salt)


class Unsalted(BlockPool):
    def match(self, ids, salt=None):
        return super().match(ids)

    def register(self, block, parent, tokens, salt=None):
        return super().register(block, parent, tokens)


class Grudging(Scheduler):
    def make_room(self, youngest=None):
        """Takes the blocks of the oldest instead."""
        return super().make_room(youngest and self.running[0])


class Hasty(Scheduler):
    def fork(self, parent, child):
        """Shares the last, partly filled block too."""
        child.blocks = list(parent.blocks)
        self.pool.share(child.blocks)
        child.computed = child.num_prompt - 1
        child.records = parent.records[: child.computed // self.pool.block_size]
        self.add(child)


class Sparing(Scheduler):
    def make_room(self, youngest=None):
        """Takes nothing from those who wait while there is one who runs."""
        if youngest is None:
            return super().make_room()
        waiting, self.waiting = self.waiting, []
        made = super().make_room(youngest)
        self.waiting = sorted(self.waiting + waiting, key=lambda c: c.key)
        return made


class Queue(Scheduler):
    def add(self, completion):
        """A preempted completion goes to the end."""
        self.waiting.append(completion)


POOLS = [Trusting, Forgetful, Newest, Whole, Unsalted]
SCHEDULERS = [Grudging, Hasty, Sparing, Queue]


@pytest.mark.parametrize(
    "classes",
    [{"pool_class": pool} for pool in POOLS] + [{"scheduler_class": s} for s in SCHEDULERS],
    ids=lambda classes: next(iter(classes.values())).__name__,
)
def test_a_broken_one_is_caught(classes):
    r = random.Random(0)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        for _ in range(300):
            scheduler_machine.run([r.getrandbits(64) for _ in range(101)], 4, **classes)


def test_a_crowd_of_newcomers_starves_nobody():
    """One request that needs the whole pool, and behind it short ones without end."""
    scheduler = Scheduler(BlockPool(8, 4), max_num_seqs=4, max_num_batched_tokens=8)
    for arrival in range(3):
        queued(scheduler, arrival, [arrival] * 7)
    big = queued(scheduler, 3, [9] * 20)
    for arrival in range(4, 150):
        queued(scheduler, arrival, [arrival] * 3)
        for item in scheduler.schedule():
            completion = item.completion
            scheduler.computed(completion, item.count)
            if completion.missing:
                continue
            completion.ids.append(0)
            if len(completion.ids) >= (32 if completion is big else completion.num_prompt + 6):
                scheduler.finish(completion)
        if not big.blocks and big.computed:
            break
    assert len(big.ids) == 32 and arrival < 60
