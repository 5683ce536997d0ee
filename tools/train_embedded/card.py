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
    count_unrepeated,
    heldout_loss,
    heldout_questions,
    json_questions,
    needle_questions,
)

NEEDLES = [(1, tokens) for tokens in (64, 128, 256, 512, 960)]  # (needles, tokens of the chat)
NEEDLES += [(3, tokens) for tokens in (128, 256, 512, 960)]


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
    json: Marks
    unrepeated: Marks  # of held-out chapters' openings, those continued without a repetition

    def to_json(self) -> str:
        """One line: the losses, and [right, asked] for everything else."""
        found: dict[str, float | Marks] = {
            "nats_per_token": round(self.text.nats_per_token, 4),
            "bits_per_byte": round(self.text.bits_per_byte, 4),
            "sums": self.sums,
            "json": self.json,
            "unrepeated": self.unrepeated,
        }
        for (needles, tokens), marks in self.needles.items():
            found[f"needle{needles}_{tokens}"] = marks
        return json.dumps(found)


def measure(model: Qwen2, tokenizer: Tokenizer, heldout: list[Chapter]) -> Report:
    """Everything the card states."""
    return _measure(model, tokenizer, heldout, heldout_questions(), 128)


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
    objects, openings = json_questions(4 * count), heldout[:20]
    return Report(
        text=heldout_loss(model, tokenizer, heldout),
        sums=Marks(count_correct(model, tokenizer, sums), len(sums)),
        needles=needles,
        json=Marks(count_correct(model, tokenizer, objects), len(objects)),
        unrepeated=Marks(count_unrepeated(model, tokenizer, openings), len(openings)),
    )


@torch.no_grad()
def greedy(model: Qwen2, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    """The prompt and `count` tokens after it, each the most likely one."""
    ids = tokenizer.encode(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids], device=model.device))[0, -1].argmax()))
    return tokenizer.decode(ids)


@dataclass(frozen=True)
class Made:
    """How a model was made."""

    commands: list[str]  # each begins with the weights that the one before it made
    steps: int
    tokens: int  # seen in training
    seed: int
    minutes: float
    where: str  # "2 CPU threads", "NVIDIA H100"


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
{needles}| chat: a sentence -> `{{"name": ..., "number": ..., "place": ...}}` \
| {json.asked} sentences about held-out names and places | {json.right} right ({json_share:.1%}) |
| greedy text of 64 tokens without the same 6 tokens twice \
| {unrepeated.asked} openings (8 words) of held-out chapters | {unrepeated.right} |

Answers are greedy and count only when right to the last token, `<|im_end|>` included; weights are
rounded to bfloat16 and computed with in float32. The held-out sums are `heldout_questions()` of
`minqwen.lab.tasks`: a tenth of the unordered pairs, chosen by hash, none of which is in any
training batch in either order. The needle questions are `needle_questions(...)`: one or three
sentences like `The secret number of Aaron is 4821.` among held-out verses, and `What is the secret
number of Aaron?` at the end; the {names} names are the ones trained on, the numbers are random. The
sentences are `json_questions(...)`: a fifth of the pairs of a name and a place is held out, chosen
by hash. In training no sentence that becomes JSON has both. The answer must be right to the byte,
with no grammar to help. It knows nothing else: it is a test instrument, not an assistant.

Greedy, `In the beginning`:

> {sample}

## How it was made

Data: the King James Version, {verses:,} verses in {chapters:,} chapters, as printed by the command
`bible -f gen1:1-rev22:21` of Debian's package `bible-kjv` (the text is in the public domain), and
chats that the program makes from a seed, mixed in every step. Chats are ChatML without a system
turn; the loss counts their answers only. Greedy text that the model itself writes in the training
teaches it not to repeat itself: where the likeliest token would make four tokens come twice, the
likeliest other one is the answer. With `--teacher` that checkpoint has a say in which one it is,
and corrects what it holds for unlikely. Muon for the matrices in the layers, AdamW for the rest;
{made.steps:,} steps, {made.tokens:,} tokens, seed {made.seed}.

{commands}

{took} {made.minutes:.1f} minutes of training on {made.where} (torch {torch}). With `--minutes` the
learning rate follows the clock, so another machine gives another model of the same kind; with
`--steps` it follows the steps. `--evaluate` measures the checkpoint again.
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
        json=report.json,
        json_share=report.json.right / report.json.asked,
        unrepeated=report.unrepeated,
        needles=needle_rows(report),
        names=len(NAMES),
        sample=sample.replace("\n", "\n> "),
        verses=sum(len(chapter.verses) for chapter in chapters),
        chapters=len(chapters),
        made=made,
        commands="\n".join("    " + command for command in made.commands),
        took="took" if len(made.commands) == 1 else "The last one took",
        torch=torch.__version__,
    )
