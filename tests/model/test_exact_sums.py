"""Exact arithmetic's grids and budgets against integers: no sum depends on its order."""

from __future__ import annotations

import copy
import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from support.exact import adversarial_rows, build, integers, random_model

from minqwen.model import Exact, Native, exact
from minqwen.model.arithmetic import Linear
from minqwen.parallel import SINGLE


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
    """Of any input with any weight row: the sum of |terms| bounds the partial sums of any order."""
    x = adversarial_rows(n, dtype)
    snapped = {bits: exact.snap_below_norm(x, bits) for bits in {exact.X_BITS, exact.W_BITS}}
    for bits, wide in snapped.items():
        assert torch.equal(wide.to(dtype).double(), wide), "not representable in its own dtype"
        norm = x.double().norm(dim=-1, keepdim=True)
        # Half of a unit, which is at most 2 norm 2^-bits.
        assert ((wide - x.double()).abs() <= norm * 2.0**-bits).all()
    largest = 0
    left = [integers(row) for row in snapped[exact.X_BITS]]
    right = [integers(row) for row in snapped[exact.W_BITS]]
    for i, a in enumerate(left):  # a row with itself is the worst that Cauchy and Schwarz allow
        for b in right if n < 1000 else (right[i], right[i - 1]):
            largest = max(largest, sum(abs(p * q) for p, q in zip(a, b)))
    assert largest <= 2**53
    if dtype == torch.float32:
        assert largest > 2**50, "the budget is not used"


def true_product(x, w) -> Fraction:
    return sum(Fraction(a) * Fraction(b) for a, b in zip(x.tolist(), w.tolist()))


@pytest.mark.parametrize("n, threads", [(1000, 1), (9000, 2)])
def test_a_linear_is_the_true_sum_whatever_the_order(n, threads):
    torch.set_num_threads(threads)
    x = exact.snap_below_norm(adversarial_rows(n, torch.float32, seed=1), exact.X_BITS)
    w = exact.snap_below_norm(adversarial_rows(n, torch.float32, seed=2), exact.W_BITS)
    y = exact.product(x, w)
    for i, j in [(0, 0), (1, 3), (1, 1), (11, 11), (12, 12), (5, 5), (4, 0)]:
        assert Fraction(y[i, j].item()) == true_product(x[i], w[j])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    assert torch.equal(exact.product(x[:, order], w[:, order]), y)
    parts = zip(x.split(77, 1), w.split(77, 1))
    assert torch.equal(sum(exact.product(a, b) for a, b in parts), y)
    by_rows = torch.stack([exact.product(row[None], w)[0] for row in x])  # another kernel
    assert torch.equal(by_rows, y)
    assert torch.equal(exact.product(x, w.float()), y)  # widened by the call
    a, b = x[:4].float(), w[:4].float()
    assert not torch.equal(a[:, order] @ b[:, order].T, a @ b.T)  # the control


@pytest.mark.parametrize(
    "ops, equal", [(Exact(), True), (Native(), False)], ids=["exact", "native"]
)
def test_a_linear_layer_does_not_depend_on_the_order_of_its_columns(ops, equal):
    """In float64, where no last rounding hides a sum."""
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 900, generator=g, dtype=torch.float64) for _ in range(2))
    order = torch.randperm(900, generator=g)

    def layer(weight):
        linear = Linear(ops, 900, 64, dtype=torch.float64)
        linear.weight.copy_(weight)
        ops.prepare([linear], SINGLE)
        return linear

    assert torch.equal(layer(weight[:, order])(x[:, order]), layer(weight)(x)) is equal
    truth = x @ weight.T
    assert ((layer(weight)(x) - truth).abs() < 2e-6 * truth.abs().max()).all()


def test_preparing_twice_changes_nothing_and_keeps_the_tied_embedding():
    config, tensors = random_model(tie_word_embeddings=True, bf16=False)
    model = build((config, tensors))
    first = copy.deepcopy(model.state_dict())
    assert torch.equal(first["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert first["lm_head.weight"].dtype == torch.float32
    assert not torch.equal(first["lm_head.weight"], first["model.embed_tokens.weight"])
    again = model.prepare().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    # rows whose norm passes a power of two when snapped
    rows = torch.full((64, 4096), 1 / 64 / (1 + 2.0**-9)) * (
        1 + torch.linspace(-1, 1, 64)[:, None] * 2.0**-22
    )
    once = exact.snap_below_norm(rows, 12)
    twice = exact.snap_below_norm(once.clone(), 12)
    assert torch.equal(exact.snap_below_norm(twice.clone(), 12), twice)


def prepared(weight: torch.Tensor) -> torch.Tensor:
    linear = Linear(Exact(), weight.shape[1], len(weight))
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.ops.prepare([linear], SINGLE)
    return linear.weight


@pytest.mark.parametrize("last", [1.0, 1 + 2.0**-20], ids=["bfloat16 values", "float32 values"])
def test_how_many_rows_are_prepared_at_a_time_changes_nothing(monkeypatch, last):
    """What chooses a grid is asked of all rows: one value at the end decides for the first row."""
    weight = adversarial_rows(100, torch.bfloat16, seed=1).float()
    weight[-1, -1] = last
    whole = prepared(weight)
    monkeypatch.setattr(exact, "PREPARED", 300)  # three rows
    assert torch.equal(prepared(weight), whole)
    assert exact.is_bfloat16(weight) is (last == 1)


@pytest.mark.parametrize("tokens", [3, exact.MANY])
def test_how_many_rows_are_widened_at_a_time_changes_nothing(monkeypatch, tokens):
    x = exact.snap_below_norm(torch.randn(tokens, 100), exact.X_BITS)
    w = exact.snap_below_norm(torch.randn(50, 100), exact.W_BITS).float()
    whole = exact.product(x, w.double())
    monkeypatch.setattr(exact, "WIDENED" if tokens < exact.MANY else "WIDENED_FOR_MANY", 700)
    assert torch.equal(exact.product(x, w), whole)


def attention_inputs(L, R=3, d=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, n, d, generator=g) * s for n, s in ((R, 8), (L, 1), (L, 1)))
    q *= 2.0 ** torch.randint(-20, 1, (1, 2, R, d), generator=g)
    v *= 2.0 ** torch.randint(-20, 20, (1, 2, L, 1), generator=g)
    v[..., ::7, :] = 0
    k, v = Exact().cached(k.transpose(1, 2), v.transpose(1, 2))
    return q, k.transpose(1, 2), v.transpose(1, 2)


def untapped(name, x):
    return x


def attended(ops, q, k, v, hidden=None, order=None):
    """Scores, pattern and z; the keys back in their order, those that are not seen left out."""
    seen = []

    def tap(name, x):
        seen.append(x.clone())
        return x

    z = ops.attend(q, k, v, hidden, 0.25, tap)
    L = k.shape[2] if hidden is None else int((~hidden[0]).sum()) + k.shape[2] - hidden.shape[1]
    if order is not None:
        seen = [torch.zeros_like(x).index_copy_(-1, order, x) for x in seen]
    return *(x[..., :L] for x in seen), z


def same_in_any_order(ops, q, k, v) -> bool:
    """Whether no order of keys or channels, and no keys that are not seen, change a bit."""
    L, g = k.shape[2], torch.Generator().manual_seed(1)
    order, channels = torch.randperm(L, generator=g), torch.randperm(16, generator=g)
    more = [torch.cat((x, x.new_full((1, 2, 50, 16), 1e6)), 2) for x in (k, v)]
    hidden = torch.arange(L + 50).expand(3, -1) >= L
    runs = [
        attended(ops, q[..., channels], k[..., channels], v),
        attended(ops, q, k[:, :, order], v[:, :, order], order=order),
        attended(ops, q, *more, hidden),
        attended(ops, q, *more, hidden[:, L:]),
    ]
    return all(map(torch.equal, attended(ops, q, k, v) * 4, itertools.chain(*runs)))


# In float64 no last rounding hides a sum.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("L", [1, 5, 100, 3000])
def test_attention_does_not_depend_on_the_order_of_the_keys(L, dtype):
    q, k, v = (x.to(dtype) for x in attention_inputs(L))
    assert same_in_any_order(Exact(), q, k, v)
    if L >= 100:
        assert not same_in_any_order(Native(), q, k, v)
    truth = Native().attend(q.double(), k.double(), v.double(), None, 0.25, untapped)
    error = (Exact().attend(q, k, v, None, 0.25, untapped) - truth).abs()
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


def test_the_rest_of_a_pattern_stays_in_its_budget():
    """At the most keys, each half a unit of the first term away from its grid, and |v| = 1."""
    rest = Fraction(1, 2 ** (exact.P_BITS + 1)) * exact.CONTEXT
    assert rest * 2 ** (exact.P_BITS_LOW + exact.V_BITS) <= 2**53
    # A row of the first term adds up to 1 and what rounding adds to it.
    assert (1 + rest) * 2 ** (exact.P_BITS + exact.V_BITS) <= 2**53
    # The exponentials' second term: at most half a unit of the first, for the most terms.
    low = Fraction(1, 2 ** (exact.EXP_BITS + 1)) * exact.TERMS
    assert low * 2**exact.EXP_BITS_LOW <= 2**53 and exact.TERMS * 2**exact.EXP_BITS <= 2**53


@pytest.mark.parametrize("sharpness", [0.0, 3.0])
def test_attention_over_the_most_keys_has_the_true_sums(sharpness):
    """Against fractions: only the two grids of the pattern and two roundings lie between."""
    n, g = 20_000, torch.Generator().manual_seed(4)
    q = torch.randn(1, 1, 1, 8, generator=g) * sharpness
    k, v = (torch.randn(n, 1, 8, generator=g) for _ in range(2))
    k, v = (x.transpose(0, 1)[None] for x in Exact().cached(k, v))
    seen = []
    z = Exact().attend(q, k, v, None, 1.0, lambda name, x: seen.append(x.double()) or x)
    weights = [Fraction(p) for p in seen[1].flatten().tolist()]
    for channel in range(8):
        values = [Fraction(x) for x in v[0, 0, :, channel].tolist()]
        truth = sum(p * x for p, x in zip(weights, values))
        grid = sum(abs(x) for x in values) * Fraction(2, 2**exact.P_BITS_LOW)
        assert abs(Fraction(z[..., channel].item()) - truth) <= abs(truth) / 2**24 + grid


def test_rms_norm_does_not_depend_on_the_order_of_the_columns():
    rows = adversarial_rows(896, torch.float32)
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
