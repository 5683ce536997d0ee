"""Another engine's intermediates against float64: what is wrong first, and by which mistake."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from support.dumps import (
    ENGINE,
    MemoryDump,
    MemoryPack,
    MemoryPrompt,
    dump_of,
    traces,
)
from support.heads import build, random_model
from support.qwen2 import cast, oracle
from support.ranks import on_ranks

from minqwen.config import ModelConfig, RopeScaling
from minqwen.errors import MinqwenError
from minqwen.lab.diff.diagnosis import Pair, diagnose, messages_of, named_tokens, suspects
from minqwen.lab.diff.diff import (
    Reference,
    UnknownPrompt,
    as_json,
    compare,
    figure,
    operation_at,
    read_texts,
    refused_as_json,
    right_pair,
)
from minqwen.lab.diff.dumps import Dump
from minqwen.lab.dump import dump
from minqwen.lab.faults import FAULTS
from minqwen.model import Qwen2
from minqwen.model.trace import point_names

G = torch.Generator().manual_seed(1)
PROMPTS = [torch.randint(0, 97, (n,), generator=G).tolist() for n in (40, 24)]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class Case:
    """The right model: a pack of its prompts, and in each dtype its pair and all suspects."""

    def __init__(self):
        config, self.weights = random_model(14, 2)
        config = config.replace(rope_scaling=RopeScaling(4.0, 16))
        raw = {**config.raw, "sliding_window": 8, "use_sliding_window": False}
        self.config = dataclasses.replace(config, raw=raw)
        self.pack = MemoryPack(self.config, [MemoryPrompt(ids) for ids in PROMPTS])
        self.pairs, self.suspects = {}, {}
        for dtype in (torch.float32, torch.bfloat16):
            self.pairs[dtype] = right_pair(self.config, self.weights, dtype)
            self.suspects[dtype] = list(suspects(self.config, self.weights, dtype))

    def wrong(self, name, dtype):
        return next(s.pair.native for s in self.suspects[dtype] if s.fault.name == name)

    def diff(self, dump, pack=None):
        texts = read_texts(pack or self.pack, dump)
        right = self.pairs[dump.dtype]
        name = str(dump.dtype).removeprefix("torch.")
        report = compare(Reference(pack or self.pack, right), texts, name)
        if report.verdict == "diverge":
            diagnose(report, right, texts, self.suspects[dump.dtype])
        return report


@pytest.fixture(scope="module")
def case():
    with torch.no_grad():
        return Case()


def changed(dump, name, change, n=0):
    """The dump with one tensor of a pass changed."""
    held = [dict(seen) for seen in dump.held]
    held[n][name] = change(held[n][name].clone())
    return dataclasses.replace(dump, held=held)


# ---- what is right -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [None, ENGINE, ["*.resid_post", "logits"], "logits"])
def test_our_own_model_agrees_whatever_it_shows(case, dtype, names):
    report = case.diff(dump_of(case.pairs[dtype].native, PROMPTS, names))
    assert report.verdict == "agree" and report.first is None
    assert all(p.units == 1 or not p.worst.unit for p in report.points)
    assert all(p.added in (0, 1) for p in report.points)  # 0 where nothing can round
    name = str(dtype).removeprefix("torch.")
    last = report.points[-1]
    assert report.sentence() == (
        f"agrees: {name} rounding at every point ({last.point} at 1 units)"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_agrees(dtype, attention, tmp_path):
    hf = oracle(seed=2)
    config = ModelConfig.from_dict(hf.config.to_dict())
    weights = {name: w.clone() for name, w in hf.state_dict().items()}
    prompts = [torch.randint(0, 61, (n,), generator=G).tolist() for n in (33, 9)]
    other = cast(hf, dtype)
    other.set_attn_implementation(attention)
    with dump(other, tmp_path):
        for ids in prompts:
            other(torch.tensor([ids]))
    pack = MemoryPack(config, [MemoryPrompt(ids) for ids in prompts])
    reference = Reference(pack, right_pair(config, weights, dtype))
    texts = read_texts(pack, Dump.open(tmp_path, config))
    assert len(texts) == 2 and len(texts[0].seen) > 3 + 2 * 12
    report = compare(reference, texts, "dtype")
    assert report.verdict == "agree", report.sentence()
    assert max(p.added for p in report.points) < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 4])
def test_our_own_ranks_agree(dtype, ranks):
    """Their partial sums are rounded before they are added, which alone comes to 1.41 units."""
    config, weights = random_model(8, 4)
    pack = MemoryPack(config, [MemoryPrompt(ids) for ids in PROMPTS])

    def read(name, shard):
        w = weights[name]
        return w if shard is None else w.narrow(shard.dim, shard.start, shard.stop - shard.start)

    def run(mesh):
        return dump_of(Qwen2.from_tensors(config, read, dtype=dtype, mesh=mesh), PROMPTS)

    report = compare(
        Reference(pack, right_pair(config, weights, dtype)),
        read_texts(pack, on_ranks(ranks, run)[0]),
        "dtype",
    )
    assert report.verdict == "agree", report.sentence()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_pages_agree(case, dtype):
    _, caches = case.pairs[dtype].native.run_with_cache(PROMPTS)
    held = [{name: x[0] for name, x in cache.items()} for cache in caches]
    report = case.diff(MemoryDump(dtype, held, PROMPTS))
    assert report.verdict == "agree", report.sentence()


def test_our_exact_logits_in_their_dtype_are_wrong_by_exactly_one_unit(case):
    """They are a faithful implementation's: the pack says so, and its native run does not."""
    exact = build(case.config, case.weights, arithmetic="exact")
    native, truth = case.pairs[torch.float32].native, case.pairs[torch.float32].truth
    runs = {"float64": truth, "exact-float32": exact, "native-float32": native}
    held = {run: traces(model, PROMPTS, ["logits"]) for run, model in runs.items()}
    pack = dataclasses.replace(case.pack, held=held)
    for dtype in (torch.float32, torch.bfloat16):
        engine = dump_of(exact, PROMPTS, ["logits"])
        for seen in engine.held:
            seen["logits"] = seen["logits"].to(dtype)
        assert [p.units for p in case.diff(engine, pack).points] == [1.0]
    assert case.diff(dump_of(exact, PROMPTS, ["logits"])).points[0].units < 0.9
    nearly = changed(dump_of(exact, PROMPTS, ["logits"]), "logits", lambda x: x * (1 + 1e-6))
    assert case.diff(nearly, pack).points[0].units > 1.05


def test_what_the_pack_holds_is_not_computed_again(case):
    """And what it holds is what counts."""
    held = {"float64": traces(case.pairs[torch.float32].truth, PROMPTS, ["logits"])}
    for seen in held["float64"]:
        seen["logits"] = seen["logits"] + 1
    pack = dataclasses.replace(case.pack, held=held)
    report = case.diff(dump_of(case.pairs[torch.float32].native, PROMPTS, "logits"), pack)
    assert report.points[0].worst.max_abs == pytest.approx(1, abs=1e-3)
    top = case.diff(
        dump_of(case.pairs[torch.float32].native, PROMPTS, "logits"),
        dataclasses.replace(pack, full_logits=False),
    )
    assert top.points[0].units == 1


def test_the_last_tokens_logits_are_enough(case):
    engine = dump_of(case.pairs[torch.float32].native, PROMPTS, ["final_norm", "logits"])
    last = changed(engine, "logits", lambda x: x[-1:])
    report = case.diff(last)
    assert report.verdict == "agree" and report.points[-1].units == 1
    wrong = changed(last, "logits", lambda x: x * 1.01)
    assert case.diff(wrong).first.point == "logits"


def test_scores_that_are_hidden_by_a_very_large_number_are_hidden(case):
    engine = dump_of(case.pairs[torch.float32].native, PROMPTS)
    lowest = torch.finfo(torch.float32).min
    for seen in engine.held:
        for name in seen:
            if name.endswith("scores"):
                seen[name] = seen[name].clamp_min(lowest)
    assert case.diff(engine).verdict == "agree"


# ---- what is wrong -------------------------------------------------------------------------------

WORDS = {
    "rope-interleaved": "rotary embedding of queries",
    "rope-theta-10000": "rotary embedding of queries",
    "q-bias-missing": "q_proj",
    "heads-tiled": "attention scores",
    "scale-missing": "attention scores",
    "padding-attended": "attention pattern",
    "norm-subtracts-mean": "input_layernorm",
    "gelu": "MLP's activation",
    "residual-after-norm": "residual stream after attention",
    "shard-exchanged": "o_proj",
    "stale-block": "attention scores",
    "kv-cache-float8": "attention scores",
    "weights-int4-per-group": "q_proj",
    "final-norm-twice": "final norm",
    "head-tied": "lm_head",
    "embedding-rows-shifted": "embedding",
}


# In bfloat16 these are smaller than a rounding.
FAINT = {
    "yarn-attention-factor-half": "rotary embedding of queries",
    "softmax-bfloat16": "attention pattern",
    "norm-eps-outside-root": "input_layernorm",
    "kv-cache-int8": "attention scores",
}
PLANTED = [(name, torch.bfloat16) for name in WORDS] + [(name, torch.float32) for name in FAINT]


@pytest.mark.parametrize("name, dtype", PLANTED, ids=[name for name, _ in PLANTED])
def test_a_planted_mistake_is_found_where_it_is_made_and_named(case, name, dtype):
    """Although an engine does not show what its kernel of attention does inside."""
    report = case.diff(dump_of(case.wrong(name, dtype), PROMPTS[:1], ENGINE))
    assert report.verdict == "diverge"
    assert report.explained_by is not None and report.explained_by.name == name, report.sentence()
    assert report.explained_by.units < 1.1 and report.first.units > 4
    assert report.first.operation == (WORDS | FAINT)[name]
    assert f"most like `{name}` (explains the dump to 1.0" in report.sentence()


def test_a_mistake_in_one_layer_is_found_there_and_later_layers_inherit_it(case):
    native, wrong = case.pairs[torch.float32].native, case.wrong("gelu", torch.float32)
    mixed = build(case.config, case.weights)
    mixed.model.layers[1].mlp.ops = wrong.ops
    report = case.diff(dump_of(mixed, PROMPTS))
    assert (report.first.layer, report.first.operation) == (1, "MLP's activation")
    verdicts = {p.point: p.verdict for p in report.points}
    assert [name for name, verdict in verdicts.items() if verdict == "wrong"] == [
        "layers.1.mlp.act"
    ]
    assert verdicts["layers.1.mlp.up"] == "rounding"
    assert verdicts["layers.1.mlp.out"] == verdicts["logits"] == "inherited"
    assert report.explained_by is None  # GELU in all layers does not explain it
    assert "none of the catalogue's mistakes explains it" in report.sentence()
    assert case.diff(dump_of(native, PROMPTS)).verdict == "agree"


def test_a_number_that_is_wrong_has_its_place(case):
    engine = dump_of(case.pairs[torch.float32].native, PROMPTS, ENGINE)

    def spoilt(x):
        x[5, 3] += 1.0
        return x

    report = case.diff(changed(engine, "layers.1.mlp.up", spoilt, n=1))
    point = next(p for p in report.points if p.point == "layers.1.mlp.up")
    assert (point.verdict, point.prompt, point.worst.at) == ("wrong", 1, (5, 3))
    assert point.worst.max_abs == pytest.approx(1, rel=1e-3)
    assert report.first.operation == "up_proj" and report.first.layer == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_found_where_they_come_up(case, value):
    engine = dump_of(case.pairs[torch.float32].native, PROMPTS, ENGINE)

    def spoilt(x):
        x[2] = value
        return x

    report = case.diff(changed(engine, "layers.0.attn.out", spoilt))
    assert report.first.point == "layers.0.attn.out" and report.first.units == math.inf
    assert "(infinite units, added there)" in report.sentence()
    read_strictly(as_json(report))


def test_mistakes_that_give_the_same_are_all_told(case):
    """Here one mistake under two names."""
    dtype = torch.float32
    engine = dump_of(case.wrong("gelu", dtype), PROMPTS, ENGINE)
    texts = read_texts(case.pack, engine)
    report = compare(Reference(case.pack, case.pairs[dtype]), texts, "float32")
    gelu = next(s for s in case.suspects[dtype] if s.fault.name == "gelu")
    twin = dataclasses.replace(gelu, fault=dataclasses.replace(gelu.fault, name="twin"))
    diagnose(report, case.pairs[dtype], texts, [gelu, twin])
    assert report.explained_by.name == "gelu" and [e.name for e in report.also] == ["twin"]
    assert report.sentence().endswith("units, as twin would)")


@pytest.mark.parametrize("name", [name for name, f in FAULTS.items() if f.report is not None])
def test_what_is_reported_in_place_of_logits_is_named(case, name):
    native = case.pairs[torch.float32].native
    engine = dump_of(native, PROMPTS, ["final_norm", "logits"])
    for seen, ids in zip(engine.held, PROMPTS):
        seen["logits"] = FAULTS[name].logprobs(seen["logits"], torch.tensor(ids))
    report = case.diff(engine)
    assert report.first.point == "logits" and report.explained_by.name == name


def test_a_temperature_before_the_softmax_is_named_too(case):
    engine = dump_of(case.pairs[torch.float32].native, PROMPTS, ENGINE)
    for seen in engine.held:
        seen["logits"] = seen["logits"] / 0.7
    assert case.diff(engine).explained_by.name == "logprobs-of-temperature"


# ---- which prompt --------------------------------------------------------------------------------


def test_passes_are_matched_by_their_ids_in_any_order(case):
    engine = dump_of(case.pairs[torch.float32].native, PROMPTS[::-1], "logits")
    assert [text.prompt for text in read_texts(case.pack, engine)] == [1, 0]
    without = dataclasses.replace(engine, inputs=[None, None])
    assert [text.prompt for text in read_texts(case.pack, without)] == [1, 0]  # by their lengths


def test_decode_steps_after_a_prompt_are_left_out(case):
    native = case.pairs[torch.float32].native
    both = dump_of(native, [PROMPTS[0], [5]], "logits")
    places = [list(range(40)), [40]]
    assert len(read_texts(case.pack, dataclasses.replace(both, places=places))) == 1
    with pytest.raises(UnknownPrompt):  # the first token of another prompt
        read_texts(case.pack, dataclasses.replace(both, places=[places[0], [0]]))
    with pytest.raises(UnknownPrompt):  # nothing went before
        alone = dataclasses.replace(both, held=both.held[1:], inputs=[[5]], places=[[40]])
        read_texts(case.pack, alone)


def test_prompts_of_one_length_without_ids_are_in_the_packs_order_or_refused(case):
    prompts = [PROMPTS[0][:8], PROMPTS[0][8:16]]
    pack = MemoryPack(case.config, [MemoryPrompt(ids) for ids in prompts])
    engine = dump_of(case.pairs[torch.float32].native, prompts, "logits")
    engine = dataclasses.replace(engine, inputs=[None, None])
    assert [text.prompt for text in read_texts(pack, engine)] == [0, 1]
    half = MemoryDump(torch.float32, engine.held[:1], [None])
    with pytest.raises(MinqwenError, match="no input_ids, and 2 of the pack's prompts have its 8"):
        read_texts(pack, half)


def test_what_cannot_be_compared_is_refused(case):
    native = case.pairs[torch.float32].native
    with pytest.raises(UnknownPrompt, match=r"pass 0 .* 3 ids that are no prompt .* \[1, 2, 3\]"):
        read_texts(case.pack, dump_of(native, [[1, 2, 3]], "logits"))
    nothing = MemoryDump(torch.float32, [{}], [PROMPTS[0]])
    with pytest.raises(MinqwenError, match="pass 0 of the dump has no point"):
        read_texts(case.pack, nothing)
    with pytest.raises(MinqwenError, match="the dump has no forward pass"):
        read_texts(case.pack, MemoryDump(torch.float32, [], []))
    cut = changed(dump_of(native, PROMPTS), "layers.1.attn.q", lambda x: x[:, :7])
    with pytest.raises(
        MinqwenError, match=r"layers.1.attn.q of the dump is \[40, 7, 8\], .* 14, 8"
    ):
        case.diff(cut)


@pytest.mark.parametrize("name", [name for name, f in FAULTS.items() if f.encode is not None])
def test_a_wrong_prompt_is_named_by_its_ids(case, embedded_tokenizer, name):
    messages = [
        {"role": "system", "content": "You add."},
        {"role": "user", "content": "What is 2 + 3?"},
    ]
    ids = embedded_tokenizer.encode_chat(messages)
    assert messages_of(ids, embedded_tokenizer) == messages
    pack = MemoryPack(case.config, [MemoryPrompt([1, 2, 3]), MemoryPrompt(ids)])
    wrong = FAULTS[name].ids(embedded_tokenizer, messages)
    report = named_tokens(pack, wrong, embedded_tokenizer)
    assert report.verdict == "diverge" and report.first.point == "input_ids"
    assert report.explained_by.name == name and f"come of `{name}`" in report.sentence()
    read_strictly(as_json(report))
    assert named_tokens(pack, [9, *wrong], embedded_tokenizer) is None


# ---- words and JSON ------------------------------------------------------------------------------


def test_an_operation_is_named_with_what_was_not_dumped_before_it():
    every = point_names(2)
    engine = [n for n in every if n.rpartition("attn.")[2] not in ("rot_q", "rot_k", "scores")]
    assert operation_at("layers.1.attn.z", every) == "attention's weighted values"
    assert operation_at("layers.1.attn.k", ["layers.1.norm1"]) == "k_proj"
    assert operation_at("layers.1.mlp.up", ["layers.1.norm2"]) == "up_proj"
    without_pattern = [n for n in engine if not n.endswith("pattern")]
    said = operation_at("layers.1.attn.z", without_pattern)
    assert said == "attention (between q, k, v and z)"
    said = operation_at("layers.1.mlp.out", ["layers.1.norm2"])
    assert said == "MLP (between layers.1.norm2 and layers.1.mlp.out)"
    said = operation_at("layers.1.resid_post", ["layers.0.resid_post"])
    assert said.endswith("(between layers.0.resid_post and layers.1.resid_post)")
    assert operation_at("logits", ["logits"]) == "lm_head (between the tokens and logits)"
    assert operation_at("layers.0.attn.q", ["layers.0.norm1"]) == "q_proj"
    assert operation_at("embed", []) == "embedding"


def test_figures_are_short():
    assert [figure(x) for x in (1.0234, 37.21, 8234.5, math.inf, math.nan)] == [
        "1.02",
        "37.2",
        "8.2e3",
        "infinite",
        "infinite",
    ]
    assert figure(3e12) == "3.0e12"


def read_strictly(text):
    """JSON as other languages read it: without NaN and Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_report_as_json(case):
    engine = dump_of(case.wrong("gelu", torch.bfloat16), PROMPTS, ENGINE)
    found = read_strictly(as_json(case.diff(engine)))
    assert found["verdict"] == "diverge" and found["dtype"] == "bfloat16"
    assert found["first"]["layer"] == 0 and found["first"]["point"] == "layers.0.mlp.act"
    assert found["first"]["operation"] == "MLP's activation" and found["first"]["units"] > 2
    assert found["explained_by"]["name"] == "gelu" and found["explained_by"]["units"] < 2
    assert [p["point"] for p in found["points"]][:3] == [
        "embed",
        "layers.0.norm1",
        "layers.0.attn.q",
    ]
    assert set(found["points"][0]) > {"units", "added", "verdict", "max_abs", "at", "ulps"}
    assert 0 < found["logits"]["kl"] <= found["logits"]["kl_max"]
    right = read_strictly(as_json(case.diff(dump_of(case.pairs[torch.float32].native, PROMPTS))))
    assert right["verdict"] == "agree" and right["first"] is right["explained_by"] is None
    refused = read_strictly(refused_as_json("no such file"))
    assert refused["verdict"] == "refused" and refused["reason"] == "no such file"


def test_in_float64_a_mistake_is_found_too(case):
    pair = right_pair(case.config, case.weights, torch.float64)
    assert isinstance(pair, Pair) and pair.native is not pair.truth
    wrong = FAULTS["gelu"].model(case.config, case.weights, dtype=torch.float64)
    texts = read_texts(case.pack, dump_of(wrong, PROMPTS, ENGINE))
    report = compare(Reference(case.pack, pair), texts, "float64")
    some = (
        s for s in suspects(case.config, case.weights, torch.float64) if s.fault.kind != "weights"
    )
    diagnose(report, pair, texts, some)
    assert report.explained_by.name == "gelu" and report.first.units > 1e6
    right = read_texts(case.pack, dump_of(pair.truth, PROMPTS, ENGINE))
    assert compare(Reference(case.pack, pair), right, "float64").verdict == "agree"
