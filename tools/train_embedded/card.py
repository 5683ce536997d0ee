"""What the trained model can do, measured, and the model card that says so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

import torch

from minqwen import ModelConfig, Qwen2, Tokenizer
from minqwen.lab.tasks import (
    NAMES,
    Chapter,
    Question,
    TextLoss,
    count_correct,
    heldout_loss,
    heldout_questions,
    needle_questions,
)

NEEDLES = [(1, tokens) for tokens in (64, 128, 256, 512, 960)]  # (needles, tokens of the chat)
NEEDLES += [(3, tokens) for tokens in (128, 256, 960)]


class Marks(NamedTuple):
    """Of so many questions, so many answers were right."""

    right: int
    asked: int


@dataclass(frozen=True)
class Report:
    """What a model was measured to do."""

    text: TextLoss
    sums: Marks
    needles: dict[tuple[int, int], Marks]  # by number of needles and length of the chat

    def to_json(self) -> str:
        """One line: the losses, and [right, asked] for sums and for each kind of needle."""
        found: dict[str, float | Marks] = {
            "nats_per_token": round(self.text.nats_per_token, 4),
            "bits_per_byte": round(self.text.bits_per_byte, 4),
            "sums": self.sums,
        }
        for (needles, tokens), marks in self.needles.items():
            found[f"needle{needles}_{tokens}"] = marks
        return json.dumps(found)


def measure(model: Qwen2, tokenizer: Tokenizer, heldout: list[Chapter]) -> Report:
    """Everything the card states."""
    return _measure(model, tokenizer, heldout, heldout_questions(), 64)


def measure_briefly(model: Qwen2, tokenizer: Tokenizer, heldout: list[Chapter]) -> Report:
    """The same with a quarter of the text and of the questions."""
    return _measure(model, tokenizer, heldout[::4], heldout_questions()[::4], 16)


def _measure(
    model: Qwen2, tokenizer: Tokenizer, heldout: list[Chapter], sums: list[Question], count: int
) -> Report:
    needles = {}
    for kind in NEEDLES:
        number, tokens = kind
        asked = needle_questions(heldout, tokenizer, tokens, count, needles=number)
        needles[kind] = Marks(count_correct(model, tokenizer, asked), len(asked))
    return Report(
        text=heldout_loss(model, tokenizer, heldout),
        sums=Marks(count_correct(model, tokenizer, sums), len(sums)),
        needles=needles,
    )


@torch.no_grad()
def greedy(model: Qwen2, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    """The prompt and `count` tokens after it, each the most likely one."""
    ids = tokenizer.encode(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return tokenizer.decode(ids)


@dataclass(frozen=True)
class Made:
    """How a model was made."""

    command: str
    steps: int
    tokens: int  # seen in training
    seed: int
    minutes: float
    threads: int


CARD = """# minqwen embedded model

A Qwen2.5 checkpoint in Hugging Face layout, trained from scratch by `tools/train_embedded` so that
every part of minqwen can be run, and its answers marked, without a download.

| | |
|---|---|
| parameters | {parameters:,} (bfloat16 on disk) |
| shape | {c.num_hidden_layers} layers, hidden {c.hidden_size}, \
{c.num_attention_heads} query heads, {c.num_key_value_heads} key/value heads, \
head_dim {c.head_dim}, QKV bias, feed-forward {c.intermediate_size}, untied head |
| context | {c.max_position_embeddings:,} tokens, rope_theta {c.rope_theta:,.0f} |
| vocabulary | {tokens:,} tokens (byte-level BPE through Qwen2's pipeline, \
Qwen2.5's 22 added tokens last), {c.vocab_size:,} rows |
| licence | the weights and the tokenizer: as the repository; the training text: public domain |

28 query heads on 4 key/value heads is Qwen2.5-7B's own geometry: four ranks hold 7 + 1 heads each,
and 32 heads is the extension that tensor parallelism by 8 or 16 needs. `head_dim` is stated in
config.json because `hidden_size / num_attention_heads` stops being right (16 becomes 14) the moment
the number of heads changes.

## What it can do

| skill | measured | result |
|---|---|---|
| continue King James text | {heldout} held-out chapters (every 50th) | \
{text.nats_per_token:.3f} nats per token, {text.bits_per_byte:.3f} bits per byte |
| chat: `What is 47 + 38?` -> `7+8=15, 4+3+1=8: 85` | {sums.asked} held-out sums of two numbers \
from 10 to 99 | {sums.right} right ({share:.1%}) |
{needles}
Answers are greedy and count only when right to the last token, `<|im_end|>` included; weights are
rounded to bfloat16 and computed with in float32. The held-out sums are `heldout_questions()` of
`minqwen.lab.tasks`: a tenth of the unordered pairs, chosen by hash, none of which is in any
training batch in either order. The needle questions are `needle_questions(...)`: one or three
sentences like `The secret number of Aaron is 4821.` among held-out verses, and `What is the secret
number of Aaron?` at the end; the {names} names are the ones trained on, the numbers are random. It
knows nothing else: it is a test instrument, not an assistant.

Greedy, `In the beginning`:

> {sample}

## How it was made

Data: the King James Version, {verses:,} verses in {chapters:,} chapters, as printed by the command
`bible -f gen1:1-rev22:21` of Debian's package `bible-kjv` (the text is in the public domain), and
sums and needle chats that the program makes from a seed, mixed in every step. Chats are ChatML
without a system turn; the loss counts their answers only (and the verses of a needle chat as text).
Muon for the matrices in the layers, AdamW for the rest; {made.steps:,} steps, {made.tokens:,} \
tokens, seed {made.seed}.

    {made.command}

took {made.minutes:.0f} minutes of training on {made.threads} CPU threads (torch {torch}) of a
machine that had other work. With `--minutes` the learning rate follows the clock, so another
machine gives another model of the same kind; with `--steps` it follows the steps. `--evaluate`
measures the checkpoint again.
"""


def needle_rows(report: Report) -> str:
    """The card's lines about needles, one for each kind."""
    lines = []
    for (needles, tokens), marks in report.needles.items():
        kind = "one needle" if needles == 1 else f"one of {needles} needles"
        asked = f"{marks.asked} questions of about {tokens} tokens"
        lines.append(f"| chat: {kind} | {asked} | {marks.right} right |\n")
    return "".join(lines)


def card(
    config: ModelConfig,
    tokenizer: Tokenizer,
    chapters: list[Chapter],
    heldout: list[Chapter],
    report: Report,
    sample: str,
    made: Made,
) -> str:
    """The text of the model card."""
    return CARD.format(
        c=config,
        parameters=config.num_parameters(),
        tokens=tokenizer.vocab_size,
        heldout=len(heldout),
        text=report.text,
        sums=report.sums,
        share=report.sums.right / report.sums.asked,
        needles=needle_rows(report),
        names=len(NAMES),
        sample=sample.replace("\n", "\n> "),
        verses=sum(len(chapter.verses) for chapter in chapters),
        chapters=len(chapters),
        made=made,
        torch=torch.__version__,
    )
