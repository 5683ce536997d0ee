"""Engines for the audit: what a model says of texts, as records."""

from __future__ import annotations

import shutil

import torch

from minqwen import Tokenizer
from minqwen.checkpoint import write_checkpoint
from minqwen.config import RopeScaling
from minqwen.lab.audit.records import Entry, Record
from support.heads import random_model
from support.paths import EMBEDDED


def yarn_model():
    """14 query and 2 KV heads of 8 in a width of 40, with YaRN: its config and bfloat16 tensors."""
    config, weights = random_model(14, 2, dtype=torch.bfloat16)
    return config.replace(rope_scaling=RopeScaling(4.0, 16)), weights


def texts(vocab_size, count=3, length=101, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count, length), generator=generator).tolist()


def logprobs_of(model, ids, report=None):
    """The table [T, V] of what an engine reports, in float32. model: ids [1, T] to logits."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0].float()
    return logits.log_softmax(-1) if report is None else report(logits, torch.tensor(ids))


def record_of(model, ids, report=None, prompt=1):
    """What an engine says of all tokens of a text but the first."""
    table = logprobs_of(model, ids, report)
    entries = tuple(Entry(i, ids[i], table[i - 1, ids[i]].item()) for i in range(1, len(ids)))
    return Record(tuple(ids), prompt, entries)


def records_of(model, many, report=None):
    return [record_of(model, ids, report) for ids in many]


def continued(model, ids, count):
    """ids and what the model finds most probable after them, without a cache."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids


def written(path, config, weights, tokenizer_of=None):
    """A checkpoint directory, with another one's tokenizer."""
    write_checkpoint(path, config, weights.items())
    if tokenizer_of is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer_of / name, path / name)
    return path


def small_model_of_embedded_tokens(seed=0):
    """Two layers of width 40 with the vocabulary of the embedded model; bfloat16 tensors.

    It writes no token that is a part of a character, and none that does not exist.
    """
    config, _ = random_model(14, 2)
    tokenizer = Tokenizer.from_dir(EMBEDDED)
    config = config.replace(vocab_size=2048, dtype="bfloat16")
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.parameter_shapes().items():
        w = torch.randn(shape, generator=generator) * (0.3 if len(shape) == 2 else 0.5)
        weights[name] = (w + 1 if "norm" in name else w).bfloat16()
    texts = [tokenizer.token_bytes(id).decode(errors="replace") for id in range(2048)]
    weights["lm_head.weight"][[not text or "\ufffd" in text for text in texts]] = 0
    return config, weights
