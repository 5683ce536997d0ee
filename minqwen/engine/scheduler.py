"""Who runs in the next step: first come, first served, decode and prefill mixed, within a budget of tokens.

A sequence is its token ids and how many of them have their keys and values in the cache (`computed`). Prefill, a
chunk of it, decode, and recomputation after preemption are then one thing: compute the next tokens that lack
them. The scheduler is deterministic and knows no tensors, so that every rank runs its own and all agree.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import Any

from minqwen.engine.blocks import BlockPool, CachedBlock


@dataclass(eq=False)
class Sequence:
    """One completion in the making."""

    key: tuple[int, int]  # (arrival of the request, index of the sample): the order of service
    ids: list[int]  # prompt and output
    num_prompt: int
    salt: str | None = None
    use_cache: bool = (
        True  # may read cached prefixes (not if every prompt token's logits are wanted)
    )
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    records: list[CachedBlock] = field(
        default_factory=list
    )  # of the full blocks that others may find
    num_cached: int = 0  # prompt tokens that came from the prefix cache at first admission
    num_preemptions: int = 0
    state: Any = None  # the engine's: parameters, text, logprobs

    @property
    def output_ids(self) -> list[int]:
        return self.ids[self.num_prompt :]


class Scheduler:
    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int):
        self.pool = pool
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: list[Sequence] = []  # both sorted by key
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda s: s.key)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Add `child`, which has `parent`'s prompt, sharing the prompt's full blocks but the last token's."""
        shared = min(child.num_prompt - 1, parent.computed) // self.pool.block_size
        child.blocks = parent.blocks[:shared]
        self.pool.share(child.blocks)
        child.computed = child.num_cached = shared * self.pool.block_size
        child.records = parent.records[:shared]
        self.add(child)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """The next step: (sequence, how many new tokens), with the blocks they need claimed. Decodes come first."""
        step: list[tuple[Sequence, int]] = []
        budget = self.max_num_batched_tokens
        i = 0
        while i < len(self.running) and budget > 0:
            sequence = self.running[i]
            count = min(len(sequence.ids) - sequence.computed, budget)
            if not self._claim(sequence, count):
                self._make_room(self.running[-1])  # the youngest gives way; perhaps it is this one
                continue
            step.append((sequence, count))
            budget -= count
            i += 1
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            if not self._admit(self.waiting[0]):
                if self.running or not self._make_room():
                    break
                continue
            sequence = self.waiting.pop(0)
            insort(self.running, sequence, key=lambda s: s.key)
            count = min(len(sequence.ids) - sequence.computed, budget)
            claimed = self._claim(sequence, count)
            assert claimed, "admission has seen to it that the blocks are there"
            step.append((sequence, count))
            budget -= count
        step.sort(key=lambda item: (item[1] != 1, item[0].key))
        return step

    def computed(self, sequence: Sequence, count: int) -> None:
        """The keys and values of `count` more tokens are in the cache and sound."""
        sequence.computed += count
        size, records = self.pool.block_size, sequence.records
        while self.pool.enable_prefix_caching and (len(records) + 1) * size <= sequence.computed:
            i = len(records)
            tokens = sequence.ids[i * size : (i + 1) * size]
            parent = records[-1] if records else None
            records.append(self.pool.register(sequence.blocks[i], parent, tokens, sequence.salt))

    def finish(self, sequence: Sequence) -> None:
        """The sequence is done or aborted: its blocks are free for others."""
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Claim what is cached, if what is missing is free too."""
        matched: list[int] = []
        if not sequence.blocks and sequence.use_cache:
            matched = self.pool.match(sequence.ids, sequence.salt)
        held = len(sequence.blocks) + len(matched)
        revived = sum(block in self.pool.unused for block in matched)
        if self.pool.blocks_for(len(sequence.ids)) - held > self.pool.num_free - revived:
            return False
        if matched:
            self.pool.share(matched)
            sequence.blocks = matched
            sequence.computed = len(matched) * self.pool.block_size
            sequence.records = [self.pool.content[block] for block in matched]
            if sequence.num_preemptions == 0:
                sequence.num_cached = sequence.computed
        return True

    def _claim(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` more tokens, or False."""
        need = self.pool.blocks_for(sequence.computed + count) - len(sequence.blocks)
        blocks = self.pool.allocate(need) if need > 0 else []
        if blocks is None:
            return False
        sequence.blocks += blocks
        return True

    def _make_room(self, running: Sequence | None = None) -> bool:
        """Take blocks from the youngest forked sequence that waits with some, or else from `running`.
        Without `running`, the room is for the first that waits."""
        holders = [s for s in (self.waiting if running else self.waiting[1:]) if s.blocks]
        victim = holders[-1] if holders else running
        if victim is None:
            return False
        self.pool.release(victim.blocks)
        victim.blocks, victim.records, victim.computed = [], [], 0
        if victim is running:
            victim.num_preemptions += 1
            self.num_preemptions += 1
            self.running.remove(victim)
            self.add(victim)
        return True
