"""What a traced request sees: at every point, its own rows of every step."""

from __future__ import annotations

import torch

from minqwen import LLM, SamplingParams
from minqwen.model.trace import point_names


def test_every_point_has_what_the_whole_sequence_has(embedded_model, embedded_tokenizer):
    llm = LLM(
        embedded_model,
        tokenizer=embedded_tokenizer,
        num_blocks=40,
        block_size=4,
        max_model_len=64,
        max_num_batched_tokens=6,
        max_num_seqs=3,
    )
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    prompts = ["In the beginning God created", "And it came to pass"]
    for output in llm.generate(prompts, params, trace="*", use_tqdm=False):
        completion = output.outputs[0]
        ids = torch.tensor([output.prompt_token_ids + completion.token_ids[:-1]])
        _, whole = embedded_model.run_with_cache(ids)
        assert set(completion.trace) == set(point_names(embedded_model.config.num_hidden_layers))
        for name, seen in completion.trace.items():
            if isinstance(seen, list):  # scores and pattern of a step: [H, new tokens, context]
                assert sum(part.shape[1] for part in seen) == ids.shape[1], name
                continue
            last = name in ("final_norm.normalized", "final_norm", "logits")
            expected = whole[name][0, -3:] if last else whole[name][0]
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4, msg=name)
