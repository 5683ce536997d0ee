"""Tensor parallelism: the plan of which rank holds which rows, and the mesh of ranks.

Data parallelism: with a smaller tensor-parallel size than there are ranks, neighbours share one
copy of the model, a replica, and the replicas complete different requests (engine/replicas.py).

Every rank runs the same program on the same requests (SPMD, started by `torchrun`); only tensors
cross ranks. The plan is Megatron-LM's (Shoeybi et al. 2019, arXiv:1909.08053): split a projection
by its output rows and the next one by its input columns; then one sum over ranks finishes both.

Who listens on the network when all ranks run on one node: gloo and NCCL bind to loopback only
(from_env sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME unless the user did). torchrun's own store
listens on every interface, on two ports (on one with `--master-addr 127.0.0.1 --master-port N`). It
has no password and no option for loopback: on a network that you do not trust use a firewall, or a
network namespace that has only loopback.

On several nodes gloo uses the interface by which a node reaches torchrun's store (from_env sets
GLOO_SOCKET_IFNAME unless the user did). NCCL chooses by itself; NCCL_SOCKET_IFNAME overrules it.
Ranks listen there on ports that the system chooses, without a password, like the store.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from minqwen.checks import optional_integer
from minqwen.config import ModelConfig
from minqwen.errors import ParallelError, is_first_rank
from minqwen.watch import FAREWELL, Watch
from minqwen.watch import goes_on as goes_on  # the rooms above call it

# How long a collective may take. A short time would end a chat whose user is thinking. The watch
# notices a silent rank.
PATIENCE = timedelta(days=1)
CONNECTING = timedelta(seconds=20)  # to torchrun's store, which is there before the ranks are
ANSWERING = timedelta(minutes=5)  # of that store; the watch is less patient
PARCEL = 4 << 20  # bytes; torchrun's store takes no more than 8 MiB at once
SIOCGIFADDR = 0x8915  # Linux: the request for an interface's address

# ------------------------------------------------------------------------------------- the plan
# Suffix of a parameter's name -> (dimension that is split, what it is split by). A parameter that
# is not here is whole on every rank: the norms, and o_proj.bias, which is added once after the sum.
# Column-parallel parameters split dim 0, their output. Row-parallel ones split dim 1, their input;
# their partial results are summed over ranks.
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
    """Key/value heads that each of `size` ranks holds: a copy of one, if there are more ranks."""
    return max(config.num_key_value_heads // size, 1)


def vocab_rows_per_rank(config: ModelConfig, size: int) -> int:
    """Rows of the vocabulary in one rank's piece, ceil(V / size); the last ranks may hold fewer."""
    return _ceil_divide(config.vocab_size, size)


def shard(name: str, config: ModelConfig, rank: int, size: int) -> Shard | None:
    """The part of parameter `name` that `rank` of `size` holds; None if every rank holds all of it.

    Heads and intermediate channels split evenly. With more ranks than key/value heads, size / K
    neighbours hold the same head: rank r holds head r * K // size, which its own query heads use.
    The vocabulary splits in pieces of ceil(V / size) rows; the last ranks may hold fewer, or none.
    """
    suffix = ".".join(name.split(".")[-2:])
    if size == 1 or suffix not in PLAN:
        return None
    dim, split_by = PLAN[suffix]
    if split_by == "vocabulary":
        rows, last = vocab_rows_per_rank(config, size), config.vocab_size
        return Shard(dim, min(rank * rows, last), min((rank + 1) * rows, last))
    if split_by == "kv heads":
        rows = kv_heads_per_rank(config, size) * config.head_dim
        start = rank * config.num_key_value_heads // size * config.head_dim
        return Shard(dim, start, start + rows)
    whole = config.q_size if split_by == "query heads" else config.intermediate_size
    rows = whole // size
    return Shard(dim, rank * rows, (rank + 1) * rows)


def valid_degrees(config: ModelConfig, up_to: int = 64) -> list[int]:
    """Every tensor-parallel degree from 1 to `up_to` that can hold the model, ascending."""
    return [size for size in range(1, up_to + 1) if not _obstacles(config, size)]


def check_degree(config: ModelConfig, size: int) -> None:
    """Raises ParallelError, before any weight is read, when `size` ranks cannot share the model.

    The line says why, which degrees work, and to how many query heads to extend if that would help.
    """
    obstacles = _obstacles(config, size) if size >= 1 else ["a degree is at least 1"]
    if not obstacles:
        return
    degrees = ", ".join(map(str, valid_degrees(config, max(64, 2 * size))))
    line = (
        f"tensor-parallel degree {size} does not fit this model: {'; '.join(obstacles)}; "
        f"degrees that work: {degrees}"
    )
    if len(obstacles) == 1 and "query heads" in obstacles[0]:
        # K divides `size` here, or there would be no obstacle: the result is a multiple of K too.
        heads = _ceil_divide(config.num_attention_heads, size) * size
        line += (
            f"; or with {heads} heads: --num-attention-heads {heads} "
            "(tools/heads.py extend writes them)"
        )
    raise ParallelError(line)


def _obstacles(config: ModelConfig, size: int) -> list[str]:
    """Why `size` ranks cannot share the model, one phrase for each reason; empty when they can."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = config.intermediate_size
    found = []
    if kv_heads % size and size % kv_heads:
        found.append(f"{kv_heads} key/value heads neither divide by {size} nor divide it")
    elif heads % size:
        # Where size = m * K this also says that m does not divide H / K. If m divides it, the query
        # heads of every rank use one key/value head.
        found.append(f"{heads} query heads do not divide by {size}")
    if width % size:
        found.append(f"intermediate_size {width} does not divide by {size}")
    return found


def _ceil_divide(a: int, b: int) -> int:
    return -(-a // b)


# ------------------------------------------------------------------------------------- the mesh
class Mesh:
    """The ranks that share one model. Mesh() is rank 0 of 1: its collectives return their argument.

    All ranks call the same collectives in the same order, with equal shapes and dtypes. Use what a
    collective returns, because its argument may be overwritten. The result is the same on every
    rank, bit for bit. When a peer is gone or does not come, a collective does not raise: watch.py
    ends the process.

    rank, size: this rank's number in its replica, and how many ranks a replica has. replica,
    replicas: the number of this replica, and how many there are. world: the mesh of all ranks of
    all replicas, with collectives of its own; where there is one replica it is this mesh.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.rank, self.size, self.device = 0, 1, torch.device(device)
        self.replica, self.replicas = 0, 1
        self.world: Mesh = self
        self._group: dist.ProcessGroup | None = None  # None: of all ranks
        self._post: dist.Store | None = None
        self._watch: Watch | None = None
        self._joined_early = False

    @classmethod
    def from_env(
        cls,
        device: str | torch.device | None = None,
        timeout_s: float | None = None,
        tensor_parallel_size: int | None = None,
    ) -> Mesh:
        """The mesh that torchrun's variables describe, over NCCL on GPUs or gloo on CPUs. Without
        these variables it is rank 0 of 1, and there is no process group.

        device: "cuda" (this rank's own GPU), "cpu", or None: GPUs if the node has one per rank.
        timeout_s: seconds of silence, or of absence from a collective in which others wait, after
        which a rank counts as stopped and all ranks end; default $MINQWEN_TIMEOUT, else 60.
        Arriving may take as long, and in any case 60 s.
        tensor_parallel_size: how many ranks share a copy of the model; None: all. Replicas are made
        of neighbours: with 2 of 4, ranks 0 and 1 are replica 0.
        CPU ranks take cores / ranks threads each, unless the user set OMP_NUM_THREADS.
        Raises ParallelError when a variable makes no sense, a GPU is missing, a rank does not
        arrive, or the ranks cannot be divided into replicas of that size.
        """
        size, rank = _env_number("WORLD_SIZE", 1), _env_number("RANK", 0)
        local_size, local_rank = _env_number("LOCAL_WORLD_SIZE", 1), _env_number("LOCAL_RANK", 0)
        timeout = _env_number("MINQWEN_TIMEOUT", 60) if timeout_s is None else timeout_s
        if not timeout > 0 or not 0 <= rank < size:
            raise ParallelError(
                f"RANK {rank}, WORLD_SIZE {size}, timeout {timeout:g} s: expected 0 <= RANK "
                "< WORLD_SIZE and a timeout (MINQWEN_TIMEOUT) above 0"
            )
        ranks = _ranks_of_replica(size, tensor_parallel_size)
        mesh = cls(device or ("cuda" if torch.cuda.device_count() >= local_size else "cpu"))
        if mesh.device.type == "cuda":
            mesh.device = _gpu_of(mesh.device, rank, local_rank, only=size == 1)
            torch.cuda.set_device(mesh.device)
        else:
            _share_cores(local_size)
        if size > 1:
            mesh.rank, mesh.size = rank, size
            mesh._connect(timeout, single_node=local_size == size, ranks_of_replica=ranks)
        return mesh if ranks == size else mesh._divided(ranks)

    def _divided(self, ranks: int) -> Mesh:
        """This rank's replica, where this mesh is that of all ranks."""
        mesh = Mesh(self.device)
        mesh.world, mesh._watch = self, self._watch
        mesh.replica, mesh.rank = divmod(self.rank, ranks)
        mesh.replicas, mesh.size = self.size // ranks, ranks
        if ranks > 1:
            # A DeviceMesh would do the same, but cannot be told how long a collective may take.
            mesh._group, _ = dist.new_subgroups(ranks, timeout=PATIENCE)
        return mesh

    def _connect(self, timeout: float, single_node: bool, ranks_of_replica: int) -> None:
        """Starts the watch and the process group, each with its own connection to torchrun's store.

        On one connection, a process group that waits for something would keep the watch waiting.
        """
        self._check_torchrun()
        if single_node:
            _bind_to_loopback()
        else:
            _bind_towards(os.environ.get("MASTER_ADDR", "localhost"))
        watched, grouped = _store("watch"), _store("group")
        node = _env_number("GROUP_RANK", 0)
        self._watch = Watch(self.rank, self.size, timeout, watched, node, ranks_of_replica)
        if ranks_of_replica < self.size:
            self._post = _store("post")
        atexit.register(self.close, at_exit=True)
        try:
            self._start_group(grouped)
        except RuntimeError as error:
            if single_node:
                raise
            interface = os.environ.get("GLOO_SOCKET_IFNAME", "the address of this host's name")
            raise ParallelError(
                f"rank {self.rank} of {self.size} cannot reach the others over {interface} "
                f"({str(error).splitlines()[0]}): set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME on "
                "GPUs) on each node to the interface that leads to the other nodes"
            ) from None

    def _start_group(self, grouped: dist.Store) -> None:
        """The process group, whose ranks find each other through the store `grouped`."""
        cuda = self.device.type == "cuda"
        self._run(
            lambda: dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=grouped,
                rank=self.rank,
                world_size=self.size,
                timeout=PATIENCE,
                device_id=self.device if cuda else None,
            )
        )

    def _check_torchrun(self) -> None:
        if dist.is_initialized():
            raise ParallelError(
                f"WORLD_SIZE is {self.size}, but this process has a process group already: "
                "hand its mesh on instead of making another"
            )
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise ParallelError(
                f"WORLD_SIZE is {self.size}, but torchrun's store is missing: "
                "start the ranks with torchrun"
            )

    def _join(self, collective: Callable[[], object], patient: bool = False) -> None:
        """One collective, counted: the watch names a rank that does not join it."""
        with self._joining(patient):
            self._run(collective)

    @contextlib.contextmanager
    def _joining(self, patient: bool = False) -> Iterator[None]:
        if not self._joined_early:
            self._begin(patient)
        self._joined_early = False
        yield
        if self._watch is not None and self.device.type == "cpu":
            self._watch.finish()

    def _begin(self, patient: bool = False) -> None:
        if self._watch is not None:
            self._watch.begin(patient, of_all=self._of_all)

    def join_early(self) -> None:
        """Count this rank, from now on, as one that has joined the next collective.

        What it does until then may take for ever: it waits for its user, or for what the other
        ranks leave in the post. Meanwhile it notices when another rank does not come.
        """
        if not self._alone() and not self._joined_early:
            self._begin()
            self._joined_early = True

    @property
    def _of_all(self) -> bool:
        """Whether this is the mesh of all ranks of several replicas."""
        return self._post is not None

    def _run(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError:
            if self._watch is not None:
                self._watch.investigate()  # it returns only if no peer is to blame
            raise

    def _alone(self) -> bool:
        """Whether there is nobody to exchange anything with.

        A replica of one rank still tells the watch that it goes on: other replicas wait for it.
        """
        if self.size == 1 and self._watch is not None:
            self._watch.note()
        return self.size == 1

    def all_reduce(self, t: Tensor, op: str = "sum", dtype: torch.dtype | None = None) -> Tensor:
        """Elementwise "sum" or "max" over ranks, any shape and dtype.

        With `dtype` it is computed in that and rounded once to t's own: the sum of bfloat16 partial
        results belongs in float32.
        """
        if self._alone():
            return t
        total = t.to(dtype or t.dtype).contiguous()
        operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
        self._join(lambda: dist.all_reduce(total, operation, self._group))
        return total.to(t.dtype)

    def all_gather(self, t: Tensor, dim: int = -1) -> Tensor:
        """Every rank's `t`, concatenated along `dim` in rank order."""
        if self._alone():
            return t
        t = t.contiguous()
        parts = [torch.empty_like(t) for _ in range(self.size)]
        self._join(lambda: dist.all_gather(parts, t, self._group))
        return torch.cat(parts, dim)

    def broadcast(self, t: Tensor, src: int = 0, patient: bool = False) -> Tensor:
        """Rank `src`'s `t`; the others pass any tensor of its shape and dtype.

        patient: the others wait however long `src` takes, because it runs code of which nobody
        knows how long it takes. Otherwise a rank that does not come within the timeout ends the
        run. Where `src` waits for its user it calls `join_early`, and nobody need be patient.
        """
        if self._alone():
            return t
        t = t.contiguous()
        self._join(lambda: dist.broadcast(t, group=self._group, group_src=src), patient)
        return t

    def broadcast_bytes(self, data: bytes | None, patient: bool = False) -> bytes | None:
        """Rank 0's bytes, or None, on every rank."""
        if self.size == 1:
            return data
        length = torch.tensor([-1 if data is None else len(data)], device=self.device)
        size = int(self.broadcast(length, patient=patient))
        if size < 0:
            return None
        shared = torch.zeros(size, dtype=torch.uint8)
        if self.rank == 0 and data:
            shared = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return self.broadcast(shared.to(self.device)).cpu().numpy().tobytes()

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, on every rank."""
        lengths = self.all_gather(torch.tensor([len(data)], device=self.device)).tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        rows = self.all_gather(padded.to(self.device)).view(self.size, -1).cpu()
        return [rows[r, :length].numpy().tobytes() for r, length in enumerate(lengths)]

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.all_reduce(torch.zeros(1, device=self.device)).item()

    def post(self, name: str, data: bytes) -> None:
        """Leave bytes for whoever fetches them, without waiting. Only where there are replicas.

        They lie in torchrun's store until somebody fetches them. A name is used once.
        """
        post = self._post
        assert post is not None, "a post is kept where there are several replicas"
        self._run(lambda: _put(post, name, data))

    def fetch(self, name: str) -> bytes | None:
        """The bytes that somebody has posted under this name, once; None if nobody has yet."""
        post = self._post
        assert post is not None, "a post is kept where there are several replicas"
        found: list[bytes] = []
        self._run(lambda: found.extend(_take(post, name)))
        return found[0] if found else None

    def close(self, linger: float = 5, at_exit: bool = False) -> None:
        """Leaves the mesh once all ranks do, those of all replicas, or after `linger` seconds. A
        second call does nothing. It also runs when the process exits."""
        if self.world is not self:
            self.world.close(linger, at_exit)
            self._watch = None
            return
        watch, self._watch = self._watch, None
        if watch is None:
            return
        watch.leave(FAREWELL if at_exit else linger)
        # At exit a collective may be unfinished, and this would wait for it for ever.
        if not at_exit and dist.is_initialized():
            dist.destroy_process_group()


SINGLE = Mesh()


def says_why_it_ends() -> bool:
    """Whether this process, which fails before it has met the other ranks, is the one to say why.

    Rank 0 is, if no other was. Another one is if rank 0 does not fail too, within some seconds.
    """
    first = is_first_rank()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return first
    try:
        failures, watched = _store("failures"), _store("watch")
    except ParallelError:
        return first
    if first:
        failures.set("0", "")
        return watched.add("ended", 1) == 1
    deadline = time.monotonic() + FAREWELL
    while time.monotonic() < deadline and not watched.check(["who/0"]):
        if failures.check(["0"]):
            return False
        time.sleep(0.02)
    return watched.add("ended", 1) == 1


def _store(user: str) -> dist.Store:
    """A new connection to torchrun's store. Each user, after each restart, has its own keys."""
    host, port = os.environ.get("MASTER_ADDR", "localhost"), _env_number("MASTER_PORT", 29500)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if (host, port) not in _unreachable:
        store = _connected(host, port)
        if not isinstance(store, str):
            return dist.PrefixStore(f"minqwen/{attempt}/{user}", store)
        _unreachable[host, port] = store
    raise ParallelError(
        f"rank {_env_number('RANK', 0)} cannot reach torchrun's store at {host}:{port} "
        f"({_unreachable[host, port]}): is the port another program's?"
    )


_unreachable: dict[tuple[str, int], str] = {}  # stores that nobody tries again, and why


def _connected(host: str, port: int) -> dist.TCPStore | str:
    """The store at this address, or why there is none.

    A thread asks for it: PyTorch waits for ever where another program listens and says nothing.
    """
    found: list[dist.TCPStore | str] = []

    def connect() -> None:
        try:
            store = dist.TCPStore(host, port, is_master=False, timeout=CONNECTING)
            store.set_timeout(ANSWERING)
            found.append(store)
        except RuntimeError as error:
            found.append(str(error).splitlines()[0])

    thread = threading.Thread(target=connect, name="minqwen-store", daemon=True)
    thread.start()
    thread.join(1.25 * CONNECTING.total_seconds())
    return found[0] if found else "it does not answer"


def _ranks_of_replica(ranks: int, wanted: int | None) -> int:
    """How many ranks share a copy of the model. Raises ParallelError if it cannot be `wanted`."""
    optional_integer("tensor_parallel_size", wanted, 1, error=ParallelError)
    if wanted is None or (wanted <= ranks and ranks % wanted == 0):
        return wanted or ranks
    if wanted > ranks:
        started = f"{ranks} rank{'s were' if ranks > 1 else ' was'} started"
        raise ParallelError(
            f"tensor_parallel_size is {wanted}, but {started}: start the script with "
            f"torchrun --nproc-per-node {wanted}"
        )
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    raise ParallelError(
        f"tensor_parallel_size is {wanted}, but {ranks} ranks were started, expected "
        f"{', '.join(map(str, divisors))}"
    )


def _put(store: dist.Store, name: str, data: bytes) -> None:
    """Write bytes in parcels; the name itself comes last."""
    parcels = range(0, len(data), PARCEL)
    for start in parcels:
        store.set(f"{name}/{start}", data[start : start + PARCEL])  # type: ignore[arg-type]  # it takes bytes
    store.set(name, str(len(data)))


def _take(store: dist.Store, name: str) -> list[bytes]:
    """What `_put` wrote, which is then gone; an empty list if it is not there yet."""
    if not store.check([name]):
        return []
    parcels = []
    for start in range(0, int(store.get(name)), PARCEL):
        parcels.append(store.get(f"{name}/{start}"))
        store.delete_key(f"{name}/{start}")
    store.delete_key(name)
    return [b"".join(parcels)]


def _env_number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise ParallelError(
            f"environment variable {name} is {os.environ[name]!r}: expected an integer"
        ) from None


def _gpu_of(device: torch.device, rank: int, local_rank: int, only: bool) -> torch.device:
    """The GPU with this rank's number on its node; the `only` rank may have named another."""
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise ParallelError(
            f"rank {rank} needs GPU {local_rank} but this machine has {gpus}: start "
            f"at most {gpus} ranks per node, or use device cpu"
        )
    if only and device.index is not None:
        return device
    return torch.device("cuda", local_rank)


def _share_cores(ranks: int) -> None:
    """Gives each of several ranks on this node its share of the cores, unless the user chose."""
    if ranks == 1 or _user_chose_threads():
        return
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // ranks))


def _user_chose_threads() -> bool:
    """Whether the user set OMP_NUM_THREADS. If not, torchrun sets it to 1 for its ranks; but the
    kernel still shows the environment that torchrun itself was started with."""
    if os.environ.get("OMP_NUM_THREADS") != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return "OMP_NUM_THREADS" in os.environ
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as file:
            return any(entry.startswith(b"OMP_NUM_THREADS=") for entry in file.read().split(b"\0"))
    except OSError:
        return True


def _bind_to_loopback() -> None:
    """gloo and NCCL use loopback, where there is one and the user chose no interface."""
    for _, interface in socket.if_nameindex():
        if interface in ("lo", "lo0"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def _bind_towards(host: str) -> None:
    """gloo uses the interface by which this node reaches `host`, unless the user chose one.

    By itself gloo takes the address that this node's own name has here. That is often a loopback
    address, which no other node can reach.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = _address_towards(host)
    # A name that leads to loopback on its own node leads elsewhere on the others.
    if address.startswith("127.") and host not in ("localhost", "127.0.0.1"):
        return
    for _, interface in socket.if_nameindex():
        if _address_of(interface) == address:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
            return


def _address_towards(host: str) -> str:
    """This node's IPv4 address on the way to `host`; "" if there is no such way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # this chooses the way and sends nothing
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def _address_of(interface: str) -> str | None:
    """The IPv4 address of a network interface. Only Linux tells it in this way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24])
        except OSError:
            return None
