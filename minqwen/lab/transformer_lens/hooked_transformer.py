"""`HookedTransformer`: TransformerLens' calls on our model.

Every forward pass is `Qwen2`'s own with a tap that calls the hook points' functions: nothing is
computed twice here, and logits are the model's in every bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minqwen.engine.llm import LLM
from minqwen.errors import MinqwenError, TraceError, a_kind, warn
from minqwen.lab.transformer_lens.activation_cache import ActivationCache
from minqwen.lab.transformer_lens.config import HookedTransformerConfig
from minqwen.lab.transformer_lens.hook_points import (
    Direction,
    HookFunction,
    HookPoint,
    hook_names,
    unknown_point,
)
from minqwen.lab.transformer_lens.text import Text
from minqwen.lab.transformer_lens.utils import (
    BY_HEAD,
    Slice,
    SliceInput,
    lm_cross_entropy_loss,
)
from minqwen.lab.transformer_lens.weights import Weights
from minqwen.model import Qwen2
from minqwen.model.trace import Rows, TracingTap, alias_of, batched, canonical, handed_on, point_of
from minqwen.sampling.params import SamplingParams
from minqwen.tokenizer import Tokenizer

PointNames = str | Callable[[str], bool]
HookList = Iterable[tuple[PointNames, HookFunction]]
BLOCK_SIZE = 16  # of generate's cache
RETURN_TYPES = ("logits", "loss", "both", None)
# What TransformerLens does to weights when it loads them, and what that would change here.
PROCESSING = {
    "fold_ln": "it would move each norm's weight into the layers after it, so W_Q, W_K, W_V, W_in, "
    "W_gate and W_U would no longer be the checkpoint's",
    "center_writing_weights": "it would take the mean from what is written to the residual stream, "
    "which is right for LayerNorm only; RMSNorm sees that mean",
    "center_unembed": "it would take the mean from W_U and so a constant from all logits of a "
    "token; their differences and the probabilities stay",
    "fold_value_biases": "it would move b_V through W_O into b_O, which Qwen2 has not; hook_v and "
    "hook_z would change",
    "refactor_factored_attn_matrices": "it would replace W_Q, W_K, W_V and W_O by other factors of "
    "the same products",
}
ELSEWHERE = {
    "hf_model": "give a directory: hf_model.save_pretrained(DIR) writes it",
    "n_devices": "run on one device, or use Qwen2 under torchrun",
    "checkpoint_index": "give the directory of that checkpoint",
    "checkpoint_value": "give the directory of that checkpoint",
    "first_n_layers": "give stop_at_layer when the model is called",
}
NOT_IN_FORWARD = {
    "start_at_layer": "replace hook_resid_pre of that layer by a hook",
    "past_kv_cache": "give the whole text; LLM and generate have a cache",
    "attention_mask": "pad on the right, or give one sequence at a time",
    "shortformer_pos_embed": "positions are rotary",
    "tokens": "give the tokens as the input",
}


class Output(NamedTuple):
    """What return_type="both" gives."""

    logits: Tensor
    loss: Tensor


class Stopped(Exception):
    """Ends a forward pass at `stop_at_layer`, with the residual stream."""

    def __init__(self, x: Tensor):
        super().__init__("stop_at_layer")
        self.x = x


class HookedTransformer(Text, Weights, nn.Module):
    """A `Qwen2` under TransformerLens' names; `model` is the Qwen2 itself.

    Its weights require gradients from then on, as in TransformerLens, where the arithmetic has
    them. Parameters and the state dict have Hugging Face's names.
    """

    def __init__(self, model: Qwen2, tokenizer: Tokenizer | None = None, name: str = ""):
        super().__init__()
        if model.mesh.size > 1:
            raise MinqwenError(
                f"the model is spread over {model.mesh.size} ranks, expected one: W_Q and the "
                "others are whole here; run_with_cache of Qwen2 works on all ranks"
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.cfg = HookedTransformerConfig.of(model, name)
        self.hook_dict = {name: HookPoint(name) for name in hook_names(self.cfg.n_layers)}
        self.context_level = 0
        self.make_parts(model, self.hook_dict)
        if model.differentiable:
            model.requires_grad_()

    def __getattr__(self, name: str) -> Any:
        """`model.hook_embed`, and what a module has."""
        hooks = self.__dict__.get("hook_dict", {})
        return hooks[name] if name in hooks else super().__getattr__(name)

    def _apply(self, *args: Any, **options: Any) -> HookedTransformer:
        super()._apply(*args, **options)  # type: ignore[no-untyped-call]
        self.cfg.device, self.cfg.dtype = str(self.model.device), self.model.dtype
        return self

    # ---- loading

    @classmethod
    def from_pretrained(cls, model_name: str | Path, **options: Any) -> HookedTransformer:
        """The model in a Hugging Face directory; options as in `from_pretrained_no_processing`.

        TransformerLens would process the weights here. Where an option asks for that it is refused;
        where none rules it out a warning says that it is not done.
        """
        refuse_options(options)
        left = [name for name in PROCESSING if name not in options]
        if left:
            warn(
                "from_pretrained takes the checkpoint's weights as they are, without "
                f"TransformerLens' {', '.join(left)}: call from_pretrained_no_processing",
                stacklevel=2,
            )
        return cls.from_pretrained_no_processing(model_name, **options)

    @classmethod
    def from_pretrained_no_processing(
        cls,
        model_name: str | Path,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        tokenizer: Tokenizer | str | Path | None = None,
        arithmetic: str = "native",
        default_prepend_bos: bool | None = None,
        **options: Any,
    ) -> HookedTransformer:
        """The model in a Hugging Face directory, float32 unless another dtype is given.

        tokenizer: ours, or its directory; None is the model's own. Raises MinqwenError for an
        option of TransformerLens that would change the weights.
        """
        refuse_options(options)
        if not isinstance(tokenizer, Tokenizer | str | Path | None):
            raise MinqwenError(
                f"tokenizer is {a_kind(tokenizer)}, expected its directory, or nothing "
                "for the model's own"
            )
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer.from_dir(model_name if tokenizer is None else tokenizer)
        model = Qwen2.from_pretrained(model_name, dtype=dtype, device=device, arithmetic=arithmetic)
        hooked = cls(model, tokenizer, str(model_name))
        hooked.cfg.default_prepend_bos = bool(default_prepend_bos)
        return hooked

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether attn.hook_result is computed: each head's share, H times the residual stream."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        refuse_points(use_split_qkv_input, "hook_q_input, hook_k_input and hook_v_input")

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        refuse_points(use_hook_mlp_in, "hook_mlp_in")

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        refuse_points(use_attn_in, "hook_attn_in")

    def set_ungroup_grouped_query_attention(self, ungroup: bool) -> None:
        refuse_points(ungroup, "hook_k and hook_v of every query head")

    # ---- running

    def forward(
        self,
        input: str | list[str] | Tensor,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        stop_at_layer: int | None = None,
        **others: Any,
    ) -> Any:
        """Logits [B, T, V] of a text, texts or tokens [B, T] or [T]; or the loss, or both, or None.

        The loss is the mean of -log p of every next token, or with loss_per_token all of them,
        [B, T - 1]. stop_at_layer: the residual stream [B, T, D] before that layer instead.
        """
        refuse_others(others)
        if return_type not in RETURN_TYPES:
            raise MinqwenError(
                f"return_type is {return_type!r}, expected 'logits', 'loss', 'both' or None"
            )
        tokens = self.tokens_of(input, prepend_bos, padding_side)
        try:
            logits = self._run(tokens, stop_at_layer)
        except Stopped as end:
            return end.x
        if return_type in ("logits", None):
            return logits if return_type else None
        loss = self.loss_fn(logits, tokens, per_token=loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def loss_fn(self, logits: Tensor, tokens: Tensor, per_token: bool = False) -> Tensor:
        return lm_cross_entropy_loss(logits, tokens.to(logits.device), per_token)

    def tokens_of(
        self,
        input: str | list[str] | Tensor,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> Tensor:
        """What a model is called with, as ids [B, T] on its device."""
        if not isinstance(input, Tensor):
            return self.to_tokens(input, prepend_bos, padding_side)
        return (input[None] if input.dim() == 1 else input).to(self.model.device)

    def _run(self, tokens: Tensor, stop_at_layer: int | None) -> Tensor:
        """The forward pass, with the functions of all hook points that have some."""
        end = self._end(stop_at_layer)
        scales = {self._stream_of(hook.name): hook for hook in self._hooked() if hook.is_scale}
        names = {canonical(hook.name) for hook in self._hooked() if not hook.is_scale}
        names |= scales.keys() | ({end} if end else set())

        def show(name: str, x: Tensor, rows: Rows | None) -> Tensor | None:
            seen = batched(x, point_of(name), tokens)
            point = self.hook_dict[alias_of(name) or name]
            new = point.called(seen)
            handed = handed_on(self.model, point.name, x, seen, new)
            point.watch_gradient(new)
            if name in scales:
                scales[name].called(self._scale(new))
            if name == end:
                raise Stopped(new)
            return handed

        logits: Tensor = self.model(tokens, tap=TracingTap(self.model, names, show))
        return logits

    def _hooked(self) -> list[HookPoint]:
        return [hook for hook in self.hook_points() if hook.fwd_hooks or hook.bwd_hooks]

    def _end(self, stop_at_layer: int | None) -> str | None:
        """The point whose tensor is the answer of a pass that stops before a layer."""
        if stop_at_layer is None:
            return None
        layers = self.cfg.n_layers
        if not -layers <= stop_at_layer <= layers:
            raise MinqwenError(f"stop_at_layer is {stop_at_layer}, expected {-layers} to {layers}")
        before = stop_at_layer + layers if stop_at_layer < 0 else stop_at_layer
        return f"layers.{before - 1}.resid_post" if before else "embed"

    def _stream_of(self, scale: str) -> str:
        """Which residual stream a norm's denominator is of."""
        if scale.startswith("ln_final."):
            return f"layers.{self.cfg.n_layers - 1}.resid_post"
        stream = "resid_pre" if ".ln1." in scale else "resid_mid"
        return f"layers.{scale.split('.')[1]}.{stream}"

    def _scale(self, x: Tensor) -> Tensor:
        """sqrt(mean(x^2) + eps) of a residual stream, [B, T, 1], in float32 at least."""
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide.pow(2).mean(-1, keepdim=True) + self.cfg.eps).sqrt()

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """The model's answer with these hooks, which are removed at the end."""
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*model_args, **model_kwargs)

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: PointNames | list[str] | None = None,
        device: str | torch.device | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Slice | SliceInput = None,
        return_cache_object: bool = True,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """The model's answer, and an `ActivationCache` of what passed the points; or a dict of it.

        incl_bwd: the answer is a loss, whose gradients are under the points' names with "_grad".
        """
        cache, fwd, bwd = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice
        )
        with self.hooks(fwd, bwd, reset_hooks_end, clear_contexts):
            answer = self(*model_args, **model_kwargs)
            if incl_bwd:
                answer.backward()
        if not return_cache_object:
            return answer, cache
        return answer, ActivationCache(cache, self, not remove_batch_dim)

    def get_caching_hooks(
        self,
        names_filter: PointNames | list[str] | None = None,
        incl_bwd: bool = False,
        device: str | torch.device | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Slice | SliceInput = None,
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        """An empty cache, and the hooks, forward and backward, that fill it."""
        kept: dict[str, Tensor] = {} if cache is None else cache
        part = Slice.unwrap(pos_slice)

        def keep(x: Tensor, hook: HookPoint, suffix: str = "") -> None:
            x = x.detach().to(device).clone()  # hooks after this one may write into it
            x = x[0] if remove_batch_dim else x
            kept[hook.name + suffix] = part.apply(x, -3 if hook.name.endswith(BY_HEAD) else -2)

        def keep_gradient(x: Tensor, hook: HookPoint) -> None:
            keep(x, hook, "_grad")

        points = self._points(names_filter)
        forward = [(point.name, keep) for point in points]
        back = [(point.name, keep_gradient) for point in points if not point.is_scale]
        return kept, forward, back if incl_bwd else []

    # ---- hooks

    def hook_points(self) -> Sequence[HookPoint]:
        return list(self.hook_dict.values())

    @contextmanager
    def hooks(
        self,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedTransformer]:
        """Within this context the model has these hooks: pairs (name or predicate, function)."""
        self.context_level += 1
        try:
            for names, function in fwd_hooks:
                self.add_hook(names, function, "fwd", level=self.context_level)
            for names, function in bwd_hooks:
                self.add_hook(names, function, "bwd", level=self.context_level)
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts, level=self.context_level)
            self.context_level -= 1

    def add_hook(
        self,
        name: PointNames,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Have `hook(tensor, hook=point)` called at a point, or at all for which `name` is true."""
        for point in self._points(name):
            point.add_hook(hook, dir, is_permanent, level, prepend)

    def add_perma_hook(self, name: PointNames, hook: HookFunction, dir: Direction = "fwd") -> None:
        self.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Direction = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks: all that are not permanent, or those of one level of `hooks`."""
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent, level)
            if clear_contexts:
                point.clear_context()

    def remove_all_hook_fns(
        self,
        direction: Direction = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        self.reset_hooks(False, direction, including_permanent, level)

    def _points(self, names: PointNames | list[str] | None) -> list[HookPoint]:
        """The points of a name, a list of names or a predicate; None is all. Raises TraceError."""
        if isinstance(names, (list, tuple)):
            return [point for name in names for point in self._points(name)]
        if isinstance(names, str):
            if names not in self.hook_dict:
                raise unknown_point(names, list(self.hook_dict))
            point = self.hook_dict[names]
            if point.is_result and not self.cfg.use_attn_result:
                raise TraceError(f"{names} is not computed: call set_use_attn_result(True) first")
            return [point]
        points = [
            point
            for point in self.hook_points()
            if (names is None or names(point.name))
            and (self.cfg.use_attn_result or not point.is_result)
        ]
        if not points:
            raise TraceError("the predicate is true for no hook point: model.hook_dict has them")
        return points

    # ---- directions and texts

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """W_U's columns of these tokens, [..., D]: what a stream after ln_final meets."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        if isinstance(tokens, Tensor) and tokens.numel() == 1:
            tokens = int(tokens)
        return self.W_U[:, tokens].movedim(0, -1)

    def all_head_labels(self) -> list[str]:
        return [f"L{i}H{h}" for i in range(self.cfg.n_layers) for h in range(self.cfg.n_heads)]

    @torch.no_grad()
    def generate(
        self,
        input: str | list[str] | Tensor = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: str = "input",
        verbose: bool = True,
    ) -> Any:
        """The input and what follows it, by the engine: text for text, tokens for tokens.

        Sampling is by torch's seed (`torch.manual_seed`), and other draws than TransformerLens'.
        Sequences that end before others are filled with the token that ends them.
        """
        if self._hooked():
            raise MinqwenError(
                "generate has no hooks: remove them with reset_hooks(), or give hooks= to "
                "LLM.generate"
            )
        if return_type not in ("input", "str", "tokens"):
            raise MinqwenError(
                f"return_type is {return_type!r}, expected 'input', 'str' or 'tokens'"
            )
        tokens = self.tokens_of(input, prepend_bos, padding_side)
        ends: list[int] = []
        if stop_at_eos:
            given = self.end_id if eos_token_id is None else eos_token_id
            ends = [given] if isinstance(given, int) else list(given)
        params = SamplingParams(
            temperature=temperature if do_sample else 0.0,
            top_k=top_k or 0,
            top_p=1.0 if top_p is None else top_p,
            frequency_penalty=freq_penalty,
            max_tokens=max_new_tokens,
            stop_token_ids=ends,
            ignore_eos=True,
            detokenize=False,
        )
        continued = self._continued(tokens, params, ends, verbose)
        if return_type == "tokens" or (return_type == "input" and isinstance(input, Tensor)):
            return continued
        rows = continued.tolist()
        texts = [self.need_tokenizer().decode(row, skip_special_tokens=True) for row in rows]
        return texts[0] if len(texts) == 1 else texts

    def _continued(
        self, tokens: Tensor, params: SamplingParams, ends: list[int], verbose: bool
    ) -> Tensor:
        """tokens [B, T] with what the engine adds to each, filled up with the first of `ends`."""
        assert params.max_tokens is not None
        length = tokens.shape[1] + params.max_tokens
        seed = int(torch.randint(2**31, ()))
        with LLM(
            self.model,
            seed=seed,
            max_model_len=length,
            num_blocks=len(tokens) * (-(-length // BLOCK_SIZE) + 1),
            block_size=BLOCK_SIZE,
        ) as llm:
            outputs = llm.generate(tokens.tolist(), params, use_tqdm=verbose)
        new = [list(output.outputs[0].token_ids) for output in outputs]
        longest = max(map(len, new))
        filled = [row + ends[:1] * (longest - len(row)) for row in new]
        return torch.cat([tokens, torch.tensor(filled, device=tokens.device)], dim=1)


def refuse_options(options: dict[str, Any]) -> None:
    """Raise MinqwenError for an option of `from_pretrained` that asks for something not here."""
    for name, value in options.items():
        if name in PROCESSING:
            if value:
                raise MinqwenError(
                    f"{name} is not done here: {PROCESSING[name]}; give {name}=False"
                )
        elif name in ELSEWHERE:
            if value not in (None, 1):
                raise MinqwenError(f"{name} is not taken: {ELSEWHERE[name]}")
        elif name == "default_padding_side":
            if value != "right":
                raise MinqwenError(f"{name} is {value!r}, expected 'right': there is no mask here")
        elif name not in ("move_to_device", "trust_remote_code"):
            raise MinqwenError(f"from_pretrained has no option {name!r} here: leave it out")


def refuse_points(wanted: bool, points: str) -> None:
    if wanted:
        raise TraceError(
            f"there is no {points} in this forward pass: q, k and v have one input, and the points "
            "after it can be replaced (hook_q, hook_k, hook_v, hook_pre)"
        )


def refuse_others(others: dict[str, Any]) -> None:
    """Raise MinqwenError for an argument of TransformerLens' forward that is not here."""
    for name, value in others.items():
        if name not in NOT_IN_FORWARD:
            raise MinqwenError(f"the model has no argument {name!r}: leave it out")
        if value is not None:
            raise MinqwenError(f"{name} is not taken: {NOT_IN_FORWARD[name]}")
