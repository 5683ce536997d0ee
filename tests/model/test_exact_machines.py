"""Exact logits are the same bits on every machine: ranks, instruction sets, GPUs, frozen prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.exact import STORAGE, alone, ragged_ids
from support.forked import forked
from support.paths import DATA, EMBEDDED, ROOT

from minqwen import Qwen2
from minqwen.lab.golden import digest, fingerprint, prompts

FINGERPRINTS = json.loads((DATA / "fingerprints.json").read_text())

RANKS = """
import sys, torch
sys.path.insert(0, {tests!r})
from minqwen import Checkpoint, Mesh, Qwen2
from minqwen.lab.golden import digest
from support.exact import STORAGE, more_heads, ragged_ids
from support.paged import run_paged
from support.paths import EMBEDDED
mesh = Mesh.from_env("cpu")
checkpoint = Checkpoint(EMBEDDED)
config, tensors = checkpoint.config, {{name: checkpoint.read(name) for name in checkpoint.names}}
if mesh.size > 4:
    config, tensors = more_heads((config, tensors), 8)
def read(name, part):
    x = tensors[name]
    return x if part is None else x.narrow(part.dim, part.start, part.stop - part.start)
sequences = ragged_ids(3, 40, seed=6)
torch.set_grad_enabled(False)
for arithmetic, dtype in [*(("exact", dtype) for dtype in STORAGE), ("native", torch.float32)]:
    model = Qwen2.from_tensors(config, read, dtype=dtype, mesh=mesh, arithmetic=arithmetic)
    out = digest(run_paged(model, sequences, 16, lambda i, done: 11))
    if mesh.rank == 0:
        print(arithmetic, dtype, out, flush=True)
mesh.close()
"""


@pytest.fixture(scope="module")
def of_one(models) -> dict[str, str]:
    """What one rank says: a digest for each arithmetic and dtype."""
    sequences = ragged_ids(3, 40, seed=6)
    ones = [*(("exact", dtype) for dtype in STORAGE), ("native", torch.float32)]
    return {f"{a} {dtype}": digest(alone(models[a, dtype], sequences)) for a, dtype in ones}


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_tensor_parallel_degree(of_one, degree):
    """8 ranks share the 4 key/value heads, two to each, with 28 query heads extended to 32.

    The control is native float32: the ranks' partial sums are another order of the sum.
    """
    result = forked(degree, RANKS.format(tests=str(ROOT / "tests")), timeout=300)
    assert result.returncode == 0, result.stderr
    got = dict(line.rsplit(" ", 1) for line in result.stdout.splitlines())
    differ = [what for what in of_one if got.pop(what) != of_one[what]]
    assert differ == ["native torch.float32"] and not got


INSTRUCTIONS = """
import sys, torch
from minqwen.lab.golden import digest, fingerprint, prompts
from minqwen.model import Qwen2
torch.set_num_threads(1)
native = Qwen2.from_pretrained({model!r}, dtype="float32")
print(digest([native(ids) for ids in prompts(native.config.vocab_size)]))
for dtype in {dtypes}:
    print(fingerprint({model!r}, dtype))
"""


def test_instruction_set_of_the_math_libraries():
    """What this process itself gives is the frozen fingerprint too, and the first of `native`."""
    code = INSTRUCTIONS.format(model=str(EMBEDDED), dtypes=list(FINGERPRINTS))
    here = Qwen2.from_pretrained(EMBEDDED, dtype="float32")
    native = {digest([here(ids) for ids in prompts(here.config.vocab_size)])}
    settings = [
        {"MKL_CBWR": "COMPATIBLE"},
        {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "AVX2"},
        {"ATEN_CPU_CAPABILITY": "avx2"},
    ]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **setting},
        )
        for setting in settings
    ]
    for run in runs:
        control, *digests = run.communicate(timeout=300)[0].split()
        assert run.returncode == 0 and digests == list(FINGERPRINTS.values())
        native.add(control)
    # On other makers' CPUs there may be nothing to choose from.
    if "GenuineIntel" in Path("/proc/cpuinfo").read_text():
        assert len(native) > 1


@pytest.mark.parametrize("dtype", FINGERPRINTS)
def test_the_frozen_fingerprint(dtype):
    """On any machine. `python tools/golden.py fingerprint` prints new ones, if that is intended."""
    assert fingerprint(EMBEDDED, dtype) == FINGERPRINTS[dtype]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", FINGERPRINTS)
def test_a_gpu_gives_the_cpus_bits(dtype):
    assert fingerprint(EMBEDDED, dtype, device="cuda") == FINGERPRINTS[dtype]
    native = Qwen2.from_pretrained(EMBEDDED, dtype=dtype)
    ids = prompts(native.config.vocab_size)
    assert digest([native(i) for i in ids]) != digest([native.cuda()(i.cuda()) for i in ids])
