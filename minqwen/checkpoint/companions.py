"""What a checkpoint has besides config.json and its weights: tokenizer, templates, licence, notes.

These files are copied from a source, and these may be removed with a checkpoint that is replaced.
All others are somebody's own.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from minqwen.checkpoint.weight_files import INDEX
from minqwen.errors import CheckpointError, warn
from minqwen.files import and_more, check_regular, copy_regular, flush, quoted

HEADS_MANIFEST = "minqwen_heads.json"  # beside the weights of an extension (heads/manifest.py)
QUANTIZE_CONFIG = "quantize_config.json"  # AutoGPTQ's own: true only of packed weights
TEMPLATES = "additional_chat_templates"  # the one directory of companions, of *.jinja files

_FILE = re.compile(
    r"tokenizer[\w.-]*\.(json|model)|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.(jinja|json)|generation_config\.json"
    r"|quant(ize)?_config\.json|configuration\.json"
)
_PROSE = re.compile(r"(licen[cs]e|notice|copying|usage_policy|readme)([-_.]\w+)*", re.IGNORECASE)


def is_companion(path: Path) -> bool:
    """Whether this is a file, or the directory, that a checkpoint may have beside its weights."""
    if path.is_dir():
        return path.name == TEMPLATES and all(_is_template(file) for file in path.iterdir())
    return path.is_file() and _has_a_companions_name(path)


def _is_template(path: Path) -> bool:
    return path.suffix == ".jinja" and path.is_file()


def _has_a_companions_name(path: Path) -> bool:
    return bool(_FILE.fullmatch(path.name) or _PROSE.fullmatch(path.name))


def copy_companions(source: Path, directory: Path, omit: Collection[str] = ()) -> None:
    """Copy the companions of one checkpoint to another.

    Modes are kept. A link that leads out of the source is not copied, and a warning says so: what
    lies there may be nobody else's business. Hugging Face's cache is made of links to its blobs;
    these are followed. A warning also names the files that no checkpoint needs. What has the name
    of a companion and is no regular file is refused. omit: names that are neither copied nor named.
    """
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: is not a directory, expected the one with the tokenizer's files"
        )
    left_out = []
    for path in sorted(source.iterdir()):
        if path.name in omit:
            continue
        if path.name == TEMPLATES and path.is_dir():
            _copy_templates(path, directory / TEMPLATES)
        elif _has_a_companions_name(path) and not path.is_dir():
            _copy(path, directory / path.name, source)
        elif not _is_written_anew(path.name):
            left_out.append(quoted(path.name))
    if left_out:
        names = ", ".join(left_out[:8]) + and_more(left_out[7:])
        warn(f"{source}: not copied, because no checkpoint needs it: {names}", 2)


def keep_companions(old: Path, directory: Path, omit: Collection[str] = ()) -> None:
    """Copy the companions of a checkpoint that is about to be replaced; links stay links."""
    for path in sorted(old.iterdir()):
        to = directory / path.name
        if path.name in omit or not is_companion(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, to, symlinks=True, dirs_exist_ok=True)
            _flush_all(to)
        else:
            to.unlink(missing_ok=True)
            shutil.copy(path, to, follow_symlinks=False)


def _copy_templates(templates: Path, to: Path) -> None:
    """The named chat templates, which lie in a directory of their own."""
    if _leads_out(templates, templates.parent):
        _warn_of_link(templates)
        return
    to.mkdir(exist_ok=True)
    for path in sorted(templates.glob("*.jinja")):
        _copy(path, to / path.name, templates.parent)
    _flush_all(to)


def _copy(path: Path, to: Path, source: Path) -> None:
    if _leads_out(path, source):
        _warn_of_link(path)
        return
    if _PROSE.fullmatch(path.name) and path.is_file() and not path.stat().st_size:
        return  # an empty note is no sign of damage
    check_regular(path, CheckpointError)
    copy_regular(path, to, CheckpointError)


def _flush_all(directory: Path) -> None:
    """The files in a directory; files.replacing_directory flushes the directory itself."""
    for path in directory.iterdir():
        if not path.is_symlink():
            flush(path)


def _warn_of_link(path: Path) -> None:
    where = os.path.realpath(path)
    warn(f"{path}: is a link to {where}, outside of the checkpoint, and is not copied", 2)


def _is_written_anew(name: str) -> bool:
    """Configs, weights, what describes them, and what git and hf leave (it starts with a dot)."""
    described = ("config.json", INDEX, HEADS_MANIFEST, QUANTIZE_CONFIG)
    return name in described or name.startswith(".") or name.endswith(".safetensors")


def _leads_out(path: Path, source: Path) -> bool:
    """Whether a link leads neither into the source nor to the blobs of the same cache."""
    # Unlike Path.resolve, realpath does not raise where links go round in a circle.
    directory, target = Path(os.path.realpath(source)), Path(os.path.realpath(path))
    cache = directory.parent.parent / "blobs"  # models--NAME/snapshots/REVISION and blobs
    in_cache = directory.parent.name == "snapshots" and target.parent == cache
    return not target.is_relative_to(directory) and not in_cache
