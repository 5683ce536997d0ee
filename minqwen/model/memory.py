"""What a step of the forward pass holds besides the weights and the KV cache, in bytes.

Read it beside `qwen2.py` and `attention.py`. Every term is a tensor of that code, and the terms of
a sum are the tensors that are alive at the same time. The engine sizes its cache with this, and the
planner estimates with it.

Not counted is the scratch memory of oneDNN's 16-bit products, because it depends on the library's
choice of tiles and on the size of the CPU's caches. It does not grow with the step: at most 200 KB
for each thread, measured for products of 1 x 896 x 4864 to 2048 x 3584 x 18944.
Nor is the mask that fast arithmetic's attention has on a CPU: 6 bytes for 2^18 pairs and each head
of a group, 11 MB for the 7B.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minqwen.config import BYTES_PER_ELEMENT, ModelConfig
from minqwen.model.attention import tile_rows
from minqwen.model.batch import spans
from minqwen.model.kv_cache import SCALE_BYTES
from minqwen.model.rope import table_length
from minqwen.parallel import kv_heads_per_rank, vocab_rows_per_rank

Lengths = tuple[int, ...]  # tokens of each sequence
ID_BYTES = 8  # token ids, and all numbers in a Batch, are int64


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has, in use or free."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def block_bytes(
    config: ModelConfig, size: int, block_size: int, dtype: str, kv_dtype: str = "auto"
) -> int:
    """Bytes of one block of the KV cache on one of `size` ranks.

    They are the keys and values of `block_size` tokens in all layers. dtype: the model's, a name.
    kv_dtype: as in `Qwen2.new_cache`.
    """
    layers, kv_heads = config.num_hidden_layers, kv_heads_per_rank(config, size)
    of_head = config.head_dim * BYTES_PER_ELEMENT[dtype]
    if kv_dtype == "int8":
        of_head = config.head_dim + SCALE_BYTES
    return block_size * 2 * layers * kv_heads * of_head


def cpu_copies_products(dtype: str) -> bool:
    """Whether this machine's CPU computes a product in `dtype` in a float32 copy of the result.

    oneDNN does that for bfloat16 on a CPU that has AVX-512 but not AVX512_BF16 (its kernel is then
    "gemm:jit:bf16"). With AVX512_BF16 its kernel needs no copy ("brg_matmul:avx512_core_bf16").
    Without AVX-512, and for float16 without instructions for it, PyTorch uses its own kernels,
    which round every result at once. Measured with torch 2.13; ONEDNN_MAX_CPU_ISA and
    ONEDNN_VERBOSE=1 show each case, but this function does not look at these variables.
    """
    return (
        dtype == "bfloat16"
        and torch.backends.mkldnn.is_available()
        and torch.cpu._is_avx512_supported()
        and not torch.cpu._is_avx512_bf16_supported()
    )


@dataclass(frozen=True)
class _Step:
    """One step on one of `size` ranks. Methods give bytes; letters are those of qwen2.py."""

    config: ModelConfig
    query_lens: Lengths
    context_lens: Lengths
    item: int  # bytes of a number in the model's dtype
    size: int
    block_size: int
    N: int  # tokens whose logits are wanted
    device: torch.device
    int8_cache: bool
    product_copy: int  # bytes of each number of a product that is held a second time; 0: none

    # ---- sizes

    @property
    def T(self) -> int:
        return sum(self.query_lens)

    @property
    def B(self) -> int:
        return len(self.query_lens)

    @property
    def H(self) -> int:
        return self.config.num_attention_heads // self.size

    @property
    def K(self) -> int:
        return kv_heads_per_rank(self.config, self.size)

    @property
    def wide(self) -> int:
        """Bytes of a number in norms, softmax and sampling: they use float32 at least."""
        return max(self.item, 4)

    @property
    def wide_copy(self) -> int:
        """Bytes of a number that is copied to float32 first, because its dtype is narrower."""
        return self.wide if self.item < self.wide else 0

    @property
    def x(self) -> int:
        return self.T * self.config.hidden_size * self.item

    @property
    def q(self) -> int:
        return self.T * self.H * self.config.head_dim * self.item

    @property
    def k(self) -> int:
        """Of the keys; the values take as much."""
        return self.T * self.K * self.config.head_dim * self.item

    @property
    def gate(self) -> int:
        """Of the MLP's gate; `up` and `act` take as much each."""
        return self.T * (self.config.intermediate_size // self.size) * self.item

    @property
    def rotary_rows(self) -> int:
        """Positions in the rotary table."""
        return table_length(max(self.context_lens))

    # ---- what is held all the time

    def rotary_tables(self) -> int:
        """cos and sin of all positions."""
        return 2 * self.rotary_rows * self.config.head_dim * self.item

    def batch(self) -> int:
        """ids, and the tensors of `Batch`; cos and sin of the step's tokens."""
        of_tokens = 4 * self.T  # ids, positions, slots; logits_at, at most so many
        of_sequences = 2 * self.B + 1  # query_starts and context_lengths
        block_tables = self.B * -(-max(self.context_lens) // self.block_size)
        cos_and_sin = 2 * self.T * self.config.head_dim * self.item
        return ID_BYTES * (of_tokens + of_sequences + block_tables) + cos_and_sin

    def gathered(self) -> int:
        """The cache's buffer for the keys and values that one span reads; it stays."""
        return max(self._gathered_by(*span) for span in spans(self.query_lens, self.context_lens))

    def _gathered_by(self, first: int, count: int) -> int:
        blocks = -(-max(self.context_lens[first : first + count]) // self.block_size)
        numbers = count * blocks * self.block_size * self.K * self.config.head_dim
        return 2 * numbers * self.item

    def unpacking(self) -> int:
        """What an int8 cache holds while it fills that buffer: rows of numbers and of scales."""
        if not self.int8_cache:
            return 0
        numbers = self.gathered() // self.item
        return numbers + numbers // self.config.head_dim * SCALE_BYTES

    def rounding(self) -> int:
        """What it holds while it writes keys or values: three float32 copies, and the numbers."""
        return self.T * self.K * self.config.head_dim * 13 if self.int8_cache else 0

    def always(self) -> int:
        return self.rotary_tables() + self.batch() + self.gathered()

    # ---- the phases of a layer

    def norm(self) -> int:
        """x, its norm, and the norm in float32."""
        return 2 * self.x + self.T * self.config.hidden_size * (self.wide + self.wide_copy)

    def queries_and_keys(self) -> int:
        """x and its norm; q with the three intermediates of its rotation; k and v."""
        return 2 * self.x + 4 * self.q + 2 * self.k

    def attention(self) -> int:
        """x and its norm; q, k and v; and the most that the spans hold, one after another."""
        most = max(self._most_of_spans(), self.unpacking(), self.rounding())
        return 2 * self.x + self.q + 2 * self.k + most

    def _most_of_spans(self) -> int:
        most = z = 0  # z: of the spans that are finished
        for first, count in spans(self.query_lens, self.context_lens):
            R, L = self.query_lens[first], max(self.context_lens[first : first + count])
            z += count * R * self.H * self.config.head_dim * self.item
            most = max(most, z + self._attend(count, R, L))
        return max(most, 2 * z)  # at last the parts of z are put together

    def _attend(self, count: int, R: int, L: int) -> int:
        """One tile: `count` sequences with R new tokens each, against L keys. z is not included."""
        d = self.config.head_dim
        rows = min(R, tile_rows(self.device, self.H * L))
        tile = 0
        if R > 1:  # the tile's queries sorted by head, and the causal mask of a group
            tile = rows * self.H * d * self.item + rows * rows * self.H // self.K
        scores, z = count * self.H * rows * L, count * self.H * rows * d
        softmax = scores * (self.item + self.wide + self.wide_copy)
        if not self._attends_in_float32():
            return tile + softmax
        # Scores, pattern, and in float32 the pattern, the values and z, before z is rounded.
        values = count * L * self.K * d
        product = scores * (2 * self.item + self.wide) + (values + z) * self.wide - z * self.item
        return tile + max(softmax, product)

    def _attends_in_float32(self) -> bool:
        """Whether `head_matmul` computes in float32: 16-bit numbers of several heads on a CPU."""
        return self.device.type == "cpu" and self.item < 4 and self.K > 1

    def attention_output(self) -> int:
        """x, its norm and o_proj's result; q and z; k and v."""
        return 3 * self.x + 2 * self.q + 2 * self.k + self._row_parallel_sum()

    def _row_parallel_sum(self) -> int:
        """What o_proj and down_proj give in float32 beside their result: the sum over ranks."""
        copy = self.wide if self.size > 1 else self.product_copy
        return self.T * self.config.hidden_size * copy

    def mlp(self) -> int:
        """x, its norm and the attention's output, beside the larger of two moments."""
        gate_and_up = 2 * self.gate + self.gate // self.item * self.product_copy
        down = 3 * self.gate + self.x + self._row_parallel_sum()
        return 3 * self.x + max(gate_and_up, down)

    # ---- the phases after the layers

    def logits(self) -> int:
        """The N tokens' norm, this rank's logits, and the copies made of them."""
        rows = vocab_rows_per_rank(self.config, self.size)
        own = self.N * (self.config.hidden_size + rows) * self.item
        return own + max(self._logits_of_all_ranks(), self.N * rows * self.product_copy)

    def _logits_of_all_ranks(self) -> int:
        """Those of this rank padded, those of all ranks, and these put together."""
        if self.size == 1:
            return 0
        rows = vocab_rows_per_rank(self.config, self.size)
        return self.N * (rows + 2 * self.config.vocab_size) * self.item

    def sampling(self) -> int:
        """Logits; for B rows copies and probabilities; for the rows sorted together, their order.

        A CPU sorts one row at a time, a GPU 32.
        """
        sorted_together = min(self.B, 32 if self.device.type == "cuda" else 1)
        numbers = self.N * self.item + self.B * (2 * self.item + self.wide)
        return self.config.vocab_size * (numbers + sorted_together * (self.wide + ID_BYTES))

    def new_rotary_tables(self) -> int:
        """While a larger table is made: it, the one before, and the buffer of gathered blocks.

        It is made when the context has outgrown the table before, which has half its rows. The
        angles, cos and sin are computed in float32 at least, always on the CPU.
        """
        one = self.rotary_rows * self.config.head_dim  # numbers of cos, or of sin
        computing = 2 * self.item
        if self.device.type == "cpu":
            computing = 4 * self.wide if self.item == self.wide else 3 * self.wide + self.item
        buffer = self.gathered()
        buffer = min(buffer, buffer * self.rotary_rows // (2 * max(self.context_lens)))
        return buffer + one * (self.item + computing)

    def phases(self) -> dict[str, int]:
        always = self.always()
        return {
            "norm": always + self.norm(),
            "queries and keys": always + self.queries_and_keys(),
            "attention": always + self.attention(),
            "attention's output": always + self.attention_output(),
            "MLP": always + self.mlp(),
            "logits": always + self.logits(),
            "sampling": always + self.sampling(),
            "rotary table": self.new_rotary_tables(),
        }


def step_phases(
    config: ModelConfig,
    query_lens: Lengths,
    context_lens: Lengths,
    *,
    dtype: str,
    size: int = 1,
    block_size: int = 16,
    logit_rows: int | None = None,
    device: str = "cuda",
    copies_products: bool | None = None,
    kv_dtype: str = "auto",
) -> dict[str, int]:
    """The most bytes held in each phase of one step, on one of `size` ranks: {phase: bytes}.

    query_lens, context_lens: of the step's sequences, as in `Batch`, in the engine's order (those
    with one new token first). dtype: the name of the dtype of activations and logits. logit_rows:
    how many tokens' logits are wanted (default one of each sequence). copies_products: what
    `cpu_copies_products` says of the CPU that computes (default: this machine's). kv_dtype: as in
    `Qwen2.new_cache`.
    The weights and the KV cache are not included; the rotary table is. For native arithmetic.
    """
    if copies_products is None:
        copies_products = cpu_copies_products(dtype)
    item = BYTES_PER_ELEMENT[dtype]
    return _Step(
        config=config,
        query_lens=query_lens,
        context_lens=context_lens,
        item=item,
        size=size,
        block_size=block_size,
        N=len(query_lens) if logit_rows is None else logit_rows,
        device=torch.device(device),
        int8_cache=kv_dtype == "int8",
        product_copy=4 if copies_products and device == "cpu" and item < 4 else 0,
    ).phases()


def step_bytes(
    config: ModelConfig,
    query_lens: Lengths,
    context_lens: Lengths,
    *,
    dtype: str,
    size: int = 1,
    block_size: int = 16,
    device: str = "cuda",
    kv_dtype: str = "auto",
) -> int:
    """The most bytes that one step holds at any time: the largest of `step_phases`."""
    phases = step_phases(
        config,
        query_lens,
        context_lens,
        dtype=dtype,
        size=size,
        block_size=block_size,
        device=device,
        kv_dtype=kv_dtype,
    )
    return max(phases.values())


def worst_steps(context: int, batch: int, tokens: int) -> list[tuple[Lengths, Lengths]]:
    """(query_lens, context_lens) of the steps that hold most while sequences grow.

    `batch` sequences reach `context` tokens each, in steps of at most `tokens` new tokens
    (max_num_batched_tokens, at least `batch`).
    """
    return [_decodes(context, batch), _prompts_and_decodes(context, batch, tokens)]


def _decodes(context: int, batch: int) -> tuple[Lengths, Lengths]:
    """One new token of each sequence."""
    return (1,) * batch, _contexts(context, batch)


def _prompts_and_decodes(context: int, batch: int, tokens: int) -> tuple[Lengths, Lengths]:
    """As many prompts as fill the step, of the last one what fits, and one token of each other."""
    prompts = min(batch, max(1, -(-(tokens - batch) // max(1, context - 1))))
    others = batch - prompts
    last = min(context, tokens - others - (prompts - 1) * context)
    query_lens = (1,) * others + (context,) * (prompts - 1) + (last,)
    return query_lens, _contexts(context, batch)


def _contexts(context: int, batch: int) -> Lengths:
    """One sequence is shorter than the others: it has to be padded, which takes a mask."""
    if batch == 1:
        return (context,)
    return (max(1, context - 1),) + (context,) * (batch - 1)


def blocks_that_fit(
    config: ModelConfig,
    room: int,
    bytes_per_block: int,
    *,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    dtype: str,
    size: int = 1,
    block_size: int = 16,
    device: str = "cuda",
    kv_dtype: str = "auto",
) -> int:
    """The most blocks that, with the fullest step, take at most `room` bytes; 0: not even one.

    The more blocks there are, the more a step gathers. The fullest steps are those of as many
    sequences of `max_model_len` tokens as the blocks hold, and those of `max_num_seqs` sequences
    that share the blocks. The other arguments are those of `step_bytes`.
    """

    def taken(blocks: int) -> int:
        tokens = max(1, blocks * block_size)
        few = max(1, min(max_num_seqs, tokens // max_model_len))
        steps = [
            *worst_steps(min(max_model_len, tokens), few, max_num_batched_tokens),
            *worst_steps(
                max(1, min(max_model_len, tokens // max_num_seqs)),
                max_num_seqs,
                max_num_batched_tokens,
            ),
        ]
        most = max(
            step_bytes(
                config,
                *step,
                dtype=dtype,
                size=size,
                block_size=block_size,
                device=device,
                kv_dtype=kv_dtype,
            )
            for step in steps
        )
        return blocks * bytes_per_block + most

    return largest(lambda blocks: taken(blocks) <= room, room // bytes_per_block)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n from 1 to `most` for which fits(n), if all smaller ones fit too; else 0."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
