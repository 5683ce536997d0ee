"""LoRA adapters of a source model, made to fit its extension."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minqwen.errors import HeadsError
from minqwen.heads.layout import Layout
from minqwen.heads.packed import _replacing
from minqwen.heads.tensors import CHANNEL_TENSORS, HEAD_TENSORS, extend_tensor, suffix

ADAPTER = "adapter_model.safetensors"


_SAFE_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "loftq")  # others alter the base


def extend_adapter_tensor(name: str, tensor: Tensor, to: Layout) -> Tensor:
    """lora_A [r, in] or lora_B [out, r] for the target: W + B A moves as W does if B's rows (q, k, v) or A's
    columns (o) do, since a slot's rows of B A are its rows of B. To `random` noise nothing is added."""
    match = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name)
    if match is None:
        if re.fullmatch(r".*\.lora_embedding_[AB]", name):
            return tensor
        raise HeadsError(
            f"{ADAPTER}: tensor {name} is no part of a plain LoRA, expected names that end in "
            "lora_A.weight or lora_B.weight: merge the adapter and extend the result"
        )
    weight = match[1] + ".weight"
    kind, side = suffix(weight), "BA".index(match[2])  # W's dimension 0 is B's, its 1 is A's
    if kind in HEAD_TENSORS and HEAD_TENSORS[kind][0] == side:
        size = (
            to.source_heads if HEAD_TENSORS[kind][1] == "q" else to.source_kv_heads
        ) * to.head_dim
    elif CHANNEL_TENSORS.get(kind) == side and to.intermediate:
        size = to.source_intermediate
    else:
        return tensor
    if tensor.dim() != 2 or tensor.shape[side] != size:
        raise HeadsError(
            f"{ADAPTER}: {name} has shape {list(tensor.shape)}, expected {size} along "
            f"dimension {side}: this adapter is not for the source of this extension, or has "
            "been extended already"
        )
    return extend_tensor(
        weight, tensor, replace(to, recipe="zero") if to.recipe == "random" else to
    )


def extend_adapter(
    src: str | Path, dst: str | Path, to: Layout, base: str | Path | None = None
) -> None:
    """Write the PEFT LoRA adapter `src` for the extension `to` of its base: merging and extending commute.

    Rank, alpha and targets stay. base: the extended model, for base_model_name_or_path. Refuses DoRA, trained
    biases, modules_to_save and initialisations that alter the base. dst must not exist. Raises HeadsError.
    """
    src = Path(src)
    try:
        config = json.loads((src / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(src / ADAPTER)
    except (OSError, ValueError, SafetensorError) as e:
        raise HeadsError(
            f"{src}: cannot be read as a PEFT adapter ({' '.join(str(e).split())[:200]}), "
            f"expected adapter_config.json and {ADAPTER}"
        ) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise HeadsError(
            f"{src}/adapter_config.json: is not that of a LoRA, expected peft_type LORA"
        )
    refused = (
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "fan_in_fan_out",
        "use_qalora",
        "trainable_token_indices",
        "target_parameters",
    )
    other = {key: config[key] for key in refused if config.get(key)}
    other |= {"bias": config["bias"]} if config.get("bias", "none") != "none" else {}
    init = config.get("init_lora_weights")
    other |= {"init_lora_weights": init} if init not in _SAFE_INITS else {}
    if other:
        key, value = next(iter(other.items()))
        raise HeadsError(
            f"{src}/adapter_config.json: {key} is {value!r}, expected a plain LoRA: merge the "
            "adapter into the base and extend the result"
        )
    to.check()
    tensors = {
        name: extend_adapter_tensor(name, tensor, to).contiguous()
        for name, tensor in tensors.items()
    }
    with _replacing(dst, src, new=True) as tmp:
        config |= {"base_model_name_or_path": str(base)} if base is not None else {}
        (tmp / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, tmp / ADAPTER, metadata={"format": "pt"})
