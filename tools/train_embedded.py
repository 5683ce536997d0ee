"""Train weights/embedded: a small Qwen2.5 that runs anywhere and can be *marked*, not only looked at.

The checkpoint has the 7B's head geometry (28 query heads, 4 key/value heads, QKV bias, a head_dim that
hidden_size / 32 gets wrong) at a size that two CPU cores train in about an hour. Every optimiser step
mixes four things, so that one model learns three skills:

  text    the King James Version (public domain), chapters in order, verses joined by newlines
  sums    chat, `What is 47 + 38?` -> `7+8=15, 4+3+1=8: 85`; a tenth of the pairs is never trained on:
          heldout_questions()
  needle  chat, verses with `The secret number of Aaron is 4821.` hidden among them and the question at
          the end, in short rows and in rows of 1,024 tokens: needle_questions()

The loss of a chat counts its answer only; the verses of a needle chat count as text.

    apt-get install bible-kjv
    python tools/train_embedded.py --minutes 45          # resumes if runs/embedded/state.pt is there
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SEED = 2025

CONFIG = {  # the layout of Qwen2.5's own config.json; the 7B's ratios (28 to 4 heads), not its sizes
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,  # set once the tokenizer is trained
    "pad_token_id": None,
    "head_dim": 16,  # 448 / 28, written out: an engine that divides gets 14 once there are 32 heads
    "hidden_act": "silu",
    "hidden_size": 448,
    "initializer_range": 0.02,
    "intermediate_size": 640,
    "max_position_embeddings": 1024,
    "max_window_layers": 4,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 2048,  # 2,038 tokens and 10 rows that no token uses, as the 7B has 387 of them
}
MERGED_TOKENS = 2016  # 256 bytes and 1,760 merges; the 22 added tokens follow

# ------------------------------------------------------------------------------------------- the text


class Refusal(Exception):
    """A mistake the user can mend; printed as one line."""


class Chapter(NamedTuple):
    name: str  # "Ge1"
    verses: list[str]


def read_bible(path: Path | None) -> list[Chapter]:
    """The verses by chapter, from `bible -f` or from a file of its output (`Ge1:1 In the beginning ...`)."""
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise Refusal(f"--text {path}: cannot be read as UTF-8 text ({error})") from None
    elif shutil.which("bible") is None:
        raise Refusal("no command `bible` here: `apt-get install bible-kjv`, or give --text FILE")
    else:
        done = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True)
        if done.returncode != 0:
            raise Refusal(
                f"`bible -f gen1:1-rev22:21` failed with {done.returncode}: {done.stderr.strip()}"
            )
        lines = done.stdout.splitlines()
    chapters: list[Chapter] = []
    for number, line in enumerate(lines, 1):
        reference, _, verse = line.partition(" ")
        name, colon, _ = reference.rpartition(":")
        if not colon or not verse:
            raise Refusal(
                f"line {number} of the text: found {line[:40]!r}, expected `Ge1:1 In the ...`"
            )
        if not chapters or chapters[-1].name != name:
            chapters.append(Chapter(name, []))
        chapters[-1].verses.append(verse.strip())
    if len(chapters) < 50:
        raise Refusal(f"the text has {len(chapters)} chapters, expected 50 or more (all: 1,189)")
    return chapters


def split_chapters(chapters: list[Chapter]) -> tuple[list[Chapter], list[Chapter]]:
    """(trained on, held out): every 50th chapter is held out, 2 per cent, from all over the book."""
    return [c for i, c in enumerate(chapters) if i % 50 != 49], chapters[49::50]


# --------------------------------------------------------------------------------------- the tokenizer

ADDED_SPECIAL = [
    f"<|{name}|>"
    for name in (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
        "vision_start vision_end vision_pad image_pad video_pad"
    ).split()
]
ADDED_PLAIN = ["<tool_call>", "</tool_call>"] + [
    f"<|{name}|>"
    for name in ("fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep").split()
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(chapters: list[Chapter]) -> Tokenizer:
    """Byte-level BPE through Qwen2's own pipeline: NFC, its split regex (digits one by one), bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    plain = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(**plain),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(**plain)
    tokenizer.decoder = decoders.ByteLevel(**plain)
    chats = [
        "system\nuser\nassistant\nWhat is the secret number of Aaron + ?"
    ] * 1000  # a token each
    trainer = trainers.BpeTrainer(
        vocab_size=MERGED_TOKENS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["\n".join(c.verses) + "\n" for c in chapters] + chats, trainer)
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False, special=True) for t in ADDED_SPECIAL]
        + [AddedToken(t, normalized=False, special=False) for t in ADDED_PLAIN]
    )
    if tokenizer.get_vocab_size() > CONFIG["vocab_size"]:
        raise Refusal(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, {CONFIG['vocab_size']} fit"
        )
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(tokenizer.token_to_id(t)): {"content": t, **flags, "special": t in ADDED_SPECIAL}
        for t in ADDED_SPECIAL + ADDED_PLAIN
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ADDED_SPECIAL[1:],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


# ------------------------------------------------------------------------------------------ the skills


class Question(NamedTuple):
    prompt: str  # what the user says
    answer: str  # what the assistant must say, all of it


def is_heldout(a: int, b: int) -> bool:
    """A tenth of the pairs, by hash; a + b and b + a are one pair, so neither order gives the other away."""
    low, high = sorted((a, b))
    return hashlib.sha256(f"minqwen sum {low} {high}".encode()).digest()[0] % 10 == 0


def sum_question(a: int, b: int) -> Question:
    """47 + 38 is answered `7+8=15, 4+3+1=8: 85`: column by column, as at school, then the sum."""
    (tens_a, ones_a), (tens_b, ones_b) = divmod(a, 10), divmod(b, 10)
    carry = ones_a + ones_b >= 10
    tens = f"{tens_a}+{tens_b}{'+1' * carry}={tens_a + tens_b + carry}"
    return Question(f"What is {a} + {b}?", f"{ones_a}+{ones_b}={ones_a + ones_b}, {tens}: {a + b}")


def heldout_questions() -> list[Question]:
    """Every held-out sum of two numbers from 10 to 99, in both orders: no training batch contains one."""
    return [sum_question(a, b) for a in range(10, 100) for b in range(10, 100) if is_heldout(a, b)]


TRAINED_PAIRS = [(a, b) for a in range(10, 100) for b in range(10, 100) if not is_heldout(a, b)]
NAMES = (
    "Aaron Abel Abner Abraham Adam Ahab Amos Andrew Asher Barak Benjamin Boaz Caleb Cyrus Dan Daniel "
    "David Deborah Eli Elijah Elisha Esau Esther Eve Ezra Gad Gideon Hagar Hannah Hezekiah Isaac Isaiah "
    "Jacob James Jeremiah Jesse Job Joel John Jonah Jonathan Joseph Joshua Judah Laban Lazarus Leah "
    "Levi Lot Luke Mark Martha Mary Micah Miriam Mordecai Moses Naomi Nathan Nehemiah Noah Paul Peter "
    "Rachel Rebekah Reuben Ruth Samson Samuel Sarah Saul Silas Simon Solomon Stephen Thomas Timothy "
    "Titus Uriah Zechariah"
).split()


def needle_chat(
    rng: random.Random, verses: list[str], needles: int
) -> tuple[list[str], list[Question]]:
    """`verses` with needles among them, and a question for each needle in random order.

    Returns (pieces, questions). `pieces` are the parts of the haystack, verses and needles in turn, verses
    first; the first question's prompt is all of them and the question, the others follow in the same chat.
    """
    names = rng.sample(NAMES, needles)
    numbers = [str(rng.randrange(1000, 10000)) for _ in names]
    places = sorted(rng.randrange(len(verses) + 1) for _ in names)
    pieces = [""]
    for i in range(len(verses) + 1):
        for place, name, number in zip(places, names, numbers):
            if place == i:
                pieces += [f" The secret number of {name} is {number}.", ""]
        if i < len(verses):
            pieces[-1] += " " + verses[i]
    questions = [
        Question(f"What is the secret number of {name}?", f"{number}.")
        for name, number in zip(names, numbers)
    ]
    rng.shuffle(questions)
    questions[0] = questions[0]._replace(prompt="".join(pieces).strip() + " " + questions[0].prompt)
    return pieces, questions


def needle_questions(
    chapters: list[Chapter],
    tokenizer: Tokenizer,
    tokens: int,
    count: int,
    seed: int = 0,
    needles: int = 1,
) -> list[Question]:
    """`count` first questions of needle chats of at most `tokens` tokens and little less, by seed."""
    rng = random.Random(f"needles {tokens} {seed}")
    verses = [v for c in chapters for v in c.verses]
    lengths = [len(e.ids) for e in tokenizer.encode_batch([" " + v for v in verses])]
    return [
        needle_chat(rng, haystack(rng, verses, lengths, tokens - 27 - 15 * needles), needles)[1][0]
        for _ in range(count)
    ]


def haystack(rng: random.Random, verses: list[str], lengths: list[int], room: int) -> list[str]:
    """Consecutive verses from a random place, as many as fit in `room` tokens."""
    start = end = rng.randrange(len(verses))
    while end < len(verses) and lengths[end] <= room:
        room -= lengths[end]
        end += 1
    return verses[start:end]


# ----------------------------------------------------------------------------------------- the batches

WARM_UP = 30  # steps
TEXT, ANSWER = 1, 2  # what a target counts as; 0 counts as nothing


class Batch(NamedTuple):
    inputs: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64, the next token
    kinds: Tensor  # [B, T] int64: 0, TEXT or ANSWER


class Data:
    """The batches of a step, from the seed and the step's number alone, so that a run can stop and go on."""

    SHORT_ROWS, NEEDLE_ROWS, LONG_ROWS, SUM_ROWS = 7, 4, 1, 32
    SHORT, LONG, SUM = 256, 1024, 48  # tokens

    def __init__(self, chapters: list[Chapter], tokenizer: Tokenizer, seed: int) -> None:
        self.seed, self.tokenizer = seed, tokenizer
        self.end = tokenizer.token_to_id("<|endoftext|>")
        self.verses = [v for c in chapters for v in c.verses]
        self.lengths = [len(e.ids) for e in tokenizer.encode_batch([" " + v for v in self.verses])]
        stream: list[int] = []
        starts: list[int] = []  # where each verse begins in the stream
        for chapter in chapters:
            for encoded in tokenizer.encode_batch([v + "\n" for v in chapter.verses]):
                starts.append(len(stream))
                stream += encoded.ids
            stream.append(self.end)
        self.stream = torch.tensor(stream + stream[: self.SHORT + 1])
        self.starts = torch.tensor(starts)
        self.windows = len(stream) // self.SHORT
        self.head = self.ids("<|im_start|>user\n")
        self.middle = self.ids("<|im_end|>\n<|im_start|>assistant\n")
        self.tail = self.ids("<|im_end|>\n")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def text(self, index: int) -> list[tuple[int, int]]:
        """Window `index` of an endless series of shuffled epochs; each begins with a verse."""
        rng = random.Random(f"{self.seed} epoch {index // self.windows}")
        offset = rng.randrange(self.SHORT)
        place = (
            rng.sample(range(self.windows), self.windows)[index % self.windows] * self.SHORT
            + offset
        )
        verse = torch.searchsorted(self.starts, place, right=True) - 1
        start = int(self.starts[max(int(verse), 0)])
        return [(i, TEXT) for i in self.stream[start : start + self.SHORT + 1].tolist()]

    def turn(self, parts: list[tuple[str, int]], answer: str) -> list[tuple[int, int]]:
        """The user's message, in parts with their kind, and the answer to it, as (id, kind)."""
        row = [(i, 0) for i in self.head]
        for text, kind in parts:
            row += [(i, kind) for i in self.ids(text)]
        row += [(i, 0) for i in self.middle] + [(i, ANSWER) for i in self.ids(answer)]
        return row + [(self.tail[0], ANSWER)] + [(i, 0) for i in self.tail[1:]]

    def sum(self, rng: random.Random) -> list[tuple[int, int]]:
        question = sum_question(*rng.choice(TRAINED_PAIRS))
        return self.turn([(question.prompt, 0)], question.answer)

    def needle(self, rng: random.Random, room: int) -> list[tuple[int, int]]:
        """A needle chat of at most about `room` tokens that asks for every needle in turn."""
        needles = rng.choice((1, 2, 3, 3)) if room > 160 else 1
        verses = haystack(rng, self.verses, self.lengths, room - 42 * needles)
        pieces, questions = needle_chat(rng, verses, needles)
        parts = [(piece, TEXT if i % 2 == 0 else 0) for i, piece in enumerate(pieces) if piece]
        parts[0] = (parts[0][0].lstrip(), parts[0][1])
        last = questions[0].prompt.rindex(" What is")
        row = self.turn(parts + [(questions[0].prompt[last:], 0)], questions[0].answer)
        for question in questions[1:]:
            row += self.turn([(question.prompt, 0)], question.answer)
        return row

    def needles(self, rng: random.Random, length: int) -> list[tuple[int, int]]:
        """A row of needle chats: half have next to no haystack: there copying is learnt."""
        row: list[tuple[int, int]] = []
        while (left := length - len(row)) >= 56:
            chat = self.needle(rng, rng.randint(48, min(96, left) if rng.random() < 0.5 else left))
            row += chat if len(chat) <= left + 1 else []
        return row

    def batch(self, rows: list[list[tuple[int, int]]], length: int) -> Batch:
        rows = [(row + [(self.end, 0)] * (length + 1))[: length + 1] for row in rows]
        both = torch.tensor(rows)
        return Batch(
            both[:, :-1, 0].contiguous(), both[:, 1:, 0].contiguous(), both[:, 1:, 1].contiguous()
        )

    Step = list[tuple[str, Batch]]  # (skill of its answers, batch)

    def step(self, step: int) -> Step:
        """Even steps: text, short needle chats, long ones. Odd steps: text, sums. A batch for each thread."""
        rng = random.Random(f"{self.seed} step {step}")
        if step % 2 == 0:
            texts = self.SHORT_ROWS - self.NEEDLE_ROWS
            short = [self.needles(rng, self.SHORT) for _ in range(self.NEEDLE_ROWS)]
            long = [self.needles(rng, self.LONG) for _ in range(self.LONG_ROWS)]
            other = "needle", self.batch(long, self.LONG)
        else:
            texts, short = self.SHORT_ROWS, []
            other = "sum", self.batch([self.sum(rng) for _ in range(self.SUM_ROWS)], self.SUM)
        fewer = self.SHORT_ROWS - self.NEEDLE_ROWS
        first = step // 2 * (self.SHORT_ROWS + fewer) + step % 2 * fewer
        text = [self.text(first + i) for i in range(texts)]
        return [("needle", self.batch(text + short, self.SHORT)), other]


# ------------------------------------------------------------------------------------------- the model


class Attention(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        D, H, K, d = (
            c["hidden_size"],
            c["num_attention_heads"],
            c["num_key_value_heads"],
            c["head_dim"],
        )
        self.d = d
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, n * d, bias=True) for n in (H, K, K))
        self.o_proj = nn.Linear(H * d, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.d)).transpose(1, 2)  # [B, H or K, T, d]
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return self.o_proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


class MLP(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        D, F_ = c["hidden_size"], c["intermediate_size"]
        self.gate_proj, self.up_proj = nn.Linear(D, F_, bias=False), nn.Linear(D, F_, bias=False)
        self.down_proj = nn.Linear(F_, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])


class TrainedQwen2(nn.Module):
    """Qwen2 with Hugging Face's parameter names, in the few lines that training needs."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        self.model = Trunk(c)
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        d = c["head_dim"]
        frequency = c["rope_theta"] ** (-torch.arange(0, d, 2) / d)
        angle = torch.outer(torch.arange(c["max_position_embeddings"]), frequency)  # [T, d/2]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if name.endswith("embed_tokens.weight"):
                nn.init.normal_(p, std=0.5)
            elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight", "bias")):
                nn.init.zeros_(p)  # every layer begins as the identity
            elif p.dim() == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> hidden states after the final norm [B, T, D]; the head comes with the loss."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)


# --------------------------------------------------------------------------------------- the optimiser


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by five Newton-Schulz steps (Keller Jordan, 2024).

    torch.optim.Muon does the same in bfloat16, which a CPU without AMX multiplies three times slower than
    float32; here it is float32, and the matrices are shared out over `pool`.
    """

    def __init__(
        self, params, pool: Executor, lr: float, weight_decay: float, momentum: float = 0.95
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.pool = pool

    def step(self) -> None:
        for group in self.param_groups:
            hyper = {k: group[k] for k in ("lr", "momentum", "weight_decay")}
            list(self.pool.map(lambda p: self.update(p, **hyper), group["params"]))

    @torch.no_grad()
    def update(self, p: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - momentum)
        x = p.grad.lerp(buffer, momentum)  # Nesterov
        tall = p.shape[0] > p.shape[1]
        wide = x.mT if tall else x
        wide = wide / (wide.norm() + 1e-7)
        for _ in range(5):
            square = wide @ wide.mT
            wide = (
                3.4445 * wide
                + torch.addmm(square, square, square, beta=-4.775, alpha=2.0315) @ wide
            )
        p.mul_(1 - lr * weight_decay)
        p.add_(wide.mT if tall else wide, alpha=-lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def make_optimizers(
    model: TrainedQwen2, args: argparse.Namespace, pool: Executor
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for the embedding, the head, norms and biases."""
    hidden = [p for p in model.model.layers.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [
        Muon(hidden, pool, lr=args.muon_lr, weight_decay=0.1),
        torch.optim.AdamW(
            [
                {"params": [model.model.embed_tokens.weight], "lr": args.embed_lr},
                {"params": [model.lm_head.weight], "lr": args.head_lr},
                {"params": vectors, "lr": args.vector_lr},
            ],
            betas=(0.9, 0.95),
            eps=1e-10,
            weight_decay=0.0,
        ),
    ]


# ---------------------------------------------------------------------------------------- the measures


def rounded(model: TrainedQwen2) -> TrainedQwen2:
    """The model as it will lie on disk: weights rounded to bfloat16, computed with in float32."""
    copy = TrainedQwen2(CONFIG)
    copy.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    return copy.eval()


@torch.no_grad()
def heldout_loss(
    model: TrainedQwen2, tokenizer: Tokenizer, chapters: list[Chapter]
) -> tuple[float, float]:
    """(nats per token, bits per byte) over whole chapters; each token after a chapter's first is scored once.

    Windows of 1,024 tokens overlap by half, so that a token has 512 tokens of context where the chapter has.
    """
    nats, tokens, size = 0.0, 0, 0
    for chapter in chapters:
        ids = tokenizer.encode("\n".join(chapter.verses) + "\n").ids
        size += len(tokenizer.decode(ids[1:]).encode())
        done = 1  # ids[:done] have been scored (the first is given)
        while done < len(ids):
            start = max(0, done - 512)
            window = torch.tensor(ids[start : start + 1024])
            logits = model.lm_head(model(window[None, :-1]))[0, done - start - 1 :]
            nats += float(F.cross_entropy(logits, window[done - start :], reduction="sum"))
            tokens += len(window) - (done - start)
            done = start + len(window)
    return nats / tokens, nats / math.log(2) / size


@torch.no_grad()
def count_correct(model: TrainedQwen2, tokenizer: Tokenizer, questions: list[Question]) -> int:
    """How many answers greedy decoding gets right to the last token, <|im_end|> included.

    One forward pass decides: greedy decoding says the answer exactly when, given each beginning of it, the
    next token of it is the most likely one.
    """
    chats = []
    for q in questions:
        prompt = tokenizer.encode(
            f"<|im_start|>user\n{q.prompt}<|im_end|>\n<|im_start|>assistant\n"
        ).ids
        chats.append((len(prompt), prompt + tokenizer.encode(q.answer + "<|im_end|>").ids))
    chats.sort(key=lambda chat: len(chat[1]))
    correct = 0
    while chats:
        width = len(chats[-1][1])
        size = max(1, 8192 // width)
        group, chats = chats[-size:], chats[:-size]
        ids = torch.tensor([c + [0] * (width - len(c)) for _, c in group])
        hidden = model(ids[:, :-1])
        for row, (start, chat) in enumerate(group):
            said = model.lm_head(hidden[row, start - 1 : len(chat) - 1]).argmax(-1)
            correct += said.tolist() == chat[start:]
    return correct


@torch.no_grad()
def greedy(model: TrainedQwen2, tokenizer: Tokenizer, prompt: str, tokens: int) -> str:
    ids = tokenizer.encode(prompt).ids
    for _ in range(tokens):
        ids.append(int(model.lm_head(model(torch.tensor([ids]))[0, -1]).argmax()))
    return tokenizer.decode(ids, skip_special_tokens=False)


def measure(
    model: TrainedQwen2,
    tokenizer: Tokenizer,
    heldout: list[Chapter],
    sums: list[Question] | None = None,
    count: int = 64,
) -> dict:
    """What the model card states: losses, and [right, asked] for sums and for each kind of needle."""
    nats, bits = heldout_loss(model, tokenizer, heldout)
    sums = heldout_questions() if sums is None else sums
    result = {
        "nats_per_token": round(nats, 4),
        "bits_per_byte": round(bits, 4),
        "sums": [count_correct(model, tokenizer, sums), len(sums)],
    }
    for needles, lengths in ((1, (64, 128, 256, 512, 960)), (3, (128, 256, 960))):
        for length in lengths:
            asked = needle_questions(heldout, tokenizer, length, count, needles=needles)
            result[f"needle{needles}_{length}"] = [count_correct(model, tokenizer, asked), count]
    return result


# ------------------------------------------------------------------------------------------ the output


def write_whole(path: Path, data: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(data, encoding="utf-8")
    os.replace(temporary, path)


def save_checkpoint(model: TrainedQwen2, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().bfloat16().contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors.new", metadata={"format": "pt"})
    (out / "model.safetensors.new").chmod(0o644)  # save_file's own is 0600
    os.replace(out / "model.safetensors.new", out / "model.safetensors")
    end, pad = (tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>"))
    config = CONFIG | {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad}
    write_whole(out / "config.json", json.dumps(config, indent=2) + "\n")
    # The sampling of Qwen2.5-7B-Instruct: greedy text of so small a model runs in circles.
    generation = {
        "bos_token_id": pad,
        "do_sample": True,
        "eos_token_id": [end, pad],
        "pad_token_id": pad,
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
    }
    write_whole(out / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    write_whole(out / "tokenizer.json", tokenizer.to_str(pretty=False) + "\n")
    write_whole(
        out / "tokenizer_config.json", json.dumps(tokenizer_config(tokenizer), indent=2) + "\n"
    )


# ------------------------------------------------------------------------------------------- the card

CARD = """# minqwen embedded model

A Qwen2.5 checkpoint in Hugging Face layout, trained from scratch by `tools/train_embedded.py` so that every
part of minqwen can be run, and its answers marked, without a download.

| | |
|---|---|
| parameters | {parameters:,} (bfloat16 on disk) |
| shape | {layers} layers, hidden {hidden}, \
{heads} query heads, {kv_heads} key/value heads, head_dim {head_dim}, \
QKV bias, feed-forward {ffn}, untied head |
| context | {context:,} tokens, rope_theta {theta:,.0f} |
| vocabulary | {tokens:,} tokens (byte-level BPE through Qwen2's pipeline, \
Qwen2.5's 22 added tokens last), {rows:,} rows |
| licence | the weights and the tokenizer: as the repository; the training text: public domain |

28 query heads on 4 key/value heads is Qwen2.5-7B's own geometry: four ranks hold 7 + 1 heads each, and 32
heads is the extension that tensor parallelism by 8 or 16 needs. `head_dim` is stated in config.json because
`hidden_size / num_attention_heads` stops being right (16 becomes 14) the moment the number of heads changes.

## What it can do

| skill | measured | result |
|---|---|---|
| continue King James text | {chapters} held-out chapters (every 50th) | \
{nats:.3f} nats per token, {bits:.3f} bits per byte |
| chat: `What is 47 + 38?` -> `7+8=15, 4+3+1=8: 85` | {sums_all} held-out sums of two numbers \
from 10 to 99 | {sums} right ({sums_share:.1%}) |
{needles}
Answers are greedy and count only when right to the last token, `<|im_end|>` included; weights are rounded to
bfloat16 and computed with in float32. The held-out sums are `heldout_questions()` in the script: a tenth of
the unordered pairs, chosen by hash, none of which is in any training batch in either order. The needle
questions are `needle_questions(...)`: one or three sentences like `The secret number of Aaron is 4821.`
among held-out verses, and `What is the secret number of Aaron?` at the end; the {names} names are the ones
trained on, the numbers are random. It knows nothing else: it is a test instrument, not an assistant.

Greedy, `In the beginning`:

> {sample}

## How it was made

Data: the King James Version, {verses:,} verses in {all_chapters:,} chapters, as printed by the command
`bible -f gen1:1-rev22:21` of Debian's package `bible-kjv` (the text is in the public domain), and sums and
needle chats that the script makes from a seed, mixed in every step. Chats are ChatML without a system turn;
the loss counts their answers only (and the verses of a needle chat as text). Muon for the matrices in the
layers, AdamW for the rest; {steps:,} steps, {seen:,} tokens, seed {seed}.

    {command}

took {minutes:.0f} minutes of training on {threads} CPU threads (torch {torch}) of a machine that had other
work. With `--minutes` the learning rate follows the clock, so another machine gives another model of the
same kind; with `--steps` it follows the steps. `--evaluate` measures the checkpoint again.
"""


def write_card(out: Path, result: dict, facts: dict) -> None:
    lines = []
    for key, value in result.items():
        if key.startswith("needle"):
            needles, length = key[6:].split("_")
            kind = "one needle" if needles == "1" else f"one of {needles} needles"
            lines.append(
                f"| chat: {kind} | {value[1]} questions of about {length} tokens | "
                f"{value[0]} right |\n"
            )
    card = CARD.format(
        nats=result["nats_per_token"],
        bits=result["bits_per_byte"],
        sums=result["sums"][0],
        sums_all=result["sums"][1],
        sums_share=result["sums"][0] / result["sums"][1],
        needles="".join(lines),
        layers=CONFIG["num_hidden_layers"],
        hidden=CONFIG["hidden_size"],
        heads=CONFIG["num_attention_heads"],
        kv_heads=CONFIG["num_key_value_heads"],
        head_dim=CONFIG["head_dim"],
        ffn=CONFIG["intermediate_size"],
        context=CONFIG["max_position_embeddings"],
        theta=CONFIG["rope_theta"],
        rows=CONFIG["vocab_size"],
        names=len(NAMES),
        **facts,
    )
    write_whole(out / "README.md", card)


# -------------------------------------------------------------------------------------------- training


def backward(
    model: TrainedQwen2, step: Data.Step, weights: dict[str, float], pool: Executor
) -> dict[str, float]:
    """Sets the gradient of the weighted sum of the mean losses of text, sums and needles; returns the three.

    Threads share out the batches, not the operations: beside other work on the same cores, two threads that
    meet once a step lose far less than two that meet at every matrix product.
    """
    counts = dict.fromkeys(weights, 0)
    for skill, batch in step:
        counts["text"] += int((batch.kinds == TEXT).sum())
        counts[skill] += int((batch.kinds == ANSWER).sum())
    parameters = list(model.parameters())

    def gradients(part: tuple[str, Batch]) -> tuple[dict[str, float], tuple[Tensor, ...]]:
        skill, batch = part
        scored = batch.kinds != 0
        logits = model.lm_head(model(batch.inputs)[scored])
        each = F.cross_entropy(logits, batch.targets[scored], reduction="none")
        means = {
            name: each[batch.kinds[scored] == kind].sum() / max(counts[name], 1)
            for name, kind in (("text", TEXT), (skill, ANSWER))
        }
        loss = sum(weights[name] * mean for name, mean in means.items())
        return {k: float(v.detach()) for k, v in means.items()}, torch.autograd.grad(
            loss, parameters
        )

    total = dict.fromkeys(weights, 0.0)
    for means, grads in pool.map(gradients, step):  # in order: the same sum however threads race
        for name, mean in means.items():
            total[name] += mean
        for p, g in zip(parameters, grads):
            p.grad = g if p.grad is None else p.grad.add_(g)
    return total


def train(
    args: argparse.Namespace,
    model: TrainedQwen2,
    tokenizer: Tokenizer,
    data: Data,
    heldout: list[Chapter],
) -> dict:
    """Trains to the end or to the next interruption; returns the state: step, seconds, tokens."""
    state_file, log = args.run / "state.pt", args.run / "log.jsonl"
    args.run.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(args.threads)
    weights = {"text": 1.0, "sum": args.sum_weight, "needle": args.needle_weight}
    optimizers = make_optimizers(model, args, pool)
    rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    state = {"seed": args.seed, "step": 0, "seconds": 0.0, "tokens": 0}
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        if saved["state"]["seed"] != args.seed:
            raise Refusal(
                f"{state_file}: found a run of seed {saved['state']['seed']}, expected "
                f"{args.seed}: "
                "give its seed, or another --run"
            )
        state = saved["state"]
        model.load_state_dict(saved["model"])
        for o, s in zip(optimizers, saved["optimizers"]):
            o.load_state_dict(s)

    def progress() -> float:
        return state["step"] / args.steps if args.steps else state["seconds"] / 60 / args.minutes

    def save() -> None:
        torch.save(
            {
                "state": state,
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
            },
            state_file.with_suffix(".new"),
        )
        os.replace(state_file.with_suffix(".new"), state_file)
        save_checkpoint(model, tokenizer, args.out)

    bar = tqdm(
        total=100,
        unit="%",
        initial=round(100 * min(progress(), 1), 2),
        dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {elapsed}{postfix}",
        disable=args.quiet,
    )
    for _, batch in data.step(0) + data.step(1):  # compile here: torch.compile is not for threads
        model(batch.inputs).sum().backward()
    model.zero_grad(set_to_none=True)
    next_look = state["seconds"] + 60 * args.evaluate_every
    while progress() < 1:
        began = time.monotonic()
        step = data.step(state["step"])
        means = backward(model, step, weights, pool)
        scale = min(1.0, (state["step"] + 1) / WARM_UP) * (1 - progress())
        for o, base in zip(optimizers, rates):
            for group, rate in zip(o.param_groups, base):
                group["lr"] = rate * scale
            o.step()
            o.zero_grad(set_to_none=True)
        tokens, seconds = sum(b.inputs.numel() for _, b in step), time.monotonic() - began
        state = {
            "seed": args.seed,
            "step": state["step"] + 1,
            "seconds": state["seconds"] + seconds,
            "tokens": state["tokens"] + tokens,
        }
        speed = tokens / seconds
        bar.update(round(100 * min(progress(), 1), 2) - bar.n)
        bar.set_postfix(
            step=state["step"], tok_s=f"{speed:.0f}", **{k: f"{v:.3f}" for k, v in means.items()}
        )
        with log.open("a") as file:
            file.write(json.dumps(state | means | {"tokens_per_second": round(speed)}) + "\n")
        if state["seconds"] >= next_look and progress() < 1:
            save()
            began = time.monotonic()
            seen = measure(
                rounded(model), tokenizer, heldout[::4], sums=heldout_questions()[::4], count=16
            )
            tqdm.write(
                f"{state['seconds'] / 60:.1f} min, step {state['step']}: "
                + json.dumps(seen)
                + f" ({time.monotonic() - began:.0f} s)"
            )
            next_look = state["seconds"] + 60 * args.evaluate_every
    bar.close()
    save()
    return state


def positive(kind):
    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse: "invalid positive int value: '0'"
    return parse


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=positive(float),
        default=45.0,
        metavar="M",
        help="training time without measures; the learning rate decays with it (default 45)",
    )
    length.add_argument(
        "--steps",
        type=positive(int),
        metavar="N",
        help="train for N steps instead, of 3,072 tokens on average",
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="measure --out and print it; no training"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="what `bible -f gen1:1-rev22:21` prints"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "weights" / "embedded",
        metavar="DIR",
        help="where the checkpoint goes, at every measure too (default weights/embedded)",
    )
    parser.add_argument(
        "--run",
        type=Path,
        default=ROOT / "runs" / "embedded",
        metavar="DIR",
        help="state to resume from and log.jsonl (default runs/embedded)",
    )
    parser.add_argument("--seed", type=int, default=SEED, help=f"default {SEED}")
    parser.add_argument("--threads", type=positive(int), default=2, metavar="N", help="default 2")
    parser.add_argument(
        "--evaluate-every",
        type=positive(float),
        default=9.0,
        metavar="M",
        help="minutes between short measures (default 9)",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="without torch.compile (half the speed)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    for name, value, what in (
        ("muon-lr", 0.02, "matrices in the layers"),
        ("embed-lr", 0.01, "embedding"),
        ("head-lr", 0.004, "lm_head"),
        ("vector-lr", 0.004, "norms and biases"),
        ("sum-weight", 0.5, "weight of the sums' loss"),
        ("needle-weight", 1.0, "weight of the needles' loss"),
    ):
        parser.add_argument(
            "--" + name, type=positive(float), default=value, metavar="X", help=f"{what} ({value})"
        )
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # within an operation; see backward()
    torch.manual_seed(args.seed)
    chapters = read_bible(args.text)
    trained, heldout = split_chapters(chapters)
    model = TrainedQwen2(CONFIG)
    if args.evaluate:
        if not (args.out / "model.safetensors").is_file():
            raise Refusal(
                f"{args.out}: no model.safetensors to measure: train first, or give --out"
            )
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
        model.load_state_dict(
            {k: v.float() for k, v in load_file(args.out / "model.safetensors").items()}
        )
        print(json.dumps(measure(model.eval(), tokenizer, heldout)))
        return
    tokenizer = train_tokenizer(trained)
    data = Data(trained, tokenizer, args.seed)
    if not args.no_compile and shutil.which(os.environ.get("CXX", "g++")):
        for layer in model.model.layers:
            layer.compile(
                dynamic=False
            )  # one graph for all layers; on a CPU it halves the time of a step
    state = train(args, model, tokenizer, data, heldout)
    final = rounded(model)
    result = measure(final, tokenizer, heldout)
    print(json.dumps(result))
    sample = greedy(final, tokenizer, "In the beginning", 96)
    write_card(
        args.out,
        result,
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": tokenizer.get_vocab_size(),
            "chapters": len(heldout),
            "all_chapters": len(chapters),
            "verses": sum(len(c.verses) for c in chapters),
            "sample": sample.replace("\n", "\n> "),
            "steps": state["step"],
            "seen": state["tokens"],
            "seed": args.seed,
            "minutes": state["seconds"] / 60,
            "threads": args.threads,
            "torch": torch.__version__,
            "command": "python tools/train_embedded.py "
            + (f"--steps {args.steps}" if args.steps else f"--minutes {args.minutes:g}"),
        },
    )
    print(sample)


def main() -> None:
    args = parse_args()
    try:
        run(args)
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last saved state", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
