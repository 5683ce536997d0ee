"""Damaged, hostile and odd checkpoint directories: one table of what is done to a sound one.

A case is a base (bases.py), a change of a copy of it, and the words that the one line about it must
hold. What is read, and how, is worker.py's.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENS = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, FILE = "chat_template.jinja", "model.safetensors"
INDEX, MANIFEST = "model.safetensors.index.json", "minqwen_heads.json"
ONE, TWO = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
Q0 = "model.layers.0.self_attn.q_proj.weight"
CANARY = "canary"  # what hostile code would write into the directory above the checkpoint
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
DEEP = 5000

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """words: what the line must hold; () for a directory that must be taken."""

    base: str
    change: Change
    words: tuple[str, ...]
    action: str = "load"


# ---- how to change a directory ------------------------------------------------------------------


def edit(file: str, **values: Any) -> Change:
    """Set keys of a JSON object; a__b is the key b in the object a."""

    def change(path: Path) -> None:
        content = json.loads((path / file).read_text())
        for key, value in values.items():
            *parents, last = key.split("__")
            place = content
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        (path / file).write_text(json.dumps(content))

    return change


def drop(file: str, key: str) -> Change:
    def change(path: Path) -> None:
        content = json.loads((path / file).read_text())
        del content[key]
        (path / file).write_text(json.dumps(content))

    return change


def text(file: str, content: str | bytes) -> Change:
    """The whole file. A surrogate is written as the bytes that it stands for."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda path: (path / file).write_bytes(data)


def gone(file: str) -> Change:
    return lambda path: (path / file).unlink()


def instead(file: str, make: Callable[[Path], object]) -> Change:
    """make(path) in the place of a file."""

    def change(path: Path) -> None:
        (path / file).unlink(missing_ok=True)
        make(path / file)

    return change


def linked(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 5 << 30)  # a hole, which takes no room on the disk


def moved(path: Path) -> None:
    """A directory in the place of the file."""
    path.mkdir()


def cut(file: str, size: int) -> Change:
    return lambda path: os.truncate(path / file, size)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def rewrite(path: Path) -> None:
        found = load_file(path / FILE)
        change(found)
        save_file(found, path / FILE, metadata={"format": "pt"})

    return rewrite


def tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return tensors(lambda found: found.update({name: make(found[name]).contiguous()}))


def poisoned(value: float) -> Change:
    def make(x: torch.Tensor) -> torch.Tensor:
        x[3, 5] = value
        return x

    return tensor(Q0, make)


def header(change: Callable[[str], str], file: str = FILE) -> Change:
    """The JSON of a weight file's header, edited as text."""

    def rewrite(path: Path) -> None:
        data = (path / file).read_bytes()
        length = int.from_bytes(data[:8], "little")
        new = change(data[8 : 8 + length].decode()).encode()
        (path / file).write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])

    return rewrite


def swapped(old: str, new: str) -> Change:
    return header(lambda json_text: json_text.replace(old, new, 1))


def placed(file: Any, name: str = Q0) -> Change:
    """The index says that a tensor is in `file`."""
    return edit_map(lambda weight_map: weight_map.update({name: file}))


def edit_map(change: Callable[[dict[str, Any]], object]) -> Change:
    def rewrite(path: Path) -> None:
        content = json.loads((path / INDEX).read_text())
        change(content["weight_map"])
        (path / INDEX).write_text(json.dumps(content))

    return rewrite


def both(*changes: Change) -> Change:
    return lambda path: [change(path) for change in changes]


class Bomb:
    """A pickle that writes the canary when it is opened."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return exec, (f"open({CANARY!r}, 'w').write('ran')",)


def code(path: Path) -> None:
    (path / "modeling_evil.py").write_text(f"open({CANARY!r}, 'w').write('ran')\n")


CODE = both(
    code,
    edit(
        CONFIG,
        auto_map={"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
    ),
)
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}


# ---- config.json --------------------------------------------------------------------------------

CASES: dict[str, Case] = {}


def add(name: str, change: Change, *words: str, base: str = "one", action: str = "load") -> None:
    assert name not in CASES, name
    CASES[name] = Case(base, change, words, action)


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)
for _key in SIZES:
    for _value in (0, -1, 2**40, 2**62, 10**30, "8", 1.5, True, [8]):
        add(f"{_key} {_value!r}", edit(CONFIG, **{_key: _value}), CONFIG, _key)
for _key in (*SIZES[:6], "rms_norm_eps", "hidden_act", "model_type", "tie_word_embeddings"):
    add(f"no {_key}", drop(CONFIG, _key), CONFIG, _key, "missing")
for _key, _values in {
    "rms_norm_eps": (0, -1e-6, 1e3, float("nan"), float("inf"), "x"),
    "rope_theta": (0, -1, 1e299, float("nan"), float("inf"), "x"),
}.items():
    for _value in _values:
        add(f"{_key} {_value}", edit(CONFIG, **{_key: _value}), CONFIG, _key)
for _key, _values in {
    "model_type": ("mamba", None, ["qwen2"], "qwen2\x1b[2J"),
    "hidden_act": ("gelu", 3),
    "architectures": (["Qwen2MoeForCausalLM"], "Qwen2ForCausalLM", [3]),
    "torch_dtype": ("int4", "float\x1b[31m16", 16, "x" * 5000),
    "tie_word_embeddings": ("true", 1, None),
    "use_sliding_window": (True, "yes"),
    "layer_types": (["full_attention"], ["sliding_attention"] * 2, 3),
    "rope_scaling": ("yarn", {"type": "longrope"}, {"type": "yarn", "factor": 0.5}),
    "attention_bias": (False, None),
    "mlp_bias": (True,),
    "eos_token_id": (-1, "2", 1.5, [1, None], 2**63),
    "bos_token_id": (-1, 2**31, "x"),
    "quantization_config": ("awq", [], {"quant_method": "bitsandbytes"}, {"quant_method": "fp8"}),
}.items():
    for _value in _values:
        add(f"{_key} {str(_value)[:30]!r}", edit(CONFIG, **{_key: _value}), CONFIG, _key)
for _key, _value in {
    "beta_fast": 1e-300,
    "beta_slow": 1e-300,
    "factor": 1e30,
    "attention_factor": 1e300,
    "mscale": 1e300,
    "original_max_position_embeddings": 10**18,
    "truncate": 3,
    "finetuned": True,
}.items():
    add(f"yarn {_key}", edit(CONFIG, rope_scaling=YARN | {_key: _value}), CONFIG, _key)
add("heads that do not divide", edit(CONFIG, num_attention_heads=5), CONFIG, "num_attention_heads")
add("an odd head", edit(CONFIG, head_dim=7), CONFIG, "head_dim", "even")
add("more layers than there are", edit(CONFIG, num_hidden_layers=3), "model.layers.2", "missing")
add(
    "fewer layers than there are", edit(CONFIG, num_hidden_layers=1), "model.layers.1", "unexpected"
)
add("1,000 layers", edit(CONFIG, num_hidden_layers=1000), CONFIG, "num_hidden_layers")
add("another vocabulary", edit(CONFIG, vocab_size=300), "embed_tokens", "(260, 24)", "(300, 24)")
add("another width", edit(CONFIG, intermediate_size=48), "mlp", "shape")
add("other heads", edit(CONFIG, num_attention_heads=8), "self_attn", "shape")
add("untied", edit(CONFIG, tie_word_embeddings=True), "lm_head.weight", "differs")
add("a key twice", text(CONFIG, '{"vocab_size": 1, "vocab_size": 2}'), CONFIG, "more than once")
add("a list", text(CONFIG, "[]"), CONFIG, "JSON object")
add("deep", text(CONFIG, "[" * DEEP), CONFIG, "not valid JSON")
add("deep and whole", edit(CONFIG, x=json.loads("[" * 900 + "]" * 900)), CONFIG, "nested")
add("many digits", text(CONFIG, '{"vocab_size": ' + "9" * 5000 + "}"), CONFIG, "not valid JSON")
add("half a surrogate", text(CONFIG, '{"a": "\\ud800"}'), CONFIG, "not valid JSON")
add("UTF-16", text(CONFIG, "{}".encode("utf-16")), CONFIG, "not valid JSON")
add("a config cut short", cut(CONFIG, 99), CONFIG, "not valid JSON")


# ---- files that are none ------------------------------------------------------------------------

SMALL = {
    CONFIG: "one",
    GENERATION: "one",
    TOKENIZER: "one",
    TOKENS: "one",
    TEMPLATE: "one",
    FILE: "one",
    "special_tokens_map.json": "one",
    "added_tokens.json": "one",
    "additional_chat_templates/rag.jinja": "one",
    INDEX: "many",
    TWO: "many",
    "vocab.json": "older",
    "merges.txt": "older",
    "tokenizer.model": "pieces",
}
ODD: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "device": linked("/dev/zero"),
    "directory": moved,
    "link to nothing": linked("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "empty": Path.touch,
    "huge": huge,
    "pointer": lambda path: path.write_text(LFS),
    "noise": lambda path: path.write_bytes(bytes(range(128, 256)) * 40),
}
for _file, _base in SMALL.items():
    for _kind, _make in ODD.items():
        _words = (_file.rpartition("/")[2],)
        add(f"{_file}: {_kind}", instead(_file, _make), *_words, base=_base)
for _kind, _make in ODD.items():
    add(f"{MANIFEST}: {_kind}", instead(MANIFEST, _make), MANIFEST, base="wide", action="shrink")


# ---- weights ------------------------------------------------------------------------------------

WHOLE = "not a whole safetensors file"
add("cut in the data", cut(FILE, 9000), FILE, WHOLE)
add("cut in the header", cut(FILE, 100), FILE, WHOLE)
add("cut in the length", cut(FILE, 3), FILE, WHOLE)
add("a header of 2^63 bytes", text(FILE, b"\xff" * 7 + b"\x7f" + b"{}"), FILE, WHOLE)
add(
    "a header of 90 MB",
    both(text(FILE, (90 << 20).to_bytes(8, "little") + b"{}"), cut(FILE, 91 << 20)),
    FILE,
    "header",
)
add("a header that is no JSON", swapped("{", "["), FILE, WHOLE)
add("a header that is deep", header(lambda old: "[" * DEEP), FILE, WHOLE)
add("overlapping", swapped("[0,", "[2,"), FILE, WHOLE)
add("beyond the end", swapped('"data_offsets":[0,', '"data_offsets":[99999999,'), FILE, WHOLE)
add("negative offsets", swapped('"data_offsets":[0,', '"data_offsets":[-8,'), FILE, WHOLE)
add("a negative shape", swapped('"shape":[', '"shape":[-'), FILE, WHOLE)
add("an endless shape", swapped('"shape":[', '"shape":[4611686018427387904,'), FILE, WHOLE)
add("another dtype", swapped("BF16", "F32"), FILE, WHOLE)
add("an unknown dtype", swapped("BF16", "Q4\x1b"), FILE, WHOLE)
add(
    "a tensor twice",
    swapped(f'"{Q0}"', f'"{Q0}":{{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}},"{Q0}"'),
    Q0,
    "more than once",
)
add("bytes after the end", lambda path: (path / FILE).open("ab").write(b"x"), FILE, WHOLE)
add("NaN", poisoned(float("nan")), FILE, Q0, "1 NaN")
add("infinity", poisoned(float("-inf")), FILE, Q0, "1 infinite")
add("a missing tensor", tensors(lambda found: found.pop(Q0)), Q0, "missing")
add(
    "a tensor too many",
    tensors(lambda f: f.update({"model.x\x1b[2J\n": torch.ones(2)})),
    "unexpected",
    "\\x1b[2J\\n",
)
add(
    "a name of 5,000 letters",
    tensors(lambda f: f.update({"a" * 5000: torch.ones(2)})),
    "unexpected",
)
add(
    "a name that runs backwards",
    tensors(lambda f: f.update({"a\u202eb": torch.ones(2)})),
    "\\u202e",
)
add("a transposed matrix", tensor(Q0, lambda x: x.T), Q0, "(24, 32)", "(32, 24)")
add("a flat matrix", tensor(Q0, torch.flatten), Q0, "(768,)")
add("a number", tensor(Q0, lambda x: torch.tensor(1.0)), Q0, "()")
add("an empty matrix", tensor(Q0, lambda x: x[:0]), Q0, "(0, 24)")
add("integers", tensor(Q0, lambda x: x.int()), Q0, "I32")
add("float8", tensor(Q0, lambda x: x.to(torch.float8_e4m3fn)), Q0, "F8_E4M3")
add("both prefixes", tensors(lambda f: f.update({Q0[6:]: f[Q0].clone()})), Q0, "once")
add(
    "only a pickle",
    both(gone(FILE), text("pytorch_model.bin", pickle.dumps(Bomb()))),
    "pickle",
    "never opened",
)
add("a pickle under another name", text(FILE, pickle.dumps(Bomb())), FILE, WHOLE)
add(
    "a stray weight file", text("model-00002-of-00002.safetensors", "x"), "-of-00002", "not part of"
)
add("no weights", gone(FILE), "found neither", FILE)
add(
    "an adapter",
    both(gone(FILE), text("adapter_model.safetensors", "x")),
    "adapter_model.safetensors",
)

PLAIN = "plain name"
for _name, _place in {
    "above": f"../many/{ONE}",
    "absolute": "/etc/passwd",
    "absolute weights": "/tmp/model.safetensors",
    "in a folder": f"sub/{ONE}",
    "backwards": f"..\\{ONE}",
    "dots": "..",
    "nothing": "",
    "a NUL": "a\0.safetensors",
    "a pickle": "pytorch_model.bin",
    "a number": 3,
    "a list": [ONE],
    "null": None,
}.items():
    add(f"index: {_name}", placed(_place), INDEX, PLAIN, base="many")
add(
    "index: a file that is not there",
    placed("x\x1b[31m.safetensors"),
    "x\\x1b[31m",
    "cannot be read",
    base="many",
)
add(
    "index: a name of 5,000 letters",
    placed("x" * 5000 + ".safetensors"),
    "xxx",
    "cannot be read",
    base="many",
)
add("index: half a surrogate", placed("\ud800.safetensors"), INDEX, "not valid JSON", base="many")
add("index: the wrong file", placed(TWO, "lm_head.weight"), "lm_head.weight", base="many")
add(
    "index: a tensor of no file",
    placed(ONE, "model.x\n"),
    "model.x\\n",
    "does not hold",
    base="many",
)
add("index: a tensor left out", edit_map(lambda m: m.pop(Q0)), Q0, "holds", base="many")
add("index: no map", text(INDEX, "{}"), INDEX, "weight_map", base="many")
add("index: an empty map", text(INDEX, '{"weight_map": {}}'), INDEX, "weight_map", base="many")
add("index: is a list", text(INDEX, "[]"), INDEX, "JSON object", base="many")
add("index: deep", text(INDEX, "[" * DEEP), INDEX, "not valid JSON", base="many")
add("index: a file is gone", gone(TWO), TWO, "cannot be read", base="many")
add("index: gone", gone(INDEX), "found neither", INDEX, base="many")
add("index: and a single file", text(FILE, "x"), FILE, "not part of", base="many")
add("index: a file is a fifo", instead(TWO, os.mkfifo), TWO, "regular", base="many")
add("index: a file cut short", cut(TWO, 4000), TWO, WHOLE, base="many")


# ---- quantised ----------------------------------------------------------------------------------

for _key, _value in {
    "quant_method": "awq\x1b",
    "bits": 3,
    "group_size": 0,
    "version": "marlin",
    "modules_to_not_convert": None,
}.items():
    if _value is not None:
        add(
            f"awq {_key}",
            edit(CONFIG, **{f"quantization_config__{_key}": _value}),
            CONFIG,
            "quantization_config",
            base="awq",
        )
add("awq group of 7", edit(CONFIG, quantization_config__group_size=7), "group", base="awq")
add(
    "awq groups that do not divide",
    edit(CONFIG, quantization_config__group_size=17),
    "group_size",
    base="awq",
)
add(
    "awq without scales",
    tensors(lambda f: f.pop(Q0[:-6] + "scales")),
    Q0[:-6],
    "scales",
    base="awq",
)
add(
    "awq, zeros of another shape", tensor(Q0[:-6] + "qzeros", lambda x: x[:1]), "qzeros", base="awq"
)
add("awq, words of floats", tensor(Q0[:-6] + "qweight", lambda x: x.float()), "qweight", base="awq")
add(
    "awq, scales of NaN",
    tensor(Q0[:-6] + "scales", lambda x: x * float("nan")),
    "q_proj",
    "NaN",
    base="awq",
)
add(
    "awq, words and weights",
    tensors(lambda f: f.update({Q0: torch.ones(48, 32).half()})),
    Q0,
    "words",
    base="awq",
)
add("words without a config", drop(CONFIG, "quantization_config"), "qweight", base="awq")
add(
    "a config without words",
    edit(
        CONFIG,
        quantization_config={"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"},
    ),
    CONFIG,
    "words",
)


# ---- code ---------------------------------------------------------------------------------------

add("code of its own", both(CODE, edit(CONFIG, model_type="evil")), CONFIG, "model_type")


# ---- generation_config.json ---------------------------------------------------------------------

for _key, _values in {
    "temperature": (-1, 1e39, float("nan"), "hot", None),
    "top_p": (0, 1.5, "x", float("nan")),
    "top_k": (-2, 1.5, 2**63, "x"),
    "min_p": (-0.1, 2),
    "repetition_penalty": (0, -1, 1e39, "x"),
    "do_sample": (1, "true"),
    "eos_token_id": (-1, "x", [1, "x"], 2**63, 1.5),
    "pad_token_id": (-1, 1.5),
    "max_new_tokens": (0, -1, 2**63, "x"),
    "num_beams": (4, "x"),
    "stop_strings": (["x"], 3),
    "forced_eos_token_id": (1,),
}.items():
    for _value in _values:
        if _value is not None:
            add(
                f"generation {_key} {_value}",
                edit(GENERATION, do_sample=True, **{_key: _value})
                if _key != "do_sample"
                else edit(GENERATION, do_sample=_value),
                GENERATION,
                _key,
            )
add("generation: a list", text(GENERATION, "[1]"), GENERATION, "JSON object")
add("generation: deep", text(GENERATION, '{"a":' * DEEP), GENERATION, "not valid JSON")


# ---- tokenizers ---------------------------------------------------------------------------------

BOMB = {
    "type": "Split",
    "pattern": {"Regex": "(a+)+b"},
    "behavior": "Isolated",
    "invert": False,
}


def split_by(expression: str) -> dict[str, Any]:
    """A pre-tokenizer: the expression, and then the bytes' letters."""
    pattern = {"Regex": expression}
    letters = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    parts = [BOMB | {"pattern": pattern}, {"type": "ByteLevel"} | letters]
    return {"type": "Sequence", "pretokenizers": parts}


for _name, _change, _words in (
    ("no JSON", text(TOKENIZER, "{oops"), ("damaged",)),
    ("nothing in it", text(TOKENIZER, "{}"), ("damaged",)),
    ("a list", text(TOKENIZER, "[]"), ("damaged",)),
    ("deep", text(TOKENIZER, '{"a":' * DEEP), ("damaged",)),
    ("another model", edit(TOKENIZER, model__type="Rubbish"), ("damaged",)),
    ("a vocabulary of lists", edit(TOKENIZER, model__vocab=[1]), ("damaged",)),
    ("ids that are text", edit(TOKENIZER, model__vocab={"a": "x"}), ("damaged",)),
    ("negative ids", edit(TOKENIZER, model__vocab={"a": -1}), ("damaged",)),
    ("ids with a gap", edit(TOKENIZER, model__vocab={"a": 0, "b": 9}, model__merges=[]), ("ids",)),
    ("merges of nothing", edit(TOKENIZER, model__merges=[["zz", "yy"]]), ("damaged",)),
    ("merges with ESC", edit(TOKENIZER, model__merges=[["\x1b[2J", "y\n"]]), ("damaged",)),
    ("merges of 5,000 letters", edit(TOKENIZER, model__merges=[["x" * 5000, "y"]]), ("damaged",)),
    (
        "an unknown decoder",
        edit(TOKENIZER, decoder={"type": "WordPiece", "prefix": "#", "cleanup": True}),
        ("decoder",),
    ),
    ("no decoder", edit(TOKENIZER, decoder=None), ("decoder",)),
    ("nothing that spells bytes", edit(TOKENIZER, pre_tokenizer=None), ("0 times",)),
    ("bytes spelled twice", edit(TOKENIZER, normalizer={"type": "ByteLevel"}), ("2 times",)),
    ("an end of words", edit(TOKENIZER, model__end_of_word_suffix="</w>"), ("end_of_word_suffix",)),
    (
        "a prefix within words",
        edit(TOKENIZER, model__continuing_subword_prefix="##" * 99),
        ("continuing_subword_prefix",),
    ),
    ("dropout", edit(TOKENIZER, model__dropout=0.5), ("dropout is 0.5",)),
    (
        "a broken expression",
        edit(TOKENIZER, pre_tokenizer=split_by("((")),
        ("damaged",),
    ),
    (
        "an added id beyond all",
        edit(
            TOKENIZER,
            added_tokens=[
                {
                    "id": 2**40,
                    "content": "x",
                    "special": True,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                }
            ],
        ),
        (),
    ),
    ("a version of the future", edit(TOKENIZER, version=3), ("damaged",)),
    ("an expression that backtracks", edit(TOKENIZER, pre_tokenizer=split_by("(a+)+b")), ("cut",)),
    (
        "a normaliser that backtracks",
        edit(TOKENIZER, normalizer={"type": "Replace", "pattern": BOMB["pattern"], "content": ""}),
        (),
    ),
    (
        "a template of tokens that are not there",
        edit(
            TOKENIZER,
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            },
        ),
        (),
    ),
    (
        "a damaged table",
        edit(TOKENIZER, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        (),
    ),
    (
        "an unknown word that is not there",
        edit(TOKENIZER, model__unk_token="<x>", model__vocab={"a": 0}, model__merges=[]),
        (),
    ),
):
    add(f"tokenizer: {_name}", _change, TOKENIZER, *_words)
for _key, _value in {
    "eos_token": "<|nowhere|>",
    "bos_token": 3,
    "added_tokens_decoder": {"3": {"content": "<|im_end|>"}},
    "extra_special_tokens": 3,
    "chat_template": 3,
    "split_special_tokens": True,
    "add_prefix_space": True,
}.items():
    add(
        f"tokenizer_config {_key}",
        both(
            edit(TOKENS, **{_key: _value}),
            gone(TEMPLATE),
            gone("additional_chat_templates/rag.jinja"),
        ),
        TOKENS,
        _key,
    )
add(
    "added tokens beyond all",
    edit(TOKENS, added_tokens_decoder={"9" * 30: {"content": "x"}}),
    TOKENS,
)
add(
    "added tokens of ESC",
    edit(TOKENS, added_tokens_decoder={"3": {"content": "\x1b[2J"}}),
    TOKENS,
    "\\x1b",
)
add(
    "added tokens that are odd",
    edit(TOKENS, added_tokens_decoder={"260": {"content": "x", "evil": 1}}),
    TOKENS,
)
add("no tokenizer", gone(TOKENIZER), "no tokenizer here")
for _name, _content in {
    "no JSON": "{",
    "a list": "[]",
    "ids twice": '{"a": 0, "b": 0}',
    "ids with a gap": '{"a": 0, "b": 2}',
    "ids that are true": '{"a": true, "b": 0}',
    "a token twice": '{"a": 0, "a": 1}',
    "half a surrogate": '{"\\ud800": 0}',
}.items():
    add(f"vocab.json: {_name}", text("vocab.json", _content), "vocab.json", base="older")
for _name, _content in {
    "one word": "#version\nh\n",
    "three words": "h e l\n",
    "no such token": "zz yy\n",
    "ESC": "\x1b[2J\n",
}.items():
    add(f"merges.txt: {_name}", text("merges.txt", _content), "merges.txt", base="older")
add(
    "merges.txt: to no token",
    drop("vocab.json", "hell"),
    "merges.txt",
    "'he' and 'll'",
    base="older",
)
add("no merges", gone("merges.txt"), "merges.txt", base="older")
add("no vocabulary", gone("vocab.json"), "vocab.json", base="older")
add("pieces cut short", cut("tokenizer.model", 999), "tokenizer.model", base="pieces")


# ---- chat templates -----------------------------------------------------------------------------

for _name, _source, _words in (
    ("not closed", "{% for", ("line 1",)),
    ("an unknown tag", "{% evil %}", ("line 1",)),
    ("an unknown filter", "{{ 1 | evil }}", ("evil",)),
    ("without end", "{% for i in range(10**9) %}{% endfor %}", ()),
    (
        "nested loops",
        "{% set n = namespace(a=0) %}"
        + "{% for i in range(99999) %}" * 4
        + "{% set n.a = 1 %}"
        + "{% endfor %}" * 4,
        (),
    ),
    ("a memory bomb", "{{ 'a' * 10**10 }}", ()),
    ("a wide number", "{{ '%1000000000d' % 1 }}", ()),
    ("9**9**9", "{{ 9**(9**9) }}", ()),
    ("a long text", "{% for i in range(9000) %}{{ 'a' * 9999 }}{% endfor %}", ("characters",)),
    ("a walk to Python", "{{ ''.__class__.__mro__[1].__subclasses__() }}", ()),
    ("globals", "{{ cycler.__init__.__globals__.os.system('touch canary') }}", ()),
    ("an import", "{% import 'os' as os %}", ()),
    ("an include", "{% include '/etc/passwd' %}", ()),
    ("ESC", "{{ raise_exception('\x1b[2Jx\ny') }}", ("\\x1b[2J",)),
    ("5,000 letters", "{{ raise_exception('x' * 5000) }}", ("xxxx",)),
    ("recursion", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", ()),
    ("a division", "{{ 1 / 0 }}", ("ZeroDivisionError",)),
    ("half a surrogate", "{{ '\\ud800' }}", ()),
):
    add(f"template: {_name}", text(TEMPLATE, _source), "template", *_words)


# ---- manifests ----------------------------------------------------------------------------------

for _key, _values in {
    "layout": (None, [], "x", {}),
    "layout__head_dim": (-8, 0, "8", None, 2**62, 8.0),
    "layout__source_heads": (0, 10**9, None, "4"),
    "layout__source_kv_heads": (0, 3, 10**9),
    "layout__heads": (None, [], "x" * 8, [0] * 8, [10**9] * 8, [[0]] * 8),
    "layout__kv": ([], [None, None], [0]),
    "layout__shares": ([], [2.0] * 8, ["1"] * 8, [float("nan")] * 8),
    "layout__seed": (-1, "x"),
    "layout__recipe": ("evil", None),
    "layout__extra": (1,),
    "arch": ("gpt", None),
    "source_config": (None, [], {}, "x"),
    "source_config__hidden_size": (2**62, -1, 32),
    "source_config__num_hidden_layers": (10**9, 1),
    "source_config__rms_norm_eps": (1e-5,),
    "source_sha256": (None, [], {}, {Q0: 3}),
    f"source_sha256__{Q0}": ("0" * 64,),
    "format": (0, 3, "2", None),
    "sha256": ("0" * 64, None),
}.items():
    for _value in _values:
        add(
            f"manifest {_key} {str(_value)[:30]}",
            edit(MANIFEST, **{_key: _value}),
            MANIFEST,
            base="wide",
            action="shrink",
        )
add(
    "manifest: deep",
    text(MANIFEST, '{"layout":' * DEEP),
    MANIFEST,
    "not valid JSON",
    base="wide",
    action="shrink",
)
add(
    "manifest: deep and whole",
    edit(MANIFEST, source_config__x=json.loads("[" * 500 + "]" * 500)),
    MANIFEST,
    "nested",
    base="wide",
    action="shrink",
)
add("manifest: gone", gone(MANIFEST), MANIFEST, base="wide", action="shrink")
add("manifest: other weights", tensor(Q0, lambda x: x + 1), Q0, base="wide", action="shrink")
add("manifest: drifted weights", poisoned(2.5), Q0, base="wide", action="shrink")
add(
    "manifest: one more layer",
    edit(CONFIG, num_hidden_layers=1),
    "layers",
    base="wide",
    action="shrink",
)


# ---- what is copied -----------------------------------------------------------------------------

for _kind, _make in {
    "fifo": os.mkfifo,
    "empty": Path.touch,
    "link to itself": ODD["link to itself"],
}.items():
    add(f"extend: {TOKENS} is {_kind}", instead(TOKENS, _make), TOKENS, action="extend")


# ---- odd, and valid -----------------------------------------------------------------------------


def as_cache(path: Path) -> None:
    """The layout of Hugging Face's cache: links from a snapshot to blobs."""
    blobs, snapshot = path / "blobs", path / "snapshots" / "1"
    blobs.mkdir()
    files = [file for file in path.iterdir() if file.is_file()]
    snapshot.mkdir(parents=True)
    for number, file in enumerate(files):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")


ODD_NAME = "\x1b[2J\n\u202e" + "x" * 200


def renamed(path: Path) -> None:
    """Everything in a directory with a name that moves a terminal's cursor."""
    files = list(path.iterdir())
    (path / ODD_NAME).mkdir()
    for file in files:
        file.rename(path / ODD_NAME / file.name)


for _file in (CONFIG, TOKENIZER, GENERATION, FILE, TEMPLATE):
    _words = ("\\x1b[2J\\n\\u202e", "template" if _file == TEMPLATE else _file)
    add(
        f"an odd directory with damage in {_file}",
        both(text(_file, "{% x"), renamed),
        *_words,
        action=f"load {ODD_NAME}",
    )


def newer_layout(path: Path) -> None:
    content = json.loads((path / CONFIG).read_text())
    content["dtype"] = content.pop("torch_dtype")
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": content.pop("rope_theta")}
    (path / CONFIG).write_text(json.dumps(content))


VALID: dict[str, Case] = {
    "untouched": Case("one", lambda path: None, ()),
    "untouched, several files": Case("many", lambda path: None, ()),
    "untouched, an extension": Case("wide", lambda path: None, ()),
    "untouched, quantised": Case("awq", lambda path: None, ()),
    "untouched, older": Case("older", lambda path: None, ()),
    "untouched, pieces": Case("pieces", lambda path: None, ()),
    "back from an extension": Case("wide", lambda path: None, (), "shrink"),
    "the hub's cache": Case("one", as_cache, (), "load snapshots/1"),
    "extended from the hub's cache": Case("one", as_cache, (), "extend snapshots/1"),
    "the newer layout": Case("one", newer_layout, ()),
    "a byte order mark": Case(
        "one", lambda p: (p / CONFIG).write_bytes(b"\xef\xbb\xbf" + (p / CONFIG).read_bytes()), ()
    ),
    "rotary buffers": Case(
        "one",
        tensors(
            lambda f: f.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
        ),
        (),
    ),
    "names of a base model": Case(
        "one",
        tensors(lambda f: [f.update({n[6:]: f.pop(n)}) for n in list(f) if n.startswith("model.")]),
        (),
    ),
    "unknown keys": Case("one", edit(CONFIG, surprise={"a": [1]}, _name_or_path="/x"), ()),
    "code that nobody asks for": Case("one", CODE, ()),
    "a pickle beside": Case("one", text("training_args.bin", pickle.dumps(Bomb())), ()),
    "no generation config": Case("one", gone(GENERATION), ()),
    "names in UTF-8": Case("one", text("grüße-\u4f60.md", "x"), ()),
    "a fifo that nobody reads": Case("one", lambda p: os.mkfifo(p / "pipe"), ()),
    "YaRN": Case("one", edit(CONFIG, rope_scaling=YARN), ()),
    "a long context": Case("one", edit(CONFIG, max_position_embeddings=10_485_760), ()),
    "a large theta": Case("one", edit(CONFIG, rope_theta=45_192_854_000.0), ()),
    "a long expression": Case(
        "one",
        edit(TOKENIZER, pre_tokenizer=split_by("(((a{99}){99}){99}){99}")),
        (),
    ),
    "several ends": Case("one", edit(GENERATION, eos_token_id=[1, 2, 259]), ()),
    "Windows lines": Case(
        "older",
        lambda p: (p / "merges.txt").write_bytes(
            (p / "merges.txt").read_bytes().replace(b"\n", b"\r\n")
        ),
        (),
    ),
    "an empty licence": Case("one", text("LICENSE", ""), (), "extend"),
}
