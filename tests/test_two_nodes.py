"""One model on two nodes: the same tokens, and one line on each node when the other is lost."""

from __future__ import annotations

import pytest
from support.nodes import INTERFACE, Nodes, two_nodes
from support.paths import ROOT
from support.tool import run_tool_here


@pytest.fixture(scope="module")
def make_nodes():
    with two_nodes() as make:
        yield make


@pytest.fixture
def nodes(make_nodes, tmp_path):
    found = make_nodes(tmp_path)
    yield found
    found.end()


# Sums without end. Rank 0 prints a line when all ranks are at work; one rank may stop then.
SUMS = """
import os, signal, sys, torch
from minqwen.parallel import Mesh
mesh = Mesh.from_env("cpu")
for step in range(10**9):
    mesh.all_reduce(torch.ones(1000))
    if step == 20 and mesh.rank == 0:
        print(os.environ["GLOO_SOCKET_IFNAME"], flush=True)
    if step == 20 and str(mesh.rank) == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGSTOP)
"""


def start_sums(nodes: Nodes, timeout_s: int = 600, stops: int | None = None) -> None:
    nodes.start(SUMS, [stops], MINQWEN_TIMEOUT=str(timeout_s))
    nodes.wait_for_output(0)


def names_only(line: str, ranks: set[int]) -> bool:
    return {rank for rank in range(4) if f"rank {rank} of 4" in line} == ranks


def test_two_nodes_give_the_tokens_of_one_process(nodes):
    args = ["In the beginning", "--temperature", "0", "--max-tokens", "20", "--arithmetic", "exact"]
    nodes.start(ROOT / "tools" / "generate.py", args)
    first, second = nodes.ended(0), nodes.ended(1)
    assert first.code == second.code == 0, first.err + second.err
    assert first.out == run_tool_here("generate.py", *args).out and not second.out


def test_a_killed_node_ends_the_one_with_the_store(nodes):
    start_sums(nodes)
    nodes.kill(1)
    ended = nodes.ended(0)
    assert ended.code != 0 and len(ended.errors) == 1, ended.err
    assert names_only(ended.errors[0], {2, 3}) and "silent" in ended.errors[0]
    assert ended.out.strip() == INTERFACE  # gloo uses the one that leads to the store


@pytest.mark.parametrize("stops", [2, 3])
def test_when_the_node_with_the_store_is_killed_the_other_ends(nodes, stops):
    # The rank that stops looks again when its neighbour has noticed, and ended.
    start_sums(nodes, stops=stops)
    stopped = nodes.wait_for_stop(1)
    nodes.kill(0)
    nodes.wait_for_end_of_others(1, stopped)
    stopped.resume()
    ended = nodes.ended(1)
    assert ended.code != 0 and len(ended.errors) == 1, ended.err
    assert names_only(ended.errors[0], {0, 1})
    assert "on node 0 cannot be reached" in ended.errors[0] and "store" in ended.errors[0]


def test_a_cut_link_ends_both_nodes_after_the_timeout(nodes):
    start_sums(nodes, timeout_s=8)
    nodes.cut()
    first, second = nodes.ended(0), nodes.ended(1)
    assert first.code != 0 and len(first.errors) == 1, first.err
    assert second.code != 0 and len(second.errors) == 1, second.err
    assert names_only(first.errors[0], {2, 3}) and "silent for 8 s" in first.errors[0]
    assert names_only(second.errors[0], {0, 1}) and "for 8 s (is the network cut?)" in second.err


def test_an_interface_that_leads_nowhere_is_named(nodes):
    nodes.start(SUMS, [None], GLOO_SOCKET_IFNAME="lo")
    err = nodes.ended(0).err + nodes.ended(1).err
    assert "cannot reach the others over lo" in err and "set GLOO_SOCKET_IFNAME" in err
