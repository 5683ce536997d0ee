"""What is computed, nothing else: no scheduling, no flags, and no file but through checkpoint.

Read qwen2.py, the forward pass. rope.py, attention.py and arithmetic.py are the parts it is made
of; fast.py, whose weights are in the forms of packed.py and
grouped.py, and exact.py are the other arithmetics.
batch.py says which tokens a step has, kv_cache.py keeps keys and values, trace.py names the
intermediates, activations.py keeps them, memory.py counts bytes, changes.py notices that the model
was changed, inputs.py refuses what cannot be computed.
"""

from minqwen.model.arithmetic import Native
from minqwen.model.batch import Batch
from minqwen.model.exact import Exact
from minqwen.model.fast import Fast
from minqwen.model.kv_cache import KVCache
from minqwen.model.qwen2 import ARITHMETICS, Qwen2

__all__ = ["ARITHMETICS", "Batch", "Exact", "Fast", "KVCache", "Native", "Qwen2"]
