"""What is computed, nothing else: no files, no scheduling, no flags.

`qwen2.py` is the forward pass; `rope.py`, `attention.py` and `arithmetic.py` are the parts it is made of, and
`exact.py` is the other arithmetic.
"""

from minqwen.model.arithmetic import Native
from minqwen.model.batch import Batch
from minqwen.model.exact import Exact
from minqwen.model.kv_cache import KVCache
from minqwen.model.qwen2 import ARITHMETICS, Qwen2

__all__ = ["ARITHMETICS", "Batch", "Exact", "KVCache", "Native", "Qwen2"]
