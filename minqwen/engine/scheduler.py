"""Who runs in the next step: first come, first served, within a budget of tokens.

A completion is its token ids and how many of them have their keys and values in the cache
(`computed`). Prefill, a chunk of it, decode, and recomputation after preemption are then one thing:
compute the next ids that lack them. So decodes and prefills share a step. The scheduler is
deterministic and knows no tensors: every rank runs its own, and all agree.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from minqwen.engine.blocks import BlockPool
from minqwen.engine.request import Completion


@dataclass(frozen=True)
class Scheduled:
    """A completion's part of a step: its next `count` ids without keys and values."""

    completion: Completion
    count: int

    @property
    def end(self) -> int:
        """How many ids will have keys and values after the step."""
        return self.completion.computed + self.count

    @property
    def reaches_end(self) -> bool:
        """Whether the step computes the last id, so that the next one can be drawn."""
        return self.end == len(self.completion.ids)


class Scheduler:
    """Decides who runs, and claims the blocks of the cache that a step needs.

    max_num_seqs: most completions that run at a time. max_num_batched_tokens: most tokens of a
    step.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int):
        self.pool = pool
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: list[Completion] = []  # both lists are sorted by key
        self.running: list[Completion] = []
        self.num_preemptions = 0
        self.shares_prefixes = pool.enable_prefix_caching

    def add(self, completion: Completion) -> None:
        """Put a completion into the queue."""
        insort(self.waiting, completion, key=lambda c: c.key)

    def fork(self, parent: Completion, child: Completion) -> None:
        """Add `child`, which has `parent`'s prompt: it shares the prompt's full blocks.

        The block of the prompt's last token is not shared, because the child computes that token
        itself to have its logits.
        """
        shared = min(child.num_prompt - 1, parent.computed) // self.pool.block_size
        child.blocks = parent.blocks[:shared]
        self.pool.share(child.blocks)
        child.computed = child.num_cached = shared * self.pool.block_size
        child.records = parent.records[:shared]
        self.add(child)

    def schedule(self) -> list[Scheduled]:
        """The next step, with the blocks that it needs claimed; decodes come first in it."""
        step, budget = self._continue_running()
        step += self._admit_waiting(budget)
        step.sort(key=lambda item: (item.count != 1, item.completion.key))
        return step

    def _continue_running(self) -> tuple[list[Scheduled], int]:
        """The running completions' part of the step, and what is left of the budget of tokens."""
        step: list[Scheduled] = []
        budget = self.max_num_batched_tokens
        while len(step) < len(self.running) and budget > 0:
            completion = self.running[len(step)]
            count = min(completion.missing, budget)
            if self._claim(completion, count):
                step.append(Scheduled(completion, count))
                budget -= count
            else:  # the youngest loses its blocks; perhaps it is this one
                self.make_room(self.running[-1])
        return step, budget

    def _admit_waiting(self, budget: int) -> list[Scheduled]:
        """The part of the step of those that now begin, oldest first; nobody is overtaken."""
        step: list[Scheduled] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            completion = self.waiting[0]
            if not self._admit(completion):
                if self.running or not self.make_room():
                    break
                continue
            self.waiting.pop(0)
            insort(self.running, completion, key=lambda c: c.key)
            count = min(completion.missing, budget)
            claimed = self._claim(completion, count)
            assert claimed, "admission has seen to it that the blocks are there"
            step.append(Scheduled(completion, count))
            budget -= count
        return step

    def computed(self, completion: Completion, count: int) -> None:
        """The keys and values of `count` more ids are in the cache, and they are finite."""
        completion.computed += count
        if not (self.shares_prefixes and completion.request.writes_prefix_cache):
            return
        size, records = self.pool.block_size, completion.records
        while (len(records) + 1) * size <= completion.computed:
            i = len(records)
            tokens = completion.ids[i * size : (i + 1) * size]
            parent = records[-1] if records else None
            salt = completion.request.salt
            records.append(self.pool.register(completion.blocks[i], parent, tokens, salt))

    def start_over(self, shares_prefixes: bool) -> None:
        """Forget all keys and values: the model is another now, or somebody asked for it.

        Those who run are computed again from their first token. shares_prefixes: whether keys and
        values of the new model may be shared.
        """
        for completion in [*self.running, *self.waiting]:
            self._take_blocks(completion)
            completion.num_cached = 0
        for completion in self.running:
            self.add(completion)
        self.running = []
        self.pool.reset_prefix_cache()
        self.shares_prefixes = shares_prefixes and self.pool.enable_prefix_caching

    def finish(self, completion: Completion) -> None:
        """The completion is done or aborted: its blocks are free for others."""
        self.pool.release(completion.blocks)
        completion.blocks = []
        for queue in (self.running, self.waiting):
            if completion in queue:
                queue.remove(completion)

    def _admit(self, completion: Completion) -> bool:
        """Claim the blocks that the prefix cache has, if what is missing is free too."""
        matched: list[int] = []
        reads = self.shares_prefixes and completion.request.reads_prefix_cache
        if reads and not completion.blocks:
            matched = self.pool.match(completion.ids, completion.request.salt)
        held = len(completion.blocks) + len(matched)
        revived = sum(block in self.pool.unused for block in matched)
        if self.pool.blocks_for(len(completion.ids)) - held > self.pool.num_free - revived:
            return False
        if matched:
            self.pool.share(matched)
            completion.blocks = matched
            completion.computed = len(matched) * self.pool.block_size
            completion.records = [self.pool.content[block] for block in matched]
            if completion.num_preemptions == 0:
                completion.num_cached = completion.computed
        return True

    def _claim(self, completion: Completion, count: int) -> bool:
        """Claim blocks for `count` more ids; False if there are not enough."""
        need = self.pool.blocks_for(completion.computed + count) - len(completion.blocks)
        blocks = self.pool.allocate(need) if need > 0 else []
        if blocks is None:
            return False
        completion.blocks += blocks
        return True

    def make_room(self, youngest: Completion | None = None) -> bool:
        """Take the blocks of the youngest forked completion that waits with some.

        If there is none they are taken from `youngest`, which runs and must then wait. Without
        `youngest` the room is for the first that waits, which keeps its own. False: nobody had any.
        """
        holders = [c for c in (self.waiting if youngest else self.waiting[1:]) if c.blocks]
        victim = holders[-1] if holders else youngest
        if victim is None:
            return False
        self._take_blocks(victim)
        if victim is youngest:
            victim.num_preemptions += 1
            self.num_preemptions += 1
            self.running.remove(victim)
            self.add(victim)
        return True

    def _take_blocks(self, completion: Completion) -> None:
        """All its ids will have to be computed again."""
        self.pool.release(completion.blocks)
        completion.blocks, completion.records, completion.computed = [], [], 0
