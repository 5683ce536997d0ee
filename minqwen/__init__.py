"""minqwen: a golden reference inference engine for Qwen2.5 in pure PyTorch.

Reading order:
    config               what a checkpoint says of itself
    model/qwen2.py       the forward pass, in one sitting; then arithmetic, attention, rope
    checkpoint           where the numbers come from
    parallel             who holds which part of them
    sampling, engine     how tokens are chosen, and how requests run: engine/core.py, then llm.py
docs/architecture.md walks a request, a weight, an activation and a mistake through these rooms.

Shapes in comments:
    T  tokens of this step, all sequences packed    B  sequences       D  hidden_size
    H  query heads     K  key/value heads           G  = H / K         d  head_dim
    V  vocabulary rows                              I  intermediate_size
    P  blocks of the cache     S  tokens per block  L  tokens of context
Under tensor parallelism H, K, I and V are what this rank holds.
"""

from minqwen.interrupts import DURING_IMPORT  # before torch is imported

# isort: split
from minqwen.checkpoint import Checkpoint
from minqwen.config import ModelConfig
from minqwen.engine.llm import LLM
from minqwen.engine.prompts import TextPrompt, TokensPrompt
from minqwen.errors import MinqwenError
from minqwen.model import Batch, Qwen2
from minqwen.parallel import Mesh
from minqwen.sampling.params import SamplingParams
from minqwen.sampling.structured import StructuredOutputs
from minqwen.tokenizer import Tokenizer

DURING_IMPORT.end()

# vLLM's names of it: the present one and the older one.
StructuredOutputsParams = GuidedDecodingParams = StructuredOutputs

__all__ = [
    "LLM",
    "Batch",
    "Checkpoint",
    "GuidedDecodingParams",
    "Mesh",
    "MinqwenError",
    "ModelConfig",
    "Qwen2",
    "SamplingParams",
    "StructuredOutputs",
    "StructuredOutputsParams",
    "TextPrompt",
    "Tokenizer",
    "TokensPrompt",
]
