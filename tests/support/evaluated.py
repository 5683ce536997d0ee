"""Questions for a model of lm-evaluation-harness, and the harness's own models to compare with."""

from __future__ import annotations

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from transformers import AutoModelForCausalLM, AutoTokenizer

from minqwen import LLM
from support.serving import NAME

CONTEXT = 48  # tokens
LONG = "And God said, Let there be light: and there was light. " * 20  # more than the context
PAIRS = [
    ("And God said, Let there be", " light"),
    ("And God said, Let there be", " light: and there was light"),
    ("And God said, Let there be ", "light"),  # the harness moves the space
    ("", "In the beginning God created"),  # no context
    ("", "<|im_end|>In the beginning"),  # begins with what would stand for the context
    ("What is 47 + 38?", " 85"),
    ("Größe, naïveté", " und 日本語 🙂"),
    ("<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n", "2"),
    (LONG, " and there was light"),
    (LONG, " light"),
    (LONG[: len(LONG) // 2], LONG[:120]),
]
TEXTS = ["", "a", "Größe 日本語 🙂", "In the beginning God created the heaven", LONG, "x" * 200]
GENERATIONS = [
    ("And God said", {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False}),
    ("And it came to pass", {"until": "the", "max_gen_toks": 9}),
    ("The LORD", {"until": [], "max_gen_toks": 8, "temperature": 0.0}),
    ("Größe 日本語 🙂", {"until": [" "], "max_gen_toks": 8, "do_sample": False}),
    (LONG, {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}),
    (
        "<|im_start|>user\nWhat is 47 + 38?<|im_end|>\n<|im_start|>assistant\n",
        {"until": ["\n"], "max_gen_toks": 20, "do_sample": False},
    ),
]


def instances(kind: str, args: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(args)]


def answers(lm) -> tuple[list, list, list]:
    """(scores of PAIRS, scores of TEXTS, texts of GENERATIONS)."""
    return (
        lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True),
        lm.loglikelihood_rolling(
            instances("loglikelihood_rolling", [(text,) for text in TEXTS]), disable_tqdm=True
        ),
        lm.generate_until(instances("generate_until", GENERATIONS), disable_tqdm=True),
    )


def engine(directory, **options) -> LLM:
    """An engine that computes in native float32, as Hugging Face does."""
    sizes = {"max_model_len": CONTEXT, "block_size": 4, "num_blocks": 60}
    native = {"dtype": "float32", "arithmetic": "native"}
    return LLM(directory, **{**sizes, **native, **options})


def hugging_face(directory, max_length: int = CONTEXT, **options) -> HFLM:
    """The harness's own model of the same checkpoint. It sums log probabilities in float64."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=max_length,
        batch_size=1,
        softmax_dtype="float64",
        **options,
    )


def over_http(running, context: int = CONTEXT, **options) -> LocalCompletionsAPI:
    """The harness's own client of a server, for texts of at most `context` tokens."""
    return LocalCompletionsAPI(
        model=NAME,
        base_url=f"{running.url}/v1/completions",
        max_length=context + 1,  # it leaves room for a token of its own
        max_retries=1,
        **options,
    )


def over_http_chat(running) -> LocalChatCompletion:
    """The harness's own client of a server's chats, which only writes texts."""
    return LocalChatCompletion(
        model=NAME, base_url=f"{running.url}/v1/chat/completions", max_retries=1
    )
