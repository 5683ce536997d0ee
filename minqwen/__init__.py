"""minqwen: a golden reference inference engine for Qwen2.5 in pure PyTorch.

Reading order:
    config.py            what a checkpoint says of itself
    model/qwen2.py       the forward pass, in one sitting; then rope.py, attention.py, arithmetic.py
    checkpoint/          where the numbers come from
    parallel.py          who holds which part of them
    engine/              how requests run: kv_cache.py, scheduler.py, sampling.py, llm.py

Shapes in comments:
    T  tokens of this step, all sequences packed       B  sequences          D  hidden_size
    H  query heads        K  key/value heads           G  = H / K            d  head_dim
    V  vocabulary rows    P  pages of the cache        S  tokens per page    L  tokens of context
Under tensor parallelism H, K and V are what this rank holds.
"""

from minqwen.checkpoint import Checkpoint
from minqwen.config import ModelConfig
from minqwen.engine.llm import LLM
from minqwen.errors import MinqwenError
from minqwen.model import Batch, Qwen2
from minqwen.parallel import Mesh
from minqwen.sampling.params import SamplingParams
from minqwen.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "Batch",
    "Checkpoint",
    "Mesh",
    "MinqwenError",
    "ModelConfig",
    "Qwen2",
    "SamplingParams",
    "Tokenizer",
]
