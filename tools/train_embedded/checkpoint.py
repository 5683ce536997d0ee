"""The checkpoint's parts: the shape, the tokenizer and its files, the weights in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from minqwen import ModelConfig, Qwen2, Tokenizer
from minqwen.checkpoint import write_checkpoint
from minqwen.errors import CheckpointError, MinqwenError
from minqwen.files import write_text
from minqwen.lab.tasks import Chapter
from minqwen.tokenizer.backends import QWEN2_SPLIT

SHAPE: dict[str, object] = {  # the 7B's ratios (28 query heads to 4), not its sizes
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": None,  # this and the next two: set when the tokenizer is trained
    "eos_token_id": None,
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
ADDED_SPECIAL = [
    f"<|{name}|>"
    for name in (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
        "quad_end vision_start vision_end vision_pad image_pad video_pad"
    ).split()
]
ADDED_PLAIN = ["<tool_call>", "</tool_call>"] + [
    f"<|{name}|>" for name in "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep".split()
]
CHAT_TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def make_tokenizer(chapters: list[Chapter], directory: Path) -> tuple[Tokenizer, ModelConfig]:
    """Train the tokenizer and write every small file of the checkpoint into `directory`.

    Returns the tokenizer, read from there, and the model's config.
    """
    library = train_tokenizer(chapters)
    end, pad = library.token_to_id("<|im_end|>"), library.token_to_id("<|endoftext|>")
    ids = {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad}
    config = ModelConfig.from_dict({**SHAPE, **ids})
    config.save(directory)
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
    small_files = {
        "generation_config.json": json.dumps(generation, indent=2),
        "tokenizer.json": library.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(tokenizer_config(library), indent=2),
    }
    for name, text in small_files.items():
        write_text(directory / name, text + "\n", CheckpointError)
    return Tokenizer.from_dir(directory), config


def train_tokenizer(chapters: list[Chapter]) -> tokenizers.Tokenizer:
    """Byte-level BPE through Qwen2's own pipeline: NFC, its split pattern, bytes."""
    library = tokenizers.Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    library.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    library.decoder = decoders.ByteLevel()
    # Often enough that each of these words becomes a token.
    chats = ["system\nuser\nassistant\nWhat is the secret number of Aaron + ?"] * 1000
    trainer = trainers.BpeTrainer(
        vocab_size=MERGED_TOKENS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = ["\n".join(chapter.verses) + "\n" for chapter in chapters]
    library.train_from_iterator(texts + chats, trainer)
    library.add_tokens([AddedToken(t, normalized=False, special=True) for t in ADDED_SPECIAL])
    library.add_tokens([AddedToken(t, normalized=False, special=False) for t in ADDED_PLAIN])
    found, rows = library.get_vocab_size(), SHAPE["vocab_size"]
    if found != MERGED_TOKENS + len(ADDED_SPECIAL) + len(ADDED_PLAIN):
        raise MinqwenError(
            f"the tokenizer has {found} tokens, expected 2,038 for {rows} rows; "
            "give a longer text to train it on"
        )
    return library


def tokenizer_config(library: tokenizers.Tokenizer) -> dict[str, object]:
    """tokenizer_config.json, as Qwen2.5 has it, with the embedded model's template."""
    added = {}
    for token in ADDED_SPECIAL + ADDED_PLAIN:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        special = token in ADDED_SPECIAL
        added[str(library.token_to_id(token))] = {"content": token, **flags, "special": special}
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
        "model_max_length": SHAPE["max_position_embeddings"],
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def save_checkpoint(model: Qwen2, small_files: Path, out: Path) -> None:
    """The weights in bfloat16, and the small files that lie in the directory `small_files`."""
    weights = ((name, value.bfloat16()) for name, value in model.state_dict().items())
    write_checkpoint(out, model.config, weights, sources=small_files, overwrite=True)


def rounded(model: Qwen2) -> Qwen2:
    """The model as it will lie on disk: weights rounded to bfloat16, computed with in float32."""
    copy = Qwen2(model.config, dtype=torch.float32, device=model.device)
    state = {name: value.bfloat16().float() for name, value in model.state_dict().items()}
    copy.load_state_dict(state)
    return copy.eval()
