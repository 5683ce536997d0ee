"""What PyTorch's allocator really held, as its profiler saw it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from minqwen import Batch, ModelConfig, Qwen2
from minqwen.model.rope import table_length

MLP_BOUND = ModelConfig(
    vocab_size=500,
    hidden_size=128,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
)
ATTENTION_BOUND = MLP_BOUND.replace(hidden_size=64, intermediate_size=128)
MANY_HEADS = MLP_BOUND.replace(
    num_attention_heads=28, num_key_value_heads=4, head_dim=64, intermediate_size=128
)
STEPS = {  # name: (config, query_lens, context_lens, the phase with the peak)
    "prefill": (MLP_BOUND, (1024,), (1024,), "MLP"),
    "heads": (MANY_HEADS, (512,), (512,), "queries and keys"),
    "chunk": (ATTENTION_BOUND, (512,), (20_000,), "attention"),
    "decode": (ATTENTION_BOUND, (1,) * 16, (1000,) * 16, "attention"),
    "ragged": (ATTENTION_BOUND, (1,) * 8, (900, 1500) * 4, "attention"),
    "mixed again": (ATTENTION_BOUND, (1,) * 40 + (64,), (500,) * 40 + (200,), "attention"),
    "mixed": (ATTENTION_BOUND, (1, 1, 256), (300, 2000, 3000), "attention"),
    "logits": (ATTENTION_BOUND.replace(vocab_size=20_000), (300,), (300,), "logits"),
}


def peak_bytes(run: Callable[[], object], count_scratch: bool = True) -> int:
    """The most bytes held at once while `run` runs.

    count_scratch False: without what a single matrix product takes and gives back. That is a
    library's scratch memory, of a size that nobody outside can know.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run()  # alive until the profiler has stopped
    events = seen.profiler.kineto_results.events()
    del result
    products = [e for e in events if e.name() in ("aten::mm", "aten::addmm", "aten::bmm")]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    if not count_scratch:
        for product in products:
            inside = [c for c in changes if product.start_ns() <= c[0] <= product.end_ns()]
            freed = [-size for _, size in inside if size < 0]
            scratch = [c for c in inside if abs(c[1]) in freed]
            changes = [c for c in changes if c not in scratch]
    return max(accumulate((size for _, size in changes), initial=0))


@torch.inference_mode()
def peak_of_step(name: str, dtype: str, count_scratch: bool, block_size: int = 16) -> int:
    """The most bytes held during a step of STEPS, with the tensors that it was handed.

    In "logits" the logits of all tokens are wanted. The cache's buffer has to grow by a block.
    """
    config, queries, contexts, _ = STEPS[name]
    model = Qwen2(config, dtype=getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    ends = list(accumulate(-(-n // block_size) for n in contexts))
    blocks = [list(range(start, end)) for start, end in zip([0, *ends], ends)]
    num_logits = queries if name == "logits" else (1,) * len(queries)
    batch = Batch.paged(queries, contexts, blocks, block_size, num_logits=num_logits)
    ids = torch.zeros(sum(queries), dtype=torch.int64)
    cache = model.new_cache(ends[-1], block_size)
    model(ids, batch, cache)  # the rotary table stays, and so does the cache's buffer
    almost_enough = cache.gathered.numel() - 2 * cache.pool[0, 0, 0].numel()
    cache.gathered = cache.pool.new_empty(0)

    def step() -> object:
        cache.gathered = cache.pool.new_empty(almost_enough)
        return model(ids, batch, cache)

    tables = 2 * table_length(max(contexts)) * config.head_dim * model.dtype.itemsize
    given = [ids, *(x for x in vars(batch).values() if isinstance(x, torch.Tensor))]
    return peak_bytes(step, count_scratch) + tables + sum(x.nbytes for x in given)
