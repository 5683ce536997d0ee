"""Numerics at the far end of a YaRN context of 131,072 tokens, against float64.

What float32 loses there it loses in the rotary angles: position * frequency is rounded to float32,
as in transformers, so that an angle of 131,071 radians is off by up to half a unit in the last
place, 2^-8, and by the frequency's own rounding, 131,072 * 2^-24 = 2^-7: 0.012 radians in all. With
a table that is rounded from float64 nothing else is lost.

And whether the engine, chunk by chunk and block by block, finds a needle, as far as the embedded
model can.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from support.paths import DATA, EMBEDDED

from minqwen import LLM, Batch, ModelConfig, Qwen2, SamplingParams
from minqwen.config import RopeScaling
from minqwen.lab.tasks import Chapter, needle_questions
from minqwen.model import Native
from minqwen.model.rope import rotary_table

END = 131072
ANGLE = 2**-8 + 2**-7  # radians
CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=END,
    dtype="float32",
    rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=32768),
)


Table = tuple[torch.Tensor, torch.Tensor]  # cos and sin [END, d]


class GivenTable(Native):
    """Native with another rotary table in the place of its own."""

    def __init__(self, table: Table):
        self.table = table

    def rotary_table(self, config, length, dtype, device="cpu"):
        return self.table


def build(dtype: torch.dtype, arithmetic: str | Native = "native") -> Qwen2:
    """The model: its weights are float32 numbers in either dtype."""
    g = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=g) * (0.2 if len(shape) == 2 else 0.3) + ("norm" in name)
        for name, shape in CONFIG.parameter_shapes().items()
    }
    return Qwen2.from_tensors(
        CONFIG, lambda name, shard: weights[name], dtype=dtype, arithmetic=arithmetic
    )


@torch.inference_mode()
def logits_from(model: Qwen2, start: int, whole_context: bool) -> torch.Tensor:
    """Logits of 64 random tokens from `start` on, float64.

    whole_context: the tokens attend over blocks of a cache to all positions before them, whose keys
    and values are random; otherwise only to each other.
    """
    g = torch.Generator().manual_seed(1)
    ids, end = torch.randint(0, 97, (64,), generator=g), start + 64
    if not whole_context:
        batch = replace(Batch.dense(1, 64), positions=torch.arange(start, end))
        model.rotary(replace(batch, context_lens=(end,)))  # a table that is long enough
        return model(ids, batch).double()
    blocks = end // 256
    cache = model.new_cache(blocks, 256)
    for layer in cache.pool:
        layer.copy_(torch.randn(layer.shape, generator=g))
    return model(ids, Batch.paged([64], [end], [range(blocks)], 256), cache).double()


def error(
    table: Table | None = None, *, start: int = END - 64, whole_context: bool = True
) -> float:
    """Largest difference of float32's logits from float64's, over these' root mean square.

    table: in place of float32's own.
    """
    narrow = build(torch.float32, "native" if table is None else GivenTable(table))
    found = logits_from(narrow, start, whole_context)
    truth = logits_from(build(torch.float64), start, whole_context)
    return float((found - truth).abs().max() / truth.square().mean().sqrt())


def float64_table() -> Table:
    cos, sin = rotary_table(CONFIG, END, torch.float64)
    return cos.float(), sin.float()


def test_rotary_table_at_the_end():
    right = rotary_table(CONFIG, END, torch.float64)
    factor = float(right[0][0, 0])  # cos 0: YaRN's attention factor
    assert factor == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)
    found = max(
        float((a[-64:] - b[-64:]).abs().max())
        for a, b in zip(rotary_table(CONFIG, END, torch.float32), right)
    )
    assert 1e-4 < found < ANGLE * factor
    rounded = max(float((a[-64:] - b[-64:]).abs().max()) for a, b in zip(float64_table(), right))
    assert rounded < 2**-24 * factor


@pytest.mark.parametrize("whole_context", [False, True])
def test_logits_at_the_end_against_float64(whole_context):
    assert error(whole_context=whole_context) < ANGLE  # what the angles lose, and no more
    assert error(float64_table(), whole_context=whole_context) < 2e-5  # nothing else is lost
    assert error(start=0, whole_context=False) < 2e-5  # nor is anything at the beginning


def test_control_positions_in_bfloat16_are_seen():
    """bfloat16 has 8 bits: it cannot tell the last 256 positions apart."""
    inverse = torch.atan2(
        *(x[1, : CONFIG.head_dim // 2] for x in reversed(rotary_table(CONFIG, 2, torch.float64)))
    )
    at = torch.arange(END).bfloat16().double()[:, None] * inverse.repeat(2)
    factor = rotary_table(CONFIG, 1, torch.float64)[0][0, 0]
    wrong = tuple((f(at) * factor).float() for f in (torch.cos, torch.sin))
    assert error(wrong) > 10 * ANGLE


def test_control_a_float32_angle_is_seen_by_the_tighter_bound():
    assert error() > 10 * 2e-5


# Of the King James Version, from chapters that the embedded model was not trained on.
HAYSTACK = [Chapter("held out", (DATA / "heldout_verses.txt").read_text().splitlines())]


@pytest.mark.parametrize(
    "needles, tokens, count, least",
    [(1, 128, 32, 31), (3, 256, 24, 21), (1, 512, 16, 15), (3, 512, 16, 14), (1, 960, 12, 10)],
)
def test_a_needle_is_found(embedded_model, embedded_tokenizer, needles, tokens, count, least):
    """Numbers that lie in blocks and chunks which the question is not in, in the whole context.

    The card of the embedded model says how often it finds them without an engine.
    """
    llm = LLM(
        embedded_model,
        tokenizer=embedded_tokenizer,
        max_num_batched_tokens=96,
        max_num_seqs=8,
        block_size=7,
        num_blocks=800,
        seed=0,
    )
    questions = needle_questions(HAYSTACK, embedded_tokenizer, tokens, count, needles=needles)
    found = answered(llm, [question.prompt for question in questions])
    right = sum(text == question.answer for text, question in zip(found, questions))
    assert right >= least, f"{right} of {count}"


def test_control_without_the_needle_there_is_no_answer(embedded_model, embedded_tokenizer):
    llm = LLM(embedded_model, tokenizer=embedded_tokenizer, num_blocks=300, seed=0)
    questions = needle_questions(HAYSTACK, embedded_tokenizer, 128, 24)
    prompts = [re.sub(r" ?The secret number of \w+ is \d+\.", "", q.prompt) for q in questions]
    assert all(prompt != q.prompt for prompt, q in zip(prompts, questions))
    found = answered(llm, prompts)
    assert not any(text == question.answer for text, question in zip(found, questions))


def answered(llm: LLM, prompts: list[str]) -> list[str]:
    """What the model says greedily to each."""
    llm.defaults = llm.defaults.__class__.from_dir(EMBEDDED, llm.config)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]
