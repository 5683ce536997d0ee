"""LoRA adapters of a source model, made to fit its extension."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minqwen.checkpoint.companions import copy_companions
from minqwen.checkpoint.tensor_file import save_tensors
from minqwen.errors import HeadsError
from minqwen.files import check_regular, quoted, read_json_object, replacing_directory
from minqwen.heads.layout import Layout
from minqwen.heads.tensors import blocks_of, extend_tensor

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_LORA = re.compile(r"(.*)\.lora_([AB])\.weight")
_LORA_OF_EMBEDDING = re.compile(r".*\.lora_embedding_[AB]")
_SAFE_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "loftq")  # others alter the base
_REFUSED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "fan_in_fan_out",
    "use_qalora",
    "trainable_token_indices",
    "target_parameters",
)


def refuse_adapter(path: str | os.PathLike[str]) -> None:
    """Raise HeadsError if `path` is the directory of a LoRA adapter, which is no whole model."""
    if os.path.lexists(Path(path) / ADAPTER_CONFIG):
        raise HeadsError(
            f"{path}: holds a LoRA adapter ({ADAPTER_CONFIG}), whose heads cannot be changed while "
            "it is loaded: merge it into its base, or use tools/heads.py extend-adapter"
        )


def extend_adapter_tensor(name: str, tensor: Tensor, to: Layout) -> Tensor:
    """lora_A [r, in] or lora_B [out, r] for the target.

    W + B A moves as W does if the rows of B (q, k, v) or the columns of A (o) do, because a slot's
    rows of B A are its rows of B. To the noise of recipe random nothing is added.
    """
    match = _LORA.fullmatch(name)
    if match is None:
        if _LORA_OF_EMBEDDING.fullmatch(name):
            return tensor
        raise HeadsError(
            f"{ADAPTER}: tensor {name} is no part of a plain LoRA, expected names that end in "
            "lora_A.weight or lora_B.weight: merge the adapter and extend the result"
        )
    weight, side = match[1] + ".weight", "BA".index(match[2])
    blocks = blocks_of(weight, to)
    if blocks is None or blocks.dim != side:  # dimension 0 of W is B's, its dimension 1 is A's
        return tensor
    _check_side(name, tensor, side, blocks.count * blocks.unit)
    if to.recipe == "random":
        to = replace(to, recipe="zero")
    return extend_tensor(weight, tensor, to)


def _check_side(name: str, tensor: Tensor, side: int, size: int) -> None:
    if tensor.dim() != 2 or tensor.shape[side] != size:
        raise HeadsError(
            f"{ADAPTER}: {name} has shape {list(tensor.shape)}, expected {size} along dimension "
            f"{side}: this adapter is not for the source of this extension, or has been extended "
            "already"
        )


def extend_adapter(
    src: str | Path, dst: str | Path, to: Layout, base: str | Path | None = None
) -> None:
    """Write the PEFT LoRA adapter `src` for the extension `to` of its base.

    Merging and extending commute. Rank, alpha and targets stay. base: the extended model, for
    base_model_name_or_path. Refuses DoRA, trained biases, modules_to_save and initialisations that
    alter the base. dst must not exist. Raises HeadsError.
    """
    source, destination = Path(src), Path(os.path.realpath(dst))
    config = read_json_object(source / ADAPTER_CONFIG, HeadsError)
    _check_plain(config, source / ADAPTER_CONFIG)
    tensors = _read_tensors(source / ADAPTER)
    to.check()
    extended = {
        name: extend_adapter_tensor(name, tensor, to).contiguous()
        for name, tensor in tensors.items()
    }
    if base is not None:
        config["base_model_name_or_path"] = str(base)
    if destination.exists():
        raise HeadsError(f"{destination}: exists; it is not replaced: choose another directory")
    with replacing_directory(destination, HeadsError) as directory:
        copy_companions(source, directory, omit={ADAPTER, ADAPTER_CONFIG})
        (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_tensors(directory / ADAPTER, extended, HeadsError)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    check_regular(path, HeadsError)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as e:
        why = " ".join(str(e).split())[:200]
        raise HeadsError(
            f"{path}: cannot be read ({why}), expected a PEFT adapter's weights; fetch it again"
        ) from None
    return tensors


def _check_plain(config: Mapping[str, Any], path: Path) -> None:
    """Raise HeadsError unless adapter_config.json describes W + B A and nothing else."""
    if config.get("peft_type") != "LORA":
        raise HeadsError(f"{path}: is not that of a LoRA, expected peft_type LORA")
    other = _more_than_lora(config)
    if other:
        raise HeadsError(
            f"{path}: {other[0]} is {quoted(config[other[0]])}, expected a plain LoRA: merge the "
            "adapter into the base and extend the result"
        )


def _more_than_lora(config: Mapping[str, Any]) -> list[str]:
    """The keys whose values mean something else than W + B A."""
    keys = [key for key in _REFUSED if config.get(key)]
    if config.get("bias", "none") != "none":
        keys.append("bias")
    if config.get("init_lora_weights") not in _SAFE_INITS:
        keys.append("init_lora_weights")
    return keys
