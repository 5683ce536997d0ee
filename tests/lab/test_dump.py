"""What dump.py writes of transformers' model, and of models built like vLLM's and SGLang's."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from support.engines import VLLM, SGLang
from support.paths import ROOT
from support.qwen2 import cast, oracle, ours, tokens
from support.ranks import on_ranks
from torch import nn

from minqwen.config import ModelConfig
from minqwen.lab import dump as dump_module
from minqwen.lab.diff.dumps import Dump
from minqwen.lab.dump import DumpError, dump
from minqwen.model.trace import point_names

PAGE = (ROOT / "docs" / "dumps.md").read_text()
T = 12
NOT_HAD = {"norm1.normalized", "norm2.normalized", "final_norm.normalized"}
EAGER_ONLY = {"attn.scores", "attn.pattern"}
POSITIONS = torch.arange(T)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def hf():
    with torch.no_grad():
        return oracle(rope_parameters={"rope_type": "default", "rope_theta": 1e4})


@pytest.fixture
def ids(hf):
    return tokens(hf, 1, T)


def config_of(hf):
    return ModelConfig.from_dict(hf.config.to_dict())


def expected(hf, ids):
    """Our trace of the same model, without a batch dimension."""
    _, seen = ours(hf).run_with_cache(ids)
    return {name: x[0] for name, x in seen.items()}


def within(name):
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def without(points):
    return [name for name in point_names(2) if within(name) not in points]


def assert_holds(dumped, n, trace, missing, exact=False):
    assert dumped.names(n) == without(missing)
    for name in dumped.names(n):
        x = dumped.read(n, name)
        if exact:
            assert torch.equal(x, trace[name]), name
        else:
            torch.testing.assert_close(x, trace[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dump_of_transformers_has_the_bits_of_our_trace(hf, ids, tmp_path, dtype):
    hf = cast(hf, dtype)
    with dump(hf, tmp_path):
        hf(ids)
    dumped = Dump.open(tmp_path, config_of(hf))
    assert dumped.passes == 1 and dumped.dtype == dtype
    assert dumped.engine.startswith("transformers 5")
    assert dumped.ids(0) == ids[0].tolist() and dumped.positions(0) == list(range(T))
    assert_holds(dumped, 0, expected(hf, ids), NOT_HAD, exact=True)


def test_the_model_computes_the_same_with_hooks_and_has_none_afterwards(hf, ids, tmp_path):
    before = hf(ids).logits
    with dump(hf, tmp_path):
        during = hf(ids).logits
    assert torch.equal(before, during)
    for module in hf.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    hf(ids)
    assert Dump.open(tmp_path, config_of(hf)).passes == 1


def test_sdpa_shows_no_scores_and_without_a_cache_no_turned_keys(hf, ids, tmp_path):
    hf = cast(hf, torch.float32)
    hf.set_attn_implementation("sdpa")
    with dump(hf, tmp_path):
        hf(ids, use_cache=False)
    trace = expected(hf, ids)
    missing = NOT_HAD | EAGER_ONLY | {"attn.rot_k"}
    assert_holds(Dump.open(tmp_path, config_of(hf)), 0, trace, missing)


def test_a_decode_step_is_a_pass_of_its_own(hf, ids, tmp_path):
    with dump(hf, tmp_path):
        cache = hf(ids[:, :-1], use_cache=True).past_key_values
        hf(ids[:, -1:], past_key_values=cache)
    dumped, trace = Dump.open(tmp_path, config_of(hf)), expected(hf, ids)
    assert dumped.passes == 2 and dumped.positions(1) == [T - 1]
    assert dumped.ids(0) + dumped.ids(1) == ids[0].tolist()
    for name in without(NOT_HAD):
        last = dumped.read(1, name)
        whole = trace[name][:, -1:] if within(name) in EAGER_ONLY else trace[name][-1:]
        torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4, msg=name)


def test_logits_may_be_of_the_last_tokens_only(hf, ids, tmp_path):
    with dump(hf, tmp_path):
        hf(ids, logits_to_keep=3)
    logits = Dump.open(tmp_path, config_of(hf)).read(0, "logits")
    assert torch.equal(logits, hf(ids, logits_to_keep=3).logits[0])


def test_embeddings_may_be_given_in_place_of_ids(hf, ids, tmp_path):
    with dump(hf, tmp_path):
        hf(inputs_embeds=hf.model.embed_tokens(ids))
    dumped = Dump.open(tmp_path, config_of(hf))
    assert_holds(dumped, 0, expected(hf, ids), NOT_HAD, exact=True)


# ---- vLLM and SGLang ----------------------------------------------------------------------------


def test_fused_layers_are_split_and_what_is_written_over_was_copied(hf, ids, tmp_path):
    engine = VLLM(hf)
    with dump(engine, tmp_path):
        hidden = engine(ids[0], POSITIONS)
        engine.compute_logits(hidden)
    assert_holds(Dump.open(tmp_path, config_of(hf)), 0, expected(hf, ids), NOT_HAD | EAGER_ONLY)


def test_logits_of_several_calls_are_put_in_order(hf, ids, tmp_path):
    """vLLM computes those that it samples from first, then those of prompt_logprobs."""
    engine = VLLM(hf)
    with dump(engine, tmp_path):
        hidden = engine(ids[0], POSITIONS)
        engine.compute_logits(hidden[-1:])
        engine.compute_logits(hidden[:-1])
    logits = Dump.open(tmp_path, config_of(hf)).read(0, "logits")
    torch.testing.assert_close(logits, expected(hf, ids)["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_the_ranks_parts_are_joined(ids, tmp_path, ranks):
    """Of 3 ranks each holds one KV head, of 6 two hold the same."""
    hf = oracle(num_attention_heads=6, num_key_value_heads=2 if ranks == 2 else 3, head_dim=8,
                intermediate_size=48)  # fmt: skip

    def run(mesh):
        engine = VLLM(hf, mesh)
        writer = dump(engine, tmp_path)
        writer.start()
        engine.compute_logits(engine(ids[0], POSITIONS))
        writer.stop()

    on_ranks(ranks, run)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        f"0.rank{rank}of{ranks}.safetensors" for rank in range(ranks)
    ]
    described = json.loads((tmp_path / "dump.json").read_text())
    assert described["ranks"] == ranks and described["split"]["attn.q"] == 1
    assert_holds(Dump.open(tmp_path, config_of(hf)), 0, expected(hf, ids), NOT_HAD | EAGER_ONLY)


def test_sglang_gives_the_last_tokens_logits(hf, ids, tmp_path):
    engine = SGLang(hf)
    with dump(engine, tmp_path):
        engine(ids[0], POSITIONS)
    dumped, trace = Dump.open(tmp_path, config_of(hf)), expected(hf, ids)
    assert dumped.read(0, "logits").shape == (1, hf.config.vocab_size)
    trace["logits"] = trace["logits"][-1:]
    assert_holds(dumped, 0, trace, NOT_HAD | EAGER_ONLY)


def test_the_recipe_for_sglang_writes_each_later_pass_when_the_next_begins(
    hf, ids, tmp_path, monkeypatch
):
    """The hook of docs/dumps.md, placed as SGLang places it."""
    monkeypatch.setitem(sys.modules, "dump", dump_module)
    block = re.search(r"```python\n(from dump import dump\nfrom torch import nn.*?)```", PAGE, re.S)
    recipe = {}
    exec(block[1], recipe)
    engine = SGLang(hf)
    hook = recipe["start"]({"out": str(tmp_path)})
    for module in (engine.model, engine.logits_processor):
        module.register_forward_hook(hook)
    for n in range(3):
        assert not list(tmp_path.glob("*.safetensors")), n
        engine(ids[0], POSITIONS)
    dumped, trace = Dump.open(tmp_path, config_of(hf)), expected(hf, ids)
    trace["logits"] = trace["logits"][-1:]
    assert dumped.passes == 1
    assert_holds(dumped, 0, trace, NOT_HAD | EAGER_ONLY)


# ---- refusals -----------------------------------------------------------------------------------


def refused(act, *words):
    with pytest.raises(DumpError) as e:
        act()
    line = str(e.value)
    assert "\n" not in line and all(word in line for word in words), line


def run(model, path, *args, **options):
    with dump(model, path):
        model(*args, **options)


def test_an_unknown_model_is_refused_with_what_was_seen(tmp_path):
    gpt2 = nn.ModuleDict({"transformer": nn.ModuleDict({"wte": nn.Identity(), "h": nn.Identity()})})
    refused(lambda: dump(gpt2, tmp_path), "ModuleDict", "transformer.wte, transformer.h")


def test_a_layer_with_other_modules_is_refused_with_its_modules(hf, tmp_path):
    hf = cast(hf, torch.float32)
    hf.model.layers[1].mlp = nn.Sequential(nn.Identity())
    refused(lambda: dump(hf, tmp_path).start(), "Sequential has no module 'gate_proj'", "are 0")


def test_two_prompts_at_once_are_refused(hf, tmp_path):
    refused(lambda: run(hf, tmp_path, tokens(hf, 2, 5)), "2 prompts at once")


def test_a_directory_with_a_dump_is_refused(hf, ids, tmp_path):
    run(hf, tmp_path, ids)
    refused(lambda: run(hf, tmp_path, ids), str(tmp_path), "holds a dump already")


def test_a_file_of_a_pass_is_there_whole_or_not_at_all(hf, ids, tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr("minqwen.lab.dump.save_file", full)
    with pytest.raises(OSError, match="no space"), dump(hf, tmp_path):
        hf(ids)
    assert os.listdir(tmp_path) == []


def test_no_pass_is_an_error_but_not_after_another_error(hf, tmp_path):
    def nothing():
        with dump(hf, tmp_path):
            pass

    def failing():
        with dump(hf, tmp_path):
            raise KeyError("another")

    refused(nothing, "no forward pass of Qwen2ForCausalLM was seen")
    with pytest.raises(KeyError, match="another"):
        failing()


def test_ranks_that_do_not_fit_are_refused(hf, ids, tmp_path):
    refused(lambda: dump(hf, tmp_path, rank=0, ranks=4), "rank 0 of 4", "6 heads")

    def two():
        with dump(hf, tmp_path, rank=0, ranks=2):
            hf(ids)

    refused(two, "layers.0.attn.q has 60 columns, expected 30 on one of 2 ranks", "rank=R")


def test_the_file_can_be_copied_alone():
    tree = ast.parse(Path(dump_module.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [name for node in imports for name in imported_by(node)]
    assert {name.split(".")[0] for name in names} <= {
        "torch",
        "safetensors",
        *sys.stdlib_module_names,
    }


def imported_by(node):
    return [node.module] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
