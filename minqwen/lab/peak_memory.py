"""Peak memory of the engine on this CPU, measured beside the planner's estimate.

Each run is a process of its own. It first runs a tiny model in the same dtype, because libraries
set up their buffers then. It reports how far its resident memory rose above that, from before the
weights exist to the highest point of `LLM.generate`. Three things that are not the model's are kept
out of it: glibc hands freed memory back at once, oneDNN keeps few of the kernels that it compiles
(in bfloat16 it compiles one for every tile of attention), and the prefix cache, whose records are
Python objects, is off.

It needs Linux: resident memory is read from /proc.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minqwen.config import ModelConfig, RopeScaling
from minqwen.engine.llm import LLM
from minqwen.errors import MinqwenError
from minqwen.lab.machine import forget_high_water_mark, resident_bytes
from minqwen.lab.planner import Estimate, Planner
from minqwen.model import Qwen2
from minqwen.sampling.params import SamplingParams

BLOCK_SIZE = 16
PACKAGE = Path(__file__).resolve().parents[2]  # the directory that `minqwen` is in
CHILD = "import sys; from minqwen.lab import peak_memory; peak_memory.print_here(sys.argv[1])"
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
}

# Fields of a ModelConfig.
Shape = dict[str, Any]
SMALL: Shape = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 131072,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768},
}
WIDE: Shape = {  # 126 million parameters
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
TIED: Shape = {  # the 0.5B with 2 of its 24 layers
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 2,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
ATTENTION: Shape = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


@dataclass(frozen=True)
class Job:
    """`prompts` prompts of `length` random tokens each, in steps of at most `tokens` tokens."""

    config: Shape
    dtype: str
    prompts: int
    length: int
    tokens: int

    def model_config(self) -> ModelConfig:
        fields = {**self.config, "dtype": self.dtype}
        if "rope_scaling" in fields:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        return ModelConfig(**fields)

    @property
    def new_tokens(self) -> int:
        """So many that at last all sequences decode together."""
        if self.prompts == 1:
            return 4
        return 2 * self.prompts * self.length // self.tokens + 4

    def estimate(self, copies_products: bool | None = None) -> Estimate:
        """The planner's. copies_products: as in `memory.step_phases`."""
        planner = Planner(
            self.model_config(),
            max_num_batched_tokens=self.tokens,
            block_size=BLOCK_SIZE,
            device="cpu",
            copies_products=copies_products,
        )
        return planner.estimate(self.length + self.new_tokens, self.prompts)


@dataclass(frozen=True)
class Measurement:
    """Bytes measured and estimated; `phase`: where the estimate has its peak."""

    measured: int
    predicted: int
    weights: int
    kv_cache: int
    activations: int
    phase: str
    seconds: float


LONG = tuple(Job(SMALL, "float32", 1, length - 4, 2048) for length in (8192, 32768, 131072))
VALIDATION = (
    Job(WIDE, "float32", 1, 4096, 2048),
    Job(WIDE, "float32", 1, 2048, 2048),
    Job(WIDE, "float32", 8, 256, 1024),
    Job(WIDE, "bfloat16", 1, 1024, 512),
    Job(TIED, "float32", 1, 4096, 2048),
    Job(TIED, "bfloat16", 8, 128, 512),
    Job(ATTENTION, "float32", 1, 8192, 1024),
    Job(ATTENTION, "float32", 32, 512, 2048),
    Job(SMALL, "float32", 64, 512, 4096),
)


def measure(job: Job, threads: int = 1) -> Measurement:
    """Run the job in a process of its own. Raises MinqwenError with what it said if it fails."""
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(asdict(job))],
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise MinqwenError(f"the measured process failed:\n{done.stderr}")
    return Measurement(**json.loads(done.stdout))


def print_here(job: str) -> None:
    """What `measure` runs: the job, given as JSON, in this process; prints a Measurement."""
    print(json.dumps(asdict(measure_here(Job(**json.loads(job))))))


def measure_here(job: Job) -> Measurement:
    """Run the job in this process, which must be as `measure` starts it."""
    estimate = job.estimate()
    draw = random.Random(0)
    ids = range(job.config["vocab_size"])
    prompts = [draw.choices(ids, k=job.length) for _ in range(job.prompts)]
    _warm_up(job.dtype)
    before = resident_bytes("VmRSS")
    model = _random_model(job)
    began = time.perf_counter()
    forget_high_water_mark()
    _generate(model, prompts, job.new_tokens, job.tokens)
    return Measurement(
        measured=resident_bytes("VmHWM") - before,
        predicted=estimate.total,
        weights=estimate.weights,
        kv_cache=estimate.kv_cache,
        activations=estimate.activations,
        phase=estimate.phase,
        seconds=time.perf_counter() - began,
    )


def _warm_up(dtype: str) -> None:
    tiny = Job(SMALL, dtype, prompts=2, length=2048, tokens=2048)
    _generate(_random_model(tiny), [[1] * tiny.length] * tiny.prompts, 3, tiny.tokens)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _random_model(job: Job) -> Qwen2:
    model = Qwen2(job.model_config(), dtype=getattr(torch, job.dtype))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    return model.prepare()


def _generate(model: Qwen2, prompts: list[list[int]], new_tokens: int, step_tokens: int) -> None:
    longest = len(prompts[0]) + new_tokens
    llm = LLM(
        model,
        max_model_len=longest,
        block_size=BLOCK_SIZE,
        num_blocks=len(prompts) * -(-longest // BLOCK_SIZE),
        max_num_batched_tokens=step_tokens,
        max_num_seqs=len(prompts),
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)


def line_through(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(slope, value at 0) of the least-squares line."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in points)
    slope = covariance / sum((x - mean_x) ** 2 for x, _ in points)
    return slope, mean_y - slope * mean_x
