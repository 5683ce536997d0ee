"""The figures of docs/memory.md are computed again."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
from support.paths import ROOT
from support.tool import run_tool_here

from minqwen.lab.choices import choices
from minqwen.lab.peak_memory import LONG, VALIDATION, Job, line_through
from minqwen.lab.planner import CARDS, Planner
from minqwen.lab.shapes import official_config
from minqwen.model.attention import tile_rows

TEXT = (ROOT / "docs" / "memory.md").read_text()
PROSE = re.sub(r"\s+", " ", re.sub(r"```.*?```", "", TEXT, flags=re.S))
TABLES = re.findall(r"```\n\$ python tools/(plan\.py[^\n]*)\n(.*?)```", TEXT, re.S)

SEVEN = official_config("7B")
WIDE = SEVEN.replace(num_attention_heads=32)
ONE, FOUR, WIDE_FOUR, WIDE_EIGHT = (
    Planner(SEVEN),
    Planner(SEVEN, 4),
    Planner(WIDE, 4),
    Planner(WIDE, 8),
)
CHOICES = {each.planner.size: each for each in choices(SEVEN, 8)}
KV = SEVEN.kv_bytes_per_token()
LAYERS, KV_HEADS, d = SEVEN.num_hidden_layers, SEVEN.num_key_value_heads, SEVEN.head_dim


def rate(size: int, context: int) -> str:
    """Tokens per second of 64 sequences on eight H100s, `size` of them for each replica."""
    return f"{CHOICES[size].tokens_per_second(CARDS['H100'], context, 64):,.0f}"


def gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


@pytest.mark.parametrize("command, output", TABLES, ids=["28 heads", "32 heads", "8 GPUs"])
def test_the_tables_are_what_the_tool_prints(command, output):
    assert run_tool_here(*shlex.split(command)).out == output


@pytest.mark.parametrize(
    "sentence",
    [
        # The first table: what is often copied, and what is right.
        f"| hidden size | 4,096 | {SEVEN.hidden_size:,} |",
        f"| head_dim | 146 | {d} | 4,096 / 28 = {4096 / 28:.1f} is not an integer; "
        f"{SEVEN.num_attention_heads} heads of {d} make {SEVEN.hidden_size:,}. "
        f"With {WIDE.num_attention_heads} heads it is still {WIDE.head_dim}, "
        f"not {WIDE.hidden_size // 32} |",
        f"| weights in 16 bits | 152 GB | {gb(ONE.weights)} GB | {SEVEN.num_parameters():,} "
        "parameters of 2 bytes: a slip of a factor 10 |",
        f"| weights on each of four cards | 38.5 GB, on cards of 24 GB | {gb(FOUR.weights)} GB | "
        f"{FOUR.weights:,} bytes: a quarter",
        f"| cache per token | 131.6 KB | {KV:,} bytes | 2 (key and value) × {LAYERS} layers × "
        f"{KV_HEADS} KV heads × {d} × 2 bytes;",
        f'| growth of the cache | "quadratic" | linear | {KV:,} bytes × tokens: '
        f"{gb(KV * 32_768)} GB at 32,768, {gb(KV * 131_072)} GB at 131,072 |",
        # Formulas.
        f"{FOUR.kv_per_token:,} bytes on each of four GPUs. "
        f"On each of eight it is {WIDE_EIGHT.kv_per_token:,} bytes too, not {KV // 8:,}, "
        f"because each of the {KV_HEADS} heads",
        f"whole blocks (of {ONE.block_size} tokens unless told otherwise)",
        f"at most {2**26:,} scores on a GPU, or 16 rows of them",
        # The 7B on four cards.
        f"32 heads cost {gb(WIDE_FOUR.weights - FOUR.weights)} GB more on each card.",
        f"with {gb(WIDE_EIGHT.weights)} GB of weights on each; 28 heads do not divide by eight",
        f"Contexts longer than {SEVEN.context_length:,} tokens need YaRN",
        # Eight cards.
        f"A token's cache then takes {8 * WIDE_EIGHT.kv_per_token:,} bytes of all memory, not "
        f"{KV:,}, and is read as often",
        f"on H100s 64 of them make {rate(8, 32_768)} tokens a second at most, where two "
        f"replicas of four make {rate(4, 32_768)}. At 1,024 tokens each it is the other way round, "
        f"{rate(8, 1024)} to {rate(4, 1024)}, because",
        # Long contexts: a chunk's scores, with two heads in float32.
        f"in chunks of {LONG[0].tokens:,} tokens",
        f"the last chunk's at 131,072 tokens would take {gb(2048 * 131_072 * 2 * 4)} GB alone",
        f"{gb(KV * 131_072)} GB / 4 = {gb(FOUR.kv_per_token * 131_072)} GB of cache on each",
    ],
)
def test_each_figure_in_a_sentence_is_computed_again(sentence):
    assert sentence in PROSE


def test_a_tile_of_scores_is_as_large_as_the_page_says():
    assert tile_rows(torch.device("cuda"), 2**13) * 2**13 == 2**26
    assert tile_rows(torch.device("cuda"), 2**26) == 16


def rows_of(job: Job) -> list[str]:
    """The lines of the page that start as benchmarks/long_context.py prints this job."""
    start = (
        f"{job.config['hidden_size']:6} {job.config['num_hidden_layers']:6} {job.dtype:9}"
        f"{job.prompts:7}{job.length:8}{job.tokens:6}"
    )
    return [line for line in TEXT.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("job", LONG + VALIDATION, ids=lambda job: f"{job.dtype}-{job.length}")
def test_each_prediction_is_todays_and_each_measurement_within_five_percent(job):
    """In bfloat16: first on a CPU that copies products in float32, then on one that does not."""
    rows = rows_of(job)
    kinds_of_cpu = [True, False] if job.dtype == "bfloat16" else [False]
    assert len(rows) == len(kinds_of_cpu)
    for line, copies_products in zip(rows, kinds_of_cpu):
        measured, said = (float(x) for x in re.findall(r"([\d.]+) MB", line))
        total = job.estimate(copies_products).total / 1e6
        assert said == pytest.approx(total, abs=0.05 + 1e-9), line
        assert abs(said - measured) < max(0.05 * measured, 2), line  # 2 MB: the process's own


@pytest.mark.parametrize("column, name", [(0, "measured"), (1, "predicted")])
def test_the_slopes_are_those_of_the_rows(column, name):
    points = []
    for job in LONG:
        (line,) = rows_of(job)
        points.append((job.length, float(re.findall(r"([\d.]+) MB", line)[column]) * 1e6))
    (said,) = re.findall(rf"^{name}: ([\d,]+) bytes per token", TEXT, re.M)
    slope, _ = line_through(points)
    assert float(said.replace(",", "")) == pytest.approx(slope, rel=0.001)
