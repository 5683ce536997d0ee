"""`ActivationCache`: what passed the hook points, and the sums that make up a residual stream.

Shapes are TransformerLens': stacks are [components, B, T, D], and without the batch's dimension
once `remove_batch_dim` was called. "apply_ln" divides each component by the denominator of the norm
before a layer, or of the final norm; the norm's weight stays in the weights.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

import torch
from torch import Tensor

from minqwen.checks import did_you_mean
from minqwen.errors import TraceError
from minqwen.lab.transformer_lens.utils import Slice, SliceInput, get_act_name

Labelled = Tensor | tuple[Tensor, list[str]]


class ActivationCache:
    """{name: tensor}. `cache["pattern", 3]` and `cache["blocks.3.attn.hook_pattern"]` are one."""

    def __init__(self, cache_dict: dict[str, Tensor], model: Any, has_batch_dim: bool = True):
        self.cache_dict, self.model, self.has_batch_dim = cache_dict, model, has_batch_dim

    def __repr__(self) -> str:
        return f"ActivationCache with keys {list(self.cache_dict)}"

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        name = self._name(key)
        if name not in self.cache_dict:
            near = did_you_mean(name, self.cache_dict)
            raise KeyError(f"{name!r} is not in the cache{near}")
        return self.cache_dict[name]

    def _name(self, key: str | tuple[Any, ...]) -> str:
        if isinstance(key, str):
            return key if key in self.cache_dict else get_act_name(key)
        name, layer, *rest = (*key, None) if len(key) == 1 else key
        if isinstance(layer, int) and layer < 0:
            layer += self.model.cfg.n_layers
        return get_act_name(name, layer, *rest)

    def __contains__(self, key: str | tuple[Any, ...]) -> bool:
        return self._name(key) in self.cache_dict

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def keys(self) -> KeysView[str]:
        return self.cache_dict.keys()

    def values(self) -> ValuesView[Tensor]:
        return self.cache_dict.values()

    def items(self) -> ItemsView[str, Tensor]:
        return self.cache_dict.items()

    def to(self, device: str | torch.device, move_model: bool = False) -> ActivationCache:
        """Move the tensors, and the model if that is said."""
        self.cache_dict = {name: x.to(device) for name, x in self.items()}
        if move_model:
            self.model.to(device)
        return self

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Switch gradients on or off, everywhere in torch."""
        torch.set_grad_enabled(mode)

    def remove_batch_dim(self) -> ActivationCache:
        """Drop the batch's dimension of one sequence. Raises TraceError for several."""
        if self.has_batch_dim:
            sizes = {len(x) for x in self.values()}
            if sizes - {1}:
                raise TraceError(f"the cache is of {max(sizes)} sequences, expected one")
            self.cache_dict = {name: x[0] for name, x in self.items()}
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Slice | SliceInput) -> ActivationCache:
        """A cache of some of the sequences; an int drops the batch's dimension."""
        if not self.has_batch_dim:
            raise TraceError("the cache has no dimension of the batch any more")
        part = Slice.of(batch_slice)
        kept = {name: part.apply(x, dim=0) for name, x in self.items()}
        return ActivationCache(kept, self.model, not isinstance(part.slice, int))

    # ---- sums

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Labelled:
        """The residual stream before each layer up to `layer`; None or -1 is after the last."""
        layer = self._layer(layer)
        found = []
        for i in range(layer):
            found.append((f"{i}_pre", self["resid_pre", i]))
            if incl_mid:
                found.append((f"{i}_mid", self["resid_mid", i]))
        if layer == self.model.cfg.n_layers:
            found.append(("final_post", self["resid_post", layer - 1]))
        else:
            found.append((f"{layer}_pre", self["resid_pre", layer]))
            found += [(f"{layer}_mid", self["resid_mid", layer])] if mlp_input else []
        return self._stacked(found, layer, mlp_input, apply_ln, pos_slice, return_labels)

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Labelled:
        """What a layer's input is the sum of: the embedding, each attn_out, each mlp_out.

        mode: "all", or only those of "attn" or "mlp".
        """
        if mode not in ("all", "attn", "mlp"):
            raise TraceError(f"mode is {mode!r}, expected 'all', 'attn' or 'mlp'")
        layer = self._layer(layer)
        found = [("embed", self["hook_embed"])] if incl_embeds else []
        for i in range(layer):
            if mode != "mlp":
                found.append((f"{i}_attn_out", self["attn_out", i]))
            if mode != "attn":
                found.append((f"{i}_mlp_out", self["mlp_out", i]))
        if mlp_input and mode != "mlp":
            found.append((f"{layer}_attn_out", self["attn_out", layer]))
        return self._stacked(found, layer, mlp_input, apply_ln, pos_slice, return_labels)

    def compute_head_results(self) -> None:
        """Put blocks.N.attn.hook_result [..., H, D] into the cache, from hook_z."""
        for i, block in enumerate(self.model.blocks):
            name = get_act_name("result", i)
            if name not in self.cache_dict:
                W_O = block.attn.W_O.detach()
                z = self["z", i].to(W_O.device)
                result = torch.einsum("...hd,hde->...he", z, W_O)
                self.cache_dict[name] = result.to(self["z", i].device)

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Slice | SliceInput = None,
        apply_ln: bool = False,
    ) -> Labelled:
        """What each head before a layer adds to the residual stream, [layers x H, ...].

        incl_remainder: with one more, all else that the stream is the sum of.
        """
        self.compute_head_results()
        layer, part = self._layer(layer), Slice.of(pos_slice)
        results = [part.apply(self["result", i], dim=-3) for i in range(layer)]
        labels = [f"L{i}H{h}" for i in range(layer) for h in range(self.model.cfg.n_heads)]
        return self._parts(results, labels, layer, incl_remainder, part, apply_ln, return_labels)

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Slice | SliceInput = None,
        pos_slice: Slice | SliceInput = None,
    ) -> Tensor:
        """What each neuron of a layer's MLP adds to the residual stream, [..., neurons, D]."""
        neurons = Slice.of(neuron_slice)
        acts = Slice.of(pos_slice).apply(self["post", layer], dim=-2)
        W_out = self.model.blocks[layer].mlp.W_out.detach().to(acts.device)
        return neurons.apply(acts, dim=-1)[..., None] * neurons.apply(W_out, dim=0)

    def stack_neuron_results(
        self,
        layer: int | None = -1,
        pos_slice: Slice | SliceInput = None,
        neuron_slice: Slice | SliceInput = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
    ) -> Labelled:
        """The same of the neurons of all MLPs before a layer, [layers x neurons, ...]."""
        layer, part, neurons = self._layer(layer), Slice.of(pos_slice), Slice.unwrap(neuron_slice)
        results = [self.get_neuron_results(i, neurons, part) for i in range(layer)]
        numbers = neurons.apply(torch.arange(self.model.cfg.d_mlp)).tolist()
        labels = [f"L{i}N{n}" for i in range(layer) for n in numbers]
        return self._parts(results, labels, layer, incl_remainder, part, apply_ln, return_labels)

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Tensor:
        """That activation of every layer before `layer`, [layers, ...]."""
        layers = range(self._layer(layer))
        return torch.stack([self[activation_name, i, sublayer_type] for i in layers])

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        return_labels: bool = False,
    ) -> Labelled:
        """All that a layer's input is the sum of: heads, neurons or MLPs, embedding, biases."""
        layer, part = self._layer(layer), Slice.of(pos_slice)
        stack, labels = self.stack_head_results(layer + mlp_input, True, pos_slice=part)
        stacks = [stack]
        if layer > 0:
            if expand_neurons:
                more, names = self.stack_neuron_results(layer, part, return_labels=True)
            else:
                more, names = self.decompose_resid(
                    layer, mode="mlp", pos_slice=part, incl_embeds=False, return_labels=True
                )
            stacks.append(more)
            labels = [*labels, *names]
        embed = part.apply(self["hook_embed"], dim=-2)[None]
        bias = self.model.accumulated_bias(layer, mlp_input, include_mlp_biases=expand_neurons)
        stacks += [embed, bias.detach().to(embed).expand_as(embed)]
        together = torch.cat(stacks)
        if apply_ln:
            together = self.apply_ln_to_stack(together, layer, mlp_input, part)
        labels = [*labels, "embed", "bias"]
        return (together, labels) if return_labels else together

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Slice | SliceInput = None,
        batch_slice: Slice | SliceInput = None,
        has_batch_dim: bool = True,
    ) -> Tensor:
        """The components divided by the denominator of the norm before a layer, or the final one.

        pos_slice: which tokens the stack already is of. batch_slice: of which sequences the answer
        is.
        """
        layer, rows = self._layer(layer), Slice.of(batch_slice)
        if has_batch_dim:
            residual_stack = rows.apply(residual_stack, dim=1)
        final = layer == self.model.cfg.n_layers
        norm = "ln2" if mlp_input else "ln1"
        name = "ln_final.hook_scale" if final else f"blocks.{layer}.{norm}.hook_scale"
        scale = Slice.of(pos_slice).apply(self[name], dim=-2)
        if self.has_batch_dim:
            scale = rows.apply(scale)
        return residual_stack / scale

    def logit_attrs(
        self,
        residual_stack: Tensor,
        tokens: str | int | Tensor,
        incorrect_tokens: str | int | Tensor | None = None,
        pos_slice: Slice | SliceInput = None,
        batch_slice: Slice | SliceInput = None,
        has_batch_dim: bool = True,
    ) -> Tensor:
        """What each component adds to the logit of a token, or to a difference of two logits.

        As in TransformerLens the final norm's weight takes no part, so this is what is added to
        the logit only where that weight is in W_U (`fold_ln`, which is not done here). With it, in
        float64, `Activations.head_contributions` of docs/traces.md adds up to the logit.
        """
        directions = self.model.tokens_to_residual_directions(tokens)
        if incorrect_tokens is not None:
            wrong = self.model.tokens_to_residual_directions(incorrect_tokens)
            if wrong.shape != directions.shape:
                raise TraceError(
                    f"tokens and incorrect_tokens have the shapes {tuple(directions.shape[:-1])} "
                    f"and {tuple(wrong.shape[:-1])}, expected equal ones"
                )
            directions = directions - wrong
        scaled = self.apply_ln_to_stack(
            residual_stack,
            layer=-1,
            pos_slice=pos_slice,
            batch_slice=batch_slice,
            has_batch_dim=has_batch_dim,
        )
        attributions: Tensor = (scaled * directions.to(scaled.device)).sum(-1)
        return attributions

    # ---- parts of the above

    def _layer(self, layer: int | None) -> int:
        """None and -1 are after the last layer."""
        layers: int = self.model.cfg.n_layers
        layer = layers if layer is None or layer == -1 else layer
        if not 0 <= layer <= layers:
            raise TraceError(f"layer is {layer}, expected 0 to {layers}")
        return layer

    def _stacked(
        self,
        found: list[tuple[str, Tensor]],
        layer: int,
        mlp_input: bool,
        apply_ln: bool,
        pos_slice: Slice | SliceInput,
        return_labels: bool,
    ) -> Labelled:
        """Named components [B, T, D] as one stack."""
        part = Slice.of(pos_slice)
        stack = torch.stack([part.apply(x, dim=-2) for _, x in found])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, part)
        return (stack, [name for name, _ in found]) if return_labels else stack

    def _parts(
        self,
        results: list[Tensor],
        labels: list[str],
        layer: int,
        incl_remainder: bool,
        part: Slice,
        apply_ln: bool,
        return_labels: bool,
    ) -> Labelled:
        """Each layer's [..., parts, D] as one stack [layers x parts, ..., D]."""
        if results:
            stack = torch.cat(results, -2).movedim(-2, 0)
        else:
            embed = part.apply(self["hook_embed"], dim=-2)
            stack = embed.new_zeros(0, *embed.shape)
        if incl_remainder:
            whole = self["resid_post", layer - 1] if layer else self["hook_embed"]
            stack = torch.cat([stack, (part.apply(whole, dim=-2) - stack.sum(0))[None]])
            labels = [*labels, "remainder"]
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice=part)
        return (stack, labels) if return_labels else stack
