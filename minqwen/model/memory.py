"""What a step of the forward pass holds besides weights and cache, counted from the code that holds it.

Read beside `qwen2.py` and `attention.py`: every term is a tensor there, alive at the same time as the others of its
sum. The engine sizes its cache with this; the planner plans with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from minqwen.config import BYTES_PER_ELEMENT, ModelConfig
from minqwen.model.attention import tile_rows
from minqwen.model.batch import runs
from minqwen.parallel import kv_heads_per_rank, vocab_rows_per_rank


def block_bytes(config: ModelConfig, size: int, block_size: int, dtype: str) -> int:
    """Bytes of one block of the KV cache on one of `size` ranks: the keys and values of `block_size`
    tokens in all layers. dtype: a name of BYTES_PER_ELEMENT."""
    numbers_per_token = (
        2 * config.num_hidden_layers * kv_heads_per_rank(config, size) * config.head_dim
    )
    return block_size * numbers_per_token * BYTES_PER_ELEMENT[dtype]


def step_phases(
    config: ModelConfig,
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    *,
    dtype: str,
    size: int = 1,
    block_size: int = 16,
    logit_rows: int | None = None,
    device: str = "cuda",
) -> dict[str, int]:
    """Bytes held at the height of each phase of one step, on one of `size` ranks: {phase: bytes}.

    query_lens, context_lens: of the step's sequences, as in `Batch`, the engine's order (decodes first). dtype: a
    name, of activations and logits. logit_rows: tokens whose logits are wanted (default one of each sequence).
    Weights and the pool of pages are not included, the rotary table is. Native arithmetic.
    """
    i = BYTES_PER_ELEMENT[dtype]
    w = max(i, 4)  # norms, softmax and sampling are in float32 at least
    d, D, B, T = config.head_dim, config.hidden_size, len(query_lens), sum(query_lens)
    H, K = config.num_attention_heads // size, kv_heads_per_rank(config, size)
    V, rows_of_V = config.vocab_size, vocab_rows_per_rank(config, size)
    N = B if logit_rows is None else logit_rows
    x, q, kv, mlp = (T * n * i for n in (D, H * d, K * d, config.intermediate_size // size))

    length = 1 << (max(context_lens) - 1).bit_length()  # of the rotary table
    table = length * d  # elements of cos, and of sin
    packed = (
        8 * (4 * T + B * -(-max(context_lens) // block_size)) + 2 * T * d * i
    )  # ids, positions, ...; cos, sin
    widened = w if i < w else 0  # norms and softmax take a float32 copy of what is narrower
    sums = (
        w if device == "cpu" and i < w else 0
    )  # a CPU without 16-bit instructions multiplies into float32 first

    at_height, buffer, done = (
        [],
        0,
        0,
    )  # attention's bytes; of the gathered pages; of the z's so far
    for first, count in runs(query_lens, context_lens):
        R, L = query_lens[first], max(context_lens[first : first + count])
        gathered = 2 * count * -(-L // block_size) * block_size * K * d * i  # keys and values
        buffer = max(buffer, gathered)
        rows = min(R, tile_rows(torch.device(device), H * L))
        scores, done = count * H * rows * L, done + count * R * H * d * i
        tile = rows * H * d * i + rows * rows * H // K if R > 1 else 0  # queries by heads; the mask
        z = count * rows * H * d * i
        at_height.append(done + tile + scores * (i + w + widened))  # scores; softmax in float32
        if sums and K > 1:  # pattern, values and z in float32, beside scores and pattern
            at_height.append(
                done - z + tile + scores * (2 * i + w) + count * L * K * d * w + z // i * w
            )
    at_height.append(2 * done)  # z's put together
    summed = T * D * (w if size > 1 else sums)  # in float32: what o and down give, over ranks
    spread = (
        N * (rows_of_V + 2 * V) * i if size > 1 else 0
    )  # logits padded, of all ranks, and put together
    fixed = 2 * table * i + packed + buffer  # the buffer is the cache's, and stays
    phases = {
        "norm": 2 * x + T * D * (w + widened),
        "queries and keys": 2 * x + 4 * q + 2 * kv,  # the rotation's three intermediates
        "attention": 2 * x + q + 2 * kv + max(at_height),
        "attention's output": 3 * x + 2 * q + 2 * kv + summed,
        "MLP": 3 * x
        + max(
            2 * mlp + mlp // i * sums, 3 * mlp + x + summed
        ),  # gate and up; gate, up, act and down
        "logits": N * D * i + N * rows_of_V * i + max(spread, N * rows_of_V * sums),
        "sampling": N * V * i
        + B * V * (2 * i + w)
        + min(B, 32 if device == "cuda" else 1) * V * (w + 8),
    }
    phases = {name: fixed + held for name, held in phases.items()}
    computing = (
        (4 * w if i == w else 3 * w + i) if device == "cpu" else 2 * i
    )  # angles, cos, sin; done on the CPU
    pages = min(
        buffer, buffer * length // (2 * max(context_lens))
    )  # the table is made when half of it is outgrown
    phases["rotary table"] = pages + table * (i + computing)  # beside the one before
    return phases


def step_bytes(
    config: ModelConfig, query_lens: tuple[int, ...], context_lens: tuple[int, ...], **options
) -> int:
    """The most that one step holds at any time: the largest of `step_phases`, in bytes."""
    return max(step_phases(config, query_lens, context_lens, **options).values())


def worst_steps(
    context: int, batch: int, tokens: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(query_lens, context_lens) of the steps that hold most while `batch` sequences reach `context` tokens each: all
    decode, not quite in step; or as many as it takes to fill the step bring prompts, or what fits of the last one,
    while the others decode. tokens: max_num_batched_tokens, at least `batch`.
    """
    contexts = (max(1, context - 1),) * (batch > 1) + (context,) * max(1, batch - 1)
    prompts = min(batch, max(1, -(-(tokens - batch) // max(1, context - 1))))
    others = batch - prompts
    last = min(context, tokens - others - (prompts - 1) * context)
    return [
        ((1,) * batch, contexts),
        ((1,) * others + (context,) * (prompts - 1) + (last,), contexts),
    ]


def pages_that_fit(
    config: ModelConfig,
    room: int,
    page_bytes: int,
    *,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    **options,
) -> int:
    """The most pages, of `page_bytes` each, that together with the fullest step take at most `room` bytes; 0: not one.

    What a step gathers grows with the pool. The fullest are those of as many sequences of `max_model_len` as the
    pages hold, and those of `max_num_seqs` that share them. options: of `step_bytes`, block_size among them.
    """

    def taken(pages: int) -> int:
        tokens = max(1, pages * options["block_size"])
        few = min(max_model_len, tokens), max(1, min(max_num_seqs, tokens // max_model_len))
        many = max(1, min(max_model_len, tokens // max_num_seqs)), max_num_seqs
        steps = [
            s
            for context, batch in (few, many)
            for s in worst_steps(context, batch, max_num_batched_tokens)
        ]
        return pages * page_bytes + max(step_bytes(config, *step, **options) for step in steps)

    return largest(lambda pages: taken(pages) <= room, room // page_bytes)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n from 1 to `most` for which fits(n), if all smaller ones do too; 0 if 1 does not."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
