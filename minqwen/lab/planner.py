"""How much memory a model takes on each GPU, what fits, and how fast it can be at best.

Weights are counted tensor by tensor, with the same slices that the ranks load (`parallel.shard`).
The KV cache is counted in whole blocks, a step's activations by `model/memory.py`. GB are 10^9
bytes. Letters as in config.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from minqwen.checkpoint.quantization import Packing
from minqwen.checks import integer
from minqwen.config import BYTES_PER_ELEMENT, ModelConfig
from minqwen.errors import ConfigError
from minqwen.model.grouped import OUTPUTS, Groups, held_bytes
from minqwen.model.memory import block_bytes, largest, step_phases, worst_steps
from minqwen.parallel import check_degree, kv_heads_per_rank, shard

GB = 10**9
CAPACITIES = (24, 40, 48, 80, 141)  # GB of the cards below
MAX_CONTEXT = 1 << 30  # tokens: the search for the largest context ends here


@dataclass(frozen=True)
class Card:
    """A GPU. gb: its memory. bandwidth: bytes per second. flops: per second.

    FLOPs are dense, of 16-bit tensor cores with float32 sums.
    """

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
    "awq": Packing("awq", bits=4, group=128, offset=0, act_order=False),
    "gptq": Packing("gptq", bits=4, group=128, offset=1, act_order=False),
    "gptq-int8": Packing("gptq", bits=8, group=128, offset=1, act_order=False),
}
QUANTIZATIONS = ("none", "int8", *PACKINGS)  # int8: a byte per weight and one scale per output


@dataclass(frozen=True)
class Estimate:
    """Bytes on the fullest of `size` GPUs, and the work of a step, for one load.

    The load is `batch` sequences of `context` tokens each. kv_cache: whole blocks. activations: the
    most that the worst step holds, in its `phase`. decode_bytes: read to make one token for every
    sequence. decode_flops: computed for these tokens, on one GPU. prefill_flops: for all prompts.
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
        """No decode step is faster: all weights, keys and values are read and computed with."""
        return max(self.decode_bytes / card.bandwidth, self.decode_flops / card.flops)

    def prefill_seconds(self, card: Card) -> float:
        """No prefill of the whole batch is faster."""
        return self.prefill_flops / card.flops


@dataclass(frozen=True)
class Fit:
    """Whether an estimate fits in a limit, and how far its context or its batch could grow.

    largest_context is for the estimate's batch, largest_batch for its context; 0: not even one.
    No context is offered beyond the config's own, or beyond the estimate's if that is longer.
    """

    fits: bool
    largest_context: int
    largest_batch: int


def yarn_for(config: ModelConfig, context: int) -> dict[str, object] | None:
    """The rope_scaling block with which a model reaches `context` tokens; None: it does without.

    Raises ConfigError for a context that needs dual chunk attention.
    """
    if context <= config.context_length:
        return None
    if config.raw.get("dual_chunk_attention_config"):
        raise ConfigError(
            f"context is {context}, expected at most {config.context_length}: beyond that this "
            "model needs dual chunk attention, which minqwen does not have"
        )
    scaling = config.rope_scaling
    original = (
        config.max_position_embeddings
        if scaling is None
        else scaling.original_max_position_embeddings
    )
    hundredths = -(-100 * context // original)  # rounded up
    return {
        "type": "yarn",
        "factor": hundredths / 100,
        "original_max_position_embeddings": original,
    }


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of the seven projections of a layer are stored; all others are not quantised.

    name: for people. item: bytes of a number that is not quantised, and of an int8 scale. packing:
    of AWQ and GPTQ, else None. grouped: whether they are in the form in which fast arithmetic keeps
    them (model/grouped.py), and not in the files'.
    """

    name: str
    item: int
    packing: Packing | None = None
    grouped: bool = False

    @classmethod
    def of(
        cls, config: ModelConfig, item: int, quantization: str | None, grouped: bool = False
    ) -> WeightFormat:
        """That of a member of QUANTIZATIONS; None: what config.json says.

        Raises ConfigError for another name, CheckpointError for a config that is not understood.
        """
        if quantization is None and config.quantization_config:
            packing = Packing.read(config.quantization_config, config.source)
            return cls(f"{packing.method} {packing.bits}-bit", item, packing, grouped)
        name = quantization or "none"
        if name not in QUANTIZATIONS:
            raise ConfigError(
                f"quantization is {quantization!r}, expected one of {', '.join(QUANTIZATIONS)}"
            )
        return cls(name, item, PACKINGS.get(name), grouped)

    def vector_bytes(self, length: int) -> int:
        return self.item * length

    def matrix_bytes(self, name: str, outputs: int, inputs: range, all_inputs: int) -> int:
        """Of a rank's slice of a weight: its outputs, and which of the layer's inputs it has."""
        if not name.endswith("_proj.weight") or self.name == "none":
            return self.item * outputs * len(inputs)
        if self.packing is None:
            return outputs * len(inputs) + self.item * outputs
        if not self.grouped:
            return packed_bytes(self.packing, outputs, inputs, all_inputs)
        groups = Groups.of(self.packing.groups_of(all_inputs)[inputs.start : inputs.stop])
        shuffled = self.packing.act_order and len(inputs) < all_inputs
        if groups is None or shuffled or outputs % OUTPUTS:
            return self.item * outputs * len(inputs)  # it is dequantised
        return held_bytes(outputs, len(inputs), self.packing.bits, groups.size)


def uneven_groups(config: ModelConfig, packing: Packing, size: int) -> int | None:
    """The next MLP size whose groups `size` GPUs can share evenly; None if they can share these.

    minqwen's ranks may hold parts of a group. Engines that compute with packed weights usually
    refuse the degree instead, until the MLP is padded with zeros, as Qwen padded the 72B's.
    """
    width, unit = config.intermediate_size, size * packing.group
    if packing.group == -1 or width % unit == 0:
        return None
    return -(-width // unit) * unit


def packed_bytes(packing: Packing, outputs: int, inputs: range, all_inputs: int) -> int:
    """Bytes of an AWQ or GPTQ weight (`checkpoint/quantization.py` has the layouts).

    These are int32 words of 32 / bits numbers; zero points and 16-bit scales for every group that
    the rank's inputs touch; and for GPTQ an int32 for each input.
    """
    group = packing.group if packing.group > 0 else all_inputs
    groups = -(-inputs.stop // group) - inputs.start // group
    zeros = -(-outputs // packing.pack)  # words
    if packing.method == "awq":
        words, group_indices = len(inputs) * zeros, 0
    else:
        words, group_indices = -(-len(inputs) // packing.pack) * outputs, len(inputs)
    return 4 * (words + group_indices) + groups * (4 * zeros + 2 * outputs)


def tensor_bytes(name: str, config: ModelConfig, rank: int, size: int, form: WeightFormat) -> int:
    """Bytes of one parameter on one of `size` ranks."""
    shape = config.parameter_shapes()[name]
    held = [range(length) for length in shape]
    mine = shard(name, config, rank, size)
    if mine is not None:
        held[mine.dim] = range(mine.start, mine.stop)
    if len(shape) == 1:
        return form.vector_bytes(len(held[0]))
    return form.matrix_bytes(name, len(held[0]), held[1], shape[1])


def rank_weights(
    config: ModelConfig,
    size: int,
    dtype: str,
    quantization: str | None = None,
    grouped: bool = False,
) -> list[dict[str, int]]:
    """For each rank, the bytes of each of its parameters.

    dtype: the name of the dtype of what is not quantised. quantization, grouped: as in
    `WeightFormat`.
    Raises ParallelError for a degree that cannot work.
    """
    check_degree(config, size)
    form = WeightFormat.of(config, BYTES_PER_ELEMENT[dtype], quantization, grouped)
    return [_rank_weights(config, rank, size, form) for rank in range(size)]


def _rank_weights(config: ModelConfig, rank: int, size: int, form: WeightFormat) -> dict[str, int]:
    # All layers are alike: one is counted.
    one = config.replace(num_hidden_layers=1, quantization_config=None)
    held = {name: tensor_bytes(name, one, rank, size, form) for name in one.parameter_shapes()}
    return {name: held[_in_first_layer(name)] for name in config.parameter_shapes()}


def _in_first_layer(name: str) -> str:
    return ".".join("0" if part.isdigit() else part for part in name.split("."))


class Planner:
    """Estimates for one model on one number of GPUs. The weights are counted once.

    dtype: of activations, cache and unquantised weights (default the config's). quantization: one
    of QUANTIZATIONS (default what config.json says). max_num_batched_tokens, block_size: the
    engine's. device: "cuda", or "cpu", where in bfloat16 quantised weights are as fast arithmetic
    keeps them. copies_products: as in `memory.step_phases`. kv_cache_dtype: "auto" or "int8".
    Raises ConfigError, and ParallelError for a degree that cannot work.
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
        copies_products: bool | None = None,
        kv_cache_dtype: str = "auto",
    ):
        self.config, self.size, self.dtype = config, size, dtype or config.dtype
        if self.dtype not in BYTES_PER_ELEMENT:
            raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(BYTES_PER_ELEMENT)}")
        self.tokens = integer("max_num_batched_tokens", max_num_batched_tokens, 1)
        self.block_size = integer("block_size", block_size, 1)
        self.device, self.copies_products = device, copies_products
        self.kv_dtype = kv_cache_dtype
        item = BYTES_PER_ELEMENT[self.dtype]
        form = WeightFormat.of(config, item, quantization)
        self.quantization, self.packing = form.name, form.packing
        grouped = device == "cpu" and self.dtype == "bfloat16"
        ranks = rank_weights(config, size, self.dtype, quantization, grouped)
        held_by = [sum(held.values()) for held in ranks]
        self.weights, self.weights_of_all_ranks = max(held_by), sum(held_by)
        # Of the embedding a step looks up a few rows; it reads all only where they are the head's.
        looked_up = 0 if config.tie_word_embeddings else ranks[0]["model.embed_tokens.weight"]
        self.weights_read = self.weights - looked_up
        self.kv_per_token = block_bytes(config, size, 1, self.dtype, self.kv_dtype)
        # Ranks that hold copies of a KV head compute its keys and values each for itself.
        kv_heads = size * kv_heads_per_rank(config, size)
        self.computed = config.replace(num_key_value_heads=kv_heads)

    def estimate(self, context: int, batch: int = 1) -> Estimate:
        """For `batch` sequences of `context` tokens each.

        Raises ConfigError for what the engine would refuse.
        """
        if not 1 <= batch <= self.tokens:
            raise ConfigError(
                f"batch is {batch}, expected 1 to max_num_batched_tokens ({self.tokens}): a step "
                "has room for one token of each sequence"
            )
        if context < 1:
            raise ConfigError(f"context is {context}, expected at least 1 token")
        blocks = batch * -(-context // self.block_size)
        activations, phase = self._activations(context, batch)
        return Estimate(
            size=self.size,
            heads=self.config.num_attention_heads,
            dtype=self.dtype,
            quantization=self.quantization,
            context=context,
            batch=batch,
            weights=self.weights,
            kv_cache=blocks * self.block_size * self.kv_per_token,
            activations=activations,
            phase=phase,
            decode_bytes=self.weights_read + batch * context * self.kv_per_token,
            decode_flops=batch * self.computed.flops_per_token(context) / self.size,
            prefill_flops=batch * self._prompt_flops(context) / self.size,
        )

    def _activations(self, context: int, batch: int) -> tuple[int, str]:
        """(bytes, phase) of the worst moment of the worst step."""
        moments = []
        for query_lens, context_lens in worst_steps(context, batch, self.tokens):
            phases = step_phases(
                self.config,
                query_lens,
                context_lens,
                dtype=self.dtype,
                size=self.size,
                block_size=self.block_size,
                device=self.device,
                copies_products=self.copies_products,
                kv_dtype=self.kv_dtype,
            )
            moments += [(held, phase) for phase, held in phases.items()]
        return max(moments)

    def _prompt_flops(self, context: int) -> int:
        """Of one prompt: each token, each token against those before it, and one row of logits."""
        matrices = self.computed.flops_per_token(0, lm_head=False)
        head = self.computed.flops_per_token(0) - matrices
        one_pair = self.computed.flops_per_token(1) - self.computed.flops_per_token(0)
        return context * matrices + one_pair * context * (context + 1) // 2 + head

    def largest_context(self, limit: int, batch: int = 1) -> int:
        """Tokens that each of `batch` sequences may have within `limit` bytes per GPU; 0: none."""
        return largest(lambda context: self.estimate(context, batch).total <= limit, MAX_CONTEXT)

    def largest_batch(self, limit: int, context: int) -> int:
        """Sequences of `context` tokens within `limit` bytes per GPU; 0: not one.

        At most one for each token of a step.
        """
        return largest(lambda batch: self.estimate(context, batch).total <= limit, self.tokens)

    def fit(self, estimate: Estimate, limit: int) -> Fit:
        """What fits in `limit` bytes per GPU around one of this planner's estimates."""
        longest = max(estimate.context, self.config.context_length)
        return Fit(
            fits=estimate.total <= limit,
            largest_context=min(longest, self.largest_context(limit, estimate.batch)),
            largest_batch=self.largest_batch(limit, estimate.context),
        )
