"""Which block of the KV cache belongs to whom: allocation, sharing and prefix caching; no tensors.

Full blocks may be shared, because what is written in them never changes; the last, partly filled
block of a completion is its own. Blocks that nobody uses stay readable until they are needed again,
the least recently used first: that is the prefix cache.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class CachedBlock:
    """What a registered block holds: its own tokens, after the text that ends in block `parent`."""

    digest: bytes
    serial: int  # names this content as long as the pool lives; a block used again gets a new one
    parent: int  # serial of the block before, or -1
    tokens: tuple[int, ...]
    salt: str | None


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, with reference counts and a prefix cache.

    Digests are SHA-256 over (digest of the block before, or the salt; tokens). A match is served
    only if the stored tokens and parent are the same too, so that even two texts with the same
    digest cannot give one request another's keys and values. (`digest_bits` lets the tests make
    such texts.)
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        digest_bits: int = 256,
    ):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.digest_bits = digest_bits
        self.references = [0] * num_blocks
        # Blocks without a reference, in the order in which they will be used again.
        self.unused: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.content: dict[int, CachedBlock] = {}  # block -> what it holds, if registered
        self.by_digest: dict[bytes, int] = {}  # digest -> the block that holds it
        self.serial = 0
        self.evictions = self.collisions = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be had now, cached ones included."""
        return len(self.unused)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def digest(
        self, parent: CachedBlock | None, tokens: tuple[int, ...], salt: str | None
    ) -> bytes:
        sha = hashlib.sha256(parent.digest if parent else repr(salt).encode())
        sha.update(array("q", tokens).tobytes())
        if self.digest_bits == 256:
            return sha.digest()
        shortened = int.from_bytes(sha.digest(), "big") >> (256 - self.digest_bits)
        return shortened.to_bytes(32, "big")

    def match(self, ids: list[int], salt: str | None = None) -> list[int]:
        """The longest cached prefix of `ids`, as blocks. They are not claimed.

        Only full blocks, and never all of `ids`: the last token must be computed to have its
        logits.
        """
        blocks: list[int] = []
        if not self.enable_prefix_caching:
            return blocks
        parent, size = None, self.block_size
        for start in range(0, len(ids) - size, size):
            tokens = tuple(ids[start : start + size])
            block = self.by_digest.get(self.digest(parent, tokens, salt))
            if block is None:
                break
            found = self.content[block]
            if not self.holds(found, parent, tokens, salt):
                self.collisions += 1
                break
            blocks.append(block)
            parent = found
        return blocks

    def holds(
        self,
        found: CachedBlock,
        parent: CachedBlock | None,
        tokens: tuple[int, ...],
        salt: str | None,
    ) -> bool:
        """Whether a block whose digest is right holds the right text."""
        serial = parent.serial if parent else -1
        return (found.parent, found.tokens, found.salt) == (serial, tokens, salt)

    def share(self, blocks: list[int]) -> None:
        """Claim blocks that hold what the caller needs."""
        for block in blocks:
            self.unused.pop(block, None)
            self.references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Claim `count` blocks to write in; None, and nothing is changed, if fewer are free."""
        if count > len(self.unused):
            return None
        blocks = [self.unused.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.references[block] = 1
            self.forget(block)
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Give blocks back.

        The last block of a text will be used again before the others: the beginning of a text is
        worth more to other requests.
        """
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                self.unused[block] = None
                if block not in self.content:  # nothing worth keeping: it is used again first
                    self.unused.move_to_end(block, last=False)

    def register(
        self, block: int, parent: CachedBlock | None, tokens: list[int], salt: str | None = None
    ) -> CachedBlock:
        """Let others find a full block: it holds the keys and values of `tokens` after `parent`.

        Returns the record that the next block of the text names as its parent: that of an older
        block, if one holds the same text. If a different text has the same digest, that one can no
        longer be found.
        """
        text = tuple(tokens)
        digest = self.digest(parent, text, salt)
        if digest in self.by_digest:
            other = self.by_digest[digest]
            if self.holds(self.content[other], parent, text, salt):
                return self.content[other]
            self.forget(other)
            if other in self.unused:
                self.unused.move_to_end(other, last=False)
        self.serial += 1
        before = parent.serial if parent else -1
        self.content[block] = CachedBlock(digest, self.serial, before, text, salt)
        self.by_digest[digest] = block
        return self.content[block]

    def reset_prefix_cache(self) -> None:
        """Forget all cached text.

        Not while blocks are in use: their owners would go on to register old text.
        """
        assert len(self.unused) == self.num_blocks
        self.content.clear()
        self.by_digest.clear()

    def forget(self, block: int) -> None:
        """The block will be written anew: what it held can no longer be found."""
        if block in self.content:
            del self.by_digest[self.content.pop(block).digest]
            self.evictions += 1
