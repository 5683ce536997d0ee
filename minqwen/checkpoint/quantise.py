"""Weight-only quantisation without calibration: a checkpoint becomes an AWQ or GPTQ checkpoint.

Every linear layer of the layers is rounded to 4 or 8 bits in groups of inputs (`Packing` has the
layouts); all other tensors become float16, as in the official Qwen2.5 files. No text is needed and
none is used. The numbers of a group of inputs and one output are found like this:

    least, most   the smallest and the largest weight, or 0 if that is smaller or larger
    gptq          symmetric: s = c * 2 * max(-least, most) / (2^bits - 1),  z = 2^(bits - 1)
    awq           asymmetric: s = c * (most - least) / (2^bits - 1),  z = round(-c * least / s)
    q             round(w / s) + z, kept within 0 and 2^bits - 1

s is rounded to float16 first. c is the factor of `FACTORS` with the smallest sum of squared errors
over the group: below 1 it clips the largest weights and gives all others finer steps. Real AWQ and
GPTQ also look at activations, and lose less; what is written here loads wherever theirs does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from minqwen.checkpoint.quantization import Packing, pack
from minqwen.checkpoint.reader import Checkpoint
from minqwen.checkpoint.weight_files import MAX_FILE_BYTES, TensorSpec
from minqwen.checkpoint.writer import write_directory
from minqwen.checks import integer, one_of
from minqwen.config import ModelConfig
from minqwen.errors import CheckpointError
from minqwen.files import quoted

LAYOUTS = ("gptq", "awq")
FACTORS = tuple(1.06 - 0.02 * i for i in range(19))  # 1.06, 1.04, ... 0.70
PIECE = 1 << 21  # weights that are rounded at a time, which bounds the memory
FORMAT = torch.float16  # of the scales, and of all that is not quantised
SMALLEST = 2.0**-24  # the smallest float16 above 0


class Rounded(NamedTuple):
    """Some outputs in groups of inputs. G groups of `size`.

    q [outputs, G, size] and zeros [outputs, G], whole numbers; scales [outputs, G]; error
    [outputs, G], the sum of the squares of what each group's weights have moved. All float32.
    """

    q: Tensor
    zeros: Tensor
    scales: Tensor
    error: Tensor


def packing_for(bits: int, layout: str, group_size: int = 128) -> Packing:
    """The layout that `quantise` writes. Raises CheckpointError for what there is not."""
    one_of("layout", layout, LAYOUTS, error=CheckpointError)
    if bits not in (4, 8) or (layout == "awq" and bits != 4):
        raise CheckpointError(
            f"bits is {bits} with layout {layout}, expected 4 or 8 with gptq, or 4 with awq"
        )
    integer("group_size", group_size, 1, error=CheckpointError)
    return Packing(layout, bits, group_size, int(layout == "gptq"), act_order=False)


def quantization_config(packing: Packing) -> dict[str, Any]:
    """What config.json says of a quantised checkpoint, with the keys of the official ones."""
    if packing.method == "awq":
        return {
            "bits": packing.bits,
            "group_size": packing.group,
            "modules_to_not_convert": None,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        }
    return {
        "bits": packing.bits,
        "checkpoint_format": "gptq",
        "damp_percent": 0.01,
        "desc_act": False,
        "group_size": packing.group,
        "quant_method": "gptq",
        "sym": True,
        "true_sequential": True,
    }


# ---- one weight ---------------------------------------------------------------------------------


def quantise_weight(weight: Tensor, packing: Packing) -> tuple[dict[str, Tensor], float]:
    """The parts of a weight [outputs, inputs], and its relative error.

    GPTQ has a g_idx too, in order, as the official files have. The error is the root mean square
    of what the weights have moved over that of the weights. It is that of the exact products
    (q - z) * s; rounding them to float16 moves each by at most 2^-11 of itself more.
    """
    outputs, inputs = weight.shape
    shapes = packing.part_shapes(outputs, inputs)
    parts = {part: torch.empty(shapes[part], dtype=torch.int32) for part in ("qweight", "qzeros")}
    parts["scales"] = torch.empty(shapes["scales"], dtype=FORMAT)
    if packing.method == "gptq":
        parts["g_idx"] = packing.groups_of(inputs).int()
    rows = max(1, PIECE // inputs // packing.pack) * packing.pack
    moved = whole = 0.0
    for first in range(0, outputs, rows):
        piece = weight[first : first + rows].float()
        found = round_groups(piece, packing)
        moved += float(found.error.sum(dtype=torch.float64))
        whole += float(piece.square().sum(dtype=torch.float64))
        _put(parts, found, first, packing)
    return parts, math.sqrt(moved / whole) if whole else 0.0


def round_groups(weight: Tensor, packing: Packing) -> Rounded:
    """Some outputs [outputs, inputs], float32: of all factors, each group has its best."""
    w: Tensor = weight.unflatten(1, (-1, packing.group))
    best = _rounded(w, packing, FACTORS[0])
    for factor in FACTORS[1:]:
        tried = _rounded(w, packing, factor)
        better = tried.error < best.error
        best = Rounded(
            torch.where(better[..., None], tried.q, best.q),
            *(torch.where(better, a, b) for a, b in zip(tried[1:], best[1:], strict=True)),
        )
    return best


def _rounded(w: Tensor, packing: Packing, factor: float) -> Rounded:
    """All groups with one factor. w: [outputs, G, size]."""
    least, most = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    last = (1 << packing.bits) - 1
    symmetric = packing.method == "gptq"
    spread = 2 * torch.maximum(-least, most) if symmetric else most - least
    scales = (factor * spread / last).clamp(min=SMALLEST).to(FORMAT).float()
    if symmetric:
        zeros = torch.full_like(scales, 1 << (packing.bits - 1))
    else:
        zeros = (-factor * least / scales).round().clamp(0, last)
    q = ((w / scales[..., None]).round_() + zeros[..., None]).clamp_(0, last)
    moved = (q - zeros[..., None]).mul_(scales[..., None]).sub_(w)
    return Rounded(q, zeros, scales, moved.square_().sum(-1))


def _put(parts: dict[str, Tensor], found: Rounded, first: int, packing: Packing) -> None:
    """Write some outputs, which begin with a word, into their places."""
    q, zeros = found.q.flatten(1).T, found.zeros.T - packing.offset
    columns = slice(first, first + q.shape[1])
    words = slice(first // packing.pack, (first + q.shape[1]) // packing.pack)
    along = packing.packed_dim
    parts["qweight"][:, words if along == 1 else columns] = pack(q, along, packing)
    parts["qzeros"][:, words] = pack(zeros, 1, packing)
    parts["scales"][:, columns] = found.scales.T.to(FORMAT)


# ---- a checkpoint -------------------------------------------------------------------------------


def quantise(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    bits: int = 4,
    layout: str = "gptq",
    group_size: int = 128,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: bool = False,
    overwrite: bool = False,
) -> dict[str, float]:
    """Write the checkpoint `src` quantised, atomically, one tensor in memory at a time.

    Returns {weight: its relative error, as in `quantise_weight`}. Raises CheckpointError for a
    source that is quantised already, for sizes that do not fit words and groups, and for values
    that float16 does not hold; dst is then as it was.
    """
    packing = packing_for(bits, layout, group_size)
    source = Checkpoint(src)
    if source.packed is not None:
        raise CheckpointError(
            f"{source.path}: is quantised already ({source.packed.packing}), expected the "
            "unquantised checkpoint"
        )
    source.check()
    check_sizes(source.config, packing, source.path)
    config = source.config.replace(
        dtype=str(FORMAT).removeprefix("torch."), quantization_config=quantization_config(packing)
    )
    errors: dict[str, float] = {}
    write_directory(
        dst,
        config.to_dict(),
        _specs(source.config, packing),
        _tensors(source, packing, errors, progress),
        check=lambda directory: Checkpoint(directory).check(),
        max_file_bytes=max_file_bytes,
        sources=source.path,
        overwrite=overwrite,
    )
    return errors


def is_quantised(name: str) -> bool:
    """Whether a parameter is one of the weights that are rounded."""
    return name.endswith("_proj.weight")


def check_sizes(config: ModelConfig, packing: Packing, source: object) -> None:
    """Raise CheckpointError for a layer that words or groups do not divide."""
    one = config.replace(num_hidden_layers=1).parameter_shapes()
    shapes = [shape for name, shape in one.items() if is_quantised(name)]
    outputs, inputs = (sorted({shape[dim] for shape in shapes}) for dim in (0, 1))
    odd = [n for n in outputs if n % packing.pack]
    if odd:
        raise CheckpointError(
            f"{source}: a layer has {odd[0]} outputs, expected multiples of {packing.pack}, the "
            f"{packing.bits}-bit numbers in a word; it cannot be quantised in this layout"
        )
    odd = [n for n in inputs if n % packing.group]
    if odd:
        common = math.gcd(*inputs)
        raise CheckpointError(
            f"{source}: a layer has {odd[0]} inputs, expected multiples of the group size "
            f"{packing.group}; choose --group-size {common & -common} (group_size=), or pad the "
            "MLP first where that is what does not divide: tools/heads.py extend "
            "--intermediate-size N"
        )


def _specs(config: ModelConfig, packing: Packing) -> dict[str, TensorSpec]:
    """The tensors of the target, in module order."""
    specs: dict[str, TensorSpec] = {}
    for name, shape in config.parameter_shapes().items():
        if not is_quantised(name):
            specs[name] = TensorSpec(FORMAT, tuple(shape))
            continue
        module = name.removesuffix(".weight")
        for part, part_shape in packing.part_shapes(*shape).items():
            if part != "g_idx" or packing.method == "gptq":
                dtype = FORMAT if part == "scales" else torch.int32
                specs[f"{module}.{part}"] = TensorSpec(dtype, part_shape)
    return specs


def _tensors(
    source: Checkpoint, packing: Packing, errors: dict[str, float], progress: bool
) -> Iterator[tuple[str, Tensor]]:
    """The target's tensors; the errors of the weights are noted on the way."""
    names = list(source.config.parameter_shapes())
    disable = None if progress else True
    for name in tqdm(names, desc="quantising", unit="tensor", leave=False, disable=disable):
        tensor = source.read(name)
        if not is_quantised(name):
            yield name, _in_format(tensor, name, source)
            continue
        parts, errors[name] = quantise_weight(tensor, packing)
        _in_format(parts["scales"], name, source)
        for part, value in parts.items():
            yield f"{name.removesuffix('.weight')}.{part}", value


def _in_format(tensor: Tensor, name: str, source: Checkpoint) -> Tensor:
    """In float16, which is refused for what it does not hold."""
    converted = tensor.to(FORMAT)
    if not converted.isfinite().all():
        raise CheckpointError(
            f"{source.file(name)}: tensor {quoted(name)} holds NaN, infinity or values that are "
            "too large for float16, in which a quantised checkpoint keeps scales and whatever is "
            "not quantised; it cannot be quantised"
        )
    return converted
