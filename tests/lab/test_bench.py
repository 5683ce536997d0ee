"""The bench's library: the same requests for all, honest figures, and engines that agree."""

from __future__ import annotations

import ctypes
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.checkpoints import tiny, write
from support.naive import greedy

from minqwen import Qwen2
from minqwen.errors import MinqwenError
from minqwen.lab.bench import roofs
from minqwen.lab.bench.contestants import Contestant, read_contestant
from minqwen.lab.bench.gguf_file import gguf_name, write_gguf
from minqwen.lab.bench.jobs import Ask, Job, decode_job
from minqwen.lab.bench.llama_cpp import LlamaCpp, Piece
from minqwen.lab.bench.ours import Bare, load
from minqwen.lab.bench.page import Report
from minqwen.lab.bench.peers import load_transformers
from minqwen.lab.bench.roofs import Roofs, least_seconds, measure_roofs, products, reads
from minqwen.lab.bench.setup import Setup
from minqwen.lab.bench.timing import Mark, Run, Spread
from minqwen.lab.bench.turns import Result
from minqwen.lab.planner import Planner
from minqwen.lab.shapes import official_config, random_model
from minqwen.parallel import Mesh

# Two requests: the second starts in the second step; then two steps in which both get a token.
MARKS = [
    Mark(1.0, 2.0, 1, 1),
    Mark(3.0, 5.0, 3, 2),
    Mark(4.0, 7.0, 5, 2),
    Mark(6.0, 8.0, 7, 2),
    Mark(9.0, 9.0, 8, 2),
]


def setup(path, contestant: Contestant, **changes) -> Setup:
    given = dict(model=str(path), size=None, layers=None, device="cpu", threads=1)
    return Setup(
        contestant=contestant, **(given | dict(longest=24, batch=4, step_tokens=16) | changes)
    )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "model"
    write(path, tiny(dtype="float32"))
    return path


@pytest.fixture(scope="module")
def expected(model_path):
    """Greedy tokens without a cache, of ragged requests and of two that are alike."""
    model = Qwen2.from_pretrained(model_path, dtype="float64")
    asks = Job("mixed", 5, 16, 8).asks(61, 0) + Job("decode", 2, 6, 5).asks(61, 1)
    return [(ask, greedy(model, ask.prompt, ask.new)) for ask in asks]


def test_every_engine_makes_the_tokens_of_a_loop_without_a_cache(model_path, expected):
    asks, tokens = [ask for ask, _ in expected], [new for _, new in expected]
    ours = load(setup(model_path, Contestant("minqwen", "float32", "native")), Mesh())
    theirs = load_transformers(setup(model_path, Contestant("transformers", "float32")))
    for engine in (ours, theirs):
        run = engine.run(asks)
        assert run.tokens == tokens
        assert run.marks[-1].tokens == sum(map(len, tokens)) and run.marks[-1].started == len(asks)
        counts = [mark.tokens for mark in run.marks]
        assert counts == sorted(counts) and all(mark.wall > 0 for mark in run.marks)
    bare = load(setup(model_path, Contestant("minqwen", "float32", "native", bare=True)), Mesh())
    assert isinstance(bare, Bare)
    assert bare.run(asks[-2:]).tokens == tokens[-2:]
    with pytest.raises(MinqwenError, match="one length"):
        bare.run(asks)


class FakeLlama:
    """llama.cpp's functions over our model: logits of everything that a sequence was given."""

    def __init__(self, model):
        self.model, self.texts = model, {}

    def llama_get_memory(self, context):
        return context

    def llama_memory_clear(self, memory, data):
        self.texts.clear()

    def llama_decode(self, context, batch):
        self.logits = {}
        for i in range(batch.n_tokens):
            text = self.texts.setdefault(batch.seq_id[i][0], [])
            assert batch.pos[i] == len(text)
            text.append(batch.token[i])
            if batch.logits[i]:
                self.logits[i] = self.model(torch.tensor([text]))[0, -1].numpy()
        return 0

    def llama_get_logits_ith(self, context, place):
        return self.logits[place].ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def test_an_engine_that_does_not_capture_is_not_measured_as_one_that_does(model_path):
    engine = load(setup(model_path, read_contestant("fast/captured", "bfloat16")), Mesh())
    with (
        pytest.warns(UserWarning, match="not compiled or captured"),
        pytest.raises(MinqwenError, match="steps are not captured: that is for GPUs"),
    ):
        engine.run([Ask([1, 2, 3], 2)])


def test_the_function_that_llama_cpp_writes_its_log_with_stays_in_memory(model_path):
    """The library holds it by its address only, and calls it whenever it has something to say."""
    seen = []

    def options():
        return SimpleNamespace(n_ctx=0)

    library = SimpleNamespace(
        llama_log_callback=ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p),
        llama_log_set=lambda function, data: seen.append(weakref.ref(function)),
        llama_backend_init=lambda: None,
        llama_model_default_params=options,
        llama_model_load_from_file=lambda file, options: 1,
        llama_context_default_params=options,
        llama_init_from_model=lambda model, options: 1,
        llama_batch_init=lambda tokens, width, sequences: object(),
        GGML_TYPE_F16=1,
    )
    engine = LlamaCpp(library, Path("any.gguf"), setup(model_path, Contestant("llama.cpp", "bf16")))
    assert seen[0]() is not None and engine.context == 1


def test_the_loop_around_llama_cpp_asks_for_the_right_tokens(model_path, expected):
    engine = LlamaCpp.__new__(LlamaCpp)
    engine.lib = FakeLlama(Qwen2.from_pretrained(model_path, dtype="float32"))
    engine.vocab_size, engine.step_tokens, engine.context = 61, 16, object()
    names = ("token", "pos", "n_seq_id", "logits")
    engine.batch = SimpleNamespace(
        **{name: [0] * 16 for name in names}, seq_id=[[0] for _ in range(16)], n_tokens=0
    )
    with torch.no_grad():
        run = engine.run([ask for ask, _ in expected])
    assert run.tokens == [new for _, new in expected]
    assert run.marks[0].started < run.marks[-1].started == len(expected)


def test_prompts_for_llama_cpp_are_cut_where_a_step_is_full():
    engine = LlamaCpp.__new__(LlamaCpp)
    engine.step_tokens = 4
    steps = engine._prompt_steps([Ask([1, 2, 3], 1), Ask([4, 5, 6], 1)])
    assert steps == [
        [Piece(0, [1, 2, 3], 0, True), Piece(1, [4], 0, False)],
        [Piece(1, [5, 6], 1, True)],
    ]


def test_the_gguf_file_holds_every_parameter_under_llama_cpps_names(model_path, tmp_path):
    config = official_config("7B")
    names = [gguf_name(name) for name in config.parameter_shapes()]
    assert len(set(names)) == len(names)
    assert {"token_embd.weight", "output.weight", "blk.27.attn_k.bias"} <= set(names)
    gguf = pytest.importorskip("gguf")
    write_gguf(str(model_path), tmp_path / "model.gguf", "f32", gguf)
    found = {each.name: each.data for each in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, weight in Qwen2.from_pretrained(model_path).state_dict().items():
        assert torch.equal(torch.tensor(found[gguf_name(name)]), weight)


def test_figures_of_a_run_are_those_of_its_marks():
    run, job = Run(MARKS), Job("decode", 2, 8, 4)
    assert run.seconds(Job("prefill", 2, 8, 4)) == 3.0
    assert run.seconds(job) == 1.5  # of 1 and 2 seconds: steps in which both got a token
    assert run.seconds(job, "processor") == 1.5
    assert run.seconds(Job("mixed", 2, 8, 4)) == 9.0
    assert (run.first_token(0.5), run.first_token(0.95)) == (1.0, 3.0)
    whole = Run([MARKS[0], MARKS[-1]])  # of several replicas no step is seen
    assert whole.seconds(Job("decode", 2, 8, 9)) == 0.0 and whole.seconds(job, "processor") == 0.0


def test_a_spread_is_the_median_and_the_middle_half():
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0)
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 100.0]) == Spread(3.0, 2.0, 4.0)


def test_jobs_give_everybody_the_same_requests():
    job = Job("mixed", 20, 128, 64)
    assert job.asks(100, 3) == job.asks(100, 3) != job.asks(100, 4)
    assert [(len(ask.prompt), ask.new) for ask in job.asks(100, 4)] == job.lengths()
    assert all(16 <= prompt <= 128 and 8 <= new <= 64 for prompt, new in job.lengths())
    # 256 requests of 1,024 tokens take 128 steps of 2,048: the first ones must not end before.
    assert decode_job(256, 1024, 16, 2048).new == 1 + 16 + 127
    assert decode_job(1, 128, 16, 2048).new == 17


@pytest.mark.parametrize(
    "text, name",
    [
        ("fast", "fast bfloat16"),
        ("exact/float32", "exact float32"),
        ("native/float32/bare", "native float32, bare"),
        ("fast/captured", "fast bfloat16, captured"),
        ("transformers", "transformers bfloat16"),
        ("llama.cpp", "llama.cpp bf16"),
        ("llama.cpp/q8_0", "llama.cpp q8_0"),
    ],
)
def test_contestants_are_read_as_they_are_written(text, name):
    contestant = read_contestant(text, "bfloat16")
    assert contestant.name == name
    assert (
        Setup.from_json(json.loads(json.dumps(setup("x", contestant).as_json()))).contestant
        == contestant
    )


@pytest.mark.parametrize(
    "text, said",
    [
        ("fats", "did you mean 'fast'"),
        ("vllm/q8_0", "at most one of float32"),
        ("llama.cpp/float32", "at most one of f32"),
        ("fast/float32/float16", "at most one of"),
        ("fast/bare/captured", "not bare too"),
    ],
)
def test_an_unknown_contestant_is_refused(text, said):
    with pytest.raises(MinqwenError, match=said):
        read_contestant(text, "bfloat16")


ROOFS = Roofs(
    reads={"sum": 1e9, "product": 2e9},
    products={"float32": 1e11, "bfloat16": 3e11, "float64": 2e10},
)


def test_the_least_time_is_that_of_reading_all_or_of_computing_all():
    config = official_config("0.5B")
    fast, native = (read_contestant(text, "bfloat16") for text in ("fast", "native/float32"))
    cache = 128 * config.kv_bytes_per_token("bfloat16")
    parameters = config.num_parameters()
    decode, prefill = Job("decode", 1, 128, 9), Job("prefill", 1, 512, 1)
    assert least_seconds(ROOFS, fast, config, decode) == (2 * parameters + cache) / 2e9
    assert least_seconds(ROOFS, native, config, decode) == (4 * parameters + 2 * cache) / 2e9
    int8 = least_seconds(ROOFS, read_contestant("int8", "bfloat16"), config, decode)
    assert int8 == (parameters + cache) / 2e9
    flops = Planner(config).estimate(512).prefill_flops
    assert least_seconds(ROOFS, fast, config, prefill) == flops / 3e11
    assert least_seconds(ROOFS, native, config, prefill) == flops / 1e11
    exact = least_seconds(ROOFS, read_contestant("exact", "bfloat16"), config, prefill)
    assert exact == flops / 2e10
    assert least_seconds(ROOFS, fast, config, Job("mixed", 3, 8, 8)) is None


def test_roofs_are_of_several_operations(monkeypatch):
    monkeypatch.setitem(roofs.READ_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(roofs.SIDE, "cpu", 64)
    found = measure_roofs("cpu", 0.1)
    assert {"product with float32", "sum", "copy"} <= set(found.reads)
    assert found.bandwidth == max(found.reads.values())
    assert {"float32", "float64", "bfloat16"} <= set(found.products)
    for _, work, act in (*reads("cpu"), *products("cpu")):
        assert work > 0 and act is not None


def report(*results: Result) -> Report:
    jobs = [Job("decode", 2, 8, 4)]
    return Report(official_config("0.5B"), jobs, list(results), ROOFS, {"torch": "2.13.0"})


def result(text: str, factor: float, tokens: list[list[int]]) -> Result:
    job = Job("decode", 2, 8, 4)
    runs = [
        Run([m._replace(wall=m.wall * f, processor=m.processor * f) for m in MARKS], tokens)
        for f in (factor, 2 * factor, 3 * factor)
    ]
    return Result(read_contestant(text, "bfloat16"), {job.name: runs}, {job.name: 5 * 10**9})


def test_the_page_compares_everybody_with_the_first_that_ran(tmp_path):
    left_out = Result(read_contestant("vllm", "bfloat16"), error="not installed here", missing=True)
    page = report(
        left_out,
        result("native", 1.0, [[1, 2, 3, 4], [5, 6, 7, 8]]),
        result("fast", 0.5, [[1, 2, 9, 4], [5, 6, 7, 8]]),
    )
    native, fast = page.rows
    assert (native.wall.median, fast.wall.median) == (3.0, 1.5)
    assert (native.ratio, fast.ratio, fast.processor_ratio) == (1.0, 2.0, 2.0)
    assert (native.rate, fast.rate) == (2 / 3.0, 2 / 1.5)
    assert fast.same == (6, 8) and native.same == (8, 8)
    text = page.text()
    assert "left out: vllm bfloat16: not installed here" in text and "6 of 8" in text
    told = json.loads(json.dumps(page.as_json()))
    assert [row["contestant"] for row in told["rows"]] == ["native bfloat16", "fast bfloat16"]
    assert told["about"] == {"torch": "2.13.0"} and told["roofs"]["reads"]["product"] == 2e9


def test_a_random_model_is_the_same_on_every_rank_and_every_time():
    config = tiny()
    one, other = (random_model(config, dtype=torch.float32) for _ in range(2))
    for a, b in zip(one.parameters(), other.parameters()):
        assert torch.equal(a, b)
    assert one.model.norm.weight.eq(1).all() and one.lm_head.weight.std() < 0.05
