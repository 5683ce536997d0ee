"""Tensor parallelism: the plan of who holds which rows, and the mesh of ranks that exchange sums.

Every rank runs the same program on the same requests (SPMD, started by `torchrun`); only tensors cross
ranks. The plan is Megatron-LM's (Shoeybi et al. 2019, arXiv:1909.08053): split a projection by its output
rows and the next one by its input columns, and one sum over ranks finishes the block.

What listens where, on one node: gloo and NCCL bind to loopback only (from_env sets GLOO_SOCKET_IFNAME and
NCCL_SOCKET_IFNAME unless the user did). torchrun's own store listens on every interface, on two ports (one
with `--master-addr 127.0.0.1 --master-port N`), without a password, and has no option for it: on a network
you do not trust use a firewall, or a network namespace that has only loopback.
"""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from minqwen.config import ModelConfig
from minqwen.errors import ParallelError
from minqwen.watch import Watch

# ---------------------------------------------------------------------------------------------- the plan
# Parameter suffix -> what it is split by. A name that is not here (the norms, o_proj.bias, which is added
# once after the sum) is whole on every rank. Column-parallel parameters split dim 0, their output, ...
PLAN = {
    "embed_tokens.weight": (0, "vocabulary"),
    "lm_head.weight": (0, "vocabulary"),
    "q_proj.weight": (0, "query heads"),
    "q_proj.bias": (0, "query heads"),
    "k_proj.weight": (0, "kv heads"),
    "k_proj.bias": (0, "kv heads"),
    "v_proj.weight": (0, "kv heads"),
    "v_proj.bias": (0, "kv heads"),
    "gate_proj.weight": (0, "intermediate"),
    "up_proj.weight": (0, "intermediate"),
    # ... row-parallel ones dim 1, their input; the partial results are summed over ranks.
    "o_proj.weight": (1, "query heads"),
    "down_proj.weight": (1, "intermediate"),
}


@dataclass(frozen=True)
class Shard:
    """The slice [start, stop) of dimension `dim` that one rank holds; it may be empty."""

    dim: int
    start: int
    stop: int


def kv_heads_per_rank(config: ModelConfig, size: int) -> int:
    """Key/value heads that each of `size` ranks holds: with more ranks than heads, a copy of one."""
    return max(config.num_key_value_heads // size, 1)


def vocab_rows_per_rank(config: ModelConfig, size: int) -> int:
    """Rows of the vocabulary in one rank's piece, ceil(V / size); the last ranks may hold fewer."""
    return -(-config.vocab_size // size)


def shard(name: str, config: ModelConfig, rank: int, size: int) -> Shard | None:
    """The part of parameter `name` that `rank` of `size` holds, or None where every rank holds all of it.

    Heads and intermediate channels split evenly. With more ranks than key/value heads, size / K neighbours
    hold the same one: rank r that of its own query heads, r * K // size. The vocabulary splits in pieces of
    ceil(V / size) rows; the last ranks may hold fewer, even none.
    """
    parts = name.rsplit(".", 2)
    dim, what = PLAN.get(".".join(parts[-2:]), (0, None))
    if what is None or size == 1:
        return None
    if what == "vocabulary":
        rows = vocab_rows_per_rank(config, size)
        return Shard(
            dim, min(rank * rows, config.vocab_size), min((rank + 1) * rows, config.vocab_size)
        )
    if what == "kv heads":
        kv_heads, d = config.num_key_value_heads, config.head_dim
        first = rank * kv_heads // size
        return Shard(dim, first * d, (first + kv_heads_per_rank(config, size)) * d)
    rows = (config.q_size if what == "query heads" else config.intermediate_size) // size
    return Shard(dim, rank * rows, (rank + 1) * rows)


def _obstacles(config: ModelConfig, size: int) -> list[str]:
    """Why `size` ranks cannot share the model, one phrase per reason; empty when they can."""
    heads, kv_heads, width = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
    )
    found = []
    if kv_heads % size and size % kv_heads:
        found.append(f"{kv_heads} key/value heads neither divide by {size} nor divide it")
    elif (
        heads % size
    ):  # with size = m K this is also "m divides H / K": no rank's heads span two KV groups
        found.append(f"{heads} query heads do not divide by {size}")
    if width % size:
        found.append(f"intermediate_size {width} does not divide by {size}")
    return found


def valid_degrees(config: ModelConfig, up_to: int = 64) -> list[int]:
    """Every tensor-parallel degree from 1 to `up_to` that can hold the model, ascending."""
    return [size for size in range(1, up_to + 1) if not _obstacles(config, size)]


def check_degree(config: ModelConfig, size: int) -> None:
    """Raises ParallelError, before any weight is read, when `size` ranks cannot share the model. The line
    says why, which degrees work, and to how many query heads to extend when that would allow `size`."""
    obstacles = _obstacles(config, size) if size >= 1 else ["a degree is at least 1"]
    if not obstacles:
        return
    line = (
        f"tensor-parallel degree {size} does not fit this model: {'; '.join(obstacles)}; "
        f"degrees that work: {', '.join(map(str, valid_degrees(config, max(64, 2 * size))))}"
    )
    if len(obstacles) == 1 and "query heads" in obstacles[0]:
        heads = (
            -(-config.num_attention_heads // size) * size
        )  # a multiple of K too, as K divides size
        line += f"; or extend to {heads} heads: tools/heads.py extend"
    raise ParallelError(line)


# ---------------------------------------------------------------------------------------------- the mesh
class Mesh:
    """The ranks that share one model. Mesh() alone is rank 0 of 1, where every collective is the identity.

    A collective is called by all ranks, in the same order, with equal shapes and dtypes; use what it returns,
    its argument may be overwritten. The result is the same on every rank, bit for bit. When a peer is gone
    it does not raise: this process ends (watch.py).
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.rank, self.size, self.device = 0, 1, torch.device(device)
        self._watch: Watch | None = None

    @classmethod
    def from_env(
        cls, device: str | torch.device | None = None, timeout_s: float | None = None
    ) -> Mesh:
        """The mesh that torchrun's variables describe, over NCCL on GPUs or gloo on CPUs; without them rank 0
        of 1 and no process group.

        device: "cuda" (this rank's own), "cpu", or None: GPUs if there is one for every rank of the node.
        timeout_s: seconds of silence after which a rank counts as stopped and all end; default
        $MINQWEN_TIMEOUT, else 60. Also how long to wait for all to arrive, then no less than 60.
        CPU ranks take cores / ranks threads each, unless the user set OMP_NUM_THREADS.
        Raises ParallelError when a variable makes no sense, a GPU is missing, or a rank does not arrive.
        """
        size, rank = _env_number("WORLD_SIZE", 1), _env_number("RANK", 0)
        local_size, local_rank = _env_number("LOCAL_WORLD_SIZE", 1), _env_number("LOCAL_RANK", 0)
        timeout = _env_number("MINQWEN_TIMEOUT", 60) if timeout_s is None else timeout_s
        if not timeout > 0 or not 0 <= rank < size:
            raise ParallelError(
                f"RANK {rank}, WORLD_SIZE {size}, timeout {timeout:g} s: expected 0 <= RANK "
                "< WORLD_SIZE and a timeout (MINQWEN_TIMEOUT) above 0"
            )
        gpus = torch.cuda.device_count()
        mesh = cls(device or ("cuda" if gpus >= local_size else "cpu"))
        if mesh.device.type == "cuda":
            if local_rank >= gpus:
                raise ParallelError(
                    f"rank {rank} needs GPU {local_rank} but this machine has {gpus}: start "
                    f"at most {gpus} ranks per node, or use device cpu"
                )
            if size > 1 or mesh.device.index is None:
                mesh.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(mesh.device)
        elif local_size > 1 and not _user_chose_threads():
            cores = (
                len(os.sched_getaffinity(0))
                if hasattr(os, "sched_getaffinity")
                else os.cpu_count() or 1
            )
            torch.set_num_threads(max(1, cores // local_size))
        if size > 1:
            mesh.rank, mesh.size = rank, size
            mesh._connect(timeout, single_node=local_size == size)
        return mesh

    def _connect(self, timeout: float, single_node: bool) -> None:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
            raise ParallelError(
                f"WORLD_SIZE is {self.size}, but "
                + (
                    "this process has a process group already: hand its mesh on instead of making another"
                    if dist.is_initialized()
                    else "torchrun's store is missing: start the ranks with torchrun"
                )
            )
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        for variable in (
            ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if single_node and loopback else ()
        ):
            os.environ.setdefault(variable, loopback[0])
        host, port = os.environ.get("MASTER_ADDR", "localhost"), _env_number("MASTER_PORT", 29500)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        try:  # two connections: one that waits inside the process group would keep the watch waiting
            mine, group = (
                dist.PrefixStore(
                    f"minqwen/{attempt}/{user}", dist.TCPStore(host, port, is_master=False)
                )
                for user in ("watch", "group")
            )
        except RuntimeError as error:
            raise ParallelError(
                f"rank {self.rank} cannot reach torchrun's store at {host}:{port}: "
                f"{str(error).splitlines()[0]}"
            ) from None
        self._watch = Watch(self.rank, self.size, timeout, mine)
        atexit.register(self.close, linger=0)
        cuda = self.device.type == "cuda"
        # The group's own timeout would end a chat whose user is thinking; silence is the watch's business.
        self._run(
            lambda: dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=group,
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(days=1),
                device_id=self.device if cuda else None,
            )
        )

    def _run(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError:
            self._watch.investigate()  # does not return if a peer is gone; otherwise the error is our own
            raise

    def all_reduce(
        self, t: torch.Tensor, op: str = "sum", dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Elementwise "sum" or "max" over ranks, any shape and dtype. With `dtype` it is taken in that and
        rounded once to t's own: the sum of bfloat16 partial results belongs in float32."""
        if self.size == 1:
            return t
        total = t.to(dtype or t.dtype).contiguous()
        operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
        self._run(lambda: dist.all_reduce(total, operation))
        return total.to(t.dtype)

    def all_gather(self, t: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Every rank's `t`, concatenated along `dim` in rank order."""
        if self.size == 1:
            return t
        parts = [
            torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(self.size)
        ]
        self._run(lambda: dist.all_gather(parts, t.contiguous()))
        return torch.cat(parts, dim)

    def broadcast(self, t: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank `src`'s `t`; the others pass any tensor of its shape and dtype."""
        if self.size == 1:
            return t
        t = t.contiguous()
        self._run(lambda: dist.broadcast(t, src))
        return t

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.all_reduce(torch.zeros(1, device=self.device)).item()

    def close(self, linger: float = 5) -> None:
        """Leaves the mesh once all ranks do, or after `linger` seconds. Safe to repeat; also runs at exit."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.leave(linger)
            if linger and dist.is_initialized():  # with work outstanding it could wait for ever
                dist.destroy_process_group()


SINGLE = Mesh()


def _env_number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise ParallelError(
            f"environment variable {name} is {os.environ[name]!r}: expected an integer"
        ) from None


def _user_chose_threads() -> bool:
    """torchrun sets OMP_NUM_THREADS=1 where the user set nothing. Its ranks inherit that, but the kernel
    still shows the environment that torchrun itself was started with."""
    if os.environ.get("OMP_NUM_THREADS") != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return "OMP_NUM_THREADS" in os.environ
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as file:
            return any(entry.startswith(b"OMP_NUM_THREADS=") for entry in file.read().split(b"\0"))
    except OSError:
        return True
