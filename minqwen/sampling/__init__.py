"""How the next token is chosen, and where a text stops.

From a row of logits to a token, in this order. All but the last two lines only change logits:

    forced_ids          the next of them is the token, whatever the logits are
    repetition_penalty  ids in the prompt or the output: divided by it, or multiplied if negative
    frequency_penalty   ids in the output: less the penalty times how often they are there
    presence_penalty    ids in the output: less the penalty
    logit_bias          added
    min_tokens          before that many tokens: -inf for what would end the text
    bad_words           -inf for what would complete one
    structured_outputs  -inf for what the grammar does not allow
    temperature 0       the largest logit; of equals the lowest id. The token is found
    temperature         divides
    top_k               -inf for what is less likely than the k-th
    top_p               -inf for the least likely tokens, as long as their sum is at most 1 - top_p
    min_p               -inf for what is less likely than min_p times the likeliest
    draw                a random number that depends on seed, sample and position only

`warp.py` defines the last five lines, one row at a time. `kernels.py` computes the same tokens for
many rows at once, and `draw.py` all of it for a batch. Log probabilities (`logprobs.py`) are the
model's own: they are taken before any of this.
"""
