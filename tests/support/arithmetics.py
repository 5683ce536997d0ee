"""Arithmetics that only tests use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minqwen.model import Native
from minqwen.model.arithmetic import Linear
from minqwen.parallel import Mesh


class Ordered(Native):
    """Native, but the order of a linear's sums depends on all that a kernel may look at.

    The columns are summed in two parts, and where the first one ends depends on the number of
    rows, of columns and of threads. Native kernels may do the like, but some of them, on some CPUs,
    do not. So this is the control of the tests that say that a change moves no bit: it shows on
    every machine that they would see one move.
    """

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        columns = x.shape[-1]
        cut = 1 + (len(x) + columns // 3 + torch.get_num_threads()) % (columns - 1)
        first = F.linear(x[:, :cut], linear.weight[:, :cut])
        return first + F.linear(x[:, cut:], linear.weight[:, cut:], linear.bias)

    def row_parallel_linear(self, x: Tensor, linear: Linear, mesh: Mesh) -> Tensor:
        assert mesh.size == 1
        return self.linear(x, linear)
