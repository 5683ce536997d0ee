"""transformers and vLLM as contestants. Both are optional: they are imported when they load."""

from __future__ import annotations

import os
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from minqwen.lab.bench.contestants import PEERS
from minqwen.lab.bench.jobs import Ask
from minqwen.lab.bench.setup import Engine, NotInstalled, Setup
from minqwen.lab.bench.timing import Run, Stopwatch


def missing(peer: str, error: ImportError) -> NotInstalled:
    """Why a peer does not take part, and what to do about that."""
    return NotInstalled(
        f"not installed here ({error}): {PEERS[peer]}; or name a Python that has it: "
        f"--python {peer}=/path/to/bin/python"
    )


# ---- transformers -------------------------------------------------------------------------------


def load_transformers(setup: Setup) -> Engine:
    """AutoModelForCausalLM with the SDPA attention, which is the fastest that needs no package."""
    try:
        from transformers import AutoModelForCausalLM, DynamicCache
        from transformers.utils import logging
    except ImportError as error:
        raise missing("transformers", error) from None
    assert setup.model is not None
    messages: Any = logging
    messages.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        setup.model, dtype=setup.contestant.form, attn_implementation="sdpa"
    )
    return Transformers(model.to(setup.device).eval(), DynamicCache, setup)


class Transformers:
    """A greedy loop over the model and a DynamicCache: what `generate` does, without its checks.

    Requests run in batches in the order in which they come, padded on the left to the longest, and
    until the longest of the batch has ended.
    """

    def __init__(self, model: Any, cache: Any, setup: Setup):
        self.model, self.cache, self.batch = model, cache, setup.batch
        self.device, self.vocab_size = setup.device, int(model.config.vocab_size)

    @torch.inference_mode()
    def run(self, asks: list[Ask]) -> Run:
        found: list[list[int]] = []
        watch, waiting = Stopwatch(self.device), iter(asks)
        while batch := list(islice(waiting, self.batch)):
            self._complete(batch, found, watch)
        return Run(watch.marks, found)

    def _complete(self, asks: list[Ask], found: list[list[int]], watch: Stopwatch) -> None:
        longest = max(len(ask.prompt) for ask in asks)
        pads = [longest - len(ask.prompt) for ask in asks]
        ids = torch.tensor([[0] * pad + ask.prompt for pad, ask in zip(pads, asks)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        ids, mask = ids.to(self.device), mask.to(self.device)
        cache, before = self.cache(config=self.model.config), len(found)
        found += [[] for _ in asks]
        for _ in range(max(ask.new for ask in asks)):
            ids = self._next(ids, mask if any(pads) else None, cache)
            mask = torch.cat((mask, mask.new_ones(len(asks), 1)), 1)
            for ask, own, token in zip(asks, found[before:], ids[:, 0].tolist()):
                if len(own) < ask.new:
                    own.append(token)
            watch.mark(sum(map(len, found)), len(found))

    def _next(self, ids: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """The likeliest next ids [B, 1]. mask [B, context] where there is padding."""
        options: dict[str, Any] = {}
        if mask is not None:
            places = mask.cumsum(1) - 1
            options = {
                "attention_mask": mask,
                "position_ids": places.clamp(min=0)[:, -ids.shape[1] :],
            }
        out = self.model(ids, past_key_values=cache, logits_to_keep=1, **options)
        likeliest: Tensor = out.logits[:, -1:].argmax(-1)
        return likeliest


# ---- vLLM ---------------------------------------------------------------------------------------


def load_vllm(setup: Setup) -> Engine:
    """vLLM's own engine in this process, without CUDA graphs on a CPU."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, whose time can be read
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V1": "1",
    }
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise missing("vllm", error) from None
    assert setup.model is not None
    llm: Any = LLM(
        setup.model,
        dtype=setup.contestant.form,
        skip_tokenizer_init=True,
        max_model_len=setup.longest,
        max_num_seqs=setup.batch,
        max_num_batched_tokens=max(setup.step_tokens, setup.longest),
        enable_prefix_caching=False,
        enforce_eager=setup.device == "cpu",
        disable_log_stats=True,
    )
    torch.set_num_threads(setup.threads)
    return VLLM(llm, SamplingParams, setup)


class VLLM:
    """Through `LLMEngine.step`."""

    def __init__(self, llm: Any, params: Any, setup: Setup):
        self.engine, self.params = llm.llm_engine, params
        self.device, self.vocab_size = setup.device, setup.config().vocab_size

    def run(self, asks: list[Ask]) -> Run:
        watch = Stopwatch(self.device)
        found: dict[str, list[int]] = {}
        for i, ask in enumerate(asks):
            params = self.params(
                temperature=0, max_tokens=ask.new, ignore_eos=True, detokenize=False
            )
            self.engine.add_request(str(i), {"prompt_token_ids": ask.prompt}, params)
            found[str(i)] = []
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                found[output.request_id] = list(output.outputs[0].token_ids)
            watch.mark(sum(map(len, found.values())), sum(map(bool, found.values())))
        return Run(watch.marks, list(found.values()))
