"""What an LLM is made of: a model, which it loads or is given, and the model's tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from minqwen.agreement import agree, digests_of_files
from minqwen.checkpoint import load_pretrained
from minqwen.checkpoint.load import OPTIONS, agree_on_weights, check_options, resolve_dtype
from minqwen.checks import boolean, optional_integer, wrong
from minqwen.config import GenerationDefaults, ModelConfig
from minqwen.engine.sizing import EngineOptions, check_cache_asked_for
from minqwen.errors import ConfigError, ParallelError, a_kind
from minqwen.files import quoted
from minqwen.heads.view import HEAD_OPTIONS, open_weights
from minqwen.model import Qwen2
from minqwen.model.qwen2 import check_kv_dtype, make_arithmetic
from minqwen.parallel import Mesh, check_degree, valid_degrees
from minqwen.tokenizer import Tokenizer

LOADING_OPTIONS = (*OPTIONS, *HEAD_OPTIONS, "tensor_parallel_size", "tokenizer", "seed")
OF_ONE_RANK = ("num_blocks", "kv_cache_bytes", "gpu_memory_utilization")  # the smallest cache rules
SMALL_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "generation_config.json"),
)
TokenizerOrPath = Tokenizer | str | os.PathLike[str] | None


class Parts(NamedTuple):
    """A model with what belongs to it."""

    model: Qwen2
    tokenizer: Tokenizer | None
    defaults: GenerationDefaults


def load_parts(
    path: str | Path,
    tokenizer: TokenizerOrPath,
    engine: EngineOptions,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    arithmetic: str | None,
    mesh: Mesh | None,
    offload: str | None,
    check_finite: bool,
    num_attention_heads: int | None,
    num_key_value_heads: int | None,
    head_recipe: str,
    tensor_parallel_size: int | None,
    progress: bool,
) -> Parts:
    """From a directory; the arguments are those of LLM.

    Raises MinqwenError for what cannot work, before any weight is read where that can be known.
    """
    arithmetic = "fast" if arithmetic is None else arithmetic
    check_mesh(mesh)
    boolean("check_finite", check_finite)
    boolean("progress", progress)
    check_options(dtype=dtype, device=device, arithmetic=arithmetic, offload=offload)
    weights = open_weights(path, num_attention_heads, num_key_value_heads, head_recipe)
    config = weights.config
    engine.check(config)
    check_kv_dtype(engine.kv_cache_dtype, make_arithmetic(arithmetic))
    if mesh is None:
        mesh = Mesh.from_env(device, tensor_parallel_size=tensor_parallel_size)
    check_ranks(tensor_parallel_size, mesh)
    check_degree_or_replicas(config, mesh)
    heads = (num_attention_heads, num_key_value_heads, head_recipe)
    agree_on_engine(mesh, engine, [path, tokenizer], heads)
    if mesh.replicas > 1:
        agree_on_weights(mesh.world, weights, resolve_dtype(dtype, config), arithmetic, offload)
    check_cache_asked_for(engine, config, resolve_dtype(dtype, config), mesh.size)
    opened_tokenizer = opened(tokenizer) or Tokenizer.from_dir(path)
    defaults = GenerationDefaults.from_dir(path, config)
    model = load_pretrained(
        weights,
        dtype=dtype,
        device=device,
        arithmetic=arithmetic,
        mesh=mesh,
        check_finite=check_finite,
        progress=progress,
        offload=offload,
    )
    return Parts(model, opened_tokenizer, defaults)


def parts_of(
    model: Qwen2,
    tokenizer: TokenizerOrPath,
    engine: EngineOptions,
    *,
    dtype: str | torch.dtype,
    check_finite: bool,
    head_recipe: str,
    tensor_parallel_size: int | None,
    progress: bool,
    **others: object,
) -> Parts:
    """Of a model that is loaded already. Raises ConfigError for options of loading beside it."""
    given = {
        "dtype": _if_given(dtype, "auto"),
        "check_finite": _if_given(check_finite, False),
        "head_recipe": _if_given(head_recipe, "ghost"),
        **others,
    }
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{name} is {quoted(value, 100)}, but the model is a Qwen2 that is loaded already: "
                f"leave {name} out, or give the directory"
            )
    check_ranks(tensor_parallel_size, model.mesh)
    agree_on_engine(model.mesh, engine, [tokenizer])
    defaults = GenerationDefaults(eos_token_ids=model.config.eos_token_id)
    return Parts(model, opened(tokenizer), defaults)


def _if_given(value: object, default: str | bool) -> object:
    """The value, or None if it is the default. An array is no default, and has no truth."""
    return None if isinstance(value, type(default)) and value == default else value


def check_mesh(mesh: object) -> None:
    """Raise ConfigError for what is neither None nor a Mesh."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise wrong("mesh", mesh, "None or a Mesh", "Mesh.from_env() makes one")


def agree_on_engine(
    mesh: Mesh,
    engine: EngineOptions,
    sources: Sequence[TokenizerOrPath],
    heads: tuple[object, ...] = (),
) -> None:
    """Raise ParallelError unless all ranks, those of other replicas too, have the same options, and
    the same files of tokenizers and of generation. The cache's size may be asked for by rank."""
    if mesh.world.size == 1:
        return
    options = {f.name: getattr(engine, f.name) for f in dataclasses.fields(engine)}
    asked = {name: value for name, value in options.items() if name not in OF_ONE_RANK}
    files = small_files(Path(s) for s in sources if isinstance(s, (str, os.PathLike)))
    notes = {file.name: f" ({file.parent})" for file in files}
    described = {"tokenizer": repr(sources[-1])} if isinstance(sources[-1], Tokenizer) else {}
    facts = {"heads": heads, **asked, **described, **digests_of_files(mesh.world, files)}
    agree(mesh.world, facts, notes)


def small_files(directories: Iterable[Path]) -> list[Path]:
    """The files of tokenizers, chat templates and generation that are there.

    What is wrong with one that is no file, or has a name that none can have, its reader says.
    """
    found = []
    for path in directories:
        with contextlib.suppress(OSError, ValueError):
            templates = sorted(file.name for file in path.glob("*.jinja"))
            found += [path / name for name in (*SMALL_FILES, *templates) if is_file(path / name)]
    return found


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a link to itself, for one
        return False


def check_ranks(wanted: int | None, mesh: Mesh) -> None:
    """Raise ConfigError if another number of ranks than `wanted` shares the model."""
    optional_integer("tensor_parallel_size", wanted, 1)
    if wanted not in (None, mesh.size):
        raise ConfigError(
            f"tensor_parallel_size is {wanted}, but the model's mesh has {mesh.size}: start the "
            f"script with torchrun --nproc-per-node {wanted}, and make the mesh with "
            f"Mesh.from_env(tensor_parallel_size={wanted})"
        )


def check_degree_or_replicas(config: ModelConfig, mesh: Mesh) -> None:
    """`check_degree`, whose line also says when replicas would use all ranks.

    Raises ParallelError.
    """
    try:
        check_degree(config, mesh.size)
    except ParallelError as error:
        fitting = [n for n in valid_degrees(config, mesh.size) if mesh.size % n == 0]
        size = max(fitting, default=1)
        raise ParallelError(
            f"{error}; or with tensor_parallel_size {size}: "
            f"{mesh.size // size} replicas of the model, each on {size} rank{'s' * (size > 1)}"
        ) from None


def directory_name(model: object) -> str:
    """The last part of the path of a model's directory. Raises ConfigError for what is no path."""
    if isinstance(model, (str, os.PathLike)):
        try:
            return Path(model).resolve().name
        except (OSError, ValueError):  # a name that no file can have
            raise ConfigError(f"model is {quoted(model, 100)}: no such directory") from None
    raise ConfigError(f"model is {a_kind(model)}: expected a directory or a Qwen2")


def opened(tokenizer: TokenizerOrPath) -> Tokenizer | None:
    """The tokenizer, or the one in that directory. Raises MinqwenError for anything else."""
    if isinstance(tokenizer, (str, os.PathLike)):
        return Tokenizer.from_dir(tokenizer)
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    raise ConfigError(
        f"tokenizer is {a_kind(tokenizer)}: expected a Tokenizer or the directory of one"
    )
