"""TransformerLens' `utils`, as far as scripts on this model use them: names, slices, losses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minqwen.errors import TraceError

SliceInput = int | tuple[int | None, ...] | slice | Sequence[int] | Tensor | np.ndarray | None

KINDS = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}
SHORT = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
IN_ATTENTION = ("q", "k", "v", "z", "rot_q", "rot_k", "result", "pattern", "attn_scores")
IN_MLP = ("pre", "post", "mid", "pre_linear")
# The ends of names of tensors [B, T, heads, ...].
BY_HEAD = ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_z", "hook_result")


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """The full name of an activation: ("pattern", 3) is "blocks.3.attn.hook_pattern".

    So are "pattern3" and "blocks.3.attn.hook_pattern". layer_type: "ln1" or "ln2" where a name
    ("scale", "normalized") is in both.
    """
    if ("." in name or name.startswith("hook_")) and layer is None and layer_type is None:
        return name
    together = re.match(r"([a-z]+)(\d+)([a-z]?.*)", name)
    if together:
        name, layer, layer_type = together[1], together[2], together[3]
    name = SHORT.get(name, name)
    if name in ("scale", "normalized") and layer is None:
        return f"ln_final.hook_{name}"
    if name in IN_ATTENTION:
        layer_type = "attn"
    elif name in IN_MLP:
        layer_type = "mlp"
    elif layer_type is not None:
        layer_type = KINDS.get(layer_type, layer_type)
    where = "" if layer is None else f"blocks.{layer}."
    return f"{where}{layer_type}.hook_{name}" if layer_type else f"{where}hook_{name}"


class Slice:
    """What to take of one dimension of a tensor.

    An int takes one entry, and the dimension is gone; (a, b, step) is a:b:step; a list or a tensor
    of ints takes these; None takes all.
    """

    def __init__(self, input_slice: SliceInput = None):
        self.slice: Any = input_slice
        if input_slice is None:
            self.slice = slice(None)
        elif isinstance(input_slice, tuple):
            self.slice = slice(*input_slice)
        elif isinstance(input_slice, (list, Tensor, np.ndarray)):
            self.slice = to_numpy(input_slice)
        elif not isinstance(input_slice, (int, slice)):
            raise TraceError(
                f"a slice is {input_slice!r}, expected an int, a tuple (first, end), a list of "
                "ints, or None for all"
            )

    def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """That part of a dimension of the tensor."""
        index: list[Any] = [slice(None)] * tensor.ndim
        index[dim] = self.slice
        return tensor[tuple(index)]

    def __repr__(self) -> str:
        return f"Slice({self.slice!r})"

    @classmethod
    def of(cls, given: Slice | SliceInput) -> Slice:
        return given if isinstance(given, Slice) else cls(given)

    @classmethod
    def unwrap(cls, given: Slice | SliceInput) -> Slice:
        """The same, but an int keeps its dimension, of size 1."""
        return cls([given]) if isinstance(given, int) else cls.of(given)


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor, on whatever device, or numbers, as a numpy array."""
    if isinstance(tensor, Tensor):
        tensor = tensor.detach().cpu()
        tensor = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return np.asarray(tensor)


def lm_cross_entropy_loss(logits: Tensor, tokens: Tensor, per_token: bool = False) -> Tensor:
    """-log p of every next token: their mean, or all of them, [B, T - 1].

    logits [B, T, V], tokens [B, T].
    """
    logprobs = logits.log_softmax(dim=-1)
    losses = -logprobs[..., :-1, :].gather(-1, tokens[..., 1:, None])[..., 0]
    return losses if per_token else losses.mean()


def lm_accuracy(logits: Tensor, tokens: Tensor, per_token: bool = False) -> Tensor:
    """How often the likeliest token is the next one; with per_token where it is, [B, T - 1]."""
    right = logits.argmax(dim=-1)[..., :-1] == tokens[..., 1:]
    return right if per_token else right.sum() / right.numel()


def test_prompt(
    prompt: str,
    answer: str,
    model: Any,
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> None:
    """Print the rank and the probability of each token of the answer, and the top_k tokens."""
    if prepend_space_to_answer and not answer.startswith(" "):
        answer = " " + answer
    tokens = model.to_tokens(prompt, prepend_bos=prepend_bos)
    said = model.to_tokens(answer, prepend_bos=False)
    if print_details:
        print("Tokenized prompt:", model.to_str_tokens(tokens))
        print("Tokenized answer:", model.to_str_tokens(said))
    with torch.no_grad():
        logits = model(torch.cat([tokens, said], dim=1))[0]
    for i, token in enumerate(said[0].tolist()):
        row = logits[tokens.shape[1] - 1 + i]
        share, rank = row.softmax(-1)[token].item(), int((row > row[token]).sum())
        text = model.to_single_str_token(token)
        print(f"Rank: {rank:<8} Logit: {row[token]:5.2f} Prob: {share:6.2%} Token: |{text}|")
        if print_details:
            values, ids = row.topk(top_k)
            for place, (value, id) in enumerate(zip(values.tolist(), ids.tolist())):
                text, share = model.to_single_str_token(id), row.softmax(-1)[id].item()
                print(f"Top {place}th token. Logit: {value:5.2f} Prob: {share:6.2%} |{text}|")


test_prompt.__test__ = False  # type: ignore[attr-defined]  # pytest takes it for a test
