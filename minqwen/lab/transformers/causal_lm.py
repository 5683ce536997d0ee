"""`Qwen2ForCausalLM`: transformers' calls on our model.

Every forward pass is `Qwen2`'s own; a tap reads hidden states and attentions, and hides padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqwen.checks import integer
from minqwen.errors import MinqwenError
from minqwen.lab.transformers.generation import generate
from minqwen.lab.transformers.inputs import checked_positions, hidden_keys, packed_texts
from minqwen.lab.transformers.outputs import CausalLMOutput, GenerateOutput
from minqwen.lab.transformers.refused import IDLE_IN_LOADING, OF_FORWARD, OF_LOADING, refuse
from minqwen.lab.transformers.settings import GenerationConfig, settled
from minqwen.model import Qwen2
from minqwen.model.arithmetic import Linear
from minqwen.model.batch import Batch
from minqwen.model.inputs import check_ids
from minqwen.model.qwen2 import Embedding
from minqwen.model.trace import Rows, TracingTap, hidden_state_names

IGNORED = -100  # the label of a token that does not count
LOADING = ("dtype", "device_map", "attn_implementation", "arithmetic")
FORWARD = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "inputs_embeds",
    "labels",
    "use_cache",
    "logits_to_keep",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
)


class Qwen2ForCausalLM(nn.Module):
    """A `Qwen2` under transformers' names; `qwen2` is the Qwen2 itself.

    Modules, parameters and the state dict have Hugging Face's names. The weights require gradients
    from then on, as in transformers, where the arithmetic has them. config is our `ModelConfig`,
    whose fields have Hugging Face's names too.
    """

    qwen2: Qwen2

    def __init__(self, qwen2: Qwen2, generation_config: GenerationConfig | None = None):
        super().__init__()
        if qwen2.mesh.size > 1:
            raise MinqwenError(
                f"the model is spread over {qwen2.mesh.size} ranks, expected one: Qwen2 and LLM "
                "work on all ranks"
            )
        # Not as a module of this one: then names would begin with "qwen2.".
        object.__setattr__(self, "qwen2", qwen2.eval())
        self.model, self.lm_head = qwen2.model, qwen2.lm_head
        self.config = qwen2.config
        self.generation_config = generation_config or GenerationConfig.from_model_config(
            qwen2.config
        )
        if qwen2.differentiable:
            qwen2.requires_grad_()
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        arithmetic: str = "native",
        **others: Any,
    ) -> Qwen2ForCausalLM:
        """The model in a Hugging Face directory, in config.json's dtype unless one is given.

        torch_dtype: dtype's older name. device_map: a device, or "auto": a GPU if there is one.
        arithmetic: that of `Qwen2`. Raises MinqwenError for what transformers takes and would
        change something here.
        """
        others = {name: x for name, x in others.items() if name not in IDLE_IN_LOADING}
        refuse("from_pretrained", others, OF_LOADING, LOADING)
        if attn_implementation not in (None, "eager"):
            raise MinqwenError(
                f"attn_implementation is {attn_implementation!r}, expected 'eager': that is what "
                "is computed here, and others round differently; leave it out"
            )
        path = pretrained_model_name_or_path
        qwen2 = Qwen2.from_pretrained(
            path,
            dtype=dtype or torch_dtype or "auto",
            device=device_of(device_map),
            arithmetic=arithmetic,
        )
        return cls(qwen2, GenerationConfig.from_dir(path, qwen2.config))

    # ---- what modules have

    @property
    def device(self) -> torch.device:
        return self.qwen2.device

    @property
    def dtype(self) -> torch.dtype:
        return self.qwen2.dtype

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of nn.Module; weights that are packed come back for it."""
        return self.qwen2.named_parameters(*args, **options)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def get_input_embeddings(self) -> Embedding:
        return self.qwen2.model.embed_tokens

    def get_output_embeddings(self) -> Linear:
        return self.qwen2.lm_head

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """`Qwen2.save_pretrained`, with its options: sources=DIR copies DIR's tokenizer too."""
        self.qwen2.save_pretrained(save_directory, **options)

    # ---- running

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits [B, T, V], and what else is asked for, as transformers' eager attention has them.

        attention_mask [B, T]: 0 hides a token. position_ids: 0, 1, 2, ... where there are none,
        also of padded rows, as in transformers. Where use_cache is False and there is no mask, a
        jump in them begins another text, which sees nothing of those before. labels [B, T]: the
        loss is the mean of -log p of every label after the first that is not -100. logits_to_keep:
        of so many tokens at the end; 0 is all. hidden_states: L + 1 tensors [B, T, D], the last one
        after the final norm. attentions: L tensors [B, H, T, T]. return_dict False: a tuple. Raises
        MinqwenError for what is not taken.
        """
        refuse("the model", others | {"use_cache": use_cache}, OF_FORWARD, FORWARD)
        ids = ids_of(input_ids, inputs_embeds)
        check_ids(ids, self.config)
        texts = None
        if position_ids is not None:
            position_ids = checked_positions(position_ids, ids)
            texts = packed_texts(position_ids) if use_cache is False else None
        watch = Watch(self.qwen2, hidden_keys(attention_mask, texts, ids), inputs_embeds)
        states = hidden_state_names(self.config.num_hidden_layers) if output_hidden_states else []
        layers = range(self.config.num_hidden_layers if output_attentions else 0)
        patterns = [f"layers.{i}.attn.pattern" for i in layers]
        keep = integer("logits_to_keep", logits_to_keep, 0)
        batch = self._batch(ids, position_ids, 0 if states else keep)
        logits = self.qwen2(ids.flatten(), batch, tap=watch.tap([*states, *patterns]))
        logits = logits.unflatten(0, (len(ids), -1))[:, -keep:]
        hidden = tuple(watch.seen[name].unflatten(0, ids.shape) for name in states)
        output = CausalLMOutput(
            loss=None if labels is None else causal_loss(logits, labels),
            logits=logits,
            hidden_states=hidden or None,
            attentions=tuple(watch.seen[name] for name in patterns) or None,
        )
        return output.to_tuple() if return_dict is False else output

    def _batch(self, ids: Tensor, position_ids: Tensor | None, keep: int) -> Batch:
        """Of whole sequences. keep: how many tokens at their ends have logits; 0 is all."""
        B, T = ids.shape
        batch = Batch.dense(B, T, ids.device)
        if position_ids is not None:
            longest = int(position_ids.max()) + 1
            self.qwen2.rotary(Batch.dense(1, longest, ids.device))  # so that it has their angles
            batch = dataclasses.replace(batch, positions=position_ids.flatten())
        if keep:
            at = torch.arange(B * T, device=ids.device).view(B, T)[:, -keep:].flatten()
            batch = dataclasses.replace(batch, logits_at=at)
        return batch

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: object = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """The prompts [B, T] with what the engine adds to them, [B n, T + new], padded at the end.

        options: the fields of `GenerationConfig`; then `generation_config` counts, then the
        model's own. Greedy ids are transformers'; sampling is by torch's seed, and other draws.
        Prompts are padded on the left. With return_dict_in_generate a `GenerateOutput`: logits and
        scores [B n, V] of every step, zeros where a sequence had ended. Raises MinqwenError for
        what is not taken.
        """
        settings = settled(self.generation_config, generation_config, options)
        ids = inputs if input_ids is None else input_ids
        if ids is None:
            raise MinqwenError("generate has no input_ids: give the prompts [B, T]")
        ids = ids.to(self.device) if isinstance(ids, Tensor) else ids
        return generate(self.qwen2, ids, attention_mask, settings)


AutoModelForCausalLM = Qwen2ForCausalLM


class Watch:
    """What a forward pass shows on its way, and what takes the place of embeddings and scores."""

    def __init__(self, model: Qwen2, hidden: Tensor | None, embeds: Tensor | None):
        self.model, self.hidden, self.embeds = model, hidden, embeds
        self.seen: dict[str, Tensor] = {}

    def tap(self, wanted: list[str]) -> TracingTap:
        """The tap of a pass that keeps these points."""
        names = {*wanted}
        if self.embeds is not None:
            names.add("embed")
        if self.hidden is not None:
            names |= {f"layers.{i}.attn.scores" for i in range(self.model.config.num_hidden_layers)}
        return TracingTap(self.model, names, self._show)

    def _show(self, name: str, x: Tensor, rows: Rows | None) -> Tensor:
        if name == "embed" and self.embeds is not None:
            x = self.embeds.flatten(0, 1).to(x)
        if name.endswith("attn.scores") and self.hidden is not None:
            # The least number, not -inf: a row that sees nothing is then transformers' too.
            x = x.masked_fill(self.hidden, torch.finfo(x.dtype).min)
        self.seen[name] = x
        return x


def device_of(device_map: Any) -> Any:
    """The device that a device_map means. Raises MinqwenError for one with several."""
    if device_map == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, dict):
        if len(devices := {*device_map.values()}) != 1:
            raise MinqwenError(f"device_map names {len(devices)} devices, expected one")
        return devices.pop()
    return device_map


def ids_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Any:
    """input_ids, or zeros in their place where embeddings are given. Raises MinqwenError."""
    if (input_ids is None) == (inputs_embeds is None):
        raise MinqwenError("give input_ids or inputs_embeds, one of the two")
    if inputs_embeds is None:
        return input_ids
    if not isinstance(inputs_embeds, Tensor) or inputs_embeds.dim() != 3:
        raise MinqwenError("inputs_embeds are no tensor [B, T, D]: give one, or input_ids")
    return torch.zeros(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of -log p of the labels, each from the logits before it, in float32."""
    if not isinstance(labels, Tensor) or labels.shape != logits.shape[:2]:
        raise MinqwenError(
            f"labels are not {tuple(logits.shape[:2])}, one for each token that has logits: give "
            f"such a tensor, and no logits_to_keep; {IGNORED} does not count"
        )
    following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    flat = logits.float().flatten(0, 1)
    return F.cross_entropy(flat, following.to(flat.device), ignore_index=IGNORED)
