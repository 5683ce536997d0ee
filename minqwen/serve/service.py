"""What is served: the model's name, its tokenizer, its engine; requests become jobs here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from minqwen.engine.llm import LLM
from minqwen.errors import MinqwenError
from minqwen.sampling.params import SamplingParams
from minqwen.serve.answers import Heading
from minqwen.serve.chat import Chat
from minqwen.serve.completions import Completions
from minqwen.serve.errors import ApiError
from minqwen.serve.front import Front
from minqwen.serve.limits import Limits
from minqwen.serve.loop import EngineLoop
from minqwen.serve.metrics import Metrics
from minqwen.serve.orders import Job
from minqwen.serve.params import chat_params, check_grammar_size, completion_params
from minqwen.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from minqwen.serve.tool_calls import forced_calls, message_for_template, tools_for_template

NO_TEMPLATES = "a chat template is a program: the model's own is used, never a client's"


class Service:
    """One model for many clients.

    The LLM's engine belongs to the thread that runs `loop`; here only its tokenizer, its compiler
    of grammars and its sizes are used. fingerprint: of the weights and the arithmetic, in every
    answer. seed: as in `EngineLoop`.
    """

    def __init__(
        self,
        llm: LLM,
        name: str | None = None,
        limits: Limits | None = None,
        fingerprint: str = "",
        seed: int | None = None,
    ):
        if llm.tokenizer is None:
            raise MinqwenError("a server needs a tokenizer: this LLM was made without one")
        self.llm, self.tokenizer, self.name = llm, llm.tokenizer, name or llm.name
        self.limits, self.fingerprint = limits or Limits(), fingerprint
        self.metrics = Metrics()
        self.loop = EngineLoop(llm, self.metrics, self.limits.queue_seconds, seed=seed)
        self.front = Front(self.loop, self.limits)
        self.metrics.open.set_function(lambda: self.front.prompts)
        self.created = int(time.time())
        self.vocab_size, self.max_model_len = llm.config.vocab_size, llm.max_model_len

    # ---- requests to jobs; these may take long, and run outside the event loop -------------------

    def completions(self, body: CompletionRequest) -> tuple[Completions, list[Job]]:
        """The jobs of a request to /v1/completions, and what will write its answer."""
        self.check_model(body.model)
        params = completion_params(body, self.llm.defaults, self.limits)
        self.llm.check_grammar(params)
        prompts, texts = self.prompts(body, self.longest_prompt(params))
        heading = Heading.new("cmpl", self.name, self.fingerprint)
        call = Completions(body, heading, self.tokenizer, prompts, texts)
        return call, self.jobs(heading, prompts, params, body.cache_salt)

    def chat(self, body: ChatRequest) -> tuple[Chat, list[Job]]:
        """The same for /v1/chat/completions."""
        self.check_model(body.model)
        check_grammar_size("tools", body.tools or "", self.limits)
        tools = tools_for_template(body)
        params = chat_params(body, self.llm.defaults, self.limits, forced_calls(body))
        self.llm.check_grammar(params)
        longest = self.longest_prompt(params)
        prompt = self.chat_ids(body, tools, longest) + self.begun_answer(body, longest)
        self.check_ids("messages", prompt, longest)
        heading = Heading.new("chatcmpl", self.name, self.fingerprint)
        call = Chat(body, heading, self.tokenizer, prompt, finds_calls=tools is not None)
        return call, self.jobs(heading, [prompt], params, body.cache_salt)

    def jobs(
        self,
        heading: Heading,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        salt: str | None,
    ) -> list[Job]:
        return [Job(f"{heading.id}-{i}", ids, params, salt) for i, ids in enumerate(prompts)]

    def prompts(self, body: CompletionRequest, longest: int) -> tuple[list[list[int]], list[str]]:
        """The prompts' ids and, where they are echoed, their texts. longest: tokens of a prompt."""
        found = body.prompt
        if isinstance(found, str) or (found and isinstance(found[0], int)):
            found = [found]  # type: ignore[assignment]  # one prompt, not several
        prompts: Any = found
        self.limits.check("prompt", len(prompts), self.limits.prompts, "prompts")
        if not prompts:
            raise ApiError(400, "prompt is empty: give at least one", param="prompt")
        for prompt in prompts:
            if isinstance(prompt, str) and len(prompt) > longest:
                fewest = self.tokenizer.fewest_tokens(prompt)
                self.check_length("prompt", fewest, longest, "at least ")
        ids = [
            self.encoded(prompt, body.add_special_tokens) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        for one in ids:
            self.check_ids("prompt", one, longest)
        if not body.echo:
            return ids, [""] * len(ids)
        texts = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in prompts]
        return ids, texts

    def encoded(self, prompt: str, add_special_tokens: bool) -> list[int]:
        try:
            return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        except MinqwenError as error:
            raise ApiError(400, f"prompt: {error}", param="prompt") from None

    def chat_ids(
        self,
        body: ChatRequest | TokenizeRequest,
        tools: list[dict[str, Any]] | None,
        longest: int,
    ) -> list[int]:
        """The prompt of a chat. What looks like a special token in a message is plain text."""
        messages = body.messages or []
        self.limits.check("messages", len(messages), self.limits.messages)
        self.limits.check("tools", len(body.tools or ()), self.limits.tools)
        if tools and not any("tools" in source for source in self.templates.values()):
            raise ApiError(400, "tools: this model's chat template reads none", param="tools")

        def check_fewest(fewest: int) -> None:
            self.check_length("messages", fewest, longest, "at least ")

        if "chat_template" in (body.chat_template_kwargs or ()):
            raise ApiError(400, f"chat_template_kwargs has 'chat_template': {NO_TEMPLATES}")
        ids = self.tokenizer.encode_chat(
            [message_for_template(message) for message in messages],
            tools=tools,
            documents=body.documents,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
            allow_special=False,
            check_fewest=check_fewest,
        )
        self.check_ids("messages", ids, longest)
        return ids

    def begun_answer(self, body: ChatRequest, longest: int) -> list[int]:
        """The tokens of an answer that is to be continued; no text has every sequence of them."""
        ids = body.continue_token_ids or []
        if ids:
            self.check_ids("continue_token_ids", ids, longest)
        return ids

    @property
    def templates(self) -> dict[str, str]:
        return self.tokenizer.chat_templates

    # ---- checks ---------------------------------------------------------------------------------

    def check_model(self, model: str | None) -> None:
        if model is not None and model != self.name:
            raise ApiError(
                404,
                f"there is no model {model[:200]!r} here, only {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def longest_prompt(self, params: SamplingParams) -> int:
        """Most tokens of a prompt: one that is only scored needs no room for another token."""
        return self.max_model_len if params.only_scores else self.max_model_len - 1

    def check_ids(self, name: str, ids: Sequence[int], longest: int) -> None:
        """Raise ApiError for a prompt that the model cannot take."""
        if not ids:
            raise ApiError(400, f"{name} has no tokens: give at least one", param=name)
        wrong = next((id for id in ids if not 0 <= id < self.vocab_size), None)
        if wrong is not None:
            expected = f"expected 0 to {self.vocab_size - 1}"
            raise ApiError(400, f"{name} has token id {wrong}: {expected}", param=name)
        self.check_length(name, len(ids), longest)

    def check_length(self, name: str, count: int, longest: int, about: str = "") -> None:
        """Raise ApiError for a prompt of more than `longest` tokens. about: what `count` is."""
        if count > longest:
            raise ApiError(
                400,
                f"{name} has {about}{count} tokens, but prompt and output together have room for "
                f"{self.max_model_len}: shorten it",
                param=name,
                code="context_length_exceeded",
            )

    # ---- small answers --------------------------------------------------------------------------

    def model_card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "minqwen",
            "root": self.name,
            "max_model_len": self.max_model_len,
            "system_fingerprint": self.fingerprint,
            "default_sampling_params": self.default_params(),
        }

    def default_params(self) -> dict[str, Any]:
        """The values of generation_config.json, which absent fields of a request have."""
        defaults = self.llm.defaults
        return {
            "temperature": defaults.temperature,
            "top_p": defaults.top_p,
            "top_k": defaults.top_k,
            "min_p": defaults.min_p,
            "repetition_penalty": defaults.repetition_penalty,
            "max_tokens": defaults.max_new_tokens,
        }

    def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        self.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give prompt or messages: one of them")
        if body.prompt is None:
            ids = self.chat_ids(body, body.tools, self.max_model_len)
        else:
            ids = self.encoded(body.prompt, body.add_special_tokens)
        strings = [self.tokenizer.id_to_token(i) for i in ids] if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": self.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }

    def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        self.check_model(body.model)
        wrong = next((id for id in body.tokens if id < 0), None)
        if wrong is not None:
            raise ApiError(400, f"tokens has {wrong}: expected ids from 0 on", param="tokens")
        found: dict[str, Any] = {"prompt": self.tokenizer.decode(body.tokens)}
        if body.return_token_bytes:
            found["token_bytes"] = [list(self.tokenizer.token_bytes(id)) for id in body.tokens]
        return found

    def tokenizer_info(self) -> dict[str, Any]:
        tokenizer = self.tokenizer
        return {
            "vocab_size": tokenizer.vocab_size,
            "padded_vocab_size": tokenizer.padded_vocab_size,
            "model_max_length": self.max_model_len,
            **tokenizer.named_tokens,
            "added_tokens": tokenizer.added_tokens,
            "special_token_ids": sorted(tokenizer.special_ids),
            "eos_token_ids": list(self.llm.defaults.eos_token_ids),
            "chat_template": tokenizer.chat_templates.get("default"),
            "chat_templates": sorted(tokenizer.chat_templates),
        }
