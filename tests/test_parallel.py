"""The sharding plan and the collectives."""

from __future__ import annotations

import json
import re
import socket
from collections import Counter
from datetime import timedelta

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forked import forked
from support.torchrun import torchrun

from minqwen import parallel
from minqwen.config import ModelConfig
from minqwen.errors import ParallelError
from minqwen.parallel import PLAN, SINGLE, Mesh, Shard, check_degree, shard, valid_degrees


def make(heads=28, kv_heads=4, width=18944, head_dim=2, vocab=11, tied=False):
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=3,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
    )


# ------------------------------------------------------------------------------------- the plan
def test_a_projection_split_by_rows_and_the_next_by_columns_need_one_sum():
    """What two ranks hold of an MLP, each on its own, adds up to the whole."""
    config, x = make(width=6), torch.randn(5, 3, dtype=torch.float64)
    up, down = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    total = torch.zeros(5, 3, dtype=torch.float64)
    for rank in range(2):
        rows = shard("model.layers.0.mlp.up_proj.weight", config, rank, 2)
        columns = shard("model.layers.0.mlp.down_proj.weight", config, rank, 2)
        assert (rows.dim, columns.dim) == (0, 1)
        inner = (x @ up[rows.start : rows.stop].T).relu()
        total += inner @ down[:, columns.start : columns.stop].T
    torch.testing.assert_close(total, (x @ up.T).relu() @ down.T)


@pytest.mark.parametrize(
    "size, heads, kv_heads, width, degrees",
    [
        ("0.5B", 14, 2, 4864, [1, 2]),
        ("1.5B", 12, 2, 8960, [1, 2, 4]),
        ("3B", 16, 2, 11008, [1, 2, 4, 8, 16]),
        ("7B", 28, 4, 18944, [1, 2, 4]),
        ("7B extended", 32, 4, 18944, [1, 2, 4, 8, 16, 32]),
        ("14B", 40, 8, 13824, [1, 2, 4, 8]),
        ("32B", 40, 8, 27648, [1, 2, 4, 8]),
        ("72B", 64, 8, 29568, [1, 2, 4, 8, 16, 32, 64]),
    ],
)
def test_degrees_of_the_published_sizes(size, heads, kv_heads, width, degrees):
    config = make(heads, kv_heads, width)
    assert valid_degrees(config) == degrees
    for degree in range(1, 65):
        if degree in degrees:
            check_degree(config, degree)
        else:
            with pytest.raises(ParallelError) as refusal:
                check_degree(config, degree)
            assert f"degrees that work: {', '.join(map(str, degrees))}" in str(refusal.value)


def test_the_refusal_says_what_would_help():
    def line(config, size):
        with pytest.raises(ParallelError) as caught:
            check_degree(config, size)
        return str(caught.value)

    assert line(make(), 8) == (
        "tensor-parallel degree 8 does not fit this model: 28 query heads do not divide by 8; "
        "degrees that work: 1, 2, 4; or with 32 heads: "
        "--num-attention-heads 32 (tools/heads.py extend writes them)"
    )
    check_degree(make(heads=32), 8)
    assert "3 nor divide it" in line(make(), 3)
    assert "extend" not in line(make(), 3)  # more query heads would not help
    assert "extend" not in line(make(width=18948), 8) and "18948" in line(make(width=18948), 8)
    assert "at least 1" in line(make(), 0) and "at least 1" in line(make(), -4)
    assert "\n" not in line(make(), 0) + line(make(), 3) + line(make(), 8)


@st.composite
def cases(draw):
    """A config and a degree that fits it."""
    kv_heads, group, size = (
        draw(st.integers(1, 8)),
        draw(st.integers(1, 8)),
        draw(st.integers(1, 16)),
    )
    width, head_dim = size * draw(st.integers(1, 5)), draw(st.sampled_from([2, 4, 6]))
    config = make(
        kv_heads * group, kv_heads, width, head_dim, draw(st.integers(1, 70)), draw(st.booleans())
    )
    return config, draw(st.sampled_from(valid_degrees(config, 16)))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_shards_together_cover_every_parameter(case):
    config, size = case
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for name, shape in config.parameter_shapes().items():
        shards = [shard(name, config, rank, size) for rank in range(size)]
        split = next((rule for suffix, rule in PLAN.items() if name.endswith(suffix)), None)
        if size == 1 or split is None:
            assert shards == [None] * size
            continue
        assert all(s.dim == split[0] and 0 <= s.start <= s.stop <= shape[s.dim] for s in shards)
        held = Counter(i for s in shards for i in range(s.start, s.stop))
        times = max(1, size // kv_heads) if split[1] == "kv heads" else 1
        assert held == dict.fromkeys(range(shape[split[0]]), times), name
        assert [s.start for s in shards] == sorted(s.start for s in shards)
        lengths = [s.stop - s.start for s in shards]
        assert lengths == sorted(lengths, reverse=True)
        if split[1] != "vocabulary":
            assert len(set(lengths)) == 1
        else:
            assert lengths[0] == -(-shape[0] // size)
    if size > 1:  # every query head of a rank finds its key/value head on the same rank
        for rank in range(size):
            q, k = (
                shard(f"model.layers.0.self_attn.{x}_proj.weight", config, rank, size) for x in "qk"
            )
            first, count = k.start // d, (k.stop - k.start) // d
            mine = range(q.start // d, q.stop // d)
            for i, head in enumerate(mine):
                assert head * kv_heads // heads == first + i * count // len(mine)


def test_shards_of_the_7b():
    config = make(head_dim=128, vocab=152064)
    layer = "model.layers.27."
    assert shard(layer + "self_attn.q_proj.bias", config, 3, 4) == Shard(0, 21 * 128, 28 * 128)
    assert shard(layer + "self_attn.v_proj.weight", config, 3, 4) == Shard(0, 3 * 128, 4 * 128)
    assert shard(layer + "self_attn.o_proj.weight", config, 1, 4) == Shard(1, 7 * 128, 14 * 128)
    assert shard(layer + "self_attn.o_proj.bias", config, 1, 4) is None
    assert shard(layer + "mlp.down_proj.weight", config, 1, 4) == Shard(1, 4736, 9472)
    assert shard(layer + "input_layernorm.weight", config, 1, 4) is None
    assert shard("model.norm.weight", config, 1, 4) is None
    assert shard("lm_head.weight", config, 3, 4) == Shard(0, 114048, 152064)
    assert shard(layer + "self_attn.k_proj.weight", make(32, head_dim=128), 5, 8) == Shard(
        0, 256, 384
    )
    assert shard("lm_head.weight", make(vocab=9), 6, 8) == Shard(0, 9, 9)


# ---------------------------------------------------------------------------------- collectives
def test_alone_every_collective_is_the_identity():
    t = torch.arange(6.0).reshape(2, 3)
    assert SINGLE.all_reduce(t) is t and SINGLE.all_reduce(t, "max", torch.float64) is t
    assert SINGLE.all_gather(t) is t and SINGLE.broadcast(t) is t
    SINGLE.barrier(), SINGLE.close()
    assert (SINGLE.rank, SINGLE.size, SINGLE.device) == (0, 1, torch.device("cpu"))


def test_without_torchrun_there_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Mesh.from_env("cpu").size == 1 and not torch.distributed.is_initialized()
    for name, value, message in [
        ("WORLD_SIZE", "four", "'four'"),
        ("WORLD_SIZE", "2", "torchrun"),
        ("RANK", "1", "RANK 1, WORLD_SIZE 1"),
        ("MINQWEN_TIMEOUT", "0", "above 0"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(ParallelError, match=message):
            patch.setenv(name, value)
            Mesh.from_env("cpu")


COLLECTIVES = """
import json, os, psutil, socket, torch
from minqwen.parallel import Mesh
cores = 3 * int(os.environ["WORLD_SIZE"])
os.sched_getaffinity = lambda pid: set(range(cores))  # whatever machine this is
mesh = Mesh.from_env()
r, n = mesh.rank, mesh.size
everyone = range(n)
assert mesh.device.type == "cpu" and n == int(os.environ["WORLD_SIZE"])

def noise(rank, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))

for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64):
    for shape in ((), (1,), (3, 5), (0, 4), (2, 3, 1001)):
        # Integers, so that sums are exact.
        parts = [(8 * noise(s, *shape)).round().to(dtype) for s in everyone]
        assert torch.equal(mesh.all_reduce(parts[r].clone()), sum(parts[1:], parts[0]))
        assert torch.equal(mesh.all_reduce(parts[r].clone(), "max"), torch.stack(parts).amax(0))
        assert torch.equal(mesh.broadcast(parts[r].clone(), n - 1), parts[-1])
        for dim in range(-len(shape), len(shape)):
            assert torch.equal(mesh.all_gather(parts[r], dim), torch.cat(parts, dim))

column = noise(r, 4, 6).t()  # not contiguous
assert torch.equal(mesh.all_gather(column, 0), torch.cat([noise(s, 4, 6).t() for s in everyone]))
assert torch.equal(mesh.broadcast(column.clone(), 0), noise(0, 4, 6).t())
assert torch.allclose(mesh.all_reduce(column.clone()), sum(noise(s, 4, 6).t() for s in everyone))

# It rounds once: 1 + 2 / 256 is a bfloat16, but 1 + 1 / 256 would round to 1 on the way.
small = torch.full((3,), [1, (2 if n == 2 else 1) / 256, 1 / 256, 0][r]).bfloat16()
once = mesh.all_reduce(small.clone(), dtype=torch.float32)
assert once.dtype == torch.bfloat16 and once.tolist() == [1 + 2 / 256] * 3, once

for shape in ((7,), (1000,), (64, 4099)):  # rounding errors too are the same on every rank
    total = mesh.all_reduce(noise(r, *shape))
    assert torch.equal(mesh.all_gather(total[None], 0), total.expand(n, *shape))

sockets = psutil.Process().net_connections("inet")
listens = [s.laddr.ip for s in sockets if s.status == "LISTEN" or s.type == socket.SOCK_DGRAM]
print(json.dumps([r, torch.get_num_threads(), listens, os.environ["GLOO_SOCKET_IFNAME"]]))
mesh.barrier()
mesh.close()
"""


@pytest.mark.parametrize(
    "start, size, omp_num_threads, threads", [(torchrun, 2, None, 3), (forked, 4, "1", 1)]
)
def test_collectives_agree_on_every_rank_and_listen_on_loopback(
    start, size, omp_num_threads, threads
):
    """Where the user chose no number of threads, torchrun sets 1 and says so; that is no choice."""
    done = start(size, COLLECTIVES, env={"OMP_NUM_THREADS": omp_num_threads})
    assert done.returncode == 0, done.stderr
    ranks = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert [rank[0] for rank in ranks] == list(range(size))
    for _, its_threads, listens, interface in ranks:
        assert its_threads == threads  # of 3 cores for every rank
        assert listens and set(listens) == {"127.0.0.1"} and interface in ("lo", "lo0")
    noise = re.sub(r"(?s)\n?\*+\nSetting OMP_NUM_THREADS.*?\n\*+\n", "", done.stderr)
    assert noise.strip() == ""


def test_a_program_that_is_no_store_and_says_nothing_is_not_waited_for(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        started = {
            **{"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"},
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        for name, value in started.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(parallel, "CONNECTING", timedelta(seconds=0.2))
        said = f"rank 1 cannot reach torchrun's store at 127.0.0.1:{port} .*another program's"
        for _ in range(2):  # the second is not tried again
            with pytest.raises(ParallelError, match=said):
                Mesh.from_env("cpu")
