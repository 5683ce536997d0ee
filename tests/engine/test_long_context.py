"""Numerics at the far end of a YaRN context of 131,072 tokens, against float64.

What float32 loses there it loses in the rotary angles: position * frequency is rounded to float32,
as in transformers, so that an angle of 131,071 radians is off by up to half a unit in the last
place, 2^-8, and by the frequency's own rounding, 131,072 * 2^-24 = 2^-7: 0.012 radians in all. With
a table that is rounded from float64 nothing else is lost.

And whether the engine, chunk by chunk and block by block, finds a needle, as far as the embedded
model can.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from support.paths import EMBEDDED

from minqwen import LLM, Batch, ModelConfig, Qwen2, SamplingParams
from minqwen.config import RopeScaling
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


HAYSTACK = [  # of the King James Version, from chapters that the embedded model was not trained on
    "Make no friendship with an angry man; and with a furious man thou shalt not go:",
    "The Father loveth the Son, and hath given all things into his hand.",
    "But man dieth, and wasteth away: yea, man giveth up the ghost, and where is he?",
    "And Hiram sent to the king sixscore talents of gold.",
    "The rich ruleth over the poor, and the borrower is servant to the lender.",
    "He shall come down like rain upon the mown grass: as showers that water the earth.",
    "My flesh and my skin hath he made old; he hath broken my bones.",
    "All our enemies have opened their mouths against us.",
    "And they departed from Dophkah, and encamped in Alush.",
]


@pytest.mark.parametrize("verses, tokens, least", [(2, 70, 36), (3, 90, 36), (9, 220, 28)])
def test_a_needle_is_found(embedded_model, embedded_tokenizer, verses, tokens, least):
    """48 questions. Its card says how far the skill of a model of 1,024 tokens goes."""
    llm = LLM(
        embedded_model,
        tokenizer=embedded_tokenizer,
        max_num_batched_tokens=32,
        max_num_seqs=8,
        block_size=7,
        num_blocks=500,
        max_model_len=400,
        seed=0,
    )
    llm.defaults = llm.defaults.__class__.from_dir(EMBEDDED, embedded_model.config)
    found = {}
    for hidden in (True, False):
        rng, chats, answers = random.Random(verses), [], []
        for _ in range(48):
            name, number = (
                rng.choice(["Aaron", "Moses", "Ruth", "Peter", "Hannah"]),
                rng.randrange(1000, 10000),
            )
            text = rng.sample(HAYSTACK, verses)
            if hidden:
                text.insert(rng.randrange(verses + 1), f"The secret number of {name} is {number}.")
            text = " ".join([*text, f"What is the secret number of {name}?"])
            chats.append([{"role": "user", "content": text}])
            answers.append(f"{number}.")
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
        found[hidden] = sum(o.outputs[0].text == answer for o, answer in zip(outputs, answers))
        length = sum(len(o.prompt_token_ids) for o in outputs) / 48
    assert 0.7 * tokens < length < 1.3 * tokens
    assert found[True] >= least and found[False] == 0, found
