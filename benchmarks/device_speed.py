#!/usr/bin/env python3
"""How fast one device is, and what share of it a model of an official shape gets.

  python benchmarks/device_speed.py                                    a tiny shape on the CPU
  python benchmarks/device_speed.py --device cuda --size 7B --json speed.json

First the roofs: copying memory, products in bfloat16 and float64. Then, with random weights made on
the device: native bfloat16 decode and prefill over the cache's blocks, without the engine around
it; 32 query heads beside 28; transformers' eager attention and SDPA on the same weights; exact
arithmetic with weights kept narrow and kept in float64. Every time is a median. A section stops
when its share of --seconds is over. Each result is printed, and written to the file, at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minqwen import Batch, ModelConfig, Qwen2
from minqwen.cli import Parser, check_writable, run
from minqwen.errors import MinqwenError
from minqwen.files import write_text
from minqwen.lab.shapes import SIZES, STD, official_config
from minqwen.model import Exact, KVCache

try:
    import transformers
except ImportError:
    peers: Any = None
else:
    peers = transformers

BLOCK_SIZE = 16  # tokens
BF16 = torch.bfloat16
FEWEST = 3  # runs of each job, whatever time is left in its section
Weights = dict[str, Tensor]


class Job(NamedTuple):
    """A decode step of `num_seqs` sequences of `length` tokens, or the prefill of one."""

    kind: str  # "decode" or "prefill"
    num_seqs: int
    length: int

    @property
    def new_tokens(self) -> int:
        """Of each sequence."""
        return 1 if self.kind == "decode" else self.length

    @property
    def name(self) -> str:
        return f"{self.kind} B{self.num_seqs} x {self.length:,}"


class Jobs(NamedTuple):
    """What each section times."""

    native: list[Job]
    heads: list[Job]  # with 28 and with 32 heads
    exact: list[Job]


LARGE = Jobs(
    native=[
        Job("decode", 1, 1024),
        Job("decode", 1, 32768),
        Job("decode", 32, 1024),
        Job("decode", 256, 1024),
        Job("prefill", 1, 2048),
        Job("prefill", 1, 8192),
    ],
    heads=[Job("decode", 1, 1024), Job("decode", 32, 1024), Job("prefill", 1, 2048)],
    exact=[Job("decode", 1, 1024), Job("prefill", 1, 512)],
)
TINY = Jobs(
    native=[Job("decode", 1, 64), Job("decode", 4, 64), Job("prefill", 1, 64)],
    heads=[Job("decode", 1, 64), Job("prefill", 1, 64)],
    exact=[Job("decode", 1, 64), Job("prefill", 1, 32)],
)


@dataclass
class Result:
    """One line of the table."""

    what: str  # who computes
    job: str
    seconds: float = 0.0  # the median
    rate: float = 0.0  # tokens per second; of a roof: GB or TFLOP per second
    share: float = 0.0  # of what the roofs allow
    peak_gb: float = 0.0  # most memory in use
    runs: int = 0
    error: str = ""


class Bench:
    """The device, its roofs, the time that is left, and the results so far."""

    def __init__(self, args: argparse.Namespace):
        self.device, self.file = torch.device(args.device), args.json
        self.began, self.seconds = time.perf_counter(), args.seconds
        self.share, self.until = 0.0, 0.0  # of the current section: its time; when it must end
        self.roofs: dict[str, float] = {}  # bytes or FLOP per second
        self.results: list[Result] = []
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        threads = f"{torch.get_num_threads()} threads"
        self.machine = f"{args.size}, {gpu}, torch {torch.__version__}, {threads}"
        print(self.machine)
        print(f"{'':56}{'median':>12}{'rate':>18}{'of roof':>9}{'peak':>9}", flush=True)

    def clock(self) -> float:
        """Seconds, when all work on the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def section(self, share: float) -> None:
        """Begin a section that may take `share` of all the time, from its first job on."""
        self.share, self.until = share, 0.0

    def time(self, what: str, job: str, act: Callable[[], object], most: int = 12) -> Result:
        """The median time of `act`, up to `most` times after one to warm up. Errors are told."""
        result = Result(what, job)
        self.until = self.until or time.perf_counter() + self.share * self.seconds
        if time.perf_counter() > self.until:
            result.error = "no time left for this section"
            return result
        try:
            result.peak_gb, times = self.measure(act, most)
        except Exception as error:
            result.error = in_one_line(error)
            return result
        result.seconds, result.runs = statistics.median(times), len(times)
        return result

    @torch.inference_mode()
    def measure(self, act: Callable[[], object], most: int) -> tuple[float, list[float]]:
        """Peak memory in GB, and the times."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        act()
        times: list[float] = []
        while len(times) < FEWEST or (len(times) < most and self.clock() < self.until):
            began = self.clock()
            act()
            times.append(self.clock() - began)
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return peak / 1e9, times

    def show(self, result: Result, unit: str = "tokens/s") -> None:
        """Print a line, and write the file as far as we are."""
        self.results.append(result)
        line = f"{time.perf_counter() - self.began:5.1f}s {result.what:28}{result.job:22}"
        if result.error:
            line += f" {result.error}"
        else:
            line += f"{result.seconds * 1e3:9.2f} ms{result.rate:9,.1f} {unit:8}"
            line += f"{result.share:9.1%}{result.peak_gb:6.1f} GB" if result.share else ""
        print(line, flush=True)
        if self.file:
            content = {
                "machine": self.machine,
                "roofs": self.roofs,
                "results": [asdict(each) for each in self.results],
            }
            write_text(Path(self.file), json.dumps(content, indent=1) + "\n", MinqwenError)


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- roofs --------------------------------------------------------------------------------------


def measure_roofs(bench: Bench) -> None:
    """Copying, counted as bytes read and written; square products of random numbers."""
    large = bench.device.type == "cuda"
    source = torch.empty(1 << (31 if large else 26), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copied = bench.time("roof", "copy", partial(target.copy_, source))
    note_roof(bench, copied, 2 * source.nbytes, "GB/s", 1e9)
    for dtype, n in ((BF16, 8192), (torch.float64, 4096)):
        n = n if large else 512
        a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
        done = bench.time("roof", str(dtype).removeprefix("torch."), partial(torch.mm, a, b))
        note_roof(bench, done, 2 * n**3, "TFLOP/s", 1e12)


def note_roof(bench: Bench, result: Result, work: float, unit: str, scale: float) -> None:
    if not result.error:
        bench.roofs[result.job] = work / result.seconds
        result.rate = work / result.seconds / scale
    bench.show(result, unit)


def least_seconds(bench: Bench, config: ModelConfig, job: Job, dtype: str) -> float:
    """What the roofs allow: all weights and the context read once, all FLOPs done.

    dtype: of the weights in memory. The products of exact arithmetic are in float64 at least. The
    embedding's table is not counted, of which a step reads some rows, unless it is the head too.
    """
    table = config.vocab_size * config.hidden_size
    body = config.num_parameters() - (table if config.tie_word_embeddings else 2 * table)
    context = job.num_seqs * job.length * config.kv_bytes_per_token("bfloat16")
    read = (body + table) * (8 if dtype == "float64" else 2) + context
    tokens = job.num_seqs * job.new_tokens
    seen = job.length / (1 if job.kind == "decode" else 2)  # keys per query, on average
    flops = 2.0 * (body * tokens + table * job.num_seqs)
    flops += 4 * config.num_hidden_layers * config.q_size * seen * tokens
    copy, products = (bench.roofs.get(name, float("inf")) for name in ("copy", dtype))
    return max(read / copy, flops / products)


# ---- one job ------------------------------------------------------------------------------------


class Who(NamedTuple):
    """Who computes, and what bounds it."""

    name: str
    config: ModelConfig
    dtype: str = "bfloat16"  # of the weights in memory


def measure_job(
    bench: Bench, who: Who, job: Job, prepare: Callable[[], Callable[[], object]]
) -> None:
    """One line. prepare: makes the step that is timed, and the cache it needs."""
    try:
        with torch.inference_mode():
            step = prepare()
    except RuntimeError as error:  # no memory for the cache
        bench.show(Result(who.name, job.name, error=in_one_line(error)))
        return
    result = bench.time(who.name, job.name, step)
    if not result.error:
        result.rate = job.num_seqs * job.new_tokens / result.seconds
        result.share = least_seconds(bench, who.config, job, who.dtype) / result.seconds
    bench.show(result)
    del step
    free()


# ---- minqwen ------------------------------------------------------------------------------------


def random_weights(config: ModelConfig, device: torch.device, known: Weights) -> Weights:
    """bfloat16 of N(0, STD^2), made on the device; `known` ones of the same shape are shared."""
    found = {}
    for name, shape in config.parameter_shapes().items():
        if name in known and known[name].shape == tuple(shape):
            found[name] = known[name]
            continue
        x = torch.empty(shape, dtype=BF16, device=device)
        found[name] = x.fill_(1) if "norm" in name else x.normal_(0, STD)
    return found


def step_of(model: Qwen2, job: Job) -> Callable[[], object]:
    """One step: packing, the forward pass, the likeliest tokens brought to the CPU."""
    per_seq = -(-job.length // BLOCK_SIZE)
    blocks = [list(range(i * per_seq, (i + 1) * per_seq)) for i in range(job.num_seqs)]
    cache: KVCache = model.new_cache(job.num_seqs * per_seq, BLOCK_SIZE)
    cache.pool.normal_()
    count = job.new_tokens
    ids = torch.randint(0, model.config.vocab_size, (job.num_seqs * count,), device=model.device)

    def step() -> object:
        batch = Batch.paged(
            [count] * job.num_seqs,
            [job.length] * job.num_seqs,
            blocks,
            BLOCK_SIZE,
            num_logits=[1] * job.num_seqs,
            device=model.device,
        )
        logits: Tensor = model(ids, batch, cache)
        return logits.argmax(-1).tolist()

    return step


def measure_model(bench: Bench, who: Who, model: Qwen2, jobs: list[Job]) -> None:
    for job in jobs:
        measure_job(bench, who, job, partial(step_of, model, job))


def measure_native(bench: Bench, config: ModelConfig, jobs: Jobs, weights: Weights) -> None:
    """The shape as it is."""
    model = shared_model(config, weights)
    who = Who(f"native, {config.num_attention_heads} heads", config)
    measure_model(bench, who, model, jobs.native)


def measure_heads(bench: Bench, config: ModelConfig, jobs: Jobs, weights: Weights) -> None:
    """With one more query head in each group: 32 instead of 28 for 7B."""
    heads = config.num_attention_heads + config.num_key_value_heads
    more = config.replace(num_attention_heads=heads, head_dim=config.head_dim)
    model = shared_model(more, random_weights(more, bench.device, weights))
    measure_model(bench, Who(f"native, {heads} heads", more), model, jobs.heads)


def measure_narrow(bench: Bench, config: ModelConfig, jobs: Jobs, weights: Weights) -> None:
    """Exact arithmetic, weights kept in bfloat16 and widened in every call."""
    model = shared_model(config, weights, Exact(widen=False))
    measure_model(bench, Who("exact, bfloat16 weights", config), model, jobs.exact)


def measure_wide(bench: Bench, config: ModelConfig, jobs: Jobs, weights: Weights) -> None:
    """Exact arithmetic, weights kept in float64; the narrow ones are given up for them."""
    model = Qwen2.from_tensors(
        config,
        lambda name, part: weights.pop(name),
        dtype=BF16,
        device=bench.device,
        arithmetic=Exact(widen=True),
    )
    measure_model(bench, Who("exact, float64 weights", config, "float64"), model, jobs.exact)


def shared_model(
    config: ModelConfig, weights: Weights, arithmetic: str | Exact = "native"
) -> Qwen2:
    """A model in the weights' own memory, as far as its arithmetic leaves them alone."""
    return Qwen2.from_tensors(
        config,
        lambda name, part: weights[name],
        dtype=BF16,
        device=next(iter(weights.values())).device,
        arithmetic=arithmetic,
    )


# ---- transformers -------------------------------------------------------------------------------


def peer(config: ModelConfig, weights: Weights, attention: str) -> Any:
    """transformers' model in the same memory."""
    plain = {**config.to_dict(), "bos_token_id": None, "eos_token_id": None}
    theirs = peers.AutoConfig.for_model(**plain)
    with torch.device("meta"):
        model = peers.AutoModelForCausalLM.from_config(
            theirs, dtype=BF16, attn_implementation=attention
        )
    model.load_state_dict(weights, strict=not config.tie_word_embeddings, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    with next(iter(weights.values())).device:  # it has no weights, but numbers that it computes
        model.model.rotary_emb = type(model.model.rotary_emb)(theirs)
    return model.eval()


def peer_step_of(model: Any, config: ModelConfig, job: Job) -> Callable[[], object]:
    """The same step. A decode step makes its cache longer by a token, as it does for users."""
    device = model.device
    ids = torch.randint(0, config.vocab_size, (job.num_seqs, job.new_tokens), device=device)
    cache = peers.DynamicCache(config=model.config)
    if job.kind == "decode":
        shape = (job.num_seqs, config.num_key_value_heads, job.length - 1, config.head_dim)
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(shape, dtype=BF16, device=device) for _ in range(2))
            cache.update(keys, values, layer)

    def step() -> object:
        past = cache if job.kind == "decode" else peers.DynamicCache(config=model.config)
        logits: Tensor = model(ids, past_key_values=past, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1).tolist()

    return step


def measure_peer(
    attention: str, bench: Bench, config: ModelConfig, jobs: Jobs, weights: Weights
) -> None:
    who = Who(f"transformers {attention}", config)
    if peers is None:
        bench.show(Result(who.name, "all", error="not installed"))
        return
    model = peer(config, weights, attention)
    for job in jobs.native:
        measure_job(bench, who, job, partial(peer_step_of, model, config, job))


# ---- all of it ----------------------------------------------------------------------------------

# (name, share of the time, what it does). What needs most memory comes last.
SECTIONS: list[tuple[str, float, Callable[[Bench, ModelConfig, Jobs, Weights], None]]] = [
    ("native", 0.2, measure_native),
    ("more heads", 0.1, measure_heads),
    ("transformers eager", 0.2, partial(measure_peer, "eager")),
    ("transformers sdpa", 0.2, partial(measure_peer, "sdpa")),
    ("exact, bfloat16 weights", 0.1, measure_narrow),
    ("exact, float64 weights", 0.1, measure_wide),
]


def measure_all(bench: Bench, config: ModelConfig, jobs: Jobs) -> None:
    """Every section. One that fails is a line, and the next one begins."""
    bench.section(0.1)
    measure_roofs(bench)
    free()
    weights = random_weights(config, bench.device, {})
    for name, share, measure in SECTIONS:
        bench.section(share)
        try:
            measure(bench, config, jobs, weights)
        except Exception as error:
            bench.show(Result(name, "the section", error=in_one_line(error)))
        free()


def shape_of(args: argparse.Namespace) -> ModelConfig:
    """The official shape, or the tiny one."""
    if args.size == "tiny":
        small = official_config("0.5B")
        return small.replace(num_hidden_layers=2, vocab_size=4096, tie_word_embeddings=False)
    config = official_config(args.size)
    return config.replace(num_hidden_layers=args.layers) if args.layers else config


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=["tiny", *SIZES], default="tiny")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the shape has")
    parser.add_argument("--seconds", type=float, default=100, help="about, in all (default: 100)")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    args: argparse.Namespace = parser.parse_args()
    return args


def main() -> int:
    args = parse_args()
    if args.json:
        check_writable(args.json, "--json")
    measure_all(Bench(args), shape_of(args), TINY if args.size == "tiny" else LARGE)
    return 0


if __name__ == "__main__":
    run(main)
