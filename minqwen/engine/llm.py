"""LLM: prompts in, completions out. Every rank runs this same code; only tensors cross between ranks.

A step is: the scheduler says who runs, the packed tokens go through the model once, every sequence that has
reached its last token gets the next one. Read `step`; the rest is what callers see.
"""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minqwen.checkpoint import load_pretrained
from minqwen.checkpoint.offload import LAYERS_HELD
from minqwen.engine.blocks import BlockPool
from minqwen.engine.outputs import CompletionOutput, Metrics, RequestOutput
from minqwen.engine.scheduler import Scheduler, Sequence
from minqwen.errors import ConfigError, MinqwenError, SamplingError
from minqwen.generation_config import GenerationDefaults
from minqwen.model import Batch, Qwen2
from minqwen.model.memory import blocks_that_fit
from minqwen.model.trace import UNTRACED, Seen, Tap, select
from minqwen.parallel import Mesh
from minqwen.sampling.draw import Row, bad_word_ids, sample
from minqwen.sampling.logprobs import logprobs_of, wide
from minqwen.sampling.params import SamplingParams
from minqwen.sampling.stopping import StopChecker
from minqwen.sampling.structured import Constraint, ConstraintCompiler
from minqwen.tokenizer import IncrementalDecoder, Tokenizer

Prompt = str | list[int]  # or anything with `tolist`: an array, a tensor


@dataclass(eq=False)
class Request:
    output: RequestOutput
    params: SamplingParams
    seed: int
    salt: str | None
    sequences: list[Sequence] = field(default_factory=list)
    forked: bool = False
    trace: set[str] = field(default_factory=set)  # the points that the caller wants to see


@dataclass(eq=False)
class Completion:
    """The engine's half of a sequence: whose it is and what has been shown of it."""

    request: Request
    output: CompletionOutput
    row: Row  # the sampler's half
    decoder: IncrementalDecoder | None
    stops: StopChecker
    constraint: Constraint | None = None


class LLM:
    """A model, its tokenizer, its cache and its scheduler.

    model: a Hugging Face safetensors directory, or a `Qwen2` (then give `tokenizer`). dtype, device, arithmetic,
    offload: as in `checkpoint.load_pretrained`. max_model_len: most tokens of prompt and output, default the config's.
    block_size: tokens per page, 1 to 256. The cache holds `num_blocks` pages, or `kv_cache_bytes` per rank, or what
    `gpu_memory_utilization` of the device leaves beside the weights and the fullest step (on a CPU, of a fifth of the
    memory that is free). max_num_seqs and max_num_batched_tokens bound a step. enable_prefix_caching: reuse what
    earlier requests computed. seed: of requests that have none of their own; None draws one. check_finite: refuse
    weights with NaN or infinity.
    Raises MinqwenError for what cannot work.
    """

    def __init__(
        self,
        model: str | Path | Qwen2,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        arithmetic: str = "native",
        mesh: Mesh | None = None,
        max_model_len: int | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        enable_prefix_caching: bool = True,
        seed: int | None = None,
        check_finite: bool = False,
        offload: str | None = None,
        progress: bool = False,
    ):
        if isinstance(model, Qwen2):
            self.model, self.mesh, self.tokenizer = model, model.mesh, tokenizer
            self.defaults = GenerationDefaults(eos_token_ids=model.config.eos_token_id)
        else:
            self.mesh = mesh or Mesh.from_env(device)
            self.tokenizer = tokenizer or Tokenizer.from_dir(model)
            self.model = load_pretrained(
                model,
                dtype=dtype,
                device=device,
                arithmetic=arithmetic,
                mesh=self.mesh,
                check_finite=check_finite,
                progress=progress,
                offload=offload,
            )
            self.defaults = GenerationDefaults.from_dir(model, self.model.config)
        self.config = self.model.config
        if not 1 <= block_size <= 256:
            raise ConfigError(f"block_size is {block_size}, expected 1 to 256")
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs is {max_num_seqs} and max_num_batched_tokens {max_num_batched_tokens}: "
                "a step must have room for one token of every sequence, and for at least one"
            )
        self.max_model_len, num_blocks = self._size_cache(
            max_model_len,
            block_size,
            num_blocks,
            kv_cache_bytes,
            gpu_memory_utilization,
            max_num_seqs,
            max_num_batched_tokens,
        )
        self.cache = self.model.new_cache(num_blocks, block_size)
        self.pool = BlockPool(num_blocks, block_size, enable_prefix_caching)
        self.scheduler = Scheduler(self.pool, max_num_seqs, max_num_batched_tokens)
        self.requests: dict[str, Request] = {}
        self.arrivals = itertools.count()
        self.news: dict[str, RequestOutput] = {}  # what `step` has not reported yet
        self.tokens_generated = 0
        self._compiler: ConstraintCompiler | None = None  # made when first needed
        self.seeds = itertools.count(self._entropy() if seed is None else seed)

    # ---- what callers use ------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        cache_salt: str | None = None,
        trace=None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt (text or token ids); outputs in the order of the prompts.

        trace: names of points, as in `Qwen2.run_with_cache`, to have in each completion's `trace`. Requests that
        were added before go on meanwhile; the next `step` reports what became of them.
        """
        prompts = [prompts] if is_prompt(prompts) else list(prompts)
        many = isinstance(sampling_params, (list, tuple))
        params = list(sampling_params) if many else [sampling_params] * len(prompts)
        if len(params) != len(prompts):
            raise SamplingError(
                f"{len(params)} sampling_params for {len(prompts)} prompts, expected one each or one"
            )
        requests: list[Request] = []
        bar = tqdm(
            total=len(prompts),
            desc="requests",
            leave=False,
            disable=None if use_tqdm and self.mesh.rank == 0 else True,
        )
        try:
            for prompt, p in zip(prompts, params):
                request_id = self.add_request(prompt, p, cache_salt=cache_salt, trace=trace)
                requests.append(self.requests[request_id])
            started, before, shown = time.perf_counter(), self.tokens_generated, 0.0
            while not all(r.output.finished for r in reversed(requests)):
                self._advance()
                now = time.perf_counter()
                if now > shown + 0.1:
                    bar.n, shown = sum(r.output.finished for r in requests), now
                    bar.set_postfix_str(
                        f"{(self.tokens_generated - before) / (now - started):.1f} tokens/s"
                    )
        finally:
            bar.close()
            for request in requests:
                self.abort(request.output.request_id)
        for request in requests:
            if request.output.error:
                raise MinqwenError(f"request {request.output.request_id}: {request.output.error}")
        return [request.output for request in requests]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options
    ) -> Iterator[str]:
        """Complete one prompt, piece of text by piece: never half a character, never part of a stop string.
        Several streams may be read by turns."""
        request_id = self.add_request(prompt, sampling_params, **options)
        request, shown = self.requests[request_id], 0
        output = request.output
        try:
            if request.params.n != 1:
                raise SamplingError("n is more than 1: a stream is one completion")
            while True:
                finished, text = output.finished, output.outputs[0].text
                if output.error:
                    raise MinqwenError(output.error)
                if len(text) > shown:
                    yield text[shown:]
                    shown = len(text)
                elif finished:
                    return
                else:
                    self._advance()
        finally:
            self.abort(request_id)

    def chat(
        self,
        messages: list,
        sampling_params: SamplingParams | None = None,
        *,
        tools=None,
        **options,
    ):
        """Complete a conversation, [{"role": ..., "content": ...}, ...], or a list of conversations."""
        many = bool(messages) and isinstance(messages[0], list)
        prompts = [
            self.tokenizer.encode_chat(m, tools=tools) for m in (messages if many else [messages])
        ]
        return self.generate(prompts, sampling_params, **options)

    def score(self, prompts: Prompt | Iterable[Prompt], **options) -> list[list[float]]:
        """log p(token | the tokens before it) of every prompt token after the first, in nats."""
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
        outputs = self.generate(prompts, params, **options)
        return [
            [
                entry[token].logprob
                for token, entry in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:])
            ]
            for o in outputs
        ]

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        trace=None,
    ) -> str:
        """Queue one prompt for `step`. Returns its id. cache_salt: share cached prefixes only with the same salt.
        trace: as in `generate`; what is traced is computed, not read from the prefix cache."""
        params = (
            SamplingParams.from_defaults(self.defaults)
            if sampling_params is None
            else sampling_params
        )
        if not isinstance(params, SamplingParams):
            raise SamplingError(f"sampling_params is {params!r}: expected a SamplingParams")
        if not isinstance(cache_salt, (str, type(None))):
            raise SamplingError(f"cache_salt is {cache_salt!r}: expected None or a string")
        text = prompt if isinstance(prompt, str) else None
        ids = self._prompt_ids(prompt)
        arrival = next(self.arrivals)
        if request_id is None:
            request_id = next(i for i in map(str, itertools.count(arrival)) if not self._knows(i))
        if not isinstance(request_id, str) or self._knows(request_id):
            raise SamplingError(
                f"request_id is {request_id!r}: expected a string that no running request has"
            )
        params.check_ids(self.config.vocab_size)
        bad_words = ()
        if params.bad_words or params.structured_outputs:
            if self.tokenizer is None:
                raise SamplingError(
                    "bad_words and structured_outputs need a tokenizer: this LLM was made without one"
                )
            bad_words = bad_word_ids(params.bad_words, self._encode_plainly)
            if params.structured_outputs:
                if self._compiler is None:
                    self._compiler = ConstraintCompiler(
                        self.tokenizer, self.config.vocab_size, self.defaults.eos_token_ids
                    )
        output = RequestOutput(request_id, text, ids, [], False, Metrics(time.perf_counter()))
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None] * len(ids)
        seed = next(self.seeds) if params.seed is None else params.seed
        request = Request(output, params, seed, cache_salt)
        if trace is not None:
            if params.n > 1:
                raise SamplingError("trace is for n = 1: ask for one completion")
            request.trace = select(trace, self.config.num_hidden_layers)
        for index in range(params.n):
            completion = CompletionOutput(index, "", [])
            if params.logprobs is not None:
                completion.logprobs, completion.cumulative_logprob = [], 0.0
            output.outputs.append(completion)
            sequence = Sequence((arrival, index), list(ids), len(ids), cache_salt)
            sequence.use_cache = params.prompt_logprobs is None and not request.trace
            eos = self.defaults.eos_token_ids
            row = Row(
                params,
                ids,
                completion.token_ids,
                seed,
                index,
                eos_token_ids=eos,
                bad_words=bad_words,
            )
            decoder = self.tokenizer.decoder(skip_special_tokens=True) if self.tokenizer else None
            stops = StopChecker(params)
            spec = params.structured_outputs
            constraint = self._compiler.constraint(spec, params.stop_token_ids) if spec else None
            sequence.state = Completion(request, completion, row, decoder, stops, constraint)
            request.sequences.append(sequence)
        self.requests[request_id] = request
        self.scheduler.add(
            request.sequences[0]
        )  # the others are forked off when the prompt is computed
        return request_id

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks. Unknown and finished ids are no error."""
        self.news.pop(request_id, None)
        request = self.requests.pop(request_id, None)
        for sequence in request.sequences if request else ():
            if sequence.state.output.finish_reason is None:
                sequence.state.output.finish_reason = "abort"
                self.scheduler.finish(sequence)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do or to report."""
        return bool(self.requests or self.news)

    def step(self) -> list[RequestOutput]:
        """One forward pass. Returns the requests that have something new since the last `step`: those too that
        went on while `generate` or `stream` made the passes."""
        self._advance()
        news, self.news = self.news, {}
        return list(news.values())

    @torch.inference_mode()
    def _advance(self) -> None:
        """One forward pass, and all that follows from it; `news` holds the requests to report.

        Nothing is changed before all that may fail for want of memory is done, so a failed step can be repeated.
        """
        plan = self.scheduler.schedule()
        if not plan:
            return
        ids, batch, rows_of = self._pack(plan)
        logits = self.model(ids, batch, self.cache, self._tap(plan, rows_of))
        last = (
            logits if len(logits) == len(plan) else logits[[end - 1 for _, end in rows_of]]
        )  # [B, V]
        last = wide(last)
        sound = last.sum(-1).isfinite().tolist()  # a NaN or an infinity stays one in the sum
        at_end = [
            i for i, (s, count) in enumerate(plan) if sound[i] and s.computed + count == len(s.ids)
        ]
        last = last if len(at_end) == len(plan) else last[at_end]
        drawn = dict(zip(at_end, self._draw([plan[i][0] for i in at_end], last))) if at_end else {}
        for i, (sequence, count) in enumerate(plan):
            request = sequence.state.request
            if request.output.finished:  # failed in this step
                continue
            if not sound[
                i
            ]:  # one NaN anywhere before reaches the last token: nothing of this is kept
                self._fail(
                    request, f"logits are not finite at token {sequence.computed + count - 1}"
                )
            else:
                self._prompt_logprobs(sequence, count, logits[slice(*rows_of[i])])
                self.scheduler.computed(sequence, count)
                if i in drawn:
                    self._append(sequence, *drawn[i])
            if i in drawn or request.output.finished:
                self.news[request.output.request_id] = request.output

    # ---- the parts of a step ---------------------------------------------------------------------------------

    def _pack(
        self, plan: list[tuple[Sequence, int]]
    ) -> tuple[Tensor, Batch, list[tuple[int, int]]]:
        """The step's tokens in one row, where they go, and which rows of the logits are whose."""
        ids, positions, slots, at = [], [], [], []
        rows_of, size = [], self.pool.block_size
        for sequence, count in plan:
            new = range(sequence.computed, sequence.computed + count)
            ids += sequence.ids[new.start : new.stop]
            positions += new
            slots += [sequence.blocks[i // size] * size + i % size for i in new]
            wanted = count if self._wants_prompt_logits(sequence) else 1
            rows_of.append((len(at), len(at) + wanted))
            at += range(len(ids) - wanted, len(ids))
        query_lens = tuple(count for _, count in plan)
        context_lens = tuple(sequence.computed + count for sequence, count in plan)
        width = max(len(sequence.blocks) for sequence, _ in plan)
        tables = [sequence.blocks + [0] * (width - len(sequence.blocks)) for sequence, _ in plan]

        def device(numbers: list) -> Tensor:
            return torch.tensor(numbers).to(self.model.device, non_blocking=True)

        batch = Batch(
            device(positions), query_lens, context_lens, device(slots), device(tables), device(at)
        )
        return device(ids), batch, rows_of

    def _tap(self, plan: list[tuple[Sequence, int]], rows_of: list[tuple[int, int]]):
        """What the step's traced requests see of it: their own rows, kept on the CPU."""
        traced = [i for i, (sequence, _) in enumerate(plan) if sequence.state.request.trace]
        if not traced:
            return UNTRACED
        ends = list(itertools.accumulate(count for _, count in plan))

        def show(name: str, x: Tensor, where: tuple[int, int, int] | None) -> None:
            for i in traced:
                sequence, count = plan[i]
                if name not in sequence.state.request.trace:
                    continue
                if where is not None:  # scores and pattern, [sequences of this call, H, T, L]
                    if not where[0] <= i < where[0] + where[1]:
                        continue
                    rows = x[i - where[0], :, :, : sequence.computed + count]
                elif name in ("final_norm", "logits"):
                    if sequence.computed + count < len(sequence.ids):  # no token is drawn
                        continue
                    rows = x[rows_of[i][1] - 1 : rows_of[i][1]]
                else:
                    rows = x[ends[i] - count : ends[i]]
                kept = sequence.state.output.trace.setdefault(name, [])
                if sequence.computed == 0 and name not in ("final_norm", "logits"):
                    kept.clear()  # recomputed from the start
                kept.append(rows.to("cpu", copy=True))

        names = set().union(*(plan[i][0].state.request.trace for i in traced))
        return Tap(self.model, names, show)

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> list[tuple[int, dict | None]]:
        """The next token of each sequence, from logits [B, V], and its logprobs where they were asked for."""
        rows = [sequence.state.row for sequence in sequences]
        for completion in (sequence.state for sequence in sequences):
            if completion.constraint:
                completion.row.mask = completion.constraint.mask()
        tokens, logprobs = sample(logits, rows)
        if (
            self.mesh.size > 1
        ):  # all ranks have the same logits; this makes it impossible to disagree
            tokens = self.mesh.broadcast(torch.tensor(tokens, device=self.model.device)).tolist()
        for entry in (
            itertools.chain(*(d.items() for d in logprobs or () if d)) if self.tokenizer else ()
        ):
            entry[1].decoded_token = self.tokenizer.decode([entry[0]])
        return list(zip(tokens, logprobs or [None] * len(rows)))

    def _append(self, sequence: Sequence, token: int, logprobs: dict | None) -> None:
        """One more token: extend the text, fork or finish what is due."""
        completion, request = sequence.state, sequence.state.request
        if token < 0:
            return self._fail(request, "no token can be drawn: everything is forbidden")
        output, params = completion.output, request.params
        now = time.perf_counter()
        request.output.metrics.first_token = request.output.metrics.first_token or now
        if not request.forked:
            request.forked = True
            request.output.num_cached_tokens = sequence.num_cached
            for child in request.sequences[1:]:
                self.scheduler.fork(sequence, child)
        sequence.ids.append(token)
        output.token_ids.append(token)
        self.tokens_generated += 1
        if logprobs is not None:
            output.logprobs.append(logprobs)
            output.cumulative_logprob += logprobs[token].logprob
        if completion.constraint:
            completion.constraint.accept(token)
        reason = self._finish_reason(sequence, token)
        if completion.decoder is not None:
            # The end-of-text token is not part of the text; the last token of a finished grammar is.
            at_end = reason == ("stop", None) and token in self.defaults.eos_token_ids
            text = "" if at_end else completion.decoder.push([token])
            if reason:
                text += completion.decoder.flush()
            early = len(output.token_ids) <= params.min_tokens
            emitted, stopped = completion.stops.push(text, final=bool(reason), search=not early)
            output.text += emitted
            if stopped is not None:
                reason = ("stop", stopped)
        if reason:
            output.finish_reason, output.stop_reason = reason
            steps = output.trace.items()
            output.trace = Seen(
                {
                    name: x
                    if x[0].dim() == 3 and name.endswith(("scores", "pattern"))
                    else torch.cat(x)
                    for name, x in steps
                }
            )
            self.scheduler.finish(sequence)
            if all(o.finish_reason for o in request.output.outputs):
                request.output.finished, request.output.metrics.finished = True, now
                self.requests.pop(request.output.request_id)

    def _finish_reason(self, sequence: Sequence, token: int) -> tuple[str, int | str | None] | None:
        params, output = sequence.state.request.params, sequence.state.output
        count = len(output.token_ids)
        if count > params.min_tokens:
            if token in self.defaults.eos_token_ids and not params.ignore_eos:
                return "stop", None
            if token in params.stop_token_ids:
                return "stop", token
        if sequence.state.constraint and sequence.state.constraint.finished:
            return "stop", None
        if count == params.max_tokens or len(sequence.ids) >= self.max_model_len:
            return "length", None
        return None

    def _wants_prompt_logits(self, sequence: Sequence) -> bool:
        wanted = sequence.state.request.params.prompt_logprobs is not None
        return wanted and sequence.key[1] == 0 and sequence.computed < sequence.num_prompt

    def _prompt_logprobs(self, sequence: Sequence, count: int, logits: Tensor) -> None:
        if not self._wants_prompt_logits(sequence):
            return
        start = sequence.computed
        nexts = sequence.ids[start + 1 : min(start + count + 1, sequence.num_prompt)]
        request = sequence.state.request
        entries = logprobs_of(logits[: len(nexts)], nexts, request.params.prompt_logprobs)
        request.output.prompt_logprobs[start + 1 : start + 1 + len(nexts)] = entries

    def _fail(self, request: Request, why: str) -> None:
        """End a request that cannot go on; the others do."""
        request.output.error, request.output.finished = why, True
        self.requests.pop(request.output.request_id, None)
        for sequence in request.sequences:
            if sequence.state.output.finish_reason is None:
                sequence.state.output.finish_reason = "error"
                self.scheduler.finish(sequence)

    def _knows(self, request_id: str) -> bool:
        return request_id in self.requests or request_id in self.news

    def _encode_plainly(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, allow_special=False, add_special_tokens=False)

    def _prompt_ids(self, prompt: Any) -> list[int]:
        """A prompt's token ids, checked."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise SamplingError(
                    "the prompt is text, but this LLM was made without a tokenizer: give token ids"
                )
            ids = self.tokenizer.encode(prompt)
        else:
            ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
            if not isinstance(ids, (list, tuple)):
                raise SamplingError(
                    f"the prompt is a {type(prompt).__name__}: expected text or a list of token ids"
                )
        if not ids:
            raise SamplingError("the prompt has no tokens: give at least one")
        for i in ids:
            if (
                isinstance(i, bool)
                or not isinstance(i, Integral)
                or not 0 <= i < self.config.vocab_size
            ):
                raise SamplingError(
                    f"prompt token id is {i!r}, expected 0 to {self.config.vocab_size - 1}"
                )
        if len(ids) >= self.max_model_len:
            raise SamplingError(
                f"the prompt has {len(ids)} tokens, but prompt and output together have room for "
                f"{self.max_model_len} (max_model_len): shorten it, or raise max_model_len"
            )
        return [int(i) for i in ids]

    # ---- sizes -----------------------------------------------------------------------------------------------

    def _size_cache(
        self,
        max_model_len,
        block_size,
        num_blocks,
        kv_cache_bytes,
        gpu_memory_utilization,
        max_num_seqs,
        max_num_batched_tokens,
    ) -> tuple[int, int]:
        """(max_model_len, number of blocks) that fit; every rank the same."""
        c, explicit = self.config, max_model_len is not None
        context = c.max_position_embeddings
        if c.rope_scaling is not None:
            extended = int(c.rope_scaling.factor * c.rope_scaling.original_max_position_embeddings)
            context = max(context, extended)
        if explicit and not 2 <= max_model_len <= context:
            raise ConfigError(
                f"max_model_len is {max_model_len}, expected 2 to {context}, the model's context"
            )
        max_model_len = max_model_len or context
        kv_heads = max(c.num_key_value_heads // self.mesh.size, 1)
        item = torch.empty((), dtype=self.model.dtype).element_size()
        block_bytes = 2 * c.num_hidden_layers * kv_heads * c.head_dim * item * block_size
        for name, value in (("num_blocks", num_blocks), ("kv_cache_bytes", kv_cache_bytes)):
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}, expected more than 0")
        if not 0 < gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {gpu_memory_utilization}, expected more than 0, at most 1"
            )
        if num_blocks is None and kv_cache_bytes is not None:
            num_blocks = kv_cache_bytes // block_bytes
        elif num_blocks is None:
            exact = self.model.ops.name == "exact"  # computes in float64
            num_blocks = blocks_that_fit(
                c,
                self._room(gpu_memory_utilization),
                block_bytes,
                block_size=block_size,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                dtype="float64" if exact else str(self.model.dtype).removeprefix("torch."),
                size=self.mesh.size,
                device=self.model.device.type,
            )
            num_blocks = min(
                num_blocks, max_num_seqs * -(-max_model_len // block_size)
            )  # never more than can be used
        num_blocks = int(
            -self.mesh.all_reduce(
                torch.tensor([-float(num_blocks)], device=self.model.device), "max"
            )
        )
        if num_blocks * block_size < max_model_len:
            if explicit or num_blocks * block_size < 2:
                raise ConfigError(
                    f"max_model_len {max_model_len} needs {-(-max_model_len // block_size)} blocks of {block_size} "
                    f"tokens ({-(-max_model_len // block_size) * block_bytes / 1e6:.1f} MB per rank), but the cache "
                    f"has {num_blocks}: lower max_model_len, or give more num_blocks, kv_cache_bytes or "
                    "gpu_memory_utilization"
                )
            max_model_len = num_blocks * block_size
        return max_model_len, num_blocks

    def _room(self, utilization: float) -> int:
        """Bytes for the cache and for what a step holds."""
        if self.model.device.type != "cuda":
            return available_memory() // 5 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        free, total = torch.cuda.mem_get_info(self.model.device)
        streamed = sum(
            x.numel() * x.element_size()
            for x in self.model.model.layers[0].parameters()
            if x.is_meta
        )
        return max(0, int(free - (1 - utilization) * total) - LAYERS_HELD * streamed)

    def _entropy(self) -> int:
        seed = torch.tensor([secrets.randbits(62)], device=self.model.device)
        return int(self.mesh.broadcast(seed) if self.mesh.size > 1 else seed)


def is_prompt(x: Any) -> bool:
    """Text or token ids, rather than several of them. An empty list is no prompts."""
    if hasattr(x, "ndim"):  # an array, a tensor
        return x.ndim < 2
    several = isinstance(x, Iterable) and not isinstance(x, (str, bytes, dict))
    return not several or isinstance(x, (list, tuple)) and bool(x) and isinstance(x[0], Integral)


def available_memory() -> int:
    """Bytes of main memory that could be had now without swapping."""
    try:
        with open("/proc/meminfo") as f:
            return next(
                int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable")
            )
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
