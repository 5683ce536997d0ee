"""How much memory a model takes on each GPU, what fits, and how fast it can be at best.

Weights are counted tensor by tensor through the plan that the ranks load by (`parallel.shard`), the cache in whole
pages, a step's activations by `model/memory.py`. GB are 10^9 bytes. Letters as in config.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from minqwen.checkpoint.quantization import Packing
from minqwen.config import BYTES_PER_ELEMENT, ModelConfig
from minqwen.errors import ConfigError
from minqwen.model.memory import largest, step_phases, worst_steps
from minqwen.parallel import check_degree, shard

GB = 10**9
CAPACITIES = (24, 40, 48, 80, 141)  # GB of the cards below


@dataclass(frozen=True)
class Card:
    """gb: memory. bandwidth: bytes per second. flops: per second, dense, 16-bit tensor cores with float32 sums."""

    gb: int
    bandwidth: float
    flops: float


CARDS = {  # NVIDIA's figures, halved where they are given "with sparsity"
    "RTX 3090": Card(24, 936e9, 71e12),  # GA102 architecture whitepaper 2.1, appendix A
    "RTX 4090": Card(24, 1008e9, 165.2e12),  # Ada GPU architecture whitepaper, appendix A
    "A100 40GB": Card(40, 1555e9, 312e12),  # A100 datasheet, 2021
    "RTX A6000": Card(48, 768e9, 154.8e12),  # GA102 whitepaper, appendix C
    "L40S": Card(48, 864e9, 362e12),  # L40S datasheet
    "A100 80GB": Card(80, 2039e9, 312e12),  # A100 datasheet, SXM
    "H100": Card(80, 3350e9, 989e12),  # H100 datasheet, SXM
    "H200": Card(141, 4800e9, 989e12),  # H200 datasheet, SXM
}

PACKINGS = {  # groups of 128 inputs: what the official Qwen2.5 checkpoints are packed in
    "awq": Packing("awq", 4, 128, 0, False),
    "gptq": Packing("gptq", 4, 128, 1, False),
    "gptq-int8": Packing("gptq", 8, 128, 1, False),
}
QUANTIZATIONS = ("none", "int8", *PACKINGS)  # int8: a byte per weight and one scale per output


@dataclass(frozen=True)
class Plan:
    """Bytes on the fullest of `size` GPUs for `batch` sequences of `context` tokens each, and what a step costs it.

    weights; kv_cache: whole pages; activations: the peak of the worst step, reached in its `phase`. decode_bytes:
    read to make one token for every sequence, decode_flops: computed for them. prefill_flops: of all prompts.
    """

    size: int
    heads: int
    dtype: str
    quantization: str
    context: int
    batch: int
    weights: int
    kv_cache: int
    activations: int
    phase: str
    decode_bytes: int
    decode_flops: float
    prefill_flops: float

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations

    def decode_seconds(self, card: Card) -> float:
        """No decode step is faster: every weight and every cached key and value is read once, or computed with."""
        return max(self.decode_bytes / card.bandwidth, self.decode_flops / card.flops)

    def prefill_seconds(self, card: Card) -> float:
        """No prefill of the whole batch is faster."""
        return self.prefill_flops / card.flops


def packing_of(config: ModelConfig, quantization: str | None) -> tuple[str, Packing | None]:
    """(name, layout) of a member of QUANTIZATIONS; None: what config.json says. Raises ConfigError, HeadsError."""
    if quantization is None and config.quantization_config:
        packing = Packing.read(config.quantization_config, config.source)
        return f"{packing.method} {packing.bits}-bit", packing
    name = quantization or "none"
    if name not in QUANTIZATIONS:
        raise ConfigError(
            f"quantization is {quantization!r}, expected one of {', '.join(QUANTIZATIONS)}"
        )
    return name, PACKINGS.get(name)


def tensor_bytes(
    name: str,
    config: ModelConfig,
    rank: int,
    size: int,
    item: int,
    quantization: str,
    packing: Packing | None,
) -> int:
    """Bytes of one parameter on one rank. The seven projections of a layer are quantised, the rest is 16-bit.

    Packed (packed_heads.py has the layouts): words of 32 / b numbers, zero points and 16-bit scales for every group
    that the rank's inputs touch, and for GPTQ an int32 per input.
    """
    shape, mine = list(config.parameter_shapes()[name]), shard(name, config, rank, size)
    first = 0  # input of a linear layer that this rank begins with
    if mine is not None:
        shape[mine.dim] = mine.stop - mine.start
        first = mine.start if mine.dim == 1 else 0
    if not name.endswith("_proj.weight") or quantization == "none":
        return item * shape[0] * (shape[1] if len(shape) == 2 else 1)
    outputs, inputs = shape
    if packing is None:
        return outputs * inputs + item * outputs
    group = packing.group if packing.group > 0 else config.parameter_shapes()[name][1]
    groups = -(-(first + inputs) // group) - first // group
    words = -(-outputs // packing.pack)
    qweight = 4 * (
        inputs * words if packing.method == "awq" else -(-inputs // packing.pack) * outputs
    )
    return (
        qweight
        + groups * (4 * words + 2 * outputs)
        + (4 * inputs if packing.method == "gptq" else 0)
    )


def rank_weights(
    config: ModelConfig, size: int, dtype: str, quantization: str | None = None
) -> list[dict[str, int]]:
    """For each rank, the bytes of each of its parameters. Raises ParallelError for a degree that cannot work."""
    check_degree(config, size)
    kind, packing = packing_of(config, quantization)
    one = config.replace(num_hidden_layers=1, quantization_config=None)  # all layers are alike
    ranks = []
    for rank in range(size):
        held = {
            name: tensor_bytes(name, one, rank, size, BYTES_PER_ELEMENT[dtype], kind, packing)
            for name in one.parameter_shapes()
        }
        ranks.append(
            {
                name: held[".".join("0" if part.isdigit() else part for part in name.split("."))]
                for name in config.parameter_shapes()
            }
        )
    return ranks


class Planner:
    """Plans for one model on one number of GPUs; the weights are counted once.

    dtype: of activations, cache and unquantised weights (default the config's). quantization: one of QUANTIZATIONS
    (default what config.json says). max_num_batched_tokens, block_size: the engine's. Raises ConfigError, and
    ParallelError for a degree that cannot work.
    """

    def __init__(
        self,
        config: ModelConfig,
        size: int = 1,
        *,
        dtype: str | None = None,
        quantization: str | None = None,
        max_num_batched_tokens: int = 2048,
        block_size: int = 16,
        device: str = "cuda",
    ):
        self.config, self.size, self.dtype = config, size, dtype or config.dtype
        if self.dtype not in BYTES_PER_ELEMENT:
            raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(BYTES_PER_ELEMENT)}")
        for name, value in (
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("block_size", block_size),
        ):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} is {value!r}, expected an integer of at least 1")
        self.tokens, self.block_size, self.device = max_num_batched_tokens, block_size, device
        self.quantization = packing_of(config, quantization)[0]
        ranks = rank_weights(config, size, self.dtype, quantization)
        self.weights = max(sum(held.values()) for held in ranks)
        # Rows of the embedding are looked up, not read through, unless they are the head's too.
        looked_up = 0 if config.tie_word_embeddings else ranks[0]["model.embed_tokens.weight"]
        self.weights_read = self.weights - looked_up
        kv_heads = max(config.num_key_value_heads // size, 1)  # more ranks than heads hold copies
        self.kv_per_token = (
            2
            * config.num_hidden_layers
            * kv_heads
            * config.head_dim
            * BYTES_PER_ELEMENT[self.dtype]
        )

    def plan(self, context: int, batch: int = 1) -> Plan:
        """Of `batch` sequences of `context` tokens each. Raises ConfigError for what the engine would refuse."""
        if not 1 <= batch <= self.tokens:
            raise ConfigError(
                f"batch is {batch}, expected 1 to max_num_batched_tokens ({self.tokens}): a step has "
                "room for one token of each sequence"
            )
        if context < 1:
            raise ConfigError(f"context is {context}, expected at least 1 token")
        c, n = self.config, self.size
        pages = batch * -(-context // self.block_size)
        activations, phase = max(
            (held, phase)
            for step in worst_steps(context, batch, self.tokens)
            for phase, held in step_phases(
                c, *step, dtype=self.dtype, size=n, block_size=self.block_size, device=self.device
            ).items()
        )
        matrices, pair = (
            c.flops_per_token(0, lm_head=False),
            c.flops_per_token(1) - c.flops_per_token(0),
        )
        head = c.flops_per_token(0) - matrices
        prefill = context * matrices + pair * context * (context + 1) // 2 + head
        return Plan(
            n,
            c.num_attention_heads,
            self.dtype,
            self.quantization,
            context,
            batch,
            self.weights,
            pages * self.block_size * self.kv_per_token,
            activations,
            phase,
            decode_bytes=self.weights_read + batch * context * self.kv_per_token,
            decode_flops=batch * c.flops_per_token(context) / n,
            prefill_flops=batch * prefill / n,
        )

    def largest_context(self, limit: int, batch: int = 1) -> int:
        """Tokens each of `batch` sequences may have within `limit` bytes per GPU; 0 if not one."""
        return largest(lambda context: self.plan(context, batch).total <= limit, 1 << 30)

    def largest_batch(self, limit: int, context: int) -> int:
        """Sequences of `context` tokens within `limit` bytes per GPU, at most one per token of a step; 0 if none."""
        return largest(lambda batch: self.plan(context, batch).total <= limit, self.tokens)
