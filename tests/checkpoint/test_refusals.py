"""A directory that is not exactly a checkpoint is refused in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    FILE,
    INDEX,
    Q0,
    assert_holds,
    refusal,
    rewrite,
    tiny,
    write,
)

from minqwen.checkpoint import Checkpoint
from minqwen.errors import MinqwenError


def raw_header(path: Path, change) -> None:
    """Edits the JSON text of a header in place."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + n].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


def put(**tensors):
    """Adds or replaces tensors: Q0 under the name q0; a function is given the old one."""

    def change(old: dict) -> None:
        for name, t in tensors.items():
            name = Q0 if name == "q0" else name
            old[name] = t(old[Q0]).contiguous().clone() if callable(t) else t

    return lambda p: rewrite(p, change)


def drop(name):
    return lambda p: rewrite(p, lambda t: t.pop(name))


def header(old, new):
    return lambda p: raw_header(p / FILE, lambda s: s.replace(old, new, 1))


def cut(size, file=FILE):
    return lambda p: os.truncate(p / file, size)


def text(file, content):
    return lambda p: (p / file).write_text(content)


def config(**changes):
    return lambda p: (p / "config.json").write_text(json.dumps(tiny(**changes).to_dict()))


def replaced(file, make):
    """make(path) in the place of a file."""
    return lambda p: ((p / file).unlink(), make(p / file))


def one_layer_more(p):
    rewrite(
        p,
        lambda ts: ts.update(
            {n.replace("s.1.", "s.2."): t + 0 for n, t in ts.items() if "s.1." in n}
        ),
    )


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
NOT_WHOLE = ["not a whole safetensors file", "may be cut short"]
SINGLE_FAULTS = {
    "missing": (drop(Q0), [Q0, "missing", "found 26 of the 27"]),
    "missing norm": (drop("model.norm.weight"), ["'model.norm.weight'", "missing"]),
    "unexpected": (put(**{"model.extra": torch.ones(2)}), ["unexpected", "'model.extra'"]),
    "unexpected, unprefixed": (put(extra=torch.ones(2)), ["unexpected", "'extra'"]),
    "newline in a name": (put(**{"a\nb": torch.ones(2)}), ["'a\\nb'"]),
    "endless name": (put(**{"a" * 9999: torch.ones(2)}), ["unexpected"]),
    "one layer too many": (one_layer_more, ["model.layers.2.", "and 11 more"]),
    "inv_freq elsewhere": (
        put(**{"x.rotary_emb.inv_freq": torch.ones(4)}),
        ["'x.rotary_emb.inv_freq'"],
    ),
    "misshapen": (put(q0=lambda q: q[:-1]), [Q0, "(31, 24)", "(32, 24)"]),
    "transposed": (put(q0=lambda q: q.T), [Q0, "(24, 32)", "(32, 24)"]),
    "flat": (put(q0=lambda q: q.flatten()), [Q0, "(768,)", "(32, 24)"]),
    "scalar": (put(q0=torch.tensor(1.0)), [Q0, "shape ()", "vector or matrix"]),
    "integers": (put(q0=lambda q: q.int()), [Q0, "I32", "BF16"]),
    "float8": (put(q0=lambda q: q.to(torch.float8_e4m3fn)), [Q0, "F8_E4M3", "BF16"]),
    "both prefixes": (put(**{Q0[6:]: lambda q: q}), [Q0, "is also", "once"]),
    "twice in the header": (
        header(f'"{Q0}"', f'"{Q0}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}},"{Q0}"'),
        [Q0, "more than once"],
    ),
    "truncated data": (cut(9000), ["9000 bytes", *NOT_WHOLE]),
    "truncated header": (cut(100), ["100 bytes", *NOT_WHOLE]),
    "truncated length": (cut(3), ["3 bytes", *NOT_WHOLE]),
    "zero bytes": (cut(0), ["empty (0 bytes)"]),
    "trailing bytes": (lambda p: (p / FILE).open("ab").write(b"x"), NOT_WHOLE),
    "huge header": (lambda p: (p / FILE).write_bytes(b"\xff" * 64), NOT_WHOLE),
    "bad header": (header('{"dtype"', "{dtype"), NOT_WHOLE),
    "overlap": (header("[0,", "[2,"), NOT_WHOLE),
    "unknown dtype": (header("BF16", "BF61"), NOT_WHOLE),
    "a pickle renamed": (lambda p: torch.save({}, p / FILE), NOT_WHOLE),
    "git-lfs": (text(FILE, LFS), ["git-lfs pointer", "`git lfs pull`"]),
    "git-lfs config": (text("config.json", LFS), ["config.json", "`git lfs pull`"]),
    "no config": (lambda p: (p / "config.json").unlink(), ["config.json", "cannot be read"]),
    "config is a fifo": (replaced("config.json", os.mkfifo), ["config.json", "not a regular file"]),
    "bad config": (text("config.json", "{"), ["config.json", "JSON"]),
    "endless layers": (config(num_hidden_layers=1000), ["num_hidden_layers", "27 tensors"]),
    "quantised": (
        config(quantization_config={"quant_method": "awq"}),
        ["quantization_config", "'awq'"],
    ),
    "stray file": (text("model-00002-of-00002.safetensors", "x"), ["-of-00002", "is not part of"]),
    "fifo": (replaced(FILE, os.mkfifo), [FILE, "not a regular file"]),
    "directory": (replaced(FILE, Path.mkdir), [FILE, "not a regular file"]),
    "device": (replaced(FILE, lambda p: p.symlink_to("/dev/zero")), [FILE, "not a regular file"]),
    "link to a fifo": (
        lambda p: (os.mkfifo(p / "f"), replaced(FILE, lambda q: q.symlink_to("f"))(p)),
        [FILE, "not a regular file"],
    ),
    "dangling link": (replaced(FILE, lambda p: p.symlink_to("gone")), [FILE, "cannot be read"]),
    "link loop": (replaced(FILE, lambda p: p.symlink_to(FILE)), [FILE, "cannot be read"]),
    "only a pickle": (
        lambda p: (p / FILE).rename(p / "pytorch_model.bin"),
        ["'pytorch_model.bin'", "pickle", "never opened", "convert"],
    ),
    "other name": (
        lambda p: (p / FILE).rename(p / "weights.safetensors"),
        ["'weights.safetensors' alone"],
    ),
    "no weights": (lambda p: (p / FILE).unlink(), [f"neither {FILE}", "1 other files"]),
    "empty": (lambda p: [f.unlink() for f in p.iterdir()], ["nothing at all"]),
    "a file": (lambda p: (shutil.rmtree(p), p.write_text("x")), ["is a file", "directory"]),
}


@pytest.fixture
def alarm():
    """A reader that opens a fifo blocks for ever: end the test instead."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("blocked"))
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("fault", SINGLE_FAULTS)
def test_faults_of_a_single_file(tmp_path, alarm, fault):
    path = tmp_path / "c"
    write(path)
    change, words = SINGLE_FAULTS[fault]
    change(path)
    refusal(lambda: Checkpoint(path).check(), str(path), *words)


ONE, TWO, THREE = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))


def edit_map(change):
    def edit(p):
        index = json.loads((p / INDEX).read_text())
        change(index["weight_map"])
        (p / INDEX).write_text(json.dumps(index))

    return edit


def point(file):
    return edit_map(lambda m: m.update({Q0: file}))


def swap(p):
    (p / ONE).rename(p / "t"), (p / TWO).rename(p / ONE), (p / "t").rename(p / TWO)


INDEX_FAULTS = {
    "parent": (point(f"../c/{ONE}"), [Q0, "'../c/", "plain name"]),
    "absolute": (point("/etc/x.safetensors"), [Q0, "'/etc/x.safetensors'", "plain name"]),
    "backslash": (point(f"..\\{ONE}"), ["plain name"]),
    "dots": (point(".."), ["plain name"]),
    "nul": (point("a\0.safetensors"), ["plain name"]),
    "subdirectory": (point("sub/model.safetensors"), ["plain name"]),
    "pickle": (point("pytorch_model.bin"), ["'pytorch_model.bin'", "plain name"]),
    "number": (point(3), ["3", "plain name"]),
    "list": (point([ONE]), ["plain name"]),
    "absent file": (point("other.safetensors"), ["other.safetensors", "cannot be read"]),
    "wrong file": (point(THREE), [Q0, "hold", "places it"]),
    "not in the index": (edit_map(lambda m: m.pop(Q0)), [Q0, ": holds tensor", "places it"]),
    "not in the file": (
        edit_map(lambda m: m.update({"model.x": ONE})),
        ["'model.x'", "does not hold"],
    ),
    "bad JSON": (text(INDEX, "{oops"), [INDEX, "not valid JSON"]),
    "deep JSON": (text(INDEX, "[" * 200000), [INDEX, "not valid JSON"]),
    "bad UTF-8": (
        lambda p: (p / INDEX).write_bytes(b'{"\xff":1}'),
        [INDEX, "not valid JSON"],
    ),
    "a list": (text(INDEX, "[]"), ["the top level is []", "a JSON object"]),
    "no map": (text(INDEX, "{}"), ["'weight_map' is missing"]),
    "empty map": (text(INDEX, '{"weight_map":{}}'), ["'weight_map' is missing or empty"]),
    "twice": (
        text(INDEX, f'{{"weight_map":{{"{Q0}":"{ONE}","{Q0}":"{TWO}"}}}}'),
        [Q0, "more than once"],
    ),
    "empty index": (text(INDEX, ""), [INDEX, "0 bytes"]),
    "no index": (lambda p: (p / INDEX).unlink(), [f"'{ONE}' alone"]),
    "missing file": (lambda p: (p / TWO).unlink(), [TWO, "cannot be read"]),
    "truncated file": (cut(4000, TWO), [TWO, *NOT_WHOLE]),
    "zero-byte file": (cut(0, THREE), [THREE, "0 bytes"]),
    "swapped files": (swap, ["hold", "places it"]),
    "stray file": (text("model-00004-of-00004.safetensors", "x"), ["-of-00004", "is not part of"]),
    "both layouts": (text(FILE, "x"), ["/model.safetensors", "is not part of"]),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_faults_of_several_files_and_their_index(tmp_path, alarm, fault):
    path = tmp_path / "c"
    write(path, max_file_bytes=12000)
    assert (path / THREE).exists()
    change, words = INDEX_FAULTS[fault]
    change(path)
    refusal(lambda: Checkpoint(path).check(), str(path), *words)


def test_damaged_headers_and_indexes_never_escape_as_another_error(tmp_path):
    path, rng = tmp_path / "c", random.Random(7)
    tensors = write(path, tiny(num_hidden_layers=1), max_file_bytes=9000)
    files = [path / INDEX, *sorted(path.glob("*.safetensors"))[:2]]
    refused = 0
    for _ in range(300):
        file = rng.choice(files)
        good = file.read_bytes()
        bad = bytearray(good)
        for _byte in range(rng.choice([1, 1, 3])):
            bad[rng.randrange(min(len(bad), 900))] = rng.choice(
                [rng.randrange(256), *b'"[]{},:09-']
            )
        file.write_bytes(bad)
        try:
            Checkpoint(path).check()
        except MinqwenError as e:
            refused += 1
            assert "\n" not in str(e)
        file.write_bytes(good)
    assert refused > 200
    assert_holds(path, tensors)


def test_not_a_directory_but_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(
        lambda: Checkpoint("Qwen/Qwen2.5-7B"),
        "nothing is downloaded",
        "hf download Qwen/Qwen2.5-7B ",
    )
    refusal(lambda: Checkpoint(tmp_path / "nowhere"), "no such directory")
    refusal(lambda: Checkpoint("a\0b"), "no such directory")
