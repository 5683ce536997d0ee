"""Writes what an engine computes between its layers, for `tools/diff.py` to compare.

Copy this one file to where your engine runs. It needs torch and safetensors, nothing else.

    from dump import dump

    with dump(model, "out/"):
        model(input_ids)  # one prompt; several calls give several passes, a decode step too

`model` is a Qwen2 of transformers, vLLM or SGLang, or any other whose modules have their names:
embed_tokens, layers, norm; in a layer input_layernorm, self_attn, post_attention_layernorm, mlp; in
those q_proj, k_proj, v_proj or a fused qkv_proj, o_proj, gate_proj, up_proj or a fused
gate_up_proj, down_proj. Fused outputs are split by the sizes in the config. No weight is written.

Hooks see modules, so the model must run module by module: without torch.compile and without CUDA
graphs (vLLM: enforce_eager=True; SGLang: disable_cuda_graph=True), not split over a pipeline. Where
one call cannot enclose all passes, as in an engine's worker, use `start` and `stop`:

    writer = dump(model, "out/")
    writer.start()
    ...
    writer.stop()

What is written, per forward pass n: `out/n.safetensors`, or `out/n.rankRofN.safetensors` by each of
N tensor-parallel ranks. Its keys are the points of minqwen, listed below, without a batch dimension
and in the dtypes that the engine has there, and `input_ids` and `positions`. Rank 0 also writes
`out/dump.json`, which names format, engine, dtype, number of passes, and the dimension along which
the ranks hold parts of each point.

    embed, layers.N.{resid_pre, norm1, attn.q, attn.k, attn.v, attn.rot_q, attn.rot_k, attn.scores,
    attn.pattern, attn.z, attn.out, resid_mid, norm2, mlp.gate, mlp.up, mlp.act, mlp.out,
    resid_post}, final_norm, logits

- attn.rot_q, attn.rot_k: in vLLM and SGLang the inputs of the module `attn`. In transformers no
  module gives them: attn.rot_q is the left factor of the product of queries and keys, which a
  TorchFunctionMode sees, and attn.rot_k is what was put into the cache (so not with
  use_cache=False). With flash attention they are not had.
- attn.scores, attn.pattern: only with transformers' eager attention. The scores are those that went
  into the softmax; what the mask hides is -inf.
- norm1.normalized, norm2.normalized and final_norm.normalized (before the weight) are not had.
- logits may be of the last tokens only, where the engine computes no others.
- attn.out and mlp.out are left out where a rank has only its part of the sum.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FORMAT = "minqwen dump 1"

# The dimension along which tensor-parallel ranks hold parts of a point. Of all others rank 0 has
# the whole. Where there are more ranks than key/value heads, neighbours hold the same head.
SPLIT = {
    "attn.q": 1,
    "attn.k": 1,
    "attn.v": 1,
    "attn.rot_q": 1,
    "attn.rot_k": 1,
    "attn.scores": 0,
    "attn.pattern": 0,
    "attn.z": 1,
    "mlp.gate": 1,
    "mlp.up": 1,
    "mlp.act": 1,
}


class DumpError(ValueError):
    """The model is not one of those that this file knows, or ran in a way that it cannot follow."""


@dataclass(frozen=True)
class Sizes:
    """What the config says, and the rank of this process."""

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rank: int
    ranks: int

    @property
    def held_heads(self) -> int:
        """Query heads of one rank."""
        return self.heads // self.ranks

    @property
    def held_kv_heads(self) -> int:
        """Key/value heads of one rank."""
        return max(1, self.kv_heads // self.ranks)


def dump(
    model: nn.Module, path: str | Path, *, rank: int | None = None, ranks: int | None = None
) -> Writer:
    """A context in which every forward pass of `model` is written to the directory `path`.

    rank, ranks: this process's tensor-parallel rank and how many there are; found out in vLLM and
    SGLang. Raises DumpError if the model is of no known structure or the directory has a dump.
    """
    return Writer(model, Path(path), rank, ranks)


class Writer:
    """Hooks on a model, and the files that they write."""

    def __init__(self, model: nn.Module, path: Path, rank: int | None, ranks: int | None):
        self.path, self.model = path, model
        self.decoder = find_decoder(model)
        self.layers = list(_child(self.decoder, "layers").children())
        self.sizes = find_sizes(model, self.decoder, self.layers[0], rank, ranks)
        self.passes = 0
        self.dtype = ""
        self.current: Pass | None = None
        self._hooks: list[Any] = []
        self._watching = ExitStack()
        if (path / "dump.json").exists():
            raise DumpError(f"{path}: holds a dump already; give another directory")

    def start(self) -> None:
        """Place the hooks."""
        self.path.mkdir(parents=True, exist_ok=True)
        # Not at the decoder itself: vLLM calls its forward without its hooks.
        self._before(_child(self.decoder, "embed_tokens"), self._begin)
        self._after(_child(self.decoder, "embed_tokens"), Pass.embedded)
        self._after(_child(self.decoder, "norm"), Pass.normed_last)
        for number, layer in enumerate(self.layers):
            self._hook_layer(number, layer)
        for name, module in self.model.named_modules():
            if name.rpartition(".")[2] in ("lm_head", "logits_processor"):
                self._after(module, Pass.predicted)
        if not hasattr(self.layers[0].self_attn, "attn"):
            self._watching.enter_context(Watch(self))

    def stop(self) -> None:
        """Take the hooks away and write what is left. Raises DumpError if nothing was seen."""
        self._close()
        self._end()
        if not self.passes:
            raise DumpError(
                f"no forward pass of {type(self.model).__name__} was seen: call the model inside "
                "`with dump(...)`, without torch.compile and without CUDA graphs"
            )

    def __enter__(self) -> Writer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self._close()

    # ---- hooks

    def _hook_layer(self, number: int, layer: nn.Module) -> None:
        self._before(layer, partial(self._enter, number), kwargs=True)
        self._after(layer, Pass.left_layer)
        self._after(_child(layer, "input_layernorm"), Pass.normed, "resid_pre", "norm1")
        self._after(_child(layer, "post_attention_layernorm"), Pass.normed, "resid_mid", "norm2")
        self._hook_attention(_child(layer, "self_attn"))
        mlp = _child(layer, "mlp")
        if hasattr(mlp, "gate_up_proj"):
            self._after(_child(mlp, "gate_up_proj"), Pass.fused_mlp)
        else:
            self._after(_child(mlp, "gate_proj"), Pass.channels, "mlp.gate")
            self._after(_child(mlp, "up_proj"), Pass.channels, "mlp.up")
        self._after(_child(mlp, "down_proj"), Pass.reduced, "mlp.act", "mlp.out")

    def _hook_attention(self, attention: nn.Module) -> None:
        self._before(attention, partial(self._attends, True), kwargs=True)
        self._after(attention, Pass.attended, kwargs=True)
        if hasattr(attention, "qkv_proj"):
            self._after(_child(attention, "qkv_proj"), Pass.fused_attention)
        else:
            self._after(_child(attention, "q_proj"), Pass.heads, "attn.q")
            self._after(_child(attention, "k_proj"), Pass.heads, "attn.k")
            self._after(_child(attention, "v_proj"), Pass.heads, "attn.v")
        if hasattr(attention, "attn"):
            self._before(_child(attention, "attn"), self._turned)
        self._after(_child(attention, "o_proj"), Pass.reduced, "attn.z", "attn.out")

    def _before(self, module: nn.Module, hook: Callable[..., None], kwargs: bool = False) -> None:
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=kwargs))

    def _after(
        self, module: nn.Module, method: Callable[..., None], *names: str, kwargs: bool = False
    ) -> None:
        """Have a method of the current pass called with (module, args, output, *names)."""

        def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
            if self.current is not None:
                method(self.current, module, args, *rest, *names)

        self._hooks.append(module.register_forward_hook(hook, with_kwargs=kwargs))

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._end()
        self.current = Pass(self.sizes)

    def _enter(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if number == 0 and (self.current is None or self.current.layer_seen):
            self._begin(module, args)  # the caller gave embeddings
        if self.current is not None:
            self.current.entered(number, args, kwargs)

    def _attends(
        self, attending: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.current is not None:
            self.current.attending = attending

    def _turned(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.current is not None and len(args) > 1:
            self.current.turned(args[0], args[1])

    # ---- files

    def _close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._watching.close()

    def _end(self) -> None:
        """Write the pass that is over, and dump.json with it: a server may never come to `stop`."""
        done, self.current = self.current, None
        if done is None or not done.layer_seen:
            return
        tensors = done.finished()
        if not self.dtype:
            self.dtype = str(next(x.dtype for x in tensors.values() if x.is_floating_point()))
        if self.sizes.rank > 0:
            tensors = {name: x for name, x in tensors.items() if _point(name) in SPLIT}
        with _in_one_step(self.path / self._file(self.passes)) as temporary:
            save_file(tensors, temporary)
        self.passes += 1
        if self.sizes.rank == 0:
            text = json.dumps(self._described(), indent=2) + "\n"
            with _in_one_step(self.path / "dump.json") as temporary:
                temporary.write_text(text, encoding="utf-8")

    def _file(self, number: int) -> str:
        if self.sizes.ranks == 1:
            return f"{number}.safetensors"
        return f"{number}.rank{self.sizes.rank}of{self.sizes.ranks}.safetensors"

    def _described(self) -> dict[str, Any]:
        package = type(self.decoder).__module__.partition(".")[0]
        version = getattr(sys.modules.get(package), "__version__", "")
        return {
            "format": FORMAT,
            "engine": f"{package} {version}".strip(),
            "model": type(self.decoder).__name__,
            "dtype": self.dtype.removeprefix("torch."),
            "passes": self.passes,
            "ranks": self.sizes.ranks,
            "split": SPLIT if self.sizes.ranks > 1 else {},
        }


# ---- one forward pass ---------------------------------------------------------------------------


class Pass:
    """What one forward pass has shown so far.

    Tensors are copied when they are seen, because engines write over them: vLLM turns queries and
    keys in place, and adds the residual stream in place.
    """

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.tensors: dict[str, Tensor] = {}
        self.logits: list[tuple[int, Tensor]] = []  # (first token, logits of it and the following)
        self.batched = False  # whether tensors have a batch dimension
        self.layer = ""  # "layers.3." inside layer 3
        self.layer_seen = False
        self.attending = False
        self.length = 0  # tokens that are attended to

    def keep(self, name: str, x: Tensor) -> None:
        self.tensors[name] = x.detach().to("cpu", copy=True).contiguous()

    def single(self, x: Tensor) -> Tensor:
        """Without the batch dimension, if the engine has one."""
        if not self.batched:
            return x
        if x.shape[0] != 1:
            raise DumpError(f"the model got {x.shape[0]} prompts at once; give it one at a time")
        return x[0]

    # ---- what hooks call; each after a module, with (module, args, output)

    def embedded(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        embedding = _first(output)
        self.batched = embedding.dim() == 3
        if args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            self.keep("input_ids", self.single(args[0]).long())
        self.keep("embed", self.single(embedding))

    def entered(self, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A layer is called: transformers gives position_ids by name, vLLM positions first."""
        self.layer, self.layer_seen = f"layers.{number}.", True
        found = [kwargs.get("position_ids"), kwargs.get("positions"), *args[:1]]
        positions = next((x for x in found if _is_integers(x)), None)
        if positions is not None and number == 0:
            self.batched = self.batched or positions.dim() == 2
            self.keep("positions", self.single(positions).long())

    def normed(
        self, module: nn.Module, args: tuple[Any, ...], output: Any, stream: str, name: str
    ) -> None:
        """A norm's input is the residual stream; or it adds to it and returns (normed, stream)."""
        fused = isinstance(output, (tuple, list))
        residual = self.single(output[1] if fused else args[0])
        self.keep(self.layer + stream, residual)
        self.keep(self.layer + name, self.single(_first(output)))
        number = int(self.layer.split(".")[1])
        if stream == "resid_pre" and number:
            self.tensors.setdefault(f"layers.{number - 1}.resid_post", self._copy("resid_pre"))
        elif stream == "resid_pre" and "embed" not in self.tensors:  # the caller gave embeddings
            self.tensors["embed"] = self._copy("resid_pre")

    def _copy(self, name: str) -> Tensor:
        return self.tensors[self.layer + name].clone()

    def left_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """vLLM's layers return two parts of their output, which the next norm adds."""
        whole = _first(output)
        parts = isinstance(output, (tuple, list)) and len(output) > 1
        if not (parts and isinstance(output[1], Tensor) and output[1].shape == whole.shape):
            self.keep(self.layer + "resid_post", self.single(whole))

    def normed_last(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, (tuple, list)):
            self.keep(self.layer + "resid_post", self.single(output[1]))
        self.layer = ""
        self.keep("final_norm", self.single(_first(output)))

    def heads(self, module: nn.Module, args: tuple[Any, ...], output: Any, name: str) -> None:
        sizes = self.sizes
        count = sizes.held_heads if name in ("attn.q", "attn.z") else sizes.held_kv_heads
        flat = self.single(_first(output))
        self._check_width(name, flat, count * sizes.head_dim)
        self.keep(self.layer + name, flat.unflatten(-1, (count, sizes.head_dim)))

    def fused_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        d = self.sizes.head_dim
        widths = [self.sizes.held_heads * d, *[self.sizes.held_kv_heads * d] * 2]
        flat = self.single(_first(output))
        self._check_width("attn.q, k and v", flat, sum(widths))
        for name, part in zip("qkv", flat.split(widths, -1), strict=True):
            self.keep(f"{self.layer}attn.{name}", part.unflatten(-1, (-1, d)))

    def turned(self, q: Tensor, k: Tensor) -> None:
        """The inputs of vLLM's and SGLang's module `attn`."""
        d = self.sizes.head_dim
        for name, x in (("rot_q", q), ("rot_k", k)):
            flat = self.single(x) if x.dim() > 3 else x
            self.keep(f"{self.layer}attn.{name}", flat.reshape(flat.shape[0], -1, d))

    def attended(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """transformers' attention returns (output, pattern or None) and has filled its cache."""
        self.attending = False
        pattern = output[1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
        if isinstance(pattern, Tensor) and pattern.dim() == 4:
            self.keep(self.layer + "attn.pattern", self.single(pattern))
            scores = self.tensors.get(self.layer + "attn.scores")
            if scores is not None and scores.shape[-1] != pattern.shape[-1]:  # of padded keys
                del self.tensors[self.layer + "attn.scores"]
        tokens = self.tensors[self.layer + "attn.k"].shape[0]
        keys = _newest_keys(kwargs, int(self.layer.split(".")[1]))
        if keys is not None and keys.shape[-2] >= tokens:  # the cache of a window may hold fewer
            self.keep(self.layer + "attn.rot_k", self.single(keys)[:, -tokens:].transpose(0, 1))

    def reduced(
        self, module: nn.Module, args: tuple[Any, ...], output: Any, before: str, after: str
    ) -> None:
        """o_proj and down_proj, which add what all ranks hold."""
        if before == "attn.z":
            self.heads(module, args, args[0], before)
        else:
            self.channels(module, args, args[0], before)
        if self.sizes.ranks == 1 or getattr(module, "reduce_results", True):
            self.keep(self.layer + after, self.single(_first(output)))

    def channels(self, module: nn.Module, args: tuple[Any, ...], output: Any, name: str) -> None:
        flat = self.single(_first(output))
        self._check_width(name, flat, self.sizes.intermediate // self.sizes.ranks)
        self.keep(self.layer + name, flat)

    def fused_mlp(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        width = self.sizes.intermediate // self.sizes.ranks
        flat = self.single(_first(output))
        self._check_width("mlp.gate and up", flat, 2 * width)
        for name, part in zip(("gate", "up"), flat.split(width, -1), strict=True):
            self.keep(f"{self.layer}mlp.{name}", part)

    def _check_width(self, name: str, flat: Tensor, width: int) -> None:
        if flat.shape[-1] != width:
            raise DumpError(
                f"{self.layer}{name} has {flat.shape[-1]} columns, expected {width} on one of "
                f"{self.sizes.ranks} ranks by the config's heads, head_dim and intermediate_size; "
                "correct the config, or give dump(..., rank=R, ranks=N)"
            )

    # ---- logits

    def predicted(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """lm_head's output; or that of vLLM's or SGLang's logits_processor, None on some ranks."""
        logits = getattr(output, "next_token_logits", output)
        if not isinstance(logits, Tensor) or "final_norm" not in self.tensors:
            return
        logits = self.single(logits) if logits.dim() == 3 else logits
        final = self.tensors["final_norm"]
        first = final.shape[0] - logits.shape[0]
        hidden = next((x for x in args if isinstance(x, Tensor) and x.is_floating_point()), None)
        if hidden is not None:
            hidden = hidden[0] if hidden.dim() == 3 else hidden
            if hidden.shape[0] == logits.shape[0]:
                first = _place(hidden.detach().cpu(), final)
        self.logits.append((first, logits.detach().to("cpu", copy=True)))

    def finished(self) -> dict[str, Tensor]:
        """All tensors. Of the logits, those of the last tokens that were computed without a gap."""
        parts: list[Tensor] = []
        last = self.tensors["final_norm"].shape[0] if self.logits else 0
        for first, logits in sorted(self.logits, key=lambda part: part[0], reverse=True):
            if first < last <= first + logits.shape[0]:
                parts.insert(0, logits[: last - first])
                last = first
        if parts:
            self.tensors["logits"] = torch.cat(parts)
        return self.tensors


@contextmanager
def _in_one_step(path: Path) -> Iterator[Path]:
    """A file to write that becomes `path` at once: no reader finds a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _place(rows: Tensor, final: Tensor) -> int:
    """The first token of these rows of the final norm's output; the last place that fits."""
    most = final.shape[0] - rows.shape[0]
    places = range(most, -1, -1)
    return next((i for i in places if torch.equal(final[i : i + len(rows)], rows)), most)


def _newest_keys(kwargs: Mapping[str, Any], number: int) -> Tensor | None:
    """The keys [B, K, L, d] in transformers' cache, whose newest are this pass's."""
    cache = next((kwargs[n] for n in ("cache", "past_key_values") if kwargs.get(n)), None)
    layers = getattr(cache, "layers", None)
    if layers is None or number >= len(layers):
        return None
    keys = getattr(layers[number], "keys", None)
    return keys if isinstance(keys, Tensor) and keys.dim() == 4 else None


def _first(output: Any) -> Tensor:
    """A module's output, without the bias that vLLM's linear layers return beside it."""
    x = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(x, Tensor):
        raise DumpError(f"a module returned {type(x).__name__}, expected a tensor or a tuple of it")
    return x


def _is_integers(x: object) -> bool:
    return isinstance(x, Tensor) and not x.is_floating_point() and x.dim() in (1, 2)


def _point(name: str) -> str:
    """The name of a point within its layer."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


# ---- functions that no module shows --------------------------------------------------------------


class Watch(TorchFunctionMode):
    """Sees the calls of torch inside an attention module. Changes none of them."""

    def __init__(self, writer: Writer):
        super().__init__()
        self.writer = writer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen = self.writer.current
        if seen is not None and seen.attending and len(args) > 0:
            if func in PRODUCTS:
                self._factor(seen, *args[:2])
            elif func in SOFTMAX:
                self._scores(seen, args[0])
        return func(*args, **(kwargs or {}))

    def _factor(self, seen: Pass, q: Tensor, keys: Tensor) -> None:
        """The queries [1, H, T, d] are the left factor of the first product."""
        name, heads = seen.layer + "attn.rot_q", seen.sizes.held_heads
        fits = q.dim() == 4 and q.shape[1] == heads and q.shape[3] == seen.sizes.head_dim
        if fits and name not in seen.tensors:
            seen.keep(name, seen.single(q).transpose(0, 1))
            seen.length = keys.shape[-1]

    def _scores(self, seen: Pass, scores: Tensor) -> None:
        """transformers hides by adding the dtype's lowest number. Here that is -inf."""
        if scores.dim() != 4 or scores.shape[-1] != seen.length:
            return
        lowest = torch.finfo(scores.dtype).min
        hidden = scores.detach().masked_fill(scores <= lowest / 2, float("-inf"))
        seen.keep(seen.layer + "attn.scores", seen.single(hidden))


PRODUCTS = {
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    F.scaled_dot_product_attention,
}
SOFTMAX = {F.softmax, torch.softmax, torch.Tensor.softmax}


# ---- the model ----------------------------------------------------------------------------------


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that has embed_tokens, layers and norm. Raises DumpError, naming what there is."""
    for module in model.modules():
        if all(hasattr(module, name) for name in ("embed_tokens", "layers", "norm")):
            return module
    seen = [name for name, _ in model.named_modules() if 0 < name.count(".") < 3][:8]
    raise DumpError(
        f"{type(model).__name__} has no module with embed_tokens, layers and norm, so it is not of "
        f"a known structure; among its modules are {', '.join(seen) or 'none'}"
    )


def find_sizes(
    model: nn.Module, decoder: nn.Module, layer: nn.Module, rank: int | None, ranks: int | None
) -> Sizes:
    """The config's sizes. Raises DumpError if there is no config or the ranks do not fit it."""
    configs: list[Any] = [m.config for m in (decoder, model) if hasattr(m, "config")]
    if not configs:
        raise DumpError(f"{type(model).__name__} has no config, expected one with hidden_size")
    config = configs[0]
    found = find_ranks(_child(_child(layer, "self_attn"), "o_proj"))
    rank, ranks = found[0] if rank is None else rank, found[1] if ranks is None else ranks
    heads = config.num_attention_heads
    if not 0 <= rank < ranks or heads % ranks or config.intermediate_size % ranks:
        raise DumpError(f"rank {rank} of {ranks} cannot be: the model has {heads} heads")
    return Sizes(
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=config.intermediate_size,
        rank=rank,
        ranks=ranks,
    )


def find_ranks(o_proj: nn.Module) -> tuple[int, int]:
    """This process's tensor-parallel rank and their number, as vLLM and SGLang say it."""
    rank, ranks = getattr(o_proj, "tp_rank", None), getattr(o_proj, "tp_size", None)
    if isinstance(rank, int) and isinstance(ranks, int):
        return rank, ranks
    for name in ("vllm.distributed", "sglang.srt.distributed"):
        engine = sys.modules.get(name)
        if engine is not None:
            return (
                engine.get_tensor_model_parallel_rank(),
                engine.get_tensor_model_parallel_world_size(),
            )
    return 0, 1


def _child(module: nn.Module, name: str) -> nn.Module:
    child = getattr(module, name, None)
    if not isinstance(child, nn.Module):
        seen = ", ".join(n for n, _ in module.named_children()) or "none"
        raise DumpError(
            f"{type(module).__name__} has no module {name!r}, so it is not of a known structure; "
            f"its modules are {seen}"
        )
    return child
