"""What lies beside the weights of an extended checkpoint: how it was made, and out of what."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minqwen.checkpoint.companions import HEADS_MANIFEST
from minqwen.checkpoint.reader import WeightDirectory
from minqwen.checks import mapping, one_of
from minqwen.config import ModelConfig
from minqwen.errors import HeadsError, MinqwenError
from minqwen.files import and_more, quoted, read_json_object
from minqwen.heads.layout import ARCHS, Layout
from minqwen.heads.tensors import sha256

MANIFEST = HEADS_MANIFEST

FORMAT = 2  # 1 had no digest of its own
DIGEST = "sha256"  # of everything else in the manifest
KEYS = {"format", "layout", "arch", "source_config", "source_sha256"}


# What an extension leaves as it is. A manifest that says otherwise is another checkpoint's.
SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "tie_word_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "quantization_config",
)


@dataclass(frozen=True)
class Manifest:
    """source_config: the source's config.json. source_sha256: of each source tensor's bytes."""

    layout: Layout
    arch: str
    source_config: dict[str, Any]
    source_sha256: dict[str, str]

    def to_json(self) -> str:
        content: dict[str, Any] = {
            "format": FORMAT,
            "layout": self.layout.to_dict(),
            "arch": self.arch,
            "source_config": self.source_config,
            "source_sha256": self.source_sha256,
        }
        return json.dumps(content | {DIGEST: _digest(content)}, indent=1) + "\n"

    def check_fits(self, config: ModelConfig, where: str | Path) -> None:
        """Raise HeadsError unless a checkpoint with this config is in the manifest's layout.

        `where`, the checkpoint's directory, begins the error.
        """
        to, source = self.layout, self.config(where)
        expected = {
            "num_attention_heads": len(to.heads),
            "num_key_value_heads": len(to.kv),
            "head_dim": to.head_dim,
            "intermediate_size": len(to.intermediate) or source.intermediate_size,
            "model_type": self.arch,
        }
        expected |= {name: getattr(source, name) for name in SAME}
        for name, value in expected.items():
            if getattr(config, name) != value:
                raise HeadsError(
                    f"{where}: {name} is {quoted(getattr(config, name))} in config.json, "
                    f"expected {quoted(value)} by {MANIFEST}: the two are not of one checkpoint"
                )
        sizes = (source.num_attention_heads, source.num_key_value_heads, source.head_dim)
        if sizes != (to.source_heads, to.source_kv_heads, to.head_dim) or (
            to.intermediate and source.intermediate_size != to.source_intermediate
        ):
            raise HeadsError(f"{where}/{MANIFEST}: layout and source_config are not of one model")

    def check_names(self, expected: Set[str], where: str | Path) -> None:
        """Raise HeadsError unless the digests are those of the tensors `expected`."""
        wrong = sorted(expected ^ self.source_sha256.keys())
        if wrong:
            raise HeadsError(
                f"{where}/{MANIFEST}: source_sha256 has another set of tensors than source_config "
                f"describes: {quoted(wrong[0])}{and_more(wrong)}"
            )

    def is_source_tensor(self, name: str, digest: str) -> bool:
        """Whether a tensor with this digest is the one that `extend` read.

        No digest is taken of o_proj.bias, which is zero wherever it is.
        """
        return digest == self.source_sha256.get(name, digest)

    def check_source_tensor(self, name: str, digest: str, where: str | Path) -> None:
        """Raise HeadsError unless a tensor of the source has the bytes that `extend` read."""
        if not self.is_source_tensor(name, digest):
            raise HeadsError(
                f"{where}: {name} has changed since it was extended: its SHA-256 is not the "
                "source's"
            )

    def config(self, where: str | Path) -> ModelConfig:
        """The source's config. `where`, the checkpoint's directory, begins an error."""
        return ModelConfig.from_dict(self.source_config, source=f"{where}/{MANIFEST}")


def read_manifest(path: str | Path) -> Manifest | None:
    """The manifest in a checkpoint's directory, or None if the checkpoint is nobody's extension.

    Raises HeadsError for a file that `Manifest.to_json` cannot have written.
    """
    file = Path(path) / MANIFEST
    if not os.path.lexists(file):
        return None
    content = read_json_object(file, HeadsError)
    try:
        return _manifest(content)
    except MinqwenError as error:
        raise HeadsError(f"{file}: is not a manifest of tools/heads.py ({error})") from None


def _manifest(content: dict[str, Any]) -> Manifest:
    layout = Layout.from_dict(mapping("layout", content.get("layout"), error=HeadsError))
    layout.check()
    digests = mapping("source_sha256", content.get("source_sha256"), error=HeadsError)
    if not all(isinstance(digest, str) for digest in digests.values()):
        raise HeadsError("source_sha256 holds something else than strings")
    manifest = Manifest(
        layout,
        one_of("arch", content.get("arch"), ARCHS, error=HeadsError),
        dict(mapping("source_config", content.get("source_config"), error=HeadsError)),
        dict(digests),
    )
    _check_unchanged(content)
    return manifest


def _check_unchanged(content: dict[str, Any]) -> None:
    """Raise HeadsError unless the manifest says what was written.

    No weight shows whether a number such as rms_norm_eps in source_config is still right, so the
    manifest has a digest of its own.
    """
    keys, form = set(content), content.get("format")
    if type(form) is not int or (form, keys) not in ((1, KEYS), (FORMAT, KEYS | {DIGEST})):
        raise HeadsError(f"format {quoted(form, 100)} with the keys {quoted(sorted(keys))}")
    if form == FORMAT and content[DIGEST] != _digest(content):
        raise HeadsError("it was changed after it was written: its own sha256 does not fit")


def _digest(content: dict[str, Any]) -> str:
    signed = {key: value for key, value in content.items() if key in KEYS}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def require_manifest(path: str | Path) -> Manifest:
    """The manifest of an extended checkpoint; HeadsError if there is none."""
    manifest = read_manifest(path)
    if manifest is None:
        raise HeadsError(
            f"{path}: has no {MANIFEST}, so what was added cannot be told from the rest"
        )
    return manifest


def check_written(written: WeightDirectory, digests: Mapping[str, str]) -> None:
    """Raise HeadsError unless the files hold what was written to them."""
    for name, digest in digests.items():
        if sha256(written.read(name)) != digest:
            raise HeadsError(
                f"{written.file(name)}: {name} is not what was written, expected its SHA-256 to be "
                f"{digest}: the disk may be failing; write to another"
            )


def refuse_extended(path: str | Path) -> None:
    """Raise HeadsError if the checkpoint in `path` is an extension already."""
    if os.path.lexists(Path(path) / MANIFEST):
        raise HeadsError(
            f"{path}: has been extended already ({MANIFEST}): shrink it first, or extend its source"
        )
