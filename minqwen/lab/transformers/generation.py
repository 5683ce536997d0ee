"""`generate`: padded prompts in, the engine in between, padded sequences out."""

from __future__ import annotations

import torch
from torch import Tensor

from minqwen.config import ModelConfig
from minqwen.engine.llm import LLM
from minqwen.engine.outputs import CompletionOutput
from minqwen.errors import MinqwenError, SamplingError
from minqwen.lab.transformers.inputs import visible_tokens
from minqwen.lab.transformers.outputs import GenerateOutput
from minqwen.lab.transformers.settings import GenerationConfig, end_ids, sampling_params
from minqwen.model import Qwen2
from minqwen.model.inputs import check_ids
from minqwen.sampling.draw import Row, transform
from minqwen.sampling.logprobs import wide
from minqwen.sampling.params import SamplingParams
from minqwen.sampling.warp import warp

BLOCK_SIZE = 16  # of the engine's cache
MOST_SEQUENCES = 64  # that the engine runs at a time


def generate(
    model: Qwen2, ids: Tensor, attention_mask: Tensor | None, settings: GenerationConfig
) -> Tensor | GenerateOutput:
    """ids [B, T] and what follows, [B n, T + new]; sequences that end before others are padded."""
    check_ids(ids, model.config)
    ends = end_ids(settings.eos_token_id, model.config.vocab_size)
    pad = settings.pad_token_id
    if attention_mask is None:
        attention_mask = guessed_mask(ids, pad, ends)
    params = sampling_params(settings, ends, ids.shape[1], model.config)
    count = settings.num_return_sequences or 1
    prompts = [row for row in unpadded(ids, attention_mask) for _ in range(count)]
    completions = completed(model, prompts, params, settings.shows_logits)
    new = [completion.token_ids for completion in completions]
    filler = next(iter(ends), 0) if pad is None else pad
    sequences = torch.cat([ids.repeat_interleave(count, 0), padded(new, filler, ids)], dim=1)
    if not settings.return_dict_in_generate:
        return sequences
    if not settings.shows_logits:
        return GenerateOutput(sequences=sequences)
    logits = [wide(logits_of(completion)) for completion in completions]
    scores = [scored(*row, params) for row in zip(logits, prompts, new)]
    return GenerateOutput(
        sequences=sequences,
        scores=by_step(scores) if settings.output_scores else None,
        logits=by_step(logits) if settings.output_logits else None,
    )


def guessed_mask(ids: Tensor, pad: int | None, ends: list[int]) -> Tensor:
    """What transformers takes for padding: every pad token, unless it also ends texts."""
    return torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()


def unpadded(ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """The tokens of each row that are not hidden. Raises MinqwenError for padding on the right."""
    visible = visible_tokens(attention_mask, ids)
    for i, last in enumerate(visible[:, -1].tolist()):
        if not last:
            raise MinqwenError(
                f"attention_mask hides the last token of row {i}, after which the text would go "
                "on: pad on the left"
            )
    return [row[seen].tolist() for row, seen in zip(ids, visible)]


def completed(
    model: Qwen2, prompts: list[list[int]], params: SamplingParams, traced: bool
) -> list[CompletionOutput]:
    """What the engine adds to each prompt, drawn by torch's seed. traced: with the logits."""
    assert params.max_tokens is not None
    length = max(map(len, prompts)) + params.max_tokens
    check_length(length, params.max_tokens, model.config)
    together = min(len(prompts), MOST_SEQUENCES)
    with LLM(
        model,
        seed=int(torch.randint(2**31, ())),
        max_model_len=length,
        max_num_seqs=together,
        num_blocks=together * (-(-length // BLOCK_SIZE) + 1),
        block_size=BLOCK_SIZE,
    ) as llm:
        trace = "logits" if traced else None
        outputs = llm.generate(prompts, params, trace=trace, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def check_length(length: int, new: int, config: ModelConfig) -> None:
    if length > config.context_length:
        raise SamplingError(
            f"the longest prompt has {length - new} tokens and {new} may be new, but the model's "
            f"context is {config.context_length}: give max_new_tokens"
        )


def padded(rows: list[list[int]], filler: int, like: Tensor) -> Tensor:
    """Rows of any lengths as one tensor, with the dtype and the device of `like`."""
    longest = max(map(len, rows))
    filled = [row + [filler] * (longest - len(row)) for row in rows]
    return torch.tensor(filled, dtype=like.dtype, device=like.device)


def logits_of(completion: CompletionOutput) -> Tensor:
    """[new, V]: from which each of its tokens was drawn."""
    logits = completion.trace["logits"]
    assert isinstance(logits, Tensor)
    return logits


def scored(logits: Tensor, prompt: list[int], new: list[int], params: SamplingParams) -> Tensor:
    """The logits [new, V] after penalties, and after what narrows the choice where one draws."""
    row = Row(params=params, ids=list(prompt), num_prompt=len(prompt), seed=0)
    steps = []
    for x, token in zip(logits, new):
        (scores,) = transform(x[None].clone(), [row])
        steps.append(scores if row.greedy else warp(scores, params))
        row.ids.append(token)
    return torch.stack(steps)


def by_step(rows: list[Tensor]) -> tuple[Tensor, ...]:
    """[new, V] of each sequence as a tensor [B, V] for each step, zeros where it had ended."""
    longest = max(map(len, rows))
    together = rows[0].new_zeros(longest, len(rows), rows[0].shape[1])
    for i, row in enumerate(rows):
        together[: len(row), i] = row
    return together.unbind()
