"""What tokenizer_config.json, and two older files beside it, say of added and special tokens.

tokenizer_config.json has added_tokens_decoder, {id: {content, special, ...}}; names of tokens, such
as eos_token; and extra_special_tokens, formerly additional_special_tokens. Where it has no
added_tokens_decoder, added_tokens.json ({content: id}) and special_tokens_map.json (names) are read
too. All of this is as in transformers 5 (tokenization_utils_base.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from minqwen.checks import boolean, wrong
from minqwen.errors import TokenizerError
from minqwen.files import quoted, read_json_object
from minqwen.tokenizer.backends import ByteLevelBPE, SentencePiece

Backend = ByteLevelBPE | SentencePiece
CONFIG, ADDED, NAMES = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
OPTIONS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
# In the order in which tokens that the vocabulary lacks get their ids. The four with True are used
# here, so the vocabulary must have them.
NAMED = {
    "bos_token": True,
    "eos_token": True,
    "unk_token": True,
    "sep_token": False,
    "pad_token": True,
    "cls_token": False,
    "mask_token": False,
}


def read_if_there(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    # lexists: a broken link is a mistake, not an absent file.
    return read_json_object(path, TokenizerError) if os.path.lexists(path) else {}


def read_token_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json of a directory, with what the older files beside it add.

    The contents of added_tokens.json are under that name.
    """
    config = read_if_there(path / CONFIG)
    if "added_tokens_decoder" not in config:
        config |= read_if_there(path / NAMES)
        config[ADDED] = read_if_there(path / ADDED)
    return config


def named_and_extra(
    where: Path, config: Mapping[str, Any]
) -> Iterator[tuple[str | None, str, AddedToken]]:
    """(name or None, content, token) of all that the config calls special, in transformers' order.

    They are the tokens in NAMED, then others whose key ends with _token, then the extra ones.
    """
    for name in (*NAMED, *(key for key in config if _is_other_name(key, config[key]))):
        if config.get(name) is not None:
            yield name, *_special(where, name, config[name])
    key = (
        "extra_special_tokens"
        if config.get("extra_special_tokens")
        else "additional_special_tokens"
    )
    extra = config.get(key) or []
    if isinstance(extra, dict):
        for name, token in extra.items():
            yield name, *_special(where, f"{key}.{name}", token)
    elif isinstance(extra, (list, tuple)):
        for n, token in enumerate(extra):
            yield None, *_special(where, f"{key}[{n}]", token)
    else:
        expected = "a list of tokens or an object of names and tokens"
        raise wrong(f"{where}: {key}", extra, expected, error=TokenizerError)


def _is_other_name(key: str, value: Any) -> bool:
    """Whether it names a token, as image_token does. add_bos_token, a flag, does not."""
    names_token = isinstance(value, str) or (isinstance(value, dict) and "content" in value)
    return key.endswith("_token") and key not in NAMED and names_token


def _special(where: Path, key: str, token: Any) -> tuple[str, AddedToken]:
    """(content, token) of a string or an object {content, lstrip, ...}."""
    spec = token if isinstance(token, dict) else {"content": token}
    if not isinstance(spec.get("content"), str):
        raise wrong(f"{where}: {key}", token, "a token of the vocabulary", error=TokenizerError)
    try:
        return spec["content"], _added_token({"normalized": False, **spec, "special": True})
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"{where}: {key} is {quoted(token)}: {error}") from None


# ---- into the backend ---------------------------------------------------------------------------


def register_tokens(backend: Backend, config: Mapping[str, Any]) -> dict[str, str]:
    """Make the backend know all of them. Returns {"eos_token": "<|im_end|>", ...}."""
    where = backend.source.parent / CONFIG
    _check_flags(backend, where, config)
    _add_decoder(backend, f"{where}: added_tokens_decoder", config.get("added_tokens_decoder"))
    special = list(named_and_extra(where, config))
    _add_decoder(
        backend,
        str(backend.source.parent / ADDED),
        _as_decoder(config.get(ADDED) or {}, {content for _, content, _ in special}),
    )
    named = {}
    for name, content, token in special:
        id = backend.token_to_id(content)
        if id is None and name is not None and NAMED.get(name):
            raise TokenizerError(
                f"{where}: {name} is {content!r}, which {backend.source.name} does not have; "
                "name a token that is there, or null"
            )
        known = backend.added()
        if id is None or id not in known or not known[id].special:
            backend.add(token)
        if name is not None:
            named[name] = content
    return named


def _check_flags(backend: Backend, where: Path, config: Mapping[str, Any]) -> None:
    key = "split_special_tokens"
    if boolean(f"{where}: {key}", config.get(key) or False, error=TokenizerError):
        remedy = "with it a chat template's own tokens would be cut into pieces; remove it"
        raise wrong(f"{where}: {key}", True, "false", remedy, error=TokenizerError)
    key = "add_prefix_space"
    asked, adds = config.get(key), backend.adds_prefix_space
    if asked is not None and adds is not None and asked is not adds:
        expected = f"{json.dumps(adds)}, as in {backend.source.name}"
        raise wrong(f"{where}: {key}", asked, expected, "make them agree", error=TokenizerError)


def _as_decoder(added: Mapping[str, Any], special: set[str]) -> dict[Any, dict[str, Any]]:
    """The {content: id} of added_tokens.json in the form of added_tokens_decoder."""
    return {
        id: {"content": token, "special": token in special, "normalized": token not in special}
        for token, id in added.items()
    }


def _add_decoder(backend: Backend, where: str, specs: Any) -> None:
    """Register {id: {content, special, ...}}, which must agree with the backend's own file."""
    try:
        tokens = {int(id): _added_token(spec) for id, spec in (specs or {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{where} must map ids to {{'content': ..., 'special': ..., ...}}: {error}"
        ) from None
    known = backend.added()
    for id, token in sorted(tokens.items()):
        if id not in known or known[id].content != token.content:
            backend.add(token)
        found = backend.token_to_id(token.content)
        if found != id:
            raise TokenizerError(
                f"{where} gives {token.content!r} the id {id}, {backend.source.name} {found}; the "
                "files do not match"
            )


def _added_token(spec: Mapping[str, Any]) -> AddedToken:
    """The library ignores other keys too, but prints their names as they are."""
    return AddedToken(**{name: spec[name] for name in OPTIONS if name in spec})
