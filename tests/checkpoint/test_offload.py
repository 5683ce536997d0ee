"""Weights that stay elsewhere: the same bits in less memory, also when a file changes meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from support.forked import forked
from support.paths import ROOT

from minqwen import LLM, ModelConfig, Qwen2, SamplingParams
from minqwen.errors import CheckpointError, ConfigError

IDS = [[5, 300, 41, 7, 9, 200, 77], [8, 8, 900]]


@pytest.mark.parametrize("arithmetic", ["native", "exact"])
@pytest.mark.parametrize("offload", ["memory", "disk"])
def test_offload_changes_no_bit(embedded, offload, arithmetic):
    """Of the oracle's logits, and of what the engine says, twice over."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=5)
    found = {}
    for where in (None, offload):
        model = Qwen2.from_pretrained(
            embedded, dtype="float32", arithmetic=arithmetic, offload=where
        )
        llm = LLM(
            model, max_model_len=64, num_blocks=32, max_num_batched_tokens=4, max_num_seqs=2, seed=0
        )
        with torch.no_grad():
            logits = model(torch.tensor(IDS[:1]))
        outputs = [
            o.outputs[0] for _ in range(2) for o in llm.generate(IDS, params, use_tqdm=False)
        ]
        found[where] = logits, [(o.token_ids, o.logprobs) for o in outputs]
    assert torch.equal(found[None][0], found[offload][0])
    assert found[None][1] == found[offload][1]


def test_layers_have_no_weights_before_and_after(embedded):
    model = Qwen2.from_pretrained(embedded, dtype="float32", offload="disk")
    whole = Qwen2.from_pretrained(embedded, dtype="float32")

    def resident() -> set[str]:
        return {name for name, x in model.named_parameters() if not x.is_meta}

    assert resident() == {
        name for name, _ in whole.named_parameters() if not name.startswith("model.layers.")
    }
    seen = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(resident()))
    with torch.no_grad():
        model(torch.tensor(IDS[:1]))
    assert {name.split(".")[2] for name in seen[0] if ".layers." in name} == {"1"}
    assert not any(".layers." in name for name in resident())
    with pytest.raises(CheckpointError, match="offload"):
        model.save_pretrained("/nowhere")


def test_hooks_and_traces_work(embedded):
    whole, model = (
        Qwen2.from_pretrained(embedded, dtype="float32", offload=o) for o in (None, "disk")
    )
    ids = torch.tensor(IDS[:1])
    for (name, a), b in zip(
        whole.run_with_cache(ids)[1].items(), model.run_with_cache(ids)[1].values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_failing_layer_can_be_computed_again(embedded, tmp_path):
    """A file that is gone ends the pass with one line; when it is back, the next pass is right."""
    for file in embedded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = Qwen2.from_pretrained(tmp_path, dtype="float32", offload="disk")
    ids = torch.tensor(IDS[:1])
    with torch.no_grad():
        right = model(ids)
    weights = tmp_path / "model.safetensors"
    weights.rename(tmp_path / "away")
    with torch.no_grad(), pytest.raises(CheckpointError) as e:
        for _ in range(2):  # the first layer may be here already
            model(ids)
    assert "\n" not in str(e.value) and "model.safetensors" in str(e.value)
    (tmp_path / "away").rename(weights)
    with torch.no_grad():
        assert torch.equal(model(ids), right)


def test_unknown_places_are_refused(embedded, tmp_path):
    with pytest.raises(ConfigError, match="'memory' or 'disk'"):
        Qwen2.from_pretrained(tmp_path, offload="cloud")  # before anything is looked for


MEASURE = """
import json, sys, psutil, torch
from minqwen import Qwen2
before = psutil.Process().memory_info().rss
model = Qwen2.from_pretrained(sys.argv[1], dtype="float32", offload=sys.argv[2] or None)
most, rss = 0, lambda *_: psutil.Process().memory_info().rss
for layer in model.model.layers:
    def hook(*_):
        global most
        most = max(most, rss())
    layer.register_forward_pre_hook(hook)
with torch.no_grad():
    model(torch.tensor([[1, 2, 3]]))
print(json.dumps(max(most, rss()) - before))
"""


def test_disk_needs_a_few_layers_of_memory(tmp_path):
    config = ModelConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        dtype="float32",
    )
    model = Qwen2(config, dtype=torch.float32)
    for x in model.parameters():
        torch.nn.init.normal_(x, std=0.02)
    model.save_pretrained(tmp_path / "m")
    used = {}
    for where in ("", "disk"):
        out = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path / "m"), where],
            capture_output=True,
            text=True,
        )
        used[where] = json.loads(out.stdout)
    layer = 4 * sum(x.numel() for x in model.model.layers[0].parameters())
    assert used[""] > 15 * layer and used["disk"] < 5 * layer, (used, layer)


def test_ranks_stream_their_own_slices(embedded):
    flags = [
        "--prompt",
        "In the beginning",
        "--max-tokens",
        "6",
        "--temperature",
        "0",
        "--arithmetic",
        "exact",
        "--dtype",
        "float32",
        "--json",
    ]
    outputs = [
        forked(2, ROOT / "tools" / "generate.py", [*flags, *more])
        for more in (["--offload", "disk"], [])
    ]
    texts = [json.loads(o.stdout)["token_ids"] for o in outputs]
    assert texts[0] == texts[1]
