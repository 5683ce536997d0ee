"""transformers' Qwen2 with random weights, the oracle; the same weights as our model."""

from __future__ import annotations

import copy
import json
import random

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

from minqwen.config import ModelConfig
from minqwen.model import Qwen2
from support.paths import DATA

transformers.utils.logging.set_verbosity_error()
MODELS = json.loads((DATA / "configs.json").read_text())["models"]
OFFICIAL = {
    name: entry["config"] for name, entry in MODELS.items() if not name.endswith("Instruct")
}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
TINY = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    rope_parameters=PLAIN,
    tie_word_embeddings=False,
)


def yarn(factor, original=32768, theta=1e6, **more):
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        **more,
    }


def oracle(seed=0, kind=Qwen2ForCausalLM, config=Qwen2Config, **changes):
    """transformers' model, eager, float32, with weights that leave nothing at zero or one."""
    c = config(**({"initializer_range": 0.2} | TINY | changes))
    c._attn_implementation = "eager"
    torch.manual_seed(seed)
    hf = kind(c).eval()
    for name, p in hf.named_parameters():
        if name.endswith("bias"):
            p.normal_()
        elif "norm" in name:
            p.uniform_(0.5, 1.5)
    return hf


def cast(hf, dtype):
    """A copy in another dtype, as from_pretrained(dtype=...) makes it.

    `.to` alone would round inv_freq.
    """
    frequencies = hf.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    hf = copy.deepcopy(hf).to(dtype)
    hf.model.rotary_emb.inv_freq = frequencies
    return hf


def ours(hf, dtype=None, **options):
    """The same weights as a minqwen model."""
    dtype = dtype or hf.dtype
    model = Qwen2(ModelConfig.from_dict(hf.config.to_dict()), dtype=dtype, **options)
    model.load_state_dict(hf.state_dict())
    return model.prepare()


def tokens(model, *shape, seed=0):
    return torch.randint(
        0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed)
    )


def error(a, b):
    """Largest difference, relative to the largest magnitude of b."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def configurations():
    """(name, changes to TINY, B, T): every official shape in three scales, then random ones."""
    draw = random.Random(20240919)
    for name, c in OFFICIAL.items():
        H, D = c["num_attention_heads"], c["hidden_size"]
        shape = dict(
            num_attention_heads=H,
            num_key_value_heads=c["num_key_value_heads"],
            vocab_size=509,
            tie_word_embeddings=c["tie_word_embeddings"],
            rms_norm_eps=c["rms_norm_eps"],
        )
        name = name.removeprefix("Qwen/Qwen2.5-")
        width = c["intermediate_size"] * 8 * H // D
        narrow = shape | dict(hidden_size=8 * H, head_dim=8, intermediate_size=width)
        yield f"{name}-narrow", narrow, draw.randint(1, 3), draw.randint(1, 200)
        long = narrow | dict(rope_parameters=yarn(4.0))
        yield f"{name}-yarn", long, draw.randint(1, 3), draw.randint(1, 200)
        heads = shape | dict(
            hidden_size=72, head_dim=D // H, intermediate_size=100
        )  # its own head_dim
        yield f"{name}-heads", heads, draw.randint(1, 3), draw.randint(1, 100)
    yield (
        "0.5B-one-layer",
        dict(
            hidden_size=896,
            intermediate_size=4864,
            num_attention_heads=14,
            head_dim=64,
            num_hidden_layers=1,
            vocab_size=1000,
            tie_word_embeddings=True,
        ),
        2,
        37,
    )
    for B, G, T, d in (
        (2, 8, 3, 128),
        (5, 7, 3, 64),
        (4, 7, 5, 128),
    ):  # where strides decide the last bits
        yield (
            f"one-kv-head-{B}-{G}",
            dict(
                num_attention_heads=G,
                num_key_value_heads=1,
                head_dim=d,
                hidden_size=64,
                vocab_size=97,
            ),
            B,
            T,
        )
    lengths = [1, 1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 199, 200]
    for i in range(50):
        K, G = draw.choice([1, 2, 3, 4]), i % 8 + 1
        theta, original = draw.choice([1e4, 5e5, 1e6, 1e7]), draw.choice([64, 512, 32768])
        plain = {"rope_type": "default", "rope_theta": theta}
        yield (
            f"random-{i}",
            dict(
                num_key_value_heads=K,
                num_attention_heads=K * G,
                head_dim=draw.choice([2, 8, 10, 16, 32, 64, 128]),
                hidden_size=draw.choice([32, 48, 49, 64, 112, 224]),
                intermediate_size=draw.choice([64, 100, 161]),
                num_hidden_layers=draw.randint(1, 3),
                vocab_size=draw.choice([97, 128, 1000]),
                rms_norm_eps=draw.choice([1e-6, 1e-5]),
                tie_word_embeddings=draw.random() < 0.5,
                initializer_range=draw.choice([0.02, 0.2]),
                rope_parameters=draw.choice(
                    [plain, yarn(2.0, original, theta), yarn(4.0, original, theta)]
                ),
            ),
            draw.randint(1, 5),
            draw.choice(lengths),
        )


CONFIGURATIONS = list(configurations())


def differences(hf, model, ids):
    """None, or a line that says in how far logits of the two models are not the same bits."""
    theirs, mine = hf(ids).logits, model(ids)
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and theirs.isfinite().all()
    if not torch.equal(mine, theirs):
        where = (mine != theirs).sum().item()
        by = f"by up to {error(mine, theirs):.2g} of the largest"
        return f"{where} of {mine.numel()} logits differ, {by}"
    return None
