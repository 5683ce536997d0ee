"""Allocator and scheduler without a model. Requests come, fork, fail and are aborted on a small
pool; after every action everything that must hold is checked.

A text is named by a number: `Machine.after[text, token]` is the text that is one token longer. The
machine keeps in `written` the text that a forward pass would have left in every slot of the cache.
It knows nothing of digests. All choices come from one 64-bit word per action; a word of 0 is a
plain step.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence as Several
from itertools import count as counter

from minqwen.engine.blocks import BlockPool, CachedBlock
from minqwen.engine.scheduler import Scheduler, Sequence

LONGEST, MOST_ALIVE = 24, 12


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
        self.alive: list[Sequence] = []
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
            sequence = self.alive.pop(self.choose(len(self.alive)))
            self.scheduler.finish(sequence)
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
        sequence = Sequence(
            (next(self.arrivals), 0), prompt, len(prompt), salt, use_cache=self.choose(8) < 7
        )
        goal = min(LONGEST, len(prompt) + 1 + self.choose(12))
        sequence.state = {
            "texts": self.texts(salt, prompt),
            "goal": goal,
            "children": max(0, self.choose(5) - 2),
        }
        self.alive.append(sequence)
        self.scheduler.add(sequence)

    def step(self, fails: bool = False, fresh: bool = True) -> None:
        scheduler, pool = self.scheduler, self.pool
        before, preempted, evicted = (
            list(scheduler.running),
            scheduler.num_preemptions,
            pool.evictions,
        )
        plan = scheduler.schedule()
        if scheduler.num_preemptions > preempted:
            assert not any(s.blocks for s in scheduler.waiting), (
                "taken from who ran, not from who waits"
            )
        self.happened["preemption"] += scheduler.num_preemptions - preempted
        self.happened["eviction"] += pool.evictions - evicted
        self.happened["step"] += 1
        self.in_order_of_arrival(plan, before)
        for sequence, count in plan:  # all is written ...
            for i in range(sequence.computed, sequence.computed + count):
                block = sequence.blocks[i // self.size]
                assert pool.references[block] == 1, "written while shared"
                assert block not in pool.content, "written while others may find it"
                self.written[block][i % self.size] = None if fails else sequence.state["texts"][i]
        if fails:
            return
        for sequence, count in plan:  # ... before anything is read
            self.reads_its_own_text(sequence, sequence.computed + count)
        for sequence, count in plan:
            scheduler.computed(sequence, count)
            if sequence.computed == len(sequence.ids):
                self.draw(sequence, self.choose(2))

    def draw(self, sequence: Sequence, token: int) -> None:
        state = sequence.state
        for n in range(state["children"]):
            prompt = sequence.ids[: sequence.num_prompt]
            child = Sequence(
                (sequence.key[0], n + 1), prompt, len(prompt), sequence.salt, sequence.use_cache
            )
            child.state = {
                "texts": state["texts"][: len(prompt)],
                "goal": state["goal"],
                "children": 0,
            }
            self.alive.append(child)
            self.scheduler.fork(sequence, child)
            self.happened["fork"] += 1
        state["children"] = 0
        sequence.ids.append(token)
        state["texts"] += self.texts(state["texts"][-1], [token])
        if len(sequence.ids) >= state["goal"]:
            self.scheduler.finish(sequence)
            self.alive.remove(sequence)

    # ---- what must hold --------------------------------------------------------------------------

    def in_order_of_arrival(self, plan: list[tuple[Sequence, int]], before: list[Sequence]) -> None:
        scheduler, counts = self.scheduler, {id(s): count for s, count in plan}
        assert plan or not self.alive, "nobody runs"
        assert len(counts) == len(plan) and min(counts.values(), default=1) > 0
        spent = sum(counts.values())
        assert (
            spent <= scheduler.max_num_batched_tokens
            and len(scheduler.running) <= scheduler.max_num_seqs
        )
        assert {id(s) for s, _ in plan} <= {id(s) for s in scheduler.running}
        less = [s for s in scheduler.running if counts.get(id(s), 0) < len(s.ids) - s.computed]
        if less:  # only the budget keeps a running sequence back, and the older are served first
            assert spent == scheduler.max_num_batched_tokens
            assert sum(id(s) in counts for s in less) <= 1
            served = [s.key for s in before if id(s) in counts]
            assert all(s.key >= max(served) for s in less if s in before and served)
        if plan:
            assert id(scheduler.running[0]) in counts, "the oldest does not advance"
        admitted = [s.key for s in scheduler.running if s not in before]
        if admitted and scheduler.waiting:
            assert max(admitted) < scheduler.waiting[0].key, "overtaken in the queue"
        gone = [s.key for s in before if s not in scheduler.running]
        stayed = [s.key for s in before if s in scheduler.running]
        assert not gone or not stayed or min(gone) > max(stayed), "not the youngest gave way"

    def reads_its_own_text(self, sequence: Sequence, length: int) -> None:
        size, texts = self.size, sequence.state["texts"]
        for j, block in enumerate(sequence.blocks):
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
                texts = s.state["texts"][size - 1 : s.computed : size]
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


def run(words: Several[int], digest_bits: int, **classes) -> Counter:
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
