"""Our model in the shape of transformers' `AutoModelForCausalLM`, for scripts that expect it.

A script changes one import, `from minqwen.lab.transformers import AutoModelForCausalLM`, and gives
a directory instead of a name. Nothing of transformers is needed, or used. docs/transformers.md
shows it, and what is refused.
"""

from minqwen.lab.transformers.causal_lm import AutoModelForCausalLM, Qwen2ForCausalLM
from minqwen.lab.transformers.outputs import CausalLMOutput, GenerateOutput, ModelOutput
from minqwen.lab.transformers.settings import GenerationConfig

__all__ = [
    "AutoModelForCausalLM",
    "CausalLMOutput",
    "GenerateOutput",
    "GenerationConfig",
    "ModelOutput",
    "Qwen2ForCausalLM",
]
