"""Allocator and scheduler without a model. Requests come, fork, fail and are aborted on a small
pool; after every action everything that must hold is checked.

A text is named by a number: `Machine.after[text, token]` is the text that is one token longer. The
machine keeps in `written` the text that a forward pass would have left in every slot of the cache.
It knows nothing of digests. All choices come from one 64-bit word per action; a word of 0 is a
plain step.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count as counter

from minqwen.engine.blocks import BlockPool, CachedBlock
from minqwen.engine.request import Completion, Request
from minqwen.engine.scheduler import Scheduled, Scheduler
from minqwen.sampling.params import SamplingParams

LONGEST, MOST_ALIVE = 24, 12
PLAIN, UNCACHED = SamplingParams(), SamplingParams(prompt_logprobs=0)


@dataclass(eq=False, kw_only=True)
class Played(Completion):
    """A completion whose tokens the machine draws."""

    texts: list[int] = field(default_factory=list)  # the text that ends with each of `ids`
    goal: int = LONGEST  # how many ids it gets
    children: int = 0  # how many more completions its request has


def play(request: Request, index: int, texts: list[int], goal: int) -> Played:
    ids = list(request.prompt_ids)
    return Played(
        request=request,
        params=request.params,
        ids=ids,
        num_prompt=len(ids),
        seed=0,
        index=index,
        texts=texts,
        goal=goal,
    )


class Watched:
    """Mixed into a pool: remembers when each block was given back, and for which text each record
    was made."""

    def watch(self, machine: Machine) -> None:
        self.machine, self.clock = machine, counter(1)
        self.given_back, self.text_of = [0] * self.num_blocks, {}

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):  # the end of a text is less worth keeping than its beginning
            self.given_back[block] = next(self.clock)
        super().release(blocks)

    def allocate(self, count: int) -> list[int] | None:
        oldest = list(self.unused)[:count]
        blocks = super().allocate(count)
        assert blocks is None or (blocks == oldest and not any(b in self.content for b in blocks))
        return blocks

    def register(
        self, block: int, parent: CachedBlock | None, tokens: list[int], salt=None
    ) -> CachedBlock:
        record = super().register(block, parent, tokens, salt)
        text = self.machine.texts(self.text_of[parent.serial] if parent else salt, tokens)[-1]
        assert self.text_of.setdefault(record.serial, text) == text, "one record for two texts"
        return record


class Machine:
    def __init__(
        self, word: int, digest_bits: int, pool_class=BlockPool, scheduler_class=Scheduler
    ):
        self.word = word
        self.size = 1 + self.choose(5)
        blocks = -(-LONGEST // self.size) + self.choose(9)
        caching = self.choose(4) < 3
        pool_class = type("Pool", (Watched, pool_class), {})
        self.pool = pool_class(blocks, self.size, caching, digest_bits)
        self.pool.watch(self)
        self.scheduler = scheduler_class(self.pool, 1 + self.choose(6), 6 + self.choose(25))
        self.after = defaultdict(counter(1).__next__)
        self.written = [[None] * self.size for _ in range(blocks)]
        self.alive: list[Played] = []
        self.arrivals = counter()
        self.happened: Counter = Counter()

    def choose(self, n: int) -> int:
        self.word, choice = divmod(self.word, n)
        return choice

    def texts(self, text, tokens: list[int]) -> list:
        """The texts that begin with `text` and grow by one of `tokens` after another. `text` is a
        number, or a salt, with which a text begins."""
        out = []
        for token in tokens:
            text = self.after[text, token]
            out.append(text)
        return out

    def act(self, word: int) -> None:
        self.word = word
        action = self.choose(16)
        if action in (1, 2, 3, 4) and len(self.alive) < MOST_ALIVE:
            self.add()
        elif action == 5 and self.alive:
            completion = self.alive.pop(self.choose(len(self.alive)))
            self.scheduler.finish(completion)
            self.happened["abort"] += 1
        else:
            self.step(fails=action == 6)
        self.check()

    def add(self) -> None:
        """A prompt from one of a few families that begin alike, so that prefixes are shared."""
        family, same, other = self.choose(3), self.choose(LONGEST - 12), self.choose(5)
        prompt = [family >> (i % 2) & 1 for i in range(same)] + [
            self.choose(2) for _ in range(other)
        ] or [1]
        salt = "ab"[self.choose(2)] if self.choose(4) == 3 else None
        arrival = next(self.arrivals)
        params = PLAIN if self.choose(8) < 7 else UNCACHED
        request = Request(
            request_id=str(arrival), params=params, prompt_ids=prompt, arrival=arrival, salt=salt
        )
        goal = min(LONGEST, len(prompt) + 1 + self.choose(12))
        completion = play(request, 0, self.texts(salt, prompt), goal)
        completion.children = max(0, self.choose(5) - 2)
        self.alive.append(completion)
        self.scheduler.add(completion)

    def step(self, fails: bool = False, fresh: bool = True) -> None:
        scheduler, pool = self.scheduler, self.pool
        before, preempted, evicted = (
            list(scheduler.running),
            scheduler.num_preemptions,
            pool.evictions,
        )
        step = scheduler.schedule()
        pairs = [(item.completion, item.count) for item in step]
        if scheduler.num_preemptions > preempted:
            assert not any(s.blocks for s in scheduler.waiting), (
                "taken from who ran, not from who waits"
            )
        self.happened["preemption"] += scheduler.num_preemptions - preempted
        self.happened["eviction"] += pool.evictions - evicted
        self.happened["step"] += 1
        self.in_order_of_arrival(step, before)
        for completion, count in pairs:  # all is written ...
            for i in range(completion.computed, completion.computed + count):
                block = completion.blocks[i // self.size]
                assert pool.references[block] == 1, "written while shared"
                assert block not in pool.content, "written while others may find it"
                self.written[block][i % self.size] = None if fails else completion.texts[i]
        if fails:
            return
        for completion, count in pairs:  # ... before anything is read
            self.reads_its_own_text(completion, completion.computed + count)
        for completion, count in pairs:
            scheduler.computed(completion, count)
            if completion.computed == len(completion.ids):
                self.draw(completion, self.choose(2))

    def draw(self, completion: Played, token: int) -> None:
        for n in range(completion.children):
            texts = completion.texts[: completion.num_prompt]
            child = play(completion.request, n + 1, texts, completion.goal)
            self.alive.append(child)
            self.scheduler.fork(completion, child)
            self.happened["fork"] += 1
        completion.children = 0
        completion.ids.append(token)
        completion.texts += self.texts(completion.texts[-1], [token])
        if len(completion.ids) >= completion.goal:
            self.scheduler.finish(completion)
            self.alive.remove(completion)

    # ---- what must hold --------------------------------------------------------------------------

    def in_order_of_arrival(self, step: list[Scheduled], before: list[Completion]) -> None:
        scheduler, counts = self.scheduler, {id(item.completion): item.count for item in step}
        assert step or not self.alive, "nobody runs"
        assert len(counts) == len(step) and min(counts.values(), default=1) > 0
        spent = sum(counts.values())
        assert (
            spent <= scheduler.max_num_batched_tokens
            and len(scheduler.running) <= scheduler.max_num_seqs
        )
        assert {id(item.completion) for item in step} <= {id(s) for s in scheduler.running}
        less = [s for s in scheduler.running if counts.get(id(s), 0) < len(s.ids) - s.computed]
        if less:  # only the budget keeps a running completion back, and the older are served first
            assert spent == scheduler.max_num_batched_tokens
            assert sum(id(s) in counts for s in less) <= 1
            served = [s.key for s in before if id(s) in counts]
            assert all(s.key >= max(served) for s in less if s in before and served)
        if step:
            assert id(scheduler.running[0]) in counts, "the oldest does not advance"
        admitted = [s.key for s in scheduler.running if s not in before]
        if admitted and scheduler.waiting:
            assert max(admitted) < scheduler.waiting[0].key, "overtaken in the queue"
        gone = [s.key for s in before if s not in scheduler.running]
        stayed = [s.key for s in before if s in scheduler.running]
        assert not gone or not stayed or min(gone) > max(stayed), "not the youngest gave way"

    def reads_its_own_text(self, completion: Played, length: int) -> None:
        size, texts = self.size, completion.texts
        for j, block in enumerate(completion.blocks):
            n = min(size, length - j * size)
            if n > 0:
                assert self.written[block][:n] == texts[j * size : j * size + n], (
                    "another's keys and values"
                )

    def check(self) -> None:
        pool, scheduler, size = self.pool, self.scheduler, self.size
        holders, open_blocks = [0] * pool.num_blocks, []
        for s in self.alive:
            assert s.computed <= len(s.ids) and s.computed <= len(s.blocks) * size
            assert len(set(s.blocks)) == len(s.blocks) <= pool.blocks_for(len(s.ids))
            for block in s.blocks:
                holders[block] += 1
            open_blocks += s.blocks[s.computed // size :]
            self.reads_its_own_text(s, s.computed)
            if pool.enable_prefix_caching:
                texts = s.texts[size - 1 : s.computed : size]
                assert [pool.text_of[r.serial] for r in s.records] == texts
        assert holders == pool.references
        assert all(holders[block] == 1 for block in open_blocks), "shared before it is full"
        assert sorted(pool.unused) == [b for b, n in enumerate(holders) if n == 0]
        # The prefix cache: what can be found is what is written, and the least recently used blocks
        # are the first to be reused.
        assert {c.digest: b for b, c in pool.content.items()} == pool.by_digest
        assert len(pool.by_digest) == len(pool.content)
        for block, record in pool.content.items():
            assert self.written[block][-1] == pool.text_of[record.serial], (
                "served to others, but not what it says"
            )
        order = [pool.given_back[b] if b in pool.content else -1 for b in pool.unused]
        assert order == sorted(order), "not the least recently used first"
        # The queues hold everybody once, in order of arrival.
        queues = scheduler.running + scheduler.waiting
        assert len(queues) == len(self.alive) and {id(s) for s in queues} == {
            id(s) for s in self.alive
        }
        for queue in (scheduler.running, scheduler.waiting):
            assert all(a.key < b.key for a, b in zip(queue, queue[1:]))

    def drain(self) -> None:
        """Nobody new comes: everybody ends, because every step brings the oldest one on."""
        for _ in range(
            2 * LONGEST * 3 * MOST_ALIVE
        ):  # three samples each, and every token may be recomputed once
            if not self.alive:
                break
            self.step()
            self.check()
        assert not self.alive, "starved"
        assert self.pool.num_free == self.pool.num_blocks


def run(words: Sequence[int], digest_bits: int, **classes) -> Counter:
    """One machine from words[0], an action for every other word; what happened, counted."""
    machine = Machine(words[0], digest_bits, **classes)
    for word in words[1:]:
        machine.act(word)
    machine.drain()
    machine.happened["collision"] += machine.pool.collisions
    return machine.happened


def long_run(steps: int, seed: int = 0, actions: int = 200) -> Counter:
    """Machines with random words, half of them with 4-bit digests, until they have made `steps`
    steps."""
    r, happened = random.Random(seed), Counter()
    while happened["step"] < steps:
        happened += run(
            [r.getrandbits(64) for _ in range(actions + 1)], (4, 256)[happened["machine"] % 2]
        )
        happened["machine"] += 1
    return happened


def main() -> None:
    """`python tests/support/scheduler_machine.py [STEPS]`: so many steps, a million by default."""
    began = time.perf_counter()
    happened = long_run(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
    counts = ", ".join(f"{n} {what}s" for what, n in happened.items())
    print(f"{counts} and no rule broken, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
