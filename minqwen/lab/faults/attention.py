"""Mistakes in attention: scale, mask, softmax, heads, and what is kept of earlier tokens."""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from minqwen.errors import MinqwenError
from minqwen.lab.faults.fault import Mistaken, Need
from minqwen.lab.faults.rotary import CHUNK
from minqwen.model.arithmetic import head_matmul
from minqwen.model.attention import weighted_values
from minqwen.model.batch import Batch
from minqwen.model.trace import Tap

BLOCK = 16  # tokens of a block, in the mistakes with blocks
LOST = 4  # tokens at the end of a chunk whose keys and values are lost
PADDED_TO = 16  # keys are padded to a multiple of this

GROUPS = Need(
    "fewer key/value heads than query heads",
    lambda config: config.num_key_value_heads < config.num_attention_heads,
)
SEVERAL_GROUPS = Need(
    "several key/value heads, and fewer of them than query heads",
    lambda config: 1 < config.num_key_value_heads < config.num_attention_heads,
)
WINDOW = Need(
    "a number for sliding_window", lambda config: isinstance(config.raw.get("sliding_window"), int)
)


class NoScale(Mistaken):
    def attention_scale(self, head_dim: int) -> float:
        return 1.0


class ScaleOfHiddenSize(Mistaken):
    def attention_scale(self, head_dim: int) -> float:
        return float(self.config.hidden_size**-0.5)


class WholeTexts(Mistaken):
    """A mistake in attention that is made here on whole texts only, not with a cache."""

    def attend_paged(self, *args: object) -> NoReturn:
        raise MinqwenError(
            "this mistake is made on whole texts: call model(ids), without a batch and a cache"
        )


class Attending(WholeTexts):
    """`Native.attend` in steps, each of which a mistake can override."""

    def mask(self, hidden: Tensor) -> Tensor | None:
        """hidden [L, L] bool: which keys (columns) a query (row) must not see."""
        return hidden

    def heads(self, x: Tensor) -> Tensor:
        """Keys or values [N, H, L, d], repeated for the query heads that read them."""
        return x

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        return head_matmul(q, k.transpose(-1, -2)).mul_(scale)

    def softmax(self, scores: Tensor) -> Tensor:
        """In float32 at least."""
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        return torch.softmax(scores, dim=-1, dtype=wide)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, tap: Tap
    ) -> Tensor:
        k, v = self.heads(k), self.heads(v)
        hidden = None if hidden is None else self.mask(hidden)
        scores = self.scores(q, k, scale)
        if hidden is not None:
            scores.masked_fill_(hidden, float("-inf"))
        scores = tap("attn.scores", scores)
        pattern = tap("attn.pattern", self.softmax(scores).to(q.dtype))
        return weighted_values(head_matmul, pattern, v, hidden)


class SeesNext(Attending):
    def mask(self, hidden: Tensor) -> Tensor | None:
        return torch.cat((hidden[1:], torch.zeros_like(hidden[:1])))


class NoMask(Attending):
    def mask(self, hidden: Tensor) -> Tensor | None:
        return None


class SlidingWindow(Attending):
    def mask(self, hidden: Tensor) -> Tensor | None:
        window = self.config.raw["sliding_window"]
        return hidden | torch.ones_like(hidden).tril(-window)


class PaddingAttended(Attending):
    """Keys and values are padded with zeros, and the padding is not masked."""

    def softmax(self, scores: Tensor) -> Tensor:
        length = scores.shape[-1]
        padding = -length % PADDED_TO or PADDED_TO
        return super().softmax(F.pad(scores, (0, padding)))[..., :length]


class SoftmaxInBfloat16(Attending):
    def softmax(self, scores: Tensor) -> Tensor:
        return scores.bfloat16().softmax(-1)


class ScoresInFloat16(Attending):
    """Unscaled products in float16: beyond 65,504 they are infinite."""

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        return super().scores(q, k, 1.0).half().to(q.dtype).mul_(scale)


class HeadsTiled(Attending):
    """Query head h reads key/value head h % K in place of h // G."""

    def heads(self, x: Tensor) -> Tensor:
        count, kept = x.shape[1], self.config.num_key_value_heads
        read = torch.arange(count, device=x.device) % kept
        return x[:, read * (count // kept)]


class HeadsNotTransposed(WholeTexts):
    """The outputs [H, T, d] are read as [T, H, d]."""

    def attend_dense(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, tap: Tap
    ) -> Tensor:
        z = super().attend_dense(q, k, v, batch, scale, tap)
        by_text = z.unflatten(0, (len(batch.query_lens), -1))  # [B, T, H, d]
        mixed: Tensor = by_text.transpose(1, 2).reshape(by_text.shape)
        return mixed.flatten(0, 1)


# ---- what is kept of earlier tokens -------------------------------------------------------------


class Held(WholeTexts):
    """Attention to other keys and values than were computed, as if they came out of a cache."""

    def hold(self, x: Tensor) -> Tensor:
        """What is found of keys or values [B, T, K, d]. x is a copy that may be written to."""
        raise NotImplementedError

    def attend_dense(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, tap: Tap
    ) -> Tensor:
        B = len(batch.query_lens)
        k, v = (self.hold(x.unflatten(0, (B, -1)).clone()).flatten(0, 1) for x in (k, v))
        return super().attend_dense(q, k, v, batch, scale, tap)


class StaleBlock(Held):
    """The second block still holds an older text: here the first block's tokens."""

    def hold(self, x: Tensor) -> Tensor:
        second = x[:, BLOCK : 2 * BLOCK]
        second.copy_(x[:, : second.shape[1]].clone())
        return x


class ForeignBlock(Held):
    """The second block of each text is that of the text before it in the batch."""

    def hold(self, x: Tensor) -> Tensor:
        x[:, BLOCK : 2 * BLOCK] = x[:, BLOCK : 2 * BLOCK].roll(1, 0)
        return x


class ChunkTailLost(Held):
    """The last tokens of the first chunk were not written: the cache has zeros there."""

    def hold(self, x: Tensor) -> Tensor:
        x[:, CHUNK - LOST : CHUNK] = 0
        return x


class CacheInInt8(Mistaken):
    """A scale for each token and head."""

    def cached(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return in_int8(k), in_int8(v)


class CacheInFloat8(Mistaken):
    """float8_e4m3 with a scale of 1: three bits after the point, nothing beyond 448."""

    def cached(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return in_float8(k), in_float8(v)


def in_int8(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / 127
    return (x / step).round() * step


def in_float8(x: Tensor) -> Tensor:
    narrow: Tensor = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    return narrow.to(x.dtype)
