"""Writes a checkpoint directory that transformers loads strictly, and never leaves half of one.

Names, shapes and order of all tensors are known before the first one arrives. So weight files,
headers and index are laid out first, and each tensor goes straight to its place. Tensors may come
in any order, and one at a time is in memory. The directory takes its place in one step
(files.replacing_directory).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from minqwen.checkpoint.companions import (
    HEADS_MANIFEST,
    QUANTIZE_CONFIG,
    copy_companions,
    is_companion,
    keep_companions,
)
from minqwen.checkpoint.reader import Checkpoint
from minqwen.checkpoint.weight_files import (
    DTYPES,
    INDEX,
    MAX_FILE_BYTES,
    SINGLE,
    WEIGHT_DTYPES,
    FileLayout,
    TensorSpec,
    index_text,
    is_weight_file,
    lay_out_files,
)
from minqwen.config import ModelConfig
from minqwen.errors import CheckpointError
from minqwen.files import and_more, quoted, replacing_directory

NamedTensors: TypeAlias = Iterable[tuple[str, Tensor]]
Tensors: TypeAlias = NamedTensors | Callable[[set[str]], NamedTensors]
Content: TypeAlias = bytes | str | Callable[[], bytes | str]

_EXTRA = re.compile(r"(?!config\.json$|.*\.index\.json$|.*\.safetensors$)[\w-][\w.-]*")
_JOURNAL = ".written"  # names of the tensors that are on the disk, one a line


def write_checkpoint(
    dst: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Tensors,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    sources: str | os.PathLike[str] | None = None,
    extra_files: Mapping[str, Content] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    omit: Collection[str] = (),
    resume: str | None = None,
    overwrite: bool = False,
    keep: bool = False,
    check: Callable[[Checkpoint], None] = lambda written: None,
) -> None:
    """Write an unquantised checkpoint: `write_directory` with the tensors that `config` describes.

    tensors: (name, tensor) pairs in any order, each of config.parameter_shapes() once and nothing
    else, in config.dtype, or in dtypes[name] where that is given (a checkpoint of mixed precision).
    check: more to ask of the written checkpoint than names and shapes, before it is put in place.
    The rest is as in `write_directory`, which says what raises.
    """

    def check_written(directory: Path) -> None:
        written = Checkpoint(directory)
        written.check()
        check(written)

    write_directory(
        dst,
        config.to_dict(),
        _specs(config, dtypes or {}),
        tensors,
        check=check_written,
        max_file_bytes=max_file_bytes,
        sources=sources,
        extra_files=extra_files,
        omit=omit,
        resume=resume,
        overwrite=overwrite,
        keep=keep,
    )


def write_directory(
    dst: str | os.PathLike[str],
    config_json: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    tensors: Tensors,
    *,
    check: Callable[[Path], None],
    max_file_bytes: int = MAX_FILE_BYTES,
    sources: str | os.PathLike[str] | None = None,
    extra_files: Mapping[str, Content] | None = None,
    omit: Collection[str] = (),
    resume: str | None = None,
    overwrite: bool = False,
    keep: bool = False,
) -> None:
    """Write config.json, the weight files, their index if there are several, and companion files.

    specs        of all tensors, in the order in which they lie in the files
    tensors      (name, tensor) pairs in any order, each of specs once
    check        reads the finished directory back and raises, before anything is replaced
    sources      a directory whose tokenizer, generation_config and licence files are copied
    extra_files  {plain file name: content}, over those; a function is asked when all tensors have
                 come
    omit         names of files in sources that are not copied
    resume       a name for exactly this content. A writer that is killed or interrupted, or that
                 fills the disk, leaves what it has written, and the next one with the same name
                 goes on from there. `tensors` is then a function of the set of names that are
                 written already, and gives the others
    overwrite    replace a dst that exists, if it is a checkpoint and nothing else
    keep         the companion files of a dst that is replaced stay, if there are no sources

    Raises CheckpointError, for a tensor that does not fit, a dst that is also the source or must
    not be replaced, or a full disk; dst is then as it was.
    """
    destination = Path(os.path.realpath(dst))  # what a link points to is replaced, not the link
    extra_files = extra_files or {}
    files = lay_out_files(specs, max_file_bytes)
    _check_extra_names(destination, extra_files)
    if sources is not None:
        check_other_directory(Path(sources), destination)
    check_replaceable(destination, overwrite, extra_files)
    if config_json.get("quantization_config") is None:
        omit = {*omit, QUANTIZE_CONFIG}
    with replacing_directory(destination, CheckpointError, resume) as directory:
        if not any(directory.iterdir()):  # else the room was taken by the writer that was killed
            _check_room(destination, files)
        if sources is not None:
            copy_companions(Path(sources), directory, omit)
        elif keep and destination.exists():
            keep_companions(destination, directory, omit)
        (directory / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
        if len(files) > 1:
            (directory / INDEX).write_text(index_text(files))
        writer = _WeightWriter(directory, specs, files, resumable=resume is not None)
        writer.put_all(tensors)
        for name, content in extra_files.items():
            (directory / name).unlink(missing_ok=True)  # a companion's mode may forbid writing
            (directory / name).write_bytes(_bytes_of(content))
        check(directory)


def _bytes_of(content: Content) -> bytes:
    if callable(content):
        content = content()
    return content.encode() if isinstance(content, str) else content


def _specs(config: ModelConfig, dtypes: Mapping[str, torch.dtype]) -> dict[str, TensorSpec]:
    """The tensors that a config describes, in module order."""
    default = DTYPES[config.dtype]
    specs = {
        name: TensorSpec(dtypes.get(name, default), tuple(shape))
        for name, shape in config.parameter_shapes().items()
    }
    for name, spec in specs.items():
        if spec.dtype not in WEIGHT_DTYPES.values():
            raise CheckpointError(
                f"tensor {quoted(name)} has dtype {spec.dtype}, expected one of "
                f"{', '.join(WEIGHT_DTYPES)}"
            )
    return specs


# ---- before anything is written -----------------------------------------------------------------


def _check_extra_names(destination: Path, extra_files: Iterable[str]) -> None:
    for name in extra_files:
        if not _EXTRA.fullmatch(name):
            raise CheckpointError(
                f"{destination}: extra file {quoted(name)} is refused, expected a plain file name "
                "that is not config.json, a weight file or their index"
            )


def check_other_directory(source: Path, destination: Path) -> None:
    """Raise CheckpointError if replacing `destination` would remove `source` or files it links to.

    Directories are compared as the file system knows them, so that another path, a link, or another
    case of letters makes no difference.
    """
    if not destination.exists() or not source.exists():
        return
    directories = {path.resolve().parent for path in (source, *source.iterdir()) if path.is_file()}
    for directory in (source, *directories):
        if directory.exists() and os.path.samefile(directory, destination):
            raise CheckpointError(
                f"{destination}: is also where {source} is read from, expected another directory "
                "to write to; choose one"
            )


def check_replaceable(
    destination: Path, overwrite: bool = False, extra_files: Collection[str] = ()
) -> None:
    """A destination that exists must be empty, or a checkpoint with nothing that would be lost."""
    if not destination.name or (destination.exists() and not destination.is_dir()):
        raise CheckpointError(
            f"{destination}: is not a directory that can be replaced; choose another"
        )
    present = _entries(destination)
    if not present:
        return
    if not _is_checkpoint(present):
        raise CheckpointError(
            f"{destination}: exists and is not a checkpoint (it holds "
            f"{quoted(present[0].name)}{and_more(present)}); it is not replaced: choose another "
            "directory"
        )
    foreign = [path.name for path in present if not _may_be_replaced(path, extra_files)]
    if foreign:
        raise CheckpointError(
            f"{destination}: holds {', '.join(map(quoted, foreign[:8]))}, which no checkpoint has "
            "and which would be lost; it is not replaced: choose another directory or move that "
            "away"
        )
    if not overwrite:
        raise CheckpointError(
            f"{destination}: exists; choose another directory, or pass --overwrite "
            "(overwrite=True) to replace it"
        )


def _is_checkpoint(present: list[Path]) -> bool:
    names = {path.name for path in present}
    return "config.json" in names and not names.isdisjoint({SINGLE, INDEX})


def _may_be_replaced(path: Path, extra_files: Collection[str]) -> bool:
    """A file that a checkpoint has, or one that is written anew."""
    name = path.name
    weights = name in ("config.json", INDEX, HEADS_MANIFEST) or is_weight_file(name)
    return is_companion(path) or (path.is_file() and (weights or name in extra_files))


def _entries(destination: Path) -> list[Path]:
    """What a destination holds now; nothing if there is none yet."""
    if not destination.exists():
        return []
    try:
        return sorted(destination.iterdir())
    except OSError as e:
        raise CheckpointError(
            f"{destination}: cannot be listed ({e.strerror}), expected a checkpoint that may be "
            "replaced; choose another directory"
        ) from None


def _check_room(destination: Path, files: Mapping[str, FileLayout]) -> None:
    need = sum(layout.size for layout in files.values())
    free = shutil.disk_usage(destination.parent).free
    if need > free:
        raise CheckpointError(
            f"{destination}: the disk has {free} bytes free, expected at least {need}; make room"
        )


# ---- the weights --------------------------------------------------------------------------------


class _WeightWriter:
    """Puts tensors into weight files that were laid out before, in whatever order they come.

    written: names of the tensors that an earlier, killed writer has put there. A resumable writer
    notes every tensor in a journal once the disk has it.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, TensorSpec],
        files: Mapping[str, FileLayout],
        resumable: bool,
    ) -> None:
        self.directory, self.specs, self.resumable = directory, specs, resumable
        self.places = {
            name: (directory / file, place)
            for file, layout in files.items()
            for name, place in layout.places.items()
        }
        self.journal = directory / _JOURNAL
        if self.journal.exists() and self._are_laid_out(files):
            # A last line without its end was being written when the writer was killed.
            self.written = set(self.journal.read_text().split("\n")[:-1])
        else:
            self.written = set()
            self._begin(files)
        self.waiting = dict.fromkeys(name for name in specs if name not in self.written)

    def put_all(self, tensors: Tensors) -> None:
        """Write each, then refuse if one is missing."""
        for name, tensor in tensors(self.written) if callable(tensors) else tensors:
            self._check(name, tensor)
            self._put(name, tensor)
            del self.waiting[name]
            del tensor  # or it would stay in memory while the next one is made
        self.journal.unlink(missing_ok=True)
        if self.waiting:
            missing = list(self.waiting)
            raise CheckpointError(
                f"tensor {quoted(missing[0])} was not given{and_more(missing)}, expected all "
                f"{len(self.specs)} that the config describes"
            )

    def _are_laid_out(self, files: Mapping[str, FileLayout]) -> bool:
        for name, layout in files.items():
            path = self.directory / name
            if not path.is_file() or path.stat().st_size != layout.size:
                return False
        return True

    def _begin(self, files: Mapping[str, FileLayout]) -> None:
        """Every file with its header, and at its full size."""
        self.journal.unlink(missing_ok=True)
        for name, layout in files.items():
            (self.directory / name).write_bytes(layout.header)
            os.truncate(self.directory / name, layout.size)

    def _check(self, name: str, tensor: Tensor) -> None:
        if name not in self.specs:
            raise CheckpointError(
                f"tensor {quoted(name)} is not one of the {len(self.specs)} that the config "
                "describes"
            )
        if name not in self.waiting:
            raise CheckpointError(f"tensor {quoted(name)} was given twice, expected each once")
        dtype, shape = self.specs[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"tensor {quoted(name)} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{dtype} {shape} from the config; change the one or the other"
            )

    def _put(self, name: str, tensor: Tensor) -> None:
        path, place = self.places[name]
        data = memoryview(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        )
        with open(path, "r+b", buffering=0) as file:
            file.seek(place)
            while data:  # one call writes at most 2 GiB
                data = data[file.write(data) :]
            if self.resumable:
                os.fsync(file.fileno())
        if self.resumable:
            with open(self.journal, "a") as journal:
                journal.write(f"{name}\n")
