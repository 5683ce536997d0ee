"""`sample` against the definition, written row by row."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from support.sampling import INF, NAN, by_hand, logits_like, make_row, random_row

from minqwen.sampling.draw import bad_word_ids, sample
from minqwen.sampling.params import SamplingParams


def test_greedy_takes_the_lowest_of_equal_ids():
    x = torch.zeros(2, 300, dtype=torch.bfloat16)
    x[0, [40, 41, 299]] = 2.0
    x[1] = -INF
    x[1, [7, 9]] = -5.0
    p = SamplingParams(temperature=0)
    assert sample(x, [make_row(p)] * 2)[0] == [40, 7]
    x[0, 299] = 2.015625
    assert sample(x, [make_row(p)] * 2)[0] == [299, 7]


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
            row.ids.append(max(token, 0))
        assert sample(logits, rows)[0] == [by_hand(x, row) for x, row in zip(logits, rows)]
    assert min(kinds.values()) > 20


def test_sample_takes_logits_that_are_not_contiguous_and_padded_masks():
    rng = np.random.default_rng(5)
    logits = logits_like(rng, 6, 700)
    rows = [random_row(rng, 700, seed=i) for i in range(6)]
    wide = torch.zeros(6, 3, 700)
    wide[:, 1] = logits
    assert sample(wide[:, 1], rows)[0] == sample(logits, rows)[0]


def test_a_row_that_cannot_be_drawn_is_minus_one_and_harms_no_other():
    rng = np.random.default_rng(1)
    logits = logits_like(rng, 10, 200)
    greedy, random = (
        SamplingParams(temperature=0, logprobs=2),
        SamplingParams(top_p=0.9, logprobs=2),
    )
    logits[0, 5], logits[2, 5], logits[4, 6], logits[6, 7] = NAN, NAN, INF, INF
    nothing = torch.zeros(200, dtype=torch.bool)
    rows = [make_row(greedy if i % 4 < 2 else random, [1], [2], seed=i) for i in range(10)]
    rows[8].mask = rows[9].mask = nothing
    tokens, logprobs = sample(logits, rows)
    assert [i for i, t in enumerate(tokens) if t < 0] == [0, 2, 4, 6, 8, 9]
    for i in (1, 3, 5, 7):
        alone, its = sample(logits[i : i + 1], rows[i : i + 1])
        assert alone == [tokens[i]] and its == [logprobs[i]]
    assert [i for i, entry in enumerate(logprobs) if entry is None] == [0, 2, 4, 6, 8, 9]


@pytest.mark.parametrize(
    "field",
    [
        dict(repetition_penalty=2),
        dict(logit_bias={4: 1}),
        dict(logit_bias={10**30: 1}),
        dict(logit_bias={4: 1}, temperature=0),
        dict(forced_ids=[4], logprobs=1),
    ],
)
def test_a_row_that_changes_an_id_outside_the_logits_fails_alone(field):
    good = make_row(SamplingParams(temperature=0, logprobs=1))
    bad = make_row(SamplingParams(**field), [4])
    tokens, logprobs = sample(torch.zeros(3, 4), [good, bad, good])
    assert tokens == [0, -1, 0] and logprobs[1] is None and logprobs[0] == logprobs[2]


def test_an_end_or_a_bad_word_outside_the_logits_needs_no_ban():
    p = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[4, 10**30, 1])
    x = torch.tensor([[1.0, 3.0, 2.0, 2.5]])
    row = make_row(p, (), [0], eos_token_ids=(3, 9), bad_words=((7,), (0, 8)))
    assert sample(x, [row])[0] == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "cut", [dict(), dict(top_k=3), dict(top_p=0.9), dict(min_p=0.1), dict(top_k=10**30)]
)
def test_any_temperature_draws_among_what_is_allowed(dtype, cut):
    """1e39 is infinite in float32: -inf / inf is NaN, and so was the row's sum."""
    x = torch.arange(300, dtype=dtype).repeat(40, 1)
    mask = torch.zeros(300, dtype=torch.bool)
    mask[[5, 150, 299]] = True
    for temperature in (1e30, 1e38, 1e39, 1e299):
        p = SamplingParams(temperature=temperature, **cut)
        rows = [make_row(p, seed=i, mask=mask) for i in range(40)]
        tokens = sample(x, rows)[0]
        assert set(tokens) == {5, 150, 299}
        assert tokens == [by_hand(x[0], row) for row in rows]


@pytest.mark.parametrize("value", [3e38, -3e38])
@pytest.mark.parametrize("cut", [dict(), dict(top_k=3), dict(top_p=0.9), dict(min_p=0.1)])
def test_a_row_whose_scores_overflow_fails_alone(value, cut):
    x = torch.zeros(3, 300)
    x[1] = value
    hot = SamplingParams(temperature=0.1, **cut)
    alone = sample(x[:1], [make_row(hot, seed=7)])[0]
    assert sample(x, [make_row(hot, seed=7) for _ in x])[0] == [*alone, -1, *alone]
    for penalty in (1e-299, 1e299):  # 0 and infinite in float32
        bad = SamplingParams(repetition_penalty=penalty, **cut)
        tokens = sample(x, [make_row(hot, seed=7), make_row(bad, [3]), make_row(hot, seed=7)])[0]
        assert [tokens[0], tokens[2]] == alone * 2 and -1 <= tokens[1] < 300


def test_a_row_of_nothing_but_minus_infinity_fails_alone():
    x = torch.zeros(3, 300)
    x[1] = -INF
    for p in (SamplingParams(temperature=1e39, top_k=5), SamplingParams(), SamplingParams(min_p=1)):
        tokens = sample(x, [make_row(p, seed=i) for i in range(3)])[0]
        assert tokens[1] == -1 and tokens[0] >= 0 and tokens[2] >= 0


def test_bad_words():
    encode = lambda text: [ord(c) for c in text.replace(" a", "A")]  # noqa: E731  " a" is a token of its own
    wanted = ((97, 98), (65, 98), (99,), (32, 99), (97,), (65,))
    assert bad_word_ids(["ab", "c", " a"], encode) == wanted
    x = torch.zeros(1, 200)
    x[0, [98, 99]] = torch.tensor([9.0, 5.0])
    words = bad_word_ids(["ab"], encode)
    p = SamplingParams(temperature=0)
    for output, token in (([1, 97], 99), ([65], 99), ([97, 1], 98), ([], 98), ([98], 98)):
        assert sample(x, [make_row(p, [97], output, bad_words=words)])[0] == [token]


EXTREMES = {
    "temperature": [0, 1e-5, 1e39, 1.7e308],
    "top_k": [0, 1, 2**63 - 1],
    "top_p": [5e-324, 1e-9, 1.0],
    "min_p": [0, 5e-324, 1.0],
    "repetition_penalty": [5e-324, 1e-30, 1.0, 1e39, 1.7e308],
    "presence_penalty": [-2, 0, 2],
    "frequency_penalty": [-2, 0, 2],
    "logprobs": [None, 0, 2**63 - 1, -1],
    "min_tokens": [0, 2**63 - 1],
    "seed": [0, 2**64 - 1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_field_at_its_limit_stops_the_sampler(dtype):
    rng = random.Random(0)
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    for _ in range(150):
        rows = []
        for i in range(4):
            fields = {name: rng.choice(values) for name, values in EXTREMES.items()}
            params = SamplingParams(max_tokens=None, **fields)
            rows.append(make_row(params, [1, 2], [3, 4, 3], params.seed, index=i))
        tokens, entries = sample(x, rows)
        assert len(tokens) == 4 and all(-1 <= token < 50 for token in tokens)
        for row, entry in zip(rows, entries or [None] * 4):
            wanted = row.params.logprobs
            assert entry is None or len(entry) == (1 if wanted == 0 else 50)


def test_penalties_count_the_ids_that_come_between_two_steps():
    x = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    row = make_row(SamplingParams(temperature=0, presence_penalty=1.5), prompt=[0, 0])
    assert sample(x, [row])[0] == [0]  # presence_penalty looks at the output only
    row.ids += [0, 1]
    assert sample(x, [row])[0] == [0]  # 2.5, 1.5, 2, 1
    row.ids.append(0)
    assert sample(x, [row])[0] == [0]  # a second time costs nothing
    row = make_row(SamplingParams(temperature=0, frequency_penalty=1.5), prompt=[0, 0])
    row.ids += [0, 1, 0]
    assert sample(x, [row])[0] == [2]  # 1, 1.5, 2, 1
    row = make_row(SamplingParams(temperature=0, repetition_penalty=3.0), prompt=[0])
    assert sample(x, [row])[0] == [1]
    row.ids.append(1)
    assert sample(x, [row])[0] == [2]


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_a_penalty_of_one_counts_alone(name):
    """A repetition_penalty of 1 means none; these do not."""
    row = make_row(SamplingParams(temperature=0, **{name: 1.0}), [1], [0])
    assert sample(torch.tensor([[2.0, 1.5, 0.5]]), [row])[0] == [1]


def test_min_tokens_holds_the_end_back():
    x = torch.zeros(1, 10)
    x[0, [3, 4, 5]] = torch.tensor([3.0, 2.0, 1.0])
    p = dict(temperature=0, min_tokens=2, stop_token_ids=[4])
    for output, ignore, token in (([1], False, 5), ([1], True, 3), ([1, 1], False, 3)):
        row = make_row(SamplingParams(**p, ignore_eos=ignore), (), output, eos_token_ids=(3,))
        assert sample(x, [row])[0] == [token]


def test_forced_ids_come_in_order_whatever_the_logits():
    row = make_row(SamplingParams(forced_ids=[7, 3, 7], logprobs=0), prompt=[5])
    for _ in range(3):
        (token,), (entry,) = sample(torch.randn(1, 9), [row])
        row.ids.append(token)
        assert list(entry) == [token]
    assert row.ids == [5, 7, 3, 7]


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
