"""A model of lm-evaluation-harness that is our engine. Needs the extra [eval].

What is sent to the model is what the harness's own `hf` model sends: the same token ids, the same
truncation, the same stop strings. So in native float32 both give the same numbers. Batching is the
engine's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minqwen.engine.llm import LLM
from minqwen.engine.outputs import RequestOutput, TokenLogprobs
from minqwen.errors import MinqwenError
from minqwen.lab.together import Ask, ask
from minqwen.tokenizer import Tokenizer

NEW_TOKENS = 256  # of a generation that does not say how many, as in `hf`
Score = tuple[float, bool]  # log p of a continuation, in nats; whether greedy decoding writes it
# The texts, for the harness's cache; the ids of the context; those of the continuation.
Pair = tuple[tuple[str, str] | None, list[int], list[int]]


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm_eval is not there when types are checked
    """An `LLM` as the harness sees it.

    Under torchrun it is made on rank 0 alone, while the other ranks call `together.follow`; at the
    end rank 0 calls `together.end`. max_length: tokens that go through the model at most; None: the
    engine's context. As in `hf` a text that is scored may be one token longer, because its last
    token is only looked up. Raises MinqwenError for what cannot be evaluated.
    """

    def __init__(self, llm: LLM, max_length: int | None = None):
        super().__init__()
        self.llm, self.tokenizer = llm, llm.get_tokenizer()
        self.max_length = llm.max_model_len if max_length is None else max_length
        if not 1 <= self.max_length <= llm.max_model_len:
            raise MinqwenError(
                f"max_length is {max_length}, expected 1 to {llm.max_model_len}, the context"
            )

    # ---- the tokenizer --------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        found = self.llm.get_tokenizer().eos_token_id
        return self.llm.defaults.eos_token_ids[0] if found is None else found

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        first = self.llm.get_tokenizer().bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        return self.llm.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: object
    ) -> list[int]:
        """add_special_tokens None: as the checkpoint wants it, unless they are in the text."""
        tokenizer: Tokenizer = self.llm.get_tokenizer()
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(tokenizer.decode([self.prefix_token_id]))
        return tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        return self.llm.get_tokenizer().apply_chat_template(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template that `apply_chat_template` uses, for the report."""
        if not chat_template:
            return None
        templates = self.llm.get_tokenizer().chat_templates
        if chat_template is not True and chat_template != "default":
            raise MinqwenError(
                f"chat template {chat_template!r}: expected the checkpoint's default"
            )
        if "default" not in templates:
            raise MinqwenError("this checkpoint has no chat template: leave it out")
        return templates["default"]

    def get_model_info(self) -> dict[str, Any]:
        """For the report: whose numbers these are."""
        model = self.llm.model
        return {
            "model": f"minqwen {self.llm.name}",
            "model_dtype": str(model.dtype),
            "arithmetic": model.ops.name,
            "max_length": self.max_length,
        }

    # ---- log likelihoods ------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **unused: object) -> list[Score]:
        asks = [self._scoring(context, continuation) for _, context, continuation in requests]
        scores = []
        for (texts, _, continuation), output in zip(requests, ask(self.llm, asks), strict=True):
            scores.append(score_of(output, len(continuation)))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, scores[-1])
        return scores

    def _scoring(self, context: Sequence[int], continuation: Sequence[int]) -> Ask:
        """The continuation's last token is forced, and the rest of the text is the prompt.

        A continuation of one token needs no logprobs of the prompt, so that all of a question's
        answers share its keys and values.
        """
        if not 0 < len(continuation) <= self.max_length:
            raise MinqwenError(
                f"a continuation has {len(continuation)} tokens: expected 1 to {self.max_length}, "
                "the context"
            )
        ids = [*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) :]
        of_prompt = 1 if len(continuation) > 1 else None
        forced = {"forced_ids": ids[-1:], "logprobs": 1, "detokenize": False}
        return ids[:-1], {**forced, "prompt_logprobs": of_prompt}

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts. Of a long one every window but the last is new to its end."""
        texts = [request.args[0] for request in requests]
        windows = [self._windows(text) for text in texts]
        pairs: list[Pair] = [(None, *window) for some in windows for window in some]
        scores = iter(self._loglikelihood_tokens(pairs))
        totals = []
        for text, some in zip(texts, windows):
            totals.append(sum(next(scores)[0] for _ in some))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        pairs = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(pair) for pair in pairs]

    # ---- texts ----------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each without the stop string that ends it."""
        args = [request.args for request in requests]
        wanted = [self._generation(context, options) for context, options in args]
        texts = []
        outputs: Iterator[RequestOutput] = ask(self.llm, [one for one, _ in wanted])
        for (context, options), (_, until), output in zip(args, wanted, outputs, strict=True):
            text: str = postprocess_generated_text(output.outputs[0].text, until, None)
            texts.append(text)
            self.cache_hook.add_partial("generate_until", (context, options), text)
        return texts

    def _generation(self, context: str, options: dict[str, Any]) -> tuple[Ask, list[str]]:
        """What is asked for one context, and the strings before which its text ends.

        The strings are kept in the text, so that the harness itself cuts it, as it does for `hf`.
        """
        fields = dict(normalize_gen_kwargs(options, NEW_TOKENS))
        end_of_text = self.llm.get_tokenizer().decode([self.eot_token_id])
        until: list[str] = handle_stop_sequences(fields.pop("until"), end_of_text)
        max_tokens = fields.pop("max_gen_toks")
        room = self.max_length - max_tokens
        if room < 1:
            raise MinqwenError(
                f"max_gen_toks is {max_tokens}: expected less than {self.max_length}, the context"
            )
        if not fields.pop("do_sample"):
            fields["temperature"] = 0
        stop = [string for string in until if string]
        fields |= {"max_tokens": max_tokens, "stop": stop, "include_stop_str_in_output": True}
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        return (ids, fields), until


def score_of(output: RequestOutput, count: int) -> Score:
    """The score of the last `count` tokens of a prompt and of the one token that was forced."""
    entries: list[TokenLogprobs | None] = [
        *(output.prompt_logprobs or ()),
        *(output.outputs[0].logprobs or ()),
    ]
    total, greedy = 0.0, True
    for entry in entries[-count:]:
        assert entry is not None, "only a prompt's first token has no logprob"
        total += next(iter(entry.values())).logprob  # the text's own token comes first
        greedy &= len(entry) == 1  # and is the likeliest, if there is no other
    return total, greedy
