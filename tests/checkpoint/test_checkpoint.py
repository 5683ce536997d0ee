"""Checkpoints in and out: what is read is what was written, everything else is refused in one line, and a
writer that dies leaves the old directory or the new one."""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minqwen.checkpoint import Checkpoint, reader, write_checkpoint, writer
from minqwen.config import ModelConfig
from minqwen.errors import MinqwenError
from minqwen.parallel import Shard

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import make_checkpoint  # noqa: E402

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
Q0 = "model.layers.0.self_attn.q_proj.weight"


def tiny(**changes) -> ModelConfig:
    return ModelConfig(
        **dict(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
        | changes
    )


def weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(s, generator=g).to(getattr(torch, config.dtype)) * 0.02
        for n, s in config.parameter_shapes().items()
    }


def write(
    path: Path, config: ModelConfig | None = None, seed: int = 0, **options
) -> dict[str, torch.Tensor]:
    config = config or tiny()
    tensors = weights(config, seed)
    write_checkpoint(path, config, tensors.items(), **options)
    return tensors


def assert_holds(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    c = Checkpoint(path)
    c.check()
    assert set(c.names) == set(tensors)
    for name, t in tensors.items():
        got = c.read(name)
        assert got.dtype == t.dtype == c.dtype(name) and tuple(got.shape) == c.shape(name)
        assert torch.equal(got.view(torch.uint8), t.view(torch.uint8)), name


def refusal(act, *words: str) -> str:
    with pytest.raises(MinqwenError) as e:
        act()
    line = str(e.value)
    assert "\n" not in line and len(line) < 800, line
    for word in words:
        assert word in line, f"{word!r} is not in: {line}"
    return line


# ---- what is written is read back


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize(
    "limit,tied", [(4 * 10**9, True), (4 * 10**9, False), (9000, True), (1, False)]
)
def test_round_trip(tmp_path, dtype, limit, tied):
    config = tiny(dtype=dtype, tie_word_embeddings=tied)
    tensors = write(tmp_path / "c", config, max_shard_bytes=limit)
    assert_holds(tmp_path / "c", tensors)
    assert Checkpoint(tmp_path / "c").config == config
    files = sorted(p.name for p in (tmp_path / "c").iterdir())
    if limit > 10**9:
        assert files == ["config.json", "model.safetensors"]
    else:
        index = json.loads((tmp_path / "c" / writer.INDEX).read_text())
        assert list(index["weight_map"]) == sorted(tensors) and set(
            index["weight_map"].values()
        ) < set(files)
        assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
        assert limit > 1 or len(files) == len(tensors) + 2  # a limit below any tensor: a file each
    assert os.listdir(tmp_path) == ["c"]  # no temporary left


def test_files_are_plain_safetensors_in_any_order_and_mixed_precision(tmp_path):
    config = tiny(num_hidden_layers=3, hidden_size=25)  # odd: bf16 would misalign its neighbours
    tensors = {
        n: t.float() if "norm" in n else t.double() if n == Q0 else t
        for n, t in weights(config).items()
    }
    shuffled = random.Random(1).sample(list(tensors.items()), len(tensors))
    dtypes = {n: t.dtype for n, t in tensors.items() if t.dtype != torch.bfloat16}
    write_checkpoint(tmp_path / "c", config, iter(shuffled), max_shard_bytes=20000, dtypes=dtypes)
    assert_holds(tmp_path / "c", tensors)
    for file in (tmp_path / "c").glob("*.safetensors"):
        n = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + n])
        assert header.pop("__metadata__") == {"format": "pt"} and n % 8 == 0
        for name, t in load_file(file).items():
            assert torch.equal(t, tensors[name])
            assert (
                header[name]["data_offsets"][0] % t.itemsize == 0
            )  # aligned, whatever the neighbours


def test_shards_are_cut_where_hugging_face_cuts_them():
    from huggingface_hub import split_torch_state_dict_into_shards

    published = {
        "0.5B": (290, 1),
        "1.5B": (338, 1),
        "3B": (434, 2),
        "7B": (339, 4),
        "14B": (579, 8),
        "32B": (771, 17),
        "72B": (963, 37),
    }  # tensors, shards
    kib = {
        "3B": 34.7,
        "7B": 27.1,
        "14B": 46.4,
        "32B": 61.8,
        "72B": 77.2,
    }  # of the published index files
    for size, (tensors, shards) in published.items():
        config = make_checkpoint.official_config(size)
        plan = writer.plan_shards(config)
        where = {name: file for file, (_, _, places) in plan.items() for name in places}
        with torch.device("meta"):
            split = split_torch_state_dict_into_shards(
                {
                    n: torch.empty(s, dtype=torch.bfloat16)
                    for n, s in config.parameter_shapes().items()
                },
                max_shard_size=4 * 10**9,
            )
        assert where == split.tensor_to_filename and len(where) == tensors and len(plan) == shards
        total = sum(stop - len(header) for header, stop, _ in plan.values())
        assert total == config.weight_bytes() == split.metadata["total_size"]
        if size in kib:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            assert round((len(json.dumps(index, indent=2)) + 1) / 1024, 1) == kib[size]
    assert make_checkpoint.official_config("7B").weight_bytes() == 15_231_233_024


# ---- transformers reads ours, we read transformers'


@pytest.mark.parametrize("tied,limit", [(True, 4 * 10**9), (False, 9000)])
def test_transformers_loads_it_strictly(tmp_path, tied, limit):
    from transformers import AutoModelForCausalLM

    path = tmp_path / "c"
    tensors = write(
        path, tiny(tie_word_embeddings=tied, num_attention_heads=6), max_shard_bytes=limit
    )
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert {k: len(v) for k, v in info.items() if v} == {}
    assert type(model).__name__ == "Qwen2ForCausalLM"
    state = model.state_dict()
    for name, t in tensors.items():
        assert torch.equal(state[name], t), name


@pytest.mark.parametrize("tied,limit", [(True, "1GB"), (False, "8KB")])
def test_reads_what_transformers_saves(tmp_path, tied, limit):
    from transformers import AutoModelForCausalLM, Qwen2Model

    write(tmp_path / "ours", tiny(tie_word_embeddings=tied))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    expected = {n: t for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    assert_holds(tmp_path / "theirs", expected)
    base = Qwen2Model.from_pretrained(
        tmp_path / "ours", dtype=torch.bfloat16
    )  # saves names without `model.`
    base.save_pretrained(tmp_path / "base", max_shard_size=limit)
    c = Checkpoint(tmp_path / "base")
    assert torch.equal(c.read(Q0), expected[Q0])
    if tied:
        assert_holds(tmp_path / "base", expected)
    else:
        refusal(c.check, "lm_head.weight", "missing")


# ---- slices


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slices_equal_indexing(tmp_path_factory, data):
    config = tiny()
    path = Path(tmp_path_factory.getbasetemp()) / "slices"
    if not path.exists():
        write(path, config)
    tensors, c = weights(config), Checkpoint(path)
    name = data.draw(st.sampled_from(c.names))
    dim = data.draw(st.integers(0, len(c.shape(name)) - 1))
    start = data.draw(st.integers(0, c.shape(name)[dim]))
    stop = data.draw(st.integers(start, c.shape(name)[dim]))
    dtype = data.draw(st.sampled_from([None, torch.float64, torch.bfloat16]))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(reader, "PIECE_BYTES", data.draw(st.sampled_from([1, 100, 1000, 4 << 20])))
        got = c.read(name, Shard(dim, start, stop), dtype=dtype)
    assert torch.equal(
        got, tensors[name].narrow(dim, start, stop - start).to(dtype or torch.bfloat16)
    )
    assert (
        got.is_contiguous() and got.untyped_storage().nbytes() == got.nbytes
    )  # its own memory, no more


def test_bad_slices_and_names(tmp_path):
    write(tmp_path / "c")
    c = Checkpoint(tmp_path / "c")
    for shard in (Shard(0, 0, 33), Shard(2, 0, 1), Shard(1, 5, 4), Shard(0, -1, 4)):
        refusal(lambda s=shard: c.read(Q0, s), Q0, "with a slice", "model.safetensors")
    refusal(lambda: c.read("nonsense"), "nonsense", "no tensor")


MEMORY = """
import json, sys, torch
from minqwen.checkpoint import Checkpoint
from minqwen.parallel import Shard

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

path = sys.argv[1]
warm = torch.ones(1000).bfloat16().clone(); warm.copy_(warm.float())  # torch's own first-use memory
c = Checkpoint(path); c.check(); c.read("model.norm.weight")
for ranks in (4, 1):
    held = {}
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
    before = kib("VmRSS")
    for name in c.names:
        dim = 1 if "o_proj" in name or "down" in name else 0
        n = c.shape(name)[dim] // ranks
        held[name] = c.read(name, None if "norm" in name or ranks == 1 else Shard(dim, n, 2 * n))
    size = sum(t.nbytes for t in held.values())
    ratio = (kib("VmHWM") - before) * 1024 / size
    mapped = sum(path in line for line in open("/proc/self/maps"))
    c.check_finite()
    print(json.dumps({"held": size * ranks, "ratio": ratio, "mapped": mapped,
                      "scan": (kib("VmHWM") - before) * 1024 / size}))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """201 MB: the 1.5B's widths, with an embedding that is a third of everything."""
    path = tmp_path_factory.mktemp("big") / "c"
    make_checkpoint.main(
        ["--size", "1.5B", "--num-hidden-layers", "1", "--vocab-size", "35000", str(path)]
    )
    return path


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's /proc")
def test_a_rank_holds_its_slices_and_little_more(big):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(big)], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for got in map(json.loads, done.stdout.splitlines()):
        assert got["held"] > 195e6 and got["mapped"] == 0, got
        assert 0.9 < got["ratio"] <= 1.15 and got["scan"] <= 1.25, got


# ---- everything else is refused


def rewrite(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def raw_header(path: Path, change) -> None:
    """Edits the JSON text of a header in place."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + n].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


FILE = "model.safetensors"


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
        [Q0, "twice"],
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
    "endless layers": (config(num_hidden_layers=10**12), ["num_hidden_layers", "27 tensors"]),
    "quantised": (
        config(quantization_config={"quant_method": "awq"}),
        ["quantization_config", "'awq'"],
    ),
    "stray shard": (text("model-00002-of-00002.safetensors", "x"), ["-of-00002", "is not part of"]),
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
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("blocked"))
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("fault", SINGLE_FAULTS)
def test_single_file_faults(tmp_path, alarm, fault):
    path = tmp_path / "c"
    write(path)
    change, words = SINGLE_FAULTS[fault]
    change(path)
    refusal(lambda: Checkpoint(path).check(), str(path), *words)


ONE, TWO, THREE = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))


def edit_map(change):
    def edit(p):
        index = json.loads((p / reader.INDEX).read_text())
        change(index["weight_map"])
        (p / reader.INDEX).write_text(json.dumps(index))

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
    "wrong shard": (point(THREE), [Q0, "hold", "places it"]),
    "not in the index": (edit_map(lambda m: m.pop(Q0)), [Q0, ": holds tensor", "places it"]),
    "not in the shard": (
        edit_map(lambda m: m.update({"model.x": ONE})),
        ["'model.x'", "does not hold"],
    ),
    "bad JSON": (text(reader.INDEX, "{oops"), [reader.INDEX, "not valid JSON"]),
    "deep JSON": (text(reader.INDEX, "[" * 200000), [reader.INDEX, "not valid JSON"]),
    "bad UTF-8": (
        lambda p: (p / reader.INDEX).write_bytes(b'{"\xff":1}'),
        [reader.INDEX, "not valid JSON"],
    ),
    "a list": (text(reader.INDEX, "[]"), ["'weight_map' is missing"]),
    "no map": (text(reader.INDEX, "{}"), ["'weight_map' is missing"]),
    "empty map": (text(reader.INDEX, '{"weight_map":{}}'), ["'weight_map' is missing or empty"]),
    "twice": (
        text(reader.INDEX, f'{{"weight_map":{{"{Q0}":"{ONE}","{Q0}":"{TWO}"}}}}'),
        [Q0, "twice"],
    ),
    "empty index": (text(reader.INDEX, ""), [reader.INDEX, "0 bytes"]),
    "no index": (lambda p: (p / reader.INDEX).unlink(), [f"'{ONE}' alone"]),
    "missing shard": (lambda p: (p / TWO).unlink(), [TWO, "cannot be read"]),
    "truncated shard": (cut(4000, TWO), [TWO, *NOT_WHOLE]),
    "zero-byte shard": (cut(0, THREE), [THREE, "0 bytes"]),
    "swapped shards": (swap, ["hold", "places it"]),
    "stray shard": (text("model-00004-of-00004.safetensors", "x"), ["-of-00004", "is not part of"]),
    "both layouts": (text(FILE, "x"), ["/model.safetensors", "is not part of"]),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_sharded_faults(tmp_path, alarm, fault):
    path = tmp_path / "c"
    write(path, max_shard_bytes=12000)
    assert (path / THREE).exists()
    change, words = INDEX_FAULTS[fault]
    change(path)
    refusal(lambda: Checkpoint(path).check(), str(path), *words)


def test_damaged_headers_and_indexes_never_escape_as_another_error(tmp_path):
    path, rng = tmp_path / "c", random.Random(7)
    tensors = write(path, tiny(num_hidden_layers=1), max_shard_bytes=9000)
    files = [path / reader.INDEX, *sorted(path.glob("*.safetensors"))[:2]]
    refused = 0
    for i in range(300):
        file = rng.choice(files)
        good = file.read_bytes()
        bad = bytearray(good)
        for _ in range(rng.choice([1, 1, 3])):
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


def test_a_pickle_beside_safetensors_is_never_opened(tmp_path):
    tensors = write(tmp_path / "c")
    os.mkfifo(tmp_path / "c" / "pytorch_model.bin")  # to open it would block
    assert_holds(tmp_path / "c", tensors)


def test_rotary_buffers_and_a_tied_head_copy_are_tolerated(tmp_path):
    path = tmp_path / "c"
    tensors = write(path, tiny(tie_word_embeddings=True))
    embedding = tensors["model.embed_tokens.weight"]
    rewrite(
        path,
        lambda t: t.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.int64),
                "lm_head.weight": embedding.clone(),
            }
        ),
    )
    assert_holds(path, tensors)
    for change in (
        lambda w: w.index_put_((torch.tensor(60), torch.tensor(23)), torch.tensor(1.0).bfloat16()),
        lambda w: w.float(),
        lambda w: w[:-1].clone(),
        lambda w: torch.where(w == w[3, 3], -w, w),
    ):
        rewrite(path, lambda t, f=change: t.update({"lm_head.weight": f(embedding.clone())}))
        refusal(Checkpoint(path).check, FILE, "lm_head.weight", "differs", "tie_word_embeddings")


def test_a_llama_config_needs_a_zero_output_bias(tmp_path):
    config = tiny(model_type="llama")
    bias = "model.layers.1.self_attn.o_proj.bias"
    zero = {
        n: torch.zeros_like(t) if n.endswith("o_proj.bias") else t
        for n, t in weights(config).items()
    }
    write_checkpoint(tmp_path / "zero", config, zero.items())
    Checkpoint(tmp_path / "zero").check()
    rewrite(
        tmp_path / "zero",
        lambda t: t.update({bias: t[bias].index_fill(0, torch.tensor([5]), 1e-3)}),
    )
    refusal(Checkpoint(tmp_path / "zero").check, bias, "not zero")


def test_a_hugging_face_cache_of_links_reads(tmp_path):
    tensors = write(tmp_path / "blobs", max_shard_bytes=20000)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for i, p in enumerate(sorted((tmp_path / "blobs").iterdir())):
        p.rename(tmp_path / "blobs" / str(i))
        (snapshot / p.name).symlink_to(f"../../blobs/{i}")
    assert_holds(snapshot, tensors)


def test_not_finite(tmp_path, monkeypatch):
    path = tmp_path / "c"
    write(path)
    Checkpoint(path).check_finite()
    monkeypatch.setattr(reader, "PIECE_BYTES", 500)
    up = "model.layers.1.mlp.up_proj.weight"
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        bad = torch.ones(40, 24, dtype=dtype)
        bad[3, 5] = bad[39, 23] = float("nan")
        bad[20, 0] = float("-inf")
        rewrite(path, lambda t: t.update({up: bad}))
        Checkpoint(path).check()
        refusal(Checkpoint(path).check_finite, FILE, up, "2 NaN", "1 infinite", "among 960")


def test_a_file_that_changes_while_open_is_refused(tmp_path):
    write(tmp_path / "c")
    c = Checkpoint(tmp_path / "c")
    write(tmp_path / "c", seed=1)
    refusal(lambda: c.read(Q0), "changed since", "model.safetensors")
    shutil.rmtree(tmp_path / "c")
    refusal(lambda: c.read(Q0), "model.safetensors", "cannot be read")


# ---- the writer refuses, and survives


def test_the_writer_takes_exactly_the_configs_tensors(tmp_path):
    path, config, good = tmp_path / "c", tiny(), weights(tiny())
    faults = {
        "was not given": {n: t for n, t in good.items() if n != Q0},
        "not one of the 27": good | {"model.x": torch.ones(1)},
        "(31, 24)": good | {Q0: good[Q0][:-1]},
        "torch.float32": good | {Q0: good[Q0].float()},
    }
    for word, tensors in faults.items():
        refusal(lambda t=tensors: write_checkpoint(path, config, t.items()), word)
    refusal(lambda: write_checkpoint(path, config, [*good.items(), (Q0, good[Q0])]), Q0, "twice")
    refusal(
        lambda: write_checkpoint(path, config, good.items(), max_shard_bytes=0), "max_shard_bytes"
    )
    refusal(
        lambda: write_checkpoint(path, config, good.items(), dtypes={Q0: torch.int8}), Q0, "int8"
    )
    assert os.listdir(tmp_path) == []
    for t in (
        good[Q0].T.contiguous().T,
        good[Q0].clone().requires_grad_(),
    ):  # strides, gradients: no matter
        write_checkpoint(path, config, (good | {Q0: t}).items())
        assert_holds(path, good)


def test_companions_and_extra_files(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    keep = (
        "tokenizer.json",
        "generation_config.json",
        "merges.txt",
        "chat_template.jinja",
        "tokenizer.model",
        "LICENSE",
    )
    for name in (
        *keep,
        "config.json",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "x.safetensors",
        ".gitattributes",
        "t.gguf",
    ):
        (source / name).write_text(name)
    (source / "sub").mkdir()
    write(tmp_path / "c", sources=source, extra_files={"NOTE.md": "ü", "LICENSE": b"mine"})
    got = {p.name for p in (tmp_path / "c").iterdir()}
    assert got == {*keep, "config.json", "model.safetensors", "NOTE.md"}
    assert (tmp_path / "c" / "LICENSE").read_text() == "mine"
    assert (tmp_path / "c" / "NOTE.md").read_bytes() == "ü".encode()
    write(tmp_path / "c", seed=1, sources=tmp_path / "c")  # in place: the tokenizer stays
    assert {p.name for p in (tmp_path / "c").iterdir()} == got
    for name in ("../x", "a/b", "config.json", "model.safetensors", "", ".."):
        refusal(lambda n=name: write(tmp_path / "d", extra_files={n: "x"}), "plain file name")
    refusal(lambda: write(tmp_path / "d", sources=tmp_path / "gone"), "gone", "not a directory")
    os.mkfifo(source / "vocab.json")
    refusal(lambda: write(tmp_path / "d", sources=source), "vocab.json", "regular")


def test_only_a_checkpoint_is_replaced(tmp_path):
    d = tmp_path / "d"
    d.mkdir()
    old = write(d)  # empty: taken
    (d / "notes").mkdir()
    refusal(lambda: write(d, seed=1), "'notes'", "not replaced")
    (d / "notes").rmdir()
    (d / "optimizer.pt").write_text("x")
    refusal(lambda: write(d, seed=1), "'optimizer.pt'", "not replaced")
    (d / "optimizer.pt").unlink()
    assert_holds(d, old)
    assert_holds(d, write(d, seed=1, max_shard_bytes=20000))
    new = write(d, seed=2)
    assert_holds(d, new)
    assert sorted(os.listdir(d)) == ["config.json", "model.safetensors"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    refusal(lambda: write(other), "'thesis.txt'", "not a checkpoint")
    refusal(lambda: write(other / "thesis.txt"), "not a directory")
    refusal(lambda: write(Path("/")), "not a directory that can be replaced")
    refusal(lambda: write(other / "thesis.txt" / "c"), "could not be written", "thesis.txt")
    (tmp_path / "link").symlink_to(d)
    assert_holds(
        d, write(tmp_path / "link", seed=3)
    )  # what a link points to is replaced, not the link
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == [
        "d",
        "link",
        "other",
    ]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failing_source_leaves_the_old_one_and_no_rubbish(tmp_path, failure):
    old = write(tmp_path / "c")

    def broken():
        yield from list(weights(tiny(), 1).items())[:9]
        raise failure("source")

    with pytest.raises(failure):
        write_checkpoint(tmp_path / "c", tiny(), broken())
    assert_holds(tmp_path / "c", old)
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("exchange", [True, False])
def test_swap_with_and_without_the_exchange_call(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(writer, "_exchange", lambda a, b: False)
    write(tmp_path / "c")
    assert_holds(tmp_path / "c", write(tmp_path / "c", seed=1))
    assert os.listdir(tmp_path) == ["c"]


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    import resource

    old = write(tmp_path / "c")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # a real write that really fails
    try:
        refusal(
            lambda: write(tmp_path / "c", seed=1),
            f"{tmp_path}/c: could not be written",
            "as it was",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000)
    )
    refusal(lambda: write(tmp_path / "c", seed=1), "5000 bytes free")
    monkeypatch.undo()
    for call in ("fsync", "truncate"):

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, call, full)
        refusal(lambda: write(tmp_path / "c", seed=1), "No space left on device", "as it was")
        monkeypatch.undo()
    assert_holds(tmp_path / "c", old)
    assert os.listdir(tmp_path) == ["c"]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import *
torch.set_num_threads(1)
os.fsync = lambda fd: None  # a kill, unlike a power cut, loses nothing that was written
path = Path(sys.argv[1]) / "c"
versions = [weights(tiny(), 0), weights(tiny(), 1)]
def put(v): write_checkpoint(path, tiny(), versions[v].items(), max_shard_bytes=20000)

def run(kill_at):
    # A child that writes version 1 over version 0 and is killed at its kill_at-th call of any function.
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    count = 0
    def event(*_):
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(event)
    try:
        put(1)
        sys.setprofile(None)
        Path(sys.argv[1], "calls").write_text(str(count))
    finally:
        os._exit(0)

put(0)
assert run(0) == 0
total = int(Path(sys.argv[1], "calls").read_text())
points = sorted({*range(1, total, total // 30), *range(total - 150, total, 5)})
survived = [0, 0]
for k in points:
    put(0)
    assert os.WTERMSIG(run(k)) == signal.SIGKILL
    same = [all(torch.equal(Checkpoint(path).read(n), t) for n, t in v.items()) for v in versions]
    Checkpoint(path).check()
    assert sum(same) == 1, k
    survived[same[1]] += 1
put(0)
left = [p for p in os.listdir(sys.argv[1]) if p not in ("c", "calls")]
print(len(points), *survived, left)
"""


def test_killed_at_any_call_it_leaves_the_old_or_the_new(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(ROOT / "tests")],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    points, old, new, left = done.stdout.split(maxsplit=3)
    assert int(old) + int(new) == int(points) > 60 and int(old) > 30 and int(new) > 1
    assert left.strip() == "[]"  # the next write removed what the killed ones left


def test_a_killed_writer_is_cleaned_up_after_and_a_live_one_is_not(tmp_path):
    dead, live, other = (tmp_path / n for n in (".c.tmp-1", ".c.tmp-2", ".cc.tmp-3"))
    for d in (dead, live, other):
        d.mkdir()
        (d / "model.safetensors").write_text("half")
    fd = os.open(live, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    write(tmp_path / "c")
    os.close(fd)
    assert sorted(os.listdir(tmp_path)) == [".c.tmp-2", ".cc.tmp-3", "c"]


# ---- the tool


def tool(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_checkpoint.py"), *args],
        env=ENV,
        capture_output=True,
        text=True,
    )


SMALL = [
    "--hidden-size",
    "24",
    "--head-dim",
    "8",
    "--intermediate-size",
    "40",
    "--vocab-size",
    "61",
    "--num-hidden-layers",
    "2",
]


def test_tool_writes_any_shape(tmp_path, capsys):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    main = make_checkpoint.main
    main(["--size", "7B", *SMALL, "--tokenizer", str(tmp_path / "tok"), str(tmp_path / "a")])
    said = json.loads(capsys.readouterr().out)
    a = Checkpoint(tmp_path / "a")
    a.check()
    a.check_finite()
    assert (a.config.num_attention_heads, a.config.head_dim, a.config.tie_word_embeddings) == (
        28,
        8,
        False,
    )
    assert (
        said["parameters"] == a.config.num_parameters()
        and (tmp_path / "a" / "tokenizer.json").exists()
    )
    w = a.read(Q0, dtype=torch.float32)
    assert abs(w.mean()) < 2e-3 and 0.018 < w.std() < 0.022 and len(w.unique(dim=0)) == len(w)
    assert (
        a.read("model.norm.weight").eq(1).all() and 0 < a.read(Q0[:-6] + "bias").abs().max() < 0.1
    )
    assert not torch.equal(a.read(Q0), a.read(Q0.replace("s.0.", "s.1.")))

    main(
        [
            "--config",
            str(tmp_path / "a" / "config.json"),
            "--dtype",
            "float32",
            "--max-shard-bytes",
            "9000",
            "--tie-word-embeddings",
            str(tmp_path / "b"),
        ]
    )
    b = Checkpoint(tmp_path / "b")
    b.check()
    assert b.config.dtype == "float32" and b.config.tie_word_embeddings
    assert (tmp_path / "b" / reader.INDEX).exists()
    assert torch.equal(
        b.read(Q0, dtype=torch.bfloat16), a.read(Q0)
    )  # the same numbers in another precision
    main(["--size", "7B", *SMALL, "--seed", "1", "--overwrite", str(tmp_path / "b")])
    assert not torch.equal(Checkpoint(tmp_path / "b").read(Q0), a.read(Q0))
    main(["--config", str(tmp_path / "a"), "--seed", "1", str(tmp_path / "c")])
    assert_holds(tmp_path / "c", {n: Checkpoint(tmp_path / "b").read(n) for n in a.names})
    refusal(lambda: main(["--size", "7B", *SMALL, str(tmp_path / "a")]), "exists", "--overwrite")
    refusal(
        lambda: main(["--size", "7B", "--num-attention-heads", "27", str(tmp_path / "d")]),
        "num_attention_heads",
    )


def test_tool_rows_stay_distinct_when_the_block_repeats(monkeypatch):
    assert all(make_checkpoint.BLOCK % k for k in range(2, 4097))  # prime: 4096 is its root
    monkeypatch.setattr(make_checkpoint, "BLOCK", 101)
    embedding = dict(make_checkpoint.random_tensors(tiny(dtype="float32"), 0))[reader.EMBEDDING]
    assert embedding.numel() > 14 * 101 and len(embedding.unique(dim=0)) == len(embedding) == 61


def test_tool_command_line(tmp_path, capsys):
    ok = tool("--size", "0.5B", *SMALL, str(tmp_path / "c"))
    assert ok.returncode == 0 and json.loads(ok.stdout)["files"] == 1 and "B/s" in ok.stderr, (
        ok.stderr
    )
    done = tool("--size", "7B", "--num-key-value-heads", "3", str(tmp_path / "d"))
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, (
        done.stderr
    )
    assert done.stderr.startswith("error: ") and "num_key_value_heads" in done.stderr
    with pytest.raises(SystemExit) as e:
        make_checkpoint.main(["--help"])
    told = capsys.readouterr().out
    assert (
        e.value.code == 0
        and "--num-hidden-layers" in told
        and "72B" in told
        and "four shards" in told
    )
    for args in (
        ["--size", "9B"],
        ["--size", "0.5B", "--seed", "-1"],
        [],
        ["--size", "7B", "--config", "x"],
    ):
        with pytest.raises(SystemExit) as e:
            make_checkpoint.main([*args, str(tmp_path / "d")])
        assert e.value.code == 2
    refusal(
        lambda: make_checkpoint.main(["--config", str(tmp_path / "gone"), str(tmp_path / "d")]),
        "gone",
    )
