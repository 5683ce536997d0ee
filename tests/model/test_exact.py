"""Exact arithmetic: budgets against integers, functions against decimals, and the same bits whatever changes.

Every equality of the logits has a control: native float32 gives other bits under the same change.
"""

import copy
import itertools
import json
import math
import os
import random
import struct
import subprocess
import sys
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from support.torchrun import torchrun

from minqwen.checkpoint import Checkpoint
from minqwen.config import ModelConfig, RopeScaling
from minqwen.errors import ConfigError, MinqwenError
from minqwen.lab.golden import digest, fingerprint, prompts
from minqwen.model import Batch, Exact, Native, Qwen2, attention, exact, rope

HERE = Path(__file__).parent.parent
EMBEDDED = HERE.parent / "weights" / "embedded"
FINGERPRINTS = json.loads((HERE / "data" / "fingerprints.json").read_text())
STORAGE = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def quiet_torch():
    threads = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights():
    """The embedded model: its config and its tensors by name."""
    checkpoint = Checkpoint(EMBEDDED)
    return checkpoint.config, {name: checkpoint.read(name) for name in checkpoint.names}


def build(weights, arithmetic="exact", dtype=torch.float32) -> Qwen2:
    config, tensors = weights
    return Qwen2.from_tensors(
        config, lambda name, shard: tensors[name], dtype=dtype, arithmetic=arithmetic
    )


@pytest.fixture(scope="module")
def models(weights):
    """(arithmetic, dtype) -> the embedded model."""
    return {(a, dtype): build(weights, a, dtype) for a in ("native", "exact") for dtype in STORAGE}


def random_model(seed=0, outlier=1.0, bf16=True, **changes):
    """Config and weights of a random model. outlier: a factor on one channel of the embedding and of up_proj."""
    config = ModelConfig(
        **(
            dict(
                vocab_size=128,
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=6,
                num_key_value_heads=2,
                head_dim=16,
            )
            | changes
        )
    )
    g, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in config.parameter_shapes().items():
        x = torch.randn(shape, generator=g)
        if "norm" in name:
            x = 1 + x / 5
        elif "embed" in name:
            x[:, 5] *= outlier
        elif "weight" in name:
            x /= shape[1] ** 0.5
        if "up_proj" in name:
            x[3] *= outlier
        tensors[name] = x.bfloat16() if bf16 else x
    return config, tensors


def ragged(count, longest, seed=0, vocab_size=2048):
    r = random.Random(seed)
    return [[r.randrange(vocab_size) for _ in range(r.randint(1, longest))] for _ in range(count)]


def paged(model, sequences, chunk=lambda i, done: 10**9, block_size=16, seed=0):
    """Every position's logits of every sequence, computed together.

    `chunk(i, done)` tokens of each sequence at a time, in blocks scattered over a pool whose free
    slots hold rubbish.
    """
    counts = [-(-len(s) // block_size) for s in sequences]
    blocks = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed))
    cache = model.new_cache(len(blocks), block_size)
    cache.pool.normal_(generator=torch.Generator().manual_seed(seed)).mul_(100)
    own = [some.tolist() for some in blocks[: sum(counts)].split(counts)]
    done, out = [0] * len(sequences), [[] for _ in sequences]
    while active := [i for i, s in enumerate(sequences) if done[i] < len(s)]:
        ids, lens, ends = [], [], []
        for i in active:
            end = min(done[i] + chunk(i, done[i]), len(sequences[i]))
            ids += sequences[i][done[i] : end]
            lens.append(end - done[i])
            ends.append(end)
            done[i] = end
        batch = Batch.paged(lens, ends, [own[i] for i in active], block_size)
        for i, logits in zip(active, model(torch.tensor(ids), batch, cache).split(lens)):
            out[i].append(logits)
    return [torch.cat(parts) for parts in out]


def same(a, b) -> bool:
    """All in every bit, signs of zeros too."""
    return digest(list(a)) == digest(list(b))


def alone(model, sequences):
    return [model(torch.tensor([s]))[0] for s in sequences]


# ---------------------------------------------------------------------------------------------- grids, budgets
def integers(row) -> list[int]:
    """A row of floats in units of the largest power of two that divides them all."""
    ratios = [v.as_integer_ratio() for v in row.tolist()]
    unit = max(q for _, q in ratios)
    whole = [p * (unit // q) for p, q in ratios]
    shift = min(((n & -n).bit_length() - 1 for n in whole if n), default=0)
    return [n >> shift for n in whole]


def adversarial_rows(n, dtype, seed=0):
    """Rows that sit on the edges of what the grids assume."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=g)
    rows = {
        "normal": normal,
        "outlier": normal.clone().index_fill_(0, torch.tensor(n // 2), 1e4),
        "zero": torch.zeros(n),
        "minus zero": -torch.zeros(n),
        "denormal": normal * 1e-41,
        "huge": normal * 1e37 if dtype != torch.float16 else normal * 1e4,
        "ones": torch.ones(n),
        "one": torch.eye(n)[0],
        "below one": torch.full((n,), 1 - 2.0**-8),
        "alternating": torch.ones(n) - 2 * (torch.arange(n) % 2),
        "powers": 2.0 ** -(torch.arange(n) % 24),
        "cancelling": torch.cat((normal[: n // 2], -normal[: n // 2])),
        "near a power": torch.full((n,), (1 - 2.0**-9) * (1 - 2.0**-12) / math.sqrt(n)),
    }
    return {name: row.to(dtype) for name, row in rows.items()}


def test_pow2_is_the_next_power_of_two():
    r = random.Random(0)
    values = [0.0, math.inf] + [2.0**e for e in range(-300, 300, 7)]
    values += [math.nextafter(2.0**e, d) for e in range(-300, 300, 11) for d in (0, math.inf)]
    values += [r.random() * 2.0 ** r.randint(-300, 300) for _ in range(500)]
    for a, p in zip(values, exact.pow2(torch.tensor(values, dtype=torch.float64)).tolist()):
        if a in (0.0, math.inf):
            assert p == a
        else:
            assert p / 2 < a <= p and math.frexp(p)[0] == 0.5
            root = exact.root_above(torch.tensor(a, dtype=torch.float64)).item()
            assert (
                Fraction(root) ** 2 / 4 < Fraction(a) <= Fraction(root) ** 2
                and math.frexp(root)[0] == 0.5
            )


def test_snap_rounds_half_to_even_and_never_to_minus_zero():
    r = random.Random(1)
    for e in (-140, -3, 0, 5, 120):
        unit = 2.0**e
        values = [r.uniform(-1, 1) * unit * 2.0 ** r.randint(-3, 50) for _ in range(300)]
        values += [unit * (n + 0.5) for n in range(-20, 20)] + [0.0, -0.0, -unit / 8]
        for x, y in zip(
            values, exact.snap(torch.tensor(values, dtype=torch.float64), unit).tolist()
        ):
            assert Fraction(y) == round(Fraction(x) / Fraction(unit)) * Fraction(
                unit
            )  # Python rounds half to even
            assert y or math.copysign(1, y) == 1


@pytest.mark.parametrize(
    "n, dtype",
    [
        (64, torch.float32),
        (64, torch.bfloat16),
        (64, torch.float16),
        (4864, torch.float32),
        (32768, torch.float32),
    ],
)
def test_every_partial_sum_of_a_linear_is_a_small_integer(n, dtype):
    """Of any input with any weight row: the sum of |terms| bounds all partial sums, in whatever order."""
    rows = adversarial_rows(n, dtype)
    x = torch.stack(list(rows.values()))
    snapped = {bits: exact.snap_below_norm(x, bits) for bits in {exact.X_BITS, exact.W_BITS}}
    for bits, wide in snapped.items():
        assert torch.equal(wide.to(dtype).double(), wide), "not representable in its own dtype"
        norm = x.double().norm(dim=-1, keepdim=True)
        assert (
            (wide - x.double()).abs() <= norm * 2.0**-bits
        ).all()  # half of a unit of at most 2 norm 2^-bits
    largest = 0
    left, right = (
        [integers(row) for row in snapped[bits]] for bits in (exact.X_BITS, exact.W_BITS)
    )
    for i, a in enumerate(left):  # a row with itself is the worst that Cauchy and Schwarz allow
        for b in right if n < 1000 else (right[i], right[i - 1]):
            largest = max(largest, sum(abs(p * q) for p, q in zip(a, b)))
    assert largest <= 2**53
    if dtype == torch.float32:
        assert largest > 2**50, "the budget is not used"


def test_a_linear_is_the_true_sum_whatever_the_order():
    for n, threads in ((1000, 1), (9000, 2)):
        torch.set_num_threads(threads)
        x, w = (
            torch.stack(list(adversarial_rows(n, torch.float32, seed).values())) for seed in (1, 2)
        )
        x, w = exact.snap_below_norm(x, exact.X_BITS), exact.snap_below_norm(w, exact.W_BITS)
        y = exact.product(x, w)
        picked = [(0, 0), (1, 3), (1, 1), (11, 11), (12, 12), (5, 5), (4, 0)]
        for i, j in picked:
            assert Fraction(y[i, j].item()) == sum(
                Fraction(a) * Fraction(b) for a, b in zip(x[i].tolist(), w[j].tolist())
            )
        order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
        assert torch.equal(exact.product(x[:, order], w[:, order]), y)
        assert torch.equal(
            sum(exact.product(a, b) for a, b in zip(x.split(77, 1), w.split(77, 1))), y
        )
        assert torch.equal(
            torch.stack([exact.product(row[None], w)[0] for row in x]), y
        )  # another kernel
        assert torch.equal(exact.product(x, w.float()), y)  # widened by the call
        a, b = x[:4].float(), w[:4].float()
        assert not torch.equal(a[:, order] @ b[:, order].T, a @ b.T)  # the control


def test_preparing_twice_changes_nothing_and_keeps_the_tied_embedding():
    config, tensors = random_model(tie_word_embeddings=True, bf16=False)
    model = build((config, tensors))
    first = copy.deepcopy(model.state_dict())
    assert torch.equal(first["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert first["lm_head.weight"].dtype == torch.float64
    assert not torch.equal(first["lm_head.weight"], first["model.embed_tokens.weight"].double())
    again = model.prepare().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    # rows whose norm passes a power of two when snapped
    rows = torch.full((64, 4096), 1 / 64 / (1 + 2.0**-9)) * (
        1 + torch.linspace(-1, 1, 64)[:, None] * 2.0**-22
    )
    once = exact.snap_below_norm(rows, 12)
    twice = exact.snap_below_norm(once.clone(), 12)
    assert torch.equal(exact.snap_below_norm(twice.clone(), 12), twice)


def attention_inputs(L, R=3, d=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, n, d, generator=g) * s for n, s in ((R, 8), (L, 1), (L, 1)))
    q *= 2.0 ** torch.randint(-20, 1, (1, 2, R, d), generator=g)
    v *= 2.0 ** torch.randint(-20, 20, (1, 2, L, 1), generator=g)
    v[..., ::7, :] = 0
    k, v = Exact().cached(k.transpose(1, 2), v.transpose(1, 2))
    return q, k.transpose(1, 2), v.transpose(1, 2)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=str
)  # in float64 no last rounding hides a sum
@pytest.mark.parametrize("L", [1, 5, 100, 3000])
def test_attention_does_not_depend_on_the_order_of_the_keys(L, dtype):
    q, k, v = (x.to(dtype) for x in attention_inputs(L))
    g = torch.Generator().manual_seed(1)
    order, channels = torch.randperm(L, generator=g), torch.randperm(16, generator=g)
    same_bits = {}
    for ops in (Exact(), Native()):

        def attend(q, k, v, hidden=None, order=slice(None)):
            """scores, pattern, z; the keys back in their order, those that are not seen left out"""
            seen = []
            z = ops.attend(q, k, v, hidden, 0.25, lambda name, x: seen.append(x.clone()) or x)
            return *(
                torch.zeros_like(x).index_copy_(-1, torch.arange(x.shape[-1])[order], x)[..., :L]
                for x in seen
            ), z

        more = [
            torch.cat((x, x.new_full((1, 2, 50, 16), 1e6)), 2) for x in (k, v)
        ]  # unseen keys change nothing
        hidden = torch.arange(L + 50).expand(3, -1) >= L
        runs = [
            attend(q[..., channels], k[..., channels], v),
            attend(q, k[:, :, order], v[:, :, order], order=order),
            attend(q, *more, hidden),
            attend(q, *more, hidden[:, L:]),
        ]
        same_bits[ops.name] = all(map(torch.equal, attend(q, k, v) * 4, itertools.chain(*runs)))
    assert same_bits["exact"]
    if L >= 100:
        assert not same_bits["native"]
    truth = Native().attend(q.double(), k.double(), v.double(), None, 0.25, lambda name, x: x)
    error = (Exact().attend(q, k, v, None, 0.25, lambda name, x: x) - truth).abs()
    assert (error <= 2e-7 * v.abs().amax((2, 3), keepdim=True)).all()


def test_the_sums_of_attention_stay_in_their_budgets():
    q, k, v = attention_inputs(200)
    left, right = exact.snap_below_norm(q, exact.Q_BITS)[0, 0], k[0, 0].double()
    for a in left:
        for b in right[:40]:
            assert sum(abs(m * n) for m, n in zip(integers(a), integers(b))) <= 2**53
    scores = left @ right.T
    assert Fraction(scores[0, 0].item()) == sum(
        Fraction(a) * Fraction(b) for a, b in zip(left[0].tolist(), right[0].tolist())
    )
    for vector in v[0, 0].double():  # scaled to [-1, 1], on a grid of 2^-23
        units = vector / exact.pow2(vector.abs().amax()).clamp_min(2.0**-200) * 2.0**exact.V_BITS
        assert torch.equal(units, units.round()) and units.abs().max() <= 2**exact.V_BITS
    # the longest context: the denominator, and the grid of a row of the pattern
    n = exact.CONTEXT
    flat = exact.snap(exact.exp(-torch.rand(n, dtype=torch.float64) * 1e-9), 2.0**-exact.EXP_BITS)
    units = [int(u) for u in (flat * 2.0**exact.EXP_BITS).tolist()]
    assert sum(units) <= 2**53 and Fraction(flat.sum().item()) == Fraction(
        sum(units), 2**exact.EXP_BITS
    )
    for p in (flat, torch.rand(n, dtype=torch.float64) ** 40):
        row = exact.snap(p / p.sum(), 2.0**-exact.P_BITS)
        assert sum(int(u) for u in (row * 2.0**exact.P_BITS).tolist()) * 2**exact.V_BITS <= 2**53


def test_rms_norm_does_not_depend_on_the_order_of_the_columns():
    rows = torch.stack([row for row in adversarial_rows(896, torch.float32).values()])
    weight = torch.rand(896) + 0.5
    order = torch.randperm(896, generator=torch.Generator().manual_seed(2))
    for ops, dtype, equal in (
        (Exact(), torch.float32, True),
        (Exact(), torch.float64, True),  # no last rounding hides it
        (Native(), torch.float32, False),
    ):
        x, w = rows.to(dtype), weight.to(dtype)
        assert (
            torch.equal(
                ops.rms_norm(x[:, order], w[order], 1e-6), ops.rms_norm(x, w, 1e-6)[:, order]
            )
            is equal
        )
    truth = Native().rms_norm(rows.double(), weight.double(), 1e-6)
    assert (
        (Exact().rms_norm(rows, weight, 1e-6) - truth).abs() <= truth.abs() * 1.3e-7 + 1e-44
    ).all()
    largest = max(
        sum(n * n for n in integers(exact.snap(r, exact.pow2(r.abs().amax()) * 2.0**-19)))
        for r in rows.double()
    )
    assert largest <= 2**53


# ---------------------------------------------------------------------------------------------- functions
def test_exp_is_within_its_bound_and_the_same_in_any_grouping():
    r = random.Random(0)
    xs = [r.uniform(-1, 1) * 10 ** r.uniform(-8, 2.85) for _ in range(4000)] + [
        math.log(2) * (n + 0.5) for n in range(-900, 900)
    ]
    xs = [x for x in xs if -708 <= x <= 709] + [0.0, -0.0, -708.0, 709.0]
    y = exact.exp(torch.tensor(xs, dtype=torch.float64))
    with localcontext() as context:
        context.prec = 30
        worst = max(abs(Decimal(b) / Decimal(a).exp() - 1) for a, b in zip(xs, y.tolist()))
    assert worst < Decimal("2.3e-16")
    assert exact.exp(torch.zeros(1, dtype=torch.float64)) == 1
    assert exact.snap(
        exact.exp(torch.tensor([-math.inf, -1e9], dtype=torch.float64)), 2.0**-36
    ).tolist() == [0, 0]
    assert exact.exp(torch.tensor([math.nan], dtype=torch.float64)).isnan()
    x = torch.tensor(xs * 20, dtype=torch.float64)
    assert same([exact.exp(x)], [torch.cat([exact.exp(part) for part in x.split(1001)])])
    assert same([exact.exp(x.view(-1, 4).T)], [exact.exp(x).view(-1, 4).T])


def test_sqrt_is_heron_and_quotients_are_correctly_rounded():
    """IEEE 754 defines quotients; torch.sqrt of float64 may be MKL's, one in 150 of which is off by a bit."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(20000, generator=g, dtype=torch.float64) * 2.0 ** torch.randint(
        -60, 60, (20000,), generator=g
    )
    assert (1 / x).tolist() == [1 / v for v in x.tolist()]
    assert (x / x.flip(0)).tolist() == [a / b for a, b in zip(x.tolist(), x.flip(0).tolist())]

    def heron(v):  # in Python's floats
        (bits,) = struct.unpack("<q", struct.pack("<d", v))
        (s,) = struct.unpack("<d", struct.pack("<q", (bits >> 1) + (1023 << 51)))
        for _ in range(4):
            s = (v / s + s) * 0.5
        return s

    assert exact.sqrt(x).tolist() == [heron(v) for v in x.tolist()]
    assert all(
        abs(a / math.sqrt(b) - 1) < 3e-16 for a, b in zip(exact.sqrt(x).tolist(), x.tolist())
    )


def test_cosines_and_sines_are_the_nearest_float32():
    g = torch.Generator().manual_seed(0)
    angles = torch.cat(
        [
            torch.rand(20000, generator=g) * 131072,
            torch.arange(131072.0)[::13],
            torch.rand(1000) * 1e-3,
            torch.arange(1, 5000) * (math.pi / 2),
            torch.zeros(1),
            torch.tensor([2.0**20]),
        ]
    )
    for mine, function in zip(exact.cos_sin(angles), (math.cos, math.sin)):
        truth = torch.tensor([function(a) for a in angles.tolist()], dtype=torch.float64)
        ulp = torch.nextafter(mine.abs(), torch.tensor(2.0)) - mine.abs()
        assert ((mine.double() - truth).abs() <= 0.5000001 * ulp.double()).all()


@pytest.mark.parametrize(
    "theta, d, scaling",
    [
        (1e6, 128, None),
        (1e6, 64, None),
        (1e4, 16, None),
        (1e7, 128, None),
        (1e6, 128, RopeScaling(4.0, 32768)),
        (1e6, 64, RopeScaling(2.5, 1024, truncate=False)),
    ],
)
def test_rope_tables_are_native_ones_but_for_the_last_bit(theta, d, scaling):
    config = random_model(head_dim=d, rope_theta=theta, rope_scaling=scaling)[0]
    cos, sin = Exact().rotary_table(config, 300, torch.float32)
    other = rope.rotary_table(config, 300, torch.float32)
    inv_freq, factor = rope.inverse_frequencies(config, torch.float64)
    angle_error = 300 * inv_freq.max() * 2.0**-22  # two float32 roundings of frequency and angle
    assert all((a - b).abs().max() <= angle_error * factor for a, b in zip((cos, sin), other))
    with localcontext() as context:
        context.prec = 40
        for i in range(0, d, 2):
            nearest = torch.tensor(
                float(Decimal(theta) ** (Decimal(i) / d)), dtype=torch.float64
            ).float()
            assert exact.float32(Decimal(theta) ** (Decimal(i) / d)) == nearest.item()
    if scaling is None:
        mine = torch.tensor(
            [exact.float32(Decimal(theta) ** (Decimal(i) / d)) for i in range(0, d, 2)]
        )
        assert int((1 / mine != rope.inverse_frequencies(config)[0]).sum()) <= d // 32


# ---------------------------------------------------------------------------------------------- invariances
def arithmetics(models, dtype):
    """(model, whether its bits stay). Rounding to bfloat16 hides most differences of the control."""
    yield models["exact", dtype], True
    if dtype == torch.float32:
        yield models["native", dtype], False


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_batch_composition_and_position(models, dtype):
    sequences = ragged(33, 40)
    for model, equal in arithmetics(models, dtype):
        expected = alone(model, sequences)
        for members in ([0], [31, 7], [3, 1, 30, 20, 8], list(range(33)), list(range(32, -1, -1))):
            got = paged(model, [sequences[i] for i in members])
            assert same(got, [expected[i] for i in members]) or not equal
        assert same(got, expected[::-1]) is equal
        width = min(len(s) for s in sequences[1:4])
        square = torch.tensor([s[:width] for s in sequences[1:4]])
        assert same(model(square), [e[:width] for e in expected[1:4]]) or not equal


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_chunked_recomputed_and_decoded(models, dtype):
    sequences = ragged(3, 20, seed=1) + [list(range(100, 210))]
    r = random.Random(3)
    chunks = {
        "1": lambda i, done: 1,
        "7": lambda i, done: 7,
        "32": lambda i, done: 32,
        "64": lambda i, done: 64,
        "random": lambda i, done: r.randint(1, 30),
        "prefill, then decode": lambda i, done: 1 if done else 90,
    }
    for model, equal in arithmetics(models, dtype):
        expected = alone(model, sequences)
        equals = {
            label: same(paged(model, sequences, chunk), expected) for label, chunk in chunks.items()
        }
        assert all(equals.values()) if equal else not any(equals.values()), equals


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_page_size_and_placement(models, dtype, monkeypatch):
    sequences = ragged(4, 130, seed=4)
    for model, equal in arithmetics(models, dtype):
        expected = alone(model, sequences)
        equals = [
            same(paged(model, sequences, lambda i, done: 9, size, seed), expected)
            for seed, size in enumerate((1, 7, 16, 128, 1, 128))
        ]
        # native gathers pages into the same matrices: it is the steps, 9 tokens at a time, that move its bits
        assert all(equals) if equal else not all(equals)
    for rows in (1, 7, 10**9):
        monkeypatch.setattr(attention, "tile_rows", lambda device, scores_per_row: rows)
        assert same(
            paged(models["exact", dtype], sequences), alone(models["exact", dtype], sequences)
        )


def more_heads(weights, per_group, seed=0):
    """The same model with `per_group` query heads for each key/value head: new q rows are random, and new
    columns of o_proj zero, at the end of every group."""
    config, tensors = weights
    K, d, G = config.num_key_value_heads, config.head_dim, config.group_size
    g, out = torch.Generator().manual_seed(seed), {}
    for name, x in tensors.items():
        if "q_proj" in name:
            new = torch.randn(K, (per_group - G) * d, *x.shape[1:], generator=g) * 1000
            x = torch.cat((x.unflatten(0, (K, G * d)), new.to(x)), 1).flatten(0, 1)
        elif "o_proj" in name:
            x = torch.cat(
                (x.unflatten(1, (K, G * d)), x.new_zeros(len(x), K, (per_group - G) * d)), 2
            ).flatten(1)
        out[name] = x
    return config.replace(num_attention_heads=K * per_group), out


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_28_32_and_56_query_heads(weights, models, dtype):
    sequences = ragged(4, 60, seed=5)
    for model, equal in arithmetics(models, dtype):
        expected, differ = alone(model, sequences), 0
        for per_group, seed in ((8, 0), (8, 1), (14, 0)):
            model = build(more_heads(weights, per_group, seed), model.ops.name, dtype)
            differ += not same(alone(model, sequences), expected)
            differ += not same(paged(model, sequences, lambda i, done: 9), expected) if equal else 0
        assert differ == 0 if equal else differ > 0


RANKS = """
import sys, torch
sys.path.insert(0, {here!r})
from minqwen import Mesh
from minqwen.model import Qwen2
from minqwen.parallel import shard
from test_exact import *
mesh = Mesh.from_env("cpu")
checkpoint = Checkpoint(EMBEDDED)
config, tensors = checkpoint.config, {{name: checkpoint.read(name) for name in checkpoint.names}}
if mesh.size > 4:
    config, tensors = more_heads((config, tensors), 8)
def read(name, part):
    return tensors[name] if part is None else tensors[name].narrow(part.dim, part.start, part.stop - part.start)
sequences = ragged(3, 40, seed=6)
torch.set_grad_enabled(False)
for dtype in STORAGE:
    for arithmetic in ("exact", "native"):
        model = Qwen2.from_tensors(config, read, dtype=dtype, mesh=mesh, arithmetic=arithmetic)
        out = digest(paged(model, sequences, lambda i, done: 11))
        if mesh.rank == 0:
            print(arithmetic, dtype, out, flush=True)
mesh.close()
"""


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_tensor_parallel_degree(models, degree):
    """8 ranks share the 4 key/value heads, two to each, with the 28 query heads extended to 32."""
    result = torchrun(degree, RANKS.format(here=str(HERE)), timeout=300)
    assert result.returncode == 0, result.stderr
    got = {
        (a, dtype): sha for a, dtype, sha in (line.split() for line in result.stdout.splitlines())
    }
    sequences = ragged(3, 40, seed=6)
    for (name, dtype), model in models.items():
        if name == "exact" or dtype == torch.float32:
            assert (got[name, str(dtype)] == digest(alone(model, sequences))) is (
                name == "exact"
            ), (name, dtype)


def test_number_of_threads():
    weights = random_model(hidden_size=64, intermediate_size=4864)
    for dtype in STORAGE:
        for name, equal in (("exact", True), ("native", dtype != torch.float32)):
            model, out = build(weights, name, dtype), []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                out.append(model(torch.arange(100)[None]))
            assert same(*out) is equal, (name, dtype)


INSTRUCTIONS = """
import sys, torch
from minqwen.lab.golden import digest, fingerprint, prompts
from minqwen.model import Qwen2
torch.set_num_threads(1)
native = Qwen2.from_pretrained({model!r}, dtype="float32")
print(digest([native(ids) for ids in prompts(native.config.vocab_size)]), *(fingerprint({model!r}, d) for d in {dtypes}))
"""


def test_instruction_set_of_the_math_libraries():
    code = INSTRUCTIONS.format(model=str(EMBEDDED), dtypes=list(FINGERPRINTS))
    native = set()
    settings = [
        {},
        {"MKL_CBWR": "COMPATIBLE"},
        {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "AVX2"},
        {"ATEN_CPU_CAPABILITY": "avx2"},
    ]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", **setting},
        )
        for setting in settings
    ]
    for run in runs:
        control, *digests = run.communicate(timeout=300)[0].split()
        assert run.returncode == 0 and digests == list(FINGERPRINTS.values())
        native.add(control)
    if (
        "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    ):  # elsewhere there may be nothing to choose from
        assert len(native) > 1


@pytest.mark.parametrize("dtype", FINGERPRINTS)
def test_the_frozen_fingerprint(dtype):
    """On any machine. If a change of the arithmetic is intended: `python tools/golden.py fingerprint` prints new ones."""
    assert fingerprint(EMBEDDED, dtype) == FINGERPRINTS[dtype]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", FINGERPRINTS)
def test_a_gpu_gives_the_cpus_bits(dtype):
    assert fingerprint(EMBEDDED, dtype, device="cuda") == FINGERPRINTS[dtype]
    native = Qwen2.from_pretrained(EMBEDDED, dtype=dtype)
    ids = prompts(native.config.vocab_size)
    assert digest([native(i) for i in ids]) != digest([native.cuda()(i.cuda()) for i in ids])


def test_widening_a_block_at_a_time_and_watching_change_nothing(weights, models):
    ids = torch.tensor([ragged(1, 90, seed=8)[0]])
    for dtype in STORAGE:
        expected = models["exact", dtype](ids)
        narrow = build(weights, Exact(widen=False), dtype)
        assert narrow.model.layers[0].mlp.up_proj.weight.dtype == dtype
        assert models["exact", dtype].model.layers[0].mlp.up_proj.weight.dtype == torch.float64
        assert same(narrow(ids), expected)
        logits, seen = models["exact", dtype].run_with_cache(ids)
        assert (
            same(logits, expected)
            and (seen["layers.0.attn.pattern"].sum(-1) - 1).abs().max() < 1e-9
        )


def test_float16_storage_works_too(weights):
    model, ids = build(weights, dtype=torch.float16), ragged(1, 90, seed=8)
    assert same(paged(model, ids, lambda i, done: 5), alone(model, ids))


# ---------------------------------------------------------------------------------------------- accuracy
def errors(weights, ids, arithmetics=("native", "exact"), dtype=torch.float32):
    truth = build(weights, "native", torch.float64)(ids)
    return {
        a: ((build(weights, a, dtype)(ids) - truth).norm() / truth.norm()).item()
        for a in arithmetics
    }


def test_closer_to_float64_than_native_on_the_embedded_model(weights):
    ids = torch.cat(prompts(2048), 1)
    error = errors(weights, ids)
    assert error["exact"] < 0.6 * error["native"] < 1e-6
    error = errors(weights, ids, dtype=torch.bfloat16)
    assert error["exact"] < 1.1 * error["native"]


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16 weights", "float32 weights"])
@pytest.mark.parametrize("outlier", [1.0, 100.0, 1e4])
def test_closer_to_float64_than_native_with_outliers(outlier, bf16):
    """In the median of random models; docs/exact-arithmetic.md has the worst of them."""
    ids = torch.randint(0, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    ratios, tops = [], []
    for seed in range(5):
        weights = random_model(seed, outlier, bf16, hidden_size=256, intermediate_size=1024)
        Qwen2.from_tensors(weights[0], lambda n, s: weights[1][n]).run_with_hooks(
            ids, [("*.mlp.act", lambda x, name: tops.append(x.abs().max().item()))]
        )
        error = errors(weights, ids)
        ratios.append(error["exact"] / error["native"])
    assert max(tops) > outlier
    assert sorted(ratios)[2] < 0.8 and max(ratios) < 2, ratios


# ---------------------------------------------------------------------------------------------- refusals
def test_what_cannot_be_exact_is_refused():
    config, tensors = random_model()
    with pytest.raises(ConfigError, match="float64"):
        build((config, tensors), dtype=torch.float64)
    with pytest.raises(ConfigError, match="32776.*32768"):
        Qwen2(config.replace(intermediate_size=32776), arithmetic="exact", device="meta")
    with pytest.raises(ConfigError, match="131073"):
        Exact().rotary_table(config, 131073, torch.float32)
    with pytest.raises(ConfigError, match="context"):
        x = torch.zeros(1, 1, 131073, 2)
        Exact().attend(x[:, :, :1], x, x, None, 1.0, lambda name, x: x)
    model = Qwen2(config, arithmetic="exact")
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(MinqwenError, match="prepare"):
        model(ids)
    model.load_state_dict(tensors, strict=False)
    model.prepare()
    before = model(ids)
    assert same(copy.deepcopy(model)(ids), before)
    model.model.layers[1].mlp.down_proj.weight[3, 4] += 0.1
    with pytest.raises(MinqwenError, match="prepare"):
        model(ids)
    model.prepare()
    assert not same(model(ids), before)
