"""Two configs that mean different functions: named first, however little the outputs show of it."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from support.heads import build, extended, random_model
from support.tool import run_tool_here

from minqwen import Checkpoint, ModelConfig
from minqwen.checkpoint import write_checkpoint
from minqwen.checkpoint.reader import EMBEDDING, HEAD
from minqwen.errors import MinqwenError
from minqwen.heads.layout import layout
from minqwen.lab.verify import compare_models, inspect_layers
from minqwen.lab.verify_configs import FUNCTION, SIZES, differing_settings

# Fields of ModelConfig by which two checkpoints of one function may differ.
HEADS = {"num_attention_heads", "num_key_value_heads", "intermediate_size", "model_type"}
NO_FUNCTION = {"max_position_embeddings", "dtype", "quantization_config", "raw", "source"}
TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CHANGES = {  # key of config.json -> (another value, what is said of it)
    "rms_norm_eps": (1e-5, "rms_norm_eps 1e-06 and 1e-05"),
    "rope_theta": (1e4, "rope_theta 1000000.0 and 10000.0"),
    "rope_scaling": (YARN, "rope_scaling None and RopeScaling(factor=4.0"),
}


def write(path, config, weights):
    dtype = getattr(torch, config.dtype)
    write_checkpoint(path, config, ((n, w.to(dtype)) for n, w in weights.items()))


def model(tied: bool = False) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    config, weights = random_model(6, 3)
    if tied:
        config = config.replace(tie_word_embeddings=True)
        weights.pop(HEAD)
    return config, weights


@pytest.fixture
def pair(tmp_path):
    """A checkpoint and its extension, ready to be changed."""
    config, weights = model()
    write(tmp_path / "a", config, weights)
    target, wide = extended(config, weights, layout(config, 9))
    write(tmp_path / "b", target, wide)
    return tmp_path / "a", tmp_path / "b"


def verify(pair, *flags):
    """(exit status, printed lines, report, page) of `heads.py verify`."""
    a, b = pair
    facts, page = a.parent / "facts.json", a.parent / "page.html"
    done = run_tool_here("heads.py", "verify", a, b, "--json", facts, "--html", page, *flags)
    assert not done.err, done.err
    return done.code, done.out.splitlines(), json.loads(facts.read_text()), page.read_text()


def change(path, **values) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_an_extension_with_the_same_settings_is_the_same_model(pair):
    code, lines, facts, page = verify(pair)
    assert code == 0 and lines[0].startswith("bitwise: error 1 times")
    assert facts["verdict"] == facts["outputs"] == "bitwise" and facts["settings"] == []
    assert "<strong>bitwise</strong>" in page


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_that_changes_the_function_is_named_first_in_every_output(pair, key, dtype):
    value, said = CHANGES[key]
    change(pair[1], **{key: value})
    code, lines, facts, page = verify(pair, "--dtype", dtype)
    assert code == 1
    assert lines[0].startswith(f"different: config.json: {said}")
    assert lines[1].startswith("  outputs on this text: ")
    assert facts["verdict"] == "different" and facts["settings"][0].startswith(said)
    assert "<strong>different</strong>" in page and "strong{color:var(--bad)}" in page
    assert page.index("<li>config.json: " + said.split("(")[0]) < page.index(
        "not shown by the outputs"
    )


def test_outputs_that_show_nothing_of_it_do_not_make_it_the_same_model(pair):
    """A change below what bfloat16 keeps: every logit has the same bits."""
    change(pair[1], rms_norm_eps=1.0000001e-6)
    code, lines, facts, page = verify(pair, "--dtype", "bfloat16")
    assert code == 1 and lines[0].startswith("different: config.json: rms_norm_eps 1e-06 and 1.000")
    assert facts["outputs"] == "bitwise" and facts["verdict"] == "different"
    assert "equal to rounding" not in page and "<strong>different</strong>" in page
    assert "every rule is kept" not in page
    assert any("bfloat16 rounds every value to 0.0039 of it" in line for line in lines)
    assert any("bfloat16 rounds every value" in limit for limit in facts["not_exposed"])


@pytest.mark.parametrize(
    "field, change_of", [("vocab_size", {"vocab_size": 96}), ("head_dim", {"head_dim": 4})]
)
def test_other_sizes_and_other_settings_are_told_together(tmp_path, field, change_of):
    config, weights = model()
    write(tmp_path / "a", config, weights)
    other = config.replace(rms_norm_eps=1e-5, **change_of)
    small = {n: torch.zeros(shape) for n, shape in other.parameter_shapes().items()}
    write(tmp_path / "b", other, small)
    code, lines, facts, page = verify((tmp_path / "a", tmp_path / "b"))
    assert code == 1 and lines[0].startswith(f"different: {field} ")
    assert "rms_norm_eps 1e-06 and 1e-05" in lines[0]
    assert facts["verdict"] == "different" and len(facts["settings"]) == 2
    assert "<strong>different</strong>" in page and "rms_norm_eps" in page


def test_a_head_of_its_own_is_another_function_unless_it_equals_the_embedding(tmp_path):
    config, weights = model(tied=True)
    write(tmp_path / "tied", config, weights)
    loose = config.replace(tie_word_embeddings=False)
    write(tmp_path / "copy", loose, weights | {HEAD: weights[EMBEDDING]})
    wide = {n: w.float() for n, w in weights.items()}
    write(tmp_path / "wide", loose.replace(dtype="float32"), wide | {HEAD: wide[EMBEDDING]})
    write(tmp_path / "own", loose, weights | {HEAD: weights[EMBEDDING] * 1.5})
    found = {
        name: differing_settings(Checkpoint(tmp_path / "tied"), Checkpoint(tmp_path / name))
        for name in ("copy", "wide", "own")
    }
    assert found["copy"] == found["wide"] == []
    assert found["own"] == ["tie_word_embeddings True and False: not the same function"]


def test_another_activation_is_refused_when_the_config_is_read(pair):
    change(pair[1], hidden_act="gelu")
    done = run_tool_here("heads.py", "verify", *pair)
    assert done.code == 2 and "hidden_act" in done.err and len(done.err.splitlines()) == 1


def test_every_field_of_a_config_is_known_to_matter_or_not():
    """A field that is added later must be put into one of these sets."""
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    known = {*FUNCTION, *SIZES, "tie_word_embeddings"}
    assert known | HEADS | NO_FUNCTION | TOKENS == fields
    assert not known & (HEADS | NO_FUNCTION | TOKENS)


def test_a_broken_rule_is_different_even_where_the_outputs_agree():
    config, weights = random_model(6, 3)
    target, wide = extended(config, weights, layout(config, 9))
    name = "model.layers.0.self_attn.k_proj.bias"
    wide[name] = torch.zeros_like(wide[name])
    report = compare_models(
        build(config, weights),
        build(target, wide),
        build(config, weights, dtype=torch.float64),
        torch.tensor([[5]]),  # one token sees only itself, whatever its score is
        inspect_layers(config, target, weights.__getitem__, wide.__getitem__),
        greedy_tokens=0,
    )
    assert report.outputs == "bitwise" and report.verdict == "different" and not report.same
    assert "the k or v bias" in report.problems[0]


def test_a_checkpoint_that_cannot_be_read_writes_no_report(pair):
    shutil.rmtree(pair[1])
    with pytest.raises(MinqwenError):
        Checkpoint(pair[1])
    done = run_tool_here("heads.py", "verify", *pair, "--json", pair[0].parent / "facts.json")
    assert done.code == 2 and not (pair[0].parent / "facts.json").exists()
