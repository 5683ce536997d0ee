"""Log probabilities are the model's: from the logits, before any transform."""

import numpy as np
import pytest
import torch
from support.sampling import logits_like, make_row

from minqwen.sampling.draw import sample
from minqwen.sampling.logprobs import logprobs_of
from minqwen.sampling.params import SamplingParams


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
    rows = [make_row(p, [1, 2], [3], seed=0), make_row(p, [1], seed=1, mask=mask)]
    tokens, logprobs = sample(logits, rows)
    assert tokens == [3, 77] and logprobs == logprobs_of(logits, tokens, 4)


def test_a_row_that_asks_for_no_logprobs_gets_none():
    rows = [make_row(SamplingParams(logprobs=0)), make_row(SamplingParams())]
    (token, _), (first, second) = sample(torch.zeros(2, 50), rows)
    assert list(first) == [token] and second is None
    assert sample(torch.zeros(1, 50), rows[1:])[1] is None
