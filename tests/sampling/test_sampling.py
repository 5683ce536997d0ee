"""Sampling: transformers' processors are the oracle of the transforms, exact distributions of the draws."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from minqwen.engine.sampling import (
    Row,
    SamplingParams,
    StopChecker,
    bad_word_ids,
    draw,
    logprobs_of,
    sample,
    uniform,
    warp,
)
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minqwen.engine import sampling
from minqwen.errors import SamplingError
from minqwen.generation_config import GenerationDefaults
from minqwen.sampling.structured import StructuredOutputs

INF, NAN = math.inf, math.nan


def logits_like(rng, rows, width, dtype=torch.float32, scale=3.0):
    """Gaussian; bfloat16 makes many ties, as in a real model's logits."""
    x = torch.from_numpy(rng.normal(0, scale, (rows, width)))
    return x.bfloat16().to(dtype) if rng.random() < 0.5 else x.to(dtype)


def random_params(rng, **fixed):
    pick = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    fields = dict(
        temperature=pick(1.0, 0.7, 0.2, 1.9, 1e-3),
        top_k=pick(0, 0, 1, 2, 20, 63, 70, 400),
        top_p=pick(1.0, 1.0, 0.9, 0.8, 0.5, 0.1, 0.999, 1e-6),
        min_p=pick(0.0, 0.0, 0.05, 0.5, 1.0),
    )
    return SamplingParams(**{**fields, **fixed})


# ----------------------------------------------------------------------------------------------------- params

BAD = {
    "n": [0, -1, 1.0, True, "1", None],
    "temperature": [-0.1, NAN, INF, "1", True, None, 1e-6],
    "top_p": [0, -0.5, 1.1, NAN, "x", None],
    "top_k": [-2, 1.5, True, None],
    "min_p": [-0.1, 1.1, NAN, None],
    "repetition_penalty": [0, -1, NAN, INF, None],
    "presence_penalty": [-2.1, 2.1, NAN, None],
    "frequency_penalty": [-2.1, 2.1, "0", None],
    "seed": [-1, 2**64, 1.5, True, "7"],
    "stop": [[""], "", [1], 5, b"x", ["a", None]],
    "include_stop_str_in_output": [1, None, "yes"],
    "stop_token_ids": [[-1], [True], [1.0], "12", 5],
    "ignore_eos": [0, None],
    "max_tokens": [0, -1, 2.0, True],
    "min_tokens": [-1, 1.5, None, 257],
    "logprobs": [-2, 1.0, True],
    "prompt_logprobs": [-2, "1", False],
    "logit_bias": [[1], {1: NAN}, {-1: 0.0}, {"1": 2.0}, {1: 101}, {1: True}],
    "bad_words": [[""], [" \n"], [3], 7],
    "structured_outputs": ["json", {"json": {}}],
    "forced_ids": [[], [-1], "12", [1.5], 3],
}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_bad_field_is_named_in_one_line(name, value):
    with pytest.raises(SamplingError) as error:
        SamplingParams(**{name: value})
    assert (
        name in str(error.value) and "expected" in str(error.value) and "\n" not in str(error.value)
    )


def test_every_field_has_a_bad_value_in_this_test():
    assert set(BAD) == set(SamplingParams.__dataclass_fields__)


def test_defaults_are_vllms_and_sequences_become_tuples():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p, p.repetition_penalty) == (
        1,
        1.0,
        1.0,
        0,
        0.0,
        1.0,
    )
    assert (p.presence_penalty, p.frequency_penalty) == (0.0, 0.0)
    assert (p.max_tokens, p.min_tokens, p.seed) == (256, 0, None)
    assert (p.stop, p.stop_token_ids, p.bad_words, p.forced_ids, p.logprobs) == (
        (),
        (),
        (),
        None,
        None,
    )
    p = SamplingParams(
        stop="x",
        stop_token_ids=np.array([3]),
        bad_words=["a"],
        logit_bias={np.int64(3): 1},
        temperature=np.float32(0.5),
        top_k=np.int64(4),
        max_tokens=None,
    )
    assert (p.stop, p.stop_token_ids, p.bad_words, p.logit_bias) == (("x",), (3,), ("a",), {3: 1.0})
    assert type(p.temperature) is float and type(p.top_k) is int and p.max_tokens is None
    assert SamplingParams(top_k=-1).top_k == -1
    assert (
        SamplingParams(structured_outputs=StructuredOutputs(regex="a+")).structured_outputs.regex
        == "a+"
    )


def test_forced_ids_set_the_length_and_exclude_stops():
    p = SamplingParams(forced_ids=torch.tensor([5, 6, 7]))
    assert p.forced_ids == (5, 6, 7) and p.max_tokens == 3 and p.ignore_eos
    spec = StructuredOutputs(regex="a")
    for other in (dict(stop="x"), dict(stop_token_ids=[1]), dict(structured_outputs=spec)):
        with pytest.raises(SamplingError, match="cannot be combined with forced_ids"):
            SamplingParams(forced_ids=[1], **other)
    for other in (dict(stop="x"), dict(min_tokens=1), dict(bad_words=["a"])):
        with pytest.raises(SamplingError, match="cannot be combined with structured_outputs"):
            SamplingParams(structured_outputs=spec, **other)


def test_from_defaults_explicit_values_win():
    d = GenerationDefaults(
        temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, max_new_tokens=2048
    )
    p = SamplingParams.from_defaults(d, top_p=1.0, max_tokens=5)
    assert (p.temperature, p.top_p, p.top_k, p.repetition_penalty, p.max_tokens) == (
        0.7,
        1.0,
        20,
        1.05,
        5,
    )
    assert SamplingParams.from_defaults(d).max_tokens == 2048
    assert SamplingParams.from_defaults(GenerationDefaults()).temperature == 0
    assert SamplingParams.from_defaults(GenerationDefaults(), seed=3) == SamplingParams(
        temperature=0, seed=3
    )


def test_check_ids():
    SamplingParams(logit_bias={9: 1.0}, stop_token_ids=[9]).check_ids(10)
    for field in (dict(logit_bias={10: 1.0}), dict(stop_token_ids=[10]), dict(forced_ids=[10])):
        with pytest.raises(
            SamplingError, match=f"{next(iter(field))} names token 10: expected ids from 0"
        ):
            SamplingParams(**field).check_ids(10)


# --------------------------------------------------------------------------------------------- random numbers


def test_philox_is_philox():
    """The three known answers published with Random123 (philox4x32-10)."""
    for seed, position, index, w0, w1 in [
        (0, 0, 0, 0x6627E8D5, 0xE169C58D),
        (2**64 - 1, 2**64 - 1, 2**64 - 1, 0x408F276D, 0x41C83B0E),
        (0x299F31D0A4093822, 0x85A308D3243F6A88, 0x0370734413198A2E, 0xD16CFE09, 0x94FDCCEB),
    ]:
        assert uniform(seed, index, position) == ((w0 >> 5) * 2**26 + (w1 >> 6)) / 2**53


@pytest.mark.parametrize(
    "key",
    [lambda i: (i, 0, 0), lambda i: (7, i, 0), lambda i: (7, 3, i)],
    ids=["seed", "sample", "position"],
)
def test_uniform_is_uniform_along_every_coordinate(key):
    u = np.array([uniform(*key(i)) for i in range(10_000)])
    assert len(set(u)) == len(u) and u.min() >= 0 and u.max() < 1
    chi2 = ((np.histogram(u, 100, (0, 1))[0] - 100) ** 2 / 100).sum()
    assert chi2 < 99 + 4 * math.sqrt(2 * 99)
    pairs = np.histogram2d(u[:-1], u[1:], 10, ((0, 1), (0, 1)))[0]  # neighbours are independent
    assert ((pairs - 99.99) ** 2 / 99.99).sum() < 99 + 4 * math.sqrt(2 * 99)


# ------------------------------------------------------------------------------------- transforms: the oracle


def transformers_warp(x, p):
    """What generate() applies, in its order, on a CPU."""
    x = x[None]
    if p.temperature != 1:
        x = TemperatureLogitsWarper(p.temperature)(None, x)
    if p.top_k > 0:
        x = TopKLogitsWarper(p.top_k)(None, x)
    if p.top_p < 1:
        x = TopPLogitsWarper(p.top_p)(None, x)
    if p.min_p > 0:
        x = MinPLogitsWarper(p.min_p)(None, x)
    return x[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_warp_is_transformers_bit_for_bit(dtype):
    rng = np.random.default_rng(0)
    dropped = swapped = 0
    for _ in range(800):
        p, width = random_params(rng), int(rng.choice([1, 2, 17, 100, 600]))
        x = logits_like(rng, 1, width, dtype, rng.choice([0.3, 3.0]))[0]
        want, got = transformers_warp(x, p), warp(x, p)
        assert torch.equal(got.sort().values, want.sort().values), p
        if not torch.equal(
            got, want
        ):  # torch.sort leaves the order of equals open: one stayed for another
            swapped += 1
            assert p.top_p < 1 and all(
                (x / p.temperature == (x / p.temperature)[i]).sum() > 1
                for i in (got != want).nonzero()
            )
        dropped += int((got == -INF).sum())
    assert dropped > 10_000 and swapped < 8


def test_warp_at_ties_and_exact_thresholds():
    differs = 0
    for n in (2, 3, 4, 5, 10, 64):
        for i in range(1, n + 1):  # i of n equal tokens are exactly top_p: the i lowest ids stay
            got, theirs = (
                f(torch.zeros(n), SamplingParams(top_p=i / n)) for f in (warp, transformers_warp)
            )
            assert torch.equal(got, torch.tensor([0.0] * i + [-INF] * (n - i))), (n, i)
            differs += (
                int((theirs == 0).sum()) != i
            )  # transformers adds float32: one token more or less
            assert abs(int((theirs == 0).sum()) - i) <= 1
    assert differs < 10
    for x in ([1.0, 1, 1, 0, 0], [0.0, 0, 0, 0], [2.0, 1, 1, 1]):
        for k in (1, 2, 3):
            p = SamplingParams(top_k=k)
            assert torch.equal(warp(torch.tensor(x), p), transformers_warp(torch.tensor(x), p))


def by_hand(logits, row):
    """One row of `sample`, transform by transform; None where nothing can be drawn."""
    p, seen, out = row.params, list(row.prompt_ids) + row.output_ids, row.output_ids
    if p.forced_ids is not None and len(out) < len(p.forced_ids):
        return p.forced_ids[len(out)]
    x = logits.double() if logits.dtype == torch.float64 else logits.float()
    if seen and p.repetition_penalty != 1:
        x = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(
            torch.tensor([seen]), x[None].clone()
        )[0]
    x = x.clone()
    for i, count in Counter(out).items():
        x[i] -= p.frequency_penalty * count + p.presence_penalty
    for i, bias in (p.logit_bias or {}).items():
        x[i] += bias
    if len(out) < p.min_tokens:
        x[list(() if p.ignore_eos else row.eos_token_ids) + list(p.stop_token_ids)] = -INF
    for *head, last in row.bad_words:
        if out[len(out) - len(head) :] == head:
            x[last] = -INF
    if row.mask is not None:
        x[~row.mask] = -INF
    if not x.max().isfinite():
        return -1
    if p.temperature == 0:
        return int((x == x.max()).nonzero()[0, 0])
    return draw(warp(x, p), uniform(row.seed, row.sample_index, len(out)))


def random_row(rng, width, seed, **fixed):
    ids = lambda n: rng.integers(0, width, rng.integers(0, n)).tolist()  # noqa: E731
    some = {}
    if rng.random() < 0.5:
        some.update(repetition_penalty=float(rng.choice([1.05, 0.8, 2.0])))
    if rng.random() < 0.3:
        some.update(
            presence_penalty=float(rng.uniform(-2, 2)), frequency_penalty=float(rng.uniform(-2, 2))
        )
    if rng.random() < 0.3:
        some.update(logit_bias={i: float(rng.uniform(-9, 9)) for i in ids(5)})
    if rng.random() < 0.3:
        some.update(
            min_tokens=int(rng.integers(9)),
            ignore_eos=bool(rng.random() < 0.3),
            stop_token_ids=ids(3),
        )
    if rng.random() < 0.3:
        some.update(temperature=0)
    p = random_params(rng, **{**some, **fixed})
    mask = torch.from_numpy(rng.random(width) < 0.5) if rng.random() < 0.3 else None
    out = ids(12)
    bad = (
        [out[-1:] + [int(rng.integers(width))], ids(3) + [0], [1]]
        if rng.random() < 0.3 and out
        else []
    )
    return Row(p, ids(30), out, seed, int(rng.integers(3)), ids(3), bad, mask)


@pytest.mark.parametrize(
    "width, dtype",
    [
        (3, torch.float32),
        (128, torch.bfloat16),
        (1000, torch.float32),
        (1000, torch.float64),
        (4321, torch.bfloat16),
        (9000, torch.float32),
    ],
)
def test_sample_is_the_definition_row_by_row(width, dtype):
    rng = np.random.default_rng(width)
    kinds = Counter()
    for trial in range(100 if width < 4000 else 25):
        rows = [random_row(rng, width, seed=100 * trial + i) for i in range(rng.integers(1, 8))]
        logits = logits_like(rng, len(rows), width, dtype, rng.choice([0.2, 3.0]))
        before = logits.clone()
        got, logprobs = sample(logits, rows)
        assert got == [by_hand(x, row) for x, row in zip(logits, rows)], [
            row.params for row in rows
        ]
        assert logprobs is None and torch.equal(logits, before)
        for token, row in zip(got, rows):  # a row that lives on keeps counting
            kinds["greedy" if row.greedy else "drawn"] += 1
            row.output_ids.append(max(token, 0))
        assert sample(logits, rows)[0] == [by_hand(x, row) for x, row in zip(logits, rows)]
    assert min(kinds.values()) > 20


def test_sample_takes_logits_that_are_not_contiguous_and_padded_masks():
    rng = np.random.default_rng(5)
    logits = logits_like(rng, 6, 700)
    rows = [random_row(rng, 700, seed=i) for i in range(6)]
    wide = torch.zeros(6, 3, 700)
    wide[:, 1] = logits
    assert sample(wide[:, 1], rows)[0] == sample(logits, rows)[0]


def test_greedy_takes_the_lowest_of_equal_ids():
    x = torch.zeros(2, 300, dtype=torch.bfloat16)
    x[0, [40, 41, 299]] = 2.0
    x[1] = -INF
    x[1, [7, 9]] = -5.0
    p = SamplingParams(temperature=0)
    assert sample(x, [Row(p, [], [], 0)] * 2)[0] == [40, 7]
    x[0, 299] = 2.015625
    assert sample(x, [Row(p, [], [], 0)] * 2)[0] == [299, 7]


def test_a_row_that_cannot_be_drawn_is_minus_one_and_harms_no_other():
    rng = np.random.default_rng(1)
    logits = logits_like(rng, 10, 200)
    greedy, random = (
        SamplingParams(temperature=0, logprobs=2),
        SamplingParams(top_p=0.9, logprobs=2),
    )
    logits[0, 5], logits[2, 5], logits[4, 6], logits[6, 7] = NAN, NAN, INF, INF
    nothing = torch.zeros(200, dtype=torch.bool)
    rows = [Row(greedy if i % 4 < 2 else random, [1], [2], i) for i in range(10)]
    rows[8].mask = rows[9].mask = nothing
    tokens, logprobs = sample(logits, rows)
    assert [i for i, t in enumerate(tokens) if t < 0] == [0, 2, 4, 6, 8, 9]
    for i in (1, 3, 5, 7):
        alone, its = sample(logits[i : i + 1], rows[i : i + 1])
        assert alone == [tokens[i]] and its == [logprobs[i]]
    assert [i for i, entry in enumerate(logprobs) if entry is None] == [0, 2, 4, 6, 8, 9]


def test_an_id_outside_the_logits_is_refused():
    for field in (dict(repetition_penalty=2), dict(logit_bias={4: 1})):
        with pytest.raises(SamplingError, match="token id 4 .* 0 to 3"):
            sample(torch.zeros(1, 4), [Row(SamplingParams(**field), [4], [], 0)])


def test_bad_words():
    encode = lambda text: [ord(c) for c in text.replace(" a", "A")]  # noqa: E731  " a" is a token of its own
    assert bad_word_ids(["ab", "c", " a"], encode) == [(97, 98), (65, 98), (99,), (97,), (65,)]
    x = torch.zeros(1, 200)
    x[0, [98, 99]] = torch.tensor([9.0, 5.0])
    words = bad_word_ids(["ab"], encode)
    p = SamplingParams(temperature=0)
    for output, token in (([1, 97], 99), ([65], 99), ([97, 1], 98), ([], 98), ([98], 98)):
        assert sample(x, [Row(p, [97], output, 0, bad_words=words)])[0] == [token]


def test_min_tokens_holds_the_end_back():
    x = torch.zeros(1, 10)
    x[0, [3, 4, 5]] = torch.tensor([3.0, 2.0, 1.0])
    p = dict(temperature=0, min_tokens=2, stop_token_ids=[4])
    for output, ignore, token in (([1], False, 5), ([1], True, 3), ([1, 1], False, 3)):
        row = Row(SamplingParams(**p, ignore_eos=ignore), [], output, 0, eos_token_ids=[3])
        assert sample(x, [row])[0] == [token]


def test_forced_ids_come_in_order_whatever_the_logits():
    p, out = SamplingParams(forced_ids=[7, 3, 7], logprobs=0), []
    for _ in range(3):
        (token,), (entry,) = sample(torch.randn(1, 9), [Row(p, [], out, 0)])
        out.append(token)
        assert list(entry) == [token]
    assert out == [7, 3, 7]


# -------------------------------------------------------------------------------------------------- the draws


@pytest.mark.parametrize(
    "params",
    [
        dict(),
        dict(temperature=0.6, top_k=12),
        dict(top_p=0.8),
        dict(min_p=0.1),
        dict(temperature=1.5, top_k=30, top_p=0.9, min_p=0.02),
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(params):
    """Chi-square over 10,000 draws: five samples of each of 40 requests at 50 positions."""
    rng = np.random.default_rng(3)
    x, p = logits_like(rng, 1, 40, scale=1.5), SamplingParams(**params)
    counts = np.zeros(40)
    for position in range(50):
        rows = [
            Row(p, [], [], seed=i // 5, sample_index=i % 5, position=position) for i in range(200)
        ]
        for token in sample(x.expand(200, -1), rows)[0]:
            counts[token] += 1
    expected = warp(x[0], p).double().softmax(-1).numpy() * counts.sum()
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    degrees = kept.sum() - 1
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < degrees + 4 * math.sqrt(
        2 * degrees
    ) + 4


def test_a_request_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(4)
    width, b = 3000, 12
    rows = [random_row(rng, width, seed=i % 3, logprobs=i % 4 or None) for i in range(b)]
    logits = logits_like(rng, b, width)
    tokens, logprobs = sample(logits, rows)
    before = torch.get_num_threads()
    for threads in (1, 2, before):
        torch.set_num_threads(threads)
        for _ in range(12):
            order = rng.permutation(b)[: rng.integers(1, b + 1)].tolist()
            again, its = sample(logits[order], [rows[i] for i in order])
            assert again == [tokens[i] for i in order]
            assert (its or [None] * len(order)) == [
                logprobs[i] for i in order
            ]  # floats equal in every bit


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_the_ends_of_the_interval_never_draw_what_is_impossible(u, monkeypatch):
    monkeypatch.setattr(sampling, "uniform", lambda *key: u)
    rng = np.random.default_rng(6)
    for width in (1, 130, 1000, 5000):
        x = logits_like(rng, 60, width, scale=5.0)
        x[:, rng.random(width) < 0.9] = -INF
        x[:, int(rng.integers(width))] = 0.0
        for params in (
            dict(),
            dict(top_k=3),
            dict(top_p=0.5),
            dict(min_p=0.3),
            dict(temperature=1e-5),
        ):
            p = SamplingParams(**params)
            tokens = sample(x, [Row(p, [], [], 0)] * 60)[0]
            for row, token in zip(x, tokens):
                assert 0 <= token < width and warp(row, p)[token] > -INF
                assert token == draw(warp(row, p), u)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, 5e-324, 1e-300, 1e-17, 0.1, 1 / 3, 1.0, 1e9]), min_size=1, max_size=30
    ),
    st.integers(0, 2**53),
)
@example([0.0, 1.0, 0.0], 2**53)
def test_pick_is_the_first_above_and_never_a_zero(weights, n):
    if not any(weights):
        return
    w = torch.tensor([weights], dtype=torch.float64)
    target = n * 2.0**-53 * float(np.cumsum(weights)[-1])
    i, rest = sampling._pick(w, torch.tensor([[target]], dtype=torch.float64))
    i, sums = int(i), [0.0, *np.cumsum(weights).tolist()]
    assert weights[i] > 0 and rest >= 0 and sums[i] <= target
    assert sums[i + 1] > target or sums[i + 1] == sums[-1]


def test_equals_that_outnumber_the_candidates_all_count():
    """500 tie with the tenth: top_k keeps them all, and top_p must know their sum before it cuts."""
    x = torch.zeros(40, 2000)
    x[:, 100:600], x[:, 700:705] = 1.0, 2.0
    for fields in (
        dict(top_k=10),
        dict(top_k=10, top_p=0.5),
        dict(top_k=10, top_p=0.02),
        dict(top_p=1e-9),
    ):
        rows = [Row(SamplingParams(**fields), [], [], seed) for seed in range(40)]
        assert sample(x, rows)[0] == [by_hand(a, row) for a, row in zip(x, rows)]


def test_a_mask_that_leaves_few_tokens_needs_one_look(monkeypatch):
    looks, largest = [], sampling._largest
    monkeypatch.setattr(sampling, "_largest", lambda x, m: looks.append(m) or largest(x, m))
    x, mask = torch.randn(1, 5000), torch.zeros(5000, dtype=torch.bool)
    mask[[3, 4999]] = True
    for fields in (dict(top_k=20), dict(top_k=20, top_p=0.9), dict(top_p=0.9), dict(min_p=0.1)):
        row = Row(SamplingParams(**fields), [], [], 1, mask=mask)
        assert sample(x, [row])[0] == [by_hand(x[0], row)]
    assert len(looks) == 4


def test_ten_thousand_near_equal_tokens_need_every_candidate():
    """top_p far beyond the first candidates: the search widens until the cut is among them."""
    rng = np.random.default_rng(8)
    x = torch.from_numpy(rng.normal(0, 0.01, (3, 10_000))).float()
    rows = [
        Row(SamplingParams(top_p=p, top_k=k), [], [], 0)
        for p, k in ((0.97, 0), (0.5, 3000), (1, 9000))
    ]
    assert sample(x, rows)[0] == [by_hand(a, row) for a, row in zip(x, rows)]


# --------------------------------------------------------------------------------------------------- logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num", [0, 1, 5, -1])
def test_logprobs_are_the_models_and_sorted(dtype, num):
    rng = np.random.default_rng(9)
    logits = logits_like(rng, 40, 333).to(dtype)
    ids = rng.integers(0, 333, 40).tolist()
    for row, i, entry in zip(logits, ids, logprobs_of(logits, ids, num)):
        lp = (row if dtype == torch.float64 else row.float()).log_softmax(-1).tolist()
        best = sorted(range(333), key=lambda j: (-lp[j], j))[: 333 if num < 0 else num]
        assert list(entry) == [i] + [j for j in best if j != i]
        for j, e in entry.items():
            assert (
                e.logprob == lp[j]
                and e.rank == 1 + sum(v > lp[j] for v in lp)
                and e.decoded_token is None
            )


def test_logprobs_do_not_know_of_sampling():
    rng = np.random.default_rng(10)
    logits = logits_like(rng, 2, 500)
    mask = torch.zeros(500, dtype=torch.bool)
    mask[77] = True
    p = SamplingParams(
        temperature=0.1, top_k=2, logit_bias={3: 50.0}, repetition_penalty=1.5, logprobs=4
    )
    tokens, logprobs = sample(logits, [Row(p, [1, 2], [3], 0), Row(p, [1], [], 1, mask=mask)])
    assert tokens == [3, 77] and logprobs == logprobs_of(logits, tokens, 4)
    rows = [Row(SamplingParams(logprobs=0), [], [], 0), Row(SamplingParams(), [], [], 0)]
    assert sample(logits, rows)[1][1] is None


# ----------------------------------------------------------------------------------------------- stop strings


def naive_stop(text, stops, include):
    """(what is shown, the stop string) of a whole text: character by character."""
    for end in range(len(text) + 1):
        for s in sorted(stops, key=len, reverse=True):
            if text[:end].find(s) >= 0:
                return text[: end if include else end - len(s)], s
    return text, None


words = st.text("ab\n\u00e9\U0001f600", min_size=1, max_size=4)


@settings(max_examples=600, deadline=None)
@given(
    st.text("ab\n\u00e9\U0001f600", max_size=14),
    st.lists(words, max_size=4),
    st.booleans(),
    st.lists(st.integers(0, 14), max_size=6),
)
@example("aab", ["ab"], False, [1, 2])
@example("abcbc", ["abcd", "bc"], False, [3])
@example("xabc", ["abc", "bc"], False, [2])
def test_stop_strings_at_every_split(text, stops, include, cuts):
    want, found = naive_stop(text, stops, include)
    checker = StopChecker(SamplingParams(stop=stops, include_stop_str_in_output=include))
    cuts = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    shown, reason = "", None
    for i, (start, end) in enumerate(zip(cuts, cuts[1:] or [len(text)])):
        piece, reason = checker.push(text[start:end], final=end == len(text))
        shown += piece
        assert want.startswith(shown)  # nothing is shown that would have to be taken back
        if reason is not None:
            break
        if end < len(text):  # and nothing is held back without need
            rest = text[len(shown) : end]
            assert not rest or any(s.startswith(rest) and s != rest for s in stops)
    assert (shown, reason) == (want, found)


def test_stop_strings_before_min_tokens_are_text():
    checker = StopChecker(SamplingParams(stop=["ab"]))
    assert checker.push("xab a", search=False) == ("xab a", None)
    assert checker.push("b") == ("b", None)
    assert checker.push("ya") == ("y", None)
    assert checker.push("", final=True) == ("a", None)
    assert checker.push("cabd") == ("c", "ab")


def test_the_last_piece_gives_up_what_was_held():
    checker = StopChecker(SamplingParams(stop=["</s>"]))
    assert checker.push("a<") == ("a", None)
    assert checker.push("/s") == ("", None)
    assert checker.push("!<", final=True) == ("</s!<", None)


# ---------------------------------------------------------------------------------------------- other devices


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("width", [151_936, 1000])
def test_cuda_draws_the_same_tokens(width):
    rng = np.random.default_rng(11)
    rows = [random_row(rng, width, seed=i, logprobs=3) for i in range(64)]
    logits = logits_like(rng, 64, width)
    tokens, logprobs = sample(logits, rows)
    again, its = sample(logits.cuda(), rows)
    assert tokens == again
    assert [a and list(a) for a in logprobs] == [b and list(b) for b in its]
