"""What is fuzzed: files of small sound directories, how they are read, and what must come of it.

Every change of a file must be refused in one line, or read as it is written. What it says is found
out once more here, with nothing but a JSON parser and slices of bytes. Where it has a digest, or
has to agree with another file, what is read must be what was read before the change.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import runpy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support import packs
from support.hostile.bases import CONFIG as TINY
from support.hostile.bases import make_bases
from support.hostile.cases import CONFIG, FILE, GENERATION, INDEX, MANIFEST, TEMPLATE, TOKENIZER
from support.hostile.cases import TOKENS as TOKENIZER_CONFIG
from support.paths import ROOT
from support.quantised import GPTQ, KINDS, checkpoint
from support.quantised import tiny as tiny_quantised

from minqwen.checkpoint import Checkpoint
from minqwen.config import ModelConfig
from minqwen.config.generation_config import GenerationDefaults
from minqwen.errors import TokenizerError
from minqwen.heads.convert import shrink
from minqwen.heads.layout import layout
from minqwen.heads.manifest import KEYS
from minqwen.heads.packed import extend_packed, shrink_packed
from minqwen.lab.audit.records import read_jsonl
from minqwen.lab.diff.dumps import Dump
from minqwen.lab.packs.check import Checker
from minqwen.lab.packs.pack import Pack
from minqwen.tokenizer import Tokenizer
from minqwen.tokenizer.chat_template import ChatRenderer

TEXTS = ("hell is other people", "Grüße, 你好 \n\t <|im_end|> 12", "", "a" * 50)
CHAT = [{"role": "user", "content": "hello"}]
TOKENS = {
    "add_bos_token": False,
    "added_tokens_decoder": {
        "259": {
            **{"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False},
            **{"single_word": False, "special": True},
        }
    },
    "bos_token": None,
    "chat_template": "{{ messages[0].content }}",
    "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
    "model_max_length": 32768,
    "tokenizer_class": "Qwen2Tokenizer",
}
ONLY_FILE = "model-00001-of-00001.safetensors"
RECORDS, PROMPTS, DUMP = "records.jsonl", "prompts.jsonl", "dump.json"


@dataclass(frozen=True)
class Target:
    """A file of a directory. read: what it means, once it is read.

    judge(path, read, before): what is wrong with what was read, or None. `before` is what the file
    meant before the change.
    """

    base: str
    file: str
    read: Callable[[Path], Any]
    judge: Callable[[Path, Any, Any], str | None]
    is_json: bool = True
    header: bool = False  # only the header of the weight file is changed
    sign: Callable[[dict[str, Any]], str] | None = None  # the digest, made right after the change


# ---- bases --------------------------------------------------------------------------------------


def make_all(root: Path) -> None:
    """The directories of the damaged ones, and packed, pack, dump, records and prompts."""
    make_bases(root)
    checkpoint(root / "whole", tiny_quantised(quant=GPTQ, group=8), files=1)
    extend_packed(root / "whole", root / "packed", _wider(root / "whole"), overwrite=True)
    for name in KINDS:
        checkpoint(root / f"quantised {name}", tiny_quantised(quant=KINDS[name]), files=1)
    packs.pack(root, "pack", prompts=packs.prompts([[5, 17, 60]]))
    dump = root / "dump"
    dump.mkdir()
    _write_dump(dump)
    shutil.copytree(root / "one", root / "lines")
    record = {
        "prompt_token_ids": [1, 2, 3],
        "token_ids": [4, 5],
        "logprobs": [-0.5, -1.25],
        "prompt_logprobs": [None, -2.0, -3.0],
        "top_logprobs": [{"4": -0.5, "7": -2.5}, {"5": -1.25, "9": -1.5}],
        "temperature": 0,
        "messages": [{"role": "user", "content": "x"}],
    }
    (root / "lines" / RECORDS).write_text(json.dumps(record) + "\n" + json.dumps(record) + "\n")
    shutil.copytree(root / "one", root / "named")
    (root / "named" / TEMPLATE).unlink()
    (root / "named" / TOKENIZER_CONFIG).write_text(json.dumps(TOKENS))
    (root / "lines" / PROMPTS).write_text('{"prompt": "one"}\n"two \\u2028"\n')


def _wider(path: Path) -> Any:
    return layout(Checkpoint(path).config, 6, 2)


def _write_dump(path: Path) -> None:
    ids = {"input_ids": torch.arange(5), "logits": torch.zeros(5, TINY.vocab_size)}
    save_file(ids, path / "0.safetensors")
    content = {"format": "minqwen dump 1", "passes": 1, "ranks": 1, "dtype": "bfloat16"}
    (path / DUMP).write_text(json.dumps(content | {"engine": "x"}))


# ---- reading ------------------------------------------------------------------------------------


def weights(path: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, as bytes."""
    found = Checkpoint(path)
    found.check()
    return {
        name: (found.dtype(name), found.shape(name), _bits(found, name)) for name in found.names
    }


def _bits(found: Checkpoint, name: str) -> bytes:
    return found.read(name).view(torch.uint8).numpy().tobytes()


def places(path: Path) -> dict[str, str]:
    found = Checkpoint(path)
    found.check()
    return {name: found.file(name).name for name in found.names}


def texts(path: Path) -> list[str]:
    tokenizer = Tokenizer.from_dir(path)
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert all(0 <= id < tokenizer.vocab_size for row in ids for id in row)
    return [tokenizer.decode(row) for row in ids]


def chat(path: Path) -> str:
    """The template's text, of a renderer that lives as long as this process."""
    template = Tokenizer.from_dir(path).chat_templates["default"]
    renderer = _renderers.setdefault(os.getpid(), ChatRenderer())
    try:
        return renderer.render(template, {"messages": CHAT, "add_generation_prompt": True})
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None


_renderers: dict[int, ChatRenderer] = {}


def shrunk(path: Path) -> dict[str, Any]:
    return _shrunk(path, shrink)


def shrunk_packed(path: Path) -> dict[str, Any]:
    return _shrunk(path, shrink_packed)


def _shrunk(path: Path, act: Callable[[Path, Path], object]) -> dict[str, Any]:
    """The source's tensors, and what its config says."""
    out = path.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    act(path, out)
    tensors = {name: x.view(torch.uint8).flatten() for name, x in load_file(out / FILE).items()}
    said = json.loads((out / CONFIG).read_text())
    return {name: x.numpy().tobytes() for name, x in tensors.items()} | {"config": said}


@functools.cache
def tool(name: str) -> dict[str, Any]:
    """A tool's functions. It is read once, which takes longer than most files."""
    return runpy.run_path(str(ROOT / "tools" / name))


def prompts(path: Path) -> list[str]:
    found: list[str] = tool("generate.py")["read_prompt_file"](path / PROMPTS)
    return found


def records(path: Path) -> Any:
    return read_jsonl(path / RECORDS, TINY)


def sha256_of_manifest(content: dict[str, Any]) -> str:
    """What minqwen_heads.json says of itself."""
    signed = {key: content[key] for key in content if key in KEYS}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


# ---- what must come of it -----------------------------------------------------------------------


def unchanged(path: Path, read: Any, before: Any) -> str | None:
    """It has a digest, or must agree with other files: nothing else can be read from it."""
    return None if read == before else "something else was read than before the change"


def same_weights(path: Path, read: dict[str, Any], before: dict[str, Any]) -> str | None:
    """Whoever changes a manifest's digest too may change other keys of the config."""
    return unchanged(path, read | {"config": None}, before | {"config": None})


def unless_of_the_older_form(path: Path, read: Any, before: Any) -> str | None:
    """GPTQ's two forms differ in a key of the config alone; without it the older one is meant."""
    form = _json(path / CONFIG)["quantization_config"].get("checkpoint_format")
    return None if form in ("gptq", None) else unchanged(path, read, before)


def anything(path: Path, read: Any, before: Any) -> str | None:
    return None


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes().decode("utf-8-sig"))


def _disagreements(read: Any, said: dict[str, Any], names: tuple[str, ...]) -> str | None:
    for name in names:
        value, got = said.get(name), getattr(read, name)
        same = value == got or (isinstance(value, float) and math.isclose(value, got))
        if value is not None and not (same and isinstance(value, bool) == isinstance(got, bool)):
            return f"{name} is {str(value)[:40]} in the file and was read as {str(got)[:40]}"
    return None


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("tie_word_embeddings", "bos_token_id", "pad_token_id", "model_type"),
)


def config_as_written(path: Path, read: ModelConfig, before: Any) -> str | None:
    return _disagreements(read, _json(path / CONFIG), SIZES)


def defaults_as_written(path: Path, read: GenerationDefaults, before: Any) -> str | None:
    names = ("top_p", "min_p", "repetition_penalty", "do_sample", "bos_token_id", "pad_token_id")
    return _disagreements(read, _json(path / GENERATION), names)


def weights_as_written(path: Path, read: dict[str, Any], before: Any) -> str | None:
    data = (path / FILE).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, said in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        a, b = said["data_offsets"]
        if name not in read or read[name][1:] != (
            tuple(said["shape"]),
            data[start + a : start + b],
        ):
            return f"{name[:40]} was not read as it is written"
    return None


def text_is_kept(path: Path, read: list[str], before: list[str]) -> str | None:
    """White space aside where the file asks for some before a text, or drops it around a token.

    A normalizer may make another text of it.
    """
    file = path / TOKENIZER
    if file.exists() and _json(file).get("normalizer"):
        return None
    data = b"".join(file.read_bytes() for file in path.glob("tokenizer*.json"))
    moves_space = re.search(rb'"(add_prefix_space|[lr]strip)": *true', data) is not None
    for text, back in zip(TEXTS, read, strict=True):
        a, b = ("".join(each.split()) if moves_space else each for each in (text, back))
        if a != b:
            return f"the text {text!r} is lost: {back!r}"
    return None


def _lines(path: Path) -> list[str]:
    """Those that are not empty. (Path.read_text would end a line at a carriage return.)"""
    text = path.read_bytes().decode("utf-8-sig")
    return [line for line in text.split("\n") if line.strip()]


def records_as_written(path: Path, read: Any, before: Any) -> str | None:
    for line, record in zip(_lines(path / RECORDS), read, strict=True):
        said = json.loads(line)
        given = [x for x in said["logprobs"] if x is not None]
        if list(record.ids) != said["prompt_token_ids"] + said["token_ids"]:
            return "other ids were read"
        if sum(e.logprob in given or e.logprob == -math.inf for e in record.entries) < len(given):
            return "other log probabilities were read"
    return None


def prompts_as_written(path: Path, read: list[str], before: Any) -> str | None:
    said = [json.loads(line) for line in _lines(path / PROMPTS)]
    wanted = [each["prompt"] if isinstance(each, dict) else each for each in said]
    return None if read == wanted else "other prompts were read"


def dump_as_written(path: Path, read: Any, before: Any) -> str | None:
    said = _json(path / DUMP)
    wanted = (1, str(said.get("dtype", "float32")).removeprefix("torch."), list(range(5)))
    return None if read[:3] == wanted else f"{wanted} is in the file and {read[:3]} was read"


def dump(path: Path) -> Any:
    found = Dump.open(path, TINY)
    return found.passes, str(found.dtype).removeprefix("torch."), found.ids(0), found.engine


def pack(path: Path) -> Any:
    found = Pack.open(path)
    return {**vars(found), "path": None, "damage": found.damage()}


def verified(path: Path) -> Any:
    """The pack, computed again."""
    found = Pack.open(path)
    checked = [Checker(found).check(run) for run in found.runs]
    return [found.damage(), *([point.verdict for point in run.points] for run in checked)]


def config(path: Path) -> ModelConfig:
    found = ModelConfig.from_json(path)
    assert found.num_parameters() > 0 and found.context_length > 0
    return found


TARGETS: dict[str, Target] = {
    "config": Target("one", CONFIG, config, config_as_written),
    "generation": Target(
        "one", GENERATION, lambda p: GenerationDefaults.from_dir(p, TINY), defaults_as_written
    ),
    "header": Target("one", FILE, weights, weights_as_written, header=True),
    "index": Target("many", INDEX, places, unchanged),
    "tokenizer": Target("one", TOKENIZER, texts, text_is_kept),
    "tokenizer_config": Target("named", TOKENIZER_CONFIG, texts, text_is_kept),
    "vocab": Target("older", "vocab.json", texts, text_is_kept),
    "merges": Target("older", "merges.txt", texts, text_is_kept, is_json=False),
    "pieces": Target("pieces", "tokenizer.model", texts, anything, is_json=False),
    "template": Target("one", TEMPLATE, chat, anything, is_json=False),
    "manifest": Target("wide", MANIFEST, shrunk, unchanged),
    "signed manifest": Target("wide", MANIFEST, shrunk, same_weights, sign=sha256_of_manifest),
    "signed packed manifest": Target(
        "packed", MANIFEST, shrunk_packed, same_weights, sign=sha256_of_manifest
    ),
    "signed pack": Target("pack", "manifest.json", verified, anything, sign=packs.manifest_digest),
    "wide weights": Target("wide", FILE, shrunk, unchanged, is_json=False),
    "wide config": Target("wide", CONFIG, shrunk, unchanged),
    "packed manifest": Target("packed", MANIFEST, shrunk_packed, unchanged),
    "packed weights": Target("packed", FILE, shrunk_packed, unchanged, is_json=False),
    "packed config": Target("packed", CONFIG, shrunk_packed, unchanged),
    "quantised header": Target("quantised gptq4_act", ONLY_FILE, weights, anything, header=True),
    "dump": Target("dump", DUMP, dump, dump_as_written),
    "pack": Target("pack", "manifest.json", pack, unchanged),
    "records": Target("lines", RECORDS, records, records_as_written, is_json=False),
    "prompts": Target("lines", PROMPTS, prompts, prompts_as_written, is_json=False),
}
for _name in KINDS:
    _judge = unless_of_the_older_form if "v2" in _name else unchanged
    TARGETS[f"quantised config {_name}"] = Target(f"quantised {_name}", CONFIG, weights, _judge)
