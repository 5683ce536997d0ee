"""LLM: prompts in, completions out. What callers use; the steps themselves are core.py's."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minqwen.agreement import agree
from minqwen.checkpoint.embedded import EMBEDDED
from minqwen.checks import boolean, is_integer, optional_integer
from minqwen.config import ModelConfig
from minqwen.engine.arguments import refuse_keywords, warn_of_idle, without_vllm_of_calls
from minqwen.engine.blocks import BlockPool
from minqwen.engine.core import EngineCore
from minqwen.engine.failures import raise_failures
from minqwen.engine.in_order import Outputs
from minqwen.engine.loading import (
    LOADING_OPTIONS,
    TokenizerOrPath,
    directory_name,
    load_parts,
    parts_of,
)
from minqwen.engine.outputs import Delta, RequestOutput
from minqwen.engine.prompts import Prompt, Read, is_prompt, read_prompt
from minqwen.engine.replicas import Relay
from minqwen.engine.request import Completion, Request
from minqwen.engine.runner import Runner
from minqwen.engine.scheduler import Scheduler
from minqwen.engine.sizing import EngineOptions, size_cache
from minqwen.errors import MinqwenError, RequestError, SamplingError, a_kind
from minqwen.files import quoted
from minqwen.model import Qwen2
from minqwen.model.trace import Hook, Names, select, select_hooks
from minqwen.parallel import Mesh
from minqwen.sampling.draw import bad_word_ids
from minqwen.sampling.params import SamplingParams
from minqwen.sampling.structured import SECONDS, Constraint, ConstraintCompiler
from minqwen.tokenizer import IncrementalDecoder, Tokenizer
from minqwen.tokenizer.chat import KEYWORDS, refuse_unknown

Message = dict[str, Any]
Hooks = Sequence[tuple[Names, Hook]]
KEYWORDS_OF_GENERATE = ("prompts", "sampling_params", "cache_salt", "trace", "hooks", "use_tqdm")
KEYWORDS_OF_ADD_REQUEST = (
    "prompt",
    "sampling_params",
    "request_id",
    "cache_salt",
    "trace",
    "hooks",
)


class LLM:
    """A model, its tokenizer, and the engine that runs requests on them.

    model: a Hugging Face safetensors directory (default: the embedded model's); then dtype, device,
    arithmetic, offload and check_finite are as in `checkpoint.load_pretrained`, and
    num_attention_heads, num_key_value_heads and head_recipe, which are other numbers of heads in
    memory, as in `heads.view.load_pretrained`; but the arithmetic is fast if none is named. Or a
    `Qwen2`; then these are its own, and `tokenizer`, or its directory, must be given where text
    comes in or goes out.
    tensor_parallel_size: how many of torchrun's ranks share a copy of the model (default: all);
    several copies, called replicas, share the prompts of `generate`. options: those of
    `engine.sizing.EngineOptions` (max_model_len, block_size, num_blocks, kv_cache_bytes,
    gpu_memory_utilization, max_num_seqs, max_num_batched_tokens, enable_prefix_caching,
    kv_cache_dtype, enforce_eager), and vLLM's, as `engine.arguments` says. seed: of requests that
    have none of their own; None draws one. `with LLM(...) as llm:` frees the memory at its end.
    Raises MinqwenError for what cannot work, before any weight is read where that can be known.
    """

    def __init__(
        self,
        model: str | Path | Qwen2 = EMBEDDED,
        *,
        tokenizer: TokenizerOrPath = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        arithmetic: str | None = None,
        mesh: Mesh | None = None,
        offload: str | None = None,
        check_finite: bool = False,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        head_recipe: str = "ghost",
        tensor_parallel_size: int | None = None,
        seed: int | None = None,
        progress: bool = False,
        **options: Any,
    ):
        self.name = "" if isinstance(model, Qwen2) else directory_name(model)
        self.options = EngineOptions.of(options, LOADING_OPTIONS)
        optional_integer("seed", seed, 0)
        loading: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "arithmetic": arithmetic,
            "mesh": mesh,
            "offload": offload,
            "check_finite": check_finite,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "head_recipe": head_recipe,
            "tensor_parallel_size": tensor_parallel_size,
            "progress": progress,
        }
        if isinstance(model, Qwen2):
            parts = parts_of(model, tokenizer, self.options, **loading)
        else:
            parts = load_parts(model, tokenizer, self.options, **loading)
        self.tokenizer, self.defaults = parts.tokenizer, parts.defaults
        self.mesh = parts.model.mesh
        agree(self.mesh.world, {"seed": seed})
        warn_of_idle(options)
        self.max_model_len, num_blocks = size_cache(parts.model, self.options)
        self._core: EngineCore | None = self._make_core(parts.model, num_blocks)
        self._calls = itertools.count()
        self._arrivals = itertools.count()
        self._seeds = itertools.count(self._entropy() if seed is None else seed)
        self._hooks: list[tuple[set[str], Hook]] = []  # of the requests that are added now
        self._compiler: ConstraintCompiler | None = None  # made when first needed, by any thread
        self._making_compiler = threading.Lock()
        # Deltas go to the list of whoever waits for their request, or here, for `step`.
        self._unread: list[Delta] = []
        self._mailboxes: dict[str, list[Delta]] = {}

    @property
    def core(self) -> EngineCore:
        """What makes the steps. Raises MinqwenError once the LLM is closed."""
        if self._core is None:
            raise MinqwenError("this LLM is closed: make another one")
        return self._core

    @property
    def model(self) -> Qwen2:
        return self.core.runner.model

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer, under vLLM's name. Raises SamplingError if there is none."""
        return self._need_tokenizer("get_tokenizer")

    def close(self) -> None:
        """Drop all requests, the cache and the model, so that their memory is free.

        `with LLM(...) as llm:` does this at its end. A model that somebody else holds stays.
        """
        for request_id in list(self._core.requests) if self._core else ():
            self.abort(request_id)
        self._unread.clear()
        self._core = None
        torch.cuda.empty_cache()  # the next engine asks the device how much of it is free

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """The model, and how much the engine holds, in one line."""
        if self._core is None:
            return "LLM(closed)"
        pool, name = self.core.pool, f"{self.name}: " if self.name else ""
        return (
            f"LLM({name}{self.model.extra_repr()}; context of {self.max_model_len} tokens, "
            f"cache of {pool.num_blocks} blocks of {pool.block_size}"
            f"{'' if self.tokenizer else '; no tokenizer'})"
        )

    # ---- what callers use -----------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt] = None,
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        cache_salt: str | None = None,
        trace: Names = None,
        hooks: Hooks = (),
        use_tqdm: bool = True,
        **others: Any,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs in the order of the prompts.

        A prompt is text, token ids, or vLLM's {"prompt": ...} or {"prompt_token_ids": ...}. others:
        vLLM's keywords, refused or without effect as `engine.arguments.OF_CALLS` says.
        trace: names of points, as in `Qwen2.run_with_cache`, to have in each completion's `trace`
        ("*" is all but attn.result). hooks: (names, fn) pairs as in `Qwen2.run_with_hooks`: in each
        step `fn(x, name)` sees a completion's own rows, x [1, T, ...] of the T tokens that are new
        in the step (a prompt, a part of it, or one token), scores and pattern [1, H, T, L]. What it
        returns, or writes into x, goes on. Logits and final_norm come only where they are used.
        Nothing of hooked requests enters or leaves the prefix cache, and others do not see the
        hooks. Requests that were added before go on meanwhile; the next `step`
        reports what is new of them. A request that somebody aborts meanwhile, such as a hook, has
        the finish_reason "abort". Of R replicas each runs every R-th prompt, and calls its hooks;
        every rank gets all outputs. Raises MinqwenError for what cannot be served, before anything
        is computed; and RequestError, with the outputs of all, if a request fails: after the others
        have finished.
        """
        refuse_keywords(others, KEYWORDS_OF_GENERATE)
        outputs = list(
            self.iterate(
                prompts,
                sampling_params,
                cache_salt=cache_salt,
                trace=trace,
                hooks=hooks,
                use_tqdm=use_tqdm,
            )
        )
        if self.mesh.replicas > 1:
            outputs = Relay(self.mesh, next(self._calls)).share(outputs)
        raise_failures(outputs)
        return outputs

    def iterate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        cache_salt: str | None = None,
        trace: Names = None,
        hooks: Hooks = (),
        use_tqdm: bool = True,
    ) -> Outputs:
        """The outputs of `generate`, in its order, each as soon as its turn comes.

        A request that fails has an output with an `error`; nothing is raised. With several replicas
        the outputs come on rank 0 only, and all ranks must read to the end, which comes for all at
        the same time. Raises MinqwenError for what cannot be served, before anything is computed.
        """
        boolean("use_tqdm", use_tqdm, error=SamplingError)
        prompts = [prompts] if is_prompt(prompts) else list(prompts)
        params = spread(sampling_params, len(prompts))
        requests = [
            self._new_request(prompt, p, cache_salt=cache_salt, trace=trace, hooks=hooks)
            for prompt, p in zip(prompts, params)
        ]
        mesh = self.mesh
        if mesh.replicas > 1:
            agree_on_requests(mesh.world, requests, hooks=False)
        agree_on_requests(mesh, requests)  # each replica may have hooks of its own
        mailbox: list[Delta] = []
        mine = {i: r for i, r in enumerate(requests) if i % mesh.replicas == mesh.replica}
        for request in mine.values():
            self.core.add(request)
            self._mailboxes[request.request_id] = mailbox

        def step(undisturbed: bool) -> list[Delta]:
            self._advance(undisturbed)
            deltas = mailbox.copy()
            mailbox.clear()
            return deltas

        def abort() -> None:
            for request in mine.values():
                if self._reads(request.request_id, mailbox):
                    self.abort(request.request_id)

        relay = Relay(mesh, next(self._calls))
        return Outputs(mine, len(requests), step, abort, relay, use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> Iterator[str]:
        """Complete one prompt, piece of text by piece; several streams may be read by turns.

        A piece is never half a character and never part of a stop string. options: those of
        `add_request`.
        """
        for delta in self.stream_deltas(prompt, sampling_params, **options):
            if delta.text:
                yield delta.text

    def stream_deltas(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> Iterator[Delta]:
        """The same with everything that is known of each token; the last delta has the output."""
        if isinstance(sampling_params, SamplingParams) and sampling_params.n != 1:
            raise SamplingError("n is more than 1: a stream is one completion")
        request_id = self.add_request(prompt, sampling_params, **options)
        mailbox = self._mailboxes[request_id] = []
        try:
            while mailbox or (
                self._reads(request_id, mailbox) and request_id in self.core.requests
            ):
                if not mailbox:
                    self._advance()
                    continue
                delta = mailbox.pop(0)
                if delta.output is not None and delta.output.error:
                    raise RequestError(delta.output.error, [delta.output])
                yield delta
        finally:
            if self._reads(request_id, mailbox):
                self.abort(request_id)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        cache_salt: str | None = None,
        trace: Names = None,
        hooks: Hooks = (),
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Complete a conversation, [{"role": ..., "content": ...}, ...], or several of them.

        cache_salt to use_tqdm: as in `generate`. options: those of `Tokenizer.encode_chat`, such as
        tools, documents, add_generation_prompt, continue_final_message, system, chat_template,
        chat_template_kwargs and allow_special.
        """
        options = without_vllm_of_calls(options)
        check_chat_options(options)
        many = is_conversations(messages)
        conversations: Any = messages if many else [messages]
        tokenizer = self._need_tokenizer("chat")
        ids = [
            tokenizer.encode_chat(chat, check_fewest=self._check_fewest, **options)
            for chat in conversations
        ]
        prompts = [{"prompt_token_ids": i, "prompt": tokenizer.decode(i)} for i in ids]
        return self.generate(
            prompts,
            sampling_params,
            cache_salt=cache_salt,
            trace=trace,
            hooks=hooks,
            use_tqdm=use_tqdm,
        )

    def score(self, prompts: Prompt | Iterable[Prompt], **options: Any) -> list[list[float]]:
        """log p(token | the tokens before it), in nats, of every prompt token after the first.

        A prompt may be as long as the context.
        """
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
        scores = []
        for output in self.generate(prompts, params, **options):
            entries = zip(output.prompt_token_ids, output.prompt_logprobs or ())
            scores.append([entry[token].logprob for token, entry in entries if entry is not None])
        return scores

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        trace: Names = None,
        hooks: Hooks = (),
        **others: Any,
    ) -> str:
        """Queue one prompt for `step`. Returns its id.

        cache_salt: share cached prefixes only with the same salt. trace, hooks: as in `generate`;
        what is traced is computed, not read from the prefix cache. Every replica runs the request.
        Raises MinqwenError for what cannot be served; then nothing is queued.
        """
        refuse_keywords(others, KEYWORDS_OF_ADD_REQUEST)
        request = self._new_request(
            prompt,
            sampling_params,
            request_id=request_id,
            cache_salt=cache_salt,
            trace=trace,
            hooks=hooks,
        )
        agree_on_requests(self.mesh, [request])
        self.core.add(request)
        return request.request_id

    def check_grammar(self, params: SamplingParams) -> None:
        """Have a request's grammar compiled, so that `add_request` need not wait for it.

        Any thread may call this, also while another one makes steps. The grammar may take half of
        the time that `add_request` gives it, so that no rank refuses there what was taken here.
        Raises SamplingError.
        """
        if params.structured_outputs is not None:
            self._grammar_compiler().check(params.structured_outputs, SECONDS / 2)

    def abort(self, request_id: str) -> None:
        """Drop a request, free its blocks, forget what is new of it. Unknown ids are no error."""
        if not isinstance(request_id, str):
            return
        if self._core is not None:
            self._core.abort(request_id)
        for deltas in (self._unread, self._mailboxes.pop(request_id, [])):
            deltas[:] = [delta for delta in deltas if delta.request_id != request_id]

    @contextmanager
    def hooks(self, hooks: Hooks) -> Iterator[None]:
        """Every request that is added within this context has these hooks, as in `generate`."""
        outside = self._hooks
        self._hooks = [*outside, *select_hooks(hooks, self.config.num_hidden_layers)]
        try:
            yield
        finally:
            self._hooks = outside

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of all earlier requests; those that run are computed again.

        The engine does this by itself, at the next step, when a parameter was written to or
        replaced, when a forward hook came or went, and after `Qwen2.prepare`. Only writes through
        `.data` or numpy, and changes that hide inside your own modules, need this call.
        """
        self.core.reset_prefix_cache()

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do or to report."""
        return self._core is not None and bool(self._core.requests or self._unread)

    def step(self) -> list[Delta]:
        """One forward pass. Returns what is new of each completion since the last `step`.

        That includes what came while `generate` or a stream made the passes, but not the deltas of
        requests that these wait for.
        """
        self._advance()
        deltas, self._unread = self._unread, []
        return deltas

    # ---- parts ----------------------------------------------------------------------------------

    def _new_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        trace: Names = None,
        hooks: Hooks = (),
    ) -> Request:
        """A request, checked, with its completions; the arguments are those of `add_request`."""
        params = self._checked_params(sampling_params)
        read = read_prompt(prompt)
        cache_salt = cache_salt if read.salt is None else read.salt
        if cache_salt is not None and not isinstance(cache_salt, str):
            raise SamplingError(
                f"cache_salt is {quoted(cache_salt, 100)}: expected None or a string"
            )
        points = self._points(trace, params)
        chosen = [*self._hooks, *select_hooks(hooks, self.config.num_hidden_layers)]
        room = self._room(params)
        if read.ids is None and self.tokenizer is not None and len(read.text or "") > room:
            self._check_room(
                self.tokenizer.fewest_tokens(read.text or ""), room, params, "at least "
            )
        ids = self._prompt_ids(read)
        self._check_room(len(ids), room, params)
        bad_words, constraints = self._bad_words(params), self._constraints(params)
        arrival = next(self._arrivals)
        request = Request(
            request_id=self._new_id(request_id, arrival),
            params=params,
            prompt_ids=ids,
            prompt=read.text,
            arrival=arrival,
            salt=cache_salt,
            trace=points,
            hooks=chosen,
        )
        seed = next(self._seeds) if params.seed is None else params.seed
        for index, constraint in enumerate(constraints):
            completion = Completion(
                request=request,
                params=params,
                ids=list(ids),
                num_prompt=len(ids),
                seed=seed,
                index=index,
                eos_token_ids=self.defaults.eos_token_ids,
                bad_words=bad_words,
                max_model_len=room,
                decoder=self._decoder(params),
                constraint=constraint,
            )
            request.completions.append(completion)
        return request

    def _make_core(self, model: Qwen2, num_blocks: int) -> EngineCore:
        o = self.options
        pool = BlockPool(num_blocks, o.block_size, o.enable_prefix_caching)
        scheduler = Scheduler(pool, o.max_num_seqs, o.max_num_batched_tokens)
        cache = model.new_cache(num_blocks, o.block_size, o.kv_cache_dtype)
        runner = Runner(model, cache, self.max_model_len, o.max_num_seqs, o.enforce_eager)
        tokenizer = self.tokenizer
        spell = None if tokenizer is None else lambda token: tokenizer.decode([token])
        return EngineCore(runner, scheduler, self.mesh, spell)

    def _advance(self, undisturbed: bool = False) -> None:
        """One step of the core; every delta goes to whoever waits for it."""
        for delta in self.core.step(undisturbed):
            self._mailboxes.get(delta.request_id, self._unread).append(delta)

    def _reads(self, request_id: str, mailbox: list[Delta]) -> bool:
        """Whether `mailbox` still gets the request's deltas.

        It does not once somebody has aborted the request; its id may then be another request's.
        """
        return self._mailboxes.get(request_id) is mailbox

    def _checked_params(self, params: SamplingParams | None) -> SamplingParams:
        if params is None:
            params = SamplingParams.from_defaults(self.defaults)
        if not isinstance(params, SamplingParams):
            raise SamplingError(
                f"sampling_params is {quoted(params, 100)}: expected a SamplingParams"
            )
        params.check_ids(self.config.vocab_size)
        if params.stop:
            self._need_tokenizer("stop")
        return params

    def _points(self, trace: Names, params: SamplingParams) -> set[str]:
        if trace is None:
            return set()
        if params.n > 1:
            raise SamplingError("trace is for n = 1: ask for one completion")
        return select(trace, self.config.num_hidden_layers)

    def _new_id(self, request_id: str | None, arrival: int) -> str:
        if request_id is None:
            return next(i for i in map(str, itertools.count(arrival)) if not self._knows(i))
        if not isinstance(request_id, str) or self._knows(request_id):
            raise SamplingError(
                f"request_id is {quoted(request_id, 100)}: "
                "expected a string that no running request has"
            )
        return request_id

    def _knows(self, request_id: str) -> bool:
        unread = any(delta.request_id == request_id for delta in self._unread)
        return unread or request_id in self.core.requests or request_id in self._mailboxes

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise SamplingError(f"{what} needs a tokenizer: this LLM was made without one")
        return self.tokenizer

    def _decoder(self, params: SamplingParams) -> IncrementalDecoder | None:
        """What makes a completion's text; None where there is none."""
        if self.tokenizer is None or not params.detokenize:
            return None
        return self.tokenizer.decoder(skip_special_tokens=params.skip_special_tokens)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words:
            return ()
        tokenizer = self._need_tokenizer("bad_words")

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, allow_special=False, add_special_tokens=False)

        return bad_word_ids(params.bad_words, encode)

    def _constraints(self, params: SamplingParams) -> list[Constraint | None]:
        """What follows the grammar, for each of the n completions; None where there is none."""
        if params.structured_outputs is None:
            return [None] * params.n
        grammar, stops = params.structured_outputs, params.stop_token_ids
        compiler = self._grammar_compiler()
        return [compiler.constraint(grammar, stops) for _ in range(params.n)]

    def _grammar_compiler(self) -> ConstraintCompiler:
        with self._making_compiler:
            if self._compiler is None:
                self._compiler = ConstraintCompiler(
                    self._need_tokenizer("structured_outputs"),
                    self.config.vocab_size,
                    self.defaults.eos_token_ids,
                )
            return self._compiler

    def _prompt_ids(self, prompt: Read) -> list[int]:
        """A prompt's token ids, checked."""
        ids = prompt.ids
        if ids is None and prompt.text is not None:
            ids = self._need_tokenizer("a prompt of text").encode(prompt.text)
        elif hasattr(ids, "tolist"):
            ids = ids.tolist()
        if not isinstance(ids, (list, tuple)):
            raise SamplingError(
                f"the prompt is {a_kind(ids)}: expected text or a list of token ids"
            )
        if not ids:
            raise SamplingError("the prompt has no tokens: give at least one")
        V = self.config.vocab_size
        for i in ids:
            if not is_integer(i) or not 0 <= i < V:
                raise SamplingError(f"prompt token id is {quoted(i, 100)}, expected 0 to {V - 1}")
        return [int(i) for i in ids]

    def _room(self, params: SamplingParams) -> int:
        """Most tokens of prompt and output together.

        The checkpoint's max_length counts where max_tokens does not say how many are new.
        """
        if params.max_tokens is not None or self.defaults.max_length is None:
            return self.max_model_len
        return min(self.max_model_len, self.defaults.max_length)

    def _check_room(self, prompt: int, room: int, params: SamplingParams, about: str = "") -> None:
        """Raise SamplingError for a prompt of so many tokens, after which there is room for none.

        One that is only scored needs none. about: what the number is, if not the prompt's own.
        """
        if prompt < room or (prompt == room and params.only_scores):
            return
        name, remedy = "max_model_len", "shorten it, or raise max_model_len"
        if room < self.max_model_len:
            name, remedy = "max_length of generation_config.json", "shorten it, or give max_tokens"
        raise SamplingError(
            f"the prompt has {about}{prompt} tokens, but prompt and output together have room for "
            f"{room} ({name}): {remedy}"
        )

    def _check_fewest(self, fewest: int) -> None:
        """Raise SamplingError for a prompt of at least so many tokens, if no context holds it."""
        room = self.max_model_len
        self._check_room(fewest, room, SamplingParams(max_tokens=1, prompt_logprobs=0), "at least ")

    def _entropy(self) -> int:
        seed = torch.tensor([secrets.randbits(62)], device=self.model.device)
        return int(self.mesh.world.broadcast(seed))


def agree_on_requests(mesh: Mesh, requests: Sequence[Request], hooks: bool = True) -> None:
    """Raise ParallelError unless all ranks of the mesh were asked for the same.

    hooks: at the same points too.
    """
    if mesh.size == 1:
        return
    facts: dict[str, object] = {"the number of prompts": len(requests)}
    for i, request in enumerate(requests):
        of = f" of prompt {i}" if len(requests) > 1 else ""
        facts |= {name + of: value for name, value in request.facts().items()}
        if hooks and request.hooks:
            facts["hooks" + of] = [sorted(points) for points, _ in request.hooks]
    agree(mesh, facts)


def spread(
    params: SamplingParams | Sequence[SamplingParams | None] | None, count: int
) -> list[SamplingParams | None]:
    """One SamplingParams for each of `count` prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, (list, tuple)):
        shown = quoted(params, 100)
        raise SamplingError(f"sampling_params is {shown}: expected a SamplingParams or a list")
    if len(params) != count:
        raise SamplingError(
            f"{len(params)} sampling_params for {count} prompts, expected one each or one"
        )
    return list(params)


def is_conversations(messages: object) -> bool:
    """Several conversations, rather than one. Raises SamplingError for what is no list."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        shown = quoted(messages, 100)
        raise SamplingError(f"messages is {shown}: expected a list of messages or conversations")
    return bool(messages) and isinstance(messages[0], (list, tuple))


def check_chat_options(options: Mapping[str, Any]) -> None:
    """Raise MinqwenError for what is no keyword of a chat, naming what was meant."""
    for name in options:
        if name in (field.name for field in dataclasses.fields(SamplingParams)):
            raise SamplingError(f"chat has no keyword {name!r}: give SamplingParams({name}=...)")
    unknown = [name for name in options if name not in KEYWORDS]
    refuse_unknown(unknown, also=("sampling_params", "cache_salt", "trace", "hooks", "use_tqdm"))
