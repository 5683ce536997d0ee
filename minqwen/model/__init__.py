"""What is computed, nothing else: no files, no scheduling, no flags.

`qwen2.py` is the forward pass; `rope.py`, `attention.py` and `arithmetic.py` are the parts it is made of.
"""
from minqwen.model.arithmetic import ARITHMETICS, Native
from minqwen.model.attention import KVCache
from minqwen.model.batch import Batch
from minqwen.model.qwen2 import Qwen2

__all__ = ["ARITHMETICS", "Batch", "KVCache", "Native", "Qwen2"]
