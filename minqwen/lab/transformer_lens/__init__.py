"""Our model in TransformerLens' idiom: its names, shapes and helpers over the same forward pass.

A script changes one import, `from minqwen.lab.transformer_lens import HookedTransformer, utils`,
and gives a directory instead of a name. Nothing of TransformerLens is needed, or used.
docs/transformer-lens.md shows it, and what is not here.
"""

from minqwen.lab.transformer_lens import utils
from minqwen.lab.transformer_lens.activation_cache import ActivationCache
from minqwen.lab.transformer_lens.config import HookedTransformerConfig
from minqwen.lab.transformer_lens.hook_points import HookPoint
from minqwen.lab.transformer_lens.hooked_transformer import HookedTransformer
from minqwen.lab.transformer_lens.utils import Slice

__all__ = [
    "ActivationCache",
    "HookPoint",
    "HookedTransformer",
    "HookedTransformerConfig",
    "Slice",
    "utils",
]
