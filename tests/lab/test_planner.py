"""The planner: against arithmetic by hand, the allocator, resident memory, and the page that shows its figures."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from support.paths import ROOT
from torch.profiler import ProfilerActivity, profile

from minqwen import Batch, ModelConfig, Qwen2, cli
from minqwen.errors import ConfigError, ParallelError
from minqwen.lab.planner import CAPACITIES, CARDS, QUANTIZATIONS, Planner, rank_weights
from minqwen.model import memory
from minqwen.parallel import valid_degrees

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
import long_context  # noqa: E402
import plan as tool  # noqa: E402
from make_checkpoint import SIZES, official_config  # noqa: E402

SEVEN = official_config("7B")
PAGE = ROOT / "docs" / "memory.md"
PUBLISHED = json.loads((ROOT / "tests/data/configs.json").read_text())["models"]


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_weights_of_the_7b_on_four_ranks_by_hand():
    attention = 7 * 128 * 3584 + 896  # q: 28 / 4 heads and their bias
    attention += 2 * (128 * 3584 + 128) + 3584 * 896  # k and v: one head each; o
    mlp = 3 * (18944 // 4) * 3584
    elements = 28 * (attention + mlp + 2 * 3584) + 3584 + 2 * (152064 // 4) * 3584
    assert 2 * elements == 3_808_114_688 == Planner(SEVEN, 4).weights
    assert Planner(SEVEN).weights == 2 * 7_615_616_512 == 15_231_233_024
    # the ranks hold everything once, but the norms four times: 57 of 3,584 numbers
    assert (
        sum(sum(rank.values()) for rank in rank_weights(SEVEN, 4, "bfloat16"))
        == 15_231_233_024 + 3 * 2 * 57 * 3584
    )


@pytest.mark.parametrize("size", SIZES)
def test_official_sizes(size):
    model, planner = PUBLISHED[f"Qwen/Qwen2.5-{size}-Instruct"], Planner(official_config(size))
    assert official_config(size).num_parameters() == model["parameters"]
    assert planner.weights == model["weight_bytes_bf16"]
    assert planner.kv_per_token == model["kv_bytes_per_token_bf16"]
    assert Planner(official_config(size), dtype="float32").weights == model["weight_bytes_fp32"]
    for degree in valid_degrees(official_config(size), 8):
        total = sum(
            sum(rank.values()) for rank in rank_weights(official_config(size), degree, "bfloat16")
        )
        assert model["weight_bytes_bf16"] <= total < 1.06 * model["weight_bytes_bf16"]


def test_cache_in_pages_and_replicated_heads():
    assert Planner(SEVEN).plan(17).kv_cache == 2 * 16 * 57_344  # two pages of 16 tokens
    assert Planner(SEVEN, 4, block_size=128).plan(129, 3).kv_cache == 3 * 256 * 57_344 // 4
    assert 57_344 == 2 * 28 * 4 * 128 * 2  # keys and values, layers, heads, head_dim, bytes
    wide = SEVEN.replace(num_attention_heads=32)
    assert (
        Planner(wide, 8).kv_per_token == 57_344 // 4
    )  # 4 heads on 8 ranks: each on two of them, not an eighth
    held = rank_weights(wide, 8, "bfloat16")
    assert held[0]["model.layers.3.self_attn.k_proj.weight"] == 128 * 3584 * 2


def test_the_vocabularys_last_piece():
    """97 rows on 4 ranks: pieces of 25, 25, 25 and 22; the fullest rank counts."""
    config = ModelConfig(
        vocab_size=97,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    held = [rank["model.embed_tokens.weight"] // 16 for rank in rank_weights(config, 4, "bfloat16")]
    assert held == [25, 25, 25, 22]


def test_packed_weights_by_hand():
    config = ModelConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        dtype="float16",
    )
    gate, down = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"

    def held(quantization: str, size: int = 1) -> dict[str, int]:
        return rank_weights(config, size, "float16", quantization)[-1]

    # gate: 256 inputs, 512 outputs: nibbles, 2 groups of zeros (a nibble each output) and of 16-bit scales
    assert held("awq")[gate] == 256 * 512 // 2 + 2 * 512 // 2 + 2 * 512 * 2
    assert held("gptq")[gate] == held("awq")[gate] + 256 * 4  # g_idx: an int32 for each input
    assert held("gptq-int8")[gate] == 256 * 512 + 2 * 512 + 2 * 512 * 2 + 256 * 4
    assert held("int8")[gate] == 256 * 512 + 512 * 2
    # down is split by its inputs: a rank of eight has 64 of the 512, half a group, and that group's zeros and scales
    config = config.replace(num_attention_heads=8, num_key_value_heads=8)
    assert held("awq", 8)[down] == 64 * 256 // 2 + 1 * 256 // 2 + 1 * 256 * 2
    rest = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight",
    ]
    for name in rest:
        assert {held(kind)[name] for kind in QUANTIZATIONS} == {
            2 * math.prod(config.parameter_shapes()[name])
        }


def test_packed_attention_has_the_writers_shapes():
    """The same layouts, as head extension writes them."""
    from minqwen.lab.planner import PACKINGS

    for kind, packing in PACKINGS.items():
        held = rank_weights(SEVEN, 1, "float16", kind)[0]
        for projection in "qkvo":
            name = f"model.layers.5.self_attn.{projection}_proj."
            parts = ["qweight", "qzeros", *(["g_idx"] if packing.method == "gptq" else [])]
            words = sum(4 * math.prod(packing.shape(name + part, SEVEN)) for part in parts)
            assert held[name + "weight"] == words + 2 * math.prod(
                packing.shape(name + "scales", SEVEN)
            )


def test_a_quantised_config_is_counted_as_it_says():
    spec = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "version": "gemm",
        "zero_point": True,
    }
    config = SEVEN.replace(quantization_config=spec, dtype="float16")
    assert Planner(config).weights == Planner(SEVEN, dtype="float16", quantization="awq").weights


def test_time_floors_by_hand():
    plan = Planner(SEVEN).plan(32_768)
    read = (
        15_231_233_024 - 152_064 * 3_584 * 2 + 57_344 * 32_768
    )  # the embedding is looked up, not read
    assert plan.decode_bytes == read
    assert plan.decode_seconds(CARDS["RTX 4090"]) == read / 1008e9
    # every token through the matrices, 13,050,576,896 FLOPs, and against those before it, 401,408 each; the head once
    flops = 32_768 * 13_050_576_896 + 401_408 * 32_768 * 32_769 // 2 + 2 * 152_064 * 3_584
    assert plan.prefill_seconds(CARDS["A100 80GB"]) == flops / 312e12
    assert Planner(SEVEN, 4).plan(32_768, 2).prefill_flops == 2 * flops / 4
    tied = official_config("3B")
    assert (
        Planner(tied).plan(1).decode_bytes == 6_171_877_376 + 36_864
    )  # a tied embedding is the head: read
    many = Planner(official_config("0.5B")).plan(
        1, 2048
    )  # enough sequences, and a step is bound by FLOPs
    assert (
        many.decode_seconds(CARDS["RTX 3090"])
        == many.decode_flops / 71e12
        > many.decode_bytes / 936e9
    )


@pytest.mark.parametrize("size, gb", [(1, 24), (4, 24), (2, 48)])
def test_largest_is_the_last_that_fits(size, gb):
    planner, limit = Planner(SEVEN, size), int(gb * 0.9e9)
    context = planner.largest_context(limit, 3)
    assert planner.plan(context, 3).total <= limit < planner.plan(context + 1, 3).total
    batch = planner.largest_batch(limit, 8192)
    assert planner.plan(8192, batch).total <= limit < planner.plan(8192, batch + 1).total
    assert Planner(official_config("72B")).largest_context(limit) == 0


def test_what_cannot_work_is_refused():
    with pytest.raises(ParallelError, match="28 query heads do not divide by 8.*extend to 32"):
        Planner(SEVEN, 8)
    for wrong in ({"dtype": "int3"}, {"quantization": "gguf"}, {"block_size": 0}):
        with pytest.raises(ConfigError, match=str(next(iter(wrong)))):
            Planner(SEVEN, **wrong)
    with pytest.raises(ConfigError, match="batch is 3000"):
        Planner(SEVEN).plan(10, 3000)
    with pytest.raises(ConfigError, match="context is 0"):
        Planner(SEVEN).plan(0)


# ---- against the allocator -------------------------------------------------------------------------------------------

MLP_BOUND = ModelConfig(
    vocab_size=500,
    hidden_size=128,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
)
ATTENTION_BOUND = MLP_BOUND.replace(hidden_size=64, intermediate_size=128)
STEPS = {  # name: (config, query_lens, context_lens, the phase with the peak)
    "prefill": (MLP_BOUND, (1024,), (1024,), "MLP"),
    "heads": (
        MLP_BOUND.replace(
            num_attention_heads=28, num_key_value_heads=4, head_dim=64, intermediate_size=128
        ),
        (512,),
        (512,),
        "queries and keys",
    ),
    "chunk": (ATTENTION_BOUND, (512,), (20_000,), "attention"),
    "decode": (ATTENTION_BOUND, (1,) * 16, (1000,) * 16, "attention"),
    "ragged": (ATTENTION_BOUND, (1,) * 8, (900, 1500) * 4, "attention"),
    "mixed again": (ATTENTION_BOUND, (1,) * 40 + (64,), (500,) * 40 + (200,), "attention"),
    "mixed": (ATTENTION_BOUND, (1, 1, 256), (300, 2000, 3000), "attention"),
    "logits": (ATTENTION_BOUND.replace(vocab_size=20_000), (300,), (300,), "logits"),
}


@torch.inference_mode()
def allocated(
    config: ModelConfig, queries: tuple, contexts: tuple, dtype: str, rows: bool, page: int = 16
) -> int:
    """The most bytes that PyTorch's allocator held at once during a step, as its profiler saw. rows: all logits are
    wanted. The buffer of gathered pages has to grow by a page."""
    model = Qwen2(config, dtype=getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    widths = [-(-n // page) for n in contexts]
    first = [sum(widths[:i]) for i in range(len(widths))]
    tables = torch.tensor(
        [[a + i if i < n else 0 for i in range(max(widths))] for a, n in zip(first, widths)]
    )
    positions = torch.cat([torch.arange(n - q, n) for q, n in zip(queries, contexts)])
    owner = torch.repeat_interleave(torch.arange(len(queries)), torch.tensor(queries))
    slots = tables[owner, positions // page] * page + positions % page
    last = torch.arange(sum(queries)) if rows else torch.cumsum(torch.tensor(queries), 0) - 1
    batch = Batch(positions, queries, contexts, slots, tables, last)
    cache, ids = model.new_cache(sum(widths), page), torch.zeros(sum(queries), dtype=torch.int64)
    model(
        ids, batch, cache
    )  # the rotary table and the buffer of gathered pages stay from step to step
    before = cache.gathered.numel() - 2 * cache.pool[0, 0, 0].numel()
    cache.gathered = cache.pool.new_empty(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        cache.gathered = cache.pool.new_empty(before)
        model(ids, batch, cache)
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    table = 2 * (1 << (max(contexts) - 1).bit_length()) * config.head_dim * model.dtype.itemsize
    return most + table + 24 * len(ids) + 8 * tables.numel()  # and what the step was handed


def predicted(name: str, dtype: str) -> tuple[int, str]:
    config, queries, contexts, _ = STEPS[name]
    phases = memory.step_phases(
        config,
        queries,
        contexts,
        dtype=dtype,
        device="cpu",
        logit_rows=sum(queries) if name == "logits" else None,
    )
    del phases["rotary table"], phases["sampling"]  # before and after the forward pass
    return max((held, phase) for phase, held in phases.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", STEPS)
def test_activations_against_the_allocator(name, dtype):
    config, queries, contexts, phase = STEPS[name]
    held, where = predicted(name, dtype)
    assert where == phase
    assert held == pytest.approx(
        allocated(config, queries, contexts, dtype, rows=name == "logits"), rel=0.02
    )


@pytest.mark.parametrize(
    "name, broken",
    [
        ("chunk", {"tile_rows": lambda device, scores: 32}),  # twice the scores at a time
        (
            "ragged",
            {"runs": lambda queries, contexts: iter((i, 1) for i in range(len(queries)))},
        ),  # one by one
        ("prefill", {"BYTES_PER_ELEMENT": {"float32": 3}}),
        ("decode", {"BYTES_PER_ELEMENT": {"float32": 3}}),
    ],
)
def test_control_a_broken_term_is_seen(name, broken, monkeypatch):
    config, queries, contexts, _ = STEPS[name]
    right = predicted(name, "float32")[0]
    for attribute, value in broken.items():
        monkeypatch.setattr(memory, attribute, value)
    assert predicted(name, "float32")[0] != pytest.approx(right, rel=0.05)


def test_step_bytes_is_the_largest_phase_and_grows_linearly():
    at = [
        memory.step_bytes(SEVEN, (2048,), (n,), dtype="bfloat16")
        for n in (2**18, 2**19, 2**20, 2**21)
    ]
    steps = [b - a for a, b in zip(at, at[1:])]
    assert (
        steps[1] < 2.01 * steps[0] and steps[2] < 2.01 * steps[1]
    )  # twice the tokens, at most twice the bytes
    assert memory.step_bytes(SEVEN, (5,), (9,), dtype="bfloat16") == max(
        memory.step_phases(SEVEN, (5,), (9,), dtype="bfloat16").values()
    )


# ---- against resident memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        ({**long_context.WIDE, "num_hidden_layers": 2}, "float32", 1, 1536, 1536),  # weights, MLP
        (long_context.ATTENTION, "float32", 1, 8192, 1024),  # pages, scores
        (long_context.ATTENTION, "float32", 24, 512, 1024),  # many sequences
    ],
)
def test_peak_resident_memory_within_five_percent(shape):
    found = long_context.measure(long_context.job(*shape))
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.05)
    for part in (
        "weights",
        "kv_cache",
        "activations",
    ):  # the control: each part of the sum is needed ...
        if found[part] > 0.1 * found["measured"]:  # ... where it is large enough to matter
            assert found["predicted"] - found[part] != pytest.approx(found["measured"], rel=0.05)


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(monkeypatch, capsys):
    """Runs tools/plan.py here: (exit code, what it printed, what it complained of)."""

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *args])
        with pytest.raises(SystemExit) as end:
            cli.run(tool.main)
        return end.value.code, *capsys.readouterr()

    return run


def test_json_says_what_the_library_says(tmp_path, plan):
    SEVEN.save(tmp_path)
    said = plan(
        str(tmp_path),
        "--tp",
        "4",
        "--context",
        "5000",
        "--batch",
        "3",
        "--gpu-memory",
        "24",
        "--json",
    )[1]
    (answer,) = json.loads(said)
    planner = Planner(SEVEN, 4)
    expected = planner.plan(5000, 3)
    assert {k: answer[k] for k in dataclasses.asdict(expected)} == dataclasses.asdict(expected)
    assert answer["cards_gb"]["24"] == {
        "fits": True,
        "largest_context": planner.largest_context(int(21.6e9), 3),
        "largest_batch": planner.largest_batch(int(21.6e9), 5000),
    }
    assert answer["floors"]["RTX 3090"]["decode_seconds"] == expected.decode_seconds(
        CARDS["RTX 3090"]
    )
    assert set(answer["floors"]) == {"RTX 3090", "RTX 4090"}


def test_every_degree_and_the_one_that_cannot_work(plan):
    answers = json.loads(plan("--size", "7B", "--json")[1])
    assert [a["size"] for a in answers] == [1, 2, 4, 8] and "extend to 32 heads" in answers[3][
        "error"
    ]
    assert list(answers[0]["cards_gb"]) == ["24", "40", "48", "80", "141"] and set(
        answers[0]["floors"]
    ) == set(CARDS)
    assert all(
        "error" not in a
        for a in json.loads(plan("--size", "7B", "--num-attention-heads", "32", "--json")[1])
    )


def test_plot_and_what_to_do_without_matplotlib(tmp_path, plan, monkeypatch):
    pytest.importorskip("matplotlib")
    assert plan("--size", "0.5B", "--tp", "1", "--plot", str(tmp_path / "a.svg"))[0] == 0
    assert "<svg" in (tmp_path / "a.svg").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, said = plan("--size", "0.5B", "--plot", str(tmp_path / "b.svg"))
    assert code == 2 and "pip install 'minqwen[plot]'" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--size", "7B", "--tp", "8"], "degrees that work: 1, 2, 4"),
        (["/nowhere"], "/nowhere: cannot be read"),
        (["--size", "7B", "--batch", "0"], "batch is 0"),
        (["--size", "7B", "--gpu-memory", "-1"], "--gpu-memory is -1"),
        (["--size", "7B", "--num-attention-heads", "30"], "num_attention_heads is 30"),
        (
            ["--size", "0.5B", "--plot", "/nowhere/a.svg"],
            "/nowhere/a.svg: the plot cannot be written",
        ),
    ],
)
def test_mistakes_are_one_line(args, expected, plan):
    if "--plot" in args:
        pytest.importorskip("matplotlib")
    code, out, said = plan(*args)
    assert code == 2 and expected in said and said.count("\n") == 1 and not out


def test_the_script_runs_and_the_engine_needs_no_plots():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/plan.py"), "--size", "9B"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "invalid choice: '9B'" in done.stderr
    heavy = "import sys, minqwen.model.memory, minqwen.lab.planner; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy], cwd=ROOT).returncode == 0


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_pages_tables_are_the_planners(plan):
    blocks = re.findall(r"```\n\$ python (tools/plan\.py [^\n]*)\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 2
    for command, output in blocks:
        assert plan(*command.split()[1:])[1] == output


def test_the_pages_measurements_fit_the_planner():
    """Rows as benchmarks/long_context.py prints them: the prediction is today's, what was measured within 5 %."""
    text = PAGE.read_text()
    jobs = [long_context.job(*shape) for shape in long_context.LONG + long_context.VALIDATION]
    for job in jobs:
        start = (
            f"{job['config']['hidden_size']:6} {job['config']['num_hidden_layers']:6} {job['dtype']:9}"
            f"{job['prompts']:7}{job['length']:8}{job['tokens']:6}"
        )
        line = next(line for line in text.splitlines() if line.startswith(start))
        measured, said = (float(x) for x in re.findall(r"([\d.]+) MB", line))
        total = long_context.planned(job).total / 1e6
        assert said == pytest.approx(total, abs=0.05 + 1e-9), line
        assert abs(said - measured) < max(0.05 * measured, 2), line  # 2 MB: the process's own
    rows = [
        line
        for line in text.splitlines()
        if re.match(r" +64 +1 float32 +1 +(8188|32764|131068) ", line)
    ]
    for i, name in enumerate(("measured", "predicted")):
        points = [
            (int(line.split()[4]), float(re.findall(r"([\d.]+) MB", line)[i]) * 1e6)
            for line in rows
        ]
        slope = float(
            re.search(rf"^{name}: ([\d,]+) bytes per token", text, re.M)[1].replace(",", "")
        )
        assert slope == pytest.approx(long_context.slope(points)[0], rel=0.001)


def test_every_other_figure_of_the_page():
    """Outside the blocks of output each number is computed here, or is one of those that the page says are wrong."""
    text = re.sub(r"```.*?```|\[[^]]*\]\([^)]*\)", " ", PAGE.read_text(), flags=re.S)
    wide, four = SEVEN.replace(num_attention_heads=32), Planner(SEVEN, 4)
    kv = SEVEN.kv_bytes_per_token()
    wrong = {"4,096", "152", "146", "131.6", "38.5"}
    right = {
        f"{n:,}"
        for n in (
            SEVEN.hidden_size,
            SEVEN.num_parameters(),
            SEVEN.head_dim,
            SEVEN.num_hidden_layers,
            SEVEN.num_attention_heads,
            SEVEN.num_key_value_heads,
            wide.num_attention_heads,
            kv,
            kv // 4,
            kv // 8,
            four.weights,
            SEVEN.context_length,
            4 * SEVEN.context_length,
            2**26,
            2**18,
        )
    }
    right |= {
        f"{n / 1e9:.2f}"
        for n in (
            SEVEN.weight_bytes(),
            four.weights,
            kv * 32_768,
            kv * 131_072,
            Planner(wide, 8).weights,
            Planner(wide, 4).weights,
        )
    }
    right |= {f"{4096 / 28:.1f}", f"{kv * 131_072 / 4 / 1e9:.2f}", f"{wide.hidden_size // 32}"}
    right.add(f"{(Planner(wide, 4).weights - four.weights) / 1e9:.2f}")
    right |= {
        f"{2048 * 131_072 * 2 * 4 / 1e9:.2f}",
        "2,048",
    }  # a chunk's scores with two heads in float32
    plain = {
        "20",
        "1",
        "2",
        "3",
        "5",
        "7",
        "8",
        "9",
        "10",
        "16",
        "64",
        "0.9",
    }  # factors, bits, tokens of a page
    allowed = {*right, *wrong, *map(str, CAPACITIES), *plain}
    found = {x.rstrip(",") for x in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", text)}
    assert found - allowed == set()
    assert wrong <= found and {"3,584", "7,615,616,512", "15.23", "57,344", "3.81"} <= found
