"""Replicas and tensor parallelism side by side, with the 7B's figures computed by hand."""

from __future__ import annotations

import pytest
import torch

from minqwen.config import ModelConfig
from minqwen.errors import ConfigError
from minqwen.lab.choices import Assessment, Best, Choice, Comparison, choices
from minqwen.lab.choices_page import as_text
from minqwen.lab.planner import CARDS, Planner
from minqwen.lab.shapes import official_config
from minqwen.model import Qwen2
from minqwen.parallel import Mesh

SEVEN = official_config("7B")
H100 = {"H100": CARDS["H100"]}
BANDWIDTH = 3350e9  # bytes per second
LIMIT = 72 * 10**9  # 0.9 of 80 GB
CONTEXT = 32_768
D, LAYERS, HEAD_DIM, CHANNELS, VOCABULARY = 3584, 28, 128, 18_944, 152_064

# GPUs of a replica, replicas, query heads, KV heads; query heads and KV heads on one GPU.
EIGHT = [
    (1, 8, 28, 4, 28, 4),
    (2, 4, 28, 4, 14, 2),
    (4, 2, 28, 4, 7, 1),
    (8, 1, 32, 4, 4, 1),
    (8, 1, 32, 8, 4, 1),
]


def weights_by_hand(gpus: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """(all weights, those without the embedding) on one GPU, in bytes of bfloat16."""
    attention = heads * HEAD_DIM * (2 * D + 1) + 2 * kv_heads * HEAD_DIM * (D + 1)
    layer = attention + 3 * D * CHANNELS // gpus + 2 * D
    embedding = D * VOCABULARY // gpus
    read = 2 * (LAYERS * layer + D + embedding)
    return read + 2 * embedding, read


def cache_by_hand(kv_heads: int) -> int:
    """Bytes per token on one GPU: keys and values in bfloat16."""
    return 2 * LAYERS * kv_heads * HEAD_DIM * 2


def compare(
    config: ModelConfig = SEVEN, gpus: int = 8, context: int = CONTEXT, batch: int = 64
) -> Comparison:
    possible = choices(config, gpus)
    return Comparison.of(possible, context=context, batch=batch, limit=LIMIT, cards=H100)


@pytest.fixture(scope="module")
def eight() -> Comparison:
    return compare()


def choice(size: int, heads: int = 28, kv_heads: int = 4) -> Choice:
    config = SEVEN.replace(num_attention_heads=heads, num_key_value_heads=kv_heads)
    return Choice(Planner(SEVEN), Planner(config, size), 8 // size)


# ---- which choices there are --------------------------------------------------------------------


def test_eight_gpus_hold_replicas_of_28_heads_or_one_model_of_32(eight):
    assert [each.name for each in eight.found] == [
        "TP 1 x 8 with 28/4 heads",
        "TP 2 x 4 with 28/4 heads",
        "TP 4 x 2 with 28/4 heads",
        "TP 8 x 1 with 32/4 heads",
        "TP 8 x 1 with 32/8 heads",
    ]
    assert [each.own_heads for each in eight.found] == [True] * 3 + [False] * 2


def ways(config: ModelConfig, gpus: int) -> list[tuple[int, int, int, int]]:
    return [
        (
            each.planner.size,
            each.replicas,
            each.planner.config.num_attention_heads,
            each.planner.config.num_key_value_heads,
        )
        for each in choices(config, gpus)
    ]


def test_choices_of_other_models_and_numbers_of_gpus():
    assert ways(SEVEN, 1) == [(1, 1, 28, 4)]
    # 3 ranks need a multiple of 3 KV heads; the MLP's channels are padded too.
    assert ways(SEVEN, 3) == [(1, 3, 28, 4), (3, 1, 36, 12)]
    # Two KV heads and four ranks: each head is on two of them, with the checkpoint's own heads.
    assert ways(official_config("3B"), 4) == [(1, 4, 16, 2), (2, 2, 16, 2), (4, 1, 16, 2)]
    # 64 is the largest degree that is looked at.
    assert max(size for size, *_ in ways(SEVEN, 128)) == 64
    # With 32 heads asked for, all degrees work with them.
    wide = SEVEN.replace(num_attention_heads=32)
    assert ways(wide, 8) == [(1, 8, 32, 4), (2, 4, 32, 4), (4, 2, 32, 4), (8, 1, 32, 4)]


def test_channels_that_the_degree_does_not_divide_are_padded():
    padded = compare(gpus=3).found[1]
    assert padded.intermediate_size == 18_945 == 3 * 6_315
    flags = "--num-attention-heads 36 --num-key-value-heads 12 --intermediate-size 18945"
    assert f"with 36/12 heads: tools/heads.py extend {flags}.\n" in as_text(compare(gpus=3))


# ---- the 7B's figures by hand -------------------------------------------------------------------


@pytest.mark.parametrize("index", range(5), ids=lambda i: f"TP {EIGHT[i][0]}, {EIGHT[i][3]} KV")
def test_memory_and_heads_on_each_gpu(eight, index):
    found, (size, replicas, heads, kv_heads, own, own_kv) = eight.found[index], EIGHT[index]
    assert (found.tensor_parallel_size, found.replicas) == (size, replicas)
    assert (found.heads, found.kv_heads) == (heads, kv_heads)
    assert (found.heads_per_gpu, found.kv_heads_per_gpu) == (own, own_kv)
    assert found.weights == weights_by_hand(size, own, own_kv)[0]
    assert found.kv_cache == 64 // replicas * CONTEXT * cache_by_hand(own_kv)
    assert found.total == found.weights + found.kv_cache + found.activations and found.fits


@pytest.mark.parametrize("index", range(5), ids=lambda i: f"TP {EIGHT[i][0]}, {EIGHT[i][3]} KV")
def test_speeds_at_best(eight, index):
    found, (size, replicas, _, _, own, own_kv) = eight.found[index], EIGHT[index]
    read, sequence = weights_by_hand(size, own, own_kv)[1], CONTEXT * cache_by_hand(own_kv)
    speed = found.speeds["H100"]
    assert speed.token_seconds == pytest.approx((read + sequence) / BANDWIDTH, rel=1e-12)
    step = (read + 64 // replicas * sequence) / BANDWIDTH
    assert speed.step_seconds == pytest.approx(step, rel=1e-12)
    assert speed.tokens_per_second == pytest.approx(64 / step, rel=1e-12)
    each = found.most_sequences // replicas
    full = found.most_sequences / ((read + each * sequence) / BANDWIDTH)
    assert speed.full_tokens_per_second == pytest.approx(full, rel=1e-12)
    matrices = LAYERS * D * (2 * own * HEAD_DIM + 2 * own_kv * HEAD_DIM + 3 * CHANNELS // size)
    pairs = CONTEXT * (CONTEXT + 1) // 2
    flops = 2 * CONTEXT * matrices + 4 * LAYERS * own * HEAD_DIM * pairs
    flops += 2 * D * VOCABULARY // size
    assert speed.first_token_seconds == pytest.approx(flops / 989e12, rel=1e-12)


def test_the_figures_that_the_page_quotes(eight):
    speeds = [each.speeds["H100"] for each in eight.found]
    alone = [f"{speed.token_seconds * 1e3:.2f}" for speed in speeds]
    assert alone == ["4.78", "2.39", "1.20", "0.68", "0.68"]
    assert [round(s.tokens_per_second) for s in speeds] == [7349, 9700, 11547, 6724, 6724]
    assert [each.most_sequences for each in eight.found] == [224, 260, 276, 142, 142]


def test_what_32_heads_on_eight_gpus_add_to_the_checkpoint(eight):
    new_heads = LAYERS * 4 * HEAD_DIM * (2 * D + 1)
    copied_kv_heads = LAYERS * 2 * 4 * HEAD_DIM * (D + 1)
    norms_of_seven_ranks = 7 * (2 * LAYERS + 1) * D
    added = 2 * (new_heads + copied_kv_heads + norms_of_seven_ranks)
    flops = 2 * LAYERS * D * HEAD_DIM * (2 * 4 + 2 * 4) + 4 * LAYERS * 4 * HEAD_DIM * CONTEXT
    own = 14_140_571_648 + 401_408 * CONTEXT
    for each in eight.found[3:]:
        assert each.extra_weights == added and each.kv_copies == 2
        assert each.extra_flops == pytest.approx(flops / own, rel=1e-9)
    # Two replicas of four: more than one copy of the model, but nothing is new in each.
    assert eight.found[2].extra_weights == 2 * 3 * 57 * D
    assert [each.extra_flops for each in eight.found[:3]] == [0, 0, 0]
    assert [each.kv_copies for each in eight.found] == [1, 1, 1, 2, 2]


def test_kv_heads_that_ranks_copy_and_copies_in_the_model_are_the_same_on_each_gpu(eight):
    ranks, model = eight.found[3:]
    assert ranks.equals_on_each_gpu(model) and not ranks.equals_on_each_gpu(eight.found[2])
    assert "are the same on each GPU" in as_text(eight)


@pytest.mark.parametrize("index", range(5), ids=lambda i: f"TP {EIGHT[i][0]}, {EIGHT[i][3]} KV")
def test_the_most_that_the_memory_holds(eight, index):
    found, (size, replicas, heads, kv_heads, own, own_kv) = eight.found[index], EIGHT[index]
    planner = choice(size, heads, kv_heads).planner
    each = found.most_sequences // replicas
    assert found.most_sequences == each * replicas
    assert planner.estimate(CONTEXT, each).total <= LIMIT
    assert planner.estimate(CONTEXT, each + 1).total > LIMIT
    share, longest = 64 // replicas, found.longest_in_memory
    assert planner.estimate(longest, share).total <= LIMIT
    assert planner.estimate(longest + 1, share).total > LIMIT
    assert found.largest_context == 32_768  # the model's own
    # By hand, but for the activations, which are less than 4 GB.
    room, per_token = LIMIT - weights_by_hand(size, own, own_kv)[0], cache_by_hand(own_kv)
    assert each * CONTEXT * per_token <= room < (each + 1) * CONTEXT * per_token + 4e9
    assert share * longest * per_token <= room < share * (longest + 1) * per_token + 4e9


def test_columns_stay_apart_where_a_small_model_leaves_room_for_a_long_context():
    rows = as_text(compare(official_config("0.5B"), batch=8)).splitlines()[2:8]
    assert [len(row.split()) for row in rows] == [15] * 6
    tiny = official_config("0.5B").replace(num_hidden_layers=1)
    assert len(as_text(compare(tiny, gpus=1, batch=1)).splitlines()[2].split()) == 15


# ---- sequences shared out -----------------------------------------------------------------------


def test_replicas_differ_by_at_most_one_sequence():
    assert choice(2).shares(9) == [3, 2, 2, 2]
    assert choice(4).shares(1) == [1, 0]
    assert choice(8, 32).shares(5) == [5]


def test_a_replica_with_fewer_sequences_is_faster_and_an_idle_one_makes_nothing():
    four, card = choice(4), CARDS["H100"]

    def rate(batch: int) -> float:
        return batch / four.planner.estimate(CONTEXT, batch).decode_seconds(card)

    assert four.tokens_per_second(card, CONTEXT, 5) == pytest.approx(rate(3) + rate(2))
    assert four.tokens_per_second(card, CONTEXT, 1) == pytest.approx(rate(1))
    assert four.tokens_per_second(card, CONTEXT, 0) == 0
    assert four.speed(card, CONTEXT, 5, most=0).step_seconds == pytest.approx(3 / rate(3))


class CountingMesh(Mesh):
    """Rank 0 of 2, whose peer sends what rank 0 sends."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.all_reduces = 2, 0

    def all_reduce(self, t, op="sum", dtype=None):
        self.all_reduces += 1
        return t

    def all_gather(self, t, dim=-1):
        return torch.cat([t, t], dim)


def test_a_forward_pass_has_as_many_all_reduces_as_are_told():
    config = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        dtype="float32",
    )
    mesh, shapes = CountingMesh(), config.parameter_shapes()

    def read(name, mine):
        whole = torch.ones(shapes[name])
        return whole if mine is None else whole.narrow(mine.dim, mine.start, mine.stop - mine.start)

    with torch.no_grad():
        Qwen2.from_tensors(config, read, mesh=mesh)(torch.tensor([[1, 2, 3]]))
    told = [each.all_reduces for each in choices(config, 2)]
    assert told == [0, 7] and mesh.all_reduces == 7


# ---- which is best for what ---------------------------------------------------------------------


def test_what_is_best_follows_from_the_figures(eight):
    assert eight.best["H100"].names() == {
        "alone": ["TP 8 x 1 with 32/4 heads", "TP 8 x 1 with 32/8 heads"],
        "together": ["TP 4 x 2 with 28/4 heads"],
        "full": ["TP 4 x 2 with 28/4 heads"],
    }
    # Short texts: the weights are most of what is read, and one copy of them is read fastest.
    short = compare(context=256, batch=8).best["H100"]
    assert (
        short.names()["together"] == short.names()["alone"] == eight.best["H100"].names()["alone"]
    )
    text = as_text(eight)
    assert "32/8 heads: 0.68 ms a token." in text
    assert "64 sequences make the most tokens per second at TP 4 x 2 with 28/4 heads: 11,5" in text


def test_what_does_not_fit_is_never_best():
    found = compare(batch=250).found  # in two replicas of four, and in four of two
    assert [each.fits for each in found] == [False, True, True, False, False]
    assert Best.of(found, "H100").together == [found[2]]
    big = compare(official_config("72B"), gpus=1)
    assert big.best["H100"] == Best([], [], [])
    assert "No choice holds a sequence of 32,768 tokens." in as_text(big)
    row = [line for line in as_text(big).splitlines() if line.startswith("1 x 1")][-1]
    assert row.split() == ["1", "x", "1", "64/8", "64/8"] + ["-"] * 5
    many = compare(batch=2000)
    row = [line for line in as_text(many).splitlines() if line.startswith("4 x 2")][-1]
    assert row.split()[5:] == ["162.6", "1.20", "-", "-", "13,525"]
    assert "No choice holds 2,000 sequences of 32,768 tokens at once." in as_text(many)
    assert many.best["H100"].together == [] and many.best["H100"].full == [many.found[2]]


def test_a_batch_that_one_step_cannot_hold_is_refused():
    assert isinstance(compare(batch=2048).found[3], Assessment)
    with pytest.raises(ConfigError, match=r"batch is 2049, expected 1 to 2048: a step of a repl"):
        compare(batch=2049)
    for wrong in (0, -1):
        with pytest.raises(ConfigError, match=f"batch is {wrong}"):
            compare(batch=wrong)
        with pytest.raises(ConfigError, match=f"gpus is {wrong}"):
            choices(SEVEN, wrong)
